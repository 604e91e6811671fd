"""What a run writes to disk: adapter and connector, and the state needed to go on exactly where it stopped.

A checkpoint is written beside its place and renamed when complete, so a half-written one is never taken for whole.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lavintk.errors import CheckpointError, RunError
from lavintk.models.multimodal import MultimodalModel

ADAPTER, CONNECTOR, STATE = "adapter", "connector.safetensors", "state.pt"
_NAME = re.compile(r"step-(\d{6,})$")


@dataclass
class TrainingState:
    """Where training stands.

    :param step: optimizer steps taken.
    :param best_loss: lowest validation loss so far; :param best_step: when.
    :param stale: validations since then.
    :param seconds: training time so far.
    """

    step: int = 0
    best_loss: float = float("inf")
    best_step: int = 0
    stale: int = 0
    seconds: float = 0.0


def save_weights(model: MultimodalModel, folder: Path, base: str) -> None:
    """Write what was trained, and nothing frozen, into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    if model.adapter is not None:
        model.adapter.save(folder / ADAPTER, base)
    if model.connector is not None:
        tensors = {n: p.detach().contiguous().cpu() for n, p in model.connector.named_parameters()}
        save_file(tensors, folder / CONNECTOR)


def load_weights(model: MultimodalModel, folder: Path) -> None:
    """Read what :func:`save_weights` wrote.

    :raises CheckpointError: anything missing, unexpected or misshapen.
    """
    if model.adapter is not None:
        model.adapter.load(folder / ADAPTER)
    if model.connector is None:
        return
    try:
        stored = load_file(folder / CONNECTOR)
        model.connector.load_state_dict(stored)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(str(folder / CONNECTOR), [str(error)]) from error


def checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if _NAME.match(path.name))


def save_checkpoint(
    run: Path,
    model: MultimodalModel,
    base: str,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    state: TrainingState,
) -> Path:
    """Write a complete checkpoint and return its folder."""
    final = run / "checkpoints" / f"step-{state.step:06d}"
    partial = final.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_weights(model, partial, base)
    content = {
        "state": asdict(state),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "random": _random_state(),
    }
    torch.save(content, partial / STATE)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    return final


def load_checkpoint(
    folder: Path, model: MultimodalModel, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> TrainingState:
    """Put model, optimizer, scaler and random numbers back to where ``folder`` was written.

    :raises RunError: the folder holds no complete checkpoint.
    """
    if not (folder / STATE).is_file():
        raise RunError(f"{folder} holds no complete checkpoint: {STATE} is missing")
    load_weights(model, folder)
    content: dict[str, Any] = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    optimizer.load_state_dict(content["optimizer"])
    scaler.load_state_dict(content["scaler"])
    torch.set_rng_state(content["random"]["cpu"])
    if torch.cuda.is_available() and content["random"]["cuda"]:
        torch.cuda.set_rng_state_all(content["random"]["cuda"])
    return TrainingState(**content["state"])


def prune(run: Path, keep: int, best_step: int) -> None:
    """Delete all checkpoints but the newest ``keep`` and the best one."""
    for path in checkpoints(run)[:-keep]:
        if path.name != f"step-{best_step:06d}":
            shutil.rmtree(path)


def _random_state() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}

"""What a run writes to disk: adapter and connector, and the state needed to go on exactly where it stopped.

A checkpoint is written beside its place and renamed when complete, so a half-written one is never taken for whole.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lavintk.errors import CheckpointError, RunError, TrainingError
from lavintk.models.multimodal import MultimodalModel
from lavintk.run import CHECKPOINTS, MODEL, RECIPE

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
    return sorted((path for path in (run / CHECKPOINTS).glob("step-*") if _NAME.match(path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the number of optimizer steps behind a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


def how_to_go_on(run: Path) -> str:
    """Return what a person can do with a run that did not come to its end."""
    saved = checkpoints(run)
    if not saved:
        return f"{run} has no checkpoint to go on from: start anew with another --out."
    return (
        f"What was learned up to step {step_of(saved[-1])} is safe in {saved[-1]}.\n"
        f"Go on with: lavintk train --resume {run}"
    )


def save_checkpoint(
    run: Path,
    model: MultimodalModel,
    base: str,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    state: TrainingState,
) -> Path:
    """Write a complete checkpoint and return its folder.

    :raises TrainingError: the disk does not take it; what was there before is as it was.
    """
    content = {
        "state": asdict(state),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "random": _random_state(),
    }
    with _complete(run / CHECKPOINTS / f"step-{state.step:06d}") as folder:
        save_weights(model, folder, base)
        try:
            torch.save(content, folder / STATE)
        except RuntimeError as error:  # a full disk, hidden behind a text about the inside of a zip file
            raise OSError(f"torch could not write {STATE}") from error
    return run / CHECKPOINTS / f"step-{state.step:06d}"


def save_model(run: Path, model: MultimodalModel, base: str) -> None:
    """Write the trained weights as the outcome of a run.

    :raises TrainingError: as :func:`save_checkpoint`.
    """
    with _complete(run / MODEL) as folder:
        save_weights(model, folder, base)


@contextmanager
def _complete(final: Path) -> Iterator[Path]:
    """Yield a folder to write into; it takes the place ``final`` once everything is in it."""
    partial, replaced = (final.with_name(f"{final.name}.{state}") for state in ("partial", "replaced"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(replaced, ignore_errors=True)
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise TrainingError(f"{final} cannot be written: {error}. {_free(final)}") from error


def _free(path: Path) -> str:
    """Say how much room there is where ``path`` would lie."""
    there = next(folder for folder in path.absolute().parents if folder.is_dir())
    return f"The disk has {shutil.disk_usage(there).free / 2**20:,.0f} MiB left: make room if that is too little."


def load_checkpoint(
    folder: Path, model: MultimodalModel, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> TrainingState:
    """Put model, optimizer, scaler and random numbers back to where ``folder`` was written.

    :raises RunError: the state is missing, damaged, or of another optimizer or adapter.
    :raises CheckpointError: the weights are.
    """
    content = _read_state(folder)
    try:
        load_weights(model, folder)
    except CheckpointError as error:
        raise CheckpointError(error.subject, error.faults, f"{error.advice} {_earlier(folder)}".strip()) from error
    try:
        optimizer.load_state_dict(content["optimizer"])
        scaler.load_state_dict(content["scaler"])
        torch.set_rng_state(content["random"]["cpu"])
        if torch.cuda.is_available() and content["random"]["cuda"]:
            torch.cuda.set_rng_state_all(content["random"]["cuda"])
        return TrainingState(**content["state"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RunError(
            f"{folder / STATE} does not fit the run: {type(error).__name__}: {error}. "
            f"Was the optimizer or the adapter changed in the run's {RECIPE}?"
        ) from error


def _read_state(folder: Path) -> dict[str, Any]:
    if not (folder / STATE).is_file():
        fault = "is missing"
    else:
        try:
            content = torch.load(folder / STATE, map_location="cpu", weights_only=True)
            if isinstance(content, dict):
                return content
            fault = f"holds a {type(content).__name__}, not the state of a run"
        except Exception as error:  # a damaged file surfaces as exceptions of many kinds, with long advice
            fault = f"cannot be read ({type(error).__name__}), so it is damaged or not lavintk's"
    raise RunError(f"{folder / STATE} {fault}. {_earlier(folder)}")


def _earlier(folder: Path) -> str:
    """Say what is left when the checkpoint ``folder`` is of no use."""
    others = [path.name for path in checkpoints(folder.parent.parent) if step_of(path) < step_of(folder)]
    if not others:
        return "There is no earlier checkpoint: start anew with another --out."
    return f"To go on from {others[-1]} instead, move {folder} away and resume again."


def prune(run: Path, keep: int, best_step: int) -> None:
    """Delete all checkpoints but the newest ``keep`` and the best one, and what interrupted writing left behind."""
    for path in checkpoints(run)[:-keep]:
        if path.name != f"step-{best_step:06d}":
            shutil.rmtree(path)
    for path in (run / CHECKPOINTS).iterdir():
        if path.suffix in (".partial", ".replaced"):
            shutil.rmtree(path)


def _random_state() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}

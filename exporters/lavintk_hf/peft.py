"""The adapter alone, as PEFT's own folder.

An adapter that saves itself in PEFT's format is copied. Any other is written as LoRA if its exact form is one: a
low-rank update without bias that is the same for every input, with ``alpha = r`` so that nothing is rescaled.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from safetensors.torch import save_file
from torch import Tensor

from lavintk.checkpoints import ADAPTER, how_to_go_on
from lavintk.contracts import AffineUpdate
from lavintk.errors import ModelError, RunError
from lavintk.merge import ALL, LANGUAGE, load_on_cpu
from lavintk.model_card import origin
from lavintk.run import MODEL
from lavintk_hf.card import Card, write_card

if TYPE_CHECKING:
    from lavintk.models.multimodal import MultimodalModel
    from lavintk.run import Run

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts in front of a layer's name in the base."""
INSTEAD = "Export with --format hf (the merged model) or onnx instead, or train with --adapter lora."


class PeftExporter:
    """PEFT's LoRA."""

    def export(self, run: Run, out: Path) -> None:
        """Write ``adapter_config.json``, ``adapter_model.safetensors`` and ``README.md`` into the new folder ``out``.

        The base is not loaded for an adapter that was saved in PEFT's format.

        :raises RunError: the run holds no trained weights.
        :raises ModelError: the adapter is no LoRA and has no exact form as one, or changes the vision tower.
        :raises NotAffineError: the adapter has no affine form at all.
        """
        if run.recipe.adapter is None:
            raise ModelError(f"{origin(run)} has no adapter, so there is nothing to export in PEFT's format")
        saved = run.folder / MODEL / ADAPTER
        if not saved.is_dir():
            raise RunError(f"{run.folder} holds no trained weights yet. {how_to_go_on(run.folder)}")
        if run.recipe.model.vision is not None:
            click.echo("left out: images. PEFT's folder has no place for vision tower and connector")
        assembly = None
        if _is_peft(saved / CONFIG):
            others = sorted({path.name for path in saved.iterdir()} - {CONFIG, WEIGHTS})
            if others:
                raise ModelError(
                    f"the adapter changes more than a causal LM has: {', '.join(others)} has no place in PEFT's "
                    f"format. {INSTEAD}"
                )
            out.mkdir(parents=True, exist_ok=True)
            for name in (CONFIG, WEIGHTS):
                shutil.copyfile(saved / name, out / name)
        else:
            assembly = load_on_cpu(run)
            layers = _as_lora(assembly.model)
            out.mkdir(parents=True, exist_ok=True)
            _write_lora(out, layers, run.recipe.model.language)
        write_card(out, run, assembly, Card("peft", ALL, "float32"))


def _is_peft(path: Path) -> bool:
    if not path.is_file():
        return False
    content = json.loads(path.read_text(encoding="utf-8"))
    return isinstance(content, dict) and "peft_type" in content


def _as_lora(model: MultimodalModel) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A ``[r, in]`` and B ``[out, r]`` of each linear layer, by transformers' name.

    :raises ModelError: the adapter is something else; says what.
    """
    adapter = model.adapter
    if adapter is None:
        raise ModelError("the run has no adapter, so there is nothing to export in PEFT's format")
    if adapter.conditions != (ALL,):
        raise ModelError(
            f"the adapter has other weights for each of {' and '.join(adapter.conditions)}, and PEFT's LoRA has one "
            f"set. {INSTEAD}"
        )
    updates: dict[str, list[AffineUpdate]] = {}
    for update in adapter.affine_updates():
        updates.setdefault(update.linear, []).append(update)
    foreign = [name for name in updates if not name.startswith(LANGUAGE)]
    biased = [n for n, found in updates.items() if any(u.bias is not None and bool(u.bias.any()) for u in found)]
    if foreign or biased:
        reason = f"changes {foreign[0]}, outside of the language model" if foreign else f"adds a bias to {biased[0]}"
        raise ModelError(f"the adapter {reason}, which PEFT's LoRA cannot say. {INSTEAD}")
    return {
        name.removeprefix(LANGUAGE): (torch.cat([u.down for u in found]), torch.cat([u.up for u in found], dim=1))
        for name, found in updates.items()
    }


def _write_lora(out: Path, layers: dict[str, tuple[Tensor, Tensor]], base: str) -> None:
    ranks = {name: down.shape[0] for name, (down, _) in layers.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != common}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "target_modules": list(layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }
    (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {}
    for name, (down, up) in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = down.detach().float().cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = up.detach().float().cpu().contiguous()
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})

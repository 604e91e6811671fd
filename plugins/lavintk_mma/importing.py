"""Makes a normal run of an adapter checkpoint that LaVIN's own code wrote.

Geometry comes from the shapes of the tensors. Temperature and scale are in no tensor: they come from the training
arguments that the file may carry, or from the caller.
"""

from __future__ import annotations

import hashlib
import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lavintk.errors import CheckpointError
from lavintk_mma.original import load_original, without_wrapper

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lavintk.models.multimodal import MultimodalModel
    from lavintk.recipe import Recipe
    from lavintk.run import Run

BASE_RECIPES = {4096: "lavin-7b", 5120: "lavin-13b"}
"""Shipped recipe with LaVIN's published setting, by the width of the language model."""
TAP_EVERY = 4
"""LaVIN taps the vision tower after every fourth block; no argument changes that."""
VISUAL = "backbone.visual.transformer.resblocks."
_KINDS = {"adapter_type": "placement", "visual_adapter_type": "visual", "adapter_dim": "dim", "hidden_proj": "neck"}
"""LaVIN's arguments that the tensors tell too, and our names for them."""


@dataclass(frozen=True)
class Checkpoint:
    """An adapter file, read whole.

    :param tensors: by LaVIN's names, without ``module.``.
    :param arguments: what LaVIN's training was called with; empty if the file does not say.
    """

    path: Path
    tensors: dict[str, Tensor]
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Geometry:
    """What the shapes of the tensors tell."""

    dim: int
    groups: int
    placement: str
    visual: str
    neck: int
    width: int


def import_checkpoint(
    path: Path,
    llm: str,
    vision: str,
    out: Path,
    *,
    temperature: float | None = None,
    scale: float | None = None,
    quant: str = "none",
    delta: str | None = None,
) -> Run:
    """Write the run folder ``out`` with the adapter in ``path`` as what was trained, and return the run.

    Neither the language model nor the vision tower is loaded; their names and shapes are checked.

    :param temperature: of the routers, :param scale: of the adapters; both override what the file says.
    :param quant: quantizer of the frozen base. :param delta: folder of a Vicuna delta, added as LaVIN adds it.
    :raises CheckpointError: the file is damaged, refused, no adapter of LaVIN's, or does not fit the models; all that
        is wrong is listed and nothing is written.
    :raises LavintkError: as :func:`lavintk.models.build.build`.
    """
    from lavintk.importing import create_with
    from lavintk.models.build import build_outline
    from lavintk.models.multimodal import count_parameters
    from lavintk.plugins import installed_plugins

    checkpoint = read_checkpoint(path)
    geometry = read_geometry(checkpoint)
    recipe, notes = _make_recipe(checkpoint, geometry, llm, vision, temperature, scale, quant, delta)
    recipe.check(installed_plugins())
    model, base = build_outline(recipe, installed_plugins())
    _fill(model, checkpoint)
    run = create_with(model, out, recipe, base)
    file = {"file": str(path.absolute()), "bytes": path.stat().st_size, "sha256": _sha256(path)}
    run.record(
        status="imported", base=base, trainable_parameters=count_parameters(cast("dict[str, Any]", model.trainable())),
        imported={**file, "from": "LaVIN", "tensors": len(checkpoint.tensors), "notes": notes},
    )  # fmt: skip
    return run


def read_checkpoint(path: Path) -> Checkpoint:
    """Read an adapter file with ``weights_only=True``; of other classes only ``argparse.Namespace`` is let through.

    :raises CheckpointError: it is damaged or refused, or holds no adapter of LaVIN's; all faults listed.
    """
    import torch

    from lavintk.models.torch_files import load_safely

    with torch.serialization.safe_globals([Namespace]):
        content = load_safely(path)
    arguments: Any = None
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content, arguments = content["model"], content.get("args")
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(str(path), ["holds no dict of tensors, nor one under 'model'"])
    tensors: dict[str, Tensor] = {}
    faults = []
    for stored, value in content.items():
        name = without_wrapper(str(stored))
        if not isinstance(value, torch.Tensor):
            faults.append(f"{stored} is a {type(value).__name__}, not a tensor")
        elif name in tensors:
            faults.append(f"{stored} is there twice, with and without module.")
        elif not bool(torch.isfinite(value).all()):
            faults.append(f"{stored} holds values that are not finite")
        else:
            tensors[name] = value
    if faults:
        raise CheckpointError(str(path), faults)
    return Checkpoint(path, tensors, vars(arguments) if isinstance(arguments, Namespace) else {})


def read_geometry(checkpoint: Checkpoint) -> Geometry:
    """Return what the shapes tell, and check it against the arguments that the file carries.

    :raises CheckpointError: what is needed for it is missing, or shapes and arguments contradict each other.
    """
    tensors = checkpoint.tensors
    wanted = {
        "layers.0.adapter_attn.conv_A.weight": 3,
        "layers.0.adapter_attn.conv_B.weight": 3,
        "adapter_proj.conv_A.weight": 2,
    }
    faults = [f"{name} is missing" for name in wanted if name not in tensors]
    faults += [
        f"{name} has {tensors[name].ndim} axes, expected {axes}"
        for name, axes in wanted.items()
        if name in tensors and tensors[name].ndim != axes
    ]
    if faults:
        raise CheckpointError(str(checkpoint.path), faults, f"Is it an adapter of LaVIN's? {_found(tensors)}")
    down, up, neck = (tensors[name].shape for name in wanted)
    dim, share = int(down[0]), int(up[1])
    if not share or dim % share:
        fault = f"layers.0.adapter_attn: the bottleneck's width {dim} is no multiple of the {share} columns of conv_B"
        raise CheckpointError(str(checkpoint.path), [fault])
    found = Geometry(dim, dim // share, _placement(tensors), _visual(tensors), int(neck[0]), int(down[1]))
    faults = [
        f"args.{theirs} is {checkpoint.arguments[theirs]!r}, but the tensors say {getattr(found, ours)!r}"
        for theirs, ours in _KINDS.items()
        if _contradicts(theirs, checkpoint.arguments.get(theirs), getattr(found, ours))
    ]
    if faults:
        raise CheckpointError(str(checkpoint.path), faults, "Were tensors lost or taken from another checkpoint?")
    return found


def _placement(tensors: Mapping[str, Tensor]) -> str:
    return "block" if any(re.match(r"layers\.\d+\.adapter_mlp\.", name) for name in tensors) else "attn"


def _visual(tensors: Mapping[str, Tensor]) -> str:
    names = [name for name in tensors if name.startswith(VISUAL)]
    if not names:
        return "none"
    if any(".adapter_mlp." in name for name in names):
        return "router_block"
    return "router" if any(".expert_weights." in name for name in names) else "normal"


def _contradicts(argument: str, value: Any, found: Any) -> bool:
    """Say whether an argument says something else than the tensors; LaVIN takes unknown names for a default."""
    if value is None:
        return False
    if argument == "adapter_type":
        value = value if value == "block" else "attn"
    if argument == "visual_adapter_type":
        value = value if value in ("router", "router_block") else "normal"
    return bool(value != found)


def _make_recipe(
    checkpoint: Checkpoint,
    geometry: Geometry,
    llm: str,
    vision: str,
    temperature: float | None,
    scale: float | None,
    quant: str,
    delta: str | None,
) -> tuple[Recipe, list[str]]:
    """Return the run's recipe, and what a person should know of how it was found.

    :raises CheckpointError: the temperature is known to nobody, or the adapter was trained on Vicuna without a delta.
    """
    from lavintk.recipe import make_recipe, read_recipe

    said = checkpoint.arguments
    faults, notes = [], []
    chosen = {"temperature": temperature, "scale": scale}
    for name, argument in (("temperature", "temperature"), ("scale", "adapter_scale")):
        stored = said.get(argument)
        if chosen[name] is None:
            chosen[name] = stored
        elif stored is not None and float(stored) != chosen[name]:
            notes.append(f"--{name} {chosen[name]:g} overrides the checkpoint's {stored:g}")
    if chosen["temperature"] is None:
        faults.append(
            "it does not say its temperature: give --temperature 10 (LaVIN-7B) or --temperature 5 (LaVIN-13B)"
        )
    if said.get("use_vicuna") and delta is None:
        faults.append("it was trained on Vicuna: give the folder of Vicuna's v1.1 delta with --delta")
    if faults:
        raise CheckpointError(str(checkpoint.path), faults)
    if delta is not None and said and not said.get("use_vicuna"):
        notes.append("by its arguments it was not trained on Vicuna, but --delta is given")
    adapter = {
        "name": "mma", "dim": geometry.dim, "groups": geometry.groups, "placement": geometry.placement,
        "visual": geometry.visual, "temperature": float(chosen["temperature"] or 0),
        "scale": 1.0 if chosen["scale"] is None else float(chosen["scale"]), "compat": "lavin",
    }  # fmt: skip
    content = read_recipe(BASE_RECIPES.get(geometry.width, "lavin-7b"))
    overrides: dict[str, Any] = {
        "name": checkpoint.path.stem, "model.language": llm, "model.vision": vision, "model.tap_every": TAP_EVERY,
        "model.neck": geometry.neck, "quant": quant, "adapter": adapter, "data.template": "lavin",
        "data.normalization": "imagenet", "data.resize": "squash",
    }  # fmt: skip
    if delta is not None:
        overrides |= {"model.delta": delta, "model.delta_compat": "lavin"}
    return make_recipe(content, overrides), notes


def _fill(model: MultimodalModel, checkpoint: Checkpoint) -> None:
    """Give what is trained its values: it has none yet, nor a device."""
    for part in (model.adapter, model.connector):
        cast("nn.Module", part).to_empty(device="cpu")
    try:
        load_original(model, checkpoint.tensors)
    except CheckpointError as error:
        raise CheckpointError(
            str(checkpoint.path), error.faults, f"{error.advice} {_found(checkpoint.tensors)}"
        ) from error


def _found(tensors: Mapping[str, Tensor]) -> str:
    names = list(tensors)
    return f"It holds {len(names)} tensors: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

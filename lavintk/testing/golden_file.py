"""Reads a file of reference values from the original LaVIN and finds all that keeps it from being compared in full."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lavintk.errors import CheckpointError

TAP_EVERY = 4
"""LaVIN taps the vision tower after every fourth block."""
PARTS = ("input_ids", "labels", "images", "has_image", "visual_features", "logits", "loss")
"""Tensors of a case, besides its gradients."""
KINDS = {"adapter_type": ("attn", "block"), "visual_adapter_type": ("router", "router_block", "normal")}
"""Metadata keys that take one of a few names."""


@dataclass(frozen=True)
class Geometry:
    """The original's settings, from the metadata key ``config``; those with a default may be left out."""

    dim: int
    n_layers: int
    n_heads: int
    vocab: int
    hidden_proj: int
    max_seq_len: int
    adapter_type: str
    adapter_dim: int
    adapter_scale: float
    temperature: float
    visual_adapter_type: str
    image_size: int
    patch: int
    vision_layers: int
    vision_width: int
    prefix_image: tuple[int, ...]
    prefix_text: tuple[int, ...]
    multiple_of: int = 256
    norm_eps: float = 1e-6

    @classmethod
    def read(cls, path: Path, text: str) -> tuple[Geometry, list[str]]:
        """Return the geometry and the names of keys that mean nothing here.

        :raises CheckpointError: keys missing or of another type, values unknown; all listed.
        """
        try:
            given = json.loads(text)
        except ValueError as error:
            raise CheckpointError(str(path), [f"the metadata key 'config' is not JSON: {error}"]) from error
        if not isinstance(given, dict):
            raise CheckpointError(str(path), ["the metadata key 'config' is not a JSON object"])
        faults = list(_faults_of(given))
        if faults:
            raise CheckpointError(str(path), faults)
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in given.items() if n in known}
        return cls(**values), [name for name in given if name not in known]


@dataclass(frozen=True)
class Golden:
    """A file of reference values, read whole.

    :param unused: keys of the metadata that mean nothing here.
    """

    path: Path
    geometry: Geometry
    weights: dict[str, Tensor]
    cases: dict[str, dict[str, Tensor]]
    unused: list[str]


def read_golden(path: Path) -> Golden:
    """Read a file of reference values.

    :raises CheckpointError: it cannot be read or lacks something; all that is wrong is listed.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(str(path), [f"cannot be read: {error}"]) from error
    if "config" not in metadata:
        raise CheckpointError(str(path), ["the metadata has no key 'config' with the geometry"])
    geometry, unused = Geometry.read(path, metadata["config"])
    names = sorted((n.removesuffix(".input_ids") for n in tensors if n.endswith(".input_ids")), key=len, reverse=True)
    weights = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    cases: dict[str, dict[str, Tensor]] = {case: {} for case in names}
    faults = [] if names else ["there is no case: no tensor is called '<case>.input_ids'"]
    for name, tensor in tensors.items():
        case = next((c for c in names if name.startswith(f"{c}.")), None)
        part = name.removeprefix(f"{case}.")
        if case is not None and (part in PARTS or part.startswith("grad.")):
            cases[case][part] = tensor
        elif not name.startswith("model."):
            faults.append(f"{name} belongs neither to the model nor to a case")
    adapters = [n for n in weights if "adapter" in n]
    for case, content in cases.items():
        faults += _faults_in_case(case, content, adapters, geometry)
    if faults:
        raise CheckpointError(str(path), faults)
    return Golden(path, geometry, weights, cases, unused)


def _faults_of(given: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the metadata."""
    known = {field.name: field for field in fields(Geometry)}
    for name, field in known.items():
        if name not in given:
            if field.default is field.default_factory:  # both MISSING
                yield f"config key {name!r} is missing"
            continue
        value, wanted = given[name], str(field.type)
        if name in KINDS:
            if value not in KINDS[name]:
                yield f"config key {name!r} must be one of {', '.join(KINDS[name])}, got {value!r}"
        elif wanted.startswith("tuple"):
            if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
                yield f"config key {name!r} must be a list of token ids, got {value!r}"
        elif type(value) not in ((int,) if wanted == "int" else (int, float)) or (
            value <= 0 and name != "adapter_scale"
        ):
            yield f"config key {name!r} must be a positive {'whole ' * (wanted == 'int')}number, got {value!r}"


def _faults_in_case(
    case: str, content: Mapping[str, Tensor], adapters: Sequence[str], geometry: Geometry
) -> Iterator[str]:
    """Yield what keeps a case from being compared in full."""
    gradients = {name.removeprefix("grad.") for name in content if name.startswith("grad.")}
    missing = [part for part in PARTS if part not in content]
    missing += [f"grad.{name}" for name in adapters if name not in gradients]
    yield from (f"{case}.{part} is missing" for part in missing)
    yield from (f"{case}.grad.{name} belongs to no adapter parameter" for name in sorted(gradients - set(adapters)))
    if missing:
        return
    ids, has_image, size = content["input_ids"], content["has_image"], geometry.image_size
    rows = ids.shape[0]
    shapes = {
        "labels": tuple(ids.shape),
        "has_image": (rows,),
        "images": (rows, 3, size, size),
        "visual_features": (rows, geometry.vision_layers // TAP_EVERY, geometry.vision_width),
        "logits": (rows, content["logits"].shape[1], geometry.vocab),
    }
    misshapen = [
        f"{case}.{part} has shape {tuple(content[part].shape)}, expected {shape}"
        for part, shape in shapes.items()
        if tuple(content[part].shape) != shape
    ]
    yield from misshapen
    if misshapen:
        return
    if not set(has_image.tolist()) <= {0, 1}:
        yield f"{case}.has_image must hold 0 and 1 only"
    elif content["images"][has_image == 0].any():
        yield f"{case}.images must be zero for rows without an image"
    if content["labels"][:, 0].any():
        yield f"{case}.labels must be 0 at BOS"
    if not content["labels"][:, 1:].any():
        yield f"{case}.labels train no token"
    visual = geometry.vision_layers // TAP_EVERY
    longest = ids.shape[1] + 1 + min(
        len(geometry.prefix_image) + visual if image else len(geometry.prefix_text) for image in has_image.tolist()
    )  # fmt: skip
    if not 2 <= content["logits"].shape[1] <= longest:
        yield f"{case}.logits hold {content['logits'].shape[1]} positions, the rows have at most {longest}"

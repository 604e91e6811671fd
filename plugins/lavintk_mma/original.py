"""Names and shapes of LaVIN's own adapter files, and how they become ours.

LaVIN stores every parameter whose name contains ``adapter``; its convolutions of kernel size 1 carry a last
dimension of 1. Training under DistributedDataParallel put ``module.`` in front of the names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lavintk.errors import CheckpointError, ModelError

if TYPE_CHECKING:
    from lavintk.models.multimodal import MultimodalModel

SUBJECT = "LaVIN's adapter"
_LAYER = re.compile(
    r"(?P<tower>backbone\.visual\.transformer\.resblocks|layers)\.(?P<index>0|[1-9]\d*)\."
    r"adapter_(?P<place>attn|mlp)\.(?P<part>conv_A|conv_B|conv_D|expert_weights)\.(?P<kind>weight|bias)"
)
_NECK = re.compile(r"adapter_proj\.(?P<part>conv_A|conv_B)\.(?P<kind>weight|bias)")
_MODALITY = "adapter_modality_embedding.weight"
_ROUTED_PARTS = {"conv_A": "down", "conv_B": "up_first", "conv_D": "up_second", "expert_weights": "router"}
_PLAIN_PARTS = {"conv_A": "down", "conv_B": "up"}
_NECK_PARTS = {"conv_A": "down", "conv_B": "up"}


def without_wrapper(name: str) -> str:
    """Return ``name`` without the ``module.`` that DistributedDataParallel adds."""
    return name.replace("module.", "")


def to_ours(name: str, *, plain_visual: bool = False) -> tuple[str, str] | None:
    """Return ``("adapter" | "connector", our parameter name)`` of one of LaVIN's names, or None if it is no adapter's.

    :param name: with or without ``module.``.
    :param plain_visual: the vision tower holds adapters of LaVIN's kind ``normal``, whose ``conv_B`` is the only up
        projection; in the routed kinds it is the first of two.
    """
    name = without_wrapper(name)
    if name == _MODALITY:
        return "adapter", "modality.weight"
    if match := _NECK.fullmatch(name):
        return "connector", f"{_NECK_PARTS[match['part']]}.{match['kind']}"
    if match := _LAYER.fullmatch(name):
        tower = "language" if match["tower"] == "layers" else "visual"
        parts = _PLAIN_PARTS if tower == "visual" and plain_visual else _ROUTED_PARTS
        if match["part"] in parts:
            return "adapter", f"{tower}.{match['index']}_{match['place']}.{parts[match['part']]}.{match['kind']}"
    return None


def load_original(model: MultimodalModel, tensors: Mapping[str, Tensor]) -> None:
    """Copy a LaVIN adapter (names to tensors, with or without ``module.``) into an attached ``mma`` and the connector.

    :raises ModelError: the model carries another adapter.
    :raises CheckpointError: missing, unexpected, doubled or misshapen tensors, all listed; nothing is changed then.
    """
    own = model.trainable()
    pairs = pair_with_original(model, tensors)
    faults = list(_faults(own, pairs, tensors))
    if faults:
        advice = "Do the adapter's options (dim, placement, visual) and the models fit the file?"
        raise CheckpointError(SUBJECT, faults, advice)
    with torch.no_grad():
        for name, ours in pairs.items():
            parameter = own[ours or ""]
            parameter.copy_(tensors[name].view(parameter.shape))


def pair_with_original(model: MultimodalModel, names: Mapping[str, object]) -> dict[str, str | None]:
    """Return our full name (``adapter.…`` or ``connector.…``) for each of LaVIN's; None where there is none.

    :raises ModelError: the model does not carry ``mma``.
    """
    from lavintk_mma.adapter import MixtureOfModalityAdapter

    if not isinstance(model.adapter, MixtureOfModalityAdapter):
        found = type(model.adapter).__name__ if model.adapter else "no adapter"
        raise ModelError(f"LaVIN's adapters load into an adapter of kind 'mma', but the model carries {found}")
    plain = model.adapter.options.visual in ("affine", "normal")
    mapped = {name: to_ours(name, plain_visual=plain) for name in names}
    return {name: None if ours is None else ".".join(ours) for name, ours in mapped.items()}


def _faults(
    own: Mapping[str, nn.Parameter], pairs: Mapping[str, str | None], tensors: Mapping[str, Tensor]
) -> Iterator[str]:
    sources: dict[str, str] = {}
    for name, ours in pairs.items():
        if ours is None or ours not in own:
            yield f"{name} is unexpected"
            continue
        if ours in sources:
            yield f"{name} and {sources[ours]} are the same parameter"
        sources[ours] = name
        found, wanted = tuple(tensors[name].shape), tuple(own[ours].shape)
        if found not in (wanted, (*wanted, 1)):
            yield f"{name} has shape {found}, the model needs {wanted}"
    for ours in own:
        if ours not in sources:
            yield f"{ours} is missing"

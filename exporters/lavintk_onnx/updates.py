"""An adapter's affine updates as exporters use them: folded into weights, or as a low-rank path beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lavintk.merge import merged_bias, merged_weight

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lavintk.contracts import AffineUpdate
    from lavintk.layers import FrozenLinear

Change = Sequence["AffineUpdate | None"]
"""The update of each of some linear layers under one condition; None where the adapter leaves a layer alone."""


@dataclass(frozen=True)
class Side:
    """The path ``up @ (down @ x)`` of linear layers with one input: ``down`` ``[r, in]``, ``up`` ``[out, r]``."""

    down: NDArray[Any]
    up: NDArray[Any]


@dataclass(frozen=True)
class Trained:
    """What was trained, where the model in memory was rounded or tuned since.

    :param layers: by name, those that are other ones now.
    :param updates: the adapter's, by layer and condition.
    """

    layers: Mapping[str, FrozenLinear]
    updates: Mapping[tuple[str, str], AffineUpdate]


def effective_weight(layer: FrozenLinear, update: AffineUpdate | None) -> Tensor:
    """Return the weight ``[out, in]`` that layer and update have together, fp32."""
    return merged_weight(layer.dequantize(torch.float32).cpu(), [] if update is None else [update])


def side_target(layer: FrozenLinear, update: AffineUpdate, trained: Trained | None) -> tuple[Tensor, Tensor]:
    """Return what a base should be beside ``update``, and the whole weight that was trained, both ``[out, in]``, fp32.

    With an update that is not the trained one any more, what the base lacks is its own error and the update's.
    """
    before = update if trained is None else trained.updates[update.linear, update.condition]
    base = effective_weight(layer if trained is None else trained.layers.get(update.linear, layer), None)
    wanted = merged_weight(base, [before])
    if before is update:
        return base, wanted
    return merged_weight(wanted, [replace(update, up=-update.up)]), wanted


def bias_of(layers: Sequence[FrozenLinear], change: Change) -> NDArray[Any] | None:
    """Return the biases ``[sum of out]`` of layers and updates below each other, or None where there is none."""
    biases = [merged_bias(layer.bias, [] if update is None else [update]) for layer, update in zip(layers, change)]
    if all(bias is None for bias in biases):
        return None
    whole = [torch.zeros(layer.out_features) if bias is None else bias for layer, bias in zip(layers, biases)]
    return torch.cat(whole).numpy()


def side_of(layers: Sequence[FrozenLinear], change: Change) -> Side:
    """Return the side path of linear layers with one input; a down projection that several share is there once."""
    downs: list[Tensor] = []
    places = []
    for update in change:
        if update is None:
            continue
        place = next((i for i, down in enumerate(downs) if torch.equal(down, update.down)), None)
        if place is None:
            place = len(downs)
            downs.append(update.down)
        places.append(place)
    starts = [0]
    for down in downs:
        starts.append(starts[-1] + down.shape[0])
    up = torch.zeros(sum(layer.out_features for layer in layers), starts[-1])
    row, found = 0, iter(places)
    for layer, update in zip(layers, change):
        if update is not None:
            start = starts[next(found)]
            up[row : row + layer.out_features, start : start + update.down.shape[0]] = update.up.float().cpu()
        row += layer.out_features
    return Side(torch.cat([down.float().cpu() for down in downs]).numpy(), up.numpy())

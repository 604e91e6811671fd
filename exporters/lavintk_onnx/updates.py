"""An adapter's affine updates as exporters use them: folded into weights, or as a low-rank path beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

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


def effective_weight(layer: FrozenLinear, update: AffineUpdate | None) -> Tensor:
    """Return the weight ``[out, in]`` that layer and update have together, fp32."""
    weight = layer.dequantize(torch.float32).cpu()
    return weight if update is None else weight + (update.up @ update.down).float().cpu()


def bias_of(layers: Sequence[FrozenLinear], change: Change) -> NDArray[Any] | None:
    """Return the biases ``[sum of out]`` of layers and updates below each other, or None where there is none."""
    if all(layer.bias is None and (update is None or update.bias is None) for layer, update in zip(layers, change)):
        return None
    parts = []
    for layer, update in zip(layers, change):
        bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach().float().cpu()
        parts.append(bias if update is None or update.bias is None else bias + update.bias.float().cpu())
    return torch.cat(parts).numpy()


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

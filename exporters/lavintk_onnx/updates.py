"""An adapter's affine updates as exporters use them: folded into weights, or as a low-rank path beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lavintk.errors import ModelError
from lavintk.merge import merged_bias, merged_weight

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lavintk.contracts import AffineUpdate
    from lavintk.layers import FrozenLinear
    from lavintk.models.multimodal import MultimodalModel

Change = Sequence["AffineUpdate | None"]
"""The update of each of some linear layers under one condition; None where the adapter leaves a layer alone."""


@dataclass(frozen=True)
class Side:
    """The path ``up @ (down @ x)`` of linear layers with one input: ``down`` ``[r, in]``, ``up`` ``[out, r]``."""

    down: NDArray[Any]
    up: NDArray[Any]


class LayerUpdates:
    """The adapter's updates of the language model, taken layer by layer; only one layer's are held.

    :ivar coming: the updates of the next layer that the adapter changes; empty behind the last one.
    """

    def __init__(self, model: MultimodalModel) -> None:
        updates: Iterator[AffineUpdate] = model.adapter.affine_updates("language.") if model.adapter else iter(())
        self._layers = groupby(updates, key=lambda update: update.linear.rsplit(".", 2)[0])
        self._read()

    def take(self, layer: str) -> dict[tuple[str, str], AffineUpdate]:
        """Return the updates of a decoder layer by linear layer and condition; layers are asked for in order.

        :param layer: for example ``language.model.layers.0``.
        """
        if layer != self._layer:
            return {}
        taken = {(update.linear, update.condition): update for update in self.coming}
        self._read()
        return taken

    def check_all_taken(self) -> None:
        """Make sure that nothing the adapter changes was left out.

        :raises ModelError: the adapter changes a layer that the graph does not have, or goes through them out of order.
        """
        if self.coming:
            raise ModelError(
                f"the adapter changes {self.coming[0].linear}, which the exporter has not asked for: affine_updates() "
                "must go through the decoder layers in order and may change their linear layers only"
            )

    def _read(self) -> None:
        layer, updates = next(self._layers, ("", iter(())))
        self._layer: str = layer
        self.coming: list[AffineUpdate] = list(updates)


def effective_weight(layer: FrozenLinear, update: AffineUpdate | None) -> Tensor:
    """Return the weight ``[out, in]`` that layer and update have together, fp32."""
    return merged_weight(layer.dequantize(torch.float32).cpu(), [] if update is None else [update])


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

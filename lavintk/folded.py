"""A model's decoder layers with its adapter folded in, run and rounded as the plain layers that a merged export ships.

Rounding a folded weight with its inputs in mind takes the inputs of the *folded* layers, which those of the trained
model are not: an adapter in front of a layer, as LaVIN's, changes what the layer is given.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lavintk.contracts import AffineUpdate, CalibratedQuantizer, Quantizer
from lavintk.data.batch import IMAGE, TEXT, Batch
from lavintk.layers import FrozenLinear, PackedWeight
from lavintk.merge import ALL, LANGUAGE, LayerUpdates, merged_bias, merged_weight
from lavintk.models.attention import IMPLEMENTATION
from lavintk.models.decoder_layer import replace_norms
from lavintk.models.multimodal import MultimodalModel

MOMENT_CHUNK = 1 << 12
"""Tokens whose inputs are turned to fp32 at a time."""
SHARED = ""
"""In place of a condition: a layer that the adapter leaves alone is the same under all of them."""
ROWS = {"text": TEXT, "image": IMAGE}
"""What rows of a condition are marked with; those of any other condition are all rows."""


class FoldedLinear(FrozenLinear):
    """A frozen layer and an adapter's update as one weight, which is added up anew whenever it is needed.

    :param base: as it was trained; kept, not changed.
    :param device: of the bias.
    """

    def __init__(self, base: FrozenLinear, update: AffineUpdate, device: torch.device) -> None:
        bias = merged_bias(base.bias, [update])
        super().__init__(base.out_features, base.in_features, None if bias is None else bias.to(device))
        self.base, self.update = base, update

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight ``[out, in]``, added up in fp32, in ``dtype``."""
        return merged_weight(self.base.dequantize(torch.float32), [self.update]).to(dtype)

    def packed(self) -> PackedWeight:
        """Describe the sum as a dense weight."""
        return PackedWeight("dense", (self.out_features, self.in_features), self.dequantize())


class FoldedDecoder:
    """The decoder layers of a trained model with its adapter folded in.

    The trained model stays as it is and gives what comes in front of the first layer. Where the adapter changes a
    linear layer, each condition has a layer of its own; tokens take that of their row.

    :param trained: in eval mode, on one device.
    :raises NotAffineError: the adapter has no affine form.
    """

    def __init__(self, trained: MultimodalModel) -> None:
        self.trained = trained
        self.conditions = trained.adapter.conditions if trained.adapter is not None else (ALL,)
        self.plain = MultimodalModel(_plain_language(trained)).eval()
        self.rounded: dict[tuple[str, str], FrozenLinear] = {}
        """What :meth:`round` made, by linear layer and condition (:data:`SHARED` where the adapter changes nothing)."""
        self._updates = LayerUpdates(trained)
        self._places: list[list[_Place]] = []

    @torch.no_grad()
    def round(
        self, quantizer: Quantizer, names: Collection[str], batch: Batch | None, *, only_changed: bool = False
    ) -> int:
        """Put the folded layers ``names`` on the grid of ``quantizer``, once; all others stay what they are.

        With a batch, layers are rounded when it comes to them, each for the tokens of its own condition, which the
        layers before it, rounded already, give. A condition without any row is rounded for the tokens of the others.

        :param only_changed: leave out the layers that the adapter does not change.
        :return: how many layers were rounded with their inputs in mind.
        """
        rounding = _Rounding(self, quantizer, names, only_changed)
        calibrates = batch is not None and isinstance(quantizer, CalibratedQuantizer)
        states, passage = (None, None) if batch is None or not calibrates else self._start(batch)
        for index in range(len(self.trained.layers)):
            self._install(index)
            for place in self._places[index]:
                place.rounding = rounding
                if passage is None:
                    place.rounding.without_inputs(place)
            if states is not None and passage is not None:
                states = self.plain.run_layer(index, states, passage)
            for place in self._places[index]:
                place.rounding = None
        self._updates.check_all_taken()
        return rounding.calibrated

    def hidden(self, batch: Batch) -> Tensor:
        """Return the states ``[N, hidden]`` after the last norm; only after :meth:`round`."""
        states, passage = self._start(batch)
        for index in range(len(self.trained.layers)):
            states = self.plain.run_layer(index, states, passage)
        normed: Tensor = self.plain.language.model.norm(states[0])
        return normed[: batch.tokens]

    def tokens_of(self, condition: str) -> Tensor:
        """Return the places of the tokens of a condition in the batch that runs; side tokens are of none."""
        if condition in ROWS:
            return (self._owners == ROWS[condition]).nonzero().flatten()
        return torch.arange(len(self._owners), device=self._owners.device)

    def _start(self, batch: Batch) -> tuple[Tensor, Any]:
        lengths = torch.tensor(batch.lengths, device=batch.conditions.device)
        self._owners = batch.conditions.repeat_interleave(lengths)
        return self.trained.start(batch)

    def _install(self, index: int) -> None:
        """Put the folded linear layers into decoder layer ``index``."""
        prefix = f"{LANGUAGE}model.layers.{index}"
        changes = self._updates.take(prefix)
        places = []
        for name, base in self.trained.linears().items():
            if name.startswith(f"{prefix}."):
                own = {condition: changes.get((name, condition)) for condition in self.conditions}
                places.append(_Place(self, name, self._parts(base, own)))
                self.plain.replace(name, places[-1])
        self._places.append(places)

    def _parts(self, base: FrozenLinear, updates: Mapping[str, AffineUpdate | None]) -> dict[str, FrozenLinear]:
        if all(update is None for update in updates.values()):
            return {SHARED: base}
        device = self.trained.device
        return {c: base if update is None else FoldedLinear(base, update, device) for c, update in updates.items()}


class _Place(nn.Module):
    """Where a linear layer stands: one frozen layer, or one for each condition of the rows."""

    def __init__(self, decoder: FoldedDecoder, name: str, parts: dict[str, FrozenLinear]) -> None:
        super().__init__()
        self.decoder, self.name, self.parts = decoder, name, parts
        self.rounding: _Rounding | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[1, N + M, out]`` of ``x`` ``[1, N + M, in]``; zeros for the M side tokens, which nothing sees."""
        if self.rounding is not None:
            self.rounding.for_inputs(self, x)
        some = next(iter(self.parts.values()))
        output = x.new_zeros(*x.shape[:-1], some.out_features)
        for condition, layer in self.parts.items():
            tokens = self.decoder.tokens_of(condition)
            output.index_copy_(-2, tokens, layer(x.index_select(-2, tokens)))
        return output


class _Rounding:
    """Rounds the layers of a place for the inputs that it has just been given."""

    def __init__(
        self, decoder: FoldedDecoder, quantizer: Quantizer, names: Collection[str], only_changed: bool
    ) -> None:
        self.decoder, self.quantizer, self.names, self.only_changed = decoder, quantizer, set(names), only_changed
        self.calibrated = 0
        self._input: Tensor | None = None
        self._moments: dict[str, Tensor] = {}

    def without_inputs(self, place: _Place) -> None:
        """Round to the nearest that the grid has for the weights alone."""
        for condition in self._wanted(place):
            layer = place.parts[condition]
            self._put(place, condition, self.quantizer.quantize(layer.dequantize(torch.float32), layer.bias))

    def for_inputs(self, place: _Place, x: Tensor) -> None:
        """Round with ``x`` ``[1, N + M, in]`` in mind."""
        assert isinstance(self.quantizer, CalibratedQuantizer)
        if x is not self._input:  # q, k and v share their input, and so do gate and up
            self._input, self._moments = x, {}
        for condition in self._wanted(place):
            layer = place.parts[condition]
            if condition not in self._moments:
                self._moments[condition] = self._moment(condition, x)
            weight, moment = layer.dequantize(torch.float32), self._moments[condition]
            self._put(place, condition, self.quantizer.quantize_calibrated(weight, layer.bias, moment))
            self.calibrated += 1

    def _moment(self, condition: str, x: Tensor) -> Tensor:
        tokens = self.decoder.tokens_of(condition)
        return second_moment(x.index_select(-2, tokens if len(tokens) else self.decoder.tokens_of(SHARED)))

    def _wanted(self, place: _Place) -> list[str]:
        wanted = place.name in self.names and not (self.only_changed and SHARED in place.parts)
        return list(place.parts) if wanted else []

    def _put(self, place: _Place, condition: str, layer: FrozenLinear) -> None:
        place.parts[condition] = self.decoder.rounded[place.name, condition] = layer


def second_moment(x: Tensor) -> Tensor:
    """Return the sum of ``x x'`` over the inputs ``[..., in]``, fp32 ``[in, in]``."""
    total = x.new_zeros(x.shape[-1], x.shape[-1], dtype=torch.float32)
    for part in x.flatten(0, -2).split(MOMENT_CHUNK):
        wide = part.float()
        total.addmm_(wide.t(), wide)
    return total


def _plain_language(model: MultimodalModel) -> nn.Module:
    """Return the language model's structure without an adapter, with its norms; all else has no values."""
    config = copy.deepcopy(model.language.config)
    config._attn_implementation = IMPLEMENTATION
    with torch.device("meta"):
        language: nn.Module = type(model.language)(config)
        replace_norms(language)
    for name, parameter in model.frozen_parameters().items():
        if name.startswith((f"{LANGUAGE}model.layers.", f"{LANGUAGE}model.norm.")):
            owner, _, leaf = name.removeprefix(LANGUAGE).rpartition(".")
            setattr(language.get_submodule(owner), leaf, parameter)
    return language

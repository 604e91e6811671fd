"""The engine that takes all micro-batches of a step through one layer before the next: layer-major accumulation.

A layer is wanted twice in an optimizer step then, on the way forward and on the way back, however many micro-batches
there are. So a base that is streamed from the host (:mod:`lavintk.models.stream`) crosses the bus twice per step
instead of twice per micro-batch. The gradients are those of ordinary accumulation, added up in another order.

Between two layers only the layers' inputs are kept, those of the whole step; they may wait on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor

from lavintk.data.batch import Batch
from lavintk.data.pack import Pack
from lavintk.engine.layer_graphs import EagerLayers, RecordedLayers
from lavintk.engine.randomness import random_state_kept
from lavintk.models.host_memory import HostTensors
from lavintk.models.multimodal import MultimodalModel, Passage


class LayerwiseEngine:
    """Runs any model on any device.

    :param layers: how layers, and what lies in front of them, are run.
    :param seed: of dropout.
    """

    name = "layerwise"

    def __init__(
        self, model: MultimodalModel, scaler: torch.amp.GradScaler, layers: EagerLayers | RecordedLayers, seed: int
    ) -> None:
        self.model, self.scaler, self.layers, self.seed = model, scaler, layers, seed
        self.records = layers.records

    def backward(self, window: Sequence[Batch], labelled: int, step: int) -> list[Tensor]:
        """Add the window's gradients; see :class:`lavintk.engine.Engine`."""
        rows = [self.layers.place(batch) for batch in window]
        seeds = [Random(f"{self.seed}/{step}/{index}").getrandbits(62) for index in range(len(window))]
        with random_state_kept(self.model.device):
            return _Window(self.model, self.scaler, self.layers, rows, seeds).backward(labelled)


class _Window:
    """The micro-batches of one optimizer step on their way.

    Dropout draws from a seed that belongs to the micro-batch and the layer, so a recomputation draws the same again.
    """

    def __init__(
        self,
        model: MultimodalModel,
        scaler: torch.amp.GradScaler,
        layers: EagerLayers | RecordedLayers,
        rows: Sequence[Batch | Pack],
        seeds: Sequence[int],
    ) -> None:
        self.model, self.scaler, self.layers, self.rows, self.seeds = model, scaler, layers, rows, seeds
        self.inputs: HostTensors | _DeviceTensors = model.offload or _DeviceTensors()
        self.depth = len(model.layers)

    def backward(self, labelled: int) -> list[Tensor]:
        """Add the gradients; return each micro-batch's part of the mean loss over ``labelled`` tokens."""
        states, passages = self._enter()
        for index in range(self.depth):
            for number, passage in enumerate(passages):
                self.inputs.put((index, number), states[number])
                self._draw_for(number, 1 + index)
                states[number] = self.layers.forward(index, states[number], passage)
        losses, gradients = self._losses(states, labelled)
        for index in reversed(range(self.depth)):
            for number, passage in enumerate(passages):
                gradients[number] = self._back_through(index, number, passage, gradients[number])
        self._back_through_entry(gradients)
        return losses

    def _enter(self) -> tuple[list[Tensor], list[Passage]]:
        """Return the states in front of the layers, without what a backward pass needs, and the passages."""
        entered = []
        for number, rows in enumerate(self.rows):
            self._draw_for(number, 0)
            entered.append(self.layers.enter(rows, self.seeds[number]))
        return [states for states, _ in entered], [passage for _, passage in entered]

    def _losses(self, states: list[Tensor], labelled: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return the losses, and the gradients with respect to the states, which are taken out of their list."""
        losses, gradients = [], []
        for rows in self.rows:
            behind = states.pop(0).detach().requires_grad_()
            with torch.enable_grad():
                loss = self.model.loss_behind(behind, rows) / labelled
            self.scaler.scale(loss).backward()
            losses.append(loss.detach())
            gradients.append(_gradient(behind))
        return losses, gradients

    def _back_through(self, index: int, number: int, passage: Passage, gradient: Tensor) -> Tensor:
        """Return the gradient with respect to a layer's input, adding those of what is trained in it."""
        entering = self.inputs.get((index, number))
        self._fetch_after(index, number)
        self._draw_for(number, 1 + index)
        return self.layers.backward(index, entering, passage, gradient)

    def _fetch_after(self, index: int, number: int) -> None:
        if number + 1 < len(self.rows):
            self.inputs.fetch((index, number + 1))
        elif index > 0:
            self.inputs.fetch((index - 1, 0))

    def _back_through_entry(self, gradients: Sequence[Tensor]) -> None:
        """Go on into what makes the states in front of the layers: connector, tower, side tokens."""
        for number, (rows, gradient) in enumerate(zip(self.rows, gradients, strict=True)):
            self._draw_for(number, 0)
            self.layers.back_through_entry(rows, gradient, self.seeds[number])

    def _draw_for(self, number: int, place: int) -> None:
        """Let random numbers be those of a micro-batch and a place: 0 in front of the layers, 1 in the first one."""
        torch.manual_seed(self.seeds[number] + place)


class _DeviceTensors:
    """Stands in for :class:`HostTensors` where layer inputs stay on the device."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], Tensor] = {}

    def put(self, key: tuple[int, int], tensor: Tensor) -> None:
        """Keep a tensor."""
        self._kept[key] = tensor

    def fetch(self, key: tuple[int, int]) -> None:
        """Do nothing: it is there."""

    def get(self, key: tuple[int, int]) -> Tensor:
        """Give a tensor away."""
        return self._kept.pop(key).detach()


def _gradient(tensor: Tensor) -> Tensor:
    """Return the gradient of a leaf that took part in a backward pass."""
    assert tensor.grad is not None
    return tensor.grad

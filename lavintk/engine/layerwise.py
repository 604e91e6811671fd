"""The engine that takes all micro-batches of a step through one layer before the next: layer-major accumulation.

A layer is wanted twice in an optimizer step then, on the way forward and on the way back, however many micro-batches
there are. So a base that is streamed from the host (:mod:`lavintk.models.stream`) crosses the bus twice per step
instead of twice per micro-batch. The gradients are those of ordinary accumulation, added up in another order.

Between two layers only the layers' inputs are kept, those of the whole step; they may wait on the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random

import torch
from torch import Tensor

from lavintk.data.batch import Batch
from lavintk.models.host_memory import HostTensors
from lavintk.models.multimodal import MultimodalModel, Passage


class LayerwiseEngine:
    """Runs any model on any device, launching each operation when Python comes to it.

    :param seed: of dropout.
    """

    name = "layerwise"

    def __init__(self, model: MultimodalModel, scaler: torch.amp.GradScaler, seed: int) -> None:
        self.model, self.scaler, self._seed = model, scaler, seed

    def backward(self, window: Sequence[Batch], labelled: int, step: int) -> list[Tensor]:
        """Add the window's gradients; see :class:`lavintk.engine.Engine`."""
        batches = [batch.to(self.model.device) for batch in window]
        seeds = [Random(f"{self._seed}/{step}/{index}").getrandbits(62) for index in range(len(window))]
        with _random_state_kept(self.model.device):
            return _Window(self.model, self.scaler, batches, seeds).backward(labelled)


class _Window:
    """The micro-batches of one optimizer step on their way.

    Dropout draws from a seed that belongs to the micro-batch and the layer, so a recomputation draws the same again.
    """

    def __init__(
        self, model: MultimodalModel, scaler: torch.amp.GradScaler, batches: Sequence[Batch], seeds: Sequence[int]
    ) -> None:
        self.model, self.scaler, self.batches, self.seeds = model, scaler, batches, seeds
        self.inputs: HostTensors | _DeviceTensors = model.offload or _DeviceTensors()
        self.layers, self.count = len(model.layers), len(batches)

    def backward(self, labelled: int) -> list[Tensor]:
        """Add the gradients; return each micro-batch's part of the mean loss over ``labelled`` tokens."""
        states, passages = self._enter()
        for index in range(self.layers):
            for number, passage in enumerate(passages):
                self.inputs.put((index, number), states[number])
                self._draw_for(number, 1 + index)
                with torch.no_grad():
                    states[number] = self.model.run_layer(index, states[number], passage)
        losses, gradients = self._losses(states, labelled)
        for index in reversed(range(self.layers)):
            for number, passage in enumerate(passages):
                gradients[number] = self._back_through(index, number, passage, gradients[number])
        self._back_through_entry(gradients)
        return losses

    def _enter(self) -> tuple[list[Tensor], list[Passage]]:
        """Return the states in front of the layers, without what a backward pass needs, and the passages."""
        entered = []
        for number, batch in enumerate(self.batches):
            self._draw_for(number, 0)
            with torch.no_grad():
                entered.append(self.model.start(batch))
        return [states for states, _ in entered], [passage for _, passage in entered]

    def _losses(self, states: list[Tensor], labelled: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return the losses, and the gradients with respect to the states, which are taken out of their list."""
        losses, gradients = [], []
        for batch in self.batches:
            behind = states.pop(0).detach().requires_grad_()
            with torch.enable_grad():
                loss = self.model.loss_behind(behind, batch) / labelled
            self.scaler.scale(loss).backward()
            losses.append(loss.detach())
            gradients.append(_gradient(behind))
        return losses, gradients

    def _back_through(self, index: int, number: int, passage: Passage, gradient: Tensor) -> Tensor:
        """Return the gradient with respect to a layer's input, adding those of what is trained in it."""
        entering = self.inputs.get((index, number)).requires_grad_()
        self._fetch_after(index, number)
        self._draw_for(number, 1 + index)
        with torch.enable_grad():
            leaving = self.model.run_layer(index, entering, passage)
            torch.autograd.backward(leaving, gradient)
        return _gradient(entering)

    def _fetch_after(self, index: int, number: int) -> None:
        if number + 1 < self.count:
            self.inputs.fetch((index, number + 1))
        elif index > 0:
            self.inputs.fetch((index - 1, 0))

    def _back_through_entry(self, gradients: Sequence[Tensor]) -> None:
        """Go on into what makes the states in front of the layers: connector, tower, side tokens."""
        for number, (batch, gradient) in enumerate(zip(self.batches, gradients, strict=True)):
            self._draw_for(number, 0)
            with torch.enable_grad():
                states, _ = self.model.start(batch)
                if not states.requires_grad:
                    return
                torch.autograd.backward(states, gradient)

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


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """Leave the generators as they were."""
    with torch.random.fork_rng([device.index or 0] if device.type == "cuda" else []):
        yield

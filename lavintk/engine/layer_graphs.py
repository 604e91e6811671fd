"""Decoder layers as CUDA graphs, one by one: for layers that take turns on the device.

Of a micro-batch that goes through the layers side by side with others (:mod:`lavintk.engine.layerwise`), each layer is
replayed by itself: one graph for the way forward and one for the way back, which computes the layer again first. What
the layers of a shape read and write are the same few tensors, so a micro-batch is copied in and out around each replay.
A streamed layer is brought to the device outside of its graphs; it always lies in the same place there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from torch import Tensor

from lavintk.data.batch import Batch
from lavintk.data.pack import Pack, PackShape
from lavintk.engine.entry_graphs import Entry, EntryGraphs, back_through_entry
from lavintk.engine.randomness import random_state_kept
from lavintk.engine.recorder import Recorder, keep_gradients
from lavintk.engine.shape_limit import ShapeLimit
from lavintk.models.attention import PackPlan
from lavintk.models.multimodal import MultimodalModel, Passage

MOST_SHAPES = 8
"""Shapes that are recorded: of each, a device holds the launch parameters of all layers."""


class EagerLayers:
    """Runs decoder layers launching each operation when Python comes to it."""

    records = False

    def __init__(self, model: MultimodalModel) -> None:
        self._model = model

    def place(self, batch: Batch) -> Batch | Pack:
        """Return a micro-batch on the device, in the form that the layers take."""
        return batch.to(self._model.device)

    def enter(self, rows: Batch | Pack, seed: int) -> tuple[Tensor, Passage]:
        """Return the states in front of the layers, without what a backward pass needs, and the passage.

        :param seed: of random numbers that are drawn there, as far as torch's default generator does not serve.
        """
        with torch.no_grad():
            return self._model.start(rows)

    def back_through_entry(self, rows: Batch | Pack, gradient: Tensor, seed: int) -> None:
        """Add the gradients of what is trained in front of the layers, computing that again; ``seed`` as before."""
        back_through_entry(self._model, rows, gradient)

    def forward(self, index: int, states: Tensor, passage: Passage) -> Tensor:
        """Return the states behind layer ``index``, without what a backward pass needs."""
        self._model.bring_layer(index)
        with torch.no_grad():
            return self._model.run_layer(index, states, passage)

    def backward(self, index: int, entering: Tensor, passage: Passage, gradient: Tensor) -> Tensor:
        """Compute a layer again, add its parameters' gradients, and return the one with respect to its input.

        :param entering: its input, ``[1, N + M, hidden]``. :param gradient: with respect to its output, likewise.
        """
        self._model.bring_layer(index)
        return _back_through(self._model, index, entering, passage, gradient)


class RecordedLayers:
    """Replays decoder layers; a layer's first micro-batch of a shape takes a tenth of a second longer.

    Random numbers come from torch's default generator: who seeds it before both passes of a layer gets the same ones.

    :param capacity: tokens of a full micro-batch.
    :param say: is told, once, of shapes that are too many to be recorded.
    """

    records = True

    def __init__(self, model: MultimodalModel, capacity: int, say: Callable[[str], None] | None = None) -> None:
        self._model, self._capacity = model, capacity
        tokens = model.adapter.side_tokens() if model.adapter else None
        self._side = 0 if tokens is None else len(tokens)
        self._stages: dict[tuple[int, int], _Stage] = {}
        self._limit = ShapeLimit(MOST_SHAPES, say)
        self._recorder = Recorder(model.device)
        self._trained = list(model.trainable().values())
        self._eager = EagerLayers(model)
        self._entries = EntryGraphs(model, self._recorder, self._limit)

    def place(self, batch: Batch) -> Batch | Pack:
        """Return a micro-batch on the device, filled up to one of few shapes."""
        shape = PackShape.of(batch, self._capacity, self._model.visual_tokens, self._side)
        return Pack.of(batch, shape, self._side).map(lambda tensor: tensor.to(self._model.device))

    def enter(self, rows: Batch | Pack, seed: int) -> tuple[Tensor, Passage]:
        """Do what :meth:`EagerLayers.enter` does.

        :raises NotRecordableError: an operation cannot be recorded; no gradient was changed.
        """
        entry = self._entry(rows)
        return self._eager.enter(rows, seed) if entry is None else entry.forward(cast(Pack, rows), seed)

    def back_through_entry(self, rows: Batch | Pack, gradient: Tensor, seed: int) -> None:
        """Do what :meth:`EagerLayers.back_through_entry` does."""
        entry = self._entry(rows)
        if entry is None:
            self._eager.back_through_entry(rows, gradient, seed)
        else:
            entry.backward(cast(Pack, rows), gradient, seed)

    def _entry(self, rows: Batch | Pack) -> Entry | None:
        assert isinstance(rows, Pack)
        return self._entries.of(rows)

    def forward(self, index: int, states: Tensor, passage: Passage) -> Tensor:
        """Return the states behind layer ``index``.

        :raises NotRecordableError: an operation cannot be recorded; no gradient was changed.
        """
        stage = self._stage(states, passage)
        if stage is None:
            return self._eager.forward(index, states, passage)
        self._model.bring_layer(index)
        stage.load(passage, [stage.entering], [states])
        if index not in stage.layers:
            keep_gradients(self._trained)
            with random_state_kept(self._model.device):
                stage.layers[index] = self._record(index, stage)
        stage.layers[index].forward()
        return stage.leaving.clone()

    def backward(self, index: int, entering: Tensor, passage: Passage, gradient: Tensor) -> Tensor:
        """Do what :meth:`EagerLayers.backward` does."""
        stage = self._stage(entering, passage)
        if stage is None:
            return self._eager.backward(index, entering, passage, gradient)
        self._model.bring_layer(index)
        stage.load(passage, [stage.entering, stage.gradient], [entering, gradient])
        stage.layers[index].backward()
        return stage.returned.clone()

    def _stage(self, states: Tensor, passage: Passage) -> _Stage | None:
        """Return where micro-batches of a shape pass; None if too many other shapes came before."""
        plan = passage.place.plan
        assert isinstance(plan, PackPlan)
        shape = states.shape[1], plan.boundaries.numel()
        if shape not in self._stages:
            if not self._limit.admits(len(self._stages)):
                return None
            self._stages[shape] = _Stage.of(states, passage)
        return self._stages[shape]

    def _record(self, index: int, stage: _Stage) -> _LayerGraphs:
        """Record a layer that is on the device; gradients stay as they are."""
        model = self._model

        def forward() -> None:
            with torch.no_grad():
                stage.leaving.copy_(model.run_layer(index, stage.entering, stage.passage))

        def backward() -> None:
            returned = _back_through(model, index, stage.entering, stage.passage, stage.gradient)
            stage.returned.copy_(returned)

        stage.gradient.zero_()  # adds nothing to the gradients of parameters
        self._recorder.warm_up(backward)
        return _LayerGraphs(*(self._recorder.record(work)[0] for work in (forward, backward)))


class _LayerGraphs(NamedTuple):
    """What replays a layer's graphs."""

    forward: Callable[[], None]
    backward: Callable[[], None]


@dataclass(frozen=True)
class _Stage:
    """What the graphs of all layers read and write, for micro-batches of one shape.

    :param entering: ``[1, N + M, hidden]``, as are ``leaving``, the ``gradient`` with respect to that, and what is
        ``returned``: the gradient with respect to ``entering``.
    """

    passage: Passage
    entering: Tensor
    leaving: Tensor
    gradient: Tensor
    returned: Tensor
    layers: dict[int, _LayerGraphs] = field(default_factory=dict)

    @classmethod
    def of(cls, states: Tensor, passage: Passage) -> _Stage:
        """Return one for micro-batches like an example."""
        entering, leaving, gradient, returned = (torch.empty_like(states, requires_grad=False) for _ in range(4))
        return cls(passage.clone(), entering, leaving, gradient, returned)

    def load(self, passage: Passage, places: list[Tensor], values: list[Tensor]) -> None:
        """Copy a micro-batch in, and ``values`` to ``places``."""
        targets, sources = [*places, *_tensors(self.passage)], [*values, *_tensors(passage)]
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


def _tensors(passage: Passage) -> list[Tensor]:
    """Return all that differs between micro-batches of one shape."""
    plan = passage.place.plan
    assert isinstance(plan, PackPlan)
    return [plan.boundaries, passage.positions, *passage.rotary, passage.context.owners]


def _back_through(model: MultimodalModel, index: int, entering: Tensor, passage: Passage, gradient: Tensor) -> Tensor:
    entering = entering.detach().requires_grad_()
    with torch.enable_grad():
        leaving = model.run_layer(index, entering, passage)
        torch.autograd.backward(leaving, gradient)
    assert entering.grad is not None
    return entering.grad

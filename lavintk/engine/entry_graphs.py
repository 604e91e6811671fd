"""What lies in front of the decoder layers as CUDA graphs: the vision tower above all, whose operations are small.

Of a micro-batch that goes through the layers side by side with others (:mod:`lavintk.engine.layerwise`) it is wanted
twice: forward, keeping nothing, and when the gradient is back, forward once more and backward. There is a graph for
each. Both draw the same random numbers, from generators that get the micro-batch's seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from lavintk.data.batch import Batch
from lavintk.data.pack import Pack
from lavintk.engine.randomness import RecordedRandomness, how_to_recompute, random_state_kept, recomputing, watched
from lavintk.engine.recorder import Recorder, keep_gradients
from lavintk.engine.shape_limit import ShapeLimit
from lavintk.models.multimodal import MultimodalModel, Passage

Made = TypeVar("Made")
APART = 1 << 61
"""What seeds, which are below 2^62, differ by from those of decoder layers, so that masks there are others."""


class EntryGraphs:
    """Records one entry for each shape of micro-batch, when it first comes.

    :param recorder: of the layers, whose memory is shared.
    """

    def __init__(self, model: MultimodalModel, recorder: Recorder, limit: ShapeLimit) -> None:
        self._model, self._recorder, self._limit = model, recorder, limit
        self._entries: dict[tuple[torch.Size, ...], Entry] = {}
        self._trained = list(model.trainable().values())

    def of(self, pack: Pack) -> Entry | None:
        """Return what replays micro-batches like ``pack``; None where that is not worth it, or shapes are too many.

        :raises NotRecordableError: an operation cannot be recorded; no gradient was changed.
        """
        if pack.pixel_values is None:  # an embedding is looked up, little else
            return None
        shape = tuple(tensor.shape for tensor in pack.tensors())
        if shape not in self._entries:
            if not self._limit.admits(len(self._entries)):
                return None
            with random_state_kept(self._model.device):
                self._entries[shape] = self._record(pack)
        return self._entries[shape]

    def _record(self, example: Pack) -> Entry:
        """Record an entry; gradients stay as they are."""
        model, pack = self._model, example.map(Tensor.clone)
        with torch.no_grad():
            gradient = torch.zeros_like(model.start(pack)[0])  # adds nothing to the gradients of parameters
        keep_gradients(self._trained)
        work = partial(back_through_entry, model, pack, gradient)
        blocks, draws = self._recorder.warm_up(lambda: watched(model, work))
        randoms = [RecordedRandomness(model.device, blocks) for _ in range(2)] if draws else []

        def record(work: Callable[[], Made], place: int) -> tuple[Callable[[], None], Made]:
            random = randoms[place] if draws else None
            with recomputing(model, how_to_recompute(random)):
                return self._recorder.record(work, None if random is None else random.attach)

        with torch.no_grad():
            forward, made = record(lambda: model.start(pack), 0)
        backward, _ = record(work, 1)
        return Entry(pack, gradient, made, forward, backward, randoms)


@dataclass(frozen=True)
class Entry:
    """The graphs for micro-batches of one shape, and the tensors that these read and write.

    :param made: states in front of the layers and passage, of the micro-batch that was replayed last.
    """

    pack: Pack
    gradient: Tensor
    made: tuple[Tensor, Passage]
    replay_forward: Callable[[], None]
    replay_backward: Callable[[], None]
    randoms: list[RecordedRandomness]

    def forward(self, pack: Pack, seed: int) -> tuple[Tensor, Passage]:
        """Return the states in front of the layers and the passage of ``pack``."""
        self._load(pack, seed)
        self.replay_forward()
        states, passage = self.made
        return states.clone(), passage.clone()

    def backward(self, pack: Pack, gradient: Tensor, seed: int) -> None:
        """Add the gradients of what is trained in front of the layers."""
        self._load(pack, seed)
        self.gradient.copy_(gradient)
        self.replay_backward()

    def _load(self, pack: Pack, seed: int) -> None:
        for target, source in zip(self.pack.tensors(), pack.tensors(), strict=True):
            target.copy_(source)
        for random in self.randoms:
            random.seed(seed ^ APART)


def back_through_entry(model: MultimodalModel, rows: Batch | Pack, gradient: Tensor) -> None:
    """Compute the states in front of the layers again, and add the gradients of what is trained there."""
    with torch.enable_grad():
        states, _ = model.start(rows)
        if states.requires_grad:  # not where a micro-batch has no images, and nothing else is trained there
            torch.autograd.backward(states, gradient)

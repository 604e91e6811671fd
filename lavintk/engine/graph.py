"""The engine that records the operations of a micro-batch as a CUDA graph and replays them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from lavintk.data.batch import Batch
from lavintk.data.pack import Pack, PackShape
from lavintk.engine.randomness import RecordedRandomness, how_to_recompute, recomputing, watched
from lavintk.engine.recorder import Recorder, keep_gradients
from lavintk.engine.shape_limit import ShapeLimit
from lavintk.models.multimodal import MultimodalModel

WARM_UPS = 2
"""Runs before the first recording: libraries make their workspaces, kernels are compiled. Others get a single one."""
MOST_GRAPHS = 24
"""Shapes that are recorded. Each graph holds a few hundred KiB of launch parameters per layer; memory is shared."""


def why_not_recordable(model: MultimodalModel) -> str:
    """Return what keeps ``model`` from being recorded, or an empty text if nothing is known to."""
    if model.device.type != "cuda":
        return "CUDA graphs need a CUDA device"
    layers = {type(module).__name__ for module in model.linears().values() if not module.graph_safe}
    if layers:
        return f"the host waits for the device in layers of the kind {', '.join(sorted(layers))}"
    if model.manner.side_per_row or model.manner.blank_first:
        return "the adapter computes as LaVIN's own code does, where shapes depend on the rows"
    return ""


@dataclass
class RecordedStep:
    """A recorded micro-batch: the tensors that it reads and writes.

    :param pack: inputs. :param factor: fp32 scalar that the loss is multiplied with for the gradients.
    :param loss: sum over the labelled tokens.
    """

    replay: Callable[[], None]
    pack: Pack
    factor: Tensor
    loss: Tensor
    randomness: RecordedRandomness | None

    def run(self, pack: Pack, factor: Tensor, seed: int) -> Tensor:
        """Add the gradients of ``pack``, which lies in pinned memory, and return its loss sum."""
        for recorded, given in zip(self.pack.tensors(), pack.tensors(), strict=True):
            recorded.copy_(given, non_blocking=True)
        self.factor.copy_(factor)
        if self.randomness is not None:
            self.randomness.seed(seed)
        self.replay()
        return self.loss.clone()


class GraphEngine:
    """Replays one graph per shape of micro-batch; a shape's first micro-batch takes a few seconds longer.

    :param capacity: tokens of a full micro-batch. :param seed: of dropout.
    :param say: is told, once, of shapes that are too many to be recorded.
    """

    name = "graph"
    records = True

    def __init__(
        self,
        model: MultimodalModel,
        scaler: torch.amp.GradScaler,
        capacity: int,
        seed: int,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.model, self.scaler, self.capacity = model, scaler, capacity
        tokens = model.adapter.side_tokens() if model.adapter else None
        self._side = 0 if tokens is None else len(tokens)
        self._recorded: dict[PackShape, RecordedStep] = {}
        self._limit = ShapeLimit(MOST_GRAPHS, say)
        self._recorder = Recorder(model.device)
        self._seed = seed
        self._trained = list(model.trainable().values())

    def backward(self, window: Sequence[Batch], labelled: int, step: int) -> list[Tensor]:
        """Add the window's gradients; see :class:`lavintk.engine.Engine`."""
        keep_gradients(self._trained)
        factor = self.scaler.scale(torch.ones((), device=self.model.device)) / labelled
        losses = []
        for index, batch in enumerate(window):
            shape = PackShape.of(batch, self.capacity, self.model.visual_tokens, self._side)
            pack = Pack.of(batch, shape, self._side)
            if shape not in self._recorded and not self._limit.admits(len(self._recorded)):
                loss = self._run_eagerly(pack, factor)
            else:
                if shape not in self._recorded:
                    self._recorded[shape] = self._record(pack)
                seed = Random(f"{self._seed}/{step}/{index}").getrandbits(62)
                loss = self._recorded[shape].run(pack.map(Tensor.pin_memory), factor, seed)
            losses.append(loss / labelled)
        return losses

    def _run_eagerly(self, pack: Pack, factor: Tensor) -> Tensor:
        return self._forward_backward(pack.map(lambda tensor: tensor.to(self.model.device)), factor)

    def _forward_backward(self, pack: Pack, factor: Tensor) -> Tensor:
        loss = self.model.pack_loss_sum(pack)
        (loss * factor).backward()
        return loss.detach()

    def _record(self, example: Pack) -> RecordedStep:
        """Record a micro-batch of the shape of ``example``; gradients stay as they are.

        :raises NotRecordableError: an operation cannot be recorded.
        """
        device = self.model.device
        pack, factor = example.map(lambda tensor: tensor.to(device)), torch.zeros((), device=device)
        layers, draws = self._recorder.warm_up(lambda: self._warm_up(pack, factor))
        randomness = RecordedRandomness(device, layers) if draws else None
        with recomputing(self.model, how_to_recompute(randomness)):
            replay, loss = self._recorder.record(
                lambda: self._forward_backward(pack, factor), None if randomness is None else randomness.attach
            )
        return RecordedStep(replay, pack, factor, loss, randomness)

    def _warm_up(self, pack: Pack, factor: Tensor) -> tuple[int, bool]:
        """Run with a ``factor`` of 0, which leaves gradients as they are; return what :func:`watched` does."""
        for _ in range(0 if self._recorded else WARM_UPS - 1):
            self._forward_backward(pack, factor)
        return watched(self.model, lambda: self._forward_backward(pack, factor))

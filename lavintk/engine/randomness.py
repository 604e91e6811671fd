"""Random numbers of layers that are recomputed, and in CUDA graphs.

Dropout has to draw the same mask in a layer's forward pass and in its recomputation. Outside of a graph the state of
the generator is read and put back; a graph cannot do that, since its states lie on the device. So each recomputed layer
gets two generators with the same seed, one for either run, which are given new seeds before each replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lavintk.models.multimodal import MultimodalModel, Recompute, recompute

Run = Callable[..., Tensor]


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Leave torch's generators as they were, that of ``device`` included."""
    with torch.random.fork_rng([device.index or 0] if device.type == "cuda" else []):
        yield


class RecordedRandomness:
    """The generators of one graph, in the order in which its layers run.

    :param layers: recomputed layers in a forward pass.
    """

    def __init__(self, device: torch.device, layers: int) -> None:
        self._default = torch.cuda.default_generators[device.index or 0]
        self._pairs = [(self._default.clone_state(), self._default.clone_state()) for _ in range(layers)]
        self._next = 0

    def attach(self, graph: torch.cuda.CUDAGraph) -> None:
        """Tell ``graph``, which is not recorded yet, of the generators."""
        for pair in self._pairs:
            for generator in pair:
                graph.register_generator_state(generator)

    def seed(self, seed: int) -> None:
        """Give each layer a seed of its own that follows from ``seed``, below 2^62."""
        for layer, pair in enumerate(self._pairs):
            for generator in pair:
                generator.manual_seed(seed + layer)

    def recompute(self, run: Run, module: nn.Module, hidden: Tensor) -> Tensor:
        """Run a layer keeping only its input, with the next pair of generators; without gradients keep nothing."""
        forward, backward = self._pairs[self._next]
        self._next += 1
        if not torch.is_grad_enabled():
            with self._drawing_from(forward):
                return run(module, hidden)
        return _recompute(run, module, hidden, lambda: (self._drawing_from(forward), self._drawing_from(backward)))

    @contextmanager
    def _drawing_from(self, generator: torch.Generator) -> Iterator[None]:
        before = self._default.graphsafe_get_state()
        self._default.graphsafe_set_state(generator)
        try:
            yield
        finally:
            self._default.graphsafe_set_state(before)


def how_to_recompute(randomness: RecordedRandomness | None) -> Recompute:
    """Return how a recording recomputes layers; without ``randomness`` they draw no random numbers."""
    return recompute_without_randomness if randomness is None else randomness.recompute


@contextmanager
def recomputing(model: MultimodalModel, how: Recompute) -> Iterator[None]:
    """Let ``model`` recompute its layers by ``how``."""
    before, model.recompute = model.recompute, how
    try:
        yield
    finally:
        model.recompute = before


def watched(model: MultimodalModel, work: Callable[[], object]) -> tuple[int, bool]:
    """Do ``work``; return how many layers it recomputes, and whether anything draws random numbers on the device."""
    on_cuda = model.device.type == "cuda"
    generator = torch.cuda.default_generators[model.device.index or 0] if on_cuda else torch.default_generator
    calls, before = 0, generator.get_state()

    def counted(run: Run, module: nn.Module, hidden: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return recompute(run, module, hidden)

    with recomputing(model, counted):
        work()
    return calls, not torch.equal(generator.get_state(), before)


def recompute_without_randomness(run: Run, module: nn.Module, hidden: Tensor) -> Tensor:
    """Run a layer that draws no random numbers, keeping only its input."""
    return _recompute(run, module, hidden)


def _recompute(
    run: Run,
    module: nn.Module,
    hidden: Tensor,
    contexts: Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]] | None = None,
) -> Tensor:
    options: dict[str, Any] = {} if contexts is None else {"context_fn": contexts}
    recomputed = checkpoint(run, module, hidden, use_reentrant=False, preserve_rng_state=False, **options)
    return cast(Tensor, recomputed)

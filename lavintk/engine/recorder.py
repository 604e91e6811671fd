"""Recording operations as CUDA graphs.

A graph holds addresses, not tensors: what changes between replays is copied into the tensors that were there at the
recording, and gradients are added to the very tensors that stood in ``grad``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn

from lavintk.errors import LavintkError

Result = TypeVar("Result")


class NotRecordableError(LavintkError):
    """A model's operations could not be recorded as a CUDA graph."""


class Recorder:
    """Records graphs that share memory: what one leaves in it, the next replay of any overwrites."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = _recording_stream(device.index or 0)

    def warm_up(self, work: Callable[[], Result]) -> Result:
        """Return what ``work`` returns, run where it will be recorded.

        Libraries make their workspaces and kernels are compiled then, which no graph can hold.
        """
        now = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream):
            result = work()
        now.wait_stream(self._stream)
        return result

    def record(
        self, work: Callable[[], Result], prepare: Callable[[torch.cuda.CUDAGraph], None] | None = None
    ) -> tuple[Callable[[], None], Result]:
        """Return what replays the operations of ``work``, and what that returned: tensors that each replay writes.

        :param prepare: is given the graph before the recording.
        :raises NotRecordableError: an operation cannot be recorded.
        """
        graph = torch.cuda.CUDAGraph()
        if prepare is not None:
            prepare(graph)
        try:
            # other threads, which bring weights from a disk, may use the device meanwhile
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = work()
        except RuntimeError as error:
            _let_draw_again(self._device)
            if (full := _full_device(error)) is not None:
                raise full from None
            raise NotRecordableError(f"an operation cannot be recorded: {str(error).splitlines()[0]}") from error
        return graph.replay, result


@functools.cache
def _recording_stream(index: int) -> torch.cuda.Stream:
    """Return the stream that all recordings on a device share: matrix products keep a workspace for each stream."""
    return torch.cuda.Stream(index)


def _let_draw_again(device: torch.device) -> None:
    """Free the random numbers of a device from a recording that broke off: its generator believes it still goes on."""
    generator = torch.cuda.default_generators[device.index or 0]
    generator.graphsafe_set_state(generator.clone_state())


def _full_device(error: BaseException | None) -> torch.cuda.OutOfMemoryError | None:
    """Return the fault of a full device that led to ``error``: ending a recording that it broke off fails as well."""
    while error is not None and not isinstance(error, torch.cuda.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    return error


def keep_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Give parameters that have none a gradient of zeros, which graphs can add to."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)

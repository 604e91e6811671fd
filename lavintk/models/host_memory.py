"""Host memory that a device copies from and to by itself, and tensors that wait there until they are needed again."""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

LEAVING = 2
"""Tensors that may be on their way to the host at a time; until then they take room on the device."""


def host_memory(nbytes: int, device: torch.device) -> Tensor:
    """Return ``nbytes`` bytes of host memory, pinned if ``device`` is a CUDA device; its content is undefined.

    torch's own pinned memory comes in powers of two, which can be twice as much as is needed.

    :raises torch.OutOfMemoryError: the system does not let so much memory be pinned.
    """
    mapped = mmap.mmap(-1, max(1, nbytes))
    if hasattr(mmap, "MADV_HUGEPAGE"):  # a device finds its way through few large pages faster than through many
        with suppress(OSError):  # where the system has none
            mapped.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(mapped, dtype=torch.uint8)[:nbytes]
    if device.type == "cuda":
        runtime: Any = torch.cuda.cudart()
        code = runtime.cudaHostRegister(memory.data_ptr(), len(mapped), 0)
        if int(code) != 0:
            raise torch.OutOfMemoryError(
                f"{nbytes / 2**30:.2f} GiB of host memory could not be pinned (CUDA error {int(code)})"
            )
        # the mapping lives as long as a tensor over it does
        weakref.finalize(mapped, runtime.cudaHostUnregister, memory.data_ptr())
    return memory


class SideStream:
    """Copies that go on beside what a device computes; on a CPU they are done at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self) -> AbstractContextManager[Any]:
        """Return a context for copies; they wait for what has been given to the device so far."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._stream)

    def alone(self) -> AbstractContextManager[Any]:
        """Return a context for copies that wait for nothing."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def mark(self) -> Callable[[], None]:
        """Return a function that lets the device wait for the copies begun so far before what it is given next."""
        if self._stream is None:
            return lambda: None
        event, device = torch.cuda.Event(), self._device
        event.record(self._stream)
        return lambda: torch.cuda.current_stream(device).wait_event(event)


class HostTensors:
    """Tensors of a device that wait on the host, by key. A key's memory is used again by its next tensor.

    What is put there and fetched may be recorded in a CUDA graph, if the same keys had tensors of at least that size
    before; the memory then stays where it is for good.

    :param device: what the tensors come from and go back to.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._side = device, SideStream(device)
        self._memory: dict[Hashable, Tensor] = {}
        self._outgrown: list[Tensor] = []  # a recorded graph may still write there
        self._waiting: dict[Hashable, Tensor] = {}
        self._leaving: deque[tuple[Tensor, Callable[[], None]]] = deque()
        self._coming: dict[Hashable, tuple[Tensor, Callable[[], None]]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that are held."""
        return sum(memory.nbytes for memory in (*self._memory.values(), *self._outgrown))

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Start to copy ``tensor`` to the host; it must not be changed any more."""
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        place = self._room(key, flat.numel())
        with self._side.begin():
            place.copy_(flat, non_blocking=True)
        self._leaving.append((flat, self._side.mark()))
        if len(self._leaving) > LEAVING:
            _, wait = self._leaving.popleft()
            wait()
        self._coming.pop(key, None)  # what nobody took of an earlier one
        self._waiting[key] = place.view(tensor.dtype).view(tensor.shape)

    def fetch(self, key: Hashable) -> None:
        """Start to copy a tensor back; nothing happens if there is none, or if it is on its way."""
        if key not in self._waiting or key in self._coming:
            return
        if self._leaving:  # their room on the device may be taken by others from now on
            self._leaving[-1][1]()
            self._leaving.clear()
        waiting = self._waiting[key]
        tensor = torch.empty(waiting.shape, dtype=waiting.dtype, device=self._device)
        with self._side.begin():
            tensor.copy_(waiting, non_blocking=True)
        self._coming[key] = tensor, self._side.mark()

    def get(self, key: Hashable) -> Tensor:
        """Return a tensor on the device, for what the device does next; its copy on the host stays."""
        self.fetch(key)
        tensor, wait = self._coming.pop(key)
        wait()
        return tensor

    def forget(self) -> None:
        """Let go of all tensors; what was given up half-way is of no use. Memory stays for those to come."""
        self._waiting.clear()
        self._coming.clear()
        self._leaving.clear()

    @contextmanager
    def saving(self, index: int, hidden: Tensor) -> Iterator[None]:
        """Let autograd save ``hidden`` on the host, under the key ``index``, instead of on the device.

        When it is unpacked, ``index - 1`` is fetched as well, since the backward pass needs that next.
        """
        place, shape = hidden.data_ptr(), hidden.shape  # autograd keeps the hooks, which must not keep the tensor

        def pack(tensor: Tensor) -> Tensor | int:
            if tensor.data_ptr() != place or tensor.shape != shape:
                return tensor
            self.put(index, tensor)
            return index

        def unpack(saved: Tensor | int) -> Tensor:
            if isinstance(saved, Tensor):
                return saved
            tensor = self.get(saved)
            self.fetch(saved - 1)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def _room(self, key: Hashable, nbytes: int) -> Tensor:
        memory = self._memory.get(key)
        if memory is None or memory.numel() < nbytes:
            if memory is not None:
                self._outgrown.append(memory)
            self._memory[key] = memory = host_memory(nbytes, self._device)
        return memory[:nbytes]

"""How tensors get from disk to a device: several threads read ahead, for CUDA into pinned memory that is used again.

Fresh memory costs a page fault for every 4 KiB, and a copy from memory that is not pinned goes through the driver's own
buffer while the host waits. A few buffers that are kept avoid both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

READERS, CUDA_READERS = 2, 4
"""Threads that read by default. For a CPU they share the cores with what quantizes."""

Read = Callable[[str, Tensor | None], Tensor]
"""Reads a tensor by name; it may lie in the bytes given, if any."""


class Place(Protocol):
    """Where one tensor at a time is on its way from disk to a device."""

    def room(self, nbytes: int) -> Tensor | None:
        """Return at least ``nbytes`` bytes of host memory that the next tensor may be read into, or None."""
        ...

    def deliver(self, tensor: Tensor) -> Tensor:
        """Return the tensor that was read, on the device."""
        ...


class Kept:
    """No memory is used again: the tensor that was read is the one that is kept."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def room(self, nbytes: int) -> Tensor | None:
        """Return nothing; the source takes memory of its own."""
        return None

    def deliver(self, tensor: Tensor) -> Tensor:
        """Return the tensor on the device."""
        return tensor.to(self._device)


class Transfers(Protocol):
    """What a device needs for copies that the host does not wait for."""

    def memory(self, nbytes: int) -> Tensor:
        """Return ``nbytes`` bytes of host memory that such copies may start from."""
        ...

    def copy(self, tensor: Tensor) -> Tensor:
        """Start a copy and return the tensor on the device, valid for what the device does next."""
        ...

    def mark(self) -> Callable[[], None]:
        """Return a function that waits until all copies started so far are done."""
        ...


class CudaTransfers:
    """Copies from pinned memory on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def memory(self, nbytes: int) -> Tensor:
        """Return pinned memory."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, tensor: Tensor) -> Tensor:
        """Start a copy; of memory that is not pinned, the driver takes a copy before it returns."""
        return tensor.to(self._device, non_blocking=True)

    def mark(self) -> Callable[[], None]:
        """Record an event on the current stream."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event.synchronize

    def release(self) -> None:
        """Give pinned memory that nobody holds back to the system; torch would keep it, for good."""
        torch.cuda.synchronize(self._device)
        torch._C._host_emptyCache()  # has a public name in later versions of torch only


class Buffer:
    """Host memory that is read into again as soon as its last tensor has left it."""

    def __init__(self, transfers: Transfers) -> None:
        self._transfers = transfers
        self._memory: Tensor | None = None
        self._wait: Callable[[], None] | None = None

    def room(self, nbytes: int) -> Tensor:
        """Wait for the last tensor's copy; return the memory, made anew if it is too small."""
        if self._wait is not None:
            self._wait()
            self._wait = None
        if self._memory is None or self._memory.numel() < nbytes:
            self._memory = None  # before the new one is made, so that it may take its place
            self._memory = self._transfers.memory(nbytes)
        return self._memory

    def deliver(self, tensor: Tensor) -> Tensor:
        """Start the tensor's copy to the device."""
        moved = self._transfers.copy(tensor)
        self._wait = self._transfers.mark()
        return moved


@contextmanager
def places(device: torch.device, readers: int | None = None) -> Iterator[list[Place]]:
    """Give the places that :func:`read_ahead` needs: one more than threads, so that none waits for the caller.

    :param readers: threads that read; None means :data:`CUDA_READERS` or :data:`READERS`.
    """
    if device.type != "cuda":
        yield [Kept(device) for _ in range((readers or READERS) + 1)]
        return
    transfers = CudaTransfers(device)
    ring: list[Place] = [Buffer(transfers) for _ in range((readers or CUDA_READERS) + 1)]
    try:
        yield ring
    finally:
        ring.clear()
        transfers.release()


def read_ahead(
    read: Read, sizes: Sequence[tuple[str, int]], ring: Sequence[Place]
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """Yield ``(name, tensor)`` in order, on the device, reading from disk while the caller quantizes.

    One thread less than there are places reads, neighbours on disk at a time, so that disk, host and device do not
    wait for each other. Besides the caller's tensor, at most one is held in each place.

    :param sizes: names and the bytes that each takes where it is read.
    :param ring: places, used in turn. A tensor is handed over before its place is given to another.
    """
    pool = ThreadPoolExecutor(max(1, len(ring) - 1), thread_name_prefix="lavintk-weights")
    pending: deque[tuple[str, Place, Future[Tensor]]] = deque()

    def fetch(name: str, nbytes: int, place: Place) -> Tensor:
        return read(name, place.room(nbytes))

    def next_ready() -> tuple[str, Tensor]:
        name, place, future = pending.popleft()
        return name, place.deliver(future.result())

    try:
        for number, (name, nbytes) in enumerate(sizes):
            place = ring[number % len(ring)]
            pending.append((name, place, pool.submit(fetch, name, nbytes, place)))
            if len(pending) == len(ring):
                yield next_ready()
        while pending:
            yield next_ready()
    finally:  # also when quantizing fails
        pool.shutdown(wait=False, cancel_futures=True)

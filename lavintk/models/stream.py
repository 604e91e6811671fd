"""A base that waits outside of the device: its decoder layers come one after the other, each in time for its turn.

Streamed are the buffers of the frozen linear layers: codes, scales, biases. Each decoder layer's lie in one block of
host memory, pinned for ``train.stream=cpu``, mapped from disk for ``disk``. The device has :data:`SLOTS` places for
blocks; while it computes with one, the next is copied into the other. Frozen layers never change, so nothing is copied
back. What is trained, norms, embedding and head stay on the device, and so do as many layers as are asked for: spread
evenly, so that there is time to bring each of the others.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Literal

import torch
from torch import Tensor, nn

from lavintk.errors import ModelError
from lavintk.layers import FrozenLinear
from lavintk.models.host_memory import SideStream, host_memory
from lavintk.models.sources import DTYPES, StoredTensor

SLOTS = 2
"""Decoder layers that have room on the device: one computes, the next comes."""
ALIGNMENT = 256
"""Buffers begin at multiples of it, as torch's own allocations do at more."""


@dataclass(frozen=True)
class Piece:
    """Where a buffer of a frozen layer lies in its decoder layer's block."""

    module: nn.Module
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    def put(self, block: Tensor) -> None:
        """Let the buffer be its part of ``block``, uint8."""
        part = block[self.offset : self.offset + prod(self.shape) * self.dtype.itemsize]
        self.module._buffers[self.name] = part.view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Block:
    """The frozen buffers of a decoder layer, outside of the device.

    :param memory: uint8, on the host.
    """

    memory: Tensor
    pieces: Sequence[Piece]

    def bind(self, memory: Tensor) -> None:
        """Let the layer compute with what ``memory`` holds."""
        for piece in self.pieces:
            piece.put(memory)


def which_stay(count: int, resident: int) -> list[bool]:
    """Return for each of ``count`` decoder layers whether it stays on the device, evenly spread, if ``resident`` do."""
    return [index * resident // count < (index + 1) * resident // count for index in range(count)]


class LayersOutside:
    """Takes frozen layers as they are made, and moves the buffers of each complete decoder layer out of the device.

    :param where: ``"cpu"`` for pinned memory, ``"disk"`` for a file without a name that goes with the process, or, if
        layers come out of a file that stays, that one.
    :param resident: decoder layers that stay on the device all the same.
    :param stack: how the names of what is streamed begin.
    """

    def __init__(
        self, device: torch.device, where: Literal["cpu", "disk"], resident: int = 0, stack: str = "model.layers."
    ) -> None:
        self.device, self.where, self.resident, self._stack = device, where, resident, stack
        self._stays: list[bool] = []
        self.stored: Callable[[int], list[StoredTensor]] | None = None
        """Where the tensors of a decoder layer lie on disk already, without gaps; None if they do not."""
        self._layers: list[dict[str, FrozenLinear]] = []
        self._blocks: list[Block | None] = []

    def expect(self, count: int) -> None:
        """Be told how many decoder layers there are, before the first one comes.

        :raises ModelError: all of them would stay on the device.
        """
        if self.resident >= count:
            raise ModelError(
                f"train.resident_layers={self.resident} leaves nothing to stream: the model has {count} decoder "
                f"layers. Ask for {count - 1} at most, or for --stream none."
            )
        self._stays = which_stay(count, self.resident)

    def place(self, name: str, layer: FrozenLinear) -> None:
        """Take a layer; they come in the order of the stack."""
        index = int(name.removeprefix(self._stack).partition(".")[0])
        if index == len(self._layers):
            self._move_out()
            self._layers.append({})
        self._layers[index][name] = layer

    def put_into(self, model: nn.Module) -> LayerStream:
        """Put all layers into ``model`` and return their stream."""
        self._move_out()
        for layers in self._layers:
            for name, layer in layers.items():
                model.set_submodule(name, layer)
        return LayerStream(self._blocks, self.device)

    def _move_out(self) -> None:
        """Move the buffers of the last decoder layer, if they are still on the device and may not stay there."""
        if len(self._blocks) == len(self._layers):
            return
        layers = self._layers[-1]
        if self._stays[len(self._blocks)]:
            self._blocks.append(None)
            return
        block = self._block_on_disk(layers) if self.stored is not None else None
        if block is None:
            pieces, nbytes = _layout(layers)
            memory = host_memory(nbytes, self.device) if self.where == "cpu" else _file_memory(nbytes)
            for piece in pieces:
                _copy(piece.module._buffers[piece.name], memory, piece.offset)
            block = Block(memory, pieces)
        block.bind(block.memory)
        self._blocks.append(block)

    def _block_on_disk(self, layers: dict[str, FrozenLinear]) -> Block | None:
        """Return the block of a decoder layer in the file that it was read from; None if that cannot be mapped."""
        assert self.stored is not None
        tensors = self.stored(len(self._blocks))
        if self.where != "disk" or len({tensor.file for tensor in tensors}) != 1:
            return None
        start = min(tensor.begin for tensor in tensors)
        end = max(tensor.begin + tensor.nbytes for tensor in tensors)
        stored = {tensor.name: tensor for tensor in tensors}
        pieces = []
        for name, module, leaf, tensor in _buffers(layers):
            found = stored.get(f"{name}.{leaf}")
            if found is None or getattr(torch, DTYPES[found.dtype]) != tensor.dtype:  # which was cast
                return None
            offset = found.begin - start
            if offset % tensor.dtype.itemsize or start % mmap.ALLOCATIONGRANULARITY:
                return None
            pieces.append(Piece(module, leaf, tensor.dtype, tuple(tensor.shape), offset))
        with tensors[0].file.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), end - start, access=mmap.ACCESS_COPY, offset=start)
        return Block(torch.frombuffer(mapped, dtype=torch.uint8), pieces)


class LayerStream:
    """Brings decoder layers onto the device, in the order in which they are used, forward and backward.

    :param layers: the block of each decoder layer, at least one; None for those that are on the device for good.
    """

    def __init__(self, layers: Sequence[Block | None], device: torch.device) -> None:
        self._layers, self._device, self._side = len(layers), device, SideStream(device)
        self._streamed = [index for index, block in enumerate(layers) if block is not None]
        self.blocks = [block for block in layers if block is not None]
        size = max(block.memory.numel() for block in self.blocks)
        self._slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self._holds: list[int | None] = [None] * SLOTS
        self._ready: list[Callable[[], None]] = [lambda: None] * SLOTS
        mapped = not self.blocks[0].memory.is_pinned()
        self._staging = _Staging(size, device) if device.type == "cuda" and mapped else None
        self._last = -1

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(block.memory.numel() for block in self.blocks)

    def use(self, index: int) -> None:
        """Let layer ``index`` compute on the device with what is given to it from now on; begin with its neighbour.

        The layer that was used last may be called no more, except through a further ``use``.
        """
        number = bisect_left(self._streamed, index)  # of its block, or else of the next one behind it
        streamed = number < len(self._streamed) and self._streamed[number] == index
        if streamed:
            slot, block = number % SLOTS, self.blocks[number]
            if self._holds[slot] != number:
                self._bring(number)
            self._ready[slot]()
            block.bind(self._slots[slot][: block.memory.numel()])
        if index != self._last:
            begins = index == 0 and self._last == self._layers - 1
            forward = begins or index > self._last
            following = number + streamed if forward else number - 1
            self._last = index
            if 0 <= following < len(self.blocks) and self._holds[following % SLOTS] != following:
                self._bring(following)

    def _bring(self, number: int) -> None:
        """Begin to copy a block into its slot, once nothing computes with that any more.

        It is always the same slot, whose neighbours' are others.
        """
        slot, memory = number % SLOTS, self.blocks[number].memory
        before = self._holds[slot]
        if before is not None:  # whoever looks at that layer from now on sees what is outside of the device
            self.blocks[before].bind(self.blocks[before].memory)
        target = self._slots[slot][: memory.numel()]
        if self._staging is not None:
            self._ready[slot] = self._staging.send(memory, target, self._side)
        else:
            with self._side.begin():
                target.copy_(memory, non_blocking=True)
            self._ready[slot] = self._side.mark()
        self._holds[slot] = number


class _Staging:
    """Pinned memory that a thread of its own reads blocks into, for a device cannot copy from a mapped file."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._memory = host_memory(nbytes, device)
        self._device = device
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="lavintk-stream")
        self._sent: torch.cuda.Event | None = None

    def send(self, memory: Tensor, target: Tensor, side: SideStream) -> Callable[[], None]:
        """Begin to copy ``memory`` to ``target``; return what the one who needs it has to call."""
        free = torch.cuda.Event()
        free.record(torch.cuda.current_stream(self._device))
        job: Future[Callable[[], None]] = self._pool.submit(self._send, memory, target, side, free)
        return lambda: job.result()()

    def _send(self, memory: Tensor, target: Tensor, side: SideStream, free: torch.cuda.Event) -> Callable[[], None]:
        if self._sent is not None:
            self._sent.synchronize()  # the last block has left the pinned memory
        staged = self._memory[: memory.numel()]
        staged.copy_(memory)
        with side.alone():
            free.wait()
            target.copy_(staged, non_blocking=True)
            self._sent = torch.cuda.Event()
            self._sent.record()
        return side.mark()


def _buffers(layers: dict[str, FrozenLinear]) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Yield the name of each frozen layer of a decoder layer, and the module, name and value of each of its buffers."""
    for name, layer in layers.items():
        for path, module in layer.named_modules(prefix=name):
            for leaf, tensor in module.named_buffers(recurse=False):
                yield path, module, leaf, tensor


def _layout(layers: dict[str, FrozenLinear]) -> tuple[list[Piece], int]:
    """Return where the buffers of a decoder layer shall lie in a block, and the bytes of the block."""
    pieces, end = [], 0
    for _, module, leaf, tensor in _buffers(layers):
        pieces.append(Piece(module, leaf, tensor.dtype, tuple(tensor.shape), end))
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return pieces, end


def _copy(tensor: Tensor | None, memory: Tensor, offset: int) -> None:
    assert tensor is not None
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    memory[offset : offset + flat.numel()].copy_(flat)


def _file_memory(nbytes: int) -> Tensor:
    """Return memory that is a file on disk without a name, which the system may write out and read again.

    :raises ModelError: the disk has no room for it.
    """
    with tempfile.TemporaryFile(dir=_scratch()) as file:
        _make_room(file, max(1, nbytes))
        return torch.frombuffer(mmap.mmap(file.fileno(), max(1, nbytes)), dtype=torch.uint8)[:nbytes]


def _make_room(file: IO[bytes], nbytes: int) -> None:
    """Let ``file`` have ``nbytes``, and the disk room for them: writing to a mapped hole would end the process."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, nbytes)
        else:
            file.write(bytes(nbytes))
            file.flush()
    except OSError as error:
        raise ModelError(
            f"train.stream=disk keeps the base's layers on the disk of {_scratch()}, which has no room for "
            f"{nbytes / 1e9:.2f} GB more: {error}. Free some, or let LAVINTK_CACHE name a folder on a larger disk."
        ) from error


def _scratch() -> Path:
    """Return a folder on the disk of the cache: a system's folder for temporary files is often in memory."""
    from lavintk.cache import cache_folder

    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return folder

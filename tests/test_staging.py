"""Reading ahead into buffers that are used again."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lavintk.models.sources import read_header, read_tensor
from lavintk.models.staging import Buffer, Kept, places, read_ahead

CPU = torch.device("cpu")


class LazyDevice:
    """A device that copies as late as it may: only when somebody waits for it."""

    def __init__(self) -> None:
        self.made: list[int] = []
        self._queue: list[tuple[Tensor, Tensor]] = []
        self._done = 0
        self._lock = threading.Lock()

    def memory(self, nbytes: int) -> Tensor:
        self.made.append(nbytes)
        return torch.full((nbytes,), 255, dtype=torch.uint8)

    def copy(self, tensor: Tensor) -> Tensor:
        moved = torch.zeros_like(tensor)
        with self._lock:
            self._queue.append((moved, tensor))
        return moved

    def mark(self) -> Callable[[], None]:
        end = len(self._queue)

        def wait() -> None:
            with self._lock:
                for moved, tensor in self._queue[self._done : end]:
                    moved.copy_(tensor)
                self._done = max(self._done, end)

        return wait


def numbered(count: int) -> dict[str, Tensor]:
    return {f"t{i}": torch.full((1 + 37 * i % 11,), i, dtype=torch.int16) for i in range(count)}


def reader(tensors: dict[str, Tensor]) -> Callable[[str, Tensor | None], Tensor]:
    def read(name: str, into: Tensor | None = None) -> Tensor:
        tensor = tensors[name]
        if into is None:
            return tensor.clone()
        time.sleep(0.001 * (len(tensor) % 3))  # so that they do not come in order
        value = into[: tensor.nbytes].view(tensor.dtype)
        return value.copy_(tensor)

    return read


@pytest.mark.parametrize("readers", [1, 2, 5])
def test_a_buffer_is_used_again_only_when_its_copy_is_done(readers: int) -> None:
    tensors, device = numbered(40), LazyDevice()
    sizes = [(name, tensor.nbytes) for name, tensor in tensors.items()]
    buffers = [Buffer(device) for _ in range(readers + 1)]
    found = dict(read_ahead(reader(tensors), sizes, buffers))
    device.mark()()
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name


def test_a_buffer_grows_to_the_largest_tensor_and_is_then_kept() -> None:
    device = LazyDevice()
    buffer = Buffer(device)
    rooms = [buffer.room(nbytes).data_ptr() for nbytes in (4, 2, 100, 8, 100)]
    assert device.made == [4, 100]
    assert rooms[0] == rooms[1]
    assert rooms[2] == rooms[3] == rooms[4]


@pytest.mark.parametrize("readers", [1, 3])
def test_at_most_one_tensor_is_held_in_each_place(readers: int) -> None:
    tensors = numbered(12)
    started: list[str] = []

    def read(name: str, into: Tensor | None = None) -> Tensor:
        started.append(name)
        return tensors[name]

    sizes = [(name, tensor.nbytes) for name, tensor in tensors.items()]
    with places(CPU, readers) as ring:
        for number, _ in enumerate(read_ahead(read, sizes, ring)):
            time.sleep(0.005)
            assert len(started) <= number + 1 + readers


def test_on_a_cpu_no_memory_is_used_again() -> None:
    tensors = numbered(9)
    sizes = [(name, tensor.nbytes) for name, tensor in tensors.items()]
    with places(CPU) as ring:
        assert all(isinstance(place, Kept) for place in ring)
        found = list(read_ahead(reader(tensors), sizes, ring))
    assert len({tensor.data_ptr() for _, tensor in found}) == len(tensors)


def test_a_fault_while_reading_reaches_the_caller_in_its_turn() -> None:
    tensors = numbered(6)

    def read(name: str, into: Tensor | None = None) -> Tensor:
        if name == "t3":
            raise EOFError("the file ends early")
        return tensors[name]

    with places(CPU) as ring:
        found = read_ahead(read, [(name, 64) for name in tensors], ring)
        assert [next(found)[0] for _ in range(3)] == ["t0", "t1", "t2"]
        with pytest.raises(EOFError, match="ends early"):
            next(found)


def test_a_stored_tensor_is_read_into_the_memory_given(tmp_path: Path) -> None:
    stored = {
        "matrix": torch.randn(5, 7, dtype=torch.bfloat16),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
    }
    save_file(stored, tmp_path / "model.safetensors")
    memory = torch.full((128,), 255, dtype=torch.uint8)
    for name, place in read_header(tmp_path / "model.safetensors")[1].items():
        value = read_tensor(place, memory)
        assert torch.equal(value, stored[name])
        assert value.shape == stored[name].shape
        assert value.numel() == 0 or value.data_ptr() == memory.data_ptr()
        assert torch.equal(read_tensor(place), stored[name])

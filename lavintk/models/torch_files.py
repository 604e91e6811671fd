"""Finds the tensors in files that ``torch.save`` and TorchScript write, without running what the files hold.

Both are zip archives with a pickle that describes the tensors, and their bytes beside it. Only where the tensors lie
is learned here; they are read like those of any other file. What comes from ``torch.save`` goes through torch's own
``weights_only`` reader. TorchScript archives hold code, which ``torch.jit.load`` compiles and that reader refuses;
their pickle is read by a reader that knows tensors and makes of everything else an object without behaviour.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lavintk.errors import CheckpointError
from lavintk.models.sources import DTYPES, StoredTensor

if TYPE_CHECKING:
    import torch

LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How files of ``torch.save`` began before version 1.6."""
STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}  # fmt: skip
LISTS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")
_REFUSED = re.compile(r"Unsupported (?:global|class|operand|persistent id)[^\n.]*(?:\.[\w.]+)?")


def load_safely(file: Path, **options: Any) -> Any:
    """Return what ``torch.load`` makes of ``file`` on the CPU with ``weights_only=True``.

    :param options: further arguments of ``torch.load``.
    :raises CheckpointError: the file is damaged, or holds objects that only code could make; one fault.
    """
    import torch

    if fault := _file_fault(file):
        raise CheckpointError(str(file), [fault])
    try:
        return torch.load(file, map_location="cpu", weights_only=True, **options)
    except pickle.UnpicklingError as error:
        found = _REFUSED.search(str(error))
        reason = found[0] if found else str(error).partition("\n")[0]
        fault = f"is refused: it holds more than tensors, and reading that could run any code ({reason})"
        raise CheckpointError(str(file), [fault]) from error
    except Exception as error:  # a damaged file surfaces as exceptions of many kinds
        raise CheckpointError(str(file), [f"cannot be read: {str(error).partition(chr(10))[0]}"]) from error


def find_tensors(file: Path) -> dict[str, StoredTensor]:
    """Return where each tensor of a state dict that ``torch.save`` wrote lies; none is read.

    :raises CheckpointError: the file is damaged or in the format before torch 1.6, or holds anything but one flat
        dict of tensors; all listed.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        content = load_safely(file)
    if not isinstance(content, Mapping):
        raise CheckpointError(str(file), [f"holds a {type(content).__name__}, not a dict of tensors"])
    found, faults = {}, []
    for name, value in content.items():
        try:
            found[str(name)] = _place(str(name), value, file)
        except ValueError as error:
            faults.append(f"{name} {error}")
    if faults:
        raise CheckpointError(str(file), faults, "A state dict holds tensors by their names and nothing else.")
    return found


def is_torchscript(file: Path) -> bool:
    """Say whether ``file`` is a TorchScript archive."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def find_scripted_tensors(file: Path) -> dict[str, StoredTensor]:
    """Return where each parameter and buffer of the module in a TorchScript archive lies; no code of it is run.

    :raises CheckpointError: the archive is damaged or no module lies in it; one fault.
    """
    try:
        with zipfile.ZipFile(file) as archive, file.open("rb") as opened:
            (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            reader = _ModuleReader(archive, opened, file, pickled.removesuffix("data.pkl"))
            root = reader.load()
        if not isinstance(root, _Node):
            raise ValueError(f"it holds a {type(root).__name__}, not a module")
        return dict(_named_tensors(root))
    except Exception as error:  # a damaged pickle surfaces as exceptions of many kinds
        raise CheckpointError(str(file), [f"is no TorchScript module that can be read: {error}"]) from error


class _Node:
    """Stands for a module or any other object of a TorchScript archive: attributes and nothing else."""


class _ModuleReader(pickle.Unpickler):
    """Reads the pickle of a TorchScript archive; the only functions it can call are those of :meth:`find_class`."""

    def __init__(self, archive: zipfile.ZipFile, opened: BinaryIO, file: Path, folder: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{folder}data.pkl")))
        self.archive, self.opened, self.path, self.folder = archive, opened, file, folder

    def find_class(self, module: str, name: str) -> Any:
        """Return our stand-in for what the pickle names.

        :raises pickle.UnpicklingError: it names anything that no module of tensors needs.
        """
        known: dict[tuple[str, str], Any] = {
            ("torch._utils", "_rebuild_tensor_v2"): self._rebuild_tensor,
            ("collections", "OrderedDict"): OrderedDict,
            ("torch.jit._pickle", "restore_type_tag"): lambda value, _: value,
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch.jit._pickle" and name in LISTS:
            return list
        if module.partition(".")[0] == "__torch__":
            return type(name, (_Node,), {})
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no module of tensors needs")

    def persistent_load(self, pid: Any) -> tuple[str, int, int]:
        """Return number type, offset in the file and bytes of the storage that ``pid`` names."""
        _, dtype, key, *_ = pid
        info = self.archive.getinfo(f"{self.folder}data/{key}")
        if info.compress_type != zipfile.ZIP_STORED:
            raise pickle.UnpicklingError(f"{info.filename} is compressed")
        self.opened.seek(info.header_offset + 26)  # two lengths end the fixed part of a local header (30 bytes)
        lengths = self.opened.read(4)
        begin = info.header_offset + 30 + sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
        return dtype, begin, info.file_size

    def _rebuild_tensor(
        self, storage: tuple[str, int, int], offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any
    ) -> StoredTensor:
        dtype, begin, nbytes = storage
        tensor = _stored("", dtype, shape, stride, self.path, begin, offset)
        if tensor.begin + tensor.nbytes > begin + nbytes:
            raise pickle.UnpicklingError(f"a tensor of shape {list(shape)} is larger than its storage")
        return tensor


def _named_tensors(node: _Node, prefix: str = "") -> Iterator[tuple[str, StoredTensor]]:
    for name, value in vars(node).items():
        if isinstance(value, StoredTensor):
            path = prefix + name
            yield path, StoredTensor(path, *(getattr(value, field) for field in _FIELDS))
        elif isinstance(value, _Node):
            yield from _named_tensors(value, f"{prefix}{name}.")


_FIELDS = ("dtype", "shape", "file", "begin", "nbytes", "stride")


def _place(name: str, value: Any, file: Path) -> StoredTensor:
    """Return where a tensor that was loaded without its values lies.

    :raises ValueError: it is no plain tensor, or the file ends before it does.
    """
    import torch

    if not isinstance(value, torch.Tensor):
        raise ValueError(f"is a {type(value).__name__}, not a tensor")
    names = {getattr(torch, torch_name): ours for ours, torch_name in DTYPES.items()}
    if value.layout != torch.strided or value.dtype not in names:
        raise ValueError(f"is a tensor of type {value.dtype} in layout {value.layout}, which cannot be used")
    begin: int | None = getattr(value.untyped_storage(), "_checkpoint_offset", None)
    if begin is None:
        raise ValueError("lies at no place of the file")
    stored = _stored(name, names[value.dtype], value.shape, value.stride(), file, begin, int(value.storage_offset()))
    size = file.stat().st_size
    if stored.begin + stored.nbytes > size:
        raise ValueError(f"ends at byte {stored.begin + stored.nbytes}, the file at byte {size}")
    return stored


def _stored(
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    file: Path,
    begin: int,
    offset: int,
) -> StoredTensor:
    """Return a tensor's place from that of its storage.

    :param begin: offset of the storage in the file, in bytes. :param offset: of the tensor in it, in values.
    :raises ValueError: sizes below 0.
    """
    import torch

    shape, stride = tuple(map(int, shape)), tuple(map(int, stride))
    if offset < 0 or len(shape) != len(stride) or min((*shape, *stride), default=0) < 0:
        raise ValueError(f"has shape {list(shape)}, strides {list(stride)} and offset {offset}, which no tensor has")
    size = _dtype(torch, dtype).itemsize
    values = 0 if 0 in shape else 1 + sum((length - 1) * step for length, step in zip(shape, stride))
    in_order = all(
        length == 1 or step == math.prod(shape[axis + 1 :]) for axis, (length, step) in enumerate(zip(shape, stride))
    )
    kept = None if in_order or not values else stride
    return StoredTensor(name, dtype, shape, file, begin + offset * size, values * size, kept)


def _dtype(torch_module: Any, name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch_module, DTYPES[name])
    return dtype


def _file_fault(file: Path) -> str | None:
    """Return what is wrong with a file before torch looks at it, or None."""
    try:
        with file.open("rb") as opened:
            start = opened.read(64)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights; fetch them with git lfs pull"
    if start.startswith(LEGACY):
        return (
            "is in the format that torch.save wrote before version 1.6; write it anew where you trust it: "
            "torch.save(torch.load(FILE, map_location='cpu', weights_only=True), NEW_FILE)"
        )
    if not zipfile.is_zipfile(file):
        state, size = "truncated" if start.startswith(b"PK") else "no file of torch.save", file.stat().st_size
        return f"is {state}: {size} bytes without a zip archive's directory at their end"
    return None

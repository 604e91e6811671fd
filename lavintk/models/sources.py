"""Where weights come from: one interface over folders and files of weights, read one tensor at a time.

Names are those that Hugging Face's ``transformers`` gives to the parameters.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from lavintk.errors import CheckpointError, ModelError
from lavintk.models import catalog

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

INDEX = "model.safetensors.index.json"
SAMPLES, SAMPLE_BYTES = 8, 4096
"""Blocks that a fingerprint reads of each tensor, and their length."""


class WeightSource(Protocol):
    """A checkpoint that is read tensor by tensor."""

    description: str
    """Where it came from, or its path, for messages and manifests."""

    def config(self) -> PretrainedConfig:
        """Return the model's configuration.

        :raises ModelError: transformers does not know the model, or it needs code of its own.
        """
        ...

    def names(self) -> list[str]:
        """Return the parameter names in the order they lie on disk."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that :meth:`read` gives."""
        ...

    def nbytes(self) -> int:
        """Return the bytes on disk of all tensors together."""
        ...

    def tensor_nbytes(self, name: str) -> int:
        """Return the bytes on disk of one tensor."""
        ...

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """Return a tensor on the CPU in the type it is stored in; quantized GGUF tensors come back in fp32.

        Nothing is kept: memory holds the tensor as long as the caller does.

        :param into: uint8 ``[n]``, ``n`` at least :meth:`tensor_nbytes`, in which the result may lie, to save making
            memory for it: the caller must be done with the result before using those bytes otherwise. A source that
            computes its values ignores it.
        :raises CheckpointError: the data cannot be read.
        """
        ...

    def fingerprint(self) -> str:
        """Return a SHA-256, in hexadecimal, that tells bases apart; see :func:`fingerprint`."""
        ...

    def close(self) -> None:
        """Release what the source holds open."""
        ...


def open_source(reference: str | Path, *, revision: str | None = None) -> WeightSource:
    """Open the weights that ``reference`` means, downloading them if need be.

    :param reference: a folder with ``config.json`` and safetensors, Meta's folder with ``consolidated.*.pth`` and
        ``params.json``, a ``.gguf`` file, a CLIP state dict of OpenAI's (``.pt``, ``.pth``, ``.safetensors``), a name
        of the catalog, or a hub id ``owner/name``.
    :param revision: branch, tag or commit; only for hub ids.
    :raises ModelError: the reference means nothing that lavintk can read; says what was found.
    :raises CheckpointError: files are missing, truncated or contradict each other, all faults listed.
    :raises DownloadError: the hub or the package index could not deliver.
    """
    path = catalog.locate(reference, revision=revision)
    if path.is_dir():
        from lavintk.models.meta_source import MetaSource, is_meta_folder

        return (MetaSource if is_meta_folder(path) else SafetensorsSource)(path, catalog.describe(path))
    kind = path.suffix.lower()
    if kind == ".gguf":
        from lavintk.models.gguf_source import GGUFSource

        return GGUFSource(path, catalog.describe(path))
    if kind in (".pt", ".pth", ".safetensors"):
        from lavintk.models.clip_source import ClipSource

        return ClipSource(path, catalog.describe(path))
    raise ModelError(
        f"{path} is no model: lavintk reads .gguf files, a folder with config.json and safetensors, or OpenAI's CLIP "
        "as .pt, .pth or .safetensors"
    )


def check_names(source: WeightSource, expected: Mapping[str, tuple[int, ...]], ignore: Callable[[str], bool]) -> None:
    """Compare the names and shapes in ``source`` with those the model expects.

    :param expected: shape of each parameter of the model.
    :param ignore: says which names may be missing or left over, for example a tied ``lm_head.weight``.
    :raises CheckpointError: carries one fault for each missing, left over or misshapen tensor.
    """
    stored = set(source.names())
    missing = [f"{n} is missing" for n in expected if n not in stored and not ignore(n)]
    unexpected = [f"{n} is not part of the model" for n in source.names() if n not in expected and not ignore(n)]
    misshapen = [
        f"{name} has shape {list(source.shape(name))}, the model expects {list(shape)}"
        for name, shape in expected.items()
        if name in stored and source.shape(name) != tuple(shape)
    ]
    if not missing and not unexpected and not misshapen:
        return
    # Taken in turn, so that what is shown has some of each kind.
    faults = [f for turn in zip_longest(missing, unexpected, misshapen) for f in turn if f is not None]
    raise CheckpointError(
        source.description,
        faults,
        f"In all: {len(missing)} missing, {len(unexpected)} unexpected, {len(misshapen)} misshapen. "
        "The weights do not belong to this configuration.",
    )


DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "BOOL": "bool",
}  # fmt: skip
"""Number types of safetensors files and their names in torch."""
READ_BYTES = 16 << 20
"""Read at a time: enough for the system to read ahead, small beside the tensors."""


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies on disk.

    :param dtype: the file format's own name of the number type.
    :param shape: of the tensor as it is read.
    :param begin: offset of its first byte in ``file``.
    :param nbytes: from the first to the last byte.
    :param stride: of its axes in values, where they do not lie in order.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    nbytes: int
    stride: tuple[int, ...] | None = None


def fingerprint(headers: Mapping[Path, int], tensors: Iterable[StoredTensor]) -> str:
    """Return a SHA-256 over what identifies a checkpoint, reading a few MiB of it.

    Covered are, for each file in the order of their names: its size and its header, byte for byte (in a GGUF
    file that includes the metadata and the tokenizer); and for each tensor in the order of the names: name,
    number type, shape, and :data:`SAMPLES` blocks of :data:`SAMPLE_BYTES` spread evenly from its first to its
    last byte, so tensors up to 32 KiB are covered wholly. Not covered: file names, ``config.json``, and the
    bytes of larger tensors between the blocks. The same weights in other shards have another fingerprint.

    :param headers: files and the length of their headers in bytes.
    """
    digest = hashlib.sha256()
    opened: dict[Path, BinaryIO] = {}
    try:
        for path in sorted(headers):
            opened[path] = path.open("rb", buffering=0)
            digest.update(f"file {path.stat().st_size} {headers[path]}\n".encode())
            digest.update(_read_at(opened[path], 0, headers[path]))
        for tensor in sorted(tensors, key=lambda tensor: tensor.name):
            digest.update(f"tensor {tensor.name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            for offset, length in _samples(tensor.nbytes):
                digest.update(_read_at(opened[tensor.file], tensor.begin + offset, length))
    finally:
        for file in opened.values():
            file.close()
    return digest.hexdigest()


def _samples(nbytes: int) -> list[tuple[int, int]]:
    if nbytes <= SAMPLES * SAMPLE_BYTES:
        return [(0, nbytes)]
    last = nbytes - SAMPLE_BYTES
    return [(last * i // (SAMPLES - 1), SAMPLE_BYTES) for i in range(SAMPLES)]


def _read_at(file: BinaryIO, offset: int, length: int) -> bytes:
    """Read exactly ``length`` bytes from an unbuffered file; a read may return less than asked for."""
    file.seek(offset)
    parts, left = [], length
    while left:
        part = file.read(left)
        if not part:
            raise CheckpointError(file.name, [f"ends {left} bytes early"], "Download it again.")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


class FileSource:
    """Tensors that lie in files, each at a place of its own; what folders and files of weights have in common."""

    def __init__(self, description: str) -> None:
        self.description = description
        self._headers: dict[Path, int] = {}
        self._tensors: dict[str, StoredTensor] = {}

    def names(self) -> list[str]:
        """Return the parameter names, as stored, in the order they lie on disk."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._tensors[name].shape

    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def tensor_nbytes(self, name: str) -> int:
        """Return the bytes of one tensor."""
        return self._tensors[name].nbytes

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """Return a tensor in the type it is stored in, in ``into`` if that is given.

        It is read plainly, front to back, instead of through a memory map: a map's page faults leave a fast disk
        idle half of the time, and its pages would count as memory of this process.

        :raises CheckpointError: the file changed or cannot be read any more.
        """
        tensor = self._tensors[name]
        try:
            return read_tensor(tensor, into)
        except (OSError, EOFError) as error:
            raise CheckpointError(self.description, [f"{name} in {tensor.file.name}: {error}"]) from error

    def fingerprint(self) -> str:
        """Return what :func:`fingerprint` makes of the files."""
        return fingerprint(self._headers, self._tensors.values())

    def close(self) -> None:
        """Do nothing: no file is held open."""


class SafetensorsSource(FileSource):
    """A folder with ``config.json`` and one safetensors file, or several with their index."""

    def __init__(self, folder: Path, description: str | None = None) -> None:
        """Read the headers and check that the files are whole and agree with the index.

        :raises ModelError: the folder holds no such model; says what is there.
        :raises CheckpointError: files that are corrupt or truncated or do not fit the index, all listed.
        """
        super().__init__(description or str(folder))
        self.path = folder
        _read_config(folder)
        files, indexed = _listed_files(folder)
        faults = []
        for file in files:
            faults += self._add_file(file)
        faults += _index_faults(indexed, {name: tensor.file.name for name, tensor in self._tensors.items()}, files)
        if faults:
            raise CheckpointError(self.description, faults, "Download or copy the files again.")

    def config(self) -> PretrainedConfig:
        """Return the configuration in ``config.json``."""
        return read_model_config(self.path, self.description)

    def _add_file(self, file: Path) -> list[str]:
        """Take in the header of one file; return its faults."""
        try:
            length, tensors = read_header(file)
        except CheckpointError as error:
            return [f"{file.name} {fault}" for fault in error.faults]
        self._headers[file] = length
        faults = [
            f"{name} lies in {self._tensors[name].file.name} and again in {file.name}"
            for name in tensors
            if name in self._tensors
        ]
        self._tensors |= tensors
        return faults


def read_header(file: Path) -> tuple[int, dict[str, StoredTensor]]:
    """Return the length of a safetensors file's header and its tensors in the order they lie on disk.

    :raises CheckpointError: the file is corrupt or truncated; one fault.
    """
    fault = _file_fault(file)
    if fault is not None:
        raise CheckpointError(str(file), [fault])
    with file.open("rb") as opened:
        length = 8 + int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = json.loads(opened.read(length - 8))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        begin, end = entry["data_offsets"]
        tensors[name] = StoredTensor(name, entry["dtype"], tuple(entry["shape"]), file, length + begin, end - begin)
    return length, tensors


def read_model_config(folder: Path, description: str) -> PretrainedConfig:
    """Return the configuration in ``folder``'s ``config.json``.

    :param description: what messages call the folder.
    :raises ModelError: transformers does not know the model, or it needs code of its own.
    """
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers validates with exceptions of many kinds
        kind, reason = _read_config(folder).get("model_type"), str(error).partition("\n")[0]
        raise ModelError(
            f"transformers cannot use config.json of {description} (model_type {kind!r}): {reason}\n"
            "lavintk runs no code that comes with a model; it needs one that transformers knows."
        ) from error
    return config


def _read_config(folder: Path) -> dict[str, Any]:
    """Return ``config.json`` as it is.

    :raises ModelError: it is missing or unreadable, or describes weights that are quantized already.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{folder} is no model folder: it has no config.json. {_what_is_there(folder)}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} must hold a JSON object, found {type(config).__name__}")
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise ModelError(
            f"the weights in {folder} are quantized already (method {method!r}). Give the 16-bit base "
            "that they were made from; lavintk quantizes while loading."
        )
    return config


def _what_is_there(folder: Path, shown: int = 12) -> str:
    found = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir())
    if not found:
        return "The folder is empty."
    more = f" and {len(found) - shown} more" if len(found) > shown else ""
    hint = ""
    if "adapter_config.json" in found:
        hint = " It holds an adapter; name the model that the adapter belongs to."
    elif any(name.endswith(".gguf") for name in found):
        hint = " To use a .gguf file, name the file itself."
    return f"Found: {', '.join(found[:shown])}{more}.{hint}"


def _listed_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Return the safetensors files that are there, and the index (name of a tensor to name of a file).

    :raises ModelError: there is nothing to read.
    :raises CheckpointError: the index cannot be understood, or there are several files and no index.
    """
    index = folder / INDEX
    if index.is_file():
        indexed = _read_index(index)
        return sorted({folder / file for file in indexed.values() if (folder / file).is_file()}), indexed
    files = sorted(folder.glob("*.safetensors"))
    single = folder / "model.safetensors"
    if single in files:
        return [single], {}
    if len(files) == 1:
        return files, {}
    if files:
        names = [f"{file.name} cannot be placed without {INDEX}" for file in files]
        raise CheckpointError(str(folder), names, f"Download {INDEX} too.")
    raise ModelError(f"{folder} holds no safetensors. {_what_is_there(folder)}{_pickle_advice(folder)}")


def _pickle_advice(folder: Path) -> str:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pth", ".pt", ".ckpt"))
    if not pickles:
        return ""
    return (
        f"\n{pickles[0]} is a pickle, and reading it would run any code that it holds: lavintk never does. "
        "Convert the weights where you trust them, with transformers: "
        "AutoModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) writes safetensors."
    )


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        indexed = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{INDEX} holds no weight_map that can be read: {type(error).__name__}: {error}"
        raise CheckpointError(str(index.parent), [reason]) from error
    outside = sorted({file for file in indexed.values() if Path(file).name != file})
    if outside:
        raise CheckpointError(str(index.parent), [f"{INDEX} names {file!r}, outside the folder" for file in outside])
    return indexed


def _index_faults(indexed: Mapping[str, str], found: Mapping[str, str], files: Sequence[Path]) -> list[str]:
    """Return what the index says and the files do not bear out, and the reverse.

    :param indexed: tensor to file, as the index has it; empty without an index.
    :param found: tensor to file, as the headers have it.
    :param files: what the index names and is there.
    """
    if not indexed:
        return []
    present = {file.name for file in files}
    faults = [f"{INDEX} names {file}, which is missing" for file in sorted(set(indexed.values()) - present)]
    readable = set(found.values())
    faults += [
        f"{INDEX} places {name} in {file}, which does not hold it"
        for name, file in indexed.items()
        if file in readable and found.get(name) != file
    ]
    faults += [
        f"{name} lies in {file}, but {INDEX} does not name it" for name, file in found.items() if name not in indexed
    ]
    if files:
        faults += [f"{stray} is a shard that {INDEX} does not name" for stray in _stray_shards(files[0], present)]
    return faults


def _stray_shards(known: Path, present: set[str]) -> list[str]:
    """Return files that are numbered like the shard ``known`` but not in ``present``."""
    numbered = re.compile(r"(.+)-\d+-of-\d+\.safetensors")
    stem = numbered.fullmatch(known.name)
    if stem is None:
        return []
    others = ((file.name, numbered.fullmatch(file.name)) for file in sorted(known.parent.glob("*.safetensors")))
    return [name for name, match in others if match and match[1] == stem[1] and name not in present]


def _file_fault(file: Path) -> str | None:
    """Return what is wrong with a safetensors file, or None."""
    from safetensors import SafetensorError, safe_open

    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights; fetch them with git lfs pull"
    if size < 8 or 8 + int.from_bytes(start[:8], "little") > size:
        return f"is truncated or no safetensors file: {size} bytes do not hold its header"
    try:
        with safe_open(file, framework="pt", device="cpu"):
            return None
    except (SafetensorError, OSError) as error:
        promised = _promised_size(file)
        if promised is not None and promised > size:
            return f"is truncated: it has {size} of {promised} bytes"
        return f"is corrupt: {error}"


def _promised_size(file: Path) -> int | None:
    """Return the size that the header implies, or None if the header is unusable."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        try:
            header = json.loads(opened.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            return 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return None


def read_tensor(tensor: StoredTensor, into: torch.Tensor | None = None) -> torch.Tensor:
    """Read one tensor of a file, into memory of its own or into ``into``, uint8 of at least as many bytes.

    :raises EOFError: the file ends before the tensor does.
    """
    import torch

    dtype = getattr(torch, DTYPES[tensor.dtype])
    memory = torch.empty(tensor.nbytes, dtype=torch.uint8) if into is None else into[: tensor.nbytes]
    _read_into(memory, tensor)
    values = memory.view(dtype)
    if tensor.stride is None:
        return values.view(tensor.shape)
    return values.as_strided(tensor.shape, tensor.stride, values.storage_offset()).contiguous()


def _read_into(memory: torch.Tensor, tensor: StoredTensor) -> None:
    if not tensor.nbytes:
        return
    target = memoryview(memory.numpy())  # type: ignore[arg-type]
    with tensor.file.open("rb", buffering=0) as file:
        file.seek(tensor.begin)
        done = 0
        while done < tensor.nbytes:  # one call reads at most 2 GiB, and may read less
            count = file.readinto(target[done : done + READ_BYTES])
            if not count:
                raise EOFError(f"the file ends {tensor.nbytes - done} bytes early")
            done += count

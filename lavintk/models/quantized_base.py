"""A quantized language model on disk, bit for bit as it lies on the device: read back, it needs no quantizing.

An entry is a folder with a safetensors file for each decoder layer, one for what is around the layers, and a manifest.
It is written beside its place and renamed when complete; every tensor has a checksum. A file's data begin at a multiple
of :data:`PAGE` and lie without gaps, tensors of whole 16 bytes first, so that a layer can be read at once.
:mod:`lavintk.models.base_cache` says where entries lie and when they are made and used.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from torch import Tensor, nn

from lavintk.contracts import Quantizer
from lavintk.errors import CheckpointError, ModelError
from lavintk.layers import FrozenLinear
from lavintk.models.language import LANGUAGE_STACK, Progress, RecentLayers, StreamedLinear
from lavintk.models.sources import DTYPES, StoredTensor, read_header, read_tensor
from lavintk.models.staging import places, read_ahead

FORMAT = 1
"""Version of the layout of an entry."""
MANIFEST, PARTIAL = "manifest.json", ".partial"
PAGE, ALIGNMENT = 1 << 16, 16
"""Data begin where every system can map a file from; tensors where a thread can load 16 bytes at once."""
SHARD_BYTES = 2 * 10**9
"""Bytes of a file, at most, unless a single tensor has more."""
PIECE_BYTES = 64 << 20
"""What comes from the device at a time when an entry is written."""
ADVICE = "Delete the folder: it is made anew."
NAMES = {getattr(torch, name): code for code, name in DTYPES.items()}
"""Number types as safetensors files call them."""

Place = Callable[[str, FrozenLinear], None]
"""Takes a finished frozen layer by its name in the model."""
Make = Callable[[torch.device], FrozenLinear]
"""Returns a frozen layer with undefined content on a device."""


class QuantizedBase:
    """An entry that is complete.

    :param manifest: what ``manifest.json`` holds: ``origin`` (all that the content depends on), ``model``, ``bytes``,
        ``seconds`` of making it, ``made``, ``files``, ``checks`` (CRC-32 by tensor) and ``shared`` (names of tensors
        that are another one's).
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self._tensors: dict[str, StoredTensor] | None = None

    @classmethod
    def open(cls, folder: Path) -> QuantizedBase:
        """Read the manifest and look whether the files are there in full length; their content is checked when read.

        :raises CheckpointError: something is missing, cut off or of another layout.
        """
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            found, files = manifest["format"], dict(manifest["files"])
            complete = all(key in manifest for key in ("origin", "model", "bytes", "checks", "shared"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(str(folder), [f"{MANIFEST} cannot be read: {error}"]) from error
        if found != FORMAT or not complete:
            raise CheckpointError(str(folder), [f"{MANIFEST} is of layout {found}, {FORMAT} is needed"])
        faults = [
            f"{name} should have {size} bytes, it {'is missing' if there is None else f'has {there}'}"
            for name, size in files.items()
            if (there := _size(folder / name)) != size
        ]
        if faults:
            raise CheckpointError(str(folder), faults)
        return cls(folder, manifest)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return int(self.manifest["bytes"])

    def tensors(self) -> dict[str, StoredTensor]:
        """Return where each tensor lies, what is around the layers first, then layer after layer.

        :raises CheckpointError: a file's header is damaged, or tensors are not those of the manifest.
        """
        if self._tensors is None:
            found: dict[str, StoredTensor] = {}
            for name in self.manifest["files"]:
                try:
                    found |= read_header(self.folder / name)[1]
                except (OSError, CheckpointError) as error:
                    raise CheckpointError(str(self.folder), [f"{name} is damaged: {error}"]) from error
            if found.keys() != self.manifest["checks"].keys():
                raise CheckpointError(str(self.folder), [f"its files do not hold the tensors that {MANIFEST} names"])
            self._tensors = found
        return self._tensors

    def layer_bytes(self, index: int) -> list[StoredTensor]:
        """Return the tensors of a decoder layer, norms among them, in the order they lie on disk: without gaps.

        :raises CheckpointError: as :meth:`tensors`.
        """
        prefix = f"{LANGUAGE_STACK}{index}."
        return [tensor for name, tensor in self.tensors().items() if name.startswith(prefix)]

    def read(self, name: str, into: Tensor | None = None) -> Tensor:
        """Return a tensor on the host, in ``into`` if that is given: uint8 of at least as many bytes.

        :raises CheckpointError: it cannot be read, or its checksum is another one.
        """
        stored = self.tensors()[name]
        try:
            tensor = read_tensor(stored, into)
        except (OSError, EOFError) as error:
            raise CheckpointError(str(self.folder), [f"{name} in {stored.file.name}: {error}"], ADVICE) from error
        check = 0
        for piece in _pieces(tensor):
            check = zlib.crc32(piece, check)
        if check != self.manifest["checks"][name]:
            raise CheckpointError(
                str(self.folder), [f"{name} in {stored.file.name} was changed: its checksum differs"], ADVICE
            )  # fmt: skip
        return tensor

    def fill(
        self,
        model: nn.Module,
        quantizer: Quantizer,
        embed_quantizer: Quantizer | None = None,
        *,
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress | None = None,
        place: Place | None = None,
        stream: bool = False,
        readers: int | None = None,
    ) -> None:
        """Give every parameter of ``model`` and every frozen layer what is stored.

        Layers come in the order of the stack. Besides what is finished, memory holds the tensors on their way and those
        of one decoder layer.

        :param model: on the meta device; linear layers in the stack, which ``quantizer`` stores, are plain ones, frozen
            layers elsewhere are ``embed_quantizer``'s.
        :param dtype: of what is not quantized, biases of frozen layers among it: it is cast where it was stored in
            another type, while what quantizers made stays as it is.
        :param place: takes the frozen layers of the stack, with buffers on ``device``; None puts them into ``model``.
        :param stream: put :class:`~lavintk.models.language.StreamedLinear` there, which reads when it is asked.
        :param readers: threads that read; None means as many as suit the device.
        :raises CheckpointError: the entry is damaged or does not fit; the model is of no use then.
        """
        make = _frozen_layers(model, quantizer, embed_quantizer)
        owners = _owners(self.tensors(), make)
        self._check(model, owners, make)
        put, names = model.set_submodule, list(self.tensors())
        if stream:
            self._stream(model, owners, make, dtype)
            names = [name for name in names if not owners[name].startswith(LANGUAGE_STACK)]
        left, waiting = Counter(owners[name] for name in names), dict[str, dict[str, Tensor]]()
        for name, tensor in self._read_all(names, device, progress, readers):
            owner = owners[name]
            if not owner or name == f"{owner}.bias":
                tensor = tensor.to(dtype)
            if not owner:
                module, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=False))
                continue
            waiting.setdefault(owner, {})[name.removeprefix(f"{owner}.")] = tensor
            del tensor
            if len(waiting[owner]) == left[owner]:
                layer = self._restored(owner, make[owner], device, waiting.pop(owner))
                (place if place is not None and owner.startswith(LANGUAGE_STACK) else put)(owner, layer)
                del layer

    def _read_all(
        self, names: list[str], device: torch.device, progress: Progress | None, readers: int | None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors on the device, in order."""
        sizes, done = [(name, self.tensors()[name].nbytes) for name in names], 0
        total = sum(size for _, size in sizes)
        with places(device, readers) as ring:
            for name, tensor in read_ahead(self.read, sizes, ring):
                yield name, tensor
                del tensor
                done += self.tensors()[name].nbytes
                if progress is not None:
                    progress(done, total)

    def _check(self, model: nn.Module, owners: Mapping[str, str], make: Mapping[str, Make]) -> None:
        """Compare names, and the shapes of what no frozen layer holds.

        :raises CheckpointError: all that does not fit.
        """
        shared, inside = self.manifest["shared"], set(owners.values())
        wanted = {
            name: parameter.shape
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if name not in shared and name.rpartition(".")[0] not in make
        }
        plain = {name: self.tensors()[name].shape for name, owner in owners.items() if not owner}
        faults = [f"{name} is missing" for name in [*wanted, *make] if name not in plain and name not in inside]
        faults += [f"{name} is not part of the model" for name in plain if name not in wanted]
        faults += [
            f"{name} has shape {list(shape)}, the model expects {list(wanted[name])}"
            for name, shape in plain.items()
            if name in wanted and tuple(wanted[name]) != shape
        ]
        if faults:
            raise CheckpointError(str(self.folder), faults)

    def _stream(
        self, model: nn.Module, owners: Mapping[str, str], make: Mapping[str, Make], dtype: torch.dtype
    ) -> None:
        """Put a layer in the place of each of the stack that reads its storage when it is asked.

        :param dtype: of biases.
        """
        recent, cpu, names = RecentLayers(), torch.device("cpu"), dict[str, list[str]]()
        for name, owner in owners.items():
            names.setdefault(owner, []).append(name)
        for owner, made in make.items():
            if not owner.startswith(LANGUAGE_STACK):
                continue
            shape = made(torch.device("meta"))
            bias = self.read(f"{owner}.bias").to(dtype) if shape.bias is not None else None

            def read(owner: str = owner, made: Make = made, bias: Tensor | None = bias) -> FrozenLinear:
                state = {name.removeprefix(f"{owner}."): self.read(name) for name in names[owner]}
                return self._restored(owner, made, cpu, state if bias is None else {**state, "bias": bias})

            model.set_submodule(owner, StreamedLinear(shape.out_features, shape.in_features, bias, read, recent))

    def _restored(self, name: str, make: Make, device: torch.device, state: Mapping[str, Tensor]) -> FrozenLinear:
        """Return a frozen layer with the tensors of ``state`` themselves as its storage."""
        try:
            layer = make(device)
            layer.load_state_dict(state, assign=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # what a plugin's layer makes of a state that is not its own
            raise CheckpointError(str(self.folder), [f"{name} cannot be put back: {error}"]) from error
        return layer


def _frozen_layers(model: nn.Module, quantizer: Quantizer, embed_quantizer: Quantizer | None) -> dict[str, Make]:
    """Return how an empty one is made for each frozen layer of a model as :meth:`QuantizedBase.fill` takes it."""
    made: dict[str, Make] = {}
    for name, module in model.named_modules():
        if name.startswith(LANGUAGE_STACK) and isinstance(module, nn.Linear):
            made[name] = partial(quantizer.empty, module.out_features, module.in_features, module.bias is not None)
        elif isinstance(module, FrozenLinear) and embed_quantizer is not None:
            made[name] = partial(embed_quantizer.empty, module.out_features, module.in_features, False)
    return made


def check_restorable(model: nn.Module, quantizer: Quantizer, embed_quantizer: Quantizer | None = None) -> None:
    """Make sure that frozen layers come back bit by bit, by trying the first one of each quantizer.

    :raises ModelError: a plugin's ``empty`` and ``load_state_dict`` do not give the layer again.
    """
    tried = set[int]()
    for name, module in model.named_modules():
        used = quantizer if name.startswith(LANGUAGE_STACK) else embed_quantizer
        if not isinstance(module, FrozenLinear) or used is None or id(used) in tried:
            continue
        tried.add(id(used))
        layer = module.layer() if isinstance(module, StreamedLinear) else module
        try:
            same = _comes_back(layer, used)
        except Exception as error:  # whatever a plugin's layer raises
            raise ModelError(f"{type(layer).__name__} cannot be put back: {error}") from error
        if not same:
            raise ModelError(f"{type(layer).__name__} is another one when it is put back")


def _comes_back(layer: FrozenLinear, quantizer: Quantizer) -> bool:
    device, state = next(layer.buffers()).device, layer.state_dict()
    again = quantizer.empty(layer.out_features, layer.in_features, layer.bias is not None, device)
    again.load_state_dict(state, assign=True)
    found = again.state_dict()
    if found.keys() != state.keys() or not all(torch.equal(found[key], state[key]) for key in state):
        return False
    if quantizer.requires_cuda and device.type != "cuda":
        return True  # stored where it cannot compute
    return torch.equal(again.dequantize(torch.bfloat16), layer.dequantize(torch.bfloat16))


def write_base(
    folder: Path,
    model: nn.Module,
    origin: Mapping[str, Any],
    description: str,
    started: float,
    advance: Callable[[float], None] | None = None,
) -> QuantizedBase:
    """Write what ``model`` holds into ``folder``; an entry that another process puts there meanwhile stays.

    Host memory takes :data:`PIECE_BYTES` of a model on another device. Of layers that are made when they are asked for,
    memory holds those of a decoder layer and those that were made last.

    :param model: a causal LM without adapter.
    :param origin: all that its values depend on: plain values.
    :param description: where its weights come from.
    :param started: when reading and quantizing them began, by ``time.monotonic()``.
    :param advance: is told the share that is written.
    :raises OSError: the disk does not take it; nothing stays behind.
    :raises ModelError: it holds what such a file cannot.
    """
    _remove_remains(folder.parent)
    partial_folder = folder.with_name(f"{folder.name}.{os.getpid()}{PARTIAL}")
    shutil.rmtree(partial_folder, ignore_errors=True)
    try:
        partial_folder.mkdir(parents=True)
        checks, shared, nbytes = dict[str, int](), dict[str, str](), 0
        for written, (stem, tensors) in enumerate(_groups(model, shared), 1):
            for number, shard in enumerate(_shards(tensors), 1):
                checks |= _write_file(partial_folder / f"{stem}-{number:02d}.safetensors", shard)
                nbytes += sum(tensor.nbytes for tensor in shard.values())
            if advance is not None:
                advance(written / (1 + len(cast(Any, model).model.layers)))
        manifest = {
            "format": FORMAT, "model": description, "origin": dict(origin), "bytes": nbytes,
            "seconds": round(time.monotonic() - started, 1), "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "files": {path.name: path.stat().st_size for path in sorted(partial_folder.iterdir(), key=_layer_of)},
            "shared": shared, "checks": checks,
        }  # fmt: skip
        (partial_folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        _put_in_place(partial_folder, folder)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
    return QuantizedBase.open(folder)


def _put_in_place(written: Path, folder: Path) -> None:
    try:
        written.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster
            raise


def _groups(model: Any, shared: dict[str, str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield what is around the layers, then layer after layer: the name of its files, and its tensors by name.

    :param shared: is told which names are another tensor's, such as that of a tied head.
    """
    around, names = dict[str, Tensor](), dict[int, str]()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.startswith(LANGUAGE_STACK):
            continue
        if names.setdefault(id(tensor), name) == name:
            around[name] = tensor
        else:
            shared[name] = names[id(tensor)]
    yield "rest", around
    for index, layer in enumerate(model.model.layers):
        prefix = f"{LANGUAGE_STACK}{index}."
        state = layer.state_dict(prefix=prefix, keep_vars=True)
        for name, module in layer.named_modules():
            if isinstance(module, StreamedLinear):
                state |= module.layer().state_dict(prefix=f"{prefix}{name}.", keep_vars=True)
        yield f"layer-{index:05d}", state


def _shards(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield ``tensors`` in parts of at most :data:`SHARD_BYTES`, a larger one by itself."""
    part, size = dict[str, Tensor](), 0
    for name, tensor in tensors.items():
        if part and size + tensor.nbytes > SHARD_BYTES:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    if part:
        yield part


def _write_file(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Write a safetensors file, piece by piece; return the CRC-32 of each tensor.

    :raises OSError: the disk does not take it.
    :raises ModelError: a number type that the format does not know.
    """
    strange = [f"{name}: {getattr(t, 'dtype', type(t).__name__)}" for name, t in tensors.items() if not _storable(t)]
    if strange:
        raise ModelError(f"it holds what a safetensors file cannot ({', '.join(strange[:3])})")
    # whole lines of the cache first, then falling sizes of numbers: each tensor begins at a multiple of its type's
    uneven = {name: tensor.nbytes % ALIGNMENT != 0 for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: (uneven[name], -tensors[name].itemsize if uneven[name] else 0, name))
    header, end = dict[str, Any](), 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        tensor = tensors[name]
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    checks = dict.fromkeys(order, 0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for piece in _pieces(tensors[name]):
                file.write(piece)
                checks[name] = zlib.crc32(piece, checks[name])
    return checks


def _storable(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.dtype in NAMES


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor on the host, :data:`PIECE_BYTES` at a time."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, flat.numel(), PIECE_BYTES):
        yield memoryview(flat[start : start + PIECE_BYTES].cpu().numpy())  # type: ignore[arg-type]


def _owners(names: Mapping[str, object], frozen: Mapping[str, object]) -> dict[str, str]:
    """Return the frozen layer that each tensor is a part of, or an empty text."""
    owners = {}
    for name in names:
        owner = name
        while owner and owner not in frozen:
            owner = owner.rpartition(".")[0]
        owners[name] = owner
    return owners


def _layer_of(path: Path) -> tuple[bool, str]:
    """Sort what is around the layers first."""
    return not path.name.startswith("rest"), path.name


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _remove_remains(folder: Path) -> None:
    """Remove what processes that were ended left half written."""
    for path in folder.glob(f"*{PARTIAL}"):
        owner = path.name.removesuffix(PARTIAL).rpartition(".")[2]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(path, ignore_errors=True)

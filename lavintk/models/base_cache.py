"""When the quantized base is kept on disk, and when a kept one is used in the place of reading and quantizing.

An entry lies in ``quantized/<key>`` of the cache directory. The key is a SHA-256 over all that the codes depend on: the
base's fingerprint, the quantizers with all options and with the code of their plugins, the packages that those compute
with, the types that weights were rounded to, and the kind of device.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from lavintk.cache import cache_folder
from lavintk.contracts import Quantizer
from lavintk.dense import DenseQuantizer
from lavintk.errors import CheckpointError, LavintkError, ModelError
from lavintk.layers import FrozenLinear
from lavintk.models.delta_source import DeltaCompat, with_delta
from lavintk.models.language import Progress, language_config, load_language_model
from lavintk.models.quantized_base import MANIFEST, PARTIAL, QuantizedBase, check_restorable, write_base
from lavintk.models.sources import WeightSource, open_source
from lavintk.plugins import CORE, Plugins
from lavintk.registry import Choice

Setting = Literal["auto", True, False]
KEY = "model.cache"
SMALLEST = 10**9
"""Bytes of a base in 16 bits from which on ``auto`` keeps it: smaller ones are quantized in seconds."""
FREE_BYTES, FREE_SHARE = 10 * 10**9, 0.2
"""What ``auto`` leaves free on the disk."""

log = logging.getLogger(__name__)


class Load(Protocol):
    """Loads the language model: :func:`~lavintk.models.language.load_language_model` with its arguments."""

    def __call__(self, *, kept: QuantizedBase | None = None) -> nn.Module:
        """Return the model, with the storage of ``kept`` where that is given.

        :raises CheckpointError: ``kept`` is damaged or does not fit.
        """
        ...


@dataclass(frozen=True)
class Wanted:
    """A base as it is asked for.

    :param origin: all that the content depends on: plain values.
    :param description: where its weights come from.
    :param size: bytes of its matrices in 16 bits.
    :param embed_quantizer: None where embedding and head stay plain.
    """

    origin: dict[str, Any]
    description: str
    size: int
    quantizer: Quantizer
    embed_quantizer: Quantizer | None

    @property
    def key(self) -> str:
        """Name of its folder."""
        return hashlib.sha256(json.dumps(self.origin, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def folder(self) -> Path:
        """Where it lies, if it does."""
        return quantized_folder() / self.key


@dataclass(frozen=True)
class Made:
    """What :func:`make_base` did.

    :param seconds: it took.
    """

    kept: QuantizedBase
    seconds: float
    was_there: bool = False


def quantized_folder() -> Path:
    """Return the folder of all kept bases in lavintk's cache; whoever wants the room back may delete it."""
    return cache_folder() / "quantized"


def wanted_base(
    source: WeightSource,
    fingerprint: str,
    plugins: Plugins,
    quant: Choice,
    embed_quant: Choice,
    rounded_to: Sequence[torch.dtype],
    device: torch.device,
) -> Wanted | None:
    """Describe the base that loading ``source`` in this way makes; None where nothing in the layers is quantized.

    :param fingerprint: of ``source``.
    :param rounded_to: the types that weights pass on their way to the quantizer; the last one is the compute type.
    :param device: where they are quantized; quantizers may add up in another order on another kind.
    """
    quantizer, embed_quantizer = plugins.quantizers.create(quant), plugins.quantizers.create(embed_quant)
    if isinstance(quantizer, DenseQuantizer):
        return None
    config = source.config()
    types = [str(dtype).removeprefix("torch.") for dtype in rounded_to]
    origin = {
        "weights": fingerprint,
        "model_type": config.model_type,
        "tied": bool(config.tie_word_embeddings),
        "quant": _quantizer_origin(plugins, quant, quantizer),
        "embed_quant": _quantizer_origin(plugins, embed_quant, embed_quantizer),
        "types": list(dict.fromkeys(types)),
        "device": device.type,
        "torch": str(torch.__version__),
    }
    shapes = [source.shape(name) for name in source.names()]
    size = sum(2 * shape[0] * shape[1] for shape in shapes if len(shape) == 2)
    plain = isinstance(embed_quantizer, DenseQuantizer)
    return Wanted(origin, source.description, size, quantizer, None if plain else embed_quantizer)


def load_base(
    load: Load,
    wanted: Wanted | None,
    setting: Setting,
    *,
    trained: Wanted | None = None,
    may_keep: bool = True,
    say: Callable[[str], None] | None = None,
) -> nn.Module:
    """Return the language model from a kept base where there is one, else as ``load`` makes it, and perhaps keep that.

    What goes wrong with a kept one is told and does not stop the work.

    :param wanted: None: no other base than ``trained`` is looked for, and none is made.
    :param setting: of the recipe: ``model.cache``.
    :param trained: the base that the model was trained on. It is preferred where it is kept: its codes are the trained
        ones, which another kind of device need not find again.
    :param may_keep: False for a model that does not hold its layers.
    :param say: takes lines for the terminal; None: they go to the log.
    :raises LavintkError: what ``load`` raises without a kept base.
    """
    note, tell = (say, say) if say is not None else (log.warning, log.info)
    another = trained is not None and (wanted is None or trained.key != wanted.key)
    if trained is not None and another and trained.folder.exists():
        try:
            return load(kept=opened(trained))
        except CheckpointError as error:  # it stays: only a training on the same kind of device can make it anew
            note(f"note: the base of the training, kept in {trained.folder}, is not used: {error.faults[0]}")
    if wanted is None:
        return load()
    was_there = wanted.folder.exists()
    if was_there:
        try:
            return load(kept=opened(wanted))
        except CheckpointError as error:
            note(f"note: the quantized base kept in {wanted.folder} is not used: {error.faults[0]}. It is made anew.")
            shutil.rmtree(wanted.folder, ignore_errors=True)
    started = time.monotonic()
    model = load()
    if may_keep and (setting is True or was_there or wanted.size > SMALLEST):
        try:
            kept = _keep(wanted, model, wanted.folder, started, leave_free=setting == "auto")
            tell(f"kept the quantized base: {kept.folder}, {gigabytes(kept.nbytes)}; lavintk models list shows it")
        except (OSError, LavintkError) as error:
            note(f"note: the quantized base is not kept on disk: {error}. {KEY}=false asks for none.")
    return model


def make_base(
    reference: str,
    plugins: Plugins,
    quant: Choice,
    embed_quant: Choice,
    *,
    device: torch.device,
    dtype: torch.dtype,
    delta: str | None = None,
    delta_compat: DeltaCompat = "none",
    out: Path | None = None,
    progress: Progress | None = None,
) -> Made:
    """Quantize a model and put it where loading finds it, unless it is there.

    Neither host nor device holds more than two of its decoder layers and what is around them.

    :param delta: published difference that is added to the weights, as ``model.delta`` of a recipe.
    :param out: a folder to make the entry's folder in, instead of that of the cache.
    :raises LavintkError: the model cannot be loaded so, ``quant`` stores nothing in another form, or what it stores
        cannot be put back.
    :raises OSError: the disk does not take it.
    """
    source = open_source(reference)
    if delta is not None:
        source = with_delta(source, delta, delta_compat)
    language_config(source)
    wanted = wanted_base(source, source.fingerprint(), plugins, quant, embed_quant, [dtype], device)
    if wanted is None:
        raise ModelError(f"quant {quant} leaves the weights as they are, so there is nothing to keep; try nf4 or int4")
    folder = wanted.folder if out is None else out / wanted.key
    try:
        return Made(opened(wanted, folder), 0.0, was_there=True)
    except CheckpointError:
        shutil.rmtree(folder, ignore_errors=True)
    started, total = time.monotonic(), source.nbytes()
    model = load_language_model(
        source, _OnDevice(wanted.quantizer, device), device=device, dtype=dtype, stream=True,
        embed_quantizer=wanted.embed_quantizer,
    )  # fmt: skip

    def advance(share: float) -> None:
        if progress is not None:
            progress(round(share * total), total)

    kept = _keep(wanted, model, folder, started, leave_free=False, advance=advance)
    return Made(kept, time.monotonic() - started)


class _OnDevice:
    """A quantizer that is given weights on the host and quantizes them on a device."""

    def __init__(self, quantizer: Quantizer, device: torch.device) -> None:
        self._quantizer, self._device = quantizer, device
        self.requires_cuda = quantizer.requires_cuda

    def quantize(self, weight: Tensor, bias: Tensor | None) -> FrozenLinear:
        """Return the layer, on the device."""
        return self._quantizer.quantize(weight.to(self._device), None if bias is None else bias.to(self._device))

    def empty(self, out_features: int, in_features: int, bias: bool, device: torch.device) -> FrozenLinear:
        """Return a layer with undefined content."""
        return self._quantizer.empty(out_features, in_features, bias, device)


def opened(wanted: Wanted, folder: Path | None = None) -> QuantizedBase:
    """Return the kept base in ``folder``, by default its own.

    :raises CheckpointError: it is damaged or not there, or another one lies in its place.
    """
    kept = QuantizedBase.open(folder or wanted.folder)
    if kept.manifest["origin"] != wanted.origin:
        raise CheckpointError(str(kept.folder), [f"{MANIFEST} describes another base"])
    return kept


def _keep(
    wanted: Wanted,
    model: nn.Module,
    folder: Path,
    started: float,
    *,
    leave_free: bool,
    advance: Callable[[float], None] | None = None,
) -> QuantizedBase:
    """Write ``model`` to ``folder``.

    :param leave_free: refuse where less than :data:`FREE_BYTES` or :data:`FREE_SHARE` of the disk would stay free.
    :raises OSError: the disk does not take it.
    :raises ModelError: it could not be read back.
    """
    if leave_free:
        _check_room(model, folder)
    check_restorable(model, wanted.quantizer, wanted.embed_quantizer)
    return write_base(folder, model, wanted.origin, wanted.description, started, advance)


def kept_bases() -> list[QuantizedBase]:
    """Return the kept bases, in the order of their making; those that are damaged have no place among them."""
    found = []
    for folder in quantized_folder().glob("*"):
        if not folder.name.endswith(PARTIAL):
            try:
                found.append(QuantizedBase.open(folder))
            except CheckpointError:
                continue
    return sorted(found, key=lambda kept: (str(kept.manifest.get("made")), kept.folder))


def remove_kept(key: str) -> tuple[str, int]:
    """Delete the kept base whose folder is called ``key`` or begins so; also one that is damaged.

    :returns: the folder's name, and the bytes of its files.
    :raises ModelError: there is none, or there are several.
    """
    folders = [folder for folder in sorted(quantized_folder().glob("*")) if folder.is_dir()]
    found = [folder for folder in folders if key and folder.name.startswith(key)]
    if len(found) != 1:
        what = f"{len(found)} quantized bases begin with" if found else "no quantized base is called"
        there = ", ".join(folder.name for folder in found or folders) or "none"
        raise ModelError(f"{what} {key!r}; there are: {there}. `lavintk models list` says what they are.")
    nbytes = sum(path.stat().st_size for path in found[0].rglob("*") if path.is_file())
    shutil.rmtree(found[0])
    return found[0].name, nbytes


def describe_kept(kept: QuantizedBase) -> str:
    """Return how a kept base is stored, in a few words: ``nf4, bfloat16, cuda``."""
    origin = kept.manifest["origin"]
    tables = origin["embed_quant"]
    parts = [_in_words(origin["quant"])]
    parts += [f"embedding {_in_words(tables)}"] if tables["name"] != "none" else []
    return ", ".join([*parts, " to ".join(origin["types"]), origin["device"]])


def gigabytes(nbytes: int) -> str:
    """Return bytes as ``3.5 GB``, small ones in MB."""
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def _in_words(quantizer: dict[str, Any]) -> str:
    options = ",".join(f"{key}={value}" for key, value in quantizer["options"].items())
    return f"{quantizer['name']}:{options}" if options else str(quantizer["name"])


def _quantizer_origin(plugins: Plugins, choice: Choice, quantizer: Quantizer) -> dict[str, Any]:
    """Return what the codes that a quantizer makes depend on."""
    entry = plugins.quantizers[choice.name]
    record = next(record for record in plugins.records() if record.name == entry.owner)
    options = asdict(entry.parse_options(choice.options))
    return {
        "name": choice.name,
        "options": json.loads(json.dumps(options, sort_keys=True, default=str)),
        "plugin": f"{record.distribution} {record.version}",
        "code": "" if entry.owner == CORE else _code(plugins.manager.get_plugin(entry.owner)),
        "packages": _packages(sys.modules[type(quantizer).__module__]),
    }


def _code(plugin: object) -> str:
    """Return a SHA-256 of the plugin's source: a version alone does not change while someone works on it."""
    module = plugin if isinstance(plugin, ModuleType) else sys.modules[type(plugin).__module__]
    if not (file := getattr(module, "__file__", None)):
        return ""
    path, digest = Path(file), hashlib.sha256()
    for source in sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]:
        digest.update(source.relative_to(path.parent).as_posix().encode() + b"\n" + source.read_bytes())
    return digest.hexdigest()


def _packages(module: ModuleType) -> dict[str, str]:
    """Return the versions of the packages out of which ``module`` imports something, torch and lavintk aside."""
    names = {
        str(value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", "")).partition(".")[0]
        for value in vars(module).values()
    }
    found = {}
    for name in sorted(names - {"", "torch", "lavintk"} - sys.stdlib_module_names):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # not the name of a distribution
            continue
    return found


def _check_room(model: nn.Module, folder: Path) -> None:
    """Refuse what would fill the disk.

    :raises OSError: with the figures.
    """
    tensors = [*model.parameters(), *model.buffers()]
    needed = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    there = next(parent for parent in folder.absolute().parents if parent.is_dir())
    usage = shutil.disk_usage(there)
    spare = usage.free - max(FREE_BYTES, int(FREE_SHARE * usage.total))
    if needed > spare:
        raise OSError(
            f"it needs {gigabytes(needed)}, and {gigabytes(usage.free)} of {gigabytes(usage.total)} are free in "
            f"{there}, of which {FREE_SHARE:.0%} and at least {gigabytes(FREE_BYTES)} are left alone"
        )

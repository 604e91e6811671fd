"""How fast an exported folder answers on this machine, and what it takes."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lavintk.data.images import ImageProcessor
from lavintk.data.labels import IGNORED, IMAGE, TEXT
from lavintk.data.tokenize import TokenizedRecord
from lavintk.errors import RunError
from lavintk.runtime.manifest import Manifest
from lavintk.runtime.model import ExportedModel
from lavintk.runtime.sessions import Opener, Provider


@dataclass(frozen=True)
class Speed:
    """Figures of one folder on one machine; times and rates are medians over the repeats.

    :param modality: whose decoder ran: ``"all"``, ``"text"`` or ``"image"``.
    :param threads: as asked for; None is onnxruntime's own choice.
    :param spinning: whether threads kept their core busy while they waited.
    :param load_seconds: to open the graphs.
    :param first_token_seconds: from the prompts' ids to the first new token, without the vision graph.
    :param prompt_tokens_per_second: of all rows together, within that time.
    :param decode_tokens_per_second: of all rows together, from the first new token to the last.
    :param image_seconds: of the vision graph, per image; None without one.
    :param peak_memory_bytes: most resident memory of this process so far, Python and libraries included.
    :param sizes: bytes of each file under ``onnx/``.
    """

    modality: str
    prompt_tokens: int
    new_tokens: int
    batch: int
    repeats: int
    threads: int | None
    spinning: bool
    providers: tuple[str, ...]
    onnxruntime: str
    load_seconds: float
    first_token_seconds: float
    prompt_tokens_per_second: float
    decode_tokens_per_second: float
    image_seconds: float | None
    peak_memory_bytes: int
    folder_bytes: int
    sizes: dict[str, int]


def bench(
    folder: Path,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 128,
    batch: int = 1,
    repeats: int = 5,
    threads: int | None = None,
    spinning: bool = True,
    providers: Sequence[Provider] | None = None,
    modality: str | None = None,
) -> Speed:
    """Measure the folder with random prompts; one round before those that count warms up.

    :param spinning: whether threads keep their core busy while they wait.
    :param modality: whose decoder runs, where there are two; by default that of text.
    :raises ModelError: the folder cannot be run.
    :raises RunError: a number is out of range, prompt and answer are longer than the model can read, or the folder has
        no such modality.
    """
    manifest = Manifest.read(folder)
    chosen = modality or ("text" if "text" in manifest.decoders else "all")
    _check(manifest, chosen, prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch, repeats=repeats)
    started = time.perf_counter()
    model = ExportedModel(manifest, Opener(providers, threads, spinning), batch)
    row = _random_row(model, IMAGE if chosen == "image" else TEXT, prompt_tokens)
    decoder = model.decoder_of(row)
    if decoder.takes_embeddings:
        model.embed(np.array([row.input_ids]))
    loaded = time.perf_counter() - started
    rounds = [_round(model, [row] * batch, new_tokens) for _ in range(repeats + 1)][1:]
    first = statistics.median(first for first, _ in rounds)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    image_seconds = _image_seconds(model, repeats) if manifest.vision else None
    return Speed(
        modality=chosen,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch=batch,
        repeats=repeats,
        threads=threads,
        spinning=spinning,
        providers=tuple(decoder.session.get_providers()),
        onnxruntime=str(decoder.runtime.__version__),
        load_seconds=loaded,
        first_token_seconds=first,
        prompt_tokens_per_second=batch * prompt_tokens / first,
        decode_tokens_per_second=statistics.median(batch * (new_tokens - 1) / rest for _, rest in rounds),
        image_seconds=image_seconds,
        peak_memory_bytes=peak_memory(),
        folder_bytes=sum(path.stat().st_size for path in files),
        sizes={path.relative_to(folder).as_posix(): path.stat().st_size for path in files if path.parent != folder},
    )


def peak_memory() -> int:
    """Return the most resident memory that this process has had, in bytes."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes, Linux in KiB


def _check(manifest: Manifest, modality: str, **numbers: int) -> None:
    least = {"new_tokens": 2}  # the first is not decoded from the cache
    faults = [f"{name} must be at least {least.get(name, 1)}" for name, n in numbers.items() if n < least.get(name, 1)]
    if modality not in manifest.decoders:
        faults.append(f"there is no decoder for {modality!r}, only for {', '.join(manifest.decoders)}")
    needed = numbers["prompt_tokens"] + numbers["new_tokens"]
    if manifest.context_length is not None and needed > manifest.context_length:
        faults.append(f"prompt and answer have {needed} tokens, the model reads at most {manifest.context_length}")
    if faults:
        raise RunError(f"{manifest.folder} cannot be measured so: {'; '.join(faults)}")


def _random_row(model: ExportedModel, condition: int, length: int) -> TokenizedRecord:
    """Return a prompt of random ordinary ids; what they are does not change the time."""
    special = set(model.tokenizer.added_tokens_decoder)
    known = np.array([id for id in range(model.tokenizer.backend_tokenizer.get_vocab_size()) if id not in special])
    ids = np.random.default_rng(0).choice(known, length).tolist()
    return TokenizedRecord("bench", ids, [IGNORED] * length, [], (), condition, 0)


def _round(model: ExportedModel, rows: Sequence[TokenizedRecord], new_tokens: int) -> tuple[float, float]:
    """Return the seconds to the first new token, and from there to the last."""
    started = time.perf_counter()
    steps = model.steps(rows, new_tokens)
    next(steps)
    first = time.perf_counter()
    for _ in steps:
        pass
    return first - started, time.perf_counter() - first


def _image_seconds(model: ExportedModel, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        model.see(np.zeros(_pixel_shape(model.images), np.float32))
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def _pixel_shape(images: ImageProcessor | None) -> tuple[int, int, int, int]:
    assert images is not None  # a folder with a vision graph says how images are prepared
    return 1, 3, images.height, images.width

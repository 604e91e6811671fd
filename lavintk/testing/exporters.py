"""What :func:`lavintk.testing.check_exporter` asks."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lavintk.contracts import Exporter, SizedExporter
from lavintk.data.batch import IGNORED, TEXT, Batch
from lavintk.errors import LavintkError
from lavintk.merge import load_on_cpu
from lavintk.models.build import build_outline
from lavintk.plugins import installed_plugins
from lavintk.run import MODEL, Run
from lavintk.runtime import is_export
from lavintk.testing.outcome import Report
from lavintk.testing.promises import Promises, class_name

EXPORT = "Exporter.export"
TOKENS = (17, 101, 42, 7, 256, 33, 5, 88, 140, 61)
"""A row that is given to both models."""
RECORDS, ANSWER = 4, 8
"""Records that a folder of lavintk's own runtime is compared on, and how many tokens it answers."""
SMALL = 1 << 20
"""Files up to so many bytes are searched for the name of the folder."""

ReadLogits = Callable[[Path, Sequence[int]], Any]


def check(
    make: Callable[[], Exporter], run: Run | None, vision: bool, logits: ReadLogits | None, tolerance: float
) -> Report:
    """See :func:`lavintk.testing.check_exporter`."""
    promises = Promises(class_name(make()))
    with TemporaryDirectory(prefix="lavintk-testing-") as name:
        place = Path(name)
        run = run or _trained(place / "trained", vision)
        folder = _written(promises, make, run, place / "exports")
        _unfit(promises, make, run, place)
        _loaded(promises, run, folder, logits, tolerance)
    return promises.report()


def _trained(place: Path, vision: bool) -> Run:
    """Return a run of a few steps on tiny models."""
    from lavintk.testing.runs import multimodal, recipe, write_everything
    from lavintk.training import train

    files = write_everything(place / "files")
    return train((multimodal if vision else recipe)(files, max_steps=3), place / "run")


def _written(promises: Promises, make: Callable[[], Exporter], run: Run, place: Path) -> Path:
    """Export as ``lavintk export`` does, and return the folder under its final name."""
    place.mkdir()
    partial = Path(mkdtemp(prefix=".out-", dir=place))
    before = _contents(run.folder)
    with promises.keep(EXPORT, "writes the run into the folder, and nothing outside of it") as promise:
        make().export(Run.open(run.folder), partial)
        promise.require(partial.is_dir(), "the folder is gone")
        promise.require(any(path.is_file() for path in partial.rglob("*")), "there are no files in it")
        beside = sorted(path.name for path in place.iterdir() if path != partial)
        promise.require(not beside, f"it also wrote {', '.join(beside)} beside the folder")
        after = _contents(run.folder)
        changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
        promise.require(not changed, f"in the run's own folder {', '.join(changed[:3])} changed")
    _sized(promises, make(), run, partial)
    with promises.keep(
        EXPORT, "writes a folder that can be moved: it takes its final name when it is complete"
    ) as promise:
        for path in sorted(partial.rglob("*")):
            promise.require(not path.is_symlink(), f"{path.relative_to(partial)} is a link")
            if path.is_file() and path.stat().st_size <= SMALL:
                named = partial.name.encode() in path.read_bytes()
                promise.require(not named, f"{path.relative_to(partial)} names the folder it was written in")
        folder = place / "out"
        partial.rename(folder)
    return folder


def _sized(promises: Promises, exporter: Exporter, run: Run, folder: Path) -> None:
    if not isinstance(exporter, SizedExporter):
        return
    with promises.keep("SizedExporter.bytes_needed", "is not more than the folder takes") as promise:
        outline, _ = build_outline(run.recipe, installed_plugins())
        needed = exporter.bytes_needed(Run.open(run.folder), outline)
        taken = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        promise.require(0 < needed <= taken, f"it says {needed:,}, the folder has {taken:,} bytes")


def _unfit(promises: Promises, make: Callable[[], Exporter], run: Run, place: Path) -> None:
    """Export a run that has lost its weights."""
    broken = place / "broken"
    shutil.copytree(run.folder, broken)
    shutil.rmtree(broken / MODEL)
    out = place / "unfit"
    out.mkdir()
    with promises.keep(EXPORT, "raises a LavintkError for a run that it cannot express"):
        try:
            make().export(Run.open(broken), out)
        except LavintkError:
            return
        # what needs no trained weights may go on without them


def _loaded(promises: Promises, run: Run, folder: Path, logits: ReadLogits | None, tolerance: float) -> None:
    if logits is None and is_export(folder):
        _behaves(promises, run, folder)
        return
    if logits is None and (folder / "config.json").is_file() and list(folder.glob("*.safetensors")):
        logits = _transformers_logits
    if logits is None:
        promises.skip(EXPORT, "whether the folder loads and computes the same: give logits= to ask for it")
        return
    text = "writes what loads, and gives the run's logits"
    with promises.keep(EXPORT, text) as promise:
        expected = _own_logits(run)
        found = torch.from_numpy(np.array(logits(folder, TOKENS), dtype=np.float64))
        promise.require(
            found.shape == expected.shape, f"logits of shape {list(found.shape)}, the run's {list(expected.shape)}"
        )
        promise.require_close(found, expected, tolerance, "logits of a text row")


def _behaves(promises: Promises, run: Run, folder: Path) -> None:
    from lavintk.verify import verify

    with promises.keep(EXPORT, "writes what lavintk's own runtime loads, and behaves like the run") as promise:
        trained = Run.open(run.folder)
        load_on_cpu(trained)
        faults = verify(trained, folder, records=RECORDS, tokens=ANSWER).faults()
        promise.require(not faults, "; ".join(faults))


def _transformers_logits(folder: Path, tokens: Sequence[int]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    settings: Any = AutoConfig
    seeing = hasattr(settings.from_pretrained(folder), "vision_config")
    make: Any = AutoModelForImageTextToText if seeing else AutoModelForCausalLM
    model, report = make.from_pretrained(folder, output_loading_info=True)
    lost = [*report["missing_keys"], *report["unexpected_keys"]]
    if lost:
        raise LavintkError(f"transformers misses or does not know {', '.join(sorted(lost)[:3])}")
    with torch.no_grad():
        return model.eval()(torch.tensor([list(tokens)])).logits[0].float().numpy()


@torch.no_grad()
def _own_logits(run: Run) -> Tensor:
    """Return the trained model's logits ``[T, vocabulary]`` of :data:`TOKENS`, a text row."""
    trained = Run.open(run.folder)
    model, tokens = load_on_cpu(trained).model, torch.tensor(TOKENS)
    batch = Batch(
        tokens, torch.full_like(tokens, IGNORED), torch.arange(len(tokens)), (len(tokens),), torch.tensor([TEXT]),
        None, torch.zeros(0, dtype=torch.int64), ("row",),
    ).to(model.device)  # fmt: skip
    return model.logits(model.hidden(batch)).double().cpu()


def _contents(folder: Path) -> dict[str, str]:
    """Return the hashes of a folder's files by name."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }

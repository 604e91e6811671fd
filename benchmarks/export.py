"""How long exporting a large model takes, and how much host memory.

    python benchmarks/export.py --geometry 7b --folder checkpoint-7b --quant int4
    python benchmarks/export.py --geometry 7b --folder checkpoint-7b --quant int4 --device cuda
    python benchmarks/export.py --geometry 7b --folder checkpoint-7b --quant int4 --cold
    python benchmarks/export.py --geometry tiny --folder checkpoint-tiny     (for trying the command)

A random 16-bit checkpoint of the geometry is written first unless the folder holds one. The run that is exported has a
LoRA adapter with random values on all linear layers; no training takes place, and the folder is not compared with it.
The run has its base kept as a training keeps it, in a cache folder of this benchmark, and the export finds it there.
With ``--cold`` none is kept: the export reads all weights and quantizes them again. The page cache is asked to forget
the files that the export reads, so that the disk is measured too.

Each phase prints its seconds when it ends, indented those that are part of a longer one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

import psutil
import torch
from geometries import LANGUAGE
from load import AnonymousPeak, forget_cached, write_checkpoint
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from lavintk.checkpoints import save_model
from lavintk.export import export_run
from lavintk.layers import FrozenLinear
from lavintk.models.base_cache import gigabytes, kept_bases, make_base
from lavintk.models.build import build
from lavintk.models.language import StreamedLinear
from lavintk.models.quantized_base import QuantizedBase
from lavintk.plugins import installed_plugins
from lavintk.recipe import Recipe, make_recipe
from lavintk.registry import Choice
from lavintk.run import Run

PRECISION = torch.bfloat16
"""Compute type of the training."""
HEARTBEAT = 30.0
"""Seconds between the lines that say how far an export is."""


@contextmanager
def phase(what: str) -> Iterator[None]:
    """Print what was done and its seconds when it is done."""
    started = time.perf_counter()
    yield
    report(time.perf_counter() - started, what)


def report(seconds: float, what: str) -> None:
    """Print a line of a phase."""
    print(f"{seconds:8.1f} s  {what}", flush=True)


class TimedRun(Run):
    """A run that says how long loading it took, and where its layers come from.

    :ivar loading: seconds in :meth:`load`. :ivar layers: seconds in which streamed layers were made since.
    :ivar kept: whether a kept base was found.
    """

    loading, layers, kept = 0.0, 0.0, False

    def load(self, device: str | None = None, *, stream: bool = False) -> Run:
        """Load as a run does."""
        started = time.perf_counter()
        with patch.object(QuantizedBase, "fill", autospec=True, side_effect=QuantizedBase.fill) as filled:
            super().load(device, stream=stream)
        self.loading, self.kept, self.layers = time.perf_counter() - started, filled.called, 0.0
        report(self.loading, "  loading the run, without its linear layers")
        return self

    @contextmanager
    def layers_timed(self) -> Iterator[None]:
        """Add up the time that is spent on making streamed layers."""
        make = StreamedLinear.layer

        def layer(streamed: StreamedLinear) -> FrozenLinear:
            started = time.perf_counter()
            made = make(streamed)
            self.layers += time.perf_counter() - started
            return made

        with patch.object(StreamedLinear, "layer", layer):
            yield


class Heartbeat(threading.Thread):
    """Says now and then how much an export has written."""

    def __init__(self, out: Path) -> None:
        super().__init__(daemon=True)
        self._out, self._stopped = out, threading.Event()

    def run(self) -> None:
        """Print a line every :data:`HEARTBEAT` seconds."""
        started = time.perf_counter()
        while not self._stopped.wait(HEARTBEAT):
            seconds = time.perf_counter() - started
            with suppress(OSError):  # a file just got its final name
                written = sum(folder_bytes(folder) for folder in self._out.parent.glob(f".{self._out.name}-*"))
                print(f"  ... exporting for {seconds:.0f} s: {gigabytes(written)} written", flush=True)

    def stop(self) -> None:
        """End it."""
        self._stopped.set()
        self.join()


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files in ``folder``."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of a few words: an export needs one, its size does not matter here."""
    words = {word: place for place, word in enumerate(("<s>", "</s>", "<unk>", "word"))}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def keep_base(recipe: Recipe, device: torch.device) -> None:
    """Quantize the base of ``recipe`` on ``device`` and keep it where loading finds it."""
    made = make_base(
        recipe.model.language, installed_plugins(), recipe.quant, recipe.embed_quant, device=device, dtype=PRECISION
    )
    report(made.seconds, f"making the run: quantizing the base and keeping it, {gigabytes(made.kept.nbytes)}")


def make_run(checkpoint: Path, quant: str, folder: Path, device: torch.device, cold: bool) -> TimedRun:
    """Return a run with a random adapter over ``checkpoint``.

    :param device: where it would have been trained.
    :param cold: its base is not kept.
    """
    recipe = make_recipe(
        {
            "name": "export",
            "model": {"language": str(checkpoint), "cache": not cold},
            "quant": quant,
            "adapter": "lora",
            "data": {"train": "alpaca:none.json", "template": "plain"},
        }
    )
    if not cold:
        keep_base(recipe, device)
    with phase("making the run: attaching a random adapter and writing it"):
        assembly = build(recipe, installed_plugins(), torch.device("cpu"), PRECISION, stream=True)
        assert assembly.model.adapter is not None
        for _, parameter in assembly.model.adapter.named_parameters():
            torch.nn.init.normal_(parameter, std=0.01)
        run = TimedRun.create(folder, recipe)
        save_model(folder, assembly.model, assembly.base["language"]["source"])
        run.record(
            status="finished", device_type=device.type, precision=str(PRECISION).removeprefix("torch."),
            base=assembly.base,
        )  # fmt: skip
    assert isinstance(run, TimedRun)
    return run


def measure(run: TimedRun, choice: Choice, out: Path) -> str:
    """Export ``run`` into ``out``, print the phases and return the figures."""
    sampler, heartbeat = AnonymousPeak(), Heartbeat(out)
    sampler.start()
    heartbeat.start()
    started = time.perf_counter()
    with run.layers_timed():
        export_run(run, choice, out, verify=False)
    seconds, peak = time.perf_counter() - started, sampler.stop()
    heartbeat.stop()
    report(run.layers, f"  {'reading layers of the kept base' if run.kept else 'reading and quantizing layers'}")
    report(seconds - run.loading - run.layers, "  the rest: merging, encoding and writing")
    report(seconds, "export in all")
    return (
        f"{seconds:.0f} s, {folder_bytes(out) / 1e9:.2f} GB, "
        f"host peak {peak / 1e9:.2f} GB (without mapped files); {os.cpu_count()} cores, "
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB, torch {torch.__version__}"
    )


def main() -> None:
    """Export once and print time, size and peak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=LANGUAGE, default="7b")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--quant", default="int4", help="grid that the base is trained on")
    parser.add_argument("--export", default="onnx", help="format with options")
    parser.add_argument("--device", default="cpu", help="where the run was trained; the export takes place on the CPU")
    parser.add_argument("--cold", action="store_true", help="no base is kept: all is read and quantized again")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    made, out, cache = folder / "run", folder / "exported", folder / "cache"
    for old in (made, out, cache):
        shutil.rmtree(old, ignore_errors=True)
    os.environ["LAVINTK_CACHE"] = str(cache.absolute())
    if not (folder / "config.json").exists():
        with phase("writing a random checkpoint"):
            write_checkpoint(arguments.geometry, folder)
    write_tokenizer(folder)
    run = make_run(folder, arguments.quant, made, torch.device(arguments.device), arguments.cold)
    for read in (folder, *(kept.folder for kept in kept_bases())):
        forget_cached(read)
    figures = measure(run, Choice.parse(arguments.export), out)
    case = "the base that the training kept was found" if run.kept else "no base was kept: quantized again"
    print(f"{arguments.geometry}, trained on {arguments.quant}, as {arguments.export}, {case}: {figures}")
    for old in (made, out, cache):
        shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    main()

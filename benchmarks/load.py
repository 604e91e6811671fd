"""How fast a checkpoint is loaded and quantized, beside the speed of the disk it lies on.

    python benchmarks/load.py --geometry 7b --folder checkpoint-7b     (a random checkpoint is written first)
    python benchmarks/load.py --geometry 7b --folder checkpoint-7b --readers 2,4,8
    python benchmarks/load.py --model smollm2-135m-instruct

With ``--geometry``, the files are read plainly before and after all loads, because the speed of a disk drifts; for
each number of reading threads the checkpoint is loaded once from disk (cold) and once from the page cache (warm).
Peaks are those of the process (resident memory without the page cache's share is not visible to it: mapped file pages
count while they are mapped) and of the device.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from pathlib import Path

import psutil
import torch
from geometries import LANGUAGE, RandomSource
from safetensors.torch import save_file

from lavintk.devices import describe, pick_device, pick_precision
from lavintk.models.catalog import locate
from lavintk.models.language import load_language_model, outline_language_model
from lavintk.models.sources import open_source
from lavintk.models.staging import CUDA_READERS, READERS
from lavintk.plugins import installed_plugins
from lavintk.registry import Choice

SHARD_BYTES = 2 << 30


def write_checkpoint(geometry: str, folder: Path) -> None:
    """Write a random 16-bit checkpoint in shards of about 2 GiB."""
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = RandomSource(LANGUAGE[geometry], device)
    shard: dict[str, torch.Tensor] = {}
    index: dict[str, str] = {}
    held, number = 0, 0

    def flush() -> None:
        nonlocal shard, held, number
        name = f"model-{number:05d}.safetensors"
        save_file(shard, folder / name)
        index.update(dict.fromkeys(shard, name))
        shard, held, number = {}, 0, number + 1

    for name in source.names():
        shard[name] = source.read(name).cpu()
        held += source.tensor_nbytes(name)
        if held > SHARD_BYTES:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    LANGUAGE[geometry].architectures = ["LlamaForCausalLM"]
    LANGUAGE[geometry].save_pretrained(folder)


def forget_cached(folder: Path) -> None:
    """Ask the kernel to drop the files from the page cache, so that the disk is measured."""
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_plainly(folder: Path, when: str) -> None:
    """Read the files once from disk, sequentially, and print the speed."""
    forget_cached(folder)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    started = time.perf_counter()
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(16 << 20):
                pass
    seconds = time.perf_counter() - started
    print(f"plain read {when}: {size / 1e9:.2f} GB in {seconds:.1f} s, {size / seconds / 1e9:.2f} GB/s", flush=True)


class AnonymousPeak(threading.Thread):
    """Samples the process's memory that is not a mapped file."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self._running = 0, True

    def run(self) -> None:
        """Sample every 20 ms."""
        process = psutil.Process()
        while self._running:
            info = process.memory_info()
            self.peak = max(self.peak, info.rss - getattr(info, "shared", 0))
            time.sleep(0.02)

    def stop(self) -> int:
        """Return the peak in bytes."""
        self._running = False
        self.join()
        return self.peak


def measure(reference: str, quant: str, readers: int, state: str) -> None:
    """Load once and print time, speed and peaks.

    :param state: of the page cache, for the line that is printed.
    """
    device = pick_device("auto")
    source = open_source(locate(reference))
    quantizer, dtype = installed_plugins().quantizers.create(Choice.parse(quant)), pick_precision("auto", device)
    # libraries are imported and kernels loaded before the clock runs
    outline_language_model(source)
    quantizer.quantize(torch.zeros(256, 256, device=device, dtype=dtype), None)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.reset_peak_host_memory_stats()
    sampler = AnonymousPeak()
    sampler.start()
    started = time.perf_counter()
    model = load_language_model(source, quantizer, device=device, dtype=dtype, readers=readers)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds, peak = time.perf_counter() - started, sampler.stop()
    line = (
        f"load {state}, {readers} readers, {reference} as {quant} on {describe(device)}: "
        f"{seconds:.1f} s, {source.nbytes() / seconds / 1e9:.2f} GB/s "
        f"of stored weights, host peak {peak / 1e9:.2f} GB (without mapped files)"
    )
    if device.type == "cuda":
        final, top = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        pinned = torch.cuda.host_memory_stats()["allocated_bytes.peak"]
        line += f", pinned peak {pinned / 1e9:.2f} GB, device peak {top / 2**30:.2f} GiB, final {final / 2**30:.2f} GiB"
    print(line, flush=True)
    del model


def reader_counts(text: str) -> list[int]:
    """Return the numbers in ``N,N,...``."""
    counts = [int(part) for part in text.split(",")]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError("at least one thread must read")
    return counts


def main() -> None:
    """Write a checkpoint if asked, then load it cold and warm with each number of readers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=LANGUAGE)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--quant", default="nf4")
    parser.add_argument("--readers", type=reader_counts, help="numbers of reading threads, N,N,...")
    arguments = parser.parse_args()
    readers: list[int] = arguments.readers or [CUDA_READERS if pick_device("auto").type == "cuda" else READERS]
    if not arguments.geometry:
        for count in readers:
            measure(arguments.model or "smollm2-135m-instruct", arguments.quant, count, "as it comes")
        return
    if not (arguments.folder / "config.json").exists():
        write_checkpoint(arguments.geometry, arguments.folder)
    read_plainly(arguments.folder, "before")
    for count in readers:
        forget_cached(arguments.folder)
        measure(str(arguments.folder), arguments.quant, count, "cold")
        measure(str(arguments.folder), arguments.quant, count, "warm")
    read_plainly(arguments.folder, "after")


if __name__ == "__main__":
    main()

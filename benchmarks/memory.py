"""Peak device memory of training steps on LLaMA and CLIP geometries with random weights.

    python benchmarks/memory.py --geometry 7b --geometry 13b --quant nf4 --adapter mma:visual=router

Each row is a run of a whole optimizer step (forward, backward, optimizer) with one image and ``--length`` tokens.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path

import bitsandbytes
import torch
import transformers
from geometries import CLIP_LARGE, LANGUAGE, RandomSource

import lavintk
from lavintk.data.batch import IMAGE, Batch
from lavintk.devices import describe
from lavintk.engine import choose_engine
from lavintk.models.connector import TapNeck
from lavintk.models.language import load_language_model, load_vision_model
from lavintk.models.multimodal import MultimodalModel, count_parameters
from lavintk.models.vision import VisionTower
from lavintk.plugins import installed_plugins
from lavintk.registry import Choice
from lavintk.schedule import build_optimizer

PUBLISHED = {"7b": "8-9 GB", "13b": "13-14 GB", "65b": "40 GB hoped for"}
"""Memory that LaVIN-lite's authors report, in 10^9 bytes."""


def make_model(geometry: str, quant: str, adapter: str, device: torch.device) -> MultimodalModel:
    """Return a model with random weights, quantized tensor by tensor."""
    plugins = installed_plugins()
    quantizer = plugins.quantizers.create(Choice.parse(quant))
    source = RandomSource(LANGUAGE[geometry], device)
    language = load_language_model(source, quantizer, device=device, dtype=torch.bfloat16)
    clip = load_vision_model(RandomSource(CLIP_LARGE, device), device=device, dtype=torch.bfloat16)
    neck = TapNeck(1024, 128, language.config.hidden_size).to(device)
    model = MultimodalModel(language, VisionTower(clip, 4), neck)
    model.attach(plugins.adapters.create(Choice.parse(adapter)))
    model.checkpointing = True
    return model.train()


def make_batch(length: int, rows: int) -> Batch:
    """Return ``rows`` rows of ``length`` tokens, each with an image, half of the tokens trained."""
    ids = torch.randint(3, 32000, (rows * length,))
    labels = ids.roll(-1)
    labels.view(rows, length)[:, : length // 2] = -100
    slots = torch.cat([torch.arange(4, 10) + row * length for row in range(rows)])
    return Batch(
        ids, labels, torch.arange(length).repeat(rows), (length,) * rows, torch.full((rows,), IMAGE),
        torch.randn(rows, 3, 224, 224), slots, tuple(map(str, range(rows))),
    )  # fmt: skip


def measure(geometry: str, arguments: argparse.Namespace) -> dict[str, object]:
    """Run a few steps and return memory in GiB and the median step time in ms."""
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    model = make_model(geometry, arguments.quant, arguments.adapter, device)
    torch.cuda.synchronize()
    load_seconds, load_peak = time.perf_counter() - started, torch.cuda.max_memory_allocated()
    resident = torch.cuda.memory_allocated()
    chosen = installed_plugins().optimizers.create(Choice.parse(arguments.optim))
    optimizer = build_optimizer(chosen, model.trainable(), lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.02)
    batch = make_batch(arguments.length, arguments.rows)
    engine, _ = choose_engine(arguments.engine, model, torch.amp.GradScaler(enabled=False), batch.tokens)
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(arguments.steps):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        optimizer.zero_grad(set_to_none=False)
        engine.backward([batch], batch.labelled, 0)
        optimizer.step()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begun))
    free, total = torch.cuda.mem_get_info()
    gib = 2**30
    return {
        "geometry": geometry, "trainable_m": round(count_parameters(model.trainable()) / 1e6, 2),
        "load_s": round(load_seconds, 1), "load_peak_gib": round(load_peak / gib, 2),
        "resident_gib": round(resident / gib, 2),
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / gib, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / gib, 2),
        "device_gib": round((total - free) / gib, 2), "step_ms": round(sorted(times)[len(times) // 2], 1),
        "published": PUBLISHED.get(geometry, ""),
    }  # fmt: skip


def main() -> None:
    """Measure each geometry and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", action="append", choices=LANGUAGE, default=None)
    parser.add_argument("--quant", default="nf4")
    parser.add_argument("--adapter", default="mma:visual=router")
    parser.add_argument("--optim", default="paged")
    parser.add_argument("--engine", choices=("auto", "eager", "graph"), default="auto")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    packages = (lavintk, torch, transformers, bitsandbytes)
    versions = ", ".join(f"{package.__name__} {package.__version__}" for package in packages)
    print(f"{describe(torch.device('cuda'))}; {versions}")
    print(f"{arguments.quant}, {arguments.adapter}, {arguments.optim}, {arguments.rows} x {arguments.length} tokens")
    results = []
    for geometry in arguments.geometry or ["7b", "13b"]:
        results.append(measure(geometry, arguments))
        print("  ".join(f"{name} {value}" for name, value in results[-1].items() if value != ""), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

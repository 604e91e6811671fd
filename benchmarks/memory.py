"""Peak memory of optimizer steps beside what the plan foretells, on geometries with random weights.

    python benchmarks/memory.py --case 7b:lora --case 7b:mma --case 13b:lora --json memory.json --plot memory.png
    python benchmarks/memory.py --case 65b:lora:stream=cpu,accumulate=32 --embed-quant nf4 --cap 8GB
    python benchmarks/memory.py --case 13b:mma:fit=8GB --case 65b:lora:fit=6GB,accumulate=32
    python benchmarks/memory.py --case tiny:lora --device cpu
    python benchmarks/memory.py --from memory.json --plot memory.png

A case is GEOMETRY:ADAPTER, and behind another colon changes of the recipe: its keys (``train.`` may be left out), and
``rows`` and ``length`` of a micro-batch. Each case is whole optimizer steps of ``accumulate`` micro-batches, forward,
backward and optimizer, in a process of its own; random weights are made on the device and quantized tensor by tensor.
LoRA has r=16 on all seven linear layers and paged 8-bit AdamW, LaVIN (``mma``) its adapters, CLIP ViT-L/14, an image in
each row and paged AdamW.

Allocated and reserved are torch's peaks in the steps, device is what is in use at the end, context included, and host
is the process's resident memory, pinned memory included. ``--cap 8GB`` shows that a case fits into a card of that size:
the allocator gets what the context leaves of it, and nothing more. ``fit=8GB`` in a case is the same after the changes
that ``lavintk train --fit 8GB`` makes. On a CPU only resident memory is measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import facts
import yaml
from charts import can_draw, memory_bars
from ours import (
    ADAPTERS,
    GEOMETRIES,
    GIB,
    clean,
    finish,
    host_memory,
    lavintk_step,
    make_optimizer,
    make_recipe_of,
    memory,
    outline_of,
    random_batch,
    random_model,
)
from processes import messages, reason, tell

if TYPE_CHECKING:
    import torch

    from lavintk.plan import Plan
    from lavintk.recipe import Recipe

PACKAGES = ("lavintk", "torch", "triton", "transformers", "bitsandbytes")
OPTIMIZERS = {"lora": "paged-8bit", "mma": "paged"}
MAIN_KEYS = ("quant", "embed_quant", "vision_quant", "optim", "adapter")
"""Keys of a recipe that are not in its section ``train``."""
PUBLISHED = {
    "7b:mma": "LaVIN-lite 8-9 GB", "13b:mma": "LaVIN-lite 13-14 GB", "65b:lora": "QLoRA 48 GB",
    "65b:mma": "LaVIN-lite hoped for 40 GB", "llama-3.1-8b:lora": "Unsloth's page 6 GB",
}  # fmt: skip
"""What others report, in 10^9 bytes."""

Result = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What one process measures.

    :param changes: of the recipe. :param rows: of a micro-batch, with :param length: tokens each.
    :param cap: bytes of device memory that may be used in all; 0 for no limit.
    :param fit: change the recipe so that it keeps to the cap.
    """

    text: str
    geometry: str
    adapter: str
    changes: dict[str, Any] = field(default_factory=dict)
    rows: int = 1
    length: int = 512
    steps: int = 3
    cap: int = 0
    device: str = "cuda"
    fit: bool = False

    def recipe(self) -> tuple[Recipe, dict[str, Any]]:
        """Return the recipe that the case stands for, and what was changed to make it fit.

        :raises RecipeError: a setting is wrong, or nothing makes it fit.
        """
        from lavintk.fitting import fit
        from lavintk.plugins import installed_plugins

        plugins = installed_plugins()
        changes = {
            "quant": "nf4", "optim": OPTIMIZERS[self.adapter], **self.changes,
            "train.batch_size": self.rows, "data.max_length": self.length,
        }  # fmt: skip
        recipe = make_recipe_of(self.geometry, self.adapter, changes)
        if not self.fit:
            return recipe, {}
        found = fit(recipe, plugins, self.cap, model=outline_of(recipe, plugins))
        return found.recipe, found.changes


def parse_case(text: str, options: argparse.Namespace) -> Case:
    """Read ``GEOMETRY:ADAPTER[:KEY=VALUE,...]``; what it does not say comes from the options.

    :raises ValueError: it is no case.
    """
    from lavintk.fitting import parse_size

    geometry, adapter, *rest = text.split(":", 2)
    if geometry not in GEOMETRIES or adapter not in ADAPTERS:
        raise ValueError(f"{text!r}: geometries are {', '.join(GEOMETRIES)}; adapters are {', '.join(ADAPTERS)}")
    given = {"rows": options.rows, "length": options.length, "accumulate": options.accumulate}
    given |= {"embed_quant": options.embed_quant, "quant": options.quant, "cap": options.cap, "fit": ""}
    for pair in filter(None, "".join(rest).split(",")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{text!r}: {pair!r} is not KEY=VALUE")
        given[key] = yaml.safe_load(value)
    rows, length = int(given.pop("rows")), int(given.pop("length"))
    cap, fit = (parse_size(given[key], key) if given.get(key) else 0 for key in ("cap", "fit"))
    del given["cap"], given["fit"]
    changes = {key if key in MAIN_KEYS or "." in key else f"train.{key}": value for key, value in given.items()}
    return Case(
        text, geometry, adapter, changes, rows, length, options.steps, fit or cap, options.device, fit=bool(fit)
    )


# -- a case, in a process of its own -----------------------------------------------------------------------------------


def work(case: Case) -> None:
    """Measure and tell what came out."""
    import torch

    from lavintk.devices import grow_segments
    from lavintk.errors import LavintkError, OutOfMemoryError
    from lavintk.plan import plan_of
    from lavintk.plugins import installed_plugins

    grow_segments()
    (recipe, changes), plugins = case.recipe(), installed_plugins()
    foretold = plan_of(outline_of(recipe, plugins), recipe, plugins)
    predicted = prediction(foretold) | {"changes": changes}
    try:
        tell({**measure(case, recipe, torch.device(case.device)), **predicted})
    except (torch.OutOfMemoryError, OutOfMemoryError) as error:
        tell({"error": f"out of memory: {reason(error)}", **predicted})
    except LavintkError as error:  # an engine that refuses, for example
        tell({"error": reason(error), **predicted})


def prediction(foretold: Plan) -> Result:
    """Return what the plan says, in GiB."""

    def gib(sizes: dict[str, int]) -> dict[str, float]:
        return {name: round(size / GIB, 3) for name, size in sizes.items()}

    return {
        "engine": foretold.engine, "items": gib(dict(foretold.items)), "host_items": gib(dict(foretold.host)),
        "predicted_allocated_gib": round(foretold.allocated / GIB, 2),
        "predicted_device_gib": round(foretold.device / GIB, 2), "predicted_host_gib": round(foretold.on_host / GIB, 2),
    }  # fmt: skip


def measure(case: Case, recipe: Recipe, device: torch.device) -> Result:
    """Load, take the steps, and return times and peaks."""
    import torch

    from lavintk.models.multimodal import count_parameters
    from lavintk.plugins import installed_plugins

    torch.manual_seed(0)
    context = set_cap(case.cap, device)
    begun = time.perf_counter()
    model = random_model(recipe, installed_plugins(), device, torch.bfloat16)
    finish(device)
    loading, loaded = time.perf_counter() - begun, memory(device)["allocated_gib"]
    optimizer = make_optimizer(recipe, installed_plugins(), model)
    step = lavintk_step(model, optimizer, recipe.train.engine, case.rows * case.length)
    clean(device)
    resident = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    window = [random_batch(model, case.rows, case.length) for _ in range(recipe.train.accumulate)]
    times = []
    for _ in range(1 + case.steps):
        begun = time.perf_counter()
        loss = step(*window)
        finish(device)
        times.append(time.perf_counter() - begun)
    return {
        "trainable_m": round(count_parameters(model.trainable()) / 1e6, 2), "context_gib": round(context / GIB, 2),
        "load_s": round(loading, 1), "load_peak_gib": loaded, "resident_gib": round(resident / GIB, 2),
        "first_step_s": round(times[0], 2), "ms": round(1e3 * statistics.median(times[1:]) / len(window), 1),
        "loss": round(float(loss), 4), **memory(device), "host_gib": host_memory(),
    }  # fmt: skip


def set_cap(cap: int, device: torch.device) -> int:
    """Let torch allocate no more than what the CUDA context leaves of ``cap`` bytes; return the context's bytes.

    The context grows while kernels are loaded, so what the plan counts for it is held back if that is more.
    """
    import torch

    from lavintk.plan import CONTEXT

    if device.type != "cuda":
        return 0
    before = facts.memory_in_use() * GIB
    square = torch.ones(64, 64, dtype=torch.bfloat16, device=device)
    (square @ square).sum().item()  # loads the library of matrix products
    free, total = torch.cuda.mem_get_info(device)
    context = max(0, round(total - free - before - torch.cuda.memory_reserved(device)))
    if cap:
        torch.cuda.set_per_process_memory_fraction((cap - max(context, CONTEXT)) / total, device.index or 0)
    return context


# -- the command -------------------------------------------------------------------------------------------------------

COLUMNS: dict[str, tuple[str, str]] = {
    "predicted_allocated_gib": ("foretold GiB", ".2f"), "allocated_gib": ("allocated GiB", ".2f"),
    "error_percent": ("error %", "+.1f"), "reserved_gib": ("reserved GiB", ".2f"),
    "predicted_device_gib": ("foretold device", ".2f"), "device_gib": ("device GiB", ".2f"),
    "predicted_host_gib": ("foretold host", ".2f"), "host_gib": ("host GiB", ".2f"), "load_s": ("load s", ".1f"),
    "ms": ("ms/micro-batch", ",.1f"), "published": ("published", "s"),
}  # fmt: skip
"""Heading and format of what the table shows."""


def completed(case: Case, result: Result) -> Result:
    """Return a result with what follows from it."""
    added: Result = {"case": case.text, "cap_gib": round(case.cap / GIB, 2) or None}
    added["published"] = PUBLISHED.get(f"{case.geometry}:{case.adapter}")
    if result.get("allocated_gib") and case.device != "cpu":
        measured = result["allocated_gib"]
        added["error_percent"] = round(100 * (result["predicted_allocated_gib"] - measured) / measured, 1)
        if case.cap:
            added["within_cap"] = result["device_gib"] <= case.cap / GIB
    return {**added, **result}


def run(case: Case, seconds: float) -> Result:
    """Measure a case in a process of its own."""
    found: Result = {}
    for message in messages(__file__, ["--work", json.dumps(asdict(case))], seconds, case.text):
        if "ended" not in message:
            found = message
        elif not found:
            found = {"error": message["ended"]}
    return completed(case, found)


def table(results: Sequence[Result]) -> str:
    """Return the results as aligned text."""
    lines = [["case", *(heading for heading, _ in COLUMNS.values())]]
    for result in results:
        cells = [format(result[k], f) if result.get(k) is not None else "-" for k, (_, f) in COLUMNS.items()]
        lines.append([result["case"] + (f" in {result['cap_gib']:g} GiB" if result.get("cap_gib") else ""), *cells])
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines]
    notes = [f"not measured: {result['case']}: {result['error']}" for result in results if "error" in result]
    notes += [
        f"{result['case']}: {', '.join(f'{key}={value}' for key, value in result['changes'].items())}"
        for result in results
        if result.get("changes")
    ]
    notes += [
        f"{result['case']}: device memory in all {'is within' if result['within_cap'] else 'EXCEEDS'} the cap"
        for result in results
        if "within_cap" in result
    ]
    return "\n".join([*text, *notes])


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    from lavintk.errors import LavintkError

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", metavar="GEOMETRY:ADAPTER[:KEY=VALUE,...]")
    parser.add_argument("--quant", default="nf4")
    parser.add_argument("--embed-quant", default="none")
    parser.add_argument("--rows", type=int, default=1, help="of a micro-batch")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--steps", type=int, default=3, help="steps whose median counts, after the first")
    parser.add_argument("--cap", default="", metavar="8GB", help="device memory that may be used in all")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for each case")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--from", type=Path, dest="source", metavar="FILE.json", help="show what --json wrote before")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "auto":
        import torch

        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        cases = arguments.case or ["7b:lora", "7b:mma", "13b:lora", "13b:mma"]
        arguments.cases = [parse_case(text, arguments) for text in cases]
        for case in arguments.cases:
            case.recipe()
    except (ValueError, LavintkError) as error:
        parser.error(str(error))
    return arguments


def sweep(arguments: argparse.Namespace) -> Result:
    """Measure every case; what is known so far is always in the file."""
    report: Result = {"environment": facts.environment(PACKAGES), "results": []}
    print("\n".join(facts.in_words(report["environment"])), flush=True)
    for case in arguments.cases:
        if (used := facts.memory_in_use()) > 1:
            print(f"note: {used:.1f} GiB of the GPU are in use already; they are in the column of device memory")
        result = run(case, arguments.timeout)
        report["results"].append(result)
        print(table([result]), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def main() -> None:
    """Measure or read results, print the table, draw the chart."""
    if "--work" in sys.argv:
        work(Case(**json.loads(sys.argv[sys.argv.index("--work") + 1])))
        return
    arguments = parse_arguments()
    report = json.loads(arguments.source.read_text(encoding="utf-8")) if arguments.source else sweep(arguments)
    lines = facts.in_words(report["environment"])
    print("", *lines, "", table(report["results"]), sep="\n")
    if arguments.plot and can_draw():
        memory_bars(report["results"], "Peak device memory of training steps", lines, arguments.plot)


if __name__ == "__main__":
    main()

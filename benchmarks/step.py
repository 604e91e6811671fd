"""A whole training step of lavintk beside transformers + PEFT + bitsandbytes and Unsloth, in one run.

    python benchmarks/step.py --geometry 7b --shape 1x512 --shape 4x512 --shape 1x2048 --json step.json --plot step.png
    python benchmarks/step.py --geometry 7b --adapter mma --contenders lavintk:eager,lavintk:graph
    python benchmarks/step.py --geometry 7b --contenders lavintk:graph --sweep 1,2,4,8x256,512,1024,2048
    python benchmarks/step.py --from step.json --plot step.png

Everyone has the same LLaMA geometry with random weights in NF4 with double quantization, bf16 compute, LoRA r=16 on
all seven linear layers without dropout, AdamW with 8-bit paged state and gradient checkpointing; a step is forward,
backward and optimizer over ROWSxLENGTH tokens, all of them trained. ``--adapter mma`` is LaVIN: its adapters, CLIP
ViT-L/14 and an image in each row, which no peer has. Contenders: ``lavintk:eager`` and ``lavintk:graph`` (engines),
``hf`` (as in PEFT's guide: embedding, head and norms in fp32), ``hf:autocast`` (the same under bf16 autocast) and
``unsloth``.

Each contender runs in a process of its own. Loading is making random weights on the device and quantizing them,
imports left out; nothing is read from a disk, except that Unsloth reads a checkpoint that is in NF4 already. The first
step of a shape includes what is compiled or recorded for it. Device memory is what the driver says is in use, context
included. A contender or a shape that fails says why, and the others go on.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import facts
from charts import can_draw, step_bars, sweep_lines
from ours import (
    ADAPTERS,
    GEOMETRIES,
    LEARNING_RATE,
    clean,
    finish,
    geometry,
    lavintk_step,
    make_optimizer,
    make_recipe_of,
    memory,
    random_batch,
    random_model,
)
from processes import messages, reason, tell

if TYPE_CHECKING:
    import torch

    from lavintk.data.batch import Batch

CONTENDERS = ("lavintk:eager", "lavintk:graph", "hf", "hf:autocast", "unsloth")
PACKAGES = ("lavintk", "torch", "triton", "transformers", "peft", "bitsandbytes", "unsloth")
BROKEN = 3
"""Exit code of a process whose device may be in an unusable state."""

Shape = tuple[int, int]
"""Rows and tokens per row."""
Result = dict[str, Any]


class CannotRunError(Exception):
    """A contender that is not installed, or cannot do what is asked."""


@dataclass(frozen=True)
class Job:
    """What one process measures."""

    contender: str
    geometry: str
    adapter: str
    quant: str
    optim: str
    shapes: tuple[Shape, ...]
    steps: int
    warmup: int
    checkpointing: bool
    device: str

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Read what ``json.dumps(asdict(job))`` wrote."""
        fields = json.loads(text)
        return cls(**fields | {"shapes": tuple((rows, length) for rows, length in fields["shapes"])})


# -- contenders, each in a process of its own --------------------------------------------------------------------------


class Contender(Protocol):
    """A model with its optimizer."""

    optimizer: Any

    def ready(self, rows: int, length: int) -> Callable[[Any], torch.Tensor]:
        """Return what takes one step over a batch of this shape and returns its loss."""
        ...

    def draw(self, rows: int, length: int) -> Any:
        """Return a new random batch."""
        ...


class Lavintk:
    """lavintk's model and optimizer as a recipe would make them."""

    def __init__(self, job: Job, device: torch.device) -> None:
        import torch

        from lavintk.devices import grow_segments
        from lavintk.plugins import installed_plugins

        grow_segments()
        self.engine, plugins = job.contender.partition(":")[2] or "eager", installed_plugins()
        recipe = make_recipe_of(job.geometry, job.adapter, {"quant": job.quant, "optim": job.optim})
        self.model = random_model(recipe, plugins, device, torch.bfloat16)
        self.model.checkpointing = job.checkpointing
        self.optimizer = make_optimizer(recipe, plugins, self.model)

    def ready(self, rows: int, length: int) -> Callable[[Any], torch.Tensor]:
        """Return the engine's step."""
        return lavintk_step(self.model, self.optimizer, self.engine, rows * length)

    def draw(self, rows: int, length: int) -> Batch:
        """Return random rows on the host."""
        return random_batch(self.model, rows, length)


class Peer:
    """A model of transformers' with PEFT's LoRA, stepped as a plain loop does."""

    def __init__(self, model: Any, device: torch.device, autocast: bool = False) -> None:
        from bitsandbytes import optim

        untyped: Any = optim
        self.model, self.device, self.autocast = model, device, autocast
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = untyped.PagedAdamW8bit(trained, lr=LEARNING_RATE)

    def ready(self, rows: int, length: int) -> Callable[[Any], torch.Tensor]:
        """Return the step."""
        import torch

        def step(ids: torch.Tensor) -> torch.Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                loss: torch.Tensor = self.model(input_ids=ids, labels=ids).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            return loss.detach()

        return step

    def draw(self, rows: int, length: int) -> torch.Tensor:
        """Return ids ``[rows, length]`` on the device."""
        import torch

        return torch.randint(3, 31000, (rows, length), device=self.device)


def load(job: Job, device: torch.device) -> tuple[Contender, float]:
    """Return the job's contender, and the seconds that loading took.

    :raises CannotRunError: with the reason.
    """
    import torch

    torch.manual_seed(0)
    name, _, variant = job.contender.partition(":")
    if name == "lavintk":
        import_all("bitsandbytes", "geometries", "lavintk.models.build", "lavintk.engine")
        begun = time.perf_counter()
        ours = Lavintk(job, device)
        finish(device)
        return ours, time.perf_counter() - begun
    check_peer(job, name)
    import peers

    if name == "unsloth":
        model, seconds = peers.unsloth_model(
            job.geometry, max(length for _, length in job.shapes), checkpointing=job.checkpointing
        )
        return Peer(model, device), seconds
    import_all("bitsandbytes", "peft", "transformers.models.llama.modeling_llama")
    from geometries import RandomSource

    begun = time.perf_counter()
    source = RandomSource(geometry(job.geometry)[0], device)
    base = peers.hf_model(source.config(), source.read, quant=job.quant, device=device, dtype=torch.bfloat16)
    hf = Peer(peers.with_lora(base, checkpointing=job.checkpointing), device, variant == "autocast")
    finish(device)
    return hf, time.perf_counter() - begun


def import_all(*modules: str) -> None:
    """Import modules now, because that is no part of loading a model."""
    for module in modules:
        importlib.import_module(module)


def check_peer(job: Job, name: str) -> None:
    """Find out whether a peer is there and can do what is asked.

    :raises CannotRunError: with the reason.
    """
    missing = [module for module in (("unsloth",) if name == "unsloth" else ("peft",)) if not facts.importable(module)]
    if missing:
        raise CannotRunError(f"{', '.join(missing)} is not installed")
    if job.adapter != "lora":
        raise CannotRunError("it has no adapters of LaVIN's")
    if job.quant not in (("nf4",) if name == "unsloth" else ("nf4", "none")):
        raise CannotRunError(f"it is not measured with {job.quant}")
    if name == "unsloth" and (job.device != "cuda" or job.geometry == "tiny"):
        raise CannotRunError("it needs a CUDA device and a geometry of real size")


def measure(contender: Contender, job: Job, shape: Shape, device: torch.device) -> Result:
    """Take the steps of one shape and return times and peaks."""
    clean(device)
    batch = contender.draw(*shape)
    begun = time.perf_counter()
    step = contender.ready(*shape)
    loss = step(batch)
    finish(device)
    first, times = time.perf_counter() - begun, []
    for _ in range(job.warmup + job.steps):
        batch = contender.draw(*shape)
        finish(device)
        begun = time.perf_counter()
        loss = step(batch)
        finish(device)
        times.append(time.perf_counter() - begun)
    times = times[job.warmup :]
    median = statistics.median(times)
    return {
        "first_step_s": round(first, 2), "step_ms": round(1e3 * median, 2), "fastest_ms": round(1e3 * min(times), 2),
        "slowest_ms": round(1e3 * max(times), 2), "tokens_s": round(shape[0] * shape[1] / median, 1),
        "rows_s": round(shape[0] / median, 2), "loss": round(float(loss), 4), **memory(device),
    }  # fmt: skip


def work(job: Job) -> None:
    """Measure the job's shapes, in the contender's process, and tell each result at once."""
    import_unsloth_first(job)
    import torch

    from lavintk.errors import LavintkError, OutOfMemoryError

    device = torch.device(job.device)
    try:
        contender, seconds = load(job, device)
    except CannotRunError as error:
        tell({"ended": str(error)})
        return
    for shape in job.shapes:
        tell({"begun": shape})
        try:
            result = measure(contender, job, shape, device)
        except (torch.OutOfMemoryError, OutOfMemoryError):
            result = {"error": "out of memory"}
        except LavintkError as error:  # an engine that refuses
            result = {"error": reason(error)}
        except Exception as error:
            tell({"shape": shape, "load_s": round(seconds, 2), "error": reason(error)})
            sys.exit(BROKEN)  # after a fault in a kernel nothing works any more: a new process takes the other shapes
        tell({"shape": shape, "load_s": round(seconds, 2), **result})


def import_unsloth_first(job: Job) -> None:
    """Import Unsloth, if it is this job's, before transformers, which it patches."""
    if job.contender == "unsloth" and facts.importable("unsloth"):
        os.environ |= {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false"}
        import unsloth  # type: ignore[import-not-found]  # noqa: F401


# -- the command -------------------------------------------------------------------------------------------------------


def run(job: Job, seconds: float) -> Iterator[Result]:
    """Yield a result for each shape of the job; after a process that broke another one takes what is left.

    :param seconds: what all its processes may take.
    """
    left, ends = list(job.shapes), time.monotonic() + seconds
    while left:
        at_risk = list(left)  # what is lost if the process ends now: everything while it loads
        work = ["--work", json.dumps(asdict(replace(job, shapes=tuple(left))))]
        for message in messages(__file__, work, ends - time.monotonic(), job.contender):
            if "begun" in message:
                at_risk = [tuple(message["begun"])]
                continue
            if "shape" in message:
                at_risk, ended = [tuple(message["shape"])], message
            else:
                at_risk = list(left) if message.get("late") else at_risk
                ended = {"error": message["ended"]}
            for shape in at_risk:
                left.remove(shape)
                yield {"contender": job.contender, **ended, "shape": f"{shape[0]}x{shape[1]}"}
            at_risk = []


def print_progress(result: Result) -> None:
    """Print one result on a line, as soon as it is known."""
    start = f"{result['contender']:15} {result['shape']:>8}"
    if "error" in result:
        print(f"{start}  {result['error']}", flush=True)
    else:
        print(f"{start}  {result['step_ms']:.1f} ms, {result['allocated_gib']:.2f} GiB", flush=True)


COLUMNS: dict[str, tuple[str, str]] = {
    "load_s": ("load s", ".1f"), "first_step_s": ("first step s", ".1f"), "step_ms": ("step ms", ".1f"),
    "tokens_s": ("tokens/s", ",.0f"), "rows_s": ("rows/s", ".2f"), "allocated_gib": ("allocated GiB", ".2f"),
    "reserved_gib": ("reserved GiB", ".2f"), "device_gib": ("device GiB", ".2f"), "faster": ("times hf", ".2f"),
}  # fmt: skip
"""Heading and format of what the table shows."""


def table(results: Sequence[Result]) -> str:
    """Return the results as aligned text, shape by shape, with how many times faster than ``hf`` each is."""
    lines = [["shape", "contender", *(heading for heading, _ in COLUMNS.values())]]
    notes = []
    for shape in dict.fromkeys(result["shape"] for result in results):
        group = [result for result in results if result["shape"] == shape]
        reference = next((r["step_ms"] for r in group if r["contender"] == "hf" and "step_ms" in r), None)
        for result in group:
            if "error" in result:
                notes.append(f"{shape} {result['contender']}: {result['error']}")
                continue
            values = result | {"faster": reference and reference / result["step_ms"]}
            cells = [format(values[k], f) if values.get(k) is not None else "-" for k, (_, f) in COLUMNS.items()]
            lines.append([shape, result["contender"], *cells])
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines]
    return "\n".join([*text, *(f"not measured: {note}" for note in notes)])


def title(settings: Result) -> str:
    """Return what everyone did, in one line."""
    what = {"lora": "LoRA r=16", "mma": "LaVIN with CLIP ViT-L/14, an image per row"}[settings["adapter"]]
    recompute = "gradient checkpointing" if settings["checkpointing"] else "no checkpointing"
    names = {"paged-8bit": "paged 8-bit AdamW", "paged": "paged AdamW", "8bit": "8-bit AdamW", "adamw": "AdamW"}
    optim = names.get(settings["optim"], settings["optim"])
    return f"LLaMA {settings['geometry'].upper()}, {settings['quant'].upper()}, {what}, {optim}, {recompute}"


def parse_shape(text: str) -> Shape:
    """Read ``ROWSxLENGTH``."""
    rows, _, length = text.partition("x")
    if not (rows.isdigit() and length.isdigit() and int(rows) > 0 and int(length) > 10):
        raise argparse.ArgumentTypeError(f"{text!r} is not ROWSxLENGTH with at least 11 tokens, such as 4x512")
    return int(rows), int(length)


def parse_sweep(text: str) -> list[Shape]:
    """Read ``ROWS,...xLENGTH,...`` as all pairs."""
    rows, _, lengths = text.partition("x")
    return [parse_shape(f"{row}x{length}") for row in rows.split(",") for length in lengths.split(",")]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="7b")
    parser.add_argument("--shape", action="append", type=parse_shape, help="ROWSxLENGTH; may be repeated")
    parser.add_argument("--sweep", type=parse_sweep, metavar="R,R,...xL,L,...", help="all pairs, for one contender")
    parser.add_argument("--contenders", default="lavintk:eager,lavintk:graph,hf,unsloth", help=", ".join(CONTENDERS))
    parser.add_argument("--adapter", choices=ADAPTERS, default="lora")
    parser.add_argument("--quant", default="nf4")
    parser.add_argument("--optim", default="paged-8bit", help="lavintk's optimizer; peers have paged 8-bit AdamW")
    parser.add_argument("--steps", type=int, default=10, help="steps whose median counts")
    parser.add_argument("--warmup", type=int, default=4, help="steps before them, after the first")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--timeout", type=float, default=180, help="seconds for each contender")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--from", type=Path, dest="source", metavar="FILE.json", help="show what --json wrote before")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    contenders = arguments.contenders = arguments.contenders.split(",")
    if unknown := [name for name in contenders if name not in CONTENDERS]:
        parser.error(f"no contender named {', '.join(unknown)}; there are {', '.join(CONTENDERS)}")
    if arguments.sweep and (len(contenders) > 1 or arguments.shape):
        parser.error("--sweep takes one contender (--contenders lavintk:graph) and no --shape")
    return arguments


def jobs(arguments: argparse.Namespace) -> list[Job]:
    """Return what to measure."""
    import torch

    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = dict.fromkeys(arguments.sweep or arguments.shape or [(1, 512), (4, 512), (1, 2048)])
    return [
        Job(
            name, arguments.geometry, arguments.adapter, arguments.quant, arguments.optim, tuple(shapes),
            arguments.steps, arguments.warmup, arguments.checkpointing, device,
        )
        for name in dict.fromkeys(arguments.contenders)
    ]  # fmt: skip


def compete(arguments: argparse.Namespace) -> Result:
    """Measure everyone; what is known so far is always in the file."""
    report: Result = {"environment": facts.environment(PACKAGES), "results": []}
    print("\n".join(facts.in_words(report["environment"])), flush=True)
    for job in jobs(arguments):
        report["settings"] = {k: v for k, v in asdict(job).items() if k not in ("contender", "shapes")}
        report["settings"]["sweep"] = bool(arguments.sweep)
        if not report["results"]:
            print(title(report["settings"]), flush=True)
        if (used := facts.memory_in_use()) > 1:
            print(f"note: {used:.1f} GiB of the GPU are in use already; they are in the column of device memory")
        for result in run(job, arguments.timeout):
            print_progress(result)
            report["results"].append(result)
            if arguments.json:
                arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def main() -> None:
    """Measure or read results, print the table, draw the chart."""
    arguments = parse_arguments()
    if arguments.work:
        work(Job.from_json(arguments.work))
        return
    report = json.loads(arguments.source.read_text(encoding="utf-8")) if arguments.source else compete(arguments)
    lines = [*facts.in_words(report["environment"]), title(report["settings"])]
    print("", *lines, "", table(report["results"]), sep="\n")
    if arguments.plot and can_draw():
        draw = sweep_lines if report["settings"]["sweep"] else step_bars
        draw(report["results"], title(report["settings"]), facts.in_words(report["environment"]), arguments.plot)


if __name__ == "__main__":
    main()

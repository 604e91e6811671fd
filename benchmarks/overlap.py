"""Whether lavintk learns what transformers + PEFT learns: loss curves from one start, and how far they are apart.

    python benchmarks/overlap.py [--quant none --quant nf4] [--steps 200] [--json overlap.json] [--plot overlap.png]

Both train LoRA (r=16, alpha=32, all seven linear layers) on the same small real model with the same weights, the same
LoRA weights at the start, the same rows in the same order and torch's AdamW at a constant rate. With ``nf4`` each side
quantizes by itself, and the command says how far the quantized weights differ. lavintk lays rows end to end, the other
side pads them. In bf16 a third run, transformers + PEFT computing in fp32 with the same weights, shows what each side
loses by rounding. What difference is noise is shown by yet another one: the same in fp32 from other LoRA weights.

Rows come from ``--data``, a file in alpaca's format, or are made up: descriptions of simple pictures with questions.
On a CPU the default is a few steps, which take less than two minutes.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import facts
import peers
import torch
from charts import can_draw, loss_curves
from step import ADAPTERS, lavintk_step

from lavintk.data.batches import collate, make_batches
from lavintk.data.labels import IGNORED
from lavintk.data.tokenize import TokenizedRecord, tokenize_all
from lavintk.devices import pick_device, pick_precision
from lavintk.models.build import Assembly, build
from lavintk.models.multimodal import MultimodalModel
from lavintk.plugins import installed_plugins
from lavintk.recipe import make_recipe
from lavintk.registry import Choice
from lavintk.run import load_records
from lavintk.schedule import build_optimizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PACKAGES = ("lavintk", "torch", "transformers", "peft", "bitsandbytes")
LANGUAGE = "language."
"""What lavintk's names have before transformers'."""
OTHER_SEED = 1
BETAS, EPSILON = (0.9, 0.999), 1e-8
Weights = dict[str, torch.Tensor]
Plan = list[list[int]]
"""The rows of each step."""


def made_up_records(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Return rows in alpaca's format: a question about a picture that is described in words, and a full sentence."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        colour = draw.choice(["red", "green", "blue", "yellow", "brown", "teal", "grey", "black"])
        shape, size = draw.choice(["circle", "rectangle", "triangle"]), draw.choice(["small", "large"])
        side = draw.choice(["left", "right", "upper", "lower"])
        question, answer = draw.choice([
            ("What is the colour of the shape?", f"The {shape} is {colour}."),
            ("Which shape is in the picture?", f"It shows a {shape}."),
            ("Where is the shape, and how large is it?", f"The {size} {shape} is on the {side} side."),
        ])  # fmt: skip
        picture = f"On the {side} side of the picture there is a {size} {colour} {shape}."
        rows.append({"instruction": question, "input": picture, "output": answer})
    return rows


def assemble(arguments: argparse.Namespace, quant: str, data: Path, precision: str) -> Assembly:
    """Return lavintk's model with LoRA as a recipe makes it."""
    device = arguments.device
    recipe = make_recipe({
        "name": "overlap", "model": {"language": arguments.model}, "quant": quant, "adapter": ADAPTERS["lora"],
        "data": {"train": {"name": "alpaca", "path": str(data)}, "max_length": arguments.max_length},
    })  # fmt: skip
    return build(recipe, installed_plugins(), device, pick_precision(precision, device))


def dense_weights(model: MultimodalModel) -> Weights:
    """Return the weights of an unquantized model in fp32 by their names in transformers' causal LM."""
    weights = {name: parameter.data for name, parameter in model.frozen_parameters().items()}
    for name, layer in model.linears().items():
        weights[f"{name}.weight"] = layer.dequantize(model.dtype)
        if layer.bias is not None:
            weights[f"{name}.bias"] = layer.bias
    return {name.removeprefix(LANGUAGE): weight for name, weight in weights.items()}


def make_plan(rows: Sequence[TokenizedRecord], batch_size: int, steps: int) -> Plan:
    """Return the rows of each step in lavintk's order, epoch after epoch."""

    def endless() -> Iterator[list[int]]:
        for epoch in range(steps):
            yield from make_batches(rows, batch_size=batch_size, seed=0, epoch=epoch)

    return [indices for indices, _ in zip(endless(), range(steps))]


def train_lavintk(
    model: MultimodalModel, rows: Sequence[TokenizedRecord], plan: Plan, arguments: argparse.Namespace
) -> list[float]:
    """Train with the trainer's engine; return the mean loss of each step."""
    model.train()
    adamw = installed_plugins().optimizers.create(Choice("adamw"))
    optimizer = build_optimizer(
        adamw, model.trainable(), lr=arguments.lr, betas=BETAS, eps=EPSILON, weight_decay=0.0
    )  # fmt: skip
    capacity = max(sum(len(rows[index]) for index in indices) for indices in plan)
    step = lavintk_step(model, optimizer, arguments.engine, capacity)
    return [float(step(collate([rows[index] for index in indices], None))) for indices in plan]


def train_peft(
    model: Any, rows: Sequence[TokenizedRecord], plan: Plan, rate: float, device: torch.device
) -> list[float]:
    """Train with a plain loop; return the mean loss of each step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=BETAS, eps=EPSILON, weight_decay=0.0)
    losses = []
    for indices in plan:
        loss = model(**padded([rows[index] for index in indices], device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def padded(rows: Sequence[TokenizedRecord], device: torch.device) -> Weights:
    """Return rows as transformers takes them: padded at the end, labels at the tokens themselves."""
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row.input_ids)
        mask[place, : len(row)] = 1
        labels[place, 1 : len(row)] = torch.tensor(row.labels[:-1])  # ours are shifted already
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def start_of(model: MultimodalModel) -> Weights:
    """Return a copy of the LoRA weights by their names in PEFT's model."""
    return {_in_peft(name): p.detach().clone() for name, p in model.trainable().items()}


def _in_peft(name: str) -> str:
    layer = name.removeprefix("adapter.").removeprefix(LANGUAGE)
    return "base_model.model." + layer.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")


@torch.no_grad()
def set_lora(model: Any, start: Weights) -> None:
    """Copy LoRA weights into PEFT's model, all of them and no others."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if trained.keys() != start.keys():
        raise ValueError(f"the two train different layers: {sorted(trained.keys() ^ start.keys())[:4]}")
    for name, parameter in trained.items():
        parameter.copy_(start[name])


def other_start(start: Weights) -> Weights:
    """Return LoRA weights drawn anew: A Kaiming-uniform, B zero."""
    generator = torch.Generator().manual_seed(OTHER_SEED)
    drawn = {}
    for name, weight in start.items():
        fresh = torch.zeros(weight.shape)
        if ".lora_A." in name:
            torch.nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
        drawn[name] = fresh
    return drawn


def largest_difference(ours: MultimodalModel, theirs: Any) -> float:
    """Return the largest difference between the weights that the two compute with."""
    from bitsandbytes import functional

    untyped: Any = functional
    differences = []
    for name, layer in ours.linears().items():
        weight = theirs.get_submodule(name.removeprefix(LANGUAGE)).weight
        state = copy.copy(getattr(weight, "quant_state", None))
        if state is not None:
            state.dtype = torch.float32
        value = weight if state is None else untyped.dequantize_4bit(weight.data, state)
        differences.append(float((layer.dequantize(torch.float32) - value.float()).abs().max()))
    return max(differences)


def compare(
    ours: Assembly, dense: Weights, rows: Sequence[TokenizedRecord], quant: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Train with each side and return the curves and how far they are apart, in nats per trained token."""
    model, device = ours.model, ours.model.device
    config: PretrainedConfig = model.language.config
    plan, start = make_plan(rows, arguments.rows, arguments.steps), start_of(model)

    def read(name: str) -> torch.Tensor:
        """Return a weight as lavintk has it, before it is quantized."""
        return dense[name].to(model.dtype)

    theirs = peers.hf_model(config, read, quant=quant, device=device, dtype=model.dtype)
    apart = largest_difference(model, theirs)
    begun = time.perf_counter()
    lavintk = train_lavintk(model, rows, plan, arguments)
    seconds = time.perf_counter() - begun

    def from_start(lora: Any, weights: Weights) -> list[float]:
        set_lora(lora, weights)
        return train_peft(lora, rows, plan, arguments.lr, device)

    lora = peers.with_lora(theirs, checkpointing=False)
    hf = reference = from_start(lora, start)
    if model.dtype != torch.float32:
        wide = peers.hf_model(config, read, quant=quant, device=device, dtype=torch.float32)
        lora = peers.with_lora(wide, checkpointing=False)
        reference = from_start(lora, start)
    other = from_start(lora, other_start(start))
    return {
        "precision": str(model.dtype).removeprefix("torch."),
        "weights_differ_by": apart, "lavintk_seconds": round(seconds, 1), "difference": spread(lavintk, hf),
        "lavintk_from_fp32": spread(lavintk, reference), "hf_from_fp32": spread(hf, reference),
        "noise": spread(other, reference),
        "lavintk": lavintk, "hf": hf, "fp32": reference, "other_start": other,
    }  # fmt: skip


def in_words(quant: str, run: dict[str, Any], arguments: argparse.Namespace) -> str:
    """Return what a comparison came to."""

    def distances(name: str) -> str:
        return f"{run[name]['mean']:.2g} on average, {run[name]['largest']:.2g} at most"

    lines = [
        f"{quant}, {run['precision']}: loss {run['hf'][0]:.4f} -> {run['hf'][-1]:.4f} (HF + PEFT), "
        f"{run['lavintk'][0]:.4f} -> {run['lavintk'][-1]:.4f} (lavintk) in {arguments.steps} steps of {arguments.rows} "
        f"rows; apart by {distances('difference')}; frozen weights differ by {run['weights_differ_by']:.2g}",
        f"  from HF + PEFT in fp32: another start {distances('noise')}",
    ]
    if run["precision"] != "float32":
        lines.append(f"  lavintk {distances('lavintk_from_fp32')}; HF + PEFT {distances('hf_from_fp32')}")
    return "\n".join(lines)


def spread(curve: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Return the mean and the largest distance of two curves."""
    distances = [abs(a - b) for a, b in zip(curve, reference, strict=True)]
    return {"mean": statistics.fmean(distances), "largest": max(distances)}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="name or folder of a language model")
    parser.add_argument("--quant", action="append", choices=("none", "nf4"))
    parser.add_argument("--data", type=Path, help="rows in alpaca's format; made up without it")
    parser.add_argument("--steps", type=int, help="default: 200 on CUDA, 8 on a CPU")
    parser.add_argument("--rows", type=int, help="rows per step; default: 16 on CUDA, 4 on a CPU")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--engine", choices=("eager", "graph"), default="eager", help="lavintk's")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="of both; on a CPU fp32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--from", type=Path, dest="source", metavar="FILE.json", help="draw what --json wrote before")
    arguments = parser.parse_args()
    arguments.device = pick_device(arguments.device)
    on_gpu = arguments.device.type == "cuda"
    arguments.steps = arguments.steps or (200 if on_gpu else 8)
    arguments.rows = arguments.rows or (16 if on_gpu else 4)
    return arguments


def train_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare for each storage of the weights and return everything; what is known is printed, and in the file."""
    environment = facts.environment(PACKAGES)
    print("\n".join(facts.in_words(environment)), flush=True)
    settings = {name: str(value) for name, value in vars(arguments).items() if name not in ("json", "plot", "source")}
    runs: dict[str, Any] = {}
    report = {"environment": environment, "settings": settings, "runs": runs}
    with TemporaryDirectory() as folder:
        data = arguments.data or Path(folder) / "rows.json"
        if arguments.data is None:
            data.write_text(json.dumps(made_up_records(arguments.steps * arguments.rows)), encoding="utf-8")
        plain = assemble(arguments, "none", data, "fp32")
        dense = dense_weights(plain.model)
        records = load_records(Choice("alpaca", {"path": str(data)}), "train")
        rows, _ = tokenize_all(records, plain.template, arguments.max_length)
        for quant in dict.fromkeys(arguments.quant or ["none", "nf4"]):
            ours = assemble(arguments, quant, data, arguments.precision)
            run = runs[quant] = compare(ours, dense, rows, quant, arguments)
            print(in_words(quant, run, arguments), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def main() -> None:
    """Train or read, write JSON and chart."""
    arguments = parse_arguments()
    report = json.loads(arguments.source.read_text(encoding="utf-8")) if arguments.source else train_all(arguments)
    if arguments.plot and can_draw():
        stored = {"none": "unquantized", "nf4": "NF4"}
        headings = {
            f"{report['settings']['model']}, {stored[quant]}, {run['precision']}": run
            for quant, run in report["runs"].items()
        }
        loss_curves(headings, facts.in_words(report["environment"]), arguments.plot)


if __name__ == "__main__":
    main()

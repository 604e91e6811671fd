"""``lavintk train``: train what a recipe says."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from lavintk.recipe import Recipe

STOPPED = 130
"""Exit code of a command that Ctrl-C ended."""
DEMO = "demo"
"""Recipe that runs when neither a recipe nor a model nor data is named."""
CUSTOM = {"name": "custom", "model": {}, "data": {}}
"""Start of a recipe that is given by flags alone."""

FLAGS = {
    "model": "model.language",
    "vision": "model.vision",
    "quant": "quant",
    "vision_quant": "vision_quant",
    "embed_quant": "embed_quant",
    "adapter": "adapter",
    "optim": "optim",
    "data": "data.train",
    "validation": "data.validation",
    "test": "data.test",
    "template": "data.template",
    "max_length": "data.max_length",
    "epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "batch_size": "train.batch_size",
    "accumulate": "train.accumulate",
    "lr": "train.lr",
    "engine": "train.engine",
    "stream": "train.stream",
    "pack": "train.pack",
    "precision": "train.precision",
    "device": "train.device",
    "seed": "train.seed",
}
"""Flag to the key of the recipe that it overrides."""


RECIPE_FLAGS = (
    click.option("--model", help="Language model: catalog name, folder, .gguf file or hub id."),
    click.option("--vision", help="Vision tower: catalog name, folder, OpenAI's CLIP file or hub id."),
    click.option("--quant", help="Quantizer of the frozen base: nf4, int8, none, ... (lavintk plugins list)."),
    click.option("--vision-quant", help="Quantizer of the vision tower.  [default: none]"),
    click.option("--embed-quant", help="Quantizer of the embedding and the output head.  [default: none]"),
    click.option("--adapter", help="Adapter: mma, lora, ..."),
    click.option("--optim", help="Optimizer: paged, 8bit, adamw, ..."),
    click.option("--data", help="Training records, FORMAT:PATH, for example alpaca:data.json."),
    click.option("--validation", help="Records for the loss during training."),
    click.option("--test", help="Records to answer before and after training."),
    click.option("--template", help="auto, chat, plain, lavin or the path of a .jinja file."),
    click.option("--max-length", type=int, help="Tokens per row, visual tokens included."),
    click.option("--epochs", type=float, help="Passes over the training records."),
    click.option("--max-steps", type=int, help="Optimizer steps; overrides --epochs."),
    click.option("--batch-size", type=int, help="Rows per micro-batch."),
    click.option("--accumulate", type=int, help="Micro-batches per optimizer step."),
    click.option("--lr", type=float, help="Peak learning rate."),
    click.option("--engine", help="How steps are computed: auto, eager, graph (CUDA graphs) or layerwise."),
    click.option("--stream", help="Keep the base on the host (cpu) or on disk (disk), a few layers on the device."),
    click.option("--pack/--no-pack", default=None, help="Put rows together into full micro-batches.  [default: auto]"),
    click.option("--precision", help="auto, bf16, fp16 or fp32."),
    click.option("--device", help="auto, cpu, cuda or cuda:N."),
    click.option("--seed", type=int, help="Of the adapter's start, the order of the rows and dropout."),
    click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Override any key of the recipe."),
)
"""Options of the commands that take a recipe."""


def recipe_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the argument RECIPE and the flags that override it."""
    for option in reversed(RECIPE_FLAGS):
        command = option(command)
    return click.argument("recipe", required=False)(command)


def resolve(recipe: str | None, assignments: tuple[str, ...], flags: dict[str, Any]) -> Recipe:
    """Return the checked recipe that a command line names.

    :raises RecipeError: all its faults.
    """
    from lavintk.plugins import installed_plugins
    from lavintk.recipe import make_recipe, read_recipe

    if recipe is None:
        named = flags["model"] or flags["data"]
        content: dict[str, Any] = CUSTOM if named else read_recipe(DEMO)
    else:
        content = read_recipe(recipe)
    resolved = make_recipe(content, overrides_of(assignments, flags))
    resolved.check(installed_plugins())
    return resolved


def overrides_of(assignments: tuple[str, ...], flags: dict[str, Any]) -> dict[str, Any]:
    """Return what the flags and ``--set`` override, by the recipe's keys."""
    from lavintk.recipe import parse_assignment

    overrides = {FLAGS[name]: value for name, value in flags.items() if value is not None}
    return overrides | dict(parse_assignment(text) for text in assignments)


def as_flags(changes: Mapping[str, Any]) -> list[str]:
    """Return what on a command line overrides the recipe's keys with ``changes``."""
    named = {key: f"--{flag.replace('_', '-')}" for flag, key in FLAGS.items()}
    flags = []
    for key, value in changes.items():
        text = value if isinstance(value, str) else json.dumps(value)
        if key in named and isinstance(value, str | int) and not isinstance(value, bool):
            flags.append(f"{named[key]} {shlex.quote(text)}")
        else:
            flags.append(f"--set {shlex.quote(f'{key}={text}')}")
    return flags


@click.command()
@recipe_flags
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run.  [default: runs/<time>-<recipe>]")
@click.option("--resume", type=click.Path(path_type=Path), help="Go on with the run in this folder.")
@click.option(
    "--fit", help="Change the recipe so that it fits into this much GPU memory: 8GB, or auto for what is free."
)
@click.option("--host", help="With --fit: how much host memory may be used.  [default: what this machine has free]")
@click.option("--dry-run", is_flag=True, help="Print the resolved recipe and stop.")
def train(
    recipe: str | None,
    out: Path | None,
    resume: Path | None,
    fit: str | None,
    host: str | None,
    assignments: tuple[str, ...],
    dry_run: bool,
    **flags: Any,
) -> int:
    """Train what RECIPE says: a shipped name (demo, lavin-7b-lite, ...) or a YAML file.

    Without a recipe, a model and data, the demo runs: it teaches a small language model to answer questions about
    pictures. With --model and --data no recipe is needed.
    """
    from rich.console import Console

    from lavintk.errors import RecipeError
    from lavintk.machine import check_machine

    console = Console()
    if resume is not None:
        if recipe or out or fit or host or overrides_of(assignments, flags):
            raise RecipeError("--resume", ["a run goes on with its own recipe; leave out everything else"])
        return _run_resumed(resume, console)
    if host is not None and fit is None:
        raise RecipeError("--host", ["it goes with --fit"])
    resolved = resolve(recipe, assignments, flags)
    check_machine(resolved)
    if fit is not None:
        resolved = fitted(resolved, fit, host, console)
    if dry_run:
        click.echo(resolved.to_yaml(), nl=False)
        return 0
    from lavintk.training import train as run_training

    run = run_training(resolved, out, console=console)
    return show_next_steps(run.folder, run.manifest["status"], console)


def fitted(recipe: Recipe, size: str, host: str | None, console: Any) -> Recipe:
    """Return the recipe changed to fit into ``size`` on the device and ``host`` on the host, and say what was changed.

    :raises RecipeError: it cannot be made to fit, or is to run on a CPU.
    """
    import psutil

    from lavintk.fitting import cuda_device, fit, free_memory, parse_size
    from lavintk.plan import GIB
    from lavintk.plugins import installed_plugins

    if size == "auto":
        limit = free_memory(recipe)
    else:
        limit = parse_size(size)
        cuda_device(recipe, f"--fit {size}")
    on_host = psutil.virtual_memory().available if host is None else parse_size(host, "--host")
    found = fit(recipe, installed_plugins(), limit, on_host)
    changes = " ".join(as_flags(found.changes)) or "nothing had to be changed"
    shown = f"{size} ({limit / GIB:.2f} GiB are free)" if size == "auto" else size
    console.print(
        f"fit into {shown}: {changes}; {found.plan.device / GIB:.2f} GiB foretold", highlight=False, markup=False,
        soft_wrap=True,
    )  # fmt: skip
    return found.recipe


def _run_resumed(folder: Path, console: Any) -> int:
    from lavintk.run import Run
    from lavintk.training import train as run_training

    run = run_training(Run.open(folder).recipe, folder, resume=True, console=console)
    return show_next_steps(run.folder, run.manifest["status"], console)


def show_next_steps(folder: Path, status: str, console: Any) -> int:
    """Say where the run lies and what to do with it; return the exit code."""
    console.print(f"\nrun: {folder} ({status})", highlight=False)
    if status == "interrupted":
        return STOPPED
    console.print(
        f"  lavintk eval {folder}                    score it again, or on other data with --data\n"
        f"  tensorboard --logdir {folder}            look at the curves\n"
        f"  python -c \"import lavintk; print(lavintk.load('{folder}').generate('...', image='...'))\"",
        highlight=False,
        soft_wrap=True,
    )
    return 0

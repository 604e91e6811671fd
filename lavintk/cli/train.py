"""``lavintk train``: train what a recipe says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

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
    "pack": "train.pack",
    "precision": "train.precision",
    "device": "train.device",
    "seed": "train.seed",
}
"""Flag to the key of the recipe that it overrides."""


@click.command()
@click.argument("recipe", required=False)
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run.  [default: runs/<time>-<recipe>]")
@click.option("--resume", type=click.Path(path_type=Path), help="Go on with the run in this folder.")
@click.option("--model", help="Language model: catalog name, folder, .gguf file or hub id.")
@click.option("--vision", help="Vision tower: catalog name, folder, OpenAI's CLIP file or hub id.")
@click.option("--quant", help="Quantizer of the frozen base: nf4, int8, none, ... (lavintk plugins list).")
@click.option("--adapter", help="Adapter: mma, lora, ...")
@click.option("--optim", help="Optimizer: paged, 8bit, adamw, ...")
@click.option("--data", help="Training records, FORMAT:PATH, for example alpaca:data.json.")
@click.option("--validation", help="Records for the loss during training.")
@click.option("--test", help="Records to answer before and after training.")
@click.option("--template", help="auto, chat, plain, lavin or the path of a .jinja file.")
@click.option("--max-length", type=int, help="Tokens per row, visual tokens included.")
@click.option("--epochs", type=float, help="Passes over the training records.")
@click.option("--max-steps", type=int, help="Optimizer steps; overrides --epochs.")
@click.option("--batch-size", type=int, help="Rows per micro-batch.")
@click.option("--accumulate", type=int, help="Micro-batches per optimizer step.")
@click.option("--lr", type=float, help="Peak learning rate.")
@click.option("--engine", help="How steps are computed: auto, eager or graph (CUDA graphs).")
@click.option("--pack/--no-pack", default=None, help="Put rows together into full micro-batches.  [default: auto]")
@click.option("--precision", help="auto, bf16, fp16 or fp32.")
@click.option("--device", help="auto, cpu, cuda or cuda:N.")
@click.option("--seed", type=int, help="Of the adapter's start, the order of the rows and dropout.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Override any key of the recipe.")
@click.option("--dry-run", is_flag=True, help="Print the resolved recipe and stop.")
def train(
    recipe: str | None,
    out: Path | None,
    resume: Path | None,
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
    from lavintk.plugins import installed_plugins
    from lavintk.recipe import make_recipe, parse_assignment, read_recipe

    console = Console()
    overrides = {FLAGS[name]: value for name, value in flags.items() if value is not None}
    overrides |= dict(parse_assignment(text) for text in assignments)
    if resume is not None:
        if recipe or out or overrides:
            raise RecipeError("--resume", ["a run goes on with its own recipe; leave out everything else"])
        return _run_resumed(resume, console)
    if recipe is None:
        named = flags["model"] or flags["data"]
        content: dict[str, Any] = CUSTOM if named else read_recipe(DEMO)
    else:
        content = read_recipe(recipe)
    resolved = make_recipe(content, overrides)
    resolved.check(installed_plugins())
    if dry_run:
        click.echo(resolved.to_yaml(), nl=False)
        return 0
    from lavintk.training import train as run_training

    run = run_training(resolved, out, console=console)
    return show_next_steps(run.folder, run.manifest["status"], console)


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

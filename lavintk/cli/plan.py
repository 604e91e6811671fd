"""``lavintk plan``: what a recipe takes, before it runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from lavintk.cli.train import as_flags, recipe_flags, resolve

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from lavintk.fitting import Fit
    from lavintk.plan import Card, Plan


@click.command()
@recipe_flags
@click.option(
    "--fit", help="Change the recipe so that it fits into this much GPU memory: 8GB, or auto for what is free."
)
@click.option("--host", help="With --fit: how much host memory may be used, for example 32GB.  [default: any]")
@click.option("--gpu", help="Also foretell the time on this card: rtx3090, rtx4090, a100, h100, ...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(
    recipe: str | None,
    assignments: tuple[str, ...],
    fit: str | None,
    host: str | None,
    gpu: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Foretell the GPU memory and the time of RECIPE's steps, without a GPU and without reading weights."""
    from rich.console import Console

    from lavintk.errors import RecipeError
    from lavintk.fitting import Fit, free_memory, parse_size
    from lavintk.fitting import fit as make_fit
    from lavintk.plan import find_card
    from lavintk.plan import plan as make_plan
    from lavintk.plugins import installed_plugins

    if host is not None and fit is None:
        raise RecipeError("--host", ["it goes with --fit"])
    card = None if gpu is None else find_card(gpu)
    on_host = None if host is None else parse_size(host, "--host")
    limit = None if fit in (None, "auto") else parse_size(str(fit))
    resolved, plugins = resolve(recipe, assignments, flags), installed_plugins()
    if fit is None:
        found = Fit(resolved, make_plan(resolved, plugins), ())
    else:
        found = make_fit(resolved, plugins, free_memory(resolved) if limit is None else limit, on_host)
    if as_json:
        click.echo(json.dumps(_as_json(found, card), indent=2))
        return
    console = Console()
    console.print(_table(found.plan, resolved.name))
    if fit is not None:
        _print_steps(found, fit, card, gpu, console)
    if card is not None:
        seconds = found.plan.seconds(card)
        console.print(
            f"{gpu}: {1e3 * seconds:,.0f} ms per micro-batch of {found.plan.tokens} tokens, "
            f"{found.plan.step_seconds(card):.2f} s per step of {found.plan.micro_batches}, "
            f"{found.plan.tokens / seconds:,.0f} tokens/s",
            highlight=False,
        )


def _table(found: Plan, name: str) -> Table:
    from rich.table import Table

    from lavintk.plan import CONTEXT, GIB

    table = Table()
    table.add_column(
        f"{name}: peak of GPU memory, {found.tokens} tokens per micro-batch, {found.micro_batches} per step, "
        f"engine {found.engine}"
    )
    table.add_column("GiB", justify="right")
    for item, size in found.items.items():
        table.add_row(item, f"{size / GIB:.2f}")
    table.add_section()
    table.add_row("allocated", f"{found.allocated / GIB:.2f}")
    table.add_row("held beyond that, CUDA context", f"{(found.device - found.allocated) / GIB:.2f}")
    table.add_row(f"in all (context {CONTEXT / GIB:.2f})", f"{found.device / GIB:.2f}")
    for item, size in found.host.items():
        table.add_row(f"on the host: {item}", f"{size / GIB:.2f}")
    return table


def _print_steps(found: Fit, size: str, card: Card | None, gpu: str | None, console: Console) -> None:
    """Say what was changed, what each change brings and what it costs."""
    from lavintk.plan import GIB

    if not found.steps:
        console.print(f"it fits into {size} as it is", highlight=False)
        return
    before = found.before
    for step in found.steps:
        said = f"{before.device / GIB:.2f} -> {step.plan.device / GIB:.2f} GiB"
        if card is not None:
            said += f", {before.step_seconds(card):.2f} -> {step.plan.step_seconds(card):.2f} s per step on {gpu}"
        flags = " ".join(as_flags(step.changes))
        console.print(f"{flags}\n    {said}: {step.cost}", highlight=False, markup=False, soft_wrap=True)
        before = step.plan
    flags = " ".join(as_flags(found.changes))
    console.print(f"to fit into {size}: {flags}", highlight=False, markup=False, soft_wrap=True)


def _as_json(found: Fit, card: Card | None) -> dict[str, Any]:
    plan = found.plan
    return {
        "tokens": plan.tokens, "micro_batches": plan.micro_batches, "engine": plan.engine, "items": dict(plan.items),
        "host": dict(plan.host), "allocated": plan.allocated, "device": plan.device, "on_host": plan.on_host,
        "changes": found.changes, "flags": as_flags(found.changes),
        "steps": [{"changes": dict(s.changes), "cost": s.cost, "device": s.plan.device} for s in found.steps],
        "seconds": None if card is None else plan.seconds(card),
        "step_seconds": None if card is None else plan.step_seconds(card),
    }  # fmt: skip

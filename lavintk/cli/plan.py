"""``lavintk plan``: what a recipe takes, before it runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from lavintk.cli.train import recipe_flags, resolve

if TYPE_CHECKING:
    from rich.table import Table

    from lavintk.plan import Plan


@click.command()
@recipe_flags
@click.option("--fit", help="Change the recipe so that it fits into this much GPU memory, for example 8GB.")
@click.option("--gpu", help="Also foretell the time on this card: rtx3090, rtx4090, a100, h100, ...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(
    recipe: str | None, assignments: tuple[str, ...], fit: str | None, gpu: str | None, as_json: bool, **flags: Any
) -> None:
    """Foretell the GPU memory and the time of RECIPE's steps, without a GPU and without reading weights."""
    from rich.console import Console

    from lavintk.plan import find_card, parse_size
    from lavintk.plan import fit as make_fit
    from lavintk.plan import plan as make_plan
    from lavintk.plugins import installed_plugins

    card = None if gpu is None else find_card(gpu)
    limit = None if fit is None else parse_size(fit)
    resolved, plugins = resolve(recipe, assignments, flags), installed_plugins()
    engine = "eager" if resolved.train.engine == "eager" else "graph"
    changes: dict[str, Any] = {}
    if limit is None:
        found = make_plan(resolved, plugins, engine)
    else:
        fitting = make_fit(resolved, plugins, limit, engine)
        found, changes = fitting.plan, dict(fitting.changes)
    seconds = None if card is None else found.seconds(card)
    if as_json:
        click.echo(json.dumps(_as_json(found, changes, seconds), indent=2))
        return
    console = Console()
    console.print(_table(found, resolved.name))
    for key, value in changes.items():
        console.print(f"to fit into {fit}: --set {key}={json.dumps(value)}", highlight=False)
    if seconds is not None:
        speed = f"{found.tokens / seconds:,.0f} tokens/s"
        console.print(
            f"{gpu}: {1e3 * seconds:.0f} ms per micro-batch of {found.tokens} tokens, {speed}", highlight=False
        )


def _table(found: Plan, name: str) -> Table:
    from rich.table import Table

    from lavintk.plan import CONTEXT, GIB

    table = Table()
    table.add_column(f"{name}: peak of GPU memory, {found.tokens} tokens per micro-batch")
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


def _as_json(found: Plan, changes: dict[str, Any], seconds: float | None) -> dict[str, Any]:
    return {
        "tokens": found.tokens, "engine": found.engine, "items": dict(found.items), "host": dict(found.host),
        "allocated": found.allocated, "device": found.device, "changes": changes, "seconds": seconds,
    }  # fmt: skip

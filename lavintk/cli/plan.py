"""``lavintk plan``: what a recipe takes, before it runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from lavintk.cli.train import as_flags, recipe_flags, resolve

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from lavintk.cards import Card
    from lavintk.fitting import Fit
    from lavintk.plan import Plan
    from lavintk.spare_memory import Settled


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

    from lavintk.cards import UNKNOWN, find_card
    from lavintk.errors import RecipeError
    from lavintk.fitting import Fit, free_memory, parse_size
    from lavintk.fitting import fit as make_fit
    from lavintk.kernels.choice import check_environment
    from lavintk.plan import GIB, outline_of, plan_of
    from lavintk.plugins import installed_plugins
    from lavintk.spare_memory import possible_batches, settle

    if host is not None and fit is None:
        raise RecipeError("--host", ["it goes with --fit"])
    check_environment()
    card = None if gpu is None else find_card(gpu)
    on_host = None if host is None else parse_size(host, "--host")
    limit = None if fit in (None, "auto") else parse_size(str(fit))
    resolved, plugins = resolve(recipe, assignments, flags), installed_plugins()
    model = outline_of(resolved, plugins)
    if fit is None:
        found = Fit(resolved, plan_of(model, resolved, plugins), ())
    else:
        limit = free_memory(resolved) if limit is None else limit
        found = make_fit(resolved, plugins, limit, on_host, card=card or UNKNOWN, model=model)
    settled = None
    if card is not None and fit is None:  # as training would settle it on that card
        settled = settle(model, resolved, plugins, card.gib * GIB, card, possible_batches(resolved))
    if as_json:
        click.echo(json.dumps(_as_json(found, card, settled), indent=2))
        return
    console = Console()
    sizes = f"{found.plan.tokens} tokens in a micro-batch, {found.plan.micro_batches} micro-batches in a step"
    console.print(
        f"{resolved.name}: {sizes}, engine {found.plan.engine}", highlight=False, markup=False, soft_wrap=True
    )
    console.print(_table(found.plan))
    if fit is not None:
        _print_steps(found, fit, card, gpu, console)
    if card is not None and gpu is not None:
        _print_card(found.plan if settled is None else settled.plan, card, gpu, console)
        if settled is not None and settled.plan != found.plan:
            console.print(_in_words(settled, len(model.layers), gpu), highlight=False, soft_wrap=True)


def _table(found: Plan) -> Table:
    from rich.table import Table

    from lavintk.plan import CONTEXT, GIB

    table = Table()
    table.add_column("GPU memory at the peak")
    table.add_column("GiB", justify="right")
    for item, size in found.items.items():
        table.add_row(item, f"{size / GIB:.2f}")
    table.add_section()
    table.add_row("allocated by torch", f"{found.allocated / GIB:.2f}")
    table.add_row("held by its allocator beyond that", f"{found.held / GIB:.2f}")
    table.add_row("CUDA context", f"{CONTEXT / GIB:.2f}")
    table.add_row("in all", f"{found.device / GIB:.2f}", style="bold", end_section=True)
    for item, size in found.host.items():
        table.add_row(f"in host memory: {item}", f"{size / GIB:.2f}")
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
        if card is not None and not before.untimed and not step.plan.untimed:
            said += f", {before.step_seconds(card):.2f} -> {step.plan.step_seconds(card):.2f} s per step on {gpu}"
        flags = " ".join(as_flags(step.level.changes))
        console.print(f"{flags}\n    {said}: {step.level.cost}", highlight=False, markup=False, soft_wrap=True)
        before = step.plan
    flags = " ".join(as_flags(found.changes))
    console.print(f"to fit into {size}: {flags}", highlight=False, markup=False, soft_wrap=True)


def _in_words(settled: Settled, layers: int, gpu: str) -> str:
    """Say what training settles by itself on a card."""
    from lavintk.plan import GIB

    return (
        f"{gpu}: with packs of {settled.batch.tokens} tokens and {settled.recomputed} of {layers} layers recomputed, "
        f"as memory there allows; {settled.plan.device / GIB:.2f} GiB in all"
    )


def _print_card(found: Plan, card: Card, gpu: str, console: Console) -> None:
    """Say whether the card has the memory, and how long a step takes on it."""
    from lavintk.plan import GIB

    lacking = found.device - card.gib * GIB
    if lacking > 0:
        advice = f"--fit {card.gib}GB changes the recipe until it fits"
        said = f"{gpu}: {lacking / GIB:.2f} GiB more than it has ({card.gib} GiB); {advice}"
        console.print(said, highlight=False, soft_wrap=True)
    seconds = found.seconds(card)
    if found.untimed:
        said = f"no time is foretold: {found.untimed}"
    else:
        said = (
            f"{'if it fitted, ' if lacking > 0 else ''}{1e3 * seconds:,.0f} ms per micro-batch, "
            f"{found.step_seconds(card):.2f} s per step, {found.tokens / seconds:,.0f} tokens/s"
        )
    console.print(f"{gpu}: {said}", highlight=False, soft_wrap=True)


def _as_json(found: Fit, card: Card | None, settled: Settled | None) -> dict[str, Any]:
    """Return what is known of the recipe, and the times on the card of what training settles there."""
    from lavintk.plan import GIB

    plan = found.plan
    there = plan if settled is None else settled.plan
    timed = card if not plan.untimed else None
    return {
        "tokens": plan.tokens, "micro_batches": plan.micro_batches, "engine": plan.engine, "items": dict(plan.items),
        "host": dict(plan.host), "allocated": plan.allocated, "device": plan.device, "on_host": plan.on_host,
        "changes": found.changes, "flags": as_flags(found.changes),
        "steps": [
            {"changes": dict(s.level.changes), "cost": s.level.cost, "device": s.plan.device} for s in found.steps
        ],
        "fits": None if card is None else plan.device <= card.gib * GIB,
        "seconds": None if timed is None else there.seconds(timed),
        "step_seconds": None if timed is None else there.step_seconds(timed),
        "on_card": None if settled is None else {
            "device": there.device, "tokens": there.tokens, "recomputed": settled.recomputed,
        },
        "untimed": plan.untimed,
    }  # fmt: skip

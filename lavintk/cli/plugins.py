"""``lavintk plugins``: what is installed, who offers it, and which options it takes."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from lavintk.errors import UnknownNameError, did_you_mean
from lavintk.plugins import disabled_names, installed_names, installed_plugins


@click.group()
def plugins() -> None:
    """List plugins and what they offer."""


@plugins.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_plugins(as_json: bool) -> None:
    """List the loaded plugins with what each offers."""
    records = installed_plugins().records()
    if as_json:
        click.echo(json.dumps([asdict(record) for record in records], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("plugin", "version", "offers"):
        table.add_column(column)
    for record in records:
        offers = [f"[dim]{kind}:[/dim] {', '.join(names)}" for kind, names in record.offers.items()]
        label = record.version if record.distribution == "lavintk" else f"{record.version} ({record.distribution})"
        table.add_row(record.name, label, "\n".join(offers) or ", ".join(record.hooks))
    console = Console()
    console.print(table)
    for name in sorted(disabled_names()):
        console.print(_about_disabled(name), markup=False, highlight=False)


def _about_disabled(name: str) -> str:
    if name in installed_names():
        return f"left out by LAVINTK_DISABLE: {name}"
    owners = [registry[name].owner for registry in installed_plugins().registries().values() if name in registry]
    hint = f" It is offered by plugin {owners[0]!r}." if owners else did_you_mean(name, installed_names())
    return f"LAVINTK_DISABLE={name} names no plugin.{hint}"


@plugins.command("show")
@click.argument("name")
def show_entry(name: str) -> None:
    """Show what NAME (a quantizer, optimizer, adapter, ...) is and which options it takes."""
    registries = installed_plugins().registries().values()
    found = [registry[name] for registry in registries if name in registry]
    if not found:
        known = sorted({entry.name for registry in registries for entry in registry})
        raise UnknownNameError("quantizer, optimizer, adapter, exporter, dataset format or evaluation", name, known)
    for entry in found:
        click.echo(f"{entry.kind} {entry.name} (plugin {entry.owner})")
        if entry.summary:
            click.echo(f"  {entry.summary}")
        options = entry.declared_options()
        click.echo("  options:" if options else "  no options")
        for option in options:
            default = "required" if option.required else f"default {option.default!r}"
            click.echo(f"    {option.name} ({option.type}, {default}){': ' + option.help if option.help else ''}")

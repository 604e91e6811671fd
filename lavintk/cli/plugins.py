"""``lavintk plugins``: what is installed, who offers it, which options it takes, and how to start one's own."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from lavintk.errors import UnknownNameError, did_you_mean
from lavintk.plugins import BUILTIN_ONLY, disabled_names, found_points, installed_names, installed_plugins, only_builtin
from lavintk.scaffold import KINDS, new_plugin, placeholders


@click.group()
def plugins() -> None:
    """List plugins and what they offer, or start one."""


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
    for line in _about_left_out():
        console.print(line, markup=False, highlight=False)


def _about_left_out() -> list[str]:
    """Return a line for each plugin that is installed and not loaded."""
    disabled = disabled_names()
    lines = [_about_disabled(name) for name in sorted(disabled)]
    if only_builtin():
        others = found_points(disabled).keys() - found_points(disabled, builtin_only=True).keys()
        lines += [f"left out by LAVINTK_PLUGINS={BUILTIN_ONLY}: {name}" for name in sorted(others)]
    outdated = installed_plugins().left_out
    return lines + [f"left out, as it wants another version of the plugin interface: {name}" for name in outdated]


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


@plugins.command("new")
@click.argument("kind", type=click.Choice(list(KINDS)))
@click.argument("name")
@click.option("--out", type=click.Path(path_type=Path), help="New folder.  [default: lavintk-NAME]")
def new(kind: str, name: str, out: Path | None) -> None:
    """Write a package that offers a KIND called NAME, to start from: it works, and has tests.

    Names are of small letters and digits, parts joined by - or _.
    """
    words = placeholders(kind, name)
    folder = out or Path(words["distribution"])
    for path in new_plugin(kind, name, folder, installed_plugins()):
        click.echo(path)
    click.echo(f"\nNext:\n  pip install -e '{folder}[test]'\n  python -m pytest {folder}\n  {words['use']}")

"""``lavintk models``: the models lavintk knows how to get."""

from __future__ import annotations

import click


@click.group()
def models() -> None:
    """List known models and fetch them."""


@models.command("list")
def list_known() -> None:
    """List the models known by name and whether they are here already."""
    from rich.console import Console
    from rich.table import Table

    from lavintk.models.catalog import list_models

    table = Table(box=None, pad_edge=False)
    for column in ("name", "kind", "here", "licence", "what it is"):
        table.add_column(column)
    for entry, installed in list_models():
        table.add_row(entry.name, entry.kind, "yes" if installed else "no", entry.licence, entry.summary)
    Console().print(table)


@models.command()
@click.argument("name")
def pull(name: str) -> None:
    """Fetch the model NAME (a known name or a hub id) into the cache and print where it lies."""
    from lavintk.models.catalog import locate

    click.echo(locate(name))

"""``lavintk doctor``: is everything here that lavintk needs, and what to do if not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.table import Table

    from lavintk.doctor import Finding

MARKS = {
    "ok": "[green]ok[/green]",
    "advice": "[yellow]advice[/yellow]",
    "fault": "[red bold]fault[/red bold]",
}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> int:
    """Look over Python, torch, bitsandbytes, models' sources and plugins, with advice.

    Ends with exit code 1 if something is broken, 0 otherwise.
    """
    from rich.console import Console

    from lavintk.doctor import examine

    with Console(stderr=True).status("") as status:
        findings = examine(lambda area: status.update(f"looking at {area}"))
    if as_json:
        _print_json(findings)
    else:
        _print_page(findings)
    return int(any(finding.status == "fault" for finding in findings))


def _print_json(findings: Sequence[Finding]) -> None:
    import json
    from dataclasses import asdict

    from lavintk import __version__

    healthy = all(finding.status != "fault" for finding in findings)
    content = {"lavintk": __version__, "ok": healthy, "findings": [asdict(finding) for finding in findings]}
    click.echo(json.dumps(content, indent=2))


def _print_page(findings: Sequence[Finding]) -> None:
    from rich.console import Console

    from lavintk import __version__

    console = Console(highlight=False)
    console.print(f"[bold]lavintk {__version__}[/bold]\n")
    console.print(_table(findings))
    console.print(f"\n{_summary(findings)}")


def _table(findings: Sequence[Finding]) -> Table:
    """Return one row per finding; the area is named once, advice stands below what it is about."""
    from rich.markup import escape
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    area = ""
    for finding in findings:
        label = "" if finding.area == area else f"[bold]{finding.area}[/bold]"
        area = finding.area
        table.add_row(label, MARKS[finding.status], escape(finding.text))
        if finding.advice:
            table.add_row("", "", f"[cyan]{escape(finding.advice)}[/cyan]")
    return table


def _summary(findings: Sequence[Finding]) -> str:
    faults = sum(finding.status == "fault" for finding in findings)
    hints = sum(finding.status == "advice" for finding in findings)
    if faults:
        more = f", {_count(hints, 'thing')} to consider" if hints else ""
        return f"[red bold]{_count(faults, 'fault')}[/red bold] to mend{more}."
    if hints:
        return f"[green]Everything works[/green]; {_count(hints, 'thing')} to consider."
    return "[green]Everything works.[/green] Next: [bold]lavintk train[/bold] runs the demo."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"

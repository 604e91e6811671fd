"""``lavintk export``: write a trained run in a format for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from lavintk.registry import Choice


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--format", "format_", default="onnx", show_default=True, help="onnx, hf, peft, gguf, ... with options.")
@click.option("--out", type=click.Path(path_type=Path), help="New folder.  [default: RUN-FORMAT]")
@click.option("--quant", help="Grid of the linear layers: int4, int8, nf4, fp16, fp32.  [default: keep the trained]")
@click.option("--embed-quant", help="Grid of the embedding.")
@click.option("--head-quant", help="Grid of the output head.")
@click.option("--adapter", help="merge, side or auto.")
@click.option("--retune", help="Steps of tuning the adapter on the grid that ships.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any other option of the format.")
@click.option("--verify/--no-verify", default=True, help="Compare the folder with the run before it gets its name.")
def export(
    run: Path,
    format_: str,
    out: Path | None,
    assignments: tuple[str, ...],
    verify: bool,
    **flags: Any,
) -> None:
    """Write the trained model of RUN into a folder that other programs load.

    Options of a format: lavintk plugins show onnx.
    """
    from lavintk.export import export_run
    from lavintk.registry import Choice
    from lavintk.run import Run

    choice = Choice.parse(format_)
    opened = Run.open(run)
    target = out or run.with_name(f"{run.name}-{choice.name}")
    export_run(opened, _with_flags(choice, flags, assignments), target, verify=verify)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    click.echo(f"\n{target}: {size / 1e6:,.1f} MB")


def _with_flags(choice: Choice, flags: dict[str, Any], assignments: tuple[str, ...]) -> Choice:
    """Return ``choice`` with the flags and assignments as options of its own."""
    from lavintk.errors import OptionsError
    from lavintk.registry import Choice

    options = dict(choice.options) | {name: value for name, value in flags.items() if value is not None}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise OptionsError(f"--set {text}", ["expected key=value, for example mixed=layers.0.*>int8"])
        options[key.strip().replace("-", "_")] = value
    return Choice(choice.name, options)

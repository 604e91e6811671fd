"""``lavintk export``: write a trained run, or a model folder, in a format for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from lavintk.registry import Choice


@click.command()
@click.argument("run", metavar="RUN|MODEL", type=click.Path(path_type=Path))
@click.option("--peft", type=click.Path(path_type=Path), help="PEFT's LoRA folder on top of MODEL.")
@click.option("--format", "format_", default="onnx", show_default=True, help="onnx, hf, peft, gguf, ... with options.")
@click.option("--out", type=click.Path(path_type=Path), help="New folder.  [default: RUN-FORMAT or MODEL-FORMAT]")
@click.option("--quant", help="Grid of the linear layers: int4, int8, nf4, fp16, fp32.  [default: keep the trained]")
@click.option("--target", help="Where the folder will run, cpu or cuda: what was trained on nf4 stays nf4 for cuda.")
@click.option("--embed-quant", help="Grid of the embedding.")
@click.option("--head-quant", help="Grid of the output head.")
@click.option("--adapter", help="merge, side or auto.")
@click.option("--retune", help="Steps of tuning the adapter on the grid that ships.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any other option of the format.")
@click.option("--verify/--no-verify", default=True, help="Compare the folder with the model before it gets its name.")
@click.option("--data", help="Records to compare on, FORMAT:PATH.  [default: the run's; without any, no comparison]")
def export(
    run: Path,
    peft: Path | None,
    format_: str,
    out: Path | None,
    assignments: tuple[str, ...],
    verify: bool,
    data: str | None,
    **flags: Any,
) -> None:
    """Write the trained model of RUN into a folder that other programs load.

    MODEL is a folder with a Llama-like language model of transformers', which may have been trained by any program.

    Options of a format: lavintk plugins show onnx.
    """
    from lavintk.export import export as write
    from lavintk.registry import Choice

    choice = Choice.parse(format_)
    target = out or (run if run.name else run.absolute()).with_name(f"{run.absolute().name}-{choice.name}")
    records = None if data is None else Choice.parse(data)
    write(run, _with_flags(choice, flags, assignments), target, peft=peft, verify=verify, data=records)
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

"""``lavintk models``: the models lavintk knows how to get, and quantized bases that are kept on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click


@click.group()
def models() -> None:
    """List known models, fetch and quantize them."""


@models.command("list")
def list_known() -> None:
    """List the models known by name, whether they are here already, and the quantized bases kept on disk."""
    from rich.console import Console
    from rich.table import Table

    from lavintk.models.catalog import list_models

    table = Table(box=None, pad_edge=False)
    for column in ("name", "kind", "here", "licence", "what it is"):
        table.add_column(column)
    for entry, installed in list_models():
        table.add_row(entry.name, entry.kind, "yes" if installed else "no", entry.licence, entry.summary)
    Console().print(table)
    _print_kept()


@models.command()
@click.argument("name")
def pull(name: str) -> None:
    """Fetch the model NAME (a known name or a hub id) into the cache and print where it lies."""
    from lavintk.models.catalog import locate

    click.echo(locate(name))


@models.command()
@click.argument("model")
@click.option("--quant", default="nf4", show_default=True, help="Quantizer: nf4, int8, int4:block_size=64, ...")
@click.option(
    "--embed-quant", default="none", show_default=True, help="Quantizer of the embedding and the output head."
)
@click.option(
    "--precision", default="auto", show_default=True, help="Compute type to round to: auto, bf16, fp16, fp32."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--delta", help="Published difference that is added to the weights, such as Vicuna's; as model.delta.")
@click.option(
    "--delta-compat", type=click.Choice(["none", "lavin"]), default="none", show_default=True,
    help="As model.delta_compat.",
)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), help="Put it there and not into the cache, to be copied.")
def quantize(
    model: str,
    quant: str,
    embed_quant: str,
    precision: str,
    device: str,
    delta: str | None,
    delta_compat: Literal["none", "lavin"],
    out: Path | None,
) -> None:
    """Quantize MODEL and keep it on disk, so that training, chat and export start without doing it.

    MODEL is a known name, a folder, a .gguf file or a hub id. It is found again by a run with the same quantizers,
    compute type and kind of device.
    """
    from typing import Any, cast

    from rich.console import Console

    from lavintk.devices import PRECISIONS, pick_device, pick_precision
    from lavintk.models.base_cache import gigabytes, make_base
    from lavintk.plugins import installed_plugins
    from lavintk.registry import Choice
    from lavintk.report import duration, loading_bar

    if precision not in ("auto", *PRECISIONS):
        raise click.BadParameter(f"{precision!r} is none of auto, {', '.join(PRECISIONS)}", param_hint="--precision")
    target = pick_device(device)
    with loading_bar(Console(stderr=True), f"quantizing {model}") as progress:
        made = make_base(
            model, installed_plugins(), Choice.parse(quant), Choice.parse(embed_quant),
            device=target, dtype=pick_precision(precision, target, training=True), delta=delta,
            delta_compat=delta_compat, out=out, progress=cast("Any", progress),
        )  # fmt: skip
    how = "there already" if made.was_there else f"made in {duration(made.seconds)}"
    click.echo(f"{made.kept.folder}\n{gigabytes(made.kept.nbytes)}, {how}")


@models.command()
@click.argument("folders", nargs=-1, required=True, metavar="FOLDER...")
def remove(folders: tuple[str, ...]) -> None:
    """Delete quantized bases that are kept on disk.

    FOLDER is what `lavintk models list` calls it, or how that begins. Runs quantize their base again when they need it.
    """
    from lavintk.models.base_cache import gigabytes, remove_kept

    for folder in folders:
        name, nbytes = remove_kept(folder)
        click.echo(f"removed {name}, {gigabytes(nbytes)}")


def _print_kept() -> None:
    """Print a table of the kept bases, if there are any."""
    from rich.console import Console
    from rich.table import Table

    from lavintk.cache import cache_folder

    if not any((cache_folder() / "quantized").glob("*")):
        return  # without importing torch
    from lavintk.models.base_cache import describe_kept, gigabytes, kept_bases, quantized_folder

    table = Table(box=None, pad_edge=False)
    for column in ("quantized base", "stored as", "size", "made", "folder"):
        table.add_column(column, overflow="fold")
    for kept in kept_bases():
        manifest = kept.manifest
        table.add_row(
            manifest["model"], describe_kept(kept), gigabytes(kept.nbytes), manifest["made"][:10], kept.folder.name
        )
    Console().print()
    Console().print(table)
    Console().print(
        f"in {quantized_folder()}; `lavintk models remove FOLDER` deletes one",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )

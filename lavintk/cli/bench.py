"""``lavintk bench``: how fast an exported folder answers on this machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from lavintk.runtime.bench import Speed

COUNT = click.IntRange(min=1)


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--prompt-tokens", type=COUNT, default=128, show_default=True, help="Length of the prompt.")
@click.option("--new-tokens", type=click.IntRange(min=2), default=128, show_default=True, help="Length of the answer.")
@click.option("--batch", type=COUNT, default=1, show_default=True, help="Prompts answered at a time.")
@click.option("--repeats", type=COUNT, default=5, show_default=True, help="Rounds; the median counts.")
@click.option("--threads", type=COUNT, help="CPU threads.  [default: the physical cores]")
@click.option(
    "--spinning/--no-spinning",
    default=True,
    show_default=True,
    help="Let threads keep their core busy while they wait; worse where other programs run.",
)
@click.option("--modality", type=click.Choice(["text", "image"]), help="Whose decoder runs, where DIR has two.")
@click.option("--device", help="auto, cpu, cuda or cuda:N.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def bench(
    folder: Path,
    prompt_tokens: int,
    new_tokens: int,
    batch: int,
    repeats: int,
    threads: int | None,
    spinning: bool,
    modality: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Measure the exported folder DIR: time to the first token, decoding speed, memory and sizes."""
    from lavintk.runtime.bench import bench as measure
    from lavintk.runtime.sessions import providers_for

    speed = measure(
        folder,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch=batch,
        repeats=repeats,
        threads=threads,
        spinning=spinning,
        providers=providers_for(device),
        modality=modality,
    )
    if as_json:
        click.echo(json.dumps(asdict(speed)))
    else:
        _show(speed)


def _show(speed: Speed) -> None:
    rows = "1 row" if speed.batch == 1 else f"{speed.batch} rows"
    threads = "as many threads as onnxruntime takes" if speed.threads is None else f"{speed.threads} threads"
    click.echo(f"onnxruntime {speed.onnxruntime}, {', '.join(speed.providers)}, {threads}")
    click.echo(f"{rows} of {speed.prompt_tokens} + {speed.new_tokens} tokens, median of {speed.repeats} rounds")
    click.echo(f"time to first token  {1000 * speed.first_token_seconds:,.1f} ms")
    click.echo(f"prompt               {speed.prompt_tokens_per_second:,.1f} tokens/s")
    click.echo(f"decode               {speed.decode_tokens_per_second:,.1f} tokens/s")
    if speed.image_seconds is not None:
        click.echo(f"image                {1000 * speed.image_seconds:,.1f} ms")
    click.echo(f"load                 {speed.load_seconds:,.2f} s")
    click.echo(f"peak memory          {speed.peak_memory_bytes / 1e6:,.0f} MB of the process")
    click.echo(f"folder               {speed.folder_bytes / 1e6:,.1f} MB")
    for name, size in speed.sizes.items():
        click.echo(f"  {name}  {_size(size)}")


def _size(count: int) -> str:
    """Return a file's size; graphs without their weights have less than a megabyte."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"

"""``lavintk data``: look at records before training on them, and put files together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.group()
def data() -> None:
    """Look at data before training on it, and merge files."""


@data.command()
@click.argument("data")
@click.option("--model", default="smollm2-135m-instruct", show_default=True, help="Whose tokenizer and template.")
@click.option("--split", default="train", show_default=True, help="Split of the data.")
@click.option("--template", default="auto", show_default=True, help="auto, chat, plain, lavin or a .jinja file.")
@click.option("--system", help="System message for conversations without one.")
@click.option("--visual-tokens", default=6, show_default=True, help="Tokens per image.")
@click.option("--max-length", default=512, show_default=True, help="Tokens per row; longer rows are left out.")
@click.option("--count", default=3, show_default=True, help="Records to print.")
def preview(
    data: str,
    model: str,
    split: str,
    template: str,
    system: str | None,
    visual_tokens: int,
    max_length: int,
    count: int,
) -> None:
    """Print records of DATA (FORMAT:PATH) as the model will see them; trained tokens are coloured."""
    from rich.console import Console

    from lavintk.data.preview import render_preview
    from lavintk.data.template import make_template
    from lavintk.data.tokenize import tokenize_all
    from lavintk.models.catalog import locate
    from lavintk.models.tokenizer import load_tokenizer
    from lavintk.registry import Choice
    from lavintk.run import load_records

    records = load_records(Choice.parse(data), split)
    tokenizer = load_tokenizer(locate(model))
    made: Any = make_template(tokenizer, template, system=system, visual_tokens=visual_tokens)
    rows, report = tokenize_all(records, made, max_length)
    render_preview(rows, tokenizer, count, Console(), report)


@data.command()
@click.option("--alpaca", type=click.Path(path_type=Path), multiple=True, help="File with instruction, input, output.")
@click.option("--llava", type=click.Path(path_type=Path), multiple=True, help="File with LLaVA's conversations.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File to write, for example all_data.json.")
@click.option("--images", type=click.Path(path_type=Path), help="Folder with train2014/; each image is looked for.")
def merge(alpaca: tuple[Path, ...], llava: tuple[Path, ...], out: Path, images: Path | None) -> None:
    """Merge files of Alpaca's and LLaVA's form into one all_data.json, as LaVIN trains its chat models on.

    --alpaca and --llava may be given several times. Conversations keep all their turns. Images are those of COCO's
    train2014. Train on the result with --data lavin:FILE.
    """
    from lavintk.data.merge import merge as merge_files
    from lavintk.errors import LavintkError

    if not alpaca and not llava:
        raise LavintkError("there is nothing to merge: name files with --alpaca and --llava")
    merged = merge_files(alpaca, llava, out, images)
    click.echo(
        f"{out}: {len(merged.rows):,} rows ({merged.alpaca:,} from alpaca, {merged.llava:,} from llava; "
        f"{merged.several_turns:,} with several turns, {merged.with_image:,} with an image)"
    )

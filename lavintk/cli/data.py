"""``lavintk data``: look at records before training on them."""

from __future__ import annotations

from typing import Any

import click


@click.group()
def data() -> None:
    """Look at data before training on it."""


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

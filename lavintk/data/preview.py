"""What training will see, for the eye: records after templating, trained tokens coloured, and the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.panel import Panel
from rich.text import Text

from lavintk.data.images import image_size
from lavintk.data.records import ImageSource
from lavintk.data.tokenize import TokenizedRecord, TokenReport
from lavintk.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console

    from lavintk.data.tokenizer import TextTokenizer

TRAINED, IMAGE = "bold green", "magenta"
TEXT_RUN, TRAINED_RUN, IMAGE_RUN = range(3)


def render_preview(
    rows: Sequence[TokenizedRecord],
    tokenizer: TextTokenizer,
    count: int,
    console: Console,
    report: TokenReport | None = None,
) -> None:
    """Print the first ``count`` rows and the report.

    Trained text is green; where the console shows no colours it stands between « and ».

    :param report: from :func:`~lavintk.data.tokenize.tokenize_all`; without it, that of ``rows`` as they are.
    """
    for row in rows[:count]:
        text = render_row(row, tokenizer, brackets=console.color_system is None)
        title = f"{row.id} · {len(row)} tokens, {row.trained} trained"
        console.print(Panel(text, title=Text(title), title_align="left"))
    console.print(report or TokenReport.of(rows))


def render_row(row: TokenizedRecord, tokenizer: TextTokenizer, brackets: bool = False) -> Text:
    """Return the text of a row with its trained parts marked and images shown by their size.

    :param brackets: mark by « and » besides the colour.
    """
    text = Text()
    images = iter(row.images)
    per_image = len(row.visual_slots) // max(1, len(row.images))
    for kind, start, end in _runs(row):
        if kind == IMAGE_RUN:
            for _ in range((end - start) // max(1, per_image)):
                text.append(f"[image {_size(next(images), row.id)}, {per_image} tokens]", IMAGE)
            continue
        shown = _decoded(tokenizer, row.input_ids[:end], start)
        if kind == TRAINED_RUN:
            text.append(f"«{shown}»" if brackets else shown, TRAINED)
        else:
            text.append(shown)
    return text


def _runs(row: TokenizedRecord) -> Iterator[tuple[int, int, int]]:
    """Yield kind, first and end of neighbouring tokens of one kind."""
    slots = set(row.visual_slots)
    trained = [False, *(label == id for label, id in zip(row.labels[:-1], row.input_ids[1:], strict=True))]
    kinds = [IMAGE_RUN if at in slots else TRAINED_RUN if trained[at] else TEXT_RUN for at in range(len(row))]
    start = 0
    for kind, group in groupby(kinds):
        end = start + len(list(group))
        yield kind, start, end
        start = end


def _decoded(tokenizer: TextTokenizer, ids: list[int], start: int) -> str:
    """Return the text of ``ids[start:]``; decoders trim the first token, so what is before is decoded too."""
    whole, before, alone = (
        str(tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for part in (ids, ids[:start], ids[start:])
    )
    return whole[len(before) :] if whole.startswith(before) else alone


def _size(source: ImageSource, record_id: str) -> str:
    try:
        return "{} x {}".format(*image_size(source, record_id))
    except DataError:
        return "unreadable"

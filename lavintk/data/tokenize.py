"""Records to rows of token ids with labels, and a report of what that did to the data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from lavintk.data.labels import IGNORED
from lavintk.data.records import ImageSource, Record
from lavintk.errors import DataError

if TYPE_CHECKING:
    from rich.table import Table

    from lavintk.data.template import Template

TooLong = Literal["drop", "truncate", "error"]


@dataclass(frozen=True)
class TokenizedRecord:
    """One row: T tokens of one record.

    :param input_ids: T ids; visual slots hold any id.
    :param labels: T ids, already shifted: ``labels[i]`` is what token ``i`` must predict, or
        :data:`~lavintk.data.labels.IGNORED`.
    :param visual_slots: where in ``input_ids`` the visual tokens go, images in order.
    :param condition: :data:`~lavintk.data.labels.TEXT` or :data:`~lavintk.data.labels.IMAGE`.
    :param trained: number of labels that are not ignored.
    :param straddling: tokens across the boundary of an answer, which are not trained.
    :param last_turn_only: the template rewrites history, so only the last answer is trained.
    """

    id: str
    input_ids: list[int]
    labels: list[int]
    visual_slots: list[int]
    images: tuple[ImageSource, ...]
    condition: int
    trained: int
    straddling: int = 0
    last_turn_only: bool = False

    def __len__(self) -> int:
        """T, the number of tokens."""
        return len(self.input_ids)

    def cut(self, length: int) -> TokenizedRecord:
        """Return the first ``length`` tokens; the last of them has nothing left to predict.

        :raises DataError: visual slots would be cut off.
        """
        if self.visual_slots and self.visual_slots[-1] >= length:
            raise DataError("the data", [f"record {self.id!r}: cutting it to {length} tokens cuts its image off"])
        labels = [*self.labels[: length - 1], IGNORED]
        trained = sum(label != IGNORED for label in labels)
        return replace(self, input_ids=self.input_ids[:length], labels=labels, trained=trained)


@dataclass(frozen=True)
class TokenReport:
    """What became of the records.

    :param rows: rows that remain.
    :param dropped: ids of records left out because they are too long.
    :param truncated: ids of records that were cut.
    :param straddled: rows with a token across the boundary of an answer.
    :param last_turn_only: rows in which only the last answer is trained.
    :param tokens: tokens of all rows, visual slots included.
    :param lengths: shortest, median, 95th percentile and longest row that remains, in tokens.
    :param longest: the longest record before anything was dropped or cut.
    """

    rows: int
    tokens: int
    trained: int
    images: int
    lengths: tuple[int, int, int, int]
    longest: int
    max_length: int = 0
    dropped: tuple[str, ...] = ()
    truncated: tuple[str, ...] = ()
    straddled: int = 0
    last_turn_only: int = 0

    @classmethod
    def of(cls, rows: Sequence[TokenizedRecord]) -> TokenReport:
        """Return the report of rows that are all used as they are."""
        lengths = sorted(len(row) for row in rows) or [0]
        at = [lengths[round(share * (len(lengths) - 1))] for share in (0, 0.5, 0.95, 1)]
        return cls(
            rows=len(rows),
            tokens=sum(len(row) for row in rows),
            trained=sum(row.trained for row in rows),
            images=sum(len(row.images) for row in rows),
            lengths=(at[0], at[1], at[2], at[3]),
            longest=at[3],
            straddled=sum(row.straddling > 0 for row in rows),
            last_turn_only=sum(row.last_turn_only for row in rows),
        )

    def __rich__(self) -> Table:
        """Return the report as a table for the terminal."""
        from rich.table import Table

        table = Table("data", "", box=None, pad_edge=False, show_header=False)
        share = self.trained / self.tokens if self.tokens else 0.0
        table.add_row("rows", f"{self.rows:,}")
        table.add_row("images", f"{self.images:,}")
        table.add_row("tokens", f"{self.tokens:,}, of them trained {self.trained:,} ({share:.1%})")
        table.add_row("length", "min {:,}, median {:,}, 95 % {:,}, max {:,}".format(*self.lengths))
        limit = f"longer than {self.max_length:,} tokens"
        for count, text in (
            (len(self.dropped), f"left out, {limit} (longest {self.longest:,}): {_named(self.dropped)}"),
            (len(self.truncated), f"cut, {limit} (longest {self.longest:,}): {_named(self.truncated)}"),
            (self.straddled, "with a token across the boundary of an answer, which is not trained"),
            (self.last_turn_only, "with only the last answer trained: the chat template rewrites history"),
        ):
            if count:
                table.add_row("[yellow]note[/]", f"{count:,} {'row' if count == 1 else 'rows'} {text}")
        return table


@dataclass
class _Rows:
    """What :func:`tokenize_all` gathers."""

    kept: list[TokenizedRecord] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    truncated: list[str] = field(default_factory=list)
    untrained: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    longest: int = 0


def tokenize_all(
    records: Iterable[Record], template: Template, max_length: int, too_long: TooLong = "drop"
) -> tuple[list[TokenizedRecord], TokenReport]:
    """Return the rows of ``records`` in order and the report.

    :param max_length: most tokens of a row, visual slots included.
    :param too_long: what happens to longer rows: they are left out, cut at the end, or are a fault. The
        report counts and names them.
    :raises DataError: all faulty records: no trained token, an image that does not fit, a conversation that
        the template refuses, too long with ``too_long="error"``; or no row remains.
    """
    rows = _Rows()
    for record in records:
        try:
            _add(rows, template.tokenize_record(record), max_length, too_long)
        except DataError as error:
            rows.faults += error.faults
    _check(rows, max_length)
    report = replace(
        TokenReport.of(rows.kept),
        longest=rows.longest,
        max_length=max_length,
        dropped=tuple(rows.dropped),
        truncated=tuple(rows.truncated),
    )
    return rows.kept, report


def _add(rows: _Rows, row: TokenizedRecord, max_length: int, too_long: TooLong) -> None:
    rows.longest = max(rows.longest, len(row))
    if len(row) > max_length:
        if too_long == "error":
            raise DataError("the data", [f"record {row.id!r}: {len(row)} tokens, at most {max_length} are allowed"])
        if too_long == "drop":
            rows.dropped.append(row.id)
            return
        rows.truncated.append(row.id)
        row = row.cut(max_length)
    if not row.trained:
        rows.untrained.append(row.id)
    rows.kept.append(row)


def _check(rows: _Rows, max_length: int) -> None:
    cut = set(rows.truncated)
    reasons = {True: f"; its answer lies behind the {max_length} tokens that are kept", False: ""}
    untrained = [f"record {name!r}: no trained token{reasons[name in cut]}" for name in rows.untrained]
    if rows.kept and len(untrained) == len(rows.kept) and not rows.faults:
        advice = "Labels are all masked: nothing can be learned. Do the records end with an assistant message?"
        raise DataError("the data (labels all masked)", untrained, advice)
    if faults := rows.faults + untrained:
        raise DataError("the data", faults)
    if not rows.kept and rows.dropped:
        fault = f"all {len(rows.dropped)} records are longer than {max_length} tokens (longest: {rows.longest})"
        raise DataError("the data", [fault], "Raise max_length.")
    if not rows.kept:
        raise DataError("the data", ["there are no records"])


def _named(ids: Sequence[str], shown: int = 5) -> str:
    more = f" and {len(ids) - shown:,} more" if len(ids) > shown else ""
    return ", ".join(ids[:shown]) + more

"""``alpaca``: instruction, optional input, output. For text-only tuning; a JSON list or JSONL."""

from __future__ import annotations

from lavintk.data.records import Message, Record
from lavintk_formats.reading import FileOptions, Row, read_records


class AlpacaFormat:
    """Rows ``{"instruction", "input", "output"}``; the input follows the instruction on a new line."""

    def __init__(self, options: FileOptions) -> None:
        self.options = options

    def load(self, split: str) -> list[Record]:
        """Return all records, whatever the split.

        :raises DataError: every fault of the file.
        """
        return read_records(self.options, _record)


def _record(row: Row) -> Record:
    parts = (row.text("instruction"), row.text("input", required=False))
    question = "\n".join(part for part in parts if part)
    return Record(row.identifier(), (Message("user", question), Message("assistant", row.text("output"))))

"""``jsonl``: any rows with a question and an answer, under names that the options give."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from lavintk.data.records import Message, Record
from lavintk.errors import did_you_mean
from lavintk_formats.reading import FileOptions, Row, read_records


@dataclass(frozen=True)
class JsonlOptions(FileOptions):
    """Which field of a row holds what."""

    prompt: str = field(default="prompt", metadata={"help": "field with the question"})
    answer: str = field(default="answer", metadata={"help": "field with the answer; empty: there are none"})
    image: str = field(default="image", metadata={"help": "field with an image path, a data: URL or a list"})
    id: str = field(default="id", metadata={"help": "field with the id"})
    system: str = field(default="system", metadata={"help": "field with the system message"})


class JsonlFormat:
    """Rows with the fields that the options name; image paths are relative to the file."""

    def __init__(self, options: JsonlOptions) -> None:
        self.options = options

    def load(self, split: str) -> list[Record]:
        """Return all records, whatever the split.

        :raises DataError: every fault of the file, among them a field given as an option that no row has.
        """
        present: dict[str, None] = {}

        def convert(row: Row) -> Record:
            present.update(dict.fromkeys(row.fields))
            return self._record(row)

        return read_records(self.options, convert, check=lambda: self._unused(list(present)))

    def _record(self, row: Row) -> Record:
        messages = [Message("user", row.text(self.options.prompt))]
        if system := row.text(self.options.system, required=False):
            messages.insert(0, Message("system", system))
        if self.options.answer:
            messages.append(Message("assistant", row.text(self.options.answer)))
        images = row.images(self.options.image, row.fields.get(self.options.image))
        return Record(row.identifier(self.options.id), tuple(messages), images)

    def _unused(self, present: list[str]) -> list[str]:
        """An optional field under a wrong name would otherwise be left out silently."""
        faults = []
        for option in dataclasses.fields(JsonlOptions):
            name = getattr(self.options, option.name)
            if option.name in ("image", "id", "system") and name != option.default and name not in present:
                fields = f"fields: {', '.join(present)}.{did_you_mean(name, present)}"
                faults.append(f"no row has the field {name!r} (option {option.name}); {fields}")
        return faults

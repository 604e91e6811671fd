"""``llava``: LLaVA's conversation files, a JSON list (or JSONL) beside a folder of images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lavintk.data.records import Message, Record, Role
from lavintk_formats.reading import FileOptions, Row, conversation, describe, read_records

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True)
class LlavaOptions(FileOptions):
    """The file and where its images lie."""

    images: Path | None = field(default=None, metadata={"help": "image folder; default: the file's own folder"})


class LlavaFormat:
    """Rows ``{"id", "image", "conversations": [{"from": "human"|"gpt", "value": ...}, ...]}``."""

    def __init__(self, options: LlavaOptions) -> None:
        self.options = options

    def load(self, split: str) -> list[Record]:
        """Return all records, whatever the split.

        :raises DataError: every fault of the file, missing images among them.
        """
        return read_records(self.options, self._record)

    def _record(self, row: Row) -> Record:
        folder = self.options.images.expanduser() if self.options.images else None
        images = row.images("image", row.fields.get("image"), folder)
        messages = conversation(row, "conversations", row.fields.get("conversations"), llava_message)
        return Record(row.identifier(), messages, images)


def llava_message(row: Row, name: str, turn: Mapping[str, Any]) -> Message | None:
    """Return the message of a turn ``{"from", "value"}``, or None and a fault."""
    role, text = turn.get("from"), turn.get("value")
    if not isinstance(role, str) or role not in ROLES:
        row.fault(f"{name}.from", f"expected one of {', '.join(ROLES)}, found {describe(role)}")
    elif not isinstance(text, str):
        row.fault(f"{name}.value", f"expected text, found {describe(text)}")
    else:
        return Message(ROLES[role], text)
    return None

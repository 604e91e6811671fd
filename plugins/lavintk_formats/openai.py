"""``openai``: chat messages, one conversation per line, as OpenAI's fine-tuning files have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lavintk.data.records import IMAGE_MARKER, ImageSource, Message, Record, Role
from lavintk_formats.reading import FileOptions, Row, conversation, describe, read_records

ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
UNSUPPORTED = ("tool_calls", "function_call")
"""Keys of a message that would be lost; a row that uses them is refused."""


class OpenAIFormat:
    """Rows ``{"messages": [{"role", "content"}, ...]}``; content is text or parts.

    Images are parts ``image_url`` (or ``image``) with a path relative to the file, or a ``data:`` URL.
    """

    def __init__(self, options: FileOptions) -> None:
        self.options = options

    def load(self, split: str) -> list[Record]:
        """Return all records, whatever the split.

        :raises DataError: every fault of the file, missing images among them.
        """
        return read_records(self.options, _record)


def _record(row: Row) -> Record:
    images: list[ImageSource] = []

    def message(row: Row, name: str, turn: Mapping[str, Any]) -> Message | None:
        return _message(row, name, turn, images)

    for name in ("tools", "functions"):
        if row.fields.get(name):
            row.fault(name, "tools are not supported; remove them or leave the row out")
    messages = conversation(row, "messages", row.fields.get("messages"), message)
    return Record(row.identifier(), messages, tuple(images))


def _message(row: Row, name: str, turn: Mapping[str, Any], images: list[ImageSource]) -> Message | None:
    role = turn.get("role")
    if not isinstance(role, str) or role not in ROLES:
        row.fault(f"{name}.role", f"expected one of {', '.join(ROLES)}, found {describe(role)}")
        return None
    for key in UNSUPPORTED:
        if turn.get(key):
            row.fault(f"{name}.{key}", "tools are not supported; remove them or leave the row out")
    if turn.get("weight", 1) != 1:
        row.fault(f"{name}.weight", f"expected 1 (every answer is trained), found {describe(turn['weight'])}")
    content = turn.get("content")
    if isinstance(content, list):
        parts = [_part(row, f"{name}.content[{i}]", part, images) for i, part in enumerate(content)]
        content = "".join(parts)
    if not isinstance(content, str):
        row.fault(f"{name}.content", f"expected text or a list of parts, found {describe(content)}")
        return None
    return Message(ROLES[role], content)


def _part(row: Row, name: str, part: object, images: list[ImageSource]) -> str:
    """Return the text of a part; an image becomes a marker and is added to ``images``."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or kind not in ("text", "image_url", "image"):
        row.fault(name, f"expected a part of type text, image_url or image, found {describe(part)}")
        return ""
    if kind == "text":
        text = part.get("text")
        if not isinstance(text, str):
            row.fault(f"{name}.text", f"expected text, found {describe(text)}")
            return ""
        return text
    source = part.get("image_url") if kind == "image_url" else part.get("image", part.get("url", part.get("path")))
    if isinstance(source, dict):
        source = source.get("url")
    if not source:
        row.fault(f"{name}.{kind}", f"expected a path or a data: URL, found {describe(source)}")
    images.extend(row.images(f"{name}.{kind}", source))
    return IMAGE_MARKER

"""The one form that every data format is read into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]
IMAGE_MARKER = "<image>"
"""Stands in a message's text where an image belongs."""

ImageSource = Path | bytes
"""An image file, or the encoded bytes of one (PNG, JPEG, ...)."""


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: Role
    text: str


@dataclass(frozen=True)
class Record:
    """A conversation with its images.

    :param id: unique within its file; errors name it.
    :param messages: ends with an assistant message where an answer is known.
    :param images: in the order of the markers ``<image>`` in the messages; images without any marker belong at the
        start of the first user message.
    :param meta: what an evaluation may need, for example the choices and the subject of a question.
    """

    id: str
    messages: tuple[Message, ...]
    images: tuple[ImageSource, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        """The text of the last message if the assistant speaks it, else an empty string."""
        return self.messages[-1].text if self.messages and self.messages[-1].role == "assistant" else ""

    @property
    def question(self) -> str:
        """The text of the last user message, or an empty string."""
        return next((m.text for m in reversed(self.messages) if m.role == "user"), "")

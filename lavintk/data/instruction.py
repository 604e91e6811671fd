"""LaVIN's Instruction/Response form, for language models without a chat template."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from lavintk.data.layout import (
    Layout,
    Messages,
    Piece,
    RefusedError,
    SlotsPiece,
    TextPiece,
    TokenPiece,
    place_markers,
    split_at_markers,
)
from lavintk.data.records import IMAGE_MARKER
from lavintk.errors import ModelError

if TYPE_CHECKING:
    from lavintk.data.tokenizer import TextTokenizer


class InstructionForm:
    r"""``Instruction: {question}\nResponse:{answer}`` and EOS, turn after turn, each tokenized by itself.

    Prompt and answer are tokenized jointly, as LaVIN does. A system message stands above the first turn.

    :param lavin: LaVIN's layout: ``Image: `` and the slots, or ``Image: N/A``, in front of the turns.
    """

    def __init__(self, tokenizer: TextTokenizer, lavin: bool, image_prefix: str, image_suffix: str) -> None:
        if not isinstance(tokenizer.eos_token_id, int):
            raise ModelError("the tokenizer has no EOS token, which the Instruction/Response form ends answers with")
        self.eos, self.lavin = tokenizer.eos_token_id, lavin
        self.image_prefix, self.image_suffix = image_prefix, image_suffix
        self.stop_ids: tuple[int, ...] = (self.eos,)

    def conversation(self, messages: Messages, images: int, raw: bool) -> Layout:
        """Return the row; each answer and the EOS after it are trained."""
        return self._layout(messages, images, raw)

    def prompt(self, messages: Messages, images: int, raw: bool) -> Layout:
        """Return the row up to ``Response:``."""
        return self._layout(messages, images, raw)

    def _layout(self, messages: Messages, images: int, raw: bool) -> Layout:
        pieces: list[Piece] = []
        if self.lavin:
            messages = [replace(message, text=_without_markers(message.text)) for message in messages]
            for _ in range(images):
                pieces += [TextPiece("Image: "), SlotsPiece()]
            if not images:
                pieces.append(TextPiece("Image: N/A"))
        else:
            messages = place_markers(messages, images, self.image_prefix, self.image_suffix)
        prompt, asked = "", False
        for message in messages:
            if asked != (message.role == "assistant"):
                raise RefusedError("user and assistant messages must take turns, the user first")
            if message.role == "system":
                prompt = f"{message.text}\n"
            elif message.role == "user":
                prompt, asked = prompt + (message.text if raw else _wrapped(message.text)), True
            else:
                pieces += split_at_markers(prompt + message.text, [(len(prompt), len(prompt + message.text))])
                pieces.append(TokenPiece(self.eos))
                prompt, asked = "", False
        if asked:
            pieces += split_at_markers(prompt)
        return Layout(tuple(pieces))


def _without_markers(text: str) -> str:
    return re.sub(rf"{IMAGE_MARKER}\n|\n?{IMAGE_MARKER}", "", text)


def _wrapped(question: str) -> str:
    return f"Instruction: {question}\nResponse:"

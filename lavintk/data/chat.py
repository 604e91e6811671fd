"""Chat templates: where answers start and end, found by rendering the conversation turn by turn.

An answer starts where the generation prompt ends, whatever the template puts between the two, so that
training and generation see the same; it ends behind its end-of-turn token, which is learnt from a probe.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from lavintk.data.layout import (
    Layout,
    Messages,
    Piece,
    RefusedError,
    Span,
    TokenPiece,
    place_markers,
    split_at_markers,
)
from lavintk.data.records import Message
from lavintk.errors import ModelError

if TYPE_CHECKING:
    from lavintk.data.tokenizer import TextTokenizer


class ChatForm:
    """A chat template.

    :param template: text of the template; None for the tokenizer's own.
    :raises ModelError: it fails for a short conversation, or nothing ends an answer.
    """

    def __init__(self, tokenizer: TextTokenizer, template: str | None, image_prefix: str, image_suffix: str) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.image_prefix, self.image_suffix = image_prefix, image_suffix
        self._learn_end(self._probe())

    def check_system(self, system: str) -> None:
        """Refuse a template that cannot show a system message.

        :raises ModelError: it fails, or leaves the message out.
        """
        messages = [Message("system", system), Message("user", "a"), Message("assistant", "b")]
        advice = "Leave the system message out, or choose another template."
        try:
            rendered = self._render(messages)
        except RefusedError as error:
            raise ModelError(f"with a system message {error}. {advice}") from error
        if system.strip() not in rendered:
            raise ModelError(f"the chat template leaves the system message out. {advice}")

    def conversation(self, messages: Messages, images: int, raw: bool) -> Layout:
        """Return the row; each answer and its end of turn are trained."""
        messages = place_markers(messages, images, self.image_prefix, self.image_suffix)
        text = self._render(messages)
        spans = self._spans(messages, text)
        rewritten = spans is None and sum(message.role == "assistant" for message in messages) > 1
        if spans is None:
            text, spans = self._last_turn(messages, text)
        ending: tuple[Piece, ...] = (TokenPiece(self.stop_ids[0]),) if self.appended_eos else ()
        if ending:
            text = text[: spans[-1][1]]
        return Layout((*split_at_markers(text, spans), *ending), rewritten)

    def prompt(self, messages: Messages, images: int, raw: bool) -> Layout:
        """Return the row that ends with the generation prompt."""
        messages = place_markers(messages, images, self.image_prefix, self.image_suffix)
        return Layout(split_at_markers(self._render(messages, generate=True)))

    def _spans(self, messages: Messages, text: str) -> list[Span] | None:
        """Return the answers' spans in ``text``; None if a turn looks different once it is past."""
        spans = []
        for place, message in enumerate(messages):
            if message.role != "assistant":
                continue
            start = self._render(messages[:place], generate=True)
            when_last = text if place == len(messages) - 1 else self._render(messages[: place + 1])
            end = self._end(when_last, len(start), message.text)
            if end is None or not text.startswith(start) or text[:end] != when_last[:end]:
                return None
            spans.append((len(start), end))
        return spans

    def _last_turn(self, messages: Messages, text: str) -> tuple[str, list[Span]]:
        """Return the text and the span of the last answer.

        Where the generation prompt is not how the template starts an answer, the answer follows the
        generation prompt all the same, since that is what the model will be given.
        """
        start, answer = self._render(messages[:-1], generate=True), messages[-1].text
        end = self._end(text, len(start), answer) if text.startswith(start) else None
        if end is None:
            text = f"{start}{answer}{self.end_of_turn}"
            end = len(text)
        return text, [(len(start), end)]

    def _end(self, text: str, start: int, answer: str) -> int | None:
        """Return where the end of turn behind ``answer`` ends; None if ``text`` has no such answer."""
        answer = answer.strip()  # templates may trim
        place = text.find(answer, start)
        while place >= 0:
            ending = self._ending.match(text, place + len(answer))
            if ending:
                return ending.end()
            place = text.find(answer, place + 1)
        return None

    def _probe(self) -> str:
        """Return what the template renders behind an answer."""
        answer = "lavintk probe"
        try:
            rendered = self._render([Message("user", "a"), Message("assistant", answer)])
        except RefusedError as error:
            raise ModelError(f"{error}. Choose another template.") from error
        _, found, behind = rendered.rpartition(answer)
        if not found:
            raise ModelError(f"the chat template leaves the assistant's text out; it renders {behind!r}")
        return behind

    def _learn_end(self, behind: str) -> None:
        """Note what ends an answer: the first special token behind it, else the template's text and EOS."""
        ids = {str(token): number for number, token in self.tokenizer.added_tokens_decoder.items()}
        found = [(place, -len(name), name) for name in ids if (place := behind.find(name)) >= 0]
        eos = self.tokenizer.eos_token_id
        stop_ids = [eos] if isinstance(eos, int) else []
        if found:
            place, _, name = min(found)
            self.end_of_turn = behind[: place + len(name)].lstrip()
            stop_ids.append(ids[name])
        elif stop_ids:
            self.end_of_turn = behind.strip()
        else:
            raise ModelError("the chat template ends an answer with no special token, and there is no EOS token")
        self.appended_eos = not found
        self.stop_ids = tuple(dict.fromkeys(stop_ids))
        self._ending = re.compile(rf"\s*{re.escape(self.end_of_turn)}" if self.end_of_turn else r"(?=\s*\Z)")

    def _render(self, messages: Messages, generate: bool = False) -> str:
        from jinja2 import TemplateError

        shown = [{"role": message.role, "content": message.text} for message in messages]
        try:
            rendered: Any = self.tokenizer.apply_chat_template(
                shown, chat_template=self.template, tokenize=False, add_generation_prompt=generate
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise RefusedError(f"the chat template fails: {error}") from error
        return str(rendered)

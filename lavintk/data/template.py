"""Conversations to rows: a tokenizer's chat template, or LaVIN's Instruction/Response form.

Trained is the assistant's text and the end-of-turn token behind it, nothing else. The row up to an answer is
what generation is given (:meth:`Template.prompt`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavintk.data.chat import ChatForm
from lavintk.data.instruction import InstructionForm
from lavintk.data.labels import IGNORED, IMAGE, TEXT
from lavintk.data.layout import Encoder, Form, Layout, Messages, RefusedError, SlotsPiece
from lavintk.data.records import IMAGE_MARKER, Message, Record
from lavintk.data.tokenize import TokenizedRecord
from lavintk.errors import DataError, ModelError, did_you_mean

if TYPE_CHECKING:
    from lavintk.data.tokenizer import TextTokenizer

KINDS = ("auto", "chat", "lavin", "plain")


def make_template(
    tokenizer: TextTokenizer,
    kind: str = "auto",
    system: str | None = None,
    *,
    visual_tokens: int = 0,
    image_prefix: str = "",
    image_suffix: str = "\n",
) -> Template:
    r"""Return the template of a model.

    :param kind: ``"chat"``: the tokenizer's own chat template; ``"plain"``: ``Instruction: ...`` and
        ``Response:...`` with EOS; ``"lavin"``: the same in LaVIN's layout, images first behind ``Image: ``;
        ``"auto"``: chat if the tokenizer has a template, else plain; anything else: path of a Jinja file.
    :param system: system message of records that bring none.
    :param visual_tokens: visual slots per image; 0 refuses images.
    :param image_prefix: text in front of each image (not with ``lavin``).
    :param image_suffix: text behind each image, unless the message has it there already (not with ``lavin``).
    :raises ModelError: no such template, or the tokenizer or its template cannot be used.
    """
    if kind == "auto":
        kind = "chat" if tokenizer.chat_template else "plain"
    form: Form
    if kind in ("lavin", "plain"):
        form = InstructionForm(tokenizer, kind == "lavin", image_prefix, image_suffix)
    else:
        form = chat = ChatForm(tokenizer, _chat_template(tokenizer, kind), image_prefix, image_suffix)
        if system:
            chat.check_system(system)
    return Template(Encoder(tokenizer, visual_tokens), form, kind, system)


def _chat_template(tokenizer: TextTokenizer, kind: str) -> str | None:
    """Return the text of a template file, or None for the tokenizer's own."""
    if kind == "chat":
        if not tokenizer.chat_template:
            raise ModelError("the tokenizer has no chat template. Use 'plain', 'lavin' or a .jinja file.")
        return None
    path = Path(kind).expanduser()
    if not path.is_file():
        raise ModelError(
            f"no template {kind!r}: neither one of {', '.join(KINDS)} nor a file.{did_you_mean(kind, KINDS)}"
        )
    return path.read_text(encoding="utf-8")


class Template:
    """Turns records into rows of tokens; made by :func:`make_template`.

    :ivar kind: the kind in use, ``auto`` resolved.
    """

    def __init__(self, encoder: Encoder, form: Form, kind: str, system: str | None) -> None:
        self.encoder, self.form, self.kind, self.system = encoder, form, kind, system

    @property
    def visual_tokens(self) -> int:
        """Visual slots per image."""
        return self.encoder.visual_tokens

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a generated answer: EOS and the template's end of turn."""
        return self.form.stop_ids

    def tokenize_record(self, record: Record) -> TokenizedRecord:
        """Return the training row of ``record``; messages behind the last answer are left out.

        :raises DataError: markers that do not fit the images, or a conversation that the template refuses.
        """
        messages = self._messages(record)
        answers = [place for place, message in enumerate(messages) if message.role == "assistant"]
        if not answers:
            return self.prompt(record)
        return self._row(record, self._layout(record, messages[: answers[-1] + 1], self.form.conversation))

    def prompt(self, record: Record) -> TokenizedRecord:
        """Return the row up to where the last answer starts, or the next one if the user spoke last.

        Nothing in it is trained, earlier answers included.

        :raises DataError: as :meth:`tokenize_record`.
        """
        messages = self._messages(record)
        if messages and messages[-1].role == "assistant":
            messages = messages[:-1]
        row = self._row(record, self._layout(record, messages, self.form.prompt))
        return replace(row, labels=[IGNORED] * len(row), trained=0, straddling=0)

    def prompt_ids(self, record: Record) -> list[int]:
        """Return the ids of :meth:`prompt`: the training row's ids in front of the last answer."""
        return self.prompt(record).input_ids

    def _messages(self, record: Record) -> tuple[Message, ...]:
        messages = record.messages
        if self.system and (not messages or messages[0].role != "system"):
            messages = (Message("system", self.system), *messages)
        faults = []
        markers = sum(message.text.count(IMAGE_MARKER) for message in messages)
        if markers and markers != len(record.images):
            faults.append(f"{markers} markers {IMAGE_MARKER} in the text, {len(record.images)} images")
        if any(IMAGE_MARKER in message.text for message in messages if message.role != "user"):
            faults.append(f"the marker {IMAGE_MARKER} stands outside a user message")
        if record.images and not self.visual_tokens:
            faults.append("it has an image, but the model takes none")
        if not any(message.role == "user" for message in messages):
            faults.append("it has no user message")
        if faults:
            raise DataError("the data", [f"record {record.id!r}: {fault}" for fault in faults])
        return messages

    def _layout(self, record: Record, messages: Messages, form: Any) -> Layout:
        try:
            layout: Layout = form(messages, len(record.images), bool(record.meta.get("raw_prompt")))
        except RefusedError as error:
            raise DataError("the data", [f"record {record.id!r}: {error}"]) from error
        slots = sum(isinstance(piece, SlotsPiece) for piece in layout.pieces)
        if slots != len(record.images):
            fault = f"record {record.id!r}: the chat template shows {slots} of {len(record.images)} images"
            raise DataError("the data", [fault])
        return layout

    def _row(self, record: Record, layout: Layout) -> TokenizedRecord:
        tokens = self.encoder.encode(layout.pieces)
        following = zip(tokens.ids[1:], tokens.trained[1:], strict=True)
        labels = [id if trained else IGNORED for id, trained in following]
        return TokenizedRecord(
            id=record.id,
            input_ids=tokens.ids,
            labels=[*labels, IGNORED] if tokens.ids else [],
            visual_slots=tokens.slots,
            images=record.images,
            condition=IMAGE if record.images else TEXT,
            trained=sum(tokens.trained[1:]),
            straddling=tokens.straddling,
            last_turn_only=layout.last_turn_only,
        )

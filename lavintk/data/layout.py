"""What a row is made of before it becomes tokens, and how it becomes tokens.

Text is tokenized piece by piece: visual slots and single ids cut it. Which tokens are trained follows from
character spans, so it is exact: a token that lies across a boundary is not trained and is counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from lavintk.data.records import IMAGE_MARKER, Message
from lavintk.errors import ModelError

if TYPE_CHECKING:
    from lavintk.data.tokenizer import TextTokenizer

Span = tuple[int, int]
"""First character and the one after the last."""
SLOT_ID = 0
"""Id that stands in visual slots; the model overwrites its embedding."""


@dataclass(frozen=True)
class TextPiece:
    """Text that is tokenized by itself, with the spans that are trained, in order and disjoint."""

    text: str
    trained: tuple[Span, ...] = ()


@dataclass(frozen=True)
class SlotsPiece:
    """The visual slots of one image."""


@dataclass(frozen=True)
class TokenPiece:
    """One trained id, for example an end of sequence that no text stands for."""

    id: int


Piece = TextPiece | SlotsPiece | TokenPiece


@dataclass(frozen=True)
class Layout:
    """The pieces of a row.

    :param last_turn_only: the chat template rewrites earlier turns, so only the last answer is trained.
    """

    pieces: tuple[Piece, ...]
    last_turn_only: bool = False


Messages = Sequence[Message]


class Form(Protocol):
    """Turns messages into pieces. Markers fit the images, and there is a user message."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        ...

    def conversation(self, messages: Messages, images: int, raw: bool) -> Layout:
        """Return the row of a conversation that ends with an answer; answers are trained.

        :param images: images of the record; without markers they stand before the first question.
        :param raw: user messages are complete prompts.
        :raises RefusedError: the form cannot express the conversation.
        """
        ...

    def prompt(self, messages: Messages, images: int, raw: bool) -> Layout:
        """Return the row up to where the next answer starts."""
        ...


class RefusedError(Exception):
    """A form cannot express a conversation; says why."""


@dataclass
class Tokens:
    """Ids of a row, whether each is trained, the places of visual slots, and tokens across a boundary."""

    ids: list[int] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    straddling: int = 0

    def add(self, ids: Iterable[int], trained: Iterable[bool]) -> None:
        """Append tokens."""
        self.ids += ids
        self.trained += trained


def split_at_markers(text: str, trained: Sequence[Span] = ()) -> tuple[Piece, ...]:
    """Return the text pieces around the markers of images, and slots in the markers' place."""
    pieces: list[Piece] = []
    start = 0
    for segment in text.split(IMAGE_MARKER):
        if start:
            pieces.append(SlotsPiece())
        end = start + len(segment)
        if segment:
            inside = ((max(first, start), min(last, end)) for first, last in trained)
            spans = tuple((first - start, last - start) for first, last in inside if first < last)
            pieces.append(TextPiece(segment, spans))
        start = end + len(IMAGE_MARKER)
    return tuple(pieces)


def place_markers(messages: Messages, images: int, prefix: str, suffix: str) -> list[Message]:
    """Return the messages with text around each marker; markers are added if there are none."""
    if images and not any(IMAGE_MARKER in message.text for message in messages):
        first = next(place for place, message in enumerate(messages) if message.role == "user")
        marked = replace(messages[first], text=IMAGE_MARKER * images + messages[first].text)
        messages = [*messages[:first], marked, *messages[first + 1 :]]
    return [replace(message, text=_surrounded(message.text, prefix, suffix)) for message in messages]


def _surrounded(text: str, prefix: str, suffix: str) -> str:
    """Put ``prefix`` and ``suffix`` around the markers; data often has the suffix's newline already."""
    shown, *rest = text.split(IMAGE_MARKER)
    for following in rest:
        before = "" if prefix and shown.endswith(prefix) else prefix
        present = following.startswith(suffix) or (suffix.isspace() and not following and following is rest[-1])
        shown += f"{before}{IMAGE_MARKER}{'' if present else suffix}{following}"
    return shown


class Encoder:
    """A tokenizer that returns ids with exact character offsets.

    It works on a copy without post-processor: special tokens are placed here, and byte-level post-processors
    would take the space out of a token's offsets, which hides that a token lies across a boundary.

    :param tokenizer: any of transformers' tokenizers that is backed by ``tokenizers``.
    :param visual_tokens: slots per image.
    :raises ModelError: the tokenizer gives no offsets.
    """

    def __init__(self, tokenizer: TextTokenizer, visual_tokens: int) -> None:
        from tokenizers import Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(
                f"the tokenizer ({type(tokenizer).__name__}) gives no character offsets, which exact labels "
                "need. Use one that has a tokenizer.json."
            )
        self._backend: Any = Tokenizer.from_str(backend.to_str())
        self._backend.post_processor = None
        self._backend.no_truncation()
        self._backend.no_padding()
        # One int object per id: large data sets then cost one reference per token.
        self._ids = list(range(max(self._backend.get_vocab(with_added_tokens=True).values()) + 1))
        self._added = frozenset(self._backend.get_added_tokens_decoder())
        self.visual_tokens = visual_tokens
        self.bos = _wanted_bos(tokenizer)

    def encode(self, pieces: Iterable[Piece]) -> Tokens:
        """Return the tokens of ``pieces`` behind exactly one BOS, if the tokenizer wants one."""
        tokens = Tokens()
        if self.bos is not None:
            tokens.add([self.bos], [False])
        for piece in pieces:
            if isinstance(piece, TextPiece):
                self._add_text(tokens, piece)
            elif isinstance(piece, TokenPiece):
                tokens.add([self._ids[piece.id]], [True])
            else:
                tokens.slots += range(len(tokens.ids), len(tokens.ids) + self.visual_tokens)
                tokens.add([SLOT_ID] * self.visual_tokens, [False] * self.visual_tokens)
        return tokens

    def _add_text(self, tokens: Tokens, piece: TextPiece) -> None:
        encoding = self._backend.encode(piece.text, add_special_tokens=False)
        ids, trained = [self._ids[i] for i in encoding.ids], [False] * len(encoding.ids)
        for place, (start, end) in enumerate(encoding.offsets if piece.trained else ()):
            if ids[place] in self._added:  # some swallow the white space behind them (AddedToken.rstrip)
                end = start + len(piece.text[start:end].rstrip())
            for first, last in piece.trained:
                if first <= start and end <= last and start < last:
                    trained[place] = True
                elif start < last and first < end:
                    tokens.straddling += 1
        if self.bos is not None and tokens.ids == [self.bos] == ids[:1]:  # the template's text brings its own
            ids, trained = ids[1:], trained[1:]
        tokens.add(ids, trained)


def _wanted_bos(tokenizer: TextTokenizer) -> int | None:
    """Return the BOS id if the tokenizer puts one in front by itself."""
    bos = tokenizer.bos_token_id
    with_special: Any = tokenizer("a")["input_ids"]
    without: Any = tokenizer("a", add_special_tokens=False)["input_ids"]
    return bos if bos is not None and with_special[:1] == [bos] != without[:1] else None

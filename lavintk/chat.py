"""A conversation with a trained or exported model, turn by turn; ``lavintk chat`` is a terminal around it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lavintk.answering import RecordAnswerer
from lavintk.data.records import IMAGE_MARKER, ImageSource, Message, Record
from lavintk.errors import DataError, ModelError
from lavintk.sampling import Sampling

if TYPE_CHECKING:
    from lavintk.models.build import Assembly


class Conversation:
    """What was said so far, and a model that goes on.

    :param model: a loaded run's assembly, or anything that answers records, such as an exported model.
    :param system: message put in front; None leaves it to the model's template.
    :param sampling: its seed is raised by one with every turn, so a question asked again may be answered otherwise.
    """

    def __init__(
        self,
        model: RecordAnswerer | Assembly,
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        max_new_tokens: int = 512,
    ) -> None:
        self.answerer = model if isinstance(model, RecordAnswerer) else _answerer(model)
        self.sampling, self.max_new_tokens = sampling or Sampling(), max_new_tokens
        self._system = (Message("system", system),) if system else ()
        self._waiting: list[ImageSource] = []
        self.reset()

    @property
    def record(self) -> Record:
        """The conversation so far."""
        return Record("conversation", self._messages, self._images)

    def reset(self) -> None:
        """Forget what was said, images included; the system message stays."""
        self._messages: tuple[Message, ...] = self._system
        self._images: tuple[ImageSource, ...] = ()
        self._waiting.clear()

    def show(self, image: ImageSource) -> None:
        """Put an image in front of the next question.

        :raises ModelError: the model sees no images.
        :raises DataError: the image cannot be read.
        """
        if self.answerer.images is None:
            raise ModelError("this model sees no images: it was trained without a vision tower")
        self.answerer.images.pixels(image, "image")
        self._waiting.append(image)

    def ask(self, question: str) -> Iterator[str]:
        """Yield the answer piece by piece; question and answer are remembered once it is complete or given up.

        Nothing is remembered of a question that cannot be answered.

        :raises DataError: the template refuses the conversation.
        :raises ModelError: the conversation is longer than the model can read.
        """
        if IMAGE_MARKER in question:
            raise DataError("the question", [f"it holds {IMAGE_MARKER}, which marks the place of an image"])
        marked = Message("user", IMAGE_MARKER * len(self._waiting) + question)
        asked = Record("conversation", (*self._messages, marked), (*self._images, *self._waiting))
        room = self._room(asked)
        answer = ""
        turn = sum(message.role == "user" for message in self._messages)
        sampling = replace(self.sampling, seed=self.sampling.seed + turn)
        try:
            with self.answerer.enough_memory(_how_to_save_memory):
                for piece in self.answerer.stream(asked, max_new_tokens=room, sampling=sampling):
                    answer += piece
                    yield piece
        except (GeneratorExit, KeyboardInterrupt):
            self._remember(asked, answer)
            raise
        self._remember(asked, answer)

    def _remember(self, asked: Record, answer: str) -> None:
        self._messages, self._images = (*asked.messages, Message("assistant", answer)), asked.images
        self._waiting.clear()

    def _room(self, asked: Record) -> int:
        """Return how many tokens the answer may have."""
        used = len(self.answerer.template.prompt(asked))
        limit = self.answerer.context_length
        if limit is None:
            return self.max_new_tokens
        if used >= limit:
            raise ModelError(f"the conversation has {used} tokens, the model reads at most {limit}: start anew")
        return min(self.max_new_tokens, limit - used)


def _answerer(assembly: Assembly) -> RecordAnswerer:
    from lavintk.answer import Answerer

    return Answerer(assembly, 1)


def _how_to_save_memory() -> str:
    return "Start anew, so that the conversation is shorter, or lower --max-new-tokens."


def image_file(text: str) -> Path:
    """Return the path of an image that a person typed, quotes around it left out.

    :raises DataError: there is no such file.
    """
    path = Path(text.strip().strip("'\"")).expanduser()
    if not path.is_file():
        raise DataError(str(path), ["no such image file"])
    return path

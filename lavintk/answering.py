"""What answering is, whatever runs the model: prompts, batches, texts out of ids, and the likelihood of given answers.

No torch here: a trained model (:mod:`lavintk.answer`) and an exported one (:mod:`lavintk.runtime`) share it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from lavintk.contracts import Likelihood
from lavintk.data.labels import IGNORED
from lavintk.data.records import Message, Record
from lavintk.errors import DataError
from lavintk.sampling import Sampling

if TYPE_CHECKING:
    from lavintk.data.images import ImageProcessor
    from lavintk.data.template import Template
    from lavintk.data.tokenize import TokenizedRecord
    from lavintk.data.tokenizer import TextTokenizer

HALF_CHARACTER = "\N{REPLACEMENT CHARACTER}"
"""What a decoder shows for the first bytes of a character."""


class RecordAnswerer(ABC):
    """An :class:`lavintk.contracts.AnsweringModel`; a subclass says how ids are generated and weighed.

    :param images: prepares the images of records; None for a model that sees none.
    :param batch_size: rows answered at a time; records of similar length are put together.
    """

    def __init__(
        self, template: Template, tokenizer: TextTokenizer, images: ImageProcessor | None, batch_size: int
    ) -> None:
        self.template, self.tokenizer, self.images = template, tokenizer, images
        self.batch_size = batch_size

    @property
    @abstractmethod
    def context_length(self) -> int | None:
        """Tokens that the model can read, prompt and answer together; None if it does not say."""

    @abstractmethod
    def _steps(
        self, rows: Sequence[TokenizedRecord], max_new_tokens: int, sampling: Sampling
    ) -> Iterator[list[int | None]]:
        """Yield the next id of each row, step by step; None for rows that have stopped."""

    @abstractmethod
    def _totals(self, rows: Sequence[TokenizedRecord]) -> list[float]:
        """Return the log-likelihood of each row's labels, in nats."""

    def enough_memory(self, advice: Callable[[], str]) -> AbstractContextManager[None]:
        """Return a context in which too little memory is an error that says what to lower.

        :raises OutOfMemoryError: on leaving it.
        """
        return nullcontext()

    def answer(self, records: Sequence[Record], *, max_new_tokens: int) -> list[str]:
        """Return one greedy answer per record, in order."""
        return [self.decode(ids) for ids in self.answer_ids(records, max_new_tokens=max_new_tokens)]

    def answer_ids(self, records: Sequence[Record], *, max_new_tokens: int) -> list[list[int]]:
        """Return the ids of one greedy answer per record, in order, the stop id that ended it included."""
        prompts = [self.template.prompt(record) for record in records]
        answers: list[list[int]] = [[] for _ in records]
        for chosen in self._groups(prompts):
            for step in self._steps([prompts[i] for i in chosen], max_new_tokens, Sampling()):
                for i, token in zip(chosen, step):
                    answers[i] += [] if token is None else [token]
        return answers

    def log_likelihoods(
        self, records: Sequence[Record], completions: Sequence[Sequence[str]]
    ) -> list[list[Likelihood]]:
        """Return the likelihood of each completion as the start of the answer to its record, in order.

        :raises DataError: a completion that gives no token of its own.
        """
        candidates = [(i, text) for i, texts in enumerate(completions) for text in texts]
        rows = [self._completed(records[i], text) for i, text in candidates]
        empty = [
            f"record {records[i].id!r}: the completion {text!r} gives no token of its own"
            for (i, text), row in zip(candidates, rows)
            if not row.trained
        ]
        if empty:
            raise DataError("the completions", empty)
        totals = [0.0] * len(rows)
        for chosen in self._groups(rows):
            for i, total in zip(chosen, self._totals([rows[i] for i in chosen])):
                totals[i] = total
        found: list[list[Likelihood]] = [[] for _ in records]
        for (i, _), row, total in zip(candidates, rows, totals):
            found[i].append(Likelihood(total, row.trained))
        return found

    def stream(
        self, record: Record, *, max_new_tokens: int, sampling: Sampling | None = None, stop: Sequence[str] = ()
    ) -> Iterator[str]:
        """Yield the answer to one record piece by piece; the pieces together are what :meth:`decode` returns.

        :param stop: texts in front of which the answer ends.
        """
        ids: list[int] = []

        def texts() -> Iterator[str]:
            for (token,) in self._steps([self.template.prompt(record)], max_new_tokens, sampling or Sampling()):
                ids.extend([] if token is None else [token])
                yield self._text(ids)

        yield from pieces_of(texts(), stop)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids`` up to the first stop id, without special tokens and surrounding space."""
        return self._text(ids).strip()

    def _text(self, ids: Sequence[int]) -> str:
        stop = self.template.stop_ids
        end = next((place for place, token in enumerate(ids) if token in stop), len(ids))
        return str(self.tokenizer.decode(list(ids[:end]), skip_special_tokens=True))

    def _groups(self, rows: Sequence[TokenizedRecord]) -> Iterator[list[int]]:
        """Yield the indices of rows that go together, shortest first."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    def _completed(self, record: Record, text: str) -> TokenizedRecord:
        """Return the row with ``text`` as the answer, in which only the tokens of ``text`` are labelled."""
        asked = record.messages[:-1] if record.messages[-1].role == "assistant" else record.messages
        answered = replace(record, messages=(*asked, Message("assistant", text)))
        row = self.template.tokenize_record(answered)
        end = max((i + 1 for i, label in enumerate(row.labels) if label != IGNORED), default=0)
        start = end  # the labels in front of the last run of them belong to earlier answers
        while start and row.labels[start - 1] != IGNORED:
            start -= 1
        stop = self.template.stop_ids
        end = next((i for i in range(start, end) if row.labels[i] in stop), end)
        labels = [label if start <= i < end else IGNORED for i, label in enumerate(row.labels)]
        return replace(row, labels=labels, trained=end - start)


def pieces_of(texts: Iterable[str], stop: Sequence[str] = ()) -> Iterator[str]:
    """Yield what is new in a growing text, without surrounding space and never half a character.

    What may become one of ``stop`` is held back; the text ends in front of the first of them.
    """
    shown = text = ""
    for grown in texts:
        end = min((place for part in stop if part and (place := grown.find(part)) >= 0), default=None)
        text = grown[:end].strip()
        if end is not None:
            break
        if text.endswith(HALF_CHARACTER):  # wait for the rest
            continue
        safe = grown[: len(grown) - _held_back(grown, stop)].strip()
        if len(safe) > len(shown):
            yield safe[len(shown) :]
            shown = safe
    if len(text) > len(shown):  # the end came in the middle of a character, or in what might have become a stop
        yield text[len(shown) :]


def _held_back(text: str, stop: Sequence[str]) -> int:
    """Return how many characters at the end of ``text`` may be the start of one of ``stop``."""
    most = min(max(map(len, stop), default=1) - 1, len(text))
    ends = (count for count in range(most, 0, -1) if any(part.startswith(text[-count:]) for part in stop))
    return next(ends, 0)

"""Turns records into prompts, generates, and turns the ids back into text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lavintk.data.batch import Batch
from lavintk.data.batches import collate
from lavintk.data.records import Record
from lavintk.generate import Sampling, generate_tokens
from lavintk.models.build import Assembly


class Answerer:
    """An :class:`lavintk.contracts.AnsweringModel` over a loaded model.

    :param batch_size: rows answered at a time; records of similar length are put together.
    """

    def __init__(self, assembly: Assembly, batch_size: int = 32) -> None:
        self.assembly = assembly
        self.batch_size = batch_size

    def answer(self, records: Sequence[Record], *, max_new_tokens: int) -> list[str]:
        """Return one greedy answer per record, in order."""
        prompts = [self.assembly.template.prompt(record) for record in records]
        order = sorted(range(len(records)), key=lambda i: len(prompts[i].input_ids))
        answers = [""] * len(records)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = collate([prompts[i] for i in chosen], self.assembly.images)
            ids: list[list[int]] = [[] for _ in chosen]
            for step in self._steps(batch, max_new_tokens, Sampling()):
                for row, token in zip(ids, step):
                    row += [] if token is None else [token]
            for i, row in zip(chosen, ids):
                answers[i] = self.decode(row)
        return answers

    def stream(self, record: Record, *, max_new_tokens: int, sampling: Sampling) -> Iterator[str]:
        """Yield the answer to one record piece by piece."""
        batch = collate([self.assembly.template.prompt(record)], self.assembly.images)
        ids: list[int] = []
        shown = ""
        for (token,) in self._steps(batch, max_new_tokens, sampling):
            ids += [] if token is None else [token]
            text = self.decode(ids)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a character: wait for the rest
                yield text[len(shown) :]
                shown = text

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids`` up to the first stop id, without special tokens and surrounding space."""
        stop = self.assembly.template.stop_ids
        end = next((place for place, token in enumerate(ids) if token in stop), len(ids))
        return str(self.assembly.tokenizer.decode(list(ids[:end]), skip_special_tokens=True)).strip()

    def _steps(self, batch: Batch, max_new_tokens: int, sampling: Sampling) -> Iterator[list[int | None]]:
        model = self.assembly.model
        was_training = model.training
        model.eval()
        try:
            yield from generate_tokens(
                model,
                batch.to(model.device),
                max_new_tokens=max_new_tokens,
                stop=frozenset(self.assembly.template.stop_ids),
                sampling=sampling,
            )
        finally:
            model.train(was_training)

"""Turns records into prompts, generates, and turns the ids back into text; or weighs given answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from lavintk.contracts import Likelihood
from lavintk.data.batch import IGNORED, Batch
from lavintk.data.batches import collate
from lavintk.data.records import Message, Record
from lavintk.data.tokenize import TokenizedRecord
from lavintk.errors import DataError
from lavintk.generate import Sampling, generate_tokens
from lavintk.models.build import Assembly

HALF_CHARACTER = "\N{REPLACEMENT CHARACTER}"
"""What a decoder shows for the first bytes of a character."""


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
        answers = [""] * len(records)
        for chosen in self._by_length(prompts):
            batch = collate([prompts[i] for i in chosen], self.assembly.images)
            ids: list[list[int]] = [[] for _ in chosen]
            for step in self._steps(batch, max_new_tokens, Sampling()):
                for row, token in zip(ids, step):
                    row += [] if token is None else [token]
            for i, row in zip(chosen, ids):
                answers[i] = self.decode(row)
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
        for chosen in self._by_length(rows):
            batch = collate([rows[i] for i in chosen], self.assembly.images)
            for i, total in zip(chosen, self._totals(batch.to(self.assembly.model.device))):
                totals[i] = total
        found: list[list[Likelihood]] = [[] for _ in records]
        for (i, _), row, total in zip(candidates, rows, totals):
            found[i].append(Likelihood(total, row.trained))
        return found

    def stream(self, record: Record, *, max_new_tokens: int, sampling: Sampling) -> Iterator[str]:
        """Yield the answer to one record piece by piece; the pieces together are what :meth:`decode` returns."""
        batch = collate([self.assembly.template.prompt(record)], self.assembly.images)
        ids: list[int] = []
        shown = text = ""
        for (token,) in self._steps(batch, max_new_tokens, sampling):
            ids += [] if token is None else [token]
            text = self.decode(ids)
            if len(text) > len(shown) and not text.endswith(HALF_CHARACTER):  # else wait for the rest
                yield text[len(shown) :]
                shown = text
        if len(text) > len(shown):  # the limit came in the middle of a character
            yield text[len(shown) :]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids`` up to the first stop id, without special tokens and surrounding space."""
        stop = self.assembly.template.stop_ids
        end = next((place for place, token in enumerate(ids) if token in stop), len(ids))
        return str(self.assembly.tokenizer.decode(list(ids[:end]), skip_special_tokens=True)).strip()

    def _by_length(self, rows: Sequence[TokenizedRecord]) -> Iterator[list[int]]:
        """Yield the indices of rows that go together, shortest first."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    def _completed(self, record: Record, text: str) -> TokenizedRecord:
        """Return the row with ``text`` as the answer, in which only the tokens of ``text`` are labelled."""
        asked = record.messages[:-1] if record.messages[-1].role == "assistant" else record.messages
        answered = replace(record, messages=(*asked, Message("assistant", text)))
        row = self.assembly.template.tokenize_record(answered)
        end = max((i + 1 for i, label in enumerate(row.labels) if label != IGNORED), default=0)
        start = end  # the labels in front of the last run of them belong to earlier answers
        while start and row.labels[start - 1] != IGNORED:
            start -= 1
        stop = self.assembly.template.stop_ids
        end = next((i for i in range(start, end) if row.labels[i] in stop), end)
        labels = [label if start <= i < end else IGNORED for i, label in enumerate(row.labels)]
        return replace(row, labels=labels, trained=end - start)

    @torch.no_grad()
    def _totals(self, batch: Batch) -> list[float]:
        """Return the log-likelihood of each row's labels; only labelled tokens reach the output head."""
        model = self.assembly.model
        was_training = model.training
        model.eval()
        try:
            labelled = (batch.labels != IGNORED).nonzero().flatten()
            hidden = model.hidden(batch).index_select(0, labelled)
            rows = torch.arange(len(batch.lengths)).repeat_interleave(torch.tensor(batch.lengths))[labelled.cpu()]
            logits = model.logits(hidden).log_softmax(dim=-1)
            chosen = logits.gather(1, batch.labels.index_select(0, labelled).unsqueeze(1)).squeeze(1)
        finally:
            model.train(was_training)
        totals = torch.zeros(len(batch.lengths), dtype=torch.float64)
        return [float(total) for total in totals.index_add(0, rows, chosen.double().cpu())]

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

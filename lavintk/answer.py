"""Answers of a loaded torch model: generates, or weighs given answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch

from lavintk.answering import RecordAnswerer
from lavintk.data.batch import IGNORED
from lavintk.data.batches import collate
from lavintk.data.tokenize import TokenizedRecord
from lavintk.devices import enough_memory
from lavintk.fitting import largest_part
from lavintk.generate import Sampling, generate_tokens
from lavintk.models.build import Assembly


class Answerer(RecordAnswerer):
    """An :class:`lavintk.contracts.AnsweringModel` over a loaded model.

    :param batch_size: rows answered at a time; records of similar length are put together.
    """

    def __init__(self, assembly: Assembly, batch_size: int = 32) -> None:
        super().__init__(assembly.template, assembly.tokenizer, assembly.images, batch_size)
        self.assembly = assembly

    @property
    def context_length(self) -> int | None:
        """Tokens that the model can read, as its configuration says."""
        limit = getattr(self.assembly.model.language.config, "max_position_embeddings", None)
        return None if limit is None else int(limit)

    def enough_memory(self, advice: Callable[[], str]) -> AbstractContextManager[None]:
        """Return a context in which a full device is an error that says what to lower."""
        model = self.assembly.model
        return enough_memory(model.device, "while answering", lambda: f"{largest_part(model)} {advice()}")

    @torch.no_grad()
    def _totals(self, rows: Sequence[TokenizedRecord]) -> list[float]:
        """Return the log-likelihood of each row's labels; only labelled tokens reach the output head."""
        model = self.assembly.model
        batch = collate(rows, self.assembly.images, self.assembly.find_features).to(model.device)
        was_training = model.training
        model.eval()
        try:
            labelled = (batch.labels != IGNORED).nonzero().flatten()
            hidden = model.hidden(batch).index_select(0, labelled)
            owners = torch.arange(len(batch.lengths)).repeat_interleave(torch.tensor(batch.lengths))[labelled.cpu()]
            logits = model.logits(hidden).log_softmax(dim=-1)
            chosen = logits.gather(1, batch.labels.index_select(0, labelled).unsqueeze(1)).squeeze(1)
        finally:
            model.train(was_training)
        totals = torch.zeros(len(batch.lengths), dtype=torch.float64)
        return [float(total) for total in totals.index_add(0, owners, chosen.double().cpu())]

    def _steps(
        self, rows: Sequence[TokenizedRecord], max_new_tokens: int, sampling: Sampling
    ) -> Iterator[list[int | None]]:
        model = self.assembly.model
        was_training = model.training
        model.eval()
        try:
            yield from generate_tokens(
                model,
                collate(rows, self.assembly.images, self.assembly.find_features).to(model.device),
                max_new_tokens=max_new_tokens,
                stop=frozenset(self.assembly.template.stop_ids),
                sampling=sampling,
            )
        finally:
            model.train(was_training)

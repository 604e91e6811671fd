"""Scores: exact match of whole answers, and the loss on held-out rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from lavintk.contracts import AnsweringModel, EvaluationResult, Prediction
from lavintk.data.records import Record
from lavintk.errors import DataError

if TYPE_CHECKING:
    from lavintk.data.batch import Batch
    from lavintk.models.multimodal import MultimodalModel


class ExactMatch:
    """Share of answers equal to the reference, ignoring case, surrounding space and a final stop.

    Scores: ``accuracy``, ``majority_accuracy`` (always giving the most frequent reference of these records; what a
    model that learned nothing but the distribution reaches) and ``questions``.
    """

    def evaluate(self, model: AnsweringModel, records: Sequence[Record], *, max_new_tokens: int) -> EvaluationResult:
        """Answer every record greedily and compare."""
        _check_references(records)
        answers = model.answer(records, max_new_tokens=max_new_tokens)
        return self.score(records, {record.id: answer for record, answer in zip(records, answers, strict=True)})

    def score(self, records: Sequence[Record], answers: Mapping[str, str | int]) -> EvaluationResult:
        """Compare given answers, which must be texts."""
        _check_references(records)
        numbers = [
            f"record {r.id}: the answer is the number {answers[r.id]}" for r in records if _is_number(answers, r)
        ]
        if numbers:
            raise DataError("the answers", numbers, "exact-match compares texts.")
        predictions = [_compared(record, str(answers[record.id])) for record in records]
        references = Counter(normalized(record.reference) for record in records)
        scores = {
            "accuracy": sum(p.correct for p in predictions) / len(predictions),
            "majority_accuracy": references.most_common(1)[0][1] / len(records),
            "questions": float(len(records)),
        }
        return EvaluationResult(scores, predictions)


def normalized(answer: str) -> str:
    """Return the answer in lower case, without surrounding space and final stop, spaces collapsed."""
    return re.sub(r"\s+", " ", answer).strip().rstrip(".").strip().casefold()


def mean_loss(model: MultimodalModel, batches: Iterable[Batch]) -> float:
    """Return the cross entropy per labelled token over ``batches``, in nats, dropout off."""
    import torch  # here, so that given answers are scored without it

    was_training = model.training
    model.eval()
    total, labelled = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            batch = batch.to(model.device)
            total += float(model.loss_sum(batch))
            labelled += batch.labelled
    model.train(was_training)
    return total / max(1, labelled)


def _check_references(records: Sequence[Record]) -> None:
    if not records:
        raise DataError("evaluation", ["there are no records to answer"])
    unanswered = [f"record {r.id}: no assistant message to compare with" for r in records if not r.reference]
    if unanswered:
        raise DataError("evaluation data", unanswered)


def _is_number(answers: Mapping[str, str | int], record: Record) -> bool:
    return isinstance(answers[record.id], int)


def _compared(record: Record, answer: str) -> Prediction:
    correct = normalized(answer) == normalized(record.reference)
    return Prediction(record.id, record.question, answer, record.reference, correct)

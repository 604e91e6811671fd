"""The evaluation: obtain an answer to each question, read the choice from it, count by category."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

from lavintk.contracts import AnsweringModel, EvaluationResult, Prediction
from lavintk.data.records import Record
from lavintk.errors import DataError
from lavintk_scienceqa.categories import AVERAGE, Share, shares
from lavintk_scienceqa.options import ScienceQaScoring

LETTERS = "ABCDE"
ANSWER = re.compile(r"The answer is ([A-Z])")
LAVINS_ANSWER = re.compile(r"The answer is ([A-Z]).")
"""The original's: its last character is any character, so a text that ends with the letter does not match."""
NEEDED = ("choices", "answer", "subject", "grade", "has_hint", "has_image")


class ScienceQa:
    """Accuracy for NAT, SOC, LAN, TXT, IMG, NO, G1-6, G7-12 and on average.

    Scores: ``accuracy`` and each category's share, ``questions``, and ``unparsed``: answers from which no choice could
    be read. They count as wrong; with ``compat=lavin`` they are replaced by a guess.
    """

    def __init__(self, options: ScienceQaScoring) -> None:
        self.options = options

    def evaluate(self, model: AnsweringModel, records: Sequence[Record], *, max_new_tokens: int) -> EvaluationResult:
        """Let the model answer every question.

        :raises DataError: records of another format, or ``scoring=likelihood`` where the answer does not come first.
        """
        check_records(records)
        if self.options.scoring == "likelihood":
            return self.score(records, self._most_likely(model, records))
        answers = model.answer(records, max_new_tokens=max_new_tokens)
        return self.score(records, {record.id: answer for record, answer in zip(records, answers, strict=True)})

    def score(self, records: Sequence[Record], answers: Mapping[str, str | int]) -> EvaluationResult:
        """Score given answers: texts, or indices of choices (any other number, such as -1, is no choice)."""
        check_records(records)
        chosen = [self._choice(record, answers[record.id]) for record in records]
        unparsed = sum(index is None for index in chosen)
        if self.options.compat == "lavin":
            guesses = random.Random(self.options.seed)
            chosen = [_guess(guesses, record) if index is None else index for record, index in zip(records, chosen)]
        predictions = [
            _prediction(record, answers[record.id], index) for record, index in zip(records, chosen, strict=True)
        ]
        return self._result(records, predictions, unparsed)

    def _most_likely(self, model: AnsweringModel, records: Sequence[Record]) -> dict[str, int]:
        late = [r.id for r in records if not ANSWER.match(r.reference)]
        if late:
            raise DataError(
                "scoring=likelihood",
                [f"record {name}: the answer does not come first" for name in late],
                "Before lectures and explanations the choice is not what the model was taught to say. Use a "
                "prompt_format such as QCM-A or QCM-ALE, or scoring=generate.",
            )
        completions = [[completion(index) for index in range(len(record.meta["choices"]))] for record in records]
        weighed = model.log_likelihoods(records, completions)
        best = [max(range(len(candidates)), key=lambda i: candidates[i].mean) for candidates in weighed]
        return {record.id: index for record, index in zip(records, best, strict=True)}

    def _choice(self, record: Record, answer: str | int) -> int | None:
        """Return the index that ``answer`` stands for, or None if that is none of the record's choices."""
        choices = len(record.meta["choices"])
        if isinstance(answer, int):
            return answer if 0 <= answer < choices else None
        if self.options.compat == "lavin":
            found = LAVINS_ANSWER.search(record.question + answer)
        else:
            found = ANSWER.search(answer)
        index = LETTERS.find(found[1]) if found else -1
        return index if 0 <= index < choices else None

    def _result(self, records: Sequence[Record], predictions: list[Prediction], unparsed: int) -> EvaluationResult:
        found = shares([record.meta for record in records], [p.correct for p in predictions])
        details = {name: self._figures(share) for name, share in found.items()}
        by_category = {n: s.accuracy for n, s in found.items() if n != AVERAGE and s.accuracy is not None}
        scores = {
            "accuracy": sum(p.correct for p in predictions) / len(predictions),
            **by_category,
            "questions": float(len(records)),
            "unparsed": float(unparsed),
        }
        treated = "replaced by a guess (compat=lavin)" if self.options.compat == "lavin" else "counted as wrong"
        notes = (f"unparsed answers: {unparsed:,}, {treated}",)
        return EvaluationResult(scores, predictions, details, _table(found, details), notes)

    def _figures(self, share: Share) -> dict[str, float | None]:
        low, high = share.interval(self.options.seed, self.options.resamples)
        return {
            "accuracy": share.accuracy,
            "low": low,
            "high": high,
            "correct": share.correct,
            "questions": share.questions,
        }


def completion(index: int) -> str:
    """Return the answer that stands for a choice."""
    return f"The answer is {LETTERS[index]}."


def check_records(records: Sequence[Record]) -> None:
    """Refuse records that bring no choices and categories.

    :raises DataError: all such records, or there are none at all.
    """
    if not records:
        raise DataError("evaluation", ["there are no records to answer"])
    lacking = [
        f"record {record.id}: no {', '.join(missing)}"
        for record in records
        if (missing := [name for name in NEEDED if name not in record.meta])
    ]
    if lacking:
        raise DataError("evaluation scienceqa", lacking, "It scores records of the format scienceqa.")


def _guess(guesses: random.Random, record: Record) -> int:
    return guesses.randrange(len(record.meta["choices"]))


def _prediction(record: Record, answer: str | int, index: int | None) -> Prediction:
    correct = index == record.meta["answer"]
    if isinstance(answer, int):
        answer = str(answer) if index is None else completion(index)
    return Prediction(record.id, record.question, answer, completion(record.meta["answer"]), correct)


def _table(found: Mapping[str, Share], details: Mapping[str, Mapping[str, float | None]]) -> list[list[str]]:
    rows = [["ScienceQA", "accuracy %", "95 % interval", "correct", "questions"]]
    for name, share in found.items():
        low, high = details[name]["low"], details[name]["high"]
        interval = "-" if low is None or high is None else f"{100 * low:.2f} to {100 * high:.2f}"
        accuracy = "-" if share.accuracy is None else f"{100 * share.accuracy:.2f}"
        rows.append([name, accuracy, interval, f"{share.correct:,}", f"{share.questions:,}"])
    return rows

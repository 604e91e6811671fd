"""The evaluation ``mme``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lavintk.contracts import AnsweringModel, EvaluationResult, Prediction
from lavintk.data.records import Record
from lavintk.errors import DataError
from lavintk_mme.files import read_answer_files
from lavintk_mme.subtasks import GROUPS, SUBTASKS, Subtask, verdict

Judged = tuple[str, str, Prediction]
"""Sub-task, image and what was answered."""


class Mme:
    """acc, acc+ and their sum for each sub-task, and the sums for perception (at most 2000) and cognition (800).

    Scores: ``accuracy`` over all questions, ``perception``, ``cognition``, ``questions``, and ``other``: answers that
    are neither yes nor no, which are wrong.
    """

    def evaluate(self, model: AnsweringModel, records: Sequence[Record], *, max_new_tokens: int) -> EvaluationResult:
        """Let the model answer every question."""
        _check(records)
        answers = model.answer(records, max_new_tokens=max_new_tokens)
        return self.score(records, {record.id: answer for record, answer in zip(records, answers, strict=True)})

    def score(self, records: Sequence[Record], answers: Mapping[str, str | int]) -> EvaluationResult:
        """Score given answers, which must be texts."""
        _check(records)
        numbers = [
            f"record {r.id}: the answer is the number {answers[r.id]}" for r in records if _number(answers[r.id])
        ]
        if numbers:
            raise DataError("the answers", numbers, "mme reads yes or no.")
        judged: list[Judged] = []
        for record in records:
            answer = str(answers[record.id])
            correct = verdict(answer) == record.reference.lower()
            prediction = Prediction(record.id, record.question, answer, record.reference, correct)
            judged.append((record.meta["subtask"], record.meta["image"], prediction))
        return _result(judged, ())

    def score_files(self, path: Path) -> EvaluationResult:
        """Score the answer files in the folder ``path``."""
        files, others = read_answer_files(path)
        judged: list[Judged] = []
        for subtask, lines in files.items():
            for place, (image, question, reference, answer) in enumerate(lines):
                correct = verdict(answer) == reference.lower()
                name = f"{subtask}/{image}/{place % 2 + 1}"
                # pairs are adjacent lines; an image that comes twice is two pairs
                judged.append((subtask, f"{place // 2}", Prediction(name, question, answer, reference, correct)))
        notes = (f"not read, because no sub-task is called so: {', '.join(others)}",) if others else ()
        return _result(judged, notes)


def _number(answer: str | int) -> bool:
    return isinstance(answer, int)


def _check(records: Sequence[Record]) -> None:
    if not records:
        raise DataError("evaluation", ["there are no records to answer"])
    faults = [
        f"record {record.id}: no sub-task and image in it"
        for record in records
        if record.meta.get("subtask") not in SUBTASKS or "image" not in record.meta
    ]
    if faults:
        raise DataError("evaluation mme", faults, "It scores records of the format mme.")


def _result(judged: Sequence[Judged], notes: tuple[str, ...]) -> EvaluationResult:
    """Count by sub-task; images of which not both questions were answered are left out."""
    images: dict[str, dict[str, list[Prediction]]] = {}
    for subtask, image, prediction in judged:
        images.setdefault(subtask, {}).setdefault(image, []).append(prediction)
    halves = sum(len(inner) != 2 for found in images.values() for inner in found.values())
    if halves:
        notes = (*notes, f"{halves:,} images left out: MME asks two questions about each, these have another number")
    counted = {
        name: Subtask.of(
            [[(p.reference, p.answer) for p in inner] for inner in images[name].values() if len(inner) == 2]
        )
        for name in SUBTASKS
        if any(len(inner) == 2 for inner in images.get(name, {}).values())
    }
    if not counted:
        raise DataError("the answers", ["there is no image with answers to both of its questions"])
    missing = [name for name in SUBTASKS if name not in counted]
    if missing:
        notes = (*notes, f"no answers for {', '.join(missing)}: the sums are over {len(counted)} of 14 sub-tasks")
    return EvaluationResult(
        _scores(counted), [prediction for _, _, prediction in judged], _details(counted), _table(counted), notes
    )


def _sums(counted: Mapping[str, Subtask]) -> dict[str, tuple[float, int]]:
    """Return sum and highest possible sum of each group that has a sub-task."""
    inside = {group: [counted[name] for name in names if name in counted] for group, names in GROUPS.items()}
    return {group: (sum(s.score for s in found), 200 * len(found)) for group, found in inside.items() if found}


def _scores(counted: Mapping[str, Subtask]) -> dict[str, float]:
    questions = sum(2 * subtask.images for subtask in counted.values())
    return {
        "accuracy": sum(subtask.correct for subtask in counted.values()) / questions,
        **{group: total for group, (total, _) in _sums(counted).items()},
        "questions": float(questions),
        "other": float(sum(subtask.other for subtask in counted.values())),
    }


def _details(counted: Mapping[str, Subtask]) -> dict[str, dict[str, float | None]]:
    details: dict[str, dict[str, float | None]] = {
        name: {
            "acc": subtask.accuracy,
            "acc+": subtask.accuracy_plus,
            "score": subtask.score,
            "images": subtask.images,
            "other": subtask.other,
        }
        for name, subtask in counted.items()
    }
    for group, (total, highest) in _sums(counted).items():
        details[group] = {"score": total, "highest": highest}
    return details


def _table(counted: Mapping[str, Subtask]) -> list[list[str]]:
    rows = [["MME", "acc", "acc+", "score", "of", "images", "neither yes nor no"]]
    for group, (total, highest) in _sums(counted).items():
        for name in (name for name in GROUPS[group] if name in counted):
            found = counted[name]
            shares = [f"{share:.2f}" for share in (found.accuracy, found.accuracy_plus, found.score)]
            rows.append([name, *shares, "200", f"{found.images:,}", f"{found.other:,}"])
        rows.append([group, "", "", f"{total:.2f}", f"{highest:,}", "", ""])
    return rows

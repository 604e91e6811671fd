"""Scores answers that exist already, without any model, and chooses the evaluation that fits the data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavintk.contracts import AnswerScoring, EvaluationResult, FileScoring, Questions, QuestionSource
from lavintk.errors import DataError, RunError
from lavintk.plugins import Plugins, installed_plugins
from lavintk.registry import Choice

if TYPE_CHECKING:
    from rich.table import Table

Answers = dict[str, str | int]
"""A text, or the index of a choice, by the id of the record."""
ID_KEYS, ANSWER_KEYS = ("record_id", "question_id"), ("answer", "text")
"""Fields of a row of answers: lavintk's own name first, then LLaVA's."""
EXACT_MATCH = "exact-match"


def evaluation_for(
    data: Choice | None,
    given: Choice | None = None,
    default: Choice | None = None,
    scoring: str | None = None,
) -> Choice:
    """Return the evaluation to use: the one given, else the one called like the data's format, else the default.

    :param default: the recipe's; with the format's name it is taken as it stands, options included.
    :param scoring: laid over the evaluation's option of this name.
    """
    default = default or Choice(EXACT_MATCH)
    chosen = given or default
    if given is None and data is not None and data.name in _plugins().evaluations and default.name != data.name:
        chosen = Choice(data.name)
    return chosen if scoring is None else Choice(chosen.name, {**chosen.options, "scoring": scoring})


def check_numbers(**numbers: int | None) -> None:
    """Refuse numbers below 1; None stands for one that was not given.

    :raises RunError: names the first that is.
    """
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise RunError(f"{name} must be at least 1, got {number}")


def choose_test(
    data: str | Choice | None,
    evaluation: str | Choice | None,
    scoring: str | None,
    *,
    own_data: Choice | None,
    own_evaluation: Choice | None,
    owner: str,
) -> tuple[Choice, Choice]:
    """Return the records to answer and the evaluation that scores them.

    :param own_data: what is answered where no ``data`` is given.
    :param owner: whose own data that is, for the message.
    :raises RunError: neither names records.
    """
    chosen = Choice.parse(data) if isinstance(data, str) else data or own_data
    if chosen is None:
        raise RunError(f"{owner} names no test data; give some, for example --data alpaca:test.json")
    given = Choice.parse(evaluation) if isinstance(evaluation, str) else evaluation
    return chosen, evaluation_for(chosen if data is not None else None, given, own_evaluation, scoring)


def score_predictions(
    path: Path, *, data: Choice | None = None, split: str = "test", evaluation: Choice | None = None
) -> EvaluationResult:
    """Score the answers in ``path`` against ``data``; where one holds more than the other, on what both have.

    :param path: a file of answers (see :func:`read_answers`), or a folder of an evaluation's own layout.
    :param data: may be left out for evaluations whose files bring questions and references.
    :raises RunError: the evaluation cannot score given answers, or ``data`` is missing.
    :raises DataError: every fault of the files, or not one question is answered.
    """
    chosen = evaluation_for(data, evaluation)
    scorer: Any = _plugins().evaluations.create(chosen)
    if isinstance(scorer, FileScoring) and (data is None or path.is_dir()):
        result = scorer.score_files(path)
        unread = () if data is None else (f"{data} was not read: these files bring questions and references",)
        return replace(result, notes=(*result.notes, *unread))
    if not isinstance(scorer, AnswerScoring):
        raise RunError(f"evaluation {chosen.name!r} cannot score answers that exist already")
    if data is None:
        raise RunError("answers are scored against records; name them, for example --data scienceqa:DIR")
    answers, note = read_answers(path)
    questions = read_questions(data, split)
    asked = [record for record in questions.records if record.id in answers]
    if not asked:
        raise DataError(str(path), [_no_overlap(data, split, questions, answers)])
    result = scorer.score(asked, answers)
    counts, notes = _coverage(questions, answers)
    return replace(result, scores={**result.scores, **counts}, notes=(*notes, *note, *result.notes))


def read_questions(data: Choice, split: str) -> Questions:
    """Return the records of ``data`` to score answers against; formats that can do so look for no image."""
    source: Any = _plugins().datasets.create(data)
    return source.questions(split) if isinstance(source, QuestionSource) else Questions(source.load(split))


def read_answers(path: Path) -> tuple[Answers, tuple[str, ...]]:
    """Return the answers of a file by id, and what there is to say about them.

    JSON: ``{"outputs": {id: text}}`` or ``{"results": {id: index}}`` (LLaVA's), or ``{id: index or text}`` (LaVIN's
    ``preds.json``). JSONL: what ``lavintk eval --save-predictions`` writes, or LLaVA's rows.

    :raises DataError: the file cannot be read, and every answer that is neither text nor a whole number.
    """
    if not path.is_file():
        found = "it is a folder; name a file" if path.is_dir() else "no such file"
        advice = "To write the answers of a run, use --save-predictions." if not path.exists() else ""
        raise DataError(str(path), [found], advice)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(str(path), [f"byte {error.start} is not UTF-8"], "Save the file as UTF-8.") from error
    faults: list[str] = []
    notes: tuple[str, ...] = ()
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        pairs = _from_rows(_lines(text, error, faults), faults)
    else:
        if isinstance(content, list):
            pairs = _from_rows(((f"record {n}", row) for n, row in enumerate(content, 1)), faults)
        elif isinstance(content, dict) and not _is_row(content):
            pairs, notes = _from_mapping(content, faults)
        else:
            pairs = _from_rows([("record 1", content)], faults)
    answers = _checked(pairs, faults)
    if not answers and not faults:
        faults.append("it holds no answers")
    if faults:
        raise DataError(str(path), faults)
    return answers, notes


def result_as_json(result: EvaluationResult) -> dict[str, Any]:
    """Return scores, the figures of parts under ``categories`` and the notes, as JSON takes them."""
    shown: dict[str, Any] = dict(result.scores)
    if result.details:
        shown["categories"] = {name: dict(figures) for name, figures in result.details.items()}
    if result.notes:
        shown["notes"] = list(result.notes)
    return shown


def result_table(rows: Sequence[Sequence[str]]) -> Table:
    """Return an evaluation's table for the terminal: text on the left, figures on the right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for place, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if place else "left", no_wrap=True)
    for row in rows[1:]:
        table.add_row(*row)
    return table


def _plugins() -> Plugins:
    return installed_plugins()


def _coverage(questions: Questions, answers: Mapping[str, str | int]) -> tuple[dict[str, float], list[str]]:
    """Return counts and sentences on what could not be scored; nothing if all was."""
    known = {record.id for record in questions.records}
    unanswered = [record.id for record in questions.records if record.id not in answers]
    unknown = [name for name in answers if name not in known]
    absent = [name for name in questions.missing if name not in answers]  # the others are among the unknown
    counts = {
        "unanswered": len(unanswered),
        "unknown_answers": len(unknown),
        "missing_questions": len(questions.missing),
    }
    reasons = (
        (unanswered, "of the data without an answer in the file"),
        (unknown, "of the file without a question in the data"),
        (absent, "of the split in neither"),
    )
    notes = [f"{len(names):,} {reason}: {_named(names)}" for names, reason in reasons if names]
    if not notes and not questions.missing:
        return {}, []
    scored = len(known) - len(unanswered)
    listed = len(known) + len(questions.missing)
    head = (
        f"scored on {scored:,} questions: the split has {listed:,}, the data {len(known):,}, the file {len(answers):,}"
    )
    return {name: float(count) for name, count in counts.items()}, [head, *notes]


def _no_overlap(data: Choice, split: str, questions: Questions, answers: Mapping[str, str | int]) -> str:
    ids = _named([record.id for record in questions.records])
    return f"its {len(answers):,} ids ({_named(list(answers))}) are not among those of {data}, split {split!r} ({ids})"


def _named(names: Sequence[str], shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")


Pair = tuple[str, Any]


def _is_row(content: Mapping[str, Any]) -> bool:
    return any(key in content for key in ID_KEYS) and any(key in content for key in ANSWER_KEYS)


def _lines(text: str, whole: json.JSONDecodeError, faults: list[str]) -> Iterable[tuple[str, Any]]:
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if len(lines) < 2 or not lines[0][1].rstrip().endswith("}"):  # no JSONL, so a broken JSON file
        faults.append(f"line {whole.lineno}, column {whole.colno}: not valid JSON: {whole.msg}")
        return
    for number, line in lines:
        try:
            yield f"line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            faults.append(f"line {number}, column {error.colno}: not valid JSON: {error.msg}")


def _from_rows(rows: Iterable[tuple[str, Any]], faults: list[str]) -> list[Pair]:
    pairs: list[Pair] = []
    seen: set[str] = set()
    for place, row in rows:
        if not isinstance(row, dict) or not _is_row(row):
            faults.append(
                f"{place}: expected {' or '.join(ID_KEYS)}, and {' or '.join(ANSWER_KEYS)}, found {_short(row)}"
            )
            continue
        name = str(next(row[key] for key in ID_KEYS if key in row))
        if name in seen:
            faults.append(f"{place}: a second answer to {name!r}")
        seen.add(name)
        pairs.append((name, next(row[key] for key in ANSWER_KEYS if key in row)))
    return pairs


def _from_mapping(content: Mapping[str, Any], faults: list[str]) -> tuple[list[Pair], tuple[str, ...]]:
    notes: tuple[str, ...] = ()
    for key, other in (("outputs", "results"), ("results", "outputs")):
        if key not in content:
            continue
        inner = content[key]
        if not isinstance(inner, dict):
            faults.append(f"{key}: expected an object of answers by id, found {_short(inner)}")
            return [], ()
        if other in content:
            notes = (f"the file's {key!r} are scored; its {other!r} are left aside",)
        return list(inner.items()), notes
    return list(content.items()), notes


def _checked(pairs: Iterable[Pair], faults: list[str]) -> Answers:
    answers: Answers = {}
    for name, value in pairs:
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            faults.append(f"id {name!r}: expected a text or the index of a choice, found {_short(value)}")
        else:
            answers[name] = value
    return answers


def _short(value: object, limit: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."

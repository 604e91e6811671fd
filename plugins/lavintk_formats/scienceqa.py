"""``scienceqa``: the ScienceQA benchmark in its official folder layout, with LaVIN's prompts.

The folder holds ``problems.json``, ``pid_splits.json`` and ``images/<split>/<id>/image.png``. Without
``pid_splits.json`` each problem's own ``split`` counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lavintk.contracts import Questions
from lavintk.data.records import Message, Record
from lavintk.errors import DataError, did_you_mean
from lavintk_formats.reading import Row, check_limit, convert_rows, describe, read_json
from lavintk_formats.scienceqa_prompt import LETTERS, PROMPT_FORMATS, Compat, build_prompt


@dataclass(frozen=True)
class ScienceQaOptions:
    """The folder and the form of prompts and answers."""

    path: Path = field(metadata={"help": "folder with problems.json and pid_splits.json, or the problems file"})
    prompt_format: str = field(default="QCM-ALE", metadata={"help": "input-output, for example QCM-A"})
    captions: Path | None = field(default=None, metadata={"help": "captions.json, to add captions to the context"})
    images: Path | None = field(default=None, metadata={"help": "image folder; default: images/ in the folder"})
    train: str = field(default="train", metadata={"help": "split to train on: train, trainval or minitrain"})
    validation: str = field(default="val", metadata={"help": "split to validate on: val or minival"})
    test: str = field(default="test", metadata={"help": "split to test on: test or minitest"})
    limit: int = field(default=0, metadata={"help": "read only the first records; 0 reads all"})
    compat: Compat = field(
        default="",
        metadata={"help": "lavin: swapped letters AL/AE and a stray BECAUSE:, as the original has them"},
    )

    def __post_init__(self) -> None:
        check_limit(self.limit)
        if self.prompt_format not in PROMPT_FORMATS:
            advice = did_you_mean(self.prompt_format, PROMPT_FORMATS)
            raise ValueError(f"no prompt_format {self.prompt_format!r}. Known: {', '.join(PROMPT_FORMATS)}.{advice}")


class ScienceQaFormat:
    """Multiple-choice questions, about half of them with an image.

    A record's meta holds what the benchmark's categories need: ``choices``, ``answer`` (index), ``subject``,
    ``grade`` (``"grade4"``), ``has_hint`` and ``has_image``; and ``raw_prompt``.
    """

    def __init__(self, options: ScienceQaOptions) -> None:
        self.options = options
        path = options.path.expanduser()
        self.folder = path.parent if path.is_file() else path
        self.problems = path if path.is_file() else path / "problems.json"

    def load(self, split: str) -> list[Record]:
        """Return the records of ``split`` in the order of ``pid_splits.json``.

        :param split: an official name; or ``"train"``, ``"validation"`` or ``"test"``, for which the options
            name an official split.
        :raises DataError: every fault found, missing images among them.
        """
        faults: list[str] = []
        rows, missing = self._rows(split, faults)
        faults += [
            f"problem {name!r}: listed in pid_splits.json, in {self.problems.name} found null" for name in missing
        ]
        captions = self._captions()
        return convert_rows(str(self.folder), rows, lambda row: self._record(row, captions), faults)

    def questions(self, split: str) -> Questions:
        """Return the records of ``split`` that the problems file holds; no image is looked for.

        :raises DataError: every fault found in these problems, or there are none.
        """
        faults: list[str] = []
        rows, missing = self._rows(split, faults)
        captions = self._captions()
        records = convert_rows(
            str(self.problems), rows, lambda row: self._record(row, captions, look_for_image=False), faults
        )
        return Questions(records, missing)

    def _rows(self, split: str, faults: list[str]) -> tuple[list[Row], tuple[str, ...]]:
        """Return the rows of the split, and the ids that it lists and the problems file lacks."""
        split = {name: getattr(self.options, name) for name in ("train", "validation", "test")}.get(split, split)
        problems = _read_object(self.problems)
        listed = self._listed(split, problems)[: self.options.limit or None]
        rows = []
        for identifier in listed:
            where, problem = f"problem {identifier!r}", problems.get(identifier, {})
            if not isinstance(problem, dict):
                faults.append(f"{where}: expected an object with fields, found {describe(problem)}")
            elif identifier in problems:
                rows.append(Row(where, identifier, {"split": split, **problem}, self.folder, faults))
        return rows, tuple(identifier for identifier in listed if identifier not in problems)

    def _listed(self, split: str, problems: Mapping[str, Any]) -> list[str]:
        """Return the ids of ``split``: those of ``pid_splits.json``, or without it those that name the split."""
        path = self.folder / "pid_splits.json"
        if path.is_file():
            splits = _read_object(path)
        else:
            splits = {}
            for identifier, problem in problems.items():
                if isinstance(problem, dict) and isinstance(problem.get("split"), str):
                    splits.setdefault(problem["split"], []).append(identifier)
        if split not in splits:
            where = path if path.is_file() else self.problems
            found = f"it has {', '.join(splits)}" if splits else f"and there is no {path}"
            raise DataError(str(where), [f"no split {split!r}; {found}.{did_you_mean(split, splits)}"])
        if not isinstance(splits[split], list):
            raise DataError(str(path), [f"{split}: expected a list of ids, found {describe(splits[split])}"])
        return [str(identifier) for identifier in splits[split]]

    def _captions(self) -> Mapping[str, Any]:
        if self.options.captions is None:
            return {}
        path = self.options.captions.expanduser()
        captions = _read_object(path).get("captions")
        if not isinstance(captions, dict):
            raise DataError(str(path), [f"expected the key 'captions' with an object, found {describe(captions)}"])
        return captions

    def _record(self, row: Row, captions: Mapping[str, Any], *, look_for_image: bool = True) -> Record:
        before = len(row.faults)
        _check(row)
        folder = self.options.images.expanduser() if self.options.images else row.folder / "images"
        image = row.text("image", required=False)
        path = folder / row.text("split") / row.default_id / image
        images = (row.image_file("image", path),) if image and look_for_image else ()
        if len(row.faults) > before:
            return Record(row.default_id, (Message("user", "?"),))
        caption = str(captions.get(row.default_id, ""))
        prompt, answer = build_prompt(row.fields, self.options.prompt_format, caption, self.options.compat)
        messages = (Message("user", prompt), Message("assistant", answer))
        return Record(row.default_id, messages, images, _meta(row.fields))


def _check(row: Row) -> None:
    choices, answer = row.fields.get("choices"), row.fields.get("answer")
    row.text("question")
    for name in ("hint", "lecture", "solution", "subject", "grade"):
        row.text(name, required=False)
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        row.fault("choices", f"expected a list of texts, found {describe(choices)}")
    elif not 2 <= len(choices) <= len(LETTERS):
        row.fault("choices", f"expected 2 to {len(LETTERS)} choices, found {len(choices)}")
    elif not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        row.fault("answer", f"expected the index of a choice (0 to {len(choices) - 1}), found {describe(answer)}")


def _meta(problem: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "raw_prompt": True,
        "choices": tuple(problem["choices"]),
        "answer": problem["answer"],
        "subject": problem.get("subject") or "",
        "grade": problem.get("grade") or "",
        "has_hint": bool(problem.get("hint")),
        "has_image": bool(problem.get("image")),
    }


def _read_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(str(path), [f"expected an object, found {describe(content)}"])
    return content

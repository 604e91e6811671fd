"""``scienceqa``: the ScienceQA benchmark in its official folder layout, with LaVIN's prompts.

The folder holds ``problems.json``, ``pid_splits.json`` and ``images/<split>/<id>/image.png``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lavintk.data.records import Message, Record
from lavintk.errors import DataError, did_you_mean
from lavintk_formats.reading import Row, check_limit, convert_rows, describe, read_json
from lavintk_formats.scienceqa_prompt import LETTERS, PROMPT_FORMATS, Compat, build_prompt


@dataclass(frozen=True)
class ScienceQaOptions:
    """The folder and the form of prompts and answers."""

    path: Path = field(metadata={"help": "folder with problems.json and pid_splits.json"})
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
        self.folder = options.path.expanduser()

    def load(self, split: str) -> list[Record]:
        """Return the records of ``split`` in the order of ``pid_splits.json``.

        :param split: an official name; or ``"train"``, ``"validation"`` or ``"test"``, for which the options
            name an official split.
        :raises DataError: every fault found, missing images among them.
        """
        official = {name: getattr(self.options, name) for name in ("train", "validation", "test")}
        faults: list[str] = []
        rows = self._rows(official.get(split, split), faults)
        captions = self._captions()
        return convert_rows(str(self.folder), rows, lambda row: self._record(row, captions), faults)

    def _rows(self, split: str, faults: list[str]) -> list[Row]:
        splits, problems = (_read_object(self.folder / name) for name in ("pid_splits.json", "problems.json"))
        if split not in splits:
            raise DataError(
                str(self.folder / "pid_splits.json"),
                [f"no split {split!r}; it has {', '.join(splits)}.{did_you_mean(split, splits)}"],
            )
        rows = []
        for identifier in splits[split][: self.options.limit or None]:
            where, problem = f"problem {identifier!r}", problems.get(identifier)
            if isinstance(problem, dict):
                rows.append(Row(where, identifier, {"split": split, **problem}, self.folder, faults))
            else:
                faults.append(f"{where}: listed in pid_splits.json, in problems.json found {describe(problem)}")
        return rows

    def _captions(self) -> Mapping[str, Any]:
        if self.options.captions is None:
            return {}
        path = self.options.captions.expanduser()
        captions = _read_object(path).get("captions")
        if not isinstance(captions, dict):
            raise DataError(str(path), [f"expected the key 'captions' with an object, found {describe(captions)}"])
        return captions

    def _record(self, row: Row, captions: Mapping[str, Any]) -> Record:
        before = len(row.faults)
        _check(row)
        folder = self.options.images.expanduser() if self.options.images else row.folder / "images"
        image = row.text("image", required=False)
        images = (row.image_file("image", folder / row.text("split") / row.default_id / image),) if image else ()
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

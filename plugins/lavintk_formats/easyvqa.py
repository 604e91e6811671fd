"""``easyvqa``: questions about coloured shapes, from the package easy-vqa. For demonstrations."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lavintk.data.records import Message, Record
from lavintk.errors import DataError, PluginError
from lavintk_formats.reading import check_limit

Question = tuple[str, str, int]
"""Question, answer, image id."""


@dataclass(frozen=True)
class EasyVqaOptions:
    """How many questions, in which order, and how many of them in one record."""

    limit: int = field(default=0, metadata={"help": "number of records; 0 takes all"})
    seed: int = field(default=0, metadata={"help": "seed of the order"})
    shuffle: bool = field(default=False, metadata={"help": "shuffle before the limit is applied"})
    questions_per_record: int = field(
        default=1, metadata={"help": "questions about one image in one conversation, at most"}
    )

    def __post_init__(self) -> None:
        check_limit(self.limit)
        if self.questions_per_record < 1:
            raise ValueError(f"questions_per_record must be at least 1, got {self.questions_per_record}")


class EasyVqaFormat:
    """Splits ``train`` (38,575 questions, 4,000 images) and ``test`` (9,673 questions, 1,000 images)."""

    def __init__(self, options: EasyVqaOptions) -> None:
        try:
            import easy_vqa  # noqa: F401  (asked here, so that a missing package shows before any work)
        except ImportError as error:
            raise PluginError(
                "dataset format 'easyvqa' needs the package easy-vqa: pip install 'lavintk[demo]'"
            ) from error
        self.options = options

    def load(self, split: str) -> list[Record]:
        """Return the records of ``train`` or ``test``; each question is in exactly one of them.

        :raises DataError: another split, or missing images.
        """
        questions, images = _read(split)
        if missing := sorted({image for _, _, image in questions} - set(images)):
            raise DataError(
                f"easy-vqa ({split})",
                [f"no file for image {image}" for image in missing],
                "Install the package again: pip install --force-reinstall easy-vqa==1.0",
            )
        order = random.Random(self.options.seed)
        groups = _grouped(questions, self.options.questions_per_record, order if self.options.shuffle else None)
        chosen = groups[: self.options.limit or None]
        return [_record(split, questions, group, images) for group in chosen]


def _read(split: str) -> tuple[list[Question], dict[int, Path]]:
    import easy_vqa

    if split == "train":
        asked, paths = easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()
    elif split == "test":
        asked, paths = easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()
    else:
        raise DataError("easy-vqa", [f"no split {split!r}; it has train and test"])
    return list(zip(*asked, strict=True)), {image: Path(path) for image, path in paths.items()}


def _grouped(questions: Sequence[Question], size: int, order: random.Random | None) -> list[list[int]]:
    """Return indices of questions in groups about one image; a last group of an image may be smaller."""
    by_image: dict[int, list[int]] = {}
    for index, (_, _, image) in enumerate(questions):
        by_image.setdefault(image, []).append(index)
    groups = []
    for indices in by_image.values():
        if order:
            order.shuffle(indices)
        groups += [indices[start : start + size] for start in range(0, len(indices), size)]
    if order:
        order.shuffle(groups)
    return groups


def _record(split: str, questions: Sequence[Question], group: Sequence[int], images: dict[int, Path]) -> Record:
    messages = []
    for index in group:
        question, answer, image = questions[index]
        messages += [Message("user", question), Message("assistant", answer)]
    return Record(f"{split}-{group[0]}", tuple(messages), (images[image],), {"image": image, "questions": tuple(group)})

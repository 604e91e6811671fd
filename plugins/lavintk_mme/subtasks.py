"""The 14 sub-tasks, what is counted in each, and how an answer is read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUBTASKS = (*PERCEPTION, *COGNITION)
GROUPS = {"perception": PERCEPTION, "cognition": COGNITION}
BY_FOLDED_NAME = {name.casefold(): name for name in SUBTASKS}

Verdict = Literal["yes", "no", "other"]


def verdict(answer: str) -> Verdict:
    """Return what an answer says, by the rule of MME's own tool: only its first four characters count."""
    answer = answer.lower()
    start = answer if answer in ("yes", "no") else answer[:4]
    if "yes" in start:
        return "yes"
    return "no" if "no" in start else "other"


@dataclass(frozen=True)
class Subtask:
    """Counts of one sub-task.

    :param correct: right answers; :param pairs: images with both questions right; :param other: neither yes nor no.
    """

    images: int
    correct: int
    pairs: int
    other: int

    @classmethod
    def of(cls, images: Iterable[Sequence[tuple[str, str]]]) -> Subtask:
        """Count the (reference, answer) pairs of each image, two for each."""
        judged = [[(reference.lower(), verdict(answer)) for reference, answer in image] for image in images]
        right = [[reference == said for reference, said in image] for image in judged]
        other = sum(said == "other" for image in judged for _, said in image)
        return cls(len(judged), sum(map(sum, right)), sum(map(all, right)), other)

    @property
    def accuracy(self) -> float:
        """Share of right answers in percent."""
        return 100 * self.correct / (2 * self.images)

    @property
    def accuracy_plus(self) -> float:
        """Share of images with both questions right in percent."""
        return 100 * self.pairs / self.images

    @property
    def score(self) -> float:
        """The sum of both shares, at most 200."""
        return self.accuracy + self.accuracy_plus

"""The categories of ScienceQA's leaderboard, and accuracy in each with a bootstrap interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Meta = Mapping[str, Any]
AVERAGE = "average"
CONFIDENCE = 0.95

CATEGORIES: dict[str, Callable[[Meta], bool]] = {
    "NAT": lambda meta: meta["subject"] == "natural science",
    "SOC": lambda meta: meta["subject"] == "social science",
    "LAN": lambda meta: meta["subject"] == "language science",
    "TXT": lambda meta: bool(meta["has_hint"]),
    "IMG": lambda meta: bool(meta["has_image"]),
    "NO": lambda meta: not meta["has_hint"] and not meta["has_image"],
    "G1-6": lambda meta: 1 <= grade(meta) <= 6,
    "G7-12": lambda meta: 7 <= grade(meta) <= 12,
    AVERAGE: lambda meta: True,
}
"""Which questions belong where; TXT and IMG overlap."""


@dataclass(frozen=True)
class Share:
    """Right answers among the questions of a category."""

    correct: int
    questions: int

    @property
    def accuracy(self) -> float | None:
        """The share, or None without questions."""
        return self.correct / self.questions if self.questions else None

    def interval(self, seed: int, resamples: int) -> tuple[float | None, float | None]:
        """Return the bounds of the 95 % bootstrap interval of the accuracy (percentile method).

        Drawing n right-or-wrong answers with replacement gives a binomial count, so that is what is drawn. The
        draw depends on the counts and the seed alone.
        """
        if not self.questions:
            return None, None
        import numpy as np

        random = np.random.default_rng([seed, self.questions, self.correct])
        shares = random.binomial(self.questions, self.correct / self.questions, resamples) / self.questions
        low, high = np.quantile(shares, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return float(low), float(high)


def grade(meta: Meta) -> int:
    """Return 4 for ``grade4``, and 0 for anything that is no grade."""
    number = str(meta["grade"]).removeprefix("grade")
    return int(number) if number.isdecimal() else 0


def shares(metas: Sequence[Meta], correct: Sequence[bool]) -> dict[str, Share]:
    """Return each category's share, in the order of the published tables."""
    found = {}
    for name, belongs in CATEGORIES.items():
        inside = [right for meta, right in zip(metas, correct, strict=True) if belongs(meta)]
        found[name] = Share(sum(inside), len(inside))
    return found

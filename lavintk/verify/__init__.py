"""Compares an exported folder with the trained model: distributions, greedy answers, scores, sizes and speed.

Both read the same rows of held-out records. What differs is then due to the export alone: another grid, merged
adapters, other kernels, or a fault.
"""

from lavintk.verify.compare import FREE_TEXT, verify
from lavintk.verify.distances import continuations, divergences
from lavintk.verify.report import Bounds, Continuations, Likeness, Scores, Verification, record

__all__ = [
    "FREE_TEXT",
    "Bounds",
    "Continuations",
    "Likeness",
    "Scores",
    "Verification",
    "continuations",
    "divergences",
    "record",
    "verify",
]

"""ScienceQA's scores: accuracy by subject, context and grade, as its leaderboard and LaVIN's tables have them.

Choose it for records of the format ``scienceqa``. Answers are read with ``The answer is X``; what cannot be read is
wrong and is counted apart. With ``scoring=likelihood`` the model weighs the choices instead of writing an answer.
Source: Lu et al., "Learn to Explain", arXiv 2209.09513.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lavintk import hookimpl
from lavintk_scienceqa.evaluation import ScienceQa
from lavintk_scienceqa.options import ScienceQaScoring

if TYPE_CHECKING:
    from lavintk.contracts import Evaluation
    from lavintk.registry import Registry

lavintk_api = 1


@hookimpl
def lavintk_register_evaluations(registry: Registry[Evaluation]) -> None:
    """Offer ``scienceqa``."""
    registry.add(
        "scienceqa",
        ScienceQa,
        options=ScienceQaScoring,
        summary="ScienceQA's accuracy by subject, context and grade, with intervals",
    )

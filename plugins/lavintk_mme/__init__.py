"""MME: 14 sub-tasks of yes/no questions in pairs about an image; perception and cognition scores.

The format ``mme`` reads the benchmark's folder, the evaluation ``mme`` scores answers to it, or answer files in the
layout of its own evaluation tool. Source: Fu et al., "MME: A Comprehensive Evaluation Benchmark for Multimodal Large
Language Models", arXiv 2306.13394.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lavintk import hookimpl
from lavintk_mme.dataset import MmeFormat, MmeOptions
from lavintk_mme.evaluation import Mme

if TYPE_CHECKING:
    from lavintk.contracts import DatasetFormat, Evaluation
    from lavintk.registry import NoOptions, Registry

lavintk_api = 1


def make_mme(options: NoOptions) -> Evaluation:
    """Return the evaluation, which has no options."""
    return Mme()


@hookimpl
def lavintk_register_datasets(registry: Registry[DatasetFormat]) -> None:
    """Offer ``mme``."""
    registry.add("mme", MmeFormat, options=MmeOptions, summary="MME in its official folder layout")


@hookimpl
def lavintk_register_evaluations(registry: Registry[Evaluation]) -> None:
    """Offer ``mme``."""
    registry.add("mme", make_mme, summary="MME's acc, acc+ and score for each sub-task, and their sums")

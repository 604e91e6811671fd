"""Draws tokens from logits in numpy, by the rules of :class:`lavintk.sampling.Sampling`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lavintk.sampling import Sampling

Floats = NDArray[np.floating[Any]]
Draw = Callable[[Floats], NDArray[np.int64]]


def make_sampler(sampling: Sampling) -> Draw:
    """Return a function that draws ``[B]`` ids from logits ``[B, vocabulary]``.

    A seed gives the same ids again, but not those that torch draws with it.
    """
    if sampling.temperature == 0:
        return lambda logits: logits.argmax(axis=-1)
    generator = np.random.default_rng(sampling.seed)

    def draw(logits: Floats) -> NDArray[np.int64]:
        return np.array([_drawn(row / sampling.temperature, sampling, generator) for row in logits], np.int64)

    return draw


def _drawn(logits: Floats, sampling: Sampling, generator: np.random.Generator) -> int:
    """Draw one id; only tokens that may be kept are sorted."""
    kept = np.arange(len(logits))
    if 0 < sampling.top_k < len(logits):
        lowest = np.partition(logits, -sampling.top_k)[-sampling.top_k]
        kept = np.flatnonzero(logits >= lowest)
    weights = np.exp(logits[kept].astype(np.float64) - logits.max())
    weights /= weights.sum()
    if sampling.top_p < 1:
        order = np.argsort(-weights, kind="stable")
        before = np.cumsum(weights[order]) - weights[order]
        order = order[before <= sampling.top_p]  # the most likely token always stays: no mass is before it
        kept, weights = kept[order], weights[order]
    cumulated = np.cumsum(weights)
    place = np.searchsorted(cumulated, generator.random() * cumulated[-1], side="right")
    return int(kept[min(int(place), len(kept) - 1)])


def log_likelihood(logits: Floats, labels: NDArray[np.int64]) -> float:
    """Return the summed log-probability of ``labels`` ``[N]`` under ``logits`` ``[N, vocabulary]``, in nats."""
    wide = logits.astype(np.float64)
    highest = wide.max(axis=-1)
    total = highest + np.log(np.exp(wide - highest[:, None]).sum(axis=-1))
    return float((wide[np.arange(len(labels)), labels] - total).sum())

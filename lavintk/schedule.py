"""The learning rate over a run, and which parameters are decayed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def learning_rate(step: int, total: int, *, peak: float, lowest: float, schedule: str, warmup: float) -> float:
    """Return the rate of optimizer step ``step`` (0-based) out of ``total``.

    Warm-up rises linearly and reaches ``peak`` at its end; the first step is not wasted at 0.

    :param schedule: ``"cosine"``, ``"linear"`` or ``"constant"``.
    :param warmup: below 1 a share of ``total``, otherwise steps.
    """
    steps = round(warmup * total) if warmup < 1 else round(warmup)
    if step < steps:
        return peak * (step + 1) / steps
    progress = min(1.0, (step - steps) / max(1, total - steps))
    if schedule == "constant":
        return peak
    share = 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return lowest + (peak - lowest) * share


def decay_groups(parameters: Mapping[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Return two optimizer groups: matrices with ``weight_decay``, vectors and biases without."""
    matrices = [p for p in parameters.values() if p.ndim > 1]
    vectors = [p for p in parameters.values() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]

"""The optimizer over a model's trained parameters, and the learning rate over a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lavintk.flat import flatten

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lavintk.contracts import Optimizer


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


def build_optimizer(
    optimizer: Optimizer,
    parameters: Mapping[str, nn.Parameter],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """Return ``optimizer`` over ``parameters``, over flat ones where it does not care.

    Gradients of flat parameters stay in their place: clear them with ``zero_grad(set_to_none=False)``.

    :raises LavintkError: see :meth:`lavintk.contracts.Optimizer.build`.
    """
    groups = decay_groups(parameters, weight_decay)
    if getattr(optimizer, "elementwise", False):
        groups = flatten(groups)
    return optimizer.build(groups, lr=lr, betas=betas, eps=eps)


def decay_groups(parameters: Mapping[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Return two optimizer groups: matrices with ``weight_decay``, vectors and biases without."""
    matrices = [p for p in parameters.values() if p.ndim > 1]
    vectors = [p for p in parameters.values() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]

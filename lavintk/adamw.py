"""The optimizer ``adamw``: torch's own, with its state resident beside the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

FUSED_DEVICES = frozenset({"cpu", "cuda", "mps", "xpu"})
"""Where torch >= 2.11 has AdamW as one kernel over all parameters."""


class AdamW:
    """AdamW with decoupled weight decay; the two state values have the parameter's type, fp32 by default."""

    paged = False
    state_bits = 32
    without_cuda = ""
    elementwise = True

    def build(
        self, groups: Sequence[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
    ) -> torch.optim.Optimizer:
        """Return the optimizer, on whatever device the parameters are.

        See :class:`lavintk.contracts.Optimizer`.
        """
        devices = {parameter.device.type for group in groups for parameter in group["params"]}
        copies = [dict(group) for group in groups]  # torch completes the dictionaries in place
        return torch.optim.AdamW(copies, lr=lr, betas=betas, eps=eps, fused=devices <= FUSED_DEVICES)

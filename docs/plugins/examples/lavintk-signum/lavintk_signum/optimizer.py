"""The torch optimizer behind ``signum``, and what lavintk is told of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class SignumStep(torch.optim.Optimizer):
    """``m = momentum * m + (1 - momentum) * g``, then ``p = p * (1 - lr * weight_decay) - lr * sign(m)``.

    :param groups: dictionaries with ``params`` and ``weight_decay``.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], lr: float, momentum: float) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": 0.0}
        super().__init__([dict(group) for group in groups], defaults)  # torch completes the dictionaries in place

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step on all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["average"] = torch.zeros_like(parameter)
        average = state["average"].lerp_(gradient, 1 - group["momentum"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(average.sign(), alpha=-group["lr"])


class Signum:
    """What lavintk is told of the optimizer; see :class:`lavintk.contracts.Optimizer`."""

    paged = False
    state_bits = 32
    without_cuda = ""
    elementwise = True

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum

    def build(
        self, groups: Sequence[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
    ) -> torch.optim.Optimizer:
        """Return the optimizer over ``groups``; ``betas`` and ``eps`` are AdamW's and mean nothing here."""
        return SignumStep(groups, lr, self.momentum)

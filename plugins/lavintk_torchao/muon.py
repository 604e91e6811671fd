"""Muon (Jordan, 2024): steps whose singular values are all about alike, for matrices; AdamW for the rest.

torch has Muon for parameters with two dimensions. Here it and torch's AdamW work side by side on the groups and the
state of one optimizer, so that schedules and checkpoints see nothing else than usual.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lavintk.errors import TrainingError


class Muon:
    """Muon with updates whose root mean square is 0.2 times the learning rate, as AdamW's are in the midst of training.

    So learning rates found for AdamW fit (Liu et al., arXiv:2502.16982). It keeps one state value for each element of a
    matrix, and two for each of the rest.

    :param momentum: decay of the sum of gradients.
    :param nesterov: whether the newest gradient counts once more.
    :param steps: Newton-Schulz iterations.
    """

    paged = False
    state_bits = 32
    without_cuda = ""
    elementwise = False

    def __init__(self, momentum: float = 0.95, nesterov: bool = True, steps: int = 5) -> None:
        self.momentum, self.nesterov, self.steps = momentum, nesterov, steps

    def build(
        self, groups: Sequence[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
    ) -> torch.optim.Optimizer:
        """Return the optimizer, on whatever device the parameters are; ``betas`` and ``eps`` are those of AdamW.

        See :class:`lavintk.contracts.Optimizer`.

        :raises TrainingError: there are no parameters.
        """
        matrices = _only(groups, lambda parameter: parameter.ndim == 2)
        rest = _only(groups, lambda parameter: parameter.ndim != 2)
        parts: list[torch.optim.Optimizer] = []
        if matrices:
            parts.append(
                torch.optim.Muon(
                    matrices, lr=lr, momentum=self.momentum, nesterov=self.nesterov, ns_steps=self.steps,
                    adjust_lr_fn="match_rms_adamw",
                )
            )  # fmt: skip
        if rest:
            parts.append(torch.optim.AdamW(rest, lr=lr, betas=betas, eps=eps))
        if not parts:
            raise TrainingError("there are no parameters to train: does the recipe name an adapter?")
        return Together(parts)


class Together(torch.optim.Optimizer):
    """Optimizers that each take the steps of their own groups of one optimizer."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self._parts = list(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy is made of."""
        return {**super().__getstate__(), "_parts": self._parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over groups and state, as a copy does, and :meth:`load_state_dict`."""
        super().__setstate__(state)
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step with each of the optimizers."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

    def _share(self) -> None:
        """Give each optimizer its groups, in the order of their addition, and the common state."""
        start = 0
        for part in self._parts:
            count = len(part.param_groups)
            part.param_groups, part.state = self.param_groups[start : start + count], self.state
            start += count


def _only(groups: Sequence[dict[str, Any]], wanted: Callable[[nn.Parameter], bool]) -> list[dict[str, Any]]:
    """Return the groups with those parameters alone; groups without any are left out."""
    found = [{**group, "params": [p for p in group["params"] if wanted(p)]} for group in groups]
    return [group for group in found if group["params"]]

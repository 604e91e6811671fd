"""Trained parameters laid into few flat ones.

An adapter has hundreds of small parameters, and an optimizer starts a kernel or more for each. Optimizers that treat
every element alike do not care where a parameter ends, so they are given flat parameters in whose memory the adapter's
own lie: one kernel for all of them, one for the gradients' norm, one to clear them. The gradients lie flat as well and
stay at their addresses, as a CUDA graph needs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

ALIGNMENT = 256
"""Parameters begin at multiples of it: 8-bit optimizers scale blocks of 256 elements, and none shares a block."""
SMALL = 4096
"""Parameters with fewer elements stay apart: 8-bit optimizers keep 32-bit state for them, which is given to small
flat parameters only."""


def flatten(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return optimizer groups with flat parameters; the given ones become views into them, as do their gradients.

    :param groups: dictionaries with ``params``, a list of parameters, and options that are kept.
    """
    return [{**group, "params": list(_flat_parameters(group["params"]))} for group in groups]


def _flat_parameters(parameters: Iterable[nn.Parameter]) -> Iterable[nn.Parameter]:
    kinds: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault((parameter.device, parameter.dtype, parameter.numel() < SMALL), []).append(parameter)
    for (_, _, small), members in kinds.items():
        if not small:
            yield _join(members, ALIGNMENT)
            continue
        for few in _below(members, SMALL):
            yield _join(few, 1)


def _below(parameters: list[nn.Parameter], limit: int) -> Iterable[list[nn.Parameter]]:
    """Yield the parameters in lists of fewer than ``limit`` elements each."""
    few: list[nn.Parameter] = []
    for parameter in parameters:
        if few and sum(p.numel() for p in few) + parameter.numel() >= limit:
            yield few
            few = []
        few.append(parameter)
    yield few


def _join(parameters: list[nn.Parameter], alignment: int) -> nn.Parameter:
    """Lay ``parameters`` into one, each at a multiple of ``alignment``; gaps stay 0, as do their gradients."""
    starts, end = [], 0
    for parameter in parameters:
        starts.append(end)
        end += -(-parameter.numel() // alignment) * alignment
    first = parameters[0]
    flat = nn.Parameter(torch.zeros(end, dtype=first.dtype, device=first.device))
    flat.grad = torch.zeros_like(flat)
    for parameter, start in zip(parameters, starts, strict=True):
        inside = _part(flat.data, start, parameter)
        inside.copy_(parameter.data)
        parameter.data = inside
        parameter.grad = _part(flat.grad, start, parameter)
    return flat


def _part(flat: Tensor, start: int, like: nn.Parameter) -> Tensor:
    return flat[start : start + like.numel()].view(like.shape)

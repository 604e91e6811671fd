"""Rounds a weight with the inputs of its layer in mind: later weights of a row make good for the error of earlier ones.

GPTQ (Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022) goes
through the inputs in order. With the inputs' second moment ``H = sum of x x'``, rounding a weight changes the row's
best remaining weights by a known amount, so these are moved before they are rounded themselves. What counts is the
error of the layer's output, ``(W - Q) H (W - Q)'`` for each row, not that of the weights.

Weights lie in columns here, ``[in, out]``: a step over one input of all rows is a step over one row of memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from lavintk.errors import ModelError
from lavintk_int4.search import LEVELS, Search, quantize_blocks

DAMPING = 0.01
"""Share of the mean of H's diagonal that is added to it, so that inputs that never varied can be inverted."""
STRONGER = 10.0
ATTEMPTS = 6
"""How the damping grows where H is too nearly singular for the number type, and how often."""


@dataclass(frozen=True)
class Blocks:
    """A weight on the grid, in columns.

    :param codes: uint8 ``[in, out]``.
    :param scales: fp32 ``[blocks, out]``.
    :param zero_points: uint8 ``[blocks, out]``.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor

    def dequantize(self) -> Tensor:
        """Return the weights, fp32 ``[in, out]``."""
        shape = (self.scales.shape[0], -1, self.scales.shape[1])
        centred = self.codes.view(shape).float() - self.zero_points.unsqueeze(1).float()
        return (centred * self.scales.unsqueeze(1)).flatten(0, 1)


def checked_moment(second_moment: Tensor, features: int) -> Tensor:
    """Return ``second_moment`` ``[features, features]`` in fp32, made symmetric.

    :raises ModelError: another shape, NaN or infinity, or a diagonal that no inputs have.
    """
    if second_moment.shape != (features, features):
        raise ModelError(
            f"cannot calibrate: the inputs' second moment has shape {list(second_moment.shape)}, the layer needs "
            f"[{features}, {features}]"
        )
    moment = second_moment.detach().float()
    if not bool(torch.isfinite(moment).all()):
        raise ModelError("cannot calibrate: the inputs' second moment holds NaN or infinity; are the inputs finite?")
    if bool((moment.diagonal() < 0).any()):
        raise ModelError("cannot calibrate: the inputs' second moment has a negative diagonal, as no inputs give it")
    return (moment + moment.t()) / 2


def output_error(difference: Tensor, moment: Tensor) -> Tensor:
    """Return ``d' H d`` of each column of ``difference`` ``[in, out]``: the squared error of each output, ``[out]``."""
    error: Tensor = ((moment @ difference) * difference).sum(0)
    return error


def input_importance(moment: Tensor) -> Tensor:
    """Return how much an error in each input counts, ``[in]``: its mean square, which is never quite 0 here."""
    diagonal = moment.diagonal()
    return diagonal + DAMPING * diagonal.mean()


def feedback_factor(moment: Tensor) -> Tensor:
    """Return the upper triangular U with ``U' U = inverse(H)``, fp32 ``[in, in]``, of the damped second moment.

    Row i, divided by its diagonal, says how the inputs behind i make good for an error in i.
    """
    diagonal = moment.diagonal()
    mean = float(diagonal.mean())
    if mean <= 0:
        return torch.eye(len(moment), device=moment.device)
    damping = DAMPING * mean
    for _ in range(ATTEMPTS):
        damped = moment.double()
        damped.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return cast(Tensor, factor.float())
        damping *= STRONGER
    raise ModelError("cannot calibrate: the inputs' second moment is not positive, so it is that of no inputs")


def round_with_feedback(columns: Tensor, moment: Tensor, block_size: int, search: Search) -> Blocks:
    """Return the weights on the grid, rounded input by input with the error fed to the inputs that follow.

    Each block's scale and zero point are searched when its turn comes, on the weights as moved until then.

    :param columns: fp32 ``[in, out]``, a multiple of the block size long; not changed.
    :param moment: from :func:`checked_moment`, as long.
    """
    factor, importance = feedback_factor(moment), input_importance(moment)
    inputs, outputs = columns.shape
    rest = columns.clone()
    codes = torch.empty(inputs, outputs, dtype=torch.uint8, device=columns.device)
    scales = columns.new_empty(inputs // block_size, outputs)
    zero_points = torch.empty(*scales.shape, dtype=torch.uint8, device=columns.device)
    relative = factor / factor.diagonal().unsqueeze(1)
    for index, start in enumerate(range(0, inputs, block_size)):
        stop = start + block_size
        block = rest[start:stop]
        _, scale, zero = quantize_blocks(block, search, importance[start:stop, None])
        scales[index], zero_points[index] = scale, zero
        errors = _round_block(block, relative[start:stop, start:stop], scale, zero.float(), codes[start:stop])
        rest[stop:].addmm_(relative[start:stop, stop:].t(), errors, alpha=-1)
    return Blocks(codes, scales, zero_points)


def _round_block(block: Tensor, relative: Tensor, scale: Tensor, zero: Tensor, codes: Tensor) -> Tensor:
    """Round the columns of ``block`` ``[block_size, out]`` in turn, changing it; return the errors, as large.

    :param codes: uint8, as large; filled.
    """
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    highest, errors = LEVELS - zero, torch.empty_like(block)
    for i, column in enumerate(block):
        rounded = torch.mul(column, inverse).round_()
        torch.minimum(torch.maximum(rounded, -zero, out=rounded), highest, out=rounded)
        codes[i] = rounded + zero
        torch.sub(column, rounded.mul_(scale), out=errors[i])
        block[i + 1 :].addr_(relative[i, i + 1 :], errors[i], alpha=-1)
    return errors

"""Finds scale and zero point of blocks of weights, from the weights alone.

A block's grid is ``(code - zero point) * scale`` with codes and zero point whole numbers from 0 to 15, so zero is
always on it. All searches work on blocks divided by their own step of plain rounding (range / 15): there a scale is a
number near 1, and the same few candidates serve every block. Blocks lie in columns, ``[block_size, blocks]``, so that
sums over a block are sums of rows, which vectorise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lavintk.threads import each

LEVELS = 15
"""The largest code."""
SCALES = tuple(0.78 + 0.02 * i for i in range(22))
"""Candidate scales of the least-squares search, in steps of plain rounding. Half the distance gains 0.1 % of error."""
SHIFTS = (-0.012, -0.006, 0.006, 0.012)
"""What its second pass adds to the best of them."""
ROUNDS = 3
"""Alternations of rounding and fitting at its end."""
BALANCE = 3
"""Power of a column's norm by which ``balanced`` divides its squared errors. With 2 every column would be as exact
relative to its size; on SmolLM2-135M 3 was better than 1, 2, 4 and 6 (docs/benchmarks.md)."""
HQQ_NORM = 0.7
HQQ_BETA = 10.0
HQQ_GROWTH = 1.01
HQQ_ITERATIONS = 20
"""Settings of HQQ's authors."""
COLUMNS_AT_ONCE = 64
"""Columns whose norms a thread computes at a time."""
SMALLEST_STEP = 1e-37
"""Blocks with a smaller step become zero: its inverse would not be finite."""

Search = Literal["balanced", "mse", "hqq", "none"]


def column_importance(weight: Tensor) -> Tensor:
    """Return how much an error in each input of ``weight`` ``[out, in]`` counts, fp32 ``[in]``.

    A trained layer has small weights where its inputs are large, so errors there do more harm than squared error of
    the weights says. Weights too large to be squared all count alike.
    """
    norms = _column_norms(weight)
    relative = (norms / norms.mean()).nan_to_num_(nan=1.0)
    return relative.clamp_(0.1, 10).pow_(-BALANCE)


def _column_norms(weight: Tensor) -> Tensor:
    """Return the norm of each column, fp32 ``[in]``."""

    def norms(columns: Tensor) -> Tensor:
        # torch goes through one column after the other: in a copy of a few of them, neighbours are near each other
        found: Tensor = torch.linalg.vector_norm(columns.float().contiguous(), dim=0)
        return found

    if weight.device.type != "cpu":
        return norms(weight)
    return torch.cat(each(norms, weight.split(COLUMNS_AT_ONCE, dim=1)))


def quantize_blocks(blocks: Tensor, search: Search, importance: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes uint8 ``[block_size, blocks]``, scales fp32 ``[blocks]`` and zero points uint8 ``[blocks]``.

    :param blocks: finite weights, fp32 ``[block_size, blocks]``; not changed.
    :param search: ``none`` spans the range of the weights, ``mse`` minimises squared error, ``balanced`` the same
        weighted by ``importance``, ``hqq`` the 0.7-norm of the error.
    :param importance: of each weight, as large as ``blocks``; for ``balanced`` only.
    """
    low, high = blocks.amin(0).clamp_(max=0), blocks.amax(0).clamp_(min=0)
    step = high / LEVELS - low / LEVELS
    inverse = torch.where(step > SMALLEST_STEP, 1 / step, 0.0)
    scaled, low, high = blocks * inverse, low * inverse, high * inverse
    scale, zero = torch.ones_like(step), low.neg().round_().clamp_(0, LEVELS)
    if search in ("balanced", "mse"):
        scale, zero = _least_squares(scaled, (low + high) / 2, zero, importance)
    elif search == "hqq":
        scale, zero = _half_quadratic(scaled, scale, zero)
    codes = _rounded(scaled, scale, zero, torch.empty_like(scaled)).add_(zero)
    return codes.to(torch.uint8), step * scale, zero.to(torch.uint8)


def _rounded(scaled: Tensor, scale: Tensor | float, zero: Tensor, out: Tensor) -> Tensor:
    """Return code minus zero point of each weight, as fp32, in ``out``."""
    torch.mul(scaled, 1 / scale, out=out).round_()
    return torch.clamp(out, -zero, LEVELS - zero, out=out)


class _Fit:
    """Scales of least (weighted) squared error for the codes that a candidate gives, of each block.

    What they leave of the block's energy is the energy minus ``along ** 2 / energy``, the gain: so each candidate is
    judged with its scale already refined.
    """

    def __init__(self, scaled: Tensor, importance: Tensor | None) -> None:
        self.scaled, self.importance = scaled, importance
        self.weighted = scaled if importance is None else scaled * importance
        self.rounded, self.product = torch.empty_like(self.weighted), torch.empty_like(self.weighted)

    def measure(self, scale: Tensor | float, zero: Tensor, along: Tensor, energy: Tensor) -> None:
        """Round with a candidate; write the codes' products with the weights, and with themselves, ``[blocks]``."""
        rounded = _rounded(self.scaled, scale, zero, self.rounded)
        torch.sum(torch.mul(rounded, self.weighted, out=self.product), 0, out=along)
        square = torch.mul(rounded, rounded, out=self.product)
        torch.sum(square if self.importance is None else square.mul_(self.importance), 0, out=energy)


class _Best:
    """The best scale and zero point so far, of each block."""

    def __init__(self, fit: _Fit, zero: Tensor) -> None:
        self.fit = fit
        self.gain, self.scale, self.zero = torch.full_like(zero, -1), torch.ones_like(zero), zero
        self._along, self._energy = torch.empty_like(zero), torch.empty_like(zero)

    def consider_grid(self, scales: Sequence[float], zeros: Tensor) -> None:
        """Consider candidates that do not depend on each other, ``zeros`` ``[scales, blocks]``; the first wins a tie.

        As good as one after the other, but what is done for each block is done for all candidates at once.
        """
        along, energy = torch.empty_like(zeros), torch.empty_like(zeros)
        for scale, *rows in zip(scales, zeros, along, energy):
            self.fit.measure(scale, *rows)
        fitted = torch.where(energy > 0, along / energy, 1.0)
        # weights or importance near the largest number give infinity by infinity, which is never better
        gain, place = along.mul_(fitted).nan_to_num_(nan=-1, posinf=torch.inf).max(0, keepdim=True)
        self._keep(gain[0], fitted.gather(0, place)[0], zeros.gather(0, place)[0])

    def consider(self, scale: Tensor, zero: Tensor) -> None:
        """Round with a candidate, fit the scale to the codes, and keep both where they are better."""
        along, energy = self._along, self._energy
        self.fit.measure(scale, zero, along, energy)
        fitted = torch.where(energy > 0, along / energy, 1.0)
        self._keep(along * fitted, fitted, zero)

    def _keep(self, gain: Tensor, scale: Tensor, zero: Tensor) -> None:
        better = gain > self.gain
        self.gain = torch.where(better, gain, self.gain)
        self.scale = torch.where(better, scale, self.scale)
        if zero is not self.zero:
            self.zero = torch.where(better, zero, self.zero)


def _least_squares(scaled: Tensor, middle: Tensor, zero: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of least squared error: a grid, then refinement around its best point.

    :param middle: of each block's range; a grid that is narrower than the range lies around it.
    """
    best = _Best(_Fit(scaled, importance), zero)
    scales = torch.tensor(SCALES, device=scaled.device).unsqueeze(1)
    zeros = (LEVELS / 2 - middle / scales).round_().clamp_(0, LEVELS)
    best.consider_grid((1.0, *SCALES), torch.cat([zero.unsqueeze(0), zeros]))
    for shift in SHIFTS:
        best.consider(best.scale + shift, best.zero)
    for move in (-1, 1):
        best.consider(best.scale, (best.zero + move).clamp_(0, LEVELS))
    for _ in range(ROUNDS):
        best.consider(best.scale, best.zero)
    return best.scale, best.zero


def _half_quadratic(scaled: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and zero point by half-quadratic splitting, the best in the norm among all iterations.

    Outliers are split off by the shrinkage of the norm, and the grid is fitted to the rest. HQQ (Badri and Shaji,
    "Half-Quadratic Quantization of Large Machine Learning Models", 2023) fits a fractional zero point; ours has to be
    whole, so the scale is fitted as well.
    """
    rounded = torch.empty_like(scaled)
    best_loss, best_scale, best_zero = torch.full_like(zero, torch.inf), scale, zero
    beta = HQQ_BETA
    for _ in range(HQQ_ITERATIONS):
        error = scaled - _rounded(scaled, scale, zero, rounded) * scale
        size = error.abs()
        powered = size.pow(HQQ_NORM)
        loss = powered.sum(0)
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        shrunk = (size - powered.div_(size.clamp(min=1e-9)).div_(beta)).clamp_(min=0)
        rest = scaled - shrunk.copysign_(error)
        energy = rounded.square().sum(0)
        scale = torch.where(energy > 0, (rest * rounded).sum(0) / energy, 1.0).clamp_(0.3, 2.0)
        zero = (rounded + zero - rest / scale).mean(0).round_().clamp_(0, LEVELS)
        beta *= HQQ_GROWTH
    return best_scale, best_zero

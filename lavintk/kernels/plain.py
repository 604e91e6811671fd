"""What the fused kernels compute, in torch's own operations, rounding where transformers' modules round."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return ``x`` divided by its root mean square along the last dimension, times ``weight`` (arXiv:1910.07467)."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def frozen_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return what :func:`rms_norm` does, without a gradient of the weight; backward takes a third of autograd's time.

    Kept are ``x`` and a number per row.
    """
    return cast(Tensor, _FrozenRMSNorm.apply(x, weight, eps))  # type: ignore[no-untyped-call]


class _FrozenRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        normed: Tensor = (wide * scale).to(x.dtype)
        return weight * normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        of_normed, normed = (gradient * weight).to(x.dtype).float(), x.float() * scale
        along = (of_normed * normed).mean(-1, keepdim=True)
        return normed.mul_(along).neg_().add_(of_normed).mul_(scale).to(x.dtype), None, None


class LowRank(NamedTuple):
    """What LoRA (arXiv:2106.09685) adds to a product ``[..., out]``: ``scale * inner @ up.T``, without gradient.

    :param inner: ``[N, r]``, a row for each row of the product. :param up: ``[out, r]``.
    """

    inner: Tensor
    up: Tensor
    scale: float


def add_low_rank(product: Tensor, update: LowRank, residual: Tensor | None) -> Tensor:
    """Return ``product`` plus ``update`` and ``residual`` in the type of the update, summed in fp32, rounded once."""
    total = _updated(product, update)
    return (total if residual is None else total + residual).to(update.inner.dtype)


def swiglu_low_rank(gate: Tensor, up: Tensor, gate_update: LowRank, up_update: LowRank) -> Tensor:
    """Return :func:`swiglu` of products to which the updates have yet to be added, in fp32, rounded once."""
    return swiglu(_updated(gate, gate_update), _updated(up, up_update)).to(gate.dtype)


def _updated(product: Tensor, update: LowRank) -> Tensor:
    wide = torch.promote_types(product.dtype, torch.float32)
    added = update.scale * (update.inner.to(wide) @ update.up.to(wide).t())
    return product.to(wide) + added.view(product.shape)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return ``silu(gate) * up`` (arXiv:2002.05202)."""
    return F.silu(gate) * up


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn the pairs ``(i, i + d / 2)`` of q and k ``[N, heads, d]`` by the angles of ``[N, d]`` (arXiv:2104.09864)."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + _half_turn(q) * sin, k * cos + _half_turn(k) * sin


def _half_turn(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)

"""RMSNorm with a frozen weight in Triton: whole rows per program, one pass over memory forward and one backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

SMALL = 1024
"""Elements below which a program takes several rows."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute :func:`lavintk.kernels.rms_norm`; ``x`` ``[..., H]`` and ``weight`` ``[H]`` share type and device."""
    return cast(Tensor, _RMSNorm.apply(x, weight, eps))  # type: ignore[no-untyped-call]


def rms_norm_and_pass(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute :func:`lavintk.kernels.rms_norm_and_pass`; ``x`` ``[..., H]`` and ``weight`` share type and device."""
    return cast(tuple[Tensor, Tensor], _RMSNormAndPass.apply(x, weight, eps))  # type: ignore[no-untyped-call]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return _normalised(ctx, x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _input_gradient(ctx.saved_tensors, grad, None), None, None


class _RMSNormAndPass(torch.autograd.Function):
    """The norm of x, and x; saves what :class:`_RMSNorm` saves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return _normalised(ctx, x, weight, eps), x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, passed: Tensor | None) -> tuple[Tensor | None, None, None]:
        if grad is None:  # nobody used the norm
            return passed, None, None
        return _input_gradient(ctx.saved_tensors, grad, passed), None, None


def _normalised(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the norm of ``x`` and save what its gradient needs."""
    rows, weight = _rows(x), weight.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
    grid, shape, warps = _plan(rows)
    with torch.cuda.device_of(x):
        _forward[grid](
            rows, weight, out, rstd, rows.shape[0], rows.stride(0), eps, *shape,
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    ctx.save_for_backward(x, weight, rstd)
    return out


def _input_gradient(saved: Sequence[Tensor], grad: Tensor, passed: Tensor | None) -> Tensor:
    """Return the gradient of ``x``, given that of its norm, with the other gradient of ``x``, ``passed``, added."""
    x, weight, rstd = saved
    rows, grads = _rows(x), _rows(grad)
    others = grads if passed is None else _rows(passed)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid, shape, warps = _plan(rows)
    with torch.cuda.device_of(x):
        _backward[grid](
            rows, weight, rstd, grads, others, out, rows.shape[0], rows.stride(0), grads.stride(0), others.stride(0),
            passed is not None, *shape, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _rows(x: Tensor) -> Tensor:
    """Return ``[rows, H]``, a view where rows lie evenly spaced and are contiguous in themselves."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _plan(rows: Tensor) -> tuple[tuple[int], tuple[int, int, int], int]:
    """Return the grid, the width with the block's height and width, and the warps of a program."""
    count, width = rows.shape
    block = triton.next_power_of_2(width)
    height = max(1, SMALL // block)
    warps = min(max(height * block // 512, 1), 16)  # 16 elements a thread: two loads of 16 bytes in 16 bit
    return (triton.cdiv(count, height),), (width, height, block), warps


@triton.jit  # type: ignore[untyped-decorator]
def _forward(
    x_ptr: tl.tensor, weight_ptr: tl.tensor, out_ptr: tl.tensor, rstd_ptr: tl.tensor, count: tl.tensor,
    stride: tl.tensor, eps: tl.tensor, width: tl.constexpr, height: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """Normalise ``height`` of ``count`` rows, which begin ``stride`` elements apart; ``out`` is contiguous."""
    row = tl.program_id(0).to(tl.int64) * height + tl.arange(0, height)
    column = tl.arange(0, block)[None, :]
    inside = (row < count)[:, None] & (column < width)
    x = tl.load(x_ptr + row[:, None] * stride + column, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0)
    wide = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, axis=1) / width + eps)
    normed = (wide * rstd[:, None]).to(x.dtype)  # the rounding of LlamaRMSNorm
    out = normed.to(tl.float32) * weight.to(tl.float32)
    tl.store(out_ptr + row[:, None] * width + column, out.to(x.dtype), mask=inside)
    tl.store(rstd_ptr + row, rstd, mask=row < count)


@triton.jit  # type: ignore[untyped-decorator]
def _backward(
    x_ptr: tl.tensor, weight_ptr: tl.tensor, rstd_ptr: tl.tensor, grad_ptr: tl.tensor, passed_ptr: tl.tensor,
    out_ptr: tl.tensor, count: tl.tensor, stride: tl.tensor, grad_stride: tl.tensor, passed_stride: tl.tensor,
    passes: tl.constexpr, width: tl.constexpr, height: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """Write the gradient of ``height`` rows of x: ``rstd * (g - n * mean(g * n))`` with ``n = x * rstd``.

    If ``passes``, another gradient of x is added to it.
    """
    row = tl.program_id(0).to(tl.int64) * height + tl.arange(0, height)
    column = tl.arange(0, block)[None, :]
    inside = (row < count)[:, None] & (column < width)
    x = tl.load(x_ptr + row[:, None] * stride + column, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + row[:, None] * grad_stride + column, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0)
    rstd = tl.load(rstd_ptr + row, mask=row < count, other=0.0)[:, None]
    scaled = (grad.to(tl.float32) * weight.to(tl.float32)).to(x.dtype).to(tl.float32)  # autograd rounds here too
    normed = x.to(tl.float32) * rstd
    along = tl.sum(scaled * normed, axis=1)[:, None] / width
    out = rstd * (scaled - normed * along)
    if passes:
        out += tl.load(passed_ptr + row[:, None] * passed_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row[:, None] * width + column, out.to(x.dtype), mask=inside)

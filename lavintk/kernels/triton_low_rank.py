"""Low-rank updates in Triton, of products whose sums are still in fp32 and of those that SwiGLU reads anyway."""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lavintk.kernels.plain import LowRank

ROWS, COLUMNS = 64, 64
"""The tile of a program: for each, the caches bring ``r * (1 / ROWS + 1 / COLUMNS)`` of its size in factors."""
WARPS = 8
"""With these, a thread holds 16 sums in fp32, and the kernels spill no registers."""
DEEPEST = 64
"""Inner values that a program multiplies at once."""


def add_low_rank(product: Tensor, update: LowRank, residual: Tensor | None) -> Tensor:
    """Compute :func:`lavintk.kernels.add_low_rank`; all on one device, ``product`` contiguous."""
    update, out = _contiguous(update), torch.empty_like(product, dtype=update.inner.dtype)
    rows = product.view(-1, product.shape[-1])
    with torch.cuda.device_of(product):
        _add[_grid(rows)](
            product, *update[:2], out if residual is None else residual.contiguous(), out, *rows.shape,
            update.inner.stride(0), float(update.scale), residual is not None, update.up.shape[1], _depth(update), ROWS,
            COLUMNS, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def swiglu_low_rank(gate: Tensor, up: Tensor, gate_update: LowRank, up_update: LowRank) -> Tensor:
    """Compute :func:`lavintk.kernels.swiglu_low_rank`; all of one type and device, ``gate`` and ``up`` contiguous."""
    return cast(Tensor, _SwiGLULowRank.apply(gate, up, gate_update, up_update))  # type: ignore[no-untyped-call]


class _SwiGLULowRank(torch.autograd.Function):
    """Keeps the products without their updates, and what the updates are made of."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, gate_update: LowRank, up_update: LowRank) -> Tensor:
        gate_update, up_update = _contiguous(gate_update), _contiguous(up_update)
        out = torch.empty_like(gate)
        _launch(_gated, gate, up, gate_update, up_update, out)
        ctx.save_for_backward(gate, up, *gate_update[:2], *up_update[:2])
        ctx.scales = gate_update.scale, up_update.scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gate, up, gate_inner, gate_factor, up_inner, up_factor = ctx.saved_tensors
        gate_update = LowRank(gate_inner, gate_factor, ctx.scales[0])
        up_update = LowRank(up_inner, up_factor, ctx.scales[1])
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        _launch(_gated_backward, gate, up, gate_update, up_update, grad.contiguous(), of_gate, of_up)
        return of_gate, of_up, None, None


def _launch(kernel: Any, gate: Tensor, up: Tensor, gate_update: LowRank, up_update: LowRank, *others: Tensor) -> None:
    rows = gate.view(-1, gate.shape[-1])
    with torch.cuda.device_of(gate):
        kernel[_grid(rows)](
            gate, up, *gate_update[:2], *up_update[:2], *others, *rows.shape, gate_update.inner.stride(0),
            up_update.inner.stride(0), float(gate_update.scale), float(up_update.scale), gate_update.up.shape[1],
            up_update.up.shape[1], _depth(gate_update, up_update), ROWS, COLUMNS,
            num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def _contiguous(update: LowRank) -> LowRank:
    inner = update.inner if update.inner.stride(1) == 1 else update.inner.contiguous()
    return LowRank(inner, update.up.contiguous(), update.scale)


def _grid(rows: Tensor) -> tuple[int, int]:
    """Return a grid whose neighbouring programs work on the same rows: ``up`` stays in the cache as a whole."""
    return triton.cdiv(rows.shape[1], COLUMNS), triton.cdiv(rows.shape[0], ROWS)


def _depth(*updates: LowRank) -> int:
    widest = max(update.up.shape[1] for update in updates)
    return min(max(16, int(triton.next_power_of_2(widest))), DEEPEST)  # tensor cores take no less than 16


@triton.jit  # type: ignore[untyped-decorator]
def _updated(
    product_ptr: tl.tensor, inner_ptr: tl.tensor, factor_ptr: tl.tensor, row: tl.tensor, column: tl.tensor,
    count: tl.tensor, width: tl.tensor, stride: tl.tensor, scale: tl.tensor,
    rank: tl.constexpr, depth: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return a product ``[count, width]`` plus its update at ``row`` ``[rows, 1]`` and ``column`` ``[1, columns]``."""
    update = tl.zeros((rows, columns), dtype=tl.float32)
    for start in tl.static_range(0, rank, depth):
        k = start + tl.arange(0, depth)
        inside = (row < count) & (k < rank)[None, :]
        inner = tl.load(inner_ptr + row * stride + k[None, :], mask=inside, other=0.0)
        inside = (k < rank)[:, None] & (column < width)
        factor = tl.load(factor_ptr + column * rank + k[:, None], mask=inside, other=0.0)
        update = tl.dot(inner, factor, update, input_precision="ieee")
    product = tl.load(product_ptr + row * width + column, mask=(row < count) & (column < width), other=0.0)
    return product.to(tl.float32) + update * scale


@triton.jit  # type: ignore[untyped-decorator]
def _add(
    product_ptr: tl.tensor, inner_ptr: tl.tensor, factor_ptr: tl.tensor, residual_ptr: tl.tensor, out_ptr: tl.tensor,
    count: tl.tensor, width: tl.tensor, stride: tl.tensor, scale: tl.tensor, adds: tl.constexpr, rank: tl.constexpr,
    depth: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
) -> None:  # fmt: skip
    """Compute a tile of ``count`` rows of ``width``, with the residual if ``adds``."""
    row = (tl.program_id(1).to(tl.int64) * rows + tl.arange(0, rows))[:, None]
    column = (tl.program_id(0) * columns + tl.arange(0, columns))[None, :]
    place, inside = row * width + column, (row < count) & (column < width)
    total = _updated(
        product_ptr, inner_ptr, factor_ptr, row, column, count, width, stride, scale, rank, depth, rows, columns
    )
    if adds:
        total += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _gated(
    gate_ptr: tl.tensor, up_ptr: tl.tensor, gate_inner_ptr: tl.tensor, gate_factor_ptr: tl.tensor,
    up_inner_ptr: tl.tensor, up_factor_ptr: tl.tensor, out_ptr: tl.tensor, count: tl.tensor, width: tl.tensor,
    gate_stride: tl.tensor, up_stride: tl.tensor, gate_scale: tl.tensor, up_scale: tl.tensor,
    gate_rank: tl.constexpr, up_rank: tl.constexpr, depth: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
) -> None:  # fmt: skip
    """Compute a tile of ``count`` rows of ``width``."""
    row = (tl.program_id(1).to(tl.int64) * rows + tl.arange(0, rows))[:, None]
    column = (tl.program_id(0) * columns + tl.arange(0, columns))[None, :]
    gate = _updated(
        gate_ptr, gate_inner_ptr, gate_factor_ptr, row, column, count, width, gate_stride, gate_scale, gate_rank,
        depth, rows, columns,
    )  # fmt: skip
    up = _updated(
        up_ptr, up_inner_ptr, up_factor_ptr, row, column, count, width, up_stride, up_scale, up_rank, depth, rows,
        columns,
    )  # fmt: skip
    out = (gate / (1.0 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * width + column, out, mask=(row < count) & (column < width))


@triton.jit  # type: ignore[untyped-decorator]
def _gated_backward(
    gate_ptr: tl.tensor, up_ptr: tl.tensor, gate_inner_ptr: tl.tensor, gate_factor_ptr: tl.tensor,
    up_inner_ptr: tl.tensor, up_factor_ptr: tl.tensor, grad_ptr: tl.tensor, of_gate_ptr: tl.tensor,
    of_up_ptr: tl.tensor, count: tl.tensor, width: tl.tensor, gate_stride: tl.tensor, up_stride: tl.tensor,
    gate_scale: tl.tensor, up_scale: tl.tensor, gate_rank: tl.constexpr, up_rank: tl.constexpr,
    depth: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
) -> None:  # fmt: skip
    """Write both gradients of a tile; see :mod:`lavintk.kernels.triton_swiglu`."""
    row = (tl.program_id(1).to(tl.int64) * rows + tl.arange(0, rows))[:, None]
    column = (tl.program_id(0) * columns + tl.arange(0, columns))[None, :]
    place, inside = row * width + column, (row < count) & (column < width)
    gate = _updated(
        gate_ptr, gate_inner_ptr, gate_factor_ptr, row, column, count, width, gate_stride, gate_scale, gate_rank,
        depth, rows, columns,
    )  # fmt: skip
    up = _updated(
        up_ptr, up_inner_ptr, up_factor_ptr, row, column, count, width, up_stride, up_scale, up_rank, depth, rows,
        columns,
    )  # fmt: skip
    grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    of_gate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    of_up = grad * gate * sigmoid
    tl.store(of_gate_ptr + place, of_gate.to(of_gate_ptr.dtype.element_ty), mask=inside)
    tl.store(of_up_ptr + place, of_up.to(of_up_ptr.dtype.element_ty), mask=inside)

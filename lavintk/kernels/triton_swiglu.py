"""SwiGLU in Triton: one kernel forward, and one backward for both gradients."""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 1024
"""Elements of a program: with 4 warps, each thread moves 16 bytes of each 16-bit tensor at once."""
WARPS = 4
MOST_ROWS = 65535
"""The second dimension of a grid ends here."""


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute :func:`lavintk.kernels.swiglu`; ``gate`` and ``up`` ``[..., I]`` share shape, type and device."""
    return cast(Tensor, _SwiGLU.apply(gate, up))  # type: ignore[no-untyped-call]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        gates, ups = _rows(gate, up)
        with torch.cuda.device_of(gate):
            _forward[_grid(gates)](
                gates, ups, out, gates.stride(0), ups.stride(0), gates.shape[1], BLOCK,
                num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_gate, of_up = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (gate, up))
        gates, ups, grads = _rows(gate, up, grad)
        with torch.cuda.device_of(gate):
            _backward[_grid(gates)](
                gates, ups, grads, of_gate, of_up, gates.stride(0), ups.stride(0), grads.stride(0), gates.shape[1],
                BLOCK, num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
        return of_gate, of_up


def _rows(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors as rows that are contiguous in themselves, as a single row where all are contiguous."""
    if all(x.is_contiguous() for x in tensors):
        return [x.view(1, -1) for x in tensors]
    rows = [x.reshape(-1, x.shape[-1]) for x in tensors]
    if rows[0].shape[0] > MOST_ROWS or any(x.stride(1) != 1 for x in rows):
        return [x.contiguous().view(1, -1) for x in rows]
    return rows


def _grid(rows: Tensor) -> tuple[int, int]:
    return triton.cdiv(rows.shape[1], BLOCK), rows.shape[0]


@triton.jit  # type: ignore[untyped-decorator]
def _forward(
    gate_ptr: tl.tensor, up_ptr: tl.tensor, out_ptr: tl.tensor, gate_stride: tl.tensor, up_stride: tl.tensor,
    width: tl.tensor, block: tl.constexpr,
) -> None:  # fmt: skip
    """Compute ``block`` elements of a row of ``width``; rows of ``out`` lie end to end."""
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = column < width
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)  # torch rounds here before the product
    out = silu.to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + row * width + column, out.to(gate.dtype), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _backward(
    gate_ptr: tl.tensor, up_ptr: tl.tensor, grad_ptr: tl.tensor, of_gate_ptr: tl.tensor, of_up_ptr: tl.tensor,
    gate_stride: tl.tensor, up_stride: tl.tensor, grad_stride: tl.tensor, width: tl.tensor, block: tl.constexpr,
) -> None:  # fmt: skip
    """Write both gradients of ``block`` elements: ``silu'(g) = s * (1 + g * (1 - s))`` with ``s = sigmoid(g)``."""
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = column < width
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    bottom = 1.0 + tl.exp(-wide)
    silu, sigmoid = (wide / bottom).to(gate.dtype), 1.0 / bottom
    of_up = grad * silu.to(tl.float32)
    of_silu = (grad * up.to(tl.float32)).to(gate.dtype).to(tl.float32)  # autograd rounds here too
    of_gate = of_silu * sigmoid * (1.0 + wide * (1.0 - sigmoid))
    tl.store(of_gate_ptr + row * width + column, of_gate.to(gate.dtype), mask=inside)
    tl.store(of_up_ptr + row * width + column, of_up.to(gate.dtype), mask=inside)

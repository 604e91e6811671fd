"""Rotary position embedding in Triton: queries and keys in one kernel, which also turns gradients back."""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

PAIRS = 1024
"""Pairs of elements that a program turns."""
WARPS = 4


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Compute :func:`lavintk.kernels.rope`; all tensors share type and device, d is even."""
    return cast(tuple[Tensor, Tensor], _Rope.apply(q, k, cos, sin))  # type: ignore[no-untyped-call]


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _turn(q, k, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_q: Tensor, of_k: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return *_turn(of_q, of_k, *ctx.saved_tensors, back=True), None, None


def _turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> tuple[Tensor, Tensor]:
    """Rotate q and k by the angles, or back by them, into new tensors."""
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    tokens, heads, size = q.shape
    block = triton.next_power_of_2(size // 2)
    together = min(max(1, PAIRS // block), triton.next_power_of_2(max(heads, k.shape[1])))
    q_parts, k_parts = triton.cdiv(heads, together), triton.cdiv(k.shape[1], together)
    with torch.cuda.device_of(q):
        _rotate[tokens, q_parts + k_parts](
            q, k, q_out, k_out, cos, sin, q.stride(0), q.stride(1), k.stride(0), k.stride(1), cos.stride(0),
            sin.stride(0), heads, k.shape[1], q_parts, size // 2, together, block, back,
            num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return q_out, k_out


@triton.jit  # type: ignore[untyped-decorator]
def _rotate(
    q_ptr: tl.tensor, k_ptr: tl.tensor, q_out_ptr: tl.tensor, k_out_ptr: tl.tensor,
    cos_ptr: tl.tensor, sin_ptr: tl.tensor, q_token: tl.tensor, q_head: tl.tensor, k_token: tl.tensor,
    k_head: tl.tensor, cos_token: tl.tensor, sin_token: tl.tensor, q_heads: tl.tensor, k_heads: tl.tensor,
    q_parts: tl.tensor, half: tl.constexpr, together: tl.constexpr, block: tl.constexpr, back: tl.constexpr,
) -> None:  # fmt: skip
    """Turn ``together`` heads of a token's queries or keys. ``_token`` and ``_head`` are strides."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cos_ptr += token * cos_token
    sin_ptr += token * sin_token
    if part < q_parts:
        _heads(
            q_ptr + token * q_token, q_out_ptr + token * q_heads * (2 * half), cos_ptr, sin_ptr,
            part * together, q_heads, q_head, half, together, block, back,
        )  # fmt: skip
    else:
        _heads(
            k_ptr + token * k_token, k_out_ptr + token * k_heads * (2 * half), cos_ptr, sin_ptr,
            (part - q_parts) * together, k_heads, k_head, half, together, block, back,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _heads(
    x_ptr: tl.tensor, out_ptr: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor, first: tl.tensor, heads: tl.tensor,
    stride: tl.tensor, half: tl.constexpr, together: tl.constexpr, block: tl.constexpr, back: tl.constexpr,
) -> None:  # fmt: skip
    """Turn the heads from ``first`` on. Each product is rounded before the sum, as torch's operations are."""
    head = first + tl.arange(0, together)[:, None]
    pair = tl.arange(0, block)[None, :]
    inside = (head < heads) & (pair < half)
    x = x_ptr + head * stride + pair
    left_x = tl.load(x, mask=inside, other=0.0)
    right_x = tl.load(x + half, mask=inside, other=0.0)
    dtype = left_x.dtype
    left_cos = tl.load(cos_ptr + pair, mask=pair < half, other=0.0).to(tl.float32)
    right_cos = tl.load(cos_ptr + half + pair, mask=pair < half, other=0.0).to(tl.float32)
    left_sin = tl.load(sin_ptr + pair, mask=pair < half, other=0.0).to(tl.float32)
    right_sin = tl.load(sin_ptr + half + pair, mask=pair < half, other=0.0).to(tl.float32)
    left, right = left_x.to(tl.float32), right_x.to(tl.float32)
    if back:  # the transpose of the rotation: each element's sine is the one that multiplied it
        left_turned, right_turned = right * right_sin, -left * left_sin
    else:
        left_turned, right_turned = -right * left_sin, left * right_sin
    left_out = (left * left_cos).to(dtype).to(tl.float32) + left_turned.to(dtype).to(tl.float32)
    right_out = (right * right_cos).to(dtype).to(tl.float32) + right_turned.to(dtype).to(tl.float32)
    out = out_ptr + head * (2 * half) + pair
    tl.store(out, left_out.to(dtype), mask=inside)
    tl.store(out + half, right_out.to(dtype), mask=inside)

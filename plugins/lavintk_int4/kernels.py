"""4-bit codes with zero points back to weights on CUDA, in one Triton kernel near the bandwidth of a copy.

Triton must be importable.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lavintk.errors import ModelError

TILE = 1024
"""Words of 8 codes that one program handles; a power of two."""
WARPS = 8


def dequantize_int4(
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    in_features: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Return the weight ``[out, in]``: ``(code - zero point) * scale`` in fp32, rounded once; the host never waits.

    The arguments are the buffers of :class:`lavintk_int4.quantizer.Int4Linear`. The first call on a device compiles,
    so it must precede the capture of a CUDA graph.

    :param codes: uint8 ``[out, blocks, block_size / 2]``, the first of two in the low nibble.
    :param scales: fp32 ``[out, blocks]``.
    :param zero_points: uint8 ``[out, ceil(blocks / 2)]``, packed like the codes.
    :param dtype: fp32, fp16 or bf16; where ``out`` is given, its type counts.
    :param out: contiguous memory for the result, of its shape.
    :raises ModelError: ``out`` is something else.
    """
    shape = (codes.shape[0], in_features)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=codes.device)
    elif tuple(out.shape) != shape or not out.is_contiguous():
        raise ModelError(f"the weight needs contiguous memory of shape {list(shape)}, out has {list(out.shape)}")
    # torch.compile cannot look into Triton's launcher, an operator it takes as it is
    run = torch.ops.lavintk_int4.dequantize_int4 if torch.compiler.is_compiling() else _launch
    run(codes, scales, zero_points, out)
    return out


def _launch(codes: Tensor, scales: Tensor, zero_points: Tensor, out: Tensor) -> None:
    words = codes.view(torch.int32) if codes.data_ptr() % 4 == 0 else codes.clone().view(torch.int32)
    blocks = scales.shape[1]
    with torch.cuda.device_of(codes):  # Triton launches on the current device; on a CPU this does nothing
        _dequantize[(triton.cdiv(words.numel(), TILE),)](
            words,
            scales,
            zero_points,
            out,
            words.numel(),
            blocks,
            out.shape[1],
            block_words=words.shape[2],
            pairs=blocks % 2 == 0,
            whole=out.shape[1] == blocks * words.shape[2] * 8,
            tile=TILE,
            num_warps=WARPS,
        )


torch.library.custom_op(
    "lavintk_int4::dequantize_int4",
    _launch,
    mutates_args=("out",),
    schema="(Tensor codes, Tensor scales, Tensor zero_points, Tensor(a!) out) -> ()",
).register_fake(lambda *arguments: None)


@triton.jit  # type: ignore[untyped-decorator]
def _dequantize(
    codes: tl.tensor,
    scales: tl.tensor,
    zero_points: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    blocks: tl.tensor,
    in_features: tl.tensor,
    block_words: tl.constexpr,
    pairs: tl.constexpr,
    whole: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """Write the weights of ``tile`` int32 words with 8 codes each.

    A thread turns a whole word into as many neighbouring weights, so loads and stores are wide and no data changes
    threads. ``pairs``: no byte of zero points ends a row half full, so rows need not be told apart to find one.
    ``whole``: nor does a block reach beyond its row, so neither for the weights.
    """
    first = tl.program_id(0).to(tl.int64) * tile
    word = tl.arange(0, tile)
    inside = word < count - first
    packed = tl.load(codes + first + word, mask=inside, other=0)
    block = (first // block_words).to(tl.int32) + word // block_words
    row = block // blocks
    in_row = block - row * blocks
    pair = block // 2 if pairs else row * ((blocks + 1) // 2) + in_row // 2
    zero = tl.load(zero_points + pair, mask=inside, other=0).to(tl.int32) >> ((block if pairs else in_row) % 2 * 4)
    zero = zero & 15
    scale = tl.load(scales + block, mask=inside, other=0.0)
    even = tl.interleave(
        tl.interleave(_value(packed, 0, zero, scale), _value(packed, 16, zero, scale)),
        tl.interleave(_value(packed, 8, zero, scale), _value(packed, 24, zero, scale)),
    )
    odd = tl.interleave(
        tl.interleave(_value(packed, 4, zero, scale), _value(packed, 20, zero, scale)),
        tl.interleave(_value(packed, 12, zero, scale), _value(packed, 28, zero, scale)),
    )
    weight = tl.interleave(even, odd).to(out.dtype.element_ty)
    place = tl.arange(0, tile * 8)
    limit = (count - first) * 8
    if whole:
        tl.store(out + first * 8 + place, weight, mask=place < limit)
    else:
        start = (first + word) % block_words * 8 + in_row * (block_words * 8)
        column = _repeat_8(start) + place % 8
        target = _repeat_8(row.to(tl.int64) * in_features) + column
        tl.store(out + target, weight, mask=(place < limit) & (column < in_features))


@triton.jit  # type: ignore[untyped-decorator]
def _value(packed: tl.tensor, shift: tl.constexpr, zero: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Return the weights of the codes at bit ``shift``."""
    return (((packed >> shift) & 15) - zero).to(tl.float32) * scale


@triton.jit  # type: ignore[untyped-decorator]
def _repeat_8(x: tl.tensor) -> tl.tensor:
    """Return each element 8 times."""
    twice = tl.interleave(x, x)
    four = tl.interleave(twice, twice)
    return tl.interleave(four, four)

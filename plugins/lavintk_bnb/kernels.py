"""4-bit codes back to weights on CUDA in one Triton kernel, with the scales that double quantization stores.

bitsandbytes needs three kernels for that: codes to scales, plus the offset, codes to weights. This one reads each
code once and comes close to the bandwidth of a copy, with the same bits as result. Triton must be importable.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lavintk.errors import ModelError
from lavintk_bnb.quantizers import NESTED_BLOCK, Scheme, codebook_of, dynamic_code

TILE = 1024
"""Words of one program; a power of two, so that a block of scales is a part or a multiple of it."""
WARPS = 8


def dequantize_4bit(
    codes: Tensor,
    absmax: Tensor,
    scheme: Scheme,
    block_size: int,
    shape: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
    *,
    nested_absmax: Tensor | None = None,
    offset: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return the weight ``[out, in]``: code value times scale, in fp32, rounded once; the host never waits.

    The arguments are the buffers of :class:`lavintk_bnb.quantizers.FourBitLinear`. The first call on a device makes
    the tables of code values and compiles, so it must precede the capture of a CUDA graph.

    :param codes: uint8 ``[elements / 2]``, the first of two in the high nibble.
    :param absmax: one scale per block, fp32, or uint8 where ``nested_absmax`` and ``offset`` are given.
    :param block_size: weights that share a scale; a power of two from 32 on.
    :param dtype: fp32, fp16 or bf16; where ``out`` is given, its type counts.
    :param out: contiguous memory for the result, of its shape.
    :raises ModelError: ``out`` is something else.
    """
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=codes.device)
    elif tuple(out.shape) != shape or not out.is_contiguous():
        raise ModelError(f"the weight needs contiguous memory of shape {list(shape)}, out has {list(out.shape)}")
    # torch.compile cannot look into Triton's launcher and the cached tables, an operator it takes as it is
    run = torch.ops.lavintk_bnb.dequantize_4bit if torch.compiler.is_compiling() else _launch
    run(codes, absmax, nested_absmax, offset, scheme, block_size, out)
    return out


def _launch(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    scheme: Scheme,
    block_size: int,
    out: Tensor,
) -> None:
    double = nested_absmax is not None
    width = 8 if out.numel() % 8 == 0 and codes.data_ptr() % 4 == 0 else 2
    words = codes.view(-1).view(torch.int32) if width == 8 else codes
    with torch.cuda.device_of(codes):  # Triton launches on the current device; on a CPU this does nothing
        _dequantize[(triton.cdiv(words.numel(), TILE),)](
            words,
            absmax,
            nested_absmax if double else absmax,
            offset if double else absmax,
            codebook_of(scheme, codes.device),
            dynamic_code(codes.device) if double else absmax,
            out,
            words.numel(),
            double=double,
            nested_block=NESTED_BLOCK,
            block_words=block_size // width,
            width=width,
            tile=TILE,
            num_warps=WARPS,
            enable_fp_fusion=False,  # bitsandbytes rounds code * nested_absmax before it adds the offset
        )


torch.library.custom_op(
    "lavintk_bnb::dequantize_4bit",
    _launch,
    mutates_args=("out",),
    schema="(Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? offset, str scheme, int block_size, "
    "Tensor(a!) out) -> ()",
).register_fake(lambda *arguments: None)


@triton.jit  # type: ignore[untyped-decorator]
def _dequantize(
    codes: tl.tensor,
    absmax: tl.tensor,
    nested_absmax: tl.tensor,
    offset: tl.tensor,
    codebook: tl.tensor,
    dynamic: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    double: tl.constexpr,
    nested_block: tl.constexpr,
    block_words: tl.constexpr,
    width: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """Write the weights of ``tile`` words with ``width`` codes each, 8 of an int32 or 2 of a byte.

    A thread turns a whole word into as many neighbouring weights, so loads and stores are wide and no data
    changes threads.
    """
    first = tl.program_id(0).to(tl.int64) * tile
    word = tl.arange(0, tile)
    inside = word < count - first
    packed = tl.load(codes + first + word, mask=inside, other=0).to(tl.int32)
    block = (first // block_words).to(tl.int32) + word // block_words
    scale = tl.load(absmax + block, mask=inside, other=0)
    if double:
        nested = tl.load(nested_absmax + block // nested_block, mask=inside, other=0.0)
        scale = tl.load(dynamic + scale.to(tl.int32)) * nested + tl.load(offset)
    if width == 8:
        even = tl.interleave(
            tl.interleave(_value(packed, 4, codebook, scale), _value(packed, 20, codebook, scale)),
            tl.interleave(_value(packed, 12, codebook, scale), _value(packed, 28, codebook, scale)),
        )
        odd = tl.interleave(
            tl.interleave(_value(packed, 0, codebook, scale), _value(packed, 16, codebook, scale)),
            tl.interleave(_value(packed, 8, codebook, scale), _value(packed, 24, codebook, scale)),
        )
    else:
        even, odd = _value(packed, 4, codebook, scale), _value(packed, 0, codebook, scale)
    place = tl.arange(0, tile * width)
    weight = tl.interleave(even, odd).to(out.dtype.element_ty)
    tl.store(out + first * width + place, weight, mask=place < (count - first) * width)


@triton.jit  # type: ignore[untyped-decorator]
def _value(packed: tl.tensor, shift: tl.constexpr, codebook: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Return the weights of the codes at bit ``shift``; the 16 values are one line of the first cache."""
    return tl.load(codebook + ((packed >> shift) & 15)) * scale

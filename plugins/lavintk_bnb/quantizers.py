"""Frozen linear layers in 4 bits (NF4, FP4) and in 8 bits (LLM.int8()), through bitsandbytes.

The layers keep their storage as plain buffers and build bitsandbytes' ``QuantState`` anew in each call, which
takes a few microseconds: so nothing has to be invalidated when a layer is loaded, moved, copied or pickled.
"""

from __future__ import annotations

import functools
from typing import Literal

import bitsandbytes as bnb
import torch
from bitsandbytes import functional as bnb_functional
from torch import Tensor

from lavintk.errors import ModelError
from lavintk.kernels.choice import enabled, problem
from lavintk.layers import FLOATS, FrozenLinear, PackedWeight, checked_weight, is_finite

NESTED_BLOCK = 256
"""Scales sharing one scale in double quantization; the only size that bitsandbytes' fused kernel knows."""
FUSED_ROWS = 16
"""Up to so many rows of ``x`` go to the fused 4-bit kernel: decoding, hardly training."""
PIECE = 1 << 18
"""Weights quantized at once on a CPU, so that intermediate results stay in the cache."""

Scheme = Literal["nf4", "fp4"]


class FourBitQuantizer:
    """Quantizes to NF4 or FP4 codes with one scale per block of the row-major flattened weight.

    Blocks may straddle rows and the last one may be shorter. Source of NF4 and of double quantization: QLoRA,
    arXiv:2305.14314.
    """

    requires_cuda = False

    def __init__(self, scheme: Scheme = "nf4", block_size: int = 64, double_quant: bool = True) -> None:
        self.scheme, self.block_size, self.double_quant = scheme, block_size, double_quant

    def quantize(self, weight: Tensor, bias: Tensor | None) -> FourBitLinear:
        """Return the layer, on the weight's device; see :class:`lavintk.contracts.Quantizer`.

        :raises ModelError: the weight's shape, type or device is not supported, or it is not finite.
        """
        weight = checked_weight(weight, bias, self.scheme)
        if weight.numel() % 2:
            raise ModelError(
                f"cannot quantize a weight to {self.scheme}, two to a byte: {list(weight.shape)} is an odd "
                "number of elements. Leave this layer unquantized, or use --quant int8"
            )
        codes, absmax = _quantize_four_bit(weight, self.scheme, self.block_size)
        nested_absmax = offset = None
        if self.double_quant:
            offset = absmax.mean()
            absmax, nested = bnb_functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
            nested_absmax = nested.absmax
        shape = (weight.shape[0], weight.shape[1])
        bias = None if bias is None else bias.detach()
        return FourBitLinear(self.scheme, shape, self.block_size, codes, absmax, nested_absmax, offset, bias)

    def empty(self, out_features: int, in_features: int, bias: bool, device: torch.device) -> FourBitLinear:
        """Return a layer with undefined content and an fp32 bias.

        ``load_state_dict(assign=True)`` gives the bias the type of what is loaded.
        """
        count = out_features * in_features
        blocks = -(-count // self.block_size)
        nested_absmax = offset = None
        if self.double_quant:
            nested_absmax = torch.empty(-(-blocks // NESTED_BLOCK), dtype=torch.float32, device=device)
            offset = torch.empty((), dtype=torch.float32, device=device)
        return FourBitLinear(
            self.scheme,
            (out_features, in_features),
            self.block_size,
            torch.empty(count // 2, dtype=torch.uint8, device=device),
            torch.empty(blocks, dtype=torch.uint8 if self.double_quant else torch.float32, device=device),
            nested_absmax,
            offset,
            torch.empty(out_features, dtype=torch.float32, device=device) if bias else None,
        )


class Int8Quantizer:
    """Quantizes each row to whole numbers from -127 to 127 times its absolute maximum, as LLM.int8() does.

    Source: arXiv:2208.07339.

    :param threshold: on CUDA, columns of ``x`` with a value from this size on are multiplied in 16 bits; 0
        turns that off.
    """

    requires_cuda = False

    def __init__(self, threshold: float = 6.0) -> None:
        self.threshold = threshold

    def quantize(self, weight: Tensor, bias: Tensor | None) -> Int8Linear:
        """Return the layer, on the weight's device; see :class:`lavintk.contracts.Quantizer`.

        :raises ModelError: the weight's shape, type or device is not supported, it is not finite, or it
            does not fit into fp16, which bitsandbytes' kernel reads.
        """
        weight = checked_weight(weight, bias, "int8").to(torch.float16)
        if not is_finite(weight):
            raise ModelError(
                "cannot quantize a weight to int8, which reads it in fp16: it has elements beyond 65504. "
                "Use --quant nf4 instead"
            )
        codes, absmax, _ = bnb_functional.int8_vectorwise_quant(weight)
        codes.masked_fill_((absmax == 0).unsqueeze(1), 0)  # a row of zeros: 0/0 leaves its codes undefined
        return Int8Linear(codes, absmax, None if bias is None else bias.detach(), self.threshold)

    def empty(self, out_features: int, in_features: int, bias: bool, device: torch.device) -> Int8Linear:
        """Return a layer with undefined content and an fp32 bias.

        ``load_state_dict(assign=True)`` gives the bias the type of what is loaded.
        """
        return Int8Linear(
            torch.empty(out_features, in_features, dtype=torch.int8, device=device),
            torch.empty(out_features, dtype=torch.float32, device=device),
            torch.empty(out_features, dtype=torch.float32, device=device) if bias else None,
            self.threshold,
        )


class FourBitLinear(FrozenLinear):
    """A frozen layer in 4-bit codes.

    Buffers: ``codes`` uint8 ``[out * in / 2]``, row-major, first element in the high nibble; ``absmax``,
    one scale per block, in fp32, or, with double quantization, as a uint8 code; then also ``nested_absmax``
    fp32, one per 256 scales, and ``offset`` fp32, a scalar. bitsandbytes' dynamic 8-bit code turns these
    back into scales.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    scale_names = ("absmax", "nested_absmax", "offset")

    def __init__(
        self,
        scheme: Scheme,
        shape: tuple[int, int],
        block_size: int,
        codes: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        offset: Tensor | None,
        bias: Tensor | None,
    ) -> None:
        super().__init__(shape[0], shape[1], bias)
        self.scheme, self.block_size = scheme, block_size
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)
        self.register_buffer("nested_absmax", nested_absmax)
        self.register_buffer("offset", offset)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight ``[out, in]``: code value times scale, in fp32, rounded once to ``dtype``."""
        narrow = dtype if dtype in FLOATS else torch.float32
        if self.codes.is_cuda and _kernel_runs(self.codes.device):
            return self._dequantize_by_kernel(narrow).to(dtype)
        if self.codes.device.type == "cpu" and not self._cpu_kernel_suits():
            return self._unpack().to(dtype)
        state = self._quant_state(narrow)
        weight: Tensor = bnb_functional.dequantize_4bit(self.codes.view(-1, 1), state)
        return weight.view(self.out_features, self.in_features).to(dtype)  # of a single byte it comes transposed

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the rows ``index`` of the weight; unpacked by themselves where they are whole blocks."""
        if self.in_features % self.block_size or index.numel() == 0:
            return super().rows(index, dtype)
        per_row = self.in_features // self.block_size
        scales = self.absmax.view(-1, per_row).index_select(0, index)
        if self.offset is not None:
            assert self.nested_absmax is not None
            blocks = index.unsqueeze(1) * per_row + torch.arange(per_row, device=index.device)
            nested = self.nested_absmax[blocks // NESTED_BLOCK]
            scales = dynamic_code(scales.device)[scales.int()].mul_(nested).add_(self.offset)
        codes = self.codes.view(self.out_features, -1).index_select(0, index)
        shape = (index.numel(), self.in_features)
        chosen = FourBitLinear(self.scheme, shape, self.block_size, codes.view(-1), scales.view(-1), None, None, None)
        return chosen.dequantize(dtype)

    def packed(self) -> PackedWeight:
        """Describe the storage: ``codes`` as they are, scales in fp32 with double quantization resolved."""
        return PackedWeight(
            scheme=self.scheme,
            shape=(self.out_features, self.in_features),
            codes=self.codes,
            scales=self._block_scales(),
            block_size=self.block_size,
            layout="row-major, first element in the high nibble",
            codebook=codebook_of(self.scheme, self.codes.device),
        )

    def product(self, x: Tensor, total: Tensor | None = None, *, wide: bool = False) -> Tensor:
        """Return ``x @ W.T + b``, added to ``total`` if given; a few rows on CUDA take bitsandbytes' fused kernel."""
        if not self._fused_kernel_suits(x):
            return super().product(x, total, wide=wide)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        product: Tensor = bnb.matmul_4bit(  # type: ignore[attr-defined]
            x, self.codes, self._quant_state(x.dtype), bias=bias
        )
        return product if total is None else total.add_(product)

    def extra_repr(self) -> str:
        """Describe the layer in ``print(model)``."""
        double = self.offset is not None
        return f"{super().extra_repr()}, {self.scheme}, block_size={self.block_size}, double_quant={double}"

    def _dequantize_by_kernel(self, dtype: torch.dtype) -> Tensor:
        from lavintk_bnb.kernels import dequantize_4bit

        return dequantize_4bit(
            self.codes,
            self.absmax,
            self.scheme,
            self.block_size,
            (self.out_features, self.in_features),
            dtype,
            nested_absmax=self.nested_absmax,
            offset=self.offset,
        )

    def _fused_kernel_suits(self, x: Tensor) -> bool:
        few_rows = 0 < x.numel() <= FUSED_ROWS * self.in_features
        whole_blocks = self.in_features % self.block_size == 0  # else bitsandbytes warns and dequantizes
        return x.is_cuda and x.dtype in FLOATS and few_rows and whole_blocks

    def _cpu_kernel_suits(self) -> bool:
        """Whether the shape is one that bitsandbytes 0.50's CPU kernel gets right, and quickly.

        With AVX-512 it is wrong for rows that are not a whole number of blocks. For blocks from 2048 on it
        falls back to a function that it compiles anew for every shape.
        """
        return self.in_features % self.block_size == 0 and self.block_size < 2048

    def _unpack(self) -> Tensor:
        pairs = _byte_values(self.scheme).index_select(0, self.codes.int())
        values = pairs.view(torch.float32)
        scales = self._block_scales()
        if values.numel() % self.block_size == 0:
            values.view(-1, self.block_size).mul_(scales.unsqueeze(1))
        else:
            values.mul_(scales.repeat_interleave(self.block_size)[: values.numel()])
        return values.view(self.out_features, self.in_features)

    def _block_scales(self) -> Tensor:
        if self.offset is None:
            return self.absmax
        scales: Tensor = bnb_functional.dequantize_blockwise(self.absmax, self._nested_state())
        return scales.add_(self.offset)

    def _quant_state(self, dtype: torch.dtype) -> bnb_functional.QuantState:
        return bnb_functional.QuantState(  # type: ignore[no-untyped-call]
            absmax=self.absmax,
            shape=torch.Size((self.out_features, self.in_features)),
            blocksize=self.block_size,
            quant_type=self.scheme,
            dtype=dtype,
            offset=self.offset,
            state2=None if self.offset is None else self._nested_state(),
        )

    def _nested_state(self) -> bnb_functional.QuantState:
        return bnb_functional.QuantState(  # type: ignore[no-untyped-call]
            absmax=self.nested_absmax,
            code=dynamic_code(self.absmax.device),
            blocksize=NESTED_BLOCK,
            dtype=torch.float32,
        )


class Int8Linear(FrozenLinear):
    """A frozen layer in 8-bit rows: ``weight[o, i] = codes[o, i] * absmax[o] / 127``.

    Buffers: ``codes`` int8 ``[out, in]``, ``absmax`` fp32 ``[out]``. On CUDA the product is that of
    LLM.int8(): rows of ``x`` are quantized too, except columns with outliers, and the result passes through
    fp16. On a CPU, and for the gradient everywhere, the weight is dequantized.
    """

    codes: Tensor
    absmax: Tensor
    scale_names = ("absmax",)

    def __init__(self, codes: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float) -> None:
        super().__init__(codes.shape[0], codes.shape[1], bias)
        self.threshold = threshold
        self.graph_safe = threshold == 0  # to look for outliers, the host waits for the device in each call
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight ``[out, in]``, computed in fp32 and rounded once to ``dtype``."""
        narrow = dtype if dtype in FLOATS else torch.float32
        return self.codes.to(narrow).mul_(self._row_scales().unsqueeze(1)).to(dtype)

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the rows ``index`` of the weight."""
        chosen = self.codes.index_select(0, index), self.absmax.index_select(0, index)
        return Int8Linear(*chosen, None, self.threshold).dequantize(dtype)

    def packed(self) -> PackedWeight:
        """Describe the storage; ``codes * scales[:, None]`` is the weight."""
        return PackedWeight(
            scheme="int8-row",
            shape=(self.out_features, self.in_features),
            codes=self.codes,
            scales=self._row_scales(),
        )

    def product(self, x: Tensor, total: Tensor | None = None, *, wide: bool = False) -> Tensor:
        """Return ``x @ W.T + b``, added to ``total`` if given; on CUDA by the kernels of LLM.int8().

        ``bitsandbytes.matmul`` computes the same, but logs a warning in each call that is not in fp16. Its kernels
        round the product, so it is not ``wide`` there, and rounded before it is added to ``total``.
        """
        if not x.is_cuda or x.numel() == 0:
            return super().product(x, total, wide=wide)
        rows = x.reshape(-1, self.in_features)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        codes, absmax, outliers = bnb_functional.int8_vectorwise_quant(
            rows.to(torch.float16).contiguous(), self.threshold
        )
        product: Tensor
        if self.threshold > 0:
            product, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
                rows, codes, self.codes, absmax, self.absmax, outliers, bias
            )
        else:
            product = torch.ops.bitsandbytes.int8_scaled_mm(
                codes, self.codes, absmax, self.absmax, bias=bias, dtype=x.dtype
            )
        product = product.reshape(*x.shape[:-1], self.out_features)
        return product if total is None else total.add_(product)

    def extra_repr(self) -> str:
        """Describe the layer in ``print(model)``."""
        return f"{super().extra_repr()}, threshold={self.threshold}"

    def _row_scales(self) -> Tensor:
        return self.absmax * (1 / 127)


def _quantize_four_bit(weight: Tensor, scheme: Scheme, block_size: int) -> tuple[Tensor, Tensor]:
    """Return codes uint8 ``[elements / 2]`` and fp32 scales, one per block, as bitsandbytes makes them."""
    if weight.device.type == "cpu" and weight.numel() % block_size == 0:
        return _quantize_on_cpu(weight, scheme, block_size)
    codes, state = bnb_functional.quantize_4bit(weight, blocksize=block_size, quant_type=scheme)
    return codes.view(-1), state.absmax


def _quantize_on_cpu(weight: Tensor, scheme: Scheme, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantize to the same bits as bitsandbytes does on a CPU, several times faster.

    It works in pieces that fit the cache, with a table in place of the binary search for the nearest code.
    """
    cell_rank, cell_bound, code_of_rank = _search_table(scheme)
    half = (len(cell_rank) - 2) / 2
    blocks = weight.view(-1, block_size)
    codes = torch.empty(weight.numel() // 2, dtype=torch.uint8)
    absmax = torch.empty(blocks.shape[0], dtype=torch.float32)
    step = max(1, PIECE // block_size)
    for start in range(0, blocks.shape[0], step):
        piece = blocks[start : start + step].float()
        peak = torch.amax(piece.abs(), dim=1, out=absmax[start : start + step])
        scaled = (piece * (1.0 / peak.clamp(min=1e-38)).unsqueeze(1)).view(-1)
        cell = (scaled * half).add_(half).int()
        rank = cell_rank.index_select(0, cell)
        rank += scaled > cell_bound.index_select(0, cell)
        if scheme != "nf4":  # NF4's codes are sorted by value
            rank = code_of_rank.index_select(0, rank.int())
        first, second = rank.view(-1, 2).unbind(1)
        begin = start * block_size // 2
        torch.add(second, first, alpha=16, out=codes[begin : begin + second.numel()])
    return codes, absmax


@functools.cache
def _search_table(scheme: Scheme, cells: int = 4096) -> tuple[Tensor, Tensor, Tensor]:
    """Return what finds the code nearest to a value in [-1, 1], or slightly beyond through rounding.

    The range is cut into so many cells that each holds at most one bound between neighbouring codes. A
    value's rank among the sorted codes is ``cell_rank``, plus one if it exceeds ``cell_bound``; both
    ``[cells + 2]``. The third tensor maps ranks to codes.
    """
    codebook = codebook_of(scheme, torch.device("cpu"))
    code_of_rank = torch.argsort(codebook)
    ordered = codebook[code_of_rank]
    bounds = (ordered[:-1] + ordered[1:]) / 2
    bound_cell = (bounds * (cells / 2) + cells / 2).int()
    cell_rank = torch.searchsorted(bound_cell, torch.arange(cells + 2, dtype=torch.int32))
    cell_bound = torch.full((cells + 2,), torch.inf)
    cell_bound[bound_cell] = bounds
    return cell_rank.to(torch.uint8), cell_bound, code_of_rank.to(torch.uint8)


@functools.cache
def _byte_values(scheme: Scheme) -> Tensor:
    """Return the two fp32 values that each byte stands for as one int64, ``[256]``: one gather for both."""
    codebook = codebook_of(scheme, torch.device("cpu"))
    pairs = torch.stack([codebook.repeat_interleave(16), codebook.repeat(16)], dim=1)
    return pairs.contiguous().view(torch.int64).view(-1)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _kernel_runs(device: torch.device) -> bool:
    """Whether our own kernel, in place of bitsandbytes', is switched on and runs on ``device``."""
    return enabled("dequantize") and not problem(device)


@functools.cache
def codebook_of(scheme: Scheme, device: torch.device) -> Tensor:
    """Return the 16 values of ``scheme`` in the order of their codes, fp32."""
    values: Tensor = bnb_functional.get_4bit_type(scheme, device=device)  # type: ignore[no-untyped-call]
    return values


@functools.cache
def dynamic_code(device: torch.device) -> Tensor:
    """Return the 256 values of the 8-bit code in which double quantization stores scales, fp32."""
    values: Tensor = bnb_functional.create_dynamic_map()  # type: ignore[no-untyped-call]
    return values.to(device)

"""Frozen linear layers whose storage is that of ONNX Runtime's ``MatMulNBits`` with 4 bits."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from lavintk.kernels.choice import enabled, problem
from lavintk.layers import FLOATS, FrozenLinear, PackedWeight, checked_weight
from lavintk.threads import each, slices
from lavintk_int4.calibrated import checked_moment, output_error, round_with_feedback
from lavintk_int4.search import Search, column_importance, quantize_blocks

PIECES = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Weights quantized at once: on a CPU by one thread, a GPU wants more work at a time. Sums over the last few blocks of
a piece are added up in another order, so other sizes change some scales in their last bit."""
TILES = {"cpu": 1 << 13, "cpu with many threads": 1 << 15, "cuda": 1 << 20}
"""Blocks of a piece searched at once, multiples of 64, which torch adds up alike wherever they lie. On a CPU, the
intermediate results of few threads stay in the caches of their cores. Many threads would wait for Python's lock most of
the time: with 2^12 blocks 16 threads are no faster than one, with 2^15 six times."""
MANY_THREADS = 8
UNPACKED_PIECE = 1 << 18
"""Weights dequantized at once on a CPU."""


class Int4Quantizer:
    """Quantizes each row in blocks of whole numbers from 0 to 15, with an fp32 scale and a zero point per block.

    The last block of a row whose length is no multiple of the block size is filled up with zeros.

    :param block_size: a power of two from 16 on.
    :param search: how scale and zero point are found; see :mod:`lavintk_int4.search`.
    """

    requires_cuda = False

    def __init__(self, block_size: int = 32, search: Search = "balanced") -> None:
        self.block_size, self.search = block_size, search

    def quantize(self, weight: Tensor, bias: Tensor | None) -> Int4Linear:
        """Return the layer, on the weight's device; see :class:`lavintk.contracts.Quantizer`.

        :raises ModelError: the weight's shape, type or device is not supported, or it is not finite.
        """
        weight = checked_weight(weight, bias, "int4")
        layer = self.empty(weight.shape[0], weight.shape[1], False, weight.device)
        layer.bias = None if bias is None else bias.detach()
        importance = column_importance(weight) if self.search == "balanced" else None
        tile = _tile(weight.device)

        def fill(rows: slice) -> None:
            self._fill(layer, rows, weight[rows], importance, tile)

        pieces = slices(weight.shape[0], max(1, PIECES[weight.device.type] // weight.shape[1]))
        if weight.device.type == "cpu":
            each(fill, pieces)
        else:
            for rows in pieces:
                fill(rows)
        return layer

    def quantize_calibrated(self, weight: Tensor, bias: Tensor | None, second_moment: Tensor) -> Int4Linear:
        """Return the layer rounded for its inputs; see :class:`lavintk.contracts.CalibratedQuantizer`.

        The search ``balanced`` weighs errors by the inputs' squares here, which it guesses at otherwise. Rows that
        error feedback does not help are those of :meth:`quantize`.

        :raises ModelError: as :meth:`quantize`, or the second moment does not fit or is not finite.
        """
        layer = self.quantize(weight, bias)
        moment = checked_moment(second_moment, weight.shape[1])
        columns, plain = (self._filled_up(w.float()).t().contiguous() for w in (weight.detach(), layer.dequantize()))
        missing = len(columns) - len(moment)
        moment = F.pad(moment, (0, missing, 0, missing))
        blocks = round_with_feedback(columns, moment, self.block_size, self.search)
        better = output_error(blocks.dequantize() - columns, moment) < output_error(plain - columns, moment)
        codes = (blocks.codes[0::2] | blocks.codes[1::2] << 4).t().reshape(layer.codes.shape)
        layer.codes[better] = codes[better]
        layer.scales[better] = blocks.scales.t()[better]
        layer.zero_points[better] = _paired(blocks.zero_points.t())[better]
        return layer

    def empty(self, out_features: int, in_features: int, bias: bool, device: torch.device) -> Int4Linear:
        """Return a layer with undefined content and an fp32 bias.

        ``load_state_dict(assign=True)`` gives the bias the type of what is loaded.
        """
        blocks = -(-in_features // self.block_size)
        return Int4Linear(
            in_features,
            torch.empty(out_features, blocks, self.block_size // 2, dtype=torch.uint8, device=device),
            torch.empty(out_features, blocks, dtype=torch.float32, device=device),
            torch.empty(out_features, -(-blocks // 2), dtype=torch.uint8, device=device),
            torch.empty(out_features, dtype=torch.float32, device=device) if bias else None,
        )

    def _fill(self, layer: Int4Linear, rows: slice, weight: Tensor, importance: Tensor | None, tile: int) -> None:
        count, blocks, half = layer.codes[rows].shape
        if importance is not None:
            importance = self._in_columns(importance.unsqueeze(0)).repeat(1, count)
        columns = self._in_columns(weight.float())
        found = [
            quantize_blocks(columns[:, part], self.search, None if importance is None else importance[:, part])
            for part in slices(columns.shape[1], tile)
        ]
        codes, scales, zero_points = (torch.cat(parts, dim=-1) for parts in zip(*found))
        layer.codes[rows] = (codes[0::2] | codes[1::2] << 4).t().reshape(count, blocks, half)
        layer.scales[rows] = scales.view(count, blocks)
        layer.zero_points[rows] = _paired(zero_points.view(count, blocks))

    def _in_columns(self, rows: Tensor) -> Tensor:
        """Return ``[rows, in]`` as ``[block_size, rows * blocks]``, rows filled up with zeros."""
        return self._filled_up(rows).reshape(-1, self.block_size).t().contiguous()

    def _filled_up(self, rows: Tensor) -> Tensor:
        """Return ``[rows, in]`` with as many zeros behind each row as its last block lacks."""
        return F.pad(rows, (0, -rows.shape[1] % self.block_size))


def _tile(device: torch.device) -> int:
    """Return how many blocks are searched at once; to be asked before threads share the work."""
    many = device.type == "cpu" and torch.get_num_threads() >= MANY_THREADS
    return TILES["cpu with many threads" if many else device.type]


def _paired(zero_points: Tensor) -> Tensor:
    """Return zero points ``[rows, blocks]`` two to a byte, the first in the low nibble."""
    even = F.pad(zero_points, (0, zero_points.shape[1] % 2))
    return even[:, 0::2] | even[:, 1::2] << 4


class Int4Linear(FrozenLinear):
    """A frozen layer in 4-bit blocks: ``weight = (code - zero point) * scale``.

    Buffers: ``codes`` uint8 ``[out, blocks, block_size / 2]`` and ``zero_points`` uint8 ``[out, ceil(blocks / 2)]``,
    both with the first of two in the low nibble; ``scales`` fp32 ``[out, blocks]``. Blocks run along a row; the last
    one may reach beyond it, into weights that are zero.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor
    scale_names = ("scales",)

    def __init__(
        self, in_features: int, codes: Tensor, scales: Tensor, zero_points: Tensor, bias: Tensor | None
    ) -> None:
        super().__init__(codes.shape[0], in_features, bias)
        self.block_size = 2 * codes.shape[2]
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("zero_points", zero_points)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight ``[out, in]``, computed in fp32 and rounded once to ``dtype``."""
        if self.codes.is_cuda and dtype in FLOATS and _kernel_runs(self.codes.device):
            from lavintk_int4.kernels import dequantize_int4

            return dequantize_int4(self.codes, self.scales, self.zero_points, self.in_features, dtype)
        unpack = self._unpack_by_table if self.codes.device.type == "cpu" else self._unpack_by_shifts
        weight = unpack(dtype).view(self.out_features, -1)
        if weight.shape[1] == self.in_features:
            return weight
        return weight[:, : self.in_features].contiguous()

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the rows ``index`` of the weight, unpacked by themselves."""
        if index.numel() == 0:
            return torch.empty(0, self.in_features, dtype=dtype, device=index.device)
        codes, scales, zeros = (b.index_select(0, index) for b in (self.codes, self.scales, self.zero_points))
        return Int4Linear(self.in_features, codes, scales, zeros, None).dequantize(dtype)

    def packed(self) -> PackedWeight:
        """Describe the storage: what ``MatMulNBits`` takes as B, scales and zero points, without a change."""
        return PackedWeight(
            scheme="int4-block",
            shape=(self.out_features, self.in_features),
            codes=self.codes,
            scales=self.scales,
            zero_points=self.zero_points,
            block_size=self.block_size,
            layout="[out, blocks, block_size / 2], first element in the low nibble; zero points packed alike",
        )

    def extra_repr(self) -> str:
        """Describe the layer in ``print(model)``."""
        return f"{super().extra_repr()}, int4, block_size={self.block_size}"

    def _block_zeros(self) -> Tensor:
        """Return the zero points unpacked, uint8 ``[out, blocks]``."""
        pairs = torch.stack([self.zero_points & 15, self.zero_points >> 4], dim=-1)
        return pairs.flatten(1)[:, : self.scales.shape[1]]

    def _unpack_by_table(self, dtype: torch.dtype) -> Tensor:
        """Look both codes of a byte up in one gather, in pieces that fit the cache."""
        rows, blocks = self.scales.shape
        weight = torch.empty(rows, blocks, self.block_size, dtype=dtype)
        zeros, scales, table = self._block_zeros().float().unsqueeze(-1), self.scales.unsqueeze(-1), _byte_values()

        def unpack(piece: slice) -> None:
            values = table.index_select(0, self.codes[piece].reshape(-1).int()).view(torch.float32)
            centred = values.view(-1, blocks, self.block_size).sub_(zeros[piece])
            torch.mul(centred, scales[piece], out=weight[piece])

        pieces = slices(rows, max(1, UNPACKED_PIECE // (blocks * self.block_size)))
        if len(pieces) > 1:
            each(unpack, pieces)
        else:  # all threads share it
            unpack(pieces[0])
        return weight

    def _unpack_by_shifts(self, dtype: torch.dtype) -> Tensor:
        """Use nothing larger than the result: each product is computed in fp32 and stored in ``dtype``."""
        weight = torch.empty(*self.codes.shape, 2, dtype=dtype, device=self.codes.device)
        zeros, scales = self._block_zeros().to(torch.int8).unsqueeze(-1), self.scales.unsqueeze(-1)
        for place, codes in enumerate((self.codes & 15, self.codes >> 4)):
            torch.mul(codes.view(torch.int8).sub_(zeros), scales, out=weight[..., place])
        return weight


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _kernel_runs(device: torch.device) -> bool:
    """Whether the Triton kernel is switched on and runs on ``device``."""
    return enabled("dequantize") and not problem(device)


@functools.cache
def _byte_values() -> Tensor:
    """Return the two fp32 codes in each byte as one int64, ``[256]``, the low nibble first in memory."""
    byte = torch.arange(256)
    return torch.stack([byte & 15, byte >> 4], dim=1).float().view(torch.int64).view(-1)

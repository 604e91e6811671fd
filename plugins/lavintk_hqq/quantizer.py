"""Frozen linear layers in 4, 3 or 2 bits, on grids that HQQ finds.

HQQ (Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023) gives each group of weights
a scale and a zero point, a fraction, such that a norm below 1 of the errors is small: large errors of a few outliers
count for little. It needs no data. The package ``hqq`` finds them. What it finds is rounded to fp16 as it will be
stored, and the codes are rounded to nearest on that grid.

The package has thresholds of its own: groups that span less than 1e-4 become constant, and scales end at 5e-5. They
are meant for weights of usual size. So the weight is multiplied by a power of two before, which brings its root mean
square to between 0.25 and 0.5: then a weight is held equally well whatever its size.
"""

from __future__ import annotations

from typing import Literal

import torch
from hqq.core.quantize import Quantizer as HalfQuadratic
from torch import Tensor
from torch.nn import functional as F

from lavintk.layers import FrozenLinear, PackedWeight, checked_weight
from lavintk.threads import each, slices
from lavintk_hqq.packing import choose, pack, packed_size, unpack

PIECES = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Weights searched or dequantized at once: on a CPU intermediate results stay in the cache, on CUDA they take little
memory. The package ends its search where the mean error of a piece grows."""
SMALLEST_UNIT = 2.0**-100
"""Weights below are as good as zeros."""


class HqqQuantizer:
    """Quantizes to whole numbers of ``bits`` bits with a scale and an offset for each group.

    The row-major weight is filled up with zeros to whole groups, and laid out as ``[groups, group_size]`` (axis 1) or
    ``[group_size, groups]`` (axis 0).

    :param bits: of a code.
    :param group_size: weights that share scale and offset, a multiple of 8.
    :param axis: along which of the two dimensions a group lies; the package's own name for it.
    """

    requires_cuda = False

    def __init__(self, bits: Literal[4, 3, 2] = 4, group_size: int = 64, axis: Literal[0, 1] = 1) -> None:
        self.bits, self.group_size, self.axis = bits, group_size, axis

    def quantize(self, weight: Tensor, bias: Tensor | None) -> HqqLinear:
        """Return the layer, on the weight's device; see :class:`lavintk.contracts.Quantizer`.

        On CUDA the package searches in fp16, so the grids differ a little from those found on a CPU.

        :raises ModelError: the weight's shape, type or device is not supported, or it is not finite.
        """
        weight = checked_weight(weight, bias, "hqq")
        layer = self.empty(weight.shape[0], weight.shape[1], False, weight.device)
        layer.bias = None if bias is None else bias.detach()
        flat = F.pad(weight.float().view(-1), (0, layer.groups * self.group_size - weight.numel()))
        unit = _unit(flat, weight.numel())
        layer.unit.copy_(unit)
        self._fill(layer, (flat / unit).view(layer.grid))
        return layer

    def empty(self, out_features: int, in_features: int, bias: bool, device: torch.device) -> HqqLinear:
        """Return a layer with undefined content and an fp32 bias.

        ``load_state_dict(assign=True)`` gives the bias the type of what is loaded.
        """
        groups = -(-out_features * in_features // self.group_size)
        return HqqLinear(
            (out_features, in_features),
            (self.bits, self.group_size, self.axis),
            torch.empty(packed_size(groups * self.group_size, self.bits), dtype=torch.uint8, device=device),
            torch.empty(groups, dtype=torch.float16, device=device),
            torch.empty(groups, dtype=torch.float16, device=device),
            torch.empty((), dtype=torch.float32, device=device),
            torch.empty(out_features, dtype=torch.float32, device=device) if bias else None,
        )

    def _fill(self, layer: HqqLinear, grouped: Tensor) -> None:
        """Find the grids of all groups, a piece at a time, and round to them.

        :param grouped: the weight in units, fp32, as the layer's grid; it is overwritten.
        """

        def find(groups: slice) -> None:
            scales, offsets = self._search(grouped[groups] if self.axis == 1 else grouped[:, groups])
            layer.scales[groups], layer.offsets[groups] = scales.view(-1), offsets.view(-1)

        pieces = slices(layer.groups, max(1, PIECES[grouped.device.type] // self.group_size))
        if grouped.device.type == "cpu":
            each(find, pieces)
        else:
            for groups in pieces:
                find(groups)
        across = (-1, 1) if self.axis == 1 else (1, -1)
        grouped.sub_(layer.offsets.float().view(across)).div_(layer.scales.float().view(across))
        codes = grouped.round_().clamp_(0, 2**self.bits - 1).to(torch.uint8)
        layer.codes.copy_(pack(codes, self.bits))

    def _search(self, grouped: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and offset (the value of code 0) of each group, fp32, of length 1 along the axis."""
        _, found = HalfQuadratic.quantize(
            grouped,
            nbits=self.bits,
            group_size=self.group_size,
            axis=self.axis,
            bitpack=False,
            device=str(grouped.device),
        )
        # the search is done in inference mode, whose tensors nothing may change later: hence the clones
        scales, zeros = (found[name].clone().float() for name in ("scale", "zero"))
        offsets = -zeros * scales
        low, high = torch.aminmax(grouped, dim=self.axis, keepdim=True)
        # in fp16 a large value times a large scale overflows, as in a narrow group far from 0: there the range counts
        sound = torch.isfinite(scales) & torch.isfinite(offsets) & (scales > 0)
        span = ((high - low) / (2**self.bits - 1)).clamp(min=torch.finfo(torch.float16).smallest_normal)
        return torch.where(sound, scales, span), torch.where(sound, offsets, low)


class HqqLinear(FrozenLinear):
    """A frozen layer in groups: ``weight = (offset + code * scale) * unit``.

    Buffers: ``codes`` uint8 (:mod:`lavintk_hqq.packing`), those of the matrix :attr:`grid` in row-major order;
    ``scales`` and ``offsets`` fp16 ``[groups]``; ``unit`` fp32, a scalar, a power of two.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor
    unit: Tensor
    scale_names = ("scales", "offsets", "unit")

    def __init__(
        self,
        shape: tuple[int, int],
        manner: tuple[int, int, int],
        codes: Tensor,
        scales: Tensor,
        offsets: Tensor,
        unit: Tensor,
        bias: Tensor | None,
    ) -> None:
        super().__init__(shape[0], shape[1], bias)
        self.bits, self.group_size, self.axis = manner
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("offsets", offsets)
        self.register_buffer("unit", unit)

    @property
    def groups(self) -> int:
        """Return how many groups there are; the last one may reach beyond the weight, into zeros."""
        return self.scales.numel()

    @property
    def grid(self) -> tuple[int, int]:
        """Return the shape in which groups are rows (axis 1) or columns (axis 0)."""
        return (self.groups, self.group_size) if self.axis == 1 else (self.group_size, self.groups)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight ``[out, in]``, computed in fp32 and rounded once to ``dtype``."""
        rows, columns = self.grid
        weight = torch.empty(rows, columns, dtype=dtype, device=self.codes.device)
        scales, offsets = self._in_units(self.scales), self._in_units(self.offsets)
        step = max(8, PIECES.get(weight.device.type, PIECES["cuda"]) // columns // 8 * 8)
        for piece in slices(rows, step):  # of 8 rows, so that each begins with a whole byte
            codes = self._codes(piece.start, piece.stop)
            scale, offset = (scales[piece], offsets[piece]) if self.axis == 1 else (scales, offsets)
            weight[piece] = torch.addcmul(offset, codes.float(), scale)
        flat = weight.view(-1)[: self.out_features * self.in_features]
        return flat.view(self.out_features, self.in_features)

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the rows ``index`` of the weight; unpacked by themselves where they are whole groups."""
        if self.axis == 0 or self.in_features % self.group_size or index.numel() == 0:
            return super().rows(index, dtype)
        codes = choose(self.codes, self.bits, self.out_features, index)
        scales, offsets = (
            stored.view(self.out_features, -1).index_select(0, index).view(-1) for stored in (self.scales, self.offsets)
        )
        shape, manner = (index.numel(), self.in_features), (self.bits, self.group_size, self.axis)
        return HqqLinear(shape, manner, codes, scales, offsets, self.unit, None).dequantize(dtype)

    def packed(self) -> PackedWeight:
        """Describe the storage: one code per byte, zero points as fractions ``-offset / scale``.

        With axis 1 codes, scales and zero points are those of blocks along the row-major weight. With axis 0 group
        ``g`` has the codes ``g``, ``g + groups``, ``g + 2 * groups``, ...; the layout says so.
        """
        count = self.out_features * self.in_features
        spread = f"row-major, group g has every {self.groups}th weight from g on"
        return PackedWeight(
            scheme=f"hqq{self.bits}",
            shape=(self.out_features, self.in_features),
            codes=self._codes(0, self.grid[0]).view(-1)[:count].view(self.out_features, self.in_features),
            scales=self.scales.float() * self.unit,
            zero_points=-self.offsets.float() / self.scales.float(),
            block_size=self.group_size,
            layout="row-major" if self.axis == 1 else spread,
            extra={"bits": self.bits, "axis": self.axis},
        )

    def extra_repr(self) -> str:
        """Describe the layer in ``print(model)``."""
        manner = f"bits={self.bits}, group_size={self.group_size}, axis={self.axis}"
        return f"{super().extra_repr()}, hqq, {manner}"

    def _codes(self, first: int, last: int) -> Tensor:
        """Return rows ``first`` up to ``last`` of the codes, uint8 ``[last - first, columns]``."""
        columns = self.grid[1]
        return unpack(self.codes, self.bits, first * columns, last * columns).view(-1, columns)

    def _in_units(self, stored: Tensor) -> Tensor:
        """Return scales or offsets in fp32 and times the unit, so that they broadcast over the grid; exact."""
        return (stored.float() * self.unit).view((-1, 1) if self.axis == 1 else (1, -1))


def _unit(flat: Tensor, count: int) -> Tensor:
    """Return the power of two, fp32 and a scalar, that the weight is divided by.

    :param count: elements of ``flat`` that are not filled up.
    """
    rms = torch.linalg.vector_norm(flat, dtype=torch.float64) / count**0.5
    exponent = torch.frexp(rms).exponent + 1
    return torch.ldexp(torch.ones_like(rms), exponent).clamp(SMALLEST_UNIT, 2.0**120).float()

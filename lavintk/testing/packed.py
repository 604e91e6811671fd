"""What a packed weight means: the weight that an exporter reads out of it."""

from __future__ import annotations

import torch
from torch import Tensor

from lavintk.layers import PackedWeight


def unpacked(packed: PackedWeight) -> Tensor:
    """Return the weight ``[out, in]`` in fp32 that :class:`lavintk.layers.PackedWeight` describes.

    Codes go through the codebook, or are whole numbers less the zero point, and are multiplied by their block's scale.
    Blocks of ``block_size`` lie along the row-major weight, or along each row if there are so many scales.

    :raises ValueError: the numbers of codes, scales or zero points do not fit the shape and the layout.
    """
    codes = _codes(packed)
    values = codes.float() if packed.codebook is None else packed.codebook.float()[codes.long()]
    if packed.zero_points is not None:
        values = values - _spread(_points(packed), packed, values.shape)
    if packed.scales is not None:
        values = values * _spread(packed.scales.float(), packed, values.shape)
    return values[:, : packed.shape[1]]


def _codes(packed: PackedWeight) -> Tensor:
    """Return one code for each weight, ``[out, in]``, or with as many more columns as blocks reach beyond a row."""
    rows, columns = packed.shape
    codes = packed.codes
    if "nibble" in packed.layout:
        codes = _halves(codes, packed.layout)
    if codes.numel() % rows or codes.numel() < rows * columns:
        raise ValueError(f"{codes.numel()} codes for a weight of {rows} x {columns} in the layout {packed.layout!r}")
    return codes.reshape(rows, -1)


def _halves(pairs: Tensor, layout: str) -> Tensor:
    high, low = pairs >> 4, pairs & 15
    first = (high, low) if "high nibble" in layout else (low, high)
    return torch.stack(first, dim=-1).flatten(-2)


def _points(packed: PackedWeight) -> Tensor:
    """Return one zero point for each scale."""
    points, scales = packed.zero_points, packed.scales
    assert points is not None
    if scales is None or points.numel() == scales.numel():
        return points.float()
    if points.dtype == torch.uint8 and "nibble" in packed.layout and points.dim() == 2 == scales.dim():
        return _halves(points, packed.layout)[:, : scales.shape[1]].float()
    raise ValueError(f"{points.numel()} zero points for {scales.numel()} scales")


def _spread(of_blocks: Tensor, packed: PackedWeight, shape: torch.Size) -> Tensor:
    """Return what belongs to blocks or rows for each weight of ``shape``."""
    rows, columns = shape
    size, count = packed.block_size, of_blocks.numel()
    if size == 0 and count in (1, rows):
        return of_blocks.reshape(-1, 1).expand(rows, columns)
    if size and count == rows * -(-columns // size):
        return of_blocks.reshape(rows, -1).repeat_interleave(size, dim=1)[:, :columns]
    if size and count == -(-rows * columns // size):
        return of_blocks.flatten().repeat_interleave(size)[: rows * columns].view(rows, columns)
    raise ValueError(f"{count} scales or zero points for {rows} x {columns} codes in blocks of {size or 'a row'}")

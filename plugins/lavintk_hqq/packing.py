"""Codes of 2, 3 or 4 bits, packed without gaps."""

from __future__ import annotations

import torch
from torch import Tensor

FIELDS = {4: (4,), 3: (2, 1), 2: (2,)}
"""Into which fields a code of so many bits is cut, the low bits first. Each divides a byte."""


def packed_size(count: int, bits: int) -> int:
    """Return the bytes that ``count`` codes take, a multiple of 8."""
    return count * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes as uint8 ``[count * bits / 8]``: first the lowest fields of all codes, then the next ones.

    A byte holds the fields of 2, 4 or 8 codes, the first one in its low bits.

    :param codes: uint8, a multiple of 8 elements, each below ``2 ** bits``.
    """
    parts, taken = [], 0
    for width in FIELDS[bits]:
        fields = (codes.reshape(-1, 8 // width) >> taken) & (2**width - 1)
        parts.append((fields << _shifts(width, codes.device)).sum(1, dtype=torch.uint8))
        taken += width
    return torch.cat(parts)


def unpack(packed: Tensor, bits: int, first: int, last: int) -> Tensor:
    """Return the codes from ``first`` up to ``last``, multiples of 8, as uint8 ``[last - first]``."""
    count = packed.numel() * 8 // bits
    codes: Tensor | None = None
    start = taken = 0
    for width in FIELDS[bits]:
        piece = packed[start + first * width // 8 : start + last * width // 8]
        fields = ((piece.unsqueeze(1) >> _shifts(width, packed.device)) & (2**width - 1)).view(-1)
        codes = fields if codes is None else codes.bitwise_or_(fields << taken)
        start, taken = start + count * width // 8, taken + width
    assert codes is not None
    return codes


def choose(packed: Tensor, bits: int, rows: int, index: Tensor) -> Tensor:
    """Return the packed codes of some of ``rows`` rows, each a multiple of 8 codes long."""
    sizes = [packed.numel() // bits * width for width in FIELDS[bits]]
    return torch.cat([fields.view(rows, -1).index_select(0, index).view(-1) for fields in packed.split(sizes)])


def _shifts(width: int, device: torch.device) -> Tensor:
    """Return where the fields of a byte begin, uint8 ``[8 / width]``; made on the device, so that no host waits."""
    return torch.arange(0, 8, width, dtype=torch.uint8, device=device)

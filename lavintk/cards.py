"""Cards whose step times can be foretold: what their data sheets say."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lavintk.errors import RecipeError, did_you_mean

DISK = 2.5e9
"""Bytes per second that a solid-state disk delivers; what the system still has in memory comes faster."""
PCIE_3, PCIE_4, PCIE_5 = 12e9, 22e9, 53e9
"""Bytes per second from pinned host memory over sixteen lanes, of 16, 32 and 63 GB/s by the standard."""


@dataclass(frozen=True)
class Card:
    """A GPU: memory in GiB, dense 16-bit FLOP/s, bytes/s of its memory and from the host. From data sheets."""

    gib: int
    flops: float
    bandwidth: float
    bus: float = PCIE_4


CARDS = {
    "t4": Card(16, 65e12, 320e9, PCIE_3),
    "l4": Card(24, 121e12, 300e9),
    "rtx2060": Card(6, 26e12, 336e9, PCIE_3),
    "rtx3060": Card(12, 25e12, 360e9),
    "rtx3070": Card(8, 41e12, 448e9),
    "rtx3080": Card(10, 59e12, 760e9),
    "rtx3090": Card(24, 71e12, 936e9),
    "rtx4060": Card(8, 30e12, 272e9, PCIE_4 / 2),
    "rtx4070": Card(12, 58e12, 504e9),
    "rtx4080": Card(16, 97e12, 717e9),
    "rtx4090": Card(24, 165e12, 1008e9),
    "rtx5090": Card(32, 209e12, 1792e9, PCIE_5),
    "a100": Card(40, 312e12, 1555e9),
    "l40s": Card(48, 362e12, 864e9),
    "h100": Card(80, 990e12, 3350e9, PCIE_5),
    "h200": Card(140, 990e12, 4800e9, PCIE_5),
}
UNKNOWN = CARDS["rtx3090"]
"""What a card that is not listed is taken for where ways to compute are compared, not foretold."""


def find_card(name: str) -> Card:
    """Return the card called ``name``.

    :raises RecipeError: it is unknown.
    """
    if name.lower() not in CARDS:
        known = list(CARDS)
        raise RecipeError("--gpu", [f"unknown card {name!r}; known are {', '.join(known)}.{did_you_mean(name, known)}"])
    return CARDS[name.lower()]


def card_called(device: str) -> Card:
    """Return the card that a driver calls ``device``, for example ``"NVIDIA GeForce RTX 3090"``, or :data:`UNKNOWN`."""
    words = re.sub(r"[^a-z0-9]+", " ", device.lower()).replace("rtx ", "rtx").split()
    return next((CARDS[word] for word in words if word in CARDS), UNKNOWN)

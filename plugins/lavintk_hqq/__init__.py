"""The quantizer ``hqq``: half-quadratic quantization to 4, 3 or 2 bits, through the package ``hqq``.

The package finds scale and zero point of each group of weights; what they are stored in and computed with is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lavintk.hookspecs import hookimpl

if TYPE_CHECKING:
    from lavintk.contracts import Quantizer
    from lavintk.registry import Registry

lavintk_api = 1


@dataclass(frozen=True)
class HqqOptions:
    """Width of the codes, and which weights share a scale and a zero point."""

    bits: Literal[4, 3, 2] = field(default=4, metadata={"help": "of a code: 4, 3 or 2"})
    group_size: int = field(
        default=64,
        metadata={
            "help": "weights sharing scale and zero point, which take 32 bits: a multiple of 8; 2 bits want 16 or 32"
        },
    )
    axis: Literal[0, 1] = field(
        default=1,
        metadata={"help": "how groups lie: 1: neighbours in a row; 0: spread over rows, far apart in memory"},
    )

    def __post_init__(self) -> None:
        if self.group_size < 8 or self.group_size % 8:
            raise ValueError(f"option 'group_size' must be a multiple of 8 from 8 on, got {self.group_size}")


def make_hqq(options: HqqOptions) -> Quantizer:
    """Return the quantizer."""
    from lavintk_hqq.quantizer import HqqQuantizer

    return HqqQuantizer(options.bits, options.group_size, options.axis)


@hookimpl
def lavintk_register_quantizers(registry: Registry[Quantizer]) -> None:
    """Offer ``hqq``."""
    registry.add(
        "hqq",
        make_hqq,
        options=HqqOptions,
        summary="HQQ in 4, 3 or 2 bits and 32 per group, 4.5 per weight by default; wants the package hqq",
    )

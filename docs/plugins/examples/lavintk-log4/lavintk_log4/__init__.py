"""The quantizer ``log4``: 4 bits for each weight, on a grid of sixteen values with equal ratios between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lavintk import hookimpl

if TYPE_CHECKING:
    from lavintk.contracts import Quantizer
    from lavintk.registry import Registry

lavintk_api = 1


@dataclass(frozen=True)
class Log4Options:
    """Size of the blocks, and the grid."""

    block_size: int = field(default=32, metadata={"help": "weights of a row that share a scale; an even number"})
    ratio: float = field(default=2**0.5, metadata={"help": "of a value of the grid to the next smaller one"})

    def __post_init__(self) -> None:
        if self.block_size < 2 or self.block_size % 2:
            raise ValueError(f"option 'block_size' must be an even number from 2 on, got {self.block_size}")
        if self.ratio <= 1:
            raise ValueError(f"option 'ratio' must be above 1, got {self.ratio}")


def make_log4(options: Log4Options) -> Quantizer:
    """Return the quantizer."""
    from lavintk_log4.layer import Log4Quantizer  # brings torch, which every start of lavintk should not wait for

    return Log4Quantizer(options.block_size, options.ratio)


@hookimpl
def lavintk_register_quantizers(registry: Registry[Quantizer]) -> None:
    """Offer ``log4``."""
    registry.add("log4", make_log4, options=Log4Options, summary="4 bits on a logarithmic grid, 5 bits with the scales")

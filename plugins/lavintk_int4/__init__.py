"""The quantizer ``int4``: ONNX Runtime's 4-bit blocks with zero points, to train on the grid that will be shipped.

What is stored is, byte for byte, what the operator ``MatMulNBits`` reads. An export copies it, so an adapter that was
trained on this base meets the same base on the device.
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
class Int4Options:
    """Size of the blocks, and how scale and zero point of each are found."""

    block_size: int = field(
        default=32, metadata={"help": "weights of a row sharing scale and zero point: a power of two from 16 on"}
    )
    search: Literal["balanced", "mse", "hqq", "none"] = field(
        default="balanced",
        metadata={
            "help": "how scales and zero points are found: balanced (least squared error, inputs with small weights "
            "counting more), mse (least squared error), hqq (a norm that tolerates outliers), none (the range)"
        },
    )

    def __post_init__(self) -> None:
        if self.block_size < 16 or self.block_size & (self.block_size - 1):
            raise ValueError(f"option 'block_size' must be a power of two from 16 on, got {self.block_size}")


def make_int4(options: Int4Options) -> Quantizer:
    """Return the quantizer."""
    from lavintk_int4.quantizer import Int4Quantizer

    return Int4Quantizer(options.block_size, options.search)


@hookimpl
def lavintk_register_quantizers(registry: Registry[Quantizer]) -> None:
    """Offer ``int4``."""
    registry.add(
        "int4",
        make_int4,
        options=Int4Options,
        summary="4-bit blocks with zero points, as ONNX Runtime's fast kernels read them; 5.1 bits per weight",
    )

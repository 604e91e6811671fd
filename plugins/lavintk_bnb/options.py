"""Options of the quantizers and optimizers; importing this module imports neither torch nor bitsandbytes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Block sizes that bitsandbytes has kernels for."""


@dataclass(frozen=True)
class FourBitOptions:
    """Options of ``nf4`` and ``fp4``."""

    block_size: int = field(default=64, metadata={"help": "weights sharing one scale: 32, 64, ... 4096"})
    double_quant: bool = field(default=True, metadata={"help": "store the scales in 8 bits too"})

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            known = ", ".join(map(str, BLOCK_SIZES))
            raise ValueError(f"option 'block_size' must be one of {known}, got {self.block_size}")


@dataclass(frozen=True)
class Int8Options:
    """Options of ``int8``."""

    threshold: float = field(
        default=6.0,
        metadata={"help": "activations from this size on stay in 16 bits (CUDA only); 0 quantizes all of them"},
    )

    def __post_init__(self) -> None:
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise ValueError(f"option 'threshold' must be 0 or more, got {self.threshold}")


@dataclass(frozen=True)
class LionOptions:
    """Options of the Lion optimizers; the betas of the recipe are AdamW's and mean something else."""

    beta1: float = field(default=0.9, metadata={"help": "weight of the momentum in the update's sign"})
    beta2: float = field(default=0.99, metadata={"help": "decay of the momentum"})

    def __post_init__(self) -> None:
        _check_betas(beta1=self.beta1, beta2=self.beta2)


@dataclass(frozen=True)
class AdEMAMixOptions:
    """Options of the AdEMAMix optimizers; beta1 and beta2 are the recipe's."""

    beta3: float = field(default=0.9999, metadata={"help": "decay of the slow average"})
    alpha: float = field(default=5.0, metadata={"help": "weight of the slow average in the update"})
    schedule_steps: int = field(
        default=0,
        metadata={"help": "steps over which alpha and beta3 grow to their values; 0: from the start"},
    )

    def __post_init__(self) -> None:
        _check_betas(beta3=self.beta3)
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ValueError(f"option 'alpha' must be 0 or more, got {self.alpha}")
        if self.schedule_steps < 0:
            raise ValueError(f"option 'schedule_steps' must be 0 or more, got {self.schedule_steps}")


def _check_betas(**betas: float) -> None:
    for name, value in betas.items():
        if not 0 <= value < 1:
            raise ValueError(f"option {name!r} must be at least 0 and below 1, got {value}")

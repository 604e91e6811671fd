"""Optimizers: AdamW with 4-bit and with fp8 state through torchao, and Muon, which torch has itself.

torchao's are plain torch operations, so they run on a CPU and on CUDA and need no kernel of bitsandbytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

from lavintk.hookspecs import hookimpl

if TYPE_CHECKING:
    from lavintk.contracts import Optimizer
    from lavintk.registry import Registry

lavintk_api = 1


@dataclass(frozen=True)
class AdamWOptions:
    """Whether torchao's step is compiled."""

    compile: bool = field(
        default=False,
        metadata={
            "help": "make one kernel of the step, which is faster; needs a C++ compiler on a CPU, Triton and a C "
            "compiler on CUDA, and for fp8 a GPU that has it (Ada, Hopper or newer)"
        },
    )


@dataclass(frozen=True)
class MuonOptions:
    """Options of Muon; betas and eps of the recipe are AdamW's, for what is no matrix."""

    momentum: float = field(default=0.95, metadata={"help": "decay of the sum of gradients"})
    nesterov: bool = field(default=True, metadata={"help": "look ahead by the newest gradient"})
    steps: int = field(default=5, metadata={"help": "iterations that bring the update's singular values near 1"})

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"option 'momentum' must be at least 0 and below 1, got {self.momentum}")
        if not 1 <= self.steps < 100:
            raise ValueError(f"option 'steps' must be from 1 to 99, got {self.steps}")


def make_adamw(options: AdamWOptions, state_bits: Literal[4, 8]) -> Optimizer:
    """Return AdamW with its state in 4 bits, or in fp8."""
    from lavintk_torchao.adamw import AdamW

    return AdamW(state_bits, options.compile)


def make_muon(options: MuonOptions) -> Optimizer:
    """Return Muon."""
    from lavintk_torchao.muon import Muon

    return Muon(options.momentum, options.nesterov, options.steps)


@hookimpl
def lavintk_register_optimizers(registry: Registry[Optimizer]) -> None:
    """Offer ``adamw-4bit``, ``adamw-fp8`` and ``muon``."""
    registry.add(
        "adamw-4bit",
        partial(make_adamw, state_bits=4),
        options=AdamWOptions,
        summary="AdamW, 4-bit state; wants the package torchao",
    )
    registry.add(
        "adamw-fp8",
        partial(make_adamw, state_bits=8),
        options=AdamWOptions,
        summary="AdamW, state in 8-bit floating point; wants the package torchao",
    )
    registry.add(
        "muon",
        make_muon,
        options=MuonOptions,
        summary="Muon for matrices, one 32-bit state value, and AdamW for the rest; takes AdamW's learning rates",
    )

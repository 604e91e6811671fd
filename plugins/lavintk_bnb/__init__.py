"""Quantizers and optimizers through bitsandbytes.

Quantizers: ``nf4`` for training on little memory (QLoRA's), ``fp4`` for comparison, ``int8`` (LLM.int8())
where a byte per weight fits. Optimizers: AdamW, Lion and AdEMAMix with 8-bit state, and paged state that
moves to host memory when the device runs short.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

from lavintk.hookspecs import hookimpl
from lavintk.registry import NoOptions
from lavintk_bnb.options import AdEMAMixOptions, FourBitOptions, Int8Options, LionOptions

if TYPE_CHECKING:
    from lavintk.contracts import Optimizer, Quantizer
    from lavintk.registry import Registry

lavintk_api = 1


def make_four_bit(options: FourBitOptions, scheme: Literal["nf4", "fp4"]) -> Quantizer:
    """Return the quantizer to 4-bit codes ``scheme``."""
    from lavintk_bnb.quantizers import FourBitQuantizer

    return FourBitQuantizer(scheme, options.block_size, options.double_quant)


def make_int8(options: Int8Options) -> Quantizer:
    """Return the quantizer to 8-bit rows."""
    from lavintk_bnb.quantizers import Int8Quantizer

    return Int8Quantizer(options.threshold)


def make_adamw(options: NoOptions, state_bits: Literal[8, 32], paged: bool) -> Optimizer:
    """Return AdamW."""
    from lavintk_bnb.optimizers import AdamW

    return AdamW(state_bits, paged)


def make_lion(options: LionOptions, paged: bool) -> Optimizer:
    """Return Lion with 8-bit state."""
    from lavintk_bnb.optimizers import Lion

    return Lion(8, paged, betas=(options.beta1, options.beta2))


def make_ademamix(options: AdEMAMixOptions, paged: bool) -> Optimizer:
    """Return AdEMAMix with 8-bit state."""
    from lavintk_bnb.optimizers import AdEMAMix

    return AdEMAMix(8, paged, beta3=options.beta3, alpha=options.alpha, schedule_steps=options.schedule_steps)


@hookimpl
def lavintk_register_quantizers(registry: Registry[Quantizer]) -> None:
    """Offer ``nf4``, ``fp4`` and ``int8``."""
    registry.add(
        "nf4",
        partial(make_four_bit, scheme="nf4"),
        options=FourBitOptions,
        summary="4-bit NormalFloat, about 4.13 bits per weight (QLoRA)",
    )
    registry.add(
        "fp4",
        partial(make_four_bit, scheme="fp4"),
        options=FourBitOptions,
        summary="4-bit floating point; nf4 is usually more exact",
    )
    registry.add("int8", make_int8, options=Int8Options, summary="8 bits per weight, one scale per row (LLM.int8())")


@hookimpl
def lavintk_register_optimizers(registry: Registry[Optimizer]) -> None:
    """Offer AdamW, Lion and AdEMAMix, resident and paged."""
    registry.add(
        "paged",
        partial(make_adamw, state_bits=32, paged=True),
        summary="AdamW, 32-bit state that pages to host memory (QLoRA's and LaVIN's)",
    )
    registry.add("8bit", partial(make_adamw, state_bits=8, paged=False), summary="AdamW, 8-bit state")
    registry.add("paged-8bit", partial(make_adamw, state_bits=8, paged=True), summary="AdamW, 8-bit paged state")
    registry.add(
        "lion-8bit",
        partial(make_lion, paged=False),
        options=LionOptions,
        summary="Lion, 8-bit state; wants a 3 to 10 times smaller learning rate than AdamW",
    )
    registry.add(
        "paged-lion-8bit",
        partial(make_lion, paged=True),
        options=LionOptions,
        summary="Lion, 8-bit paged state; wants a 3 to 10 times smaller learning rate than AdamW",
    )
    registry.add(
        "ademamix-8bit",
        partial(make_ademamix, paged=False),
        options=AdEMAMixOptions,
        summary="AdEMAMix (AdamW with a second, slow average), 8-bit state",
    )
    registry.add(
        "paged-ademamix-8bit",
        partial(make_ademamix, paged=True),
        options=AdEMAMixOptions,
        summary="AdEMAMix (AdamW with a second, slow average), 8-bit paged state",
    )

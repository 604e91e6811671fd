"""The core's own entries, offered through the same hooks as any plugin's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lavintk.hookspecs import hookimpl

if TYPE_CHECKING:
    from lavintk.contracts import Evaluation, Optimizer, Quantizer
    from lavintk.registry import NoOptions, Registry

lavintk_api = 1


def make_dense_quantizer(options: NoOptions) -> Quantizer:
    """Return the quantizer that keeps weights in 16 or 32 bits."""
    from lavintk.dense import DenseQuantizer

    return DenseQuantizer()


def make_adamw(options: NoOptions) -> Optimizer:
    """Return torch's AdamW."""
    from lavintk.adamw import AdamW

    return AdamW()


def make_exact_match(options: NoOptions) -> Evaluation:
    """Return the evaluation that compares whole answers."""
    from lavintk.evaluate import ExactMatch

    return ExactMatch()


@hookimpl
def lavintk_register_quantizers(registry: Registry[Quantizer]) -> None:
    """Offer ``none``."""
    registry.add("none", make_dense_quantizer, summary="no quantization: weights stay in the compute type")


@hookimpl
def lavintk_register_optimizers(registry: Registry[Optimizer]) -> None:
    """Offer ``adamw``."""
    registry.add("adamw", make_adamw, summary="AdamW in 32 bits, resident (torch)")


@hookimpl
def lavintk_register_evaluations(registry: Registry[Evaluation]) -> None:
    """Offer ``exact-match``."""
    registry.add("exact-match", make_exact_match, summary="share of answers equal to the reference, ignoring case")

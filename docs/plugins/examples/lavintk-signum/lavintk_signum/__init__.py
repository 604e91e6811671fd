"""The optimizer ``signum``: each parameter moves by the learning rate, in the direction of its averaged gradient.

That is Signum (Bernstein et al., "signSGD", arXiv 1802.04434): one value of state per parameter, half of AdamW's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lavintk import hookimpl

if TYPE_CHECKING:
    from lavintk.contracts import Optimizer
    from lavintk.registry import Registry

lavintk_api = 1


@dataclass(frozen=True)
class SignumOptions:
    """How gradients are averaged."""

    momentum: float = field(default=0.9, metadata={"help": "decay of the averaged gradient"})

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"option 'momentum' must be at least 0 and below 1, got {self.momentum}")


def make_signum(options: SignumOptions) -> Optimizer:
    """Return what builds the optimizer."""
    from lavintk_signum.optimizer import Signum  # brings torch, which every start of lavintk should not wait for

    return Signum(options.momentum)


@hookimpl
def lavintk_register_optimizers(registry: Registry[Optimizer]) -> None:
    """Offer ``signum``."""
    registry.add("signum", make_signum, options=SignumOptions, summary="the sign of the averaged gradient (Signum)")

"""The adapter ``lowrank``: an update of low rank beside each linear layer of the language model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lavintk import hookimpl

if TYPE_CHECKING:
    from lavintk.contracts import Adapter
    from lavintk.registry import Registry

lavintk_api = 1


@dataclass(frozen=True)
class LowrankOptions:
    """Size of the updates."""

    rank: int = field(default=8, metadata={"help": "rank of each update"})

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"option 'rank' must be at least 1, got {self.rank}")


def make_lowrank(options: LowrankOptions) -> Adapter:
    """Return an adapter that is not attached yet."""
    from lavintk_lowrank.adapter import LowrankAdapter  # brings torch, which every start of lavintk should not wait for

    return LowrankAdapter(options.rank)


@hookimpl
def lavintk_register_adapters(registry: Registry[Adapter]) -> None:
    """Offer ``lowrank``."""
    registry.add("lowrank", make_lowrank, options=LowrankOptions, summary="a low-rank update of each linear layer")

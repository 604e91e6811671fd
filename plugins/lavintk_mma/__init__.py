"""LaVIN's mixture-of-modality adapters: one small adapter per layer that switches between text and image + text.

Choose it to teach a language model to see with few parameters (3.8 M at 7B). It folds exactly into the linear layers
it feeds, one set of weights per modality. Source: Luo et al., "Cheap and Quick", NeurIPS 2023, section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lavintk import hookimpl

if TYPE_CHECKING:
    import click

    from lavintk.contracts import Adapter
    from lavintk.registry import Registry

lavintk_api = 1


@dataclass(frozen=True)
class MixtureOptions:
    """Geometry of the adapters; the defaults are LaVIN's for 7B."""

    dim: int = field(default=8, metadata={"help": "width of the bottleneck"})
    groups: int = field(default=2, metadata={"help": "groups of the up projections"})
    scale: float = field(default=1.0, metadata={"help": "factor on what the adapter adds"})
    temperature: float = field(default=10.0, metadata={"help": "of the router's softmax; LaVIN-13B uses 5"})
    dropout: float = field(default=0.1, metadata={"help": "on the bottleneck, in training"})
    placement: Literal["attn", "block"] = field(
        default="attn", metadata={"help": "attn: before q, k, v; block: also before the feed-forward layers"}
    )
    visual: Literal["affine", "router", "router_block", "normal", "none"] = field(
        default="affine",
        metadata={
            "help": "adapters of the vision tower: affine folds; router gates on each image's class token; "
            "router_block: also before its feed-forward layers; normal: LaVIN's without residual, for compat=lavin"
        },
    )
    routing: Literal["shared", "carried"] = field(
        default="shared",
        metadata={"help": "the modality token's path: shared runs it once per modality, carried once per row"},
    )
    compat: Literal["none", "lavin"] = field(
        default="none", metadata={"help": "lavin: as LaVIN's code does it, its mistakes included (docs/lavin.md)"}
    )

    def __post_init__(self) -> None:
        if self.dim < 1 or self.groups < 1 or self.dim % self.groups:
            raise ValueError(f"dim ({self.dim}) must be a positive multiple of groups ({self.groups})")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if self.visual == "normal" and self.compat != "lavin":
            raise ValueError(
                "visual=normal is LaVIN's adapter without residual, which starts with an attention that sees only "
                "zeros: set compat=lavin to load what was trained with it, or visual=affine to train"
            )


def make_mixture(options: MixtureOptions) -> Adapter:
    """Return an adapter that is not attached yet."""
    from lavintk_mma.adapter import MixtureOfModalityAdapter

    return MixtureOfModalityAdapter(options)


@hookimpl
def lavintk_register_adapters(registry: Registry[Adapter]) -> None:
    """Offer ``mma``."""
    registry.add(
        "mma",
        make_mixture,
        options=MixtureOptions,
        summary="LaVIN's mixture-of-modality adapters, switching by modality",
    )


@hookimpl
def lavintk_register_commands(group: click.Group) -> None:
    """Offer ``lavintk import lavin``."""
    import click

    from lavintk_mma.command import import_lavin

    importers = group.commands.get("import")
    if isinstance(importers, click.Group):
        importers.add_command(import_lavin)

"""What can be chosen about an ONNX folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

GRIDS = ("int4", "int8", "nf4", "fp16", "fp32")


@dataclass(frozen=True)
class OnnxOptions:
    """Grids, the adapter's form, and what recovers quality on another grid than the trained one."""

    quant: Literal["keep", "int4", "int8", "nf4", "fp16", "fp32"] = field(
        default="keep",
        metadata={
            "help": "grid of the linear layers; keep: int4 stays int4, everything else becomes int8, which keeps what "
            "was trained on nf4 and is fast on CPUs"
        },
    )
    embed_quant: Literal["auto", "int4", "int8", "fp16", "fp32"] = field(
        default="auto", metadata={"help": "grid of the embedding; auto: int8, or the type of fp16 and fp32 folders"}
    )
    head_quant: Literal["auto", "int4", "int8", "fp16", "fp32"] = field(
        default="auto", metadata={"help": "grid of the output head; auto: as embed_quant"}
    )
    vision_quant: Literal["auto", "int8", "fp16", "fp32"] = field(
        default="auto", metadata={"help": "grid of the vision tower; auto: fp16, and fp32 in fp32 folders"}
    )
    adapter: Literal["auto", "merge", "side"] = field(
        default="auto",
        metadata={
            "help": "merge: folded into the weights before they are quantized; side: low-rank nodes beside the base as "
            "it was trained; auto: what changes the weights less; where it hardly matters, merge, or side if two "
            "modalities share the weights"
        },
    )
    mixed: str = field(
        default="",
        metadata={"help": "other grids for some layers: 'PATTERN>GRID' joined by ';', e.g. layers.0.*>int8"},
    )
    accuracy_level: Literal[0, 1, 4] = field(
        default=4, metadata={"help": "of int4 products: 4 rounds activations to int8 (fast), 0 and 1 compute in fp32"}
    )
    calibrate: int = field(
        default=32, metadata={"help": "training rows that int4 rounding has in mind where the grid changes; 0: none"}
    )
    retune: int = field(
        default=0, metadata={"help": "steps in which the adapter is tuned on the new grid towards the trained model"}
    )
    context_length: int = field(
        default=0, metadata={"help": "tokens that the folder allows for; 0: what the model allows for, at most 32768"}
    )

    def __post_init__(self) -> None:
        for name in ("calibrate", "retune", "context_length"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        self.patterns()

    def patterns(self) -> list[tuple[str, str]]:
        """Return the patterns of :attr:`mixed` with their grids.

        :raises ValueError: a part is not ``PATTERN>GRID``.
        """
        found = []
        for part in filter(None, self.mixed.split(";")):
            pattern, arrow, grid = part.partition(">")
            if not arrow or grid.strip() not in GRIDS:
                raise ValueError(f"mixed: {part!r} must be PATTERN>GRID, the grid being one of {', '.join(GRIDS)}")
            found.append((pattern.strip(), grid.strip()))
        return found

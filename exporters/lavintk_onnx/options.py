"""What can be chosen about an ONNX folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

CALIBRATION_ROWS = 32
GRIDS = ("int4", "int8", "nf4", "fp16", "fp32")


@dataclass(frozen=True)
class OnnxOptions:
    """Grids, the adapter's form, and what recovers quality on another grid than the trained one."""

    quant: Literal["keep", "int4", "int8", "nf4", "fp16", "fp32"] = field(
        default="keep",
        metadata={
            "help": "grid of the linear layers; keep: int4 stays int4, nf4 stays nf4 for the target cuda, everything "
            "else becomes int8, which keeps what was trained on nf4 and is fast on CPUs"
        },
    )
    target: Literal["cpu", "cuda"] = field(
        default="cpu", metadata={"help": "where the folder will run; decides what quant=keep makes of nf4"}
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
    calibrate: int | None = field(
        default=None,
        metadata={
            "help": "training rows that rounding to int4 has in mind; 0: none. Without it 32 where the grid changes; "
            "where an adapter is merged into a base that was trained on int4, none"
        },
    )
    retune: int = field(
        default=0,
        metadata={"help": "steps in which the adapter, beside the base, is tuned on int4 towards the trained model"},
    )
    context_length: int = field(
        default=0, metadata={"help": "tokens that the folder allows for; 0: what the model allows for, at most 32768"}
    )

    def __post_init__(self) -> None:
        for name in ("calibrate", "retune", "context_length"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.retune and self.adapter == "merge":
            raise ValueError(
                f"retune={self.retune} tunes the adapter beside the rounded base; folded into it (adapter=merge) and "
                "rounded again, what it learned would be lost. Choose adapter=side, or leave retune out"
            )
        self.patterns()

    @property
    def calibration_rows(self) -> int:
        """Training rows that rounding to another grid has in mind."""
        return CALIBRATION_ROWS if self.calibrate is None else self.calibrate

    def asked_of_data(self) -> list[str]:
        """Return what was asked for that takes training data, as it was written."""
        return [f"{name}={getattr(self, name)}" for name in ("retune", "calibrate") if getattr(self, name)]

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

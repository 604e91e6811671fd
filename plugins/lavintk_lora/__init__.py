"""LoRA and rsLoRA: a low-rank update beside chosen linear layers, saved in PEFT's format.

Choose it to adapt text, or to use the result with PEFT, transformers or vLLM. With ``rslora=true`` the scale
falls with the square root of the rank, which keeps high ranks useful. Sources: Hu et al., "LoRA", arXiv
2106.09685; Kalajdzievski, "A rank stabilization scaling factor for fine-tuning with LoRA", arXiv 2312.03732.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lavintk import hookimpl
from lavintk.targets import HELP

if TYPE_CHECKING:
    from lavintk.contracts import Adapter
    from lavintk.registry import Registry

lavintk_api = 1


@dataclass(frozen=True)
class LoraOptions:
    """Rank, scale and place of the updates."""

    r: int = field(default=16, metadata={"help": "rank of each update"})
    alpha: int = field(default=32, metadata={"help": "the update is scaled by alpha / r"})
    dropout: float = field(default=0.0, metadata={"help": "on the input of the update, in training"})
    targets: str = field(default="all", metadata={"help": HELP})
    rslora: bool = field(default=False, metadata={"help": "scale by alpha / sqrt(r) instead"})
    init: Literal["default"] = field(
        default="default", metadata={"help": "start values; default: A Kaiming-uniform, B zero"}
    )

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r must be at least 1, got {self.r}")
        if self.alpha < 1:
            raise ValueError(f"alpha must be at least 1, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")

    @property
    def scale(self) -> float:
        """Factor on what the update adds."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    @classmethod
    def of_folder(cls, folder: Path) -> Mapping[str, Any] | None:
        """Return the options that describe PEFT's LoRA in ``folder``, or None if PEFT wrote nothing there.

        :raises CheckpointError: another method of PEFT's, or files that are missing or damaged; all faults listed.
        """
        from lavintk_lora.files import peft_options

        return peft_options(folder)


def make_lora(options: LoraOptions) -> Adapter:
    """Return an adapter that is not attached yet."""
    from lavintk_lora.adapter import LoraAdapter

    return LoraAdapter(options)


@hookimpl
def lavintk_register_adapters(registry: Registry[Adapter]) -> None:
    """Offer ``lora``."""
    registry.add("lora", make_lora, options=LoraOptions, summary="LoRA and rsLoRA, saved in PEFT's format")

"""Folders for transformers and PEFT: the whole model with the adapter folded in, or the adapter alone.

Choose ``hf`` for a model that needs nothing of lavintk any more: transformers, vLLM and converters load it. Choose
``peft`` for a few megabytes that go on top of a base that the other side has already.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lavintk import hookimpl

if TYPE_CHECKING:
    from lavintk.contracts import Exporter
    from lavintk.registry import NoOptions, Registry

lavintk_api = 1


@dataclass(frozen=True)
class HfOptions:
    """Number type, modality and size of the files."""

    dtype: Literal["auto", "bf16", "fp16", "fp32"] = field(
        default="auto",
        metadata={"help": "type of the weights; auto: that of the base's files, bf16 if they are quantized"},
    )
    condition: Literal["auto", "text", "image"] = field(
        default="auto",
        metadata={
            "help": "the modality whose weights go in, for adapters that switch between them; text leaves a tower of "
            "patches out; auto: image with the connector patches, else text"
        },
    )
    shard_gb: float = field(default=5.0, metadata={"help": "largest size of a weight file, in 10^9 bytes"})

    def __post_init__(self) -> None:
        if self.shard_gb <= 0:
            raise ValueError(f"shard_gb must be above 0, got {self.shard_gb}")


def make_hf(options: HfOptions) -> Exporter:
    """Return the exporter of merged folders."""
    from lavintk_hf.export import HfExporter

    return HfExporter(options)


def make_peft(options: NoOptions) -> Exporter:
    """Return the exporter of adapters."""
    from lavintk_hf.peft import PeftExporter

    return PeftExporter()


@hookimpl
def lavintk_register_exporters(registry: Registry[Exporter]) -> None:
    """Offer ``hf`` and ``peft``."""
    registry.add("hf", make_hf, options=HfOptions, summary="merged safetensors folder that transformers loads")
    registry.add("peft", make_peft, summary="the adapter alone, in PEFT's format")

"""GGUF files, which llama.cpp and what is built on it run: the text model with the adapter folded in.

Choose it to answer text on a CPU or with Ollama, LM Studio and the like. It holds no vision tower.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lavintk import hookimpl

if TYPE_CHECKING:
    from lavintk.contracts import Exporter
    from lavintk.registry import Registry

lavintk_api = 1


@dataclass(frozen=True)
class GgufOptions:
    """Number type and modality."""

    type: Literal["f32", "f16", "bf16", "q8_0", "q4_1", "q4_0"] = field(
        default="q8_0",
        metadata={"help": "of the matrices; with the 4-bit types, embedding and output head are q8_0. Vectors are f32"},
    )
    condition: Literal["text", "image"] = field(
        default="text", metadata={"help": "the modality whose weights go in, for adapters that switch between them"}
    )


def make_gguf(options: GgufOptions) -> Exporter:
    """Return the exporter."""
    from lavintk_gguf.export import GgufExporter

    return GgufExporter(options)


@hookimpl
def lavintk_register_exporters(registry: Registry[Exporter]) -> None:
    """Offer ``gguf``."""
    registry.add("gguf", make_gguf, options=GgufOptions, summary="text model as a GGUF file for llama.cpp")

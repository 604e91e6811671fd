"""Record formats: what ``--data NAME:PATH`` can read. One module per format, nothing heavy imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lavintk import hookimpl
from lavintk_formats.alpaca import AlpacaFormat
from lavintk_formats.easyvqa import EasyVqaFormat, EasyVqaOptions
from lavintk_formats.jsonl import JsonlFormat, JsonlOptions
from lavintk_formats.lavin import LavinFormat, LavinOptions
from lavintk_formats.llava import LlavaFormat, LlavaOptions
from lavintk_formats.openai import OpenAIFormat
from lavintk_formats.reading import FileOptions
from lavintk_formats.scienceqa import ScienceQaFormat, ScienceQaOptions

if TYPE_CHECKING:
    from lavintk.contracts import DatasetFormat
    from lavintk.registry import Registry

lavintk_api = 1


@hookimpl
def lavintk_register_datasets(registry: Registry[DatasetFormat]) -> None:
    """Offer the seven formats."""
    add = registry.add
    add("alpaca", AlpacaFormat, options=FileOptions, summary="instruction, input, output (JSON list or JSONL)")
    add(
        "openai",
        OpenAIFormat,
        options=FileOptions,
        summary="chat messages (JSONL), images as paths or data: URLs",
    )
    add("llava", LlavaFormat, options=LlavaOptions, summary="LLaVA conversations with an image folder")
    add("lavin", LavinFormat, options=LavinOptions, summary="LaVIN's all_data.json with its image folders")
    add("scienceqa", ScienceQaFormat, options=ScienceQaOptions, summary="ScienceQA in its official layout")
    add(
        "easyvqa",
        EasyVqaFormat,
        options=EasyVqaOptions,
        summary="easy-VQA from its package (pip install 'lavintk[demo]')",
    )
    add("jsonl", JsonlFormat, options=JsonlOptions, summary="any JSONL with a question and an answer per row")

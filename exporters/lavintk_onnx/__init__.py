"""The exporter ``onnx``: one folder for ONNX Runtime, onnxruntime-genai, transformers.js and lavintk's own runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lavintk import hookimpl
from lavintk_onnx.options import OnnxOptions

if TYPE_CHECKING:
    from lavintk.contracts import Exporter
    from lavintk.registry import Registry

lavintk_api = 1


def make_onnx(options: OnnxOptions) -> Exporter:
    """Return the exporter.

    :raises ImportError: the packages that write ONNX are missing.
    """
    from lavintk_onnx.export import OnnxExporter

    return OnnxExporter(options)


@hookimpl
def lavintk_register_exporters(registry: Registry[Exporter]) -> None:
    """Offer ``onnx``."""
    registry.add("onnx", make_onnx, options=OnnxOptions, summary="quantized ONNX folder for edge devices and browsers")

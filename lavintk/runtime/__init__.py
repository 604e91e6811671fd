"""Runs exported folders with onnxruntime, numpy and tokenizers; torch and transformers are never imported.

from lavintk.runtime import load

model = load("exported")
print(model.generate("What color is the shape?", image="shape.png"))
"""

from lavintk.runtime.manifest import DESCRIPTION, is_export
from lavintk.runtime.model import ExportedModel, load

__all__ = ["DESCRIPTION", "ExportedModel", "is_export", "load"]

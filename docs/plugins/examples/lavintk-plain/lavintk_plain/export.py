"""Writes the folder of ``plain``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from lavintk.errors import ModelError
from lavintk.merge import LANGUAGE, TEXT, PlainModel, load_on_cpu, pick_condition, tensors, with_biases

if TYPE_CHECKING:
    from lavintk.models.multimodal import MultimodalModel
    from lavintk.run import Run


class PlainExporter:
    """See :class:`lavintk.contracts.Exporter`, and :class:`lavintk.contracts.SizedExporter`."""

    def export(self, run: Run, out: Path) -> None:
        """Write ``run`` into the new folder ``out``.

        :raises ModelError: the model sees images, for which this format has no place.
        :raises NotAffineError: the adapter cannot be folded into the weights.
        """
        assembly = load_on_cpu(run)
        model = assembly.model
        if model.vision is not None:
            raise ModelError("this run sees images, and plain writes text models only")
        plain = PlainModel(model, pick_condition(model, TEXT))
        config, shapes = with_biases(model.language.config, plain.biased())
        weights = {name: tensor.float().contiguous() for name, tensor in tensors(plain, shapes)}
        save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
        config.architectures, config.dtype = [type(model.language).__name__], torch.float32
        config.save_pretrained(out)
        assembly.tokenizer.save_pretrained(out)

    def bytes_needed(self, run: Run, outline: MultimodalModel) -> int:
        """Return the bytes of the linear layers, by far the most of what is written."""
        layers = (layer for name, layer in outline.linears().items() if name.startswith(LANGUAGE))
        return sum(4 * layer.in_features * layer.out_features for layer in layers)

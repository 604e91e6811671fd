"""The vision tower with its adapters folded in, and how images are prepared for it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lavintk.merge import IMAGE, VISION, PlainModel, pick_condition
from lavintk.models.language import Prefixless
from lavintk.models.sources import open_source
from lavintk_hf.shards import write_sharded

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lavintk.data.images import ImageProcessor
    from lavintk.models.build import Assembly
    from lavintk.run import Run

FINAL_NORM = "post_layernorm."
"""Behind everything that lavintk reads from a tower, so it is not part of a loaded model; copied from the base."""


class PlainTower:
    """The tower's tensors with the adapter folded in, by transformers' names.

    :ivar config: of the tower, without SigLIP's pooling head, which nothing here uses.
    :ivar shapes: of all tensors by name.

    :raises NotAffineError: the adapters of the tower do not fold.
    """

    def __init__(self, run: Run, assembly: Assembly) -> None:
        from transformers import AutoModel

        model = assembly.model
        assert model.vision is not None
        self.config: PretrainedConfig = copy.deepcopy(model.vision.model.config)
        if hasattr(self.config, "vision_use_head"):
            self.config.vision_use_head = False
        with torch.device("meta"):
            outline: nn.Module = AutoModel.from_config(copy.deepcopy(self.config))
        self.architecture = type(outline).__name__
        self.shapes = {name: tuple(p.shape) for name, p in outline.named_parameters()}
        self._plain = PlainModel(model, pick_condition(model, IMAGE), VISION)
        assert run.recipe.model.vision is not None
        self._base = Prefixless(open_source(run.recipe.model.vision), "vision_model.")

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield ``(name, tensor)`` in the order of ``shapes``."""
        stored = set(self._base.names())
        for name, shape in self.shapes.items():
            if not name.startswith(FINAL_NORM):
                yield name, self._plain.read(name)
            elif name in stored:
                yield name, self._base.read(name)
            else:
                yield name, torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)


def write_vision(run: Run, assembly: Assembly, out: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    """Write the tower alone into the new folder ``out``, with ``preprocessor_config.json``.

    :raises NotAffineError: the adapters of the tower do not fold.
    """
    tower = PlainTower(run, assembly)
    out.mkdir()
    write_sharded(out, tower.shapes, tower.tensors(), dtype, shard_bytes)
    saved: Any = tower.config
    saved.architectures, saved.dtype = [tower.architecture], dtype
    saved.save_pretrained(out)
    assert assembly.images is not None
    write_preprocessor(out, assembly.images)


def write_preprocessor(out: Path, images: ImageProcessor) -> None:
    """Write ``preprocessor_config.json`` of transformers' CLIP processor that prepares images as in training."""
    square = {"height": images.height, "width": images.width}
    crop = images.resize == "crop"
    edge = images.shortest_edge or min(images.height, images.width)
    content = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": edge} if crop else square,
        "resample": int(images.resample),
        "do_center_crop": crop,
        "crop_size": square,
        "do_rescale": images.rescale != 1.0,
        "rescale_factor": images.rescale,
        "do_normalize": True,
        "image_mean": list(images.mean),
        "image_std": list(images.std),
    }
    text = json.dumps(content, indent=2)
    (out / "preprocessor_config.json").write_text(text + "\n", encoding="utf-8")

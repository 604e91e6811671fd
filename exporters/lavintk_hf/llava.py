"""A run with the connector ``patches`` as transformers' ``LlavaForConditionalGeneration``.

The two are the same function: a late layer's patches, two linear layers with GELU between them, and the result in place
of an image token's repetitions. Only the image token is new: its row in embedding and head is zero, and
``generation_config.json`` keeps it from being sampled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lavintk.data.exported import add_image_token, write_generation_config
from lavintk.data.records import IMAGE_MARKER
from lavintk.merge import PlainModel, tensors, with_biases
from lavintk.models.catalog import locate
from lavintk.models.connector import PatchProjector
from lavintk.models.vision import PatchTower
from lavintk_hf.shards import write_sharded
from lavintk_hf.vision import PlainTower, write_preprocessor

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from lavintk.models.build import Assembly
    from lavintk.run import Run

ARCHITECTURE = "LlavaForConditionalGeneration"
LANGUAGE, TOWER, PROJECTOR = "language_model.", "vision_tower.", "multi_modal_projector."
"""What the names in LLaVA's files begin with."""
LAYERS = {"linear_1": "first", "linear_2": "second"}
"""LLaVA's names of the projector's layers and ours."""
LEAVES = ("weight", "bias")
ROWS = ("model.embed_tokens.weight", "lm_head.weight")
"""Tensors with a row for each token."""


def write_llava(
    run: Run,
    assembly: Assembly,
    plain: PlainModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    dtype: torch.dtype,
    shard_bytes: int,
) -> None:
    """Write weights and configurations into ``out``; ``tokenizer`` gets the image token.

    :raises NotAffineError: the adapters of the tower do not fold.
    :raises ModelError: the language model lacks biases that the fold needs.
    """
    image_id = add_image_token(tokenizer)
    text, text_shapes = with_biases(assembly.model.language.config, plain.biased())
    rows: Any = max(text.vocab_size, image_id + 1)
    tower = PlainTower(run, assembly)
    projector = _projector(assembly)
    shapes = {LANGUAGE + n: (rows, *s[1:]) if n in ROWS else s for n, s in text_shapes.items()}
    shapes |= {TOWER + name: shape for name, shape in tower.shapes.items()}
    shapes |= {name: tuple(tensor.shape) for name, tensor in projector.items()}

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors(plain, text_shapes):
            yield LANGUAGE + name, _with_rows(tensor, rows) if name in ROWS else tensor
        for name, tensor in tower.tensors():
            yield TOWER + name, tensor
        yield from projector.items()

    write_sharded(out, shapes, stream(), dtype, shard_bytes)
    text.vocab_size = rows
    _write_config(assembly, text, tower, image_id, out, dtype)
    _write_processor(assembly, out)
    write_generation_config(out, assembly, locate(run.recipe.model.language), [image_id])


def _projector(assembly: Assembly) -> dict[str, Tensor]:
    connector = assembly.model.connector
    assert isinstance(connector, PatchProjector)
    own = {name: parameter.detach().cpu() for name, parameter in connector.named_parameters()}
    return {f"{PROJECTOR}{llava}.{leaf}": own[f"{ours}.{leaf}"] for llava, ours in LAYERS.items() for leaf in LEAVES}


def _with_rows(tensor: Tensor, rows: int) -> Tensor:
    """Return ``[vocabulary, hidden]`` with rows of zeros behind it."""
    return torch.cat([tensor, tensor.new_zeros(rows - tensor.shape[0], tensor.shape[1])])


def _write_config(
    assembly: Assembly, text: PretrainedConfig, tower: PlainTower, image_id: int, out: Path, dtype: torch.dtype
) -> None:
    from transformers import LlavaConfig

    vision = assembly.model.vision
    assert isinstance(vision, PatchTower)
    config: Any = LlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_index=image_id,
        image_seq_length=vision.tokens,
        projector_hidden_act="gelu",
        vision_feature_select_strategy=_strategy(vision),
        vision_feature_layer=vision.depth,
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )
    config.architectures, config.dtype = [ARCHITECTURE], dtype
    config.save_pretrained(out)


def _write_processor(assembly: Assembly, out: Path) -> None:
    vision = assembly.model.vision
    assert isinstance(vision, PatchTower)
    assert assembly.images is not None
    write_preprocessor(out, assembly.images)
    content = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_MARKER,
        "patch_size": int(vision.model.config.patch_size),
        "num_additional_image_tokens": int(vision.has_class_token),
        "vision_feature_select_strategy": _strategy(vision),
    }
    (out / "processor_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _strategy(vision: PatchTower) -> Literal["default", "full"]:
    """Return what LLaVA does with the tower's tokens: ``default`` leaves the class token out."""
    return "default" if vision.has_class_token else "full"

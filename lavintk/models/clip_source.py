"""OpenAI's CLIP as they published it: a TorchScript archive or a state dict in one file, the image tower of it.

Names are mapped to those of transformers' ``CLIPVisionModel`` and the configuration follows from the shapes.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lavintk.errors import CheckpointError, ModelError
from lavintk.models.sources import FileSource, StoredTensor, read_header
from lavintk.models.torch_files import find_scripted_tensors, find_tensors, is_torchscript

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig

SUFFIXES = (".pt", ".pth", ".safetensors")
VISUAL = "visual."
PATCHES = "visual.conv1.weight"
HEAD_WIDTH = 64
"""Features per attention head in all of OpenAI's towers."""

TOP = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",  # spelled so in transformers
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
BLOCK = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)")
_JOINED = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")
_TEXT = re.compile(
    r"transformer\..*|ln_final\..*|token_embedding\.weight|positional_embedding|text_projection|logit_scale"
    r"|input_resolution|context_length|vocab_size|visual\.proj"
)
"""The text tower, and what only the comparison with it needs."""


class ClipSource(FileSource):
    """OpenAI's image tower, as a :class:`~lavintk.models.sources.WeightSource`."""

    def __init__(self, path: Path, description: str | None = None) -> None:
        """Find the tensors in the file; none of their values is read.

        :raises ModelError: the file holds another model.
        :raises CheckpointError: it is damaged, or refused because reading it would run code.
        """
        super().__init__(description or str(path))
        self.path = path
        self._original = self._find()
        if PATCHES not in self._original:
            raise ModelError(self._about_other_model())
        if "visual.layer1.0.conv1.weight" in self._original:
            raise ModelError(f"{self.description} is one of OpenAI's ResNet towers; lavintk takes vision transformers.")
        for name, tensor in self._original.items():
            if not _TEXT.fullmatch(name):
                self._tensors |= {part.name: part for part in _translate(name, tensor)}

    def config(self) -> CLIPVisionConfig:
        """Return the configuration that the shapes describe.

        :raises CheckpointError: shapes that no tower of OpenAI's has, all listed.
        """
        from transformers import CLIPVisionConfig

        faults = self._faults()
        if faults:
            raise CheckpointError(self.description, faults, "Is it a vision transformer of OpenAI's CLIP?")
        width, _, _, patch = self._original[PATCHES].shape
        positions = self._original["visual.positional_embedding"].shape[0]
        return CLIPVisionConfig(
            architectures=["CLIPVisionModel"],
            hidden_size=width,
            intermediate_size=self._original["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            num_hidden_layers=self._depth(),
            num_attention_heads=width // HEAD_WIDTH,
            patch_size=patch,
            image_size=patch * math.isqrt(positions - 1),
            projection_dim=self._original["visual.proj"].shape[1] if "visual.proj" in self._original else 512,
            hidden_act="quick_gelu",
            layer_norm_eps=1e-5,
        )

    def _find(self) -> dict[str, StoredTensor]:
        try:
            if self.path.suffix.lower() == ".safetensors":
                self._headers[self.path], tensors = read_header(self.path)
                return tensors
            self._headers[self.path] = 0
            return (find_scripted_tensors if is_torchscript(self.path) else find_tensors)(self.path)
        except CheckpointError as error:
            advice = error.advice or "Download it again, or use a Hugging Face folder of the same model."
            if (self.path.parent / "config.json").is_file():
                advice = f"It is read as OpenAI's CLIP. If it is part of a model: {_name_folder(self.path)}"
            raise CheckpointError(self.description, error.faults, advice) from error

    def _depth(self) -> int:
        blocks = (re.match(r"visual\.transformer\.resblocks\.(\d+)\.", name) for name in self._original)
        return 1 + max((int(block[1]) for block in blocks if block), default=-1)

    def _faults(self) -> list[str]:
        needed = (
            PATCHES,
            "visual.class_embedding",
            "visual.positional_embedding",
            "visual.transformer.resblocks.0.mlp.c_fc.weight",
        )
        if missing := [f"{name} is missing" for name in needed if name not in self._original]:
            return missing
        faults, shape = [], self._original[PATCHES].shape
        if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3] or not shape[0] or shape[0] % HEAD_WIDTH:
            expected = f"[a multiple of {HEAD_WIDTH}, 3, patch, patch]"
            faults.append(f"{PATCHES} has shape {list(shape)}, expected {expected}")
        positions = self._original["visual.positional_embedding"].shape
        patches = positions[0] - 1 if positions else 0
        if patches < 1 or math.isqrt(patches) ** 2 != patches:
            faults.append(f"visual.positional_embedding has shape {list(positions)}: no square of patches and a class")
        return faults

    def _about_other_model(self) -> str:
        found = ", ".join(list(self._original)[:4]) or "nothing"
        return (
            f"{self.path} is no model by itself: a single {self.path.suffix} file is read as OpenAI's CLIP, and it has "
            f"no {PATCHES}. Found: {found}, ... If it is part of a model: {_name_folder(self.path)}"
        )


def _name_folder(file: Path) -> str:
    return f"Name its folder instead: {file.parent}"


def _translate(name: str, tensor: StoredTensor) -> list[StoredTensor]:
    """Return what one of OpenAI's tensors is in transformers; an unknown one keeps its name."""
    inner = name.removeprefix(VISUAL)
    if joined := _JOINED.fullmatch(inner):
        rows = tensor.shape[0] if tensor.shape else 0
        if rows % 3 == 0 and tensor.stride is None:
            return [_third(tensor, place, joined[1], joined[2]) for place in range(3)]
    if inner in TOP and name != inner:
        return [replace(tensor, name=TOP[inner])]
    block = _BLOCK.fullmatch(inner)
    if block and block[2] in BLOCK and name != inner:
        return [replace(tensor, name=f"encoder.layers.{block[1]}.{BLOCK[block[2]]}.{block[3]}")]
    return [replace(tensor, name=name)]


def _third(tensor: StoredTensor, place: int, block: str, kind: str) -> StoredTensor:
    """Return the rows of q, k or v, which OpenAI stores as one matrix."""
    nbytes = tensor.nbytes // 3
    return replace(
        tensor,
        name=f"encoder.layers.{block}.self_attn.{'qkv'[place]}_proj.{kind}",
        shape=(tensor.shape[0] // 3, *tensor.shape[1:]),
        begin=tensor.begin + place * nbytes,
        nbytes=nbytes,
    )

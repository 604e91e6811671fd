"""The frozen models of a file of reference values, as sources that lavintk's own loaders read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig

from lavintk.models import clip_source, meta_source
from lavintk.testing.golden_file import Golden

if TYPE_CHECKING:
    from transformers import PretrainedConfig

VISUAL, BLOCKS = "backbone.visual.", "transformer.resblocks."


class MemorySource:
    """A weight source over tensors in memory."""

    def __init__(self, description: str, config: PretrainedConfig, tensors: dict[str, Tensor]) -> None:
        self.description, self._config, self._tensors = description, config, tensors

    def config(self) -> PretrainedConfig:
        """Return the model's configuration."""
        return self._config

    def names(self) -> list[str]:
        """Return the parameter names."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def tensor_nbytes(self, name: str) -> int:
        """Return the bytes of one tensor."""
        return self._tensors[name].nbytes

    def read(self, name: str, into: Tensor | None = None) -> Tensor:
        """Return a tensor."""
        return self._tensors[name]

    def fingerprint(self) -> str:
        """Return nothing: a file of reference values is no base of a run."""
        return ""

    def close(self) -> None:
        """Hold nothing open."""


def language_source(golden: Golden) -> MemorySource:
    """Return the language model; q and k get transformers' order of rotary pairs."""
    g, tensors = golden.geometry, {}
    for name, tensor in golden.weights.items():
        if "adapter" in name or name.startswith("backbone.") or name.endswith("rope.freqs"):
            continue
        layer, inner = _split(name, "layers.")
        ours, _ = (meta_source.LAYER if layer else meta_source.TOP).get(inner, (inner, None))
        if inner in ("attention.wq.weight", "attention.wk.weight"):
            tensor = meta_source.to_halves(tensor, g.n_heads)
        tensors[f"model.layers.{layer}.{ours}" if layer else ours] = tensor
    gate = tensors.get("model.layers.0.mlp.gate_proj.weight")
    config = LlamaConfig(
        vocab_size=g.vocab, hidden_size=g.dim, intermediate_size=4 * g.dim if gate is None else gate.shape[0],
        num_hidden_layers=g.n_layers, num_attention_heads=g.n_heads, rms_norm_eps=g.norm_eps,
        max_position_embeddings=2 * g.max_seq_len, tie_word_embeddings=False,
    )  # fmt: skip
    return MemorySource(f"{golden.path} (language model)", config, tensors)


def vision_source(golden: Golden) -> MemorySource:
    """Return the vision tower; OpenAI's joined rows of q, k and v become three tensors."""
    g = golden.geometry
    tensors: dict[str, Tensor] = {}
    for name, tensor in golden.weights.items():
        if "adapter" not in name and name.startswith(VISUAL):
            tensors |= _vision_tensors(name.removeprefix(VISUAL), tensor)
    hidden = tensors.get("encoder.layers.0.mlp.fc1.weight")
    config = CLIPVisionConfig(
        hidden_size=g.vision_width, intermediate_size=4 * g.vision_width if hidden is None else hidden.shape[0],
        num_hidden_layers=g.vision_layers, num_attention_heads=max(1, g.vision_width // clip_source.HEAD_WIDTH),
        image_size=g.image_size, patch_size=g.patch, hidden_act="quick_gelu", layer_norm_eps=1e-5,
    )  # fmt: skip
    return MemorySource(f"{golden.path} (vision tower)", config, tensors)


def _vision_tensors(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return what one of OpenAI's tensors is in transformers; an unknown one keeps its name."""
    layer, inner = _split(name, BLOCKS)
    if not layer:  # the last projection is of no use here, but known
        return {"visual_projection.weight": tensor} if name == "proj" else {clip_source.TOP.get(name, name): tensor}
    block = f"encoder.layers.{layer}."
    if inner.startswith("attn.in_proj_"):
        kind = inner.removeprefix("attn.in_proj_")
        return {f"{block}self_attn.{part}_proj.{kind}": rows for part, rows in zip("qkv", tensor.chunk(3))}
    stem, _, leaf = inner.rpartition(".")
    return {f"{block}{clip_source.BLOCK.get(stem, stem)}.{leaf}": tensor}


def _split(name: str, start: str) -> tuple[str, str]:
    """Return the layer's number (empty outside of layers) and the name within the layer."""
    if not name.startswith(start):
        return "", name
    layer, _, inner = name.removeprefix(start).partition(".")
    return layer, inner

"""What llama.cpp calls a model's architecture, its tensors and its settings.

Keys are those of the GGUF specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Which biases an
architecture may have, and whose query and key rows are reordered, is as llama.cpp's loader and converter have it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import pi
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lavintk.errors import ModelError
from lavintk.merge import as_llama
from lavintk.models.gguf_source import PERMUTED, ROPE_FREQUENCIES

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
BIASES: dict[str, tuple[str, ...]] = {
    "llama": (*_ATTENTION, *_FEED_FORWARD),
    "qwen2": _ATTENTION[:3],
    "qwen3": (),
    "smollm3": (),
}
"""Supported architectures and the linear layers that may have a bias in each; a Mistral is written as ``llama``."""
SMOLLM3_ROTATED = 4
"""Every so many layers llama.cpp leaves the rotation out of a SmolLM3; no key says it."""


@dataclass(frozen=True)
class Architecture:
    """An architecture as llama.cpp knows it.

    :param name: ``general.architecture``.
    :param config: transformers' configuration of what is written: a Mistral's is that of the Llama it is.
    :param context: tokens within which the file computes what the model does.
    """

    name: str
    config: PretrainedConfig
    context: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> Architecture:
        """Return the architecture of a model.

        :raises ModelError: llama.cpp, or this exporter, has none that computes the same.
        """
        window = getattr(config, "sliding_window", None)
        context = min(int(config.max_position_embeddings), int(window or config.max_position_embeddings))
        if config.model_type == "mistral":
            config = as_llama(config)
        if config.model_type not in BIASES:
            known = ", ".join(sorted({*BIASES, "mistral"}))
            raise ModelError(f"the gguf exporter knows no {config.model_type!r} models, only {known}; use --format hf")
        faults = []
        if config.hidden_act != "silu":
            faults.append(f"its activation is {config.hidden_act!r}, not silu")
        if config.model_type == "smollm3":
            wanted = [int((layer + 1) % SMOLLM3_ROTATED != 0) for layer in range(config.num_hidden_layers)]
            if list(config.no_rope_layers) != wanted:
                faults.append(
                    f"llama.cpp leaves the rotation out of every {SMOLLM3_ROTATED}th layer, this one of others"
                )
        if faults:
            raise ModelError(f"llama.cpp's {config.model_type} differs: {'; '.join(faults)}. Use --format hf.")
        return cls(config.model_type, config, context)

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        config = self.config
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    def check_biases(self, names: Iterable[str]) -> None:
        """Refuse biases that llama.cpp would not load.

        :param names: of all tensors.
        :raises ModelError: says which, and what to train instead.
        """
        leaves = {name.split(".")[-2] for name in names if name.endswith(".bias")}
        homeless = sorted(leaves - set(BIASES[self.name]))
        if homeless:
            raise ModelError(
                f"folding the adapter gives biases to {', '.join(homeless)}, and llama.cpp's {self.name} has none "
                "there. Train with --adapter lora, whose fold needs no bias, or export with --format hf or onnx."
            )

    def tensor_names(self, names: Iterable[str]) -> dict[str, str]:
        """Return GGUF's name for each of transformers' ``names``.

        :raises ModelError: the architecture has no such tensor.
        """
        from gguf import MODEL_ARCH, get_tensor_name_map

        table = get_tensor_name_map(MODEL_ARCH[self.name.upper()], int(self.config.num_hidden_layers))
        found = {}
        for name in names:
            written = table.get_name(name, try_suffixes=(".weight", ".bias"))
            if written is None:
                raise ModelError(f"GGUF's {self.name} has no tensor for {name}")
            found[name] = written
        return found

    def in_order(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor with its rows as llama.cpp wants them: of query and key, halves become adjacent pairs."""
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        projection = name.split(".")[-2]
        if self.name not in PERMUTED or projection not in heads:
            return tensor
        count = int(heads[projection])
        halves = tensor.reshape(count, 2, tensor.shape[0] // count // 2, *tensor.shape[1:])
        return halves.transpose(1, 2).reshape(tensor.shape)

    def add_settings(self, writer: Any) -> None:
        """Write the sizes and the rotation.

        :raises ModelError: a kind of rope scaling that GGUF cannot say.
        """
        config = self.config
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(self.context)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
        self._add_rope_scaling(writer)

    def _add_rope_scaling(self, writer: Any) -> None:
        from gguf import RopeScalingType

        rope = dict(self.config.rope_parameters)
        kind = rope.pop("rope_type", "default")
        known = {"default": set[str](), "llama3": set(rope), "linear": {"factor"}}
        known["yarn"] = {"factor", "original_max_position_embeddings"}
        unknown = {key for key, value in rope.items() if value is not None} - {"rope_theta"} - known.get(kind, set())
        if kind not in known or unknown:
            settings = f" with {', '.join(sorted(unknown))}" if unknown else ""
            raise ModelError(f"the gguf exporter cannot write rope scaling {kind!r}{settings}; use --format hf")
        if kind in ("linear", "yarn"):
            writer.add_rope_scaling_type(RopeScalingType[kind.upper()])
            writer.add_rope_scaling_factor(float(rope["factor"]))
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))

    def rope_frequencies(self) -> dict[str, Tensor]:
        """Return the divisors ``[head_dim / 2]`` of the frequencies by their tensor's name; only Llama 3 has them."""
        rope = self.config.rope_parameters
        if rope.get("rope_type") != "llama3":
            return {}
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        wavelengths = 2 * pi * float(rope["rope_theta"]) ** exponents
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        turns = float(rope["original_max_position_embeddings"]) / wavelengths
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        return {ROPE_FREQUENCIES: (1 / ((1 - smooth) / float(rope["factor"]) + smooth)).float()}

"""Model geometries with random weights made on the fly, for benchmarks that need a size and not a meaning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, PretrainedConfig

LANGUAGE = {
    "1b": LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4
    ),
    "7b": LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    "13b": LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40),
    "33b": LlamaConfig(hidden_size=6656, intermediate_size=17920, num_hidden_layers=60, num_attention_heads=52),
    "65b": LlamaConfig(hidden_size=8192, intermediate_size=22016, num_hidden_layers=80, num_attention_heads=64),
}  # fmt: skip
"""LLaMA-1 geometries, vocabulary 32000, untied head (TinyLlama's for 1b)."""
CLIP_LARGE = CLIPVisionConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224,
    patch_size=14, projection_dim=768,
)  # fmt: skip


@dataclass
class RandomSource:
    """A weight source that draws each tensor when it is read, 16-bit, on ``device``."""

    settings: PretrainedConfig
    device: torch.device
    description: str = "random weights"

    def __post_init__(self) -> None:
        with torch.device("meta"):
            if isinstance(self.settings, CLIPVisionConfig):
                model = CLIPVisionModel(self.settings)
            else:
                model = AutoModelForCausalLM.from_config(self.settings)
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}

    def config(self) -> PretrainedConfig:
        """Return the configuration."""
        return self.settings

    def names(self) -> list[str]:
        """Return the parameter names."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._shapes[name]

    def tensor_nbytes(self, name: str) -> int:
        """Return the bytes of a tensor."""
        return 2 * torch.Size(self._shapes[name]).numel()

    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(map(self.tensor_nbytes, self._shapes))

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """Draw a tensor: norms near 1, the rest with a standard deviation of 0.02."""
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16, device=self.device)
        return torch.empty(shape, dtype=torch.bfloat16, device=self.device).normal_(std=0.02)

    def fingerprint(self) -> str:
        """Return a constant: random weights have no identity."""
        return "random"

    def close(self) -> None:
        """Do nothing."""

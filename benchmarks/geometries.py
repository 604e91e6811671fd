"""Model geometries with random weights made on the fly, for benchmarks that need a size and not a meaning."""

from __future__ import annotations

import torch
from transformers import CLIPVisionConfig, LlamaConfig, PretrainedConfig

from lavintk.models.config_source import ConfigSource

LANGUAGE = {
    "1b": LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4
    ),
    "7b": LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    "llama-3.1-8b": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128_256,
    ),
    "13b": LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40),
    "33b": LlamaConfig(hidden_size=6656, intermediate_size=17920, num_hidden_layers=60, num_attention_heads=52),
    "65b": LlamaConfig(hidden_size=8192, intermediate_size=22016, num_hidden_layers=80, num_attention_heads=64),
    "tiny": LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4),
}  # fmt: skip
"""LLaMA-1 geometries, vocabulary 32000, untied head (TinyLlama's for 1b), and Llama 3.1's of 8B; ``tiny`` is for trying
a command."""
CLIP_LARGE = CLIPVisionConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224,
    patch_size=14, projection_dim=768,
)  # fmt: skip


class RandomSource(ConfigSource):
    """A weight source that draws each tensor when it is read, 16-bit, on ``device``."""

    def __init__(self, settings: PretrainedConfig, device: torch.device) -> None:
        super().__init__(settings, "random weights")
        self.device = device

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """Draw a tensor: norms near 1, the rest with a standard deviation of 0.02."""
        shape = self.shape(name)
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16, device=self.device)
        return torch.empty(shape, dtype=torch.bfloat16, device=self.device).normal_(std=0.02)

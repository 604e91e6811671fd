"""From the vision tower's features to tokens of the language model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TapNeck(nn.Module):
    """LaVIN's visual neck: ``W_B SiLU(W_A v + a) + b`` for each tapped class token (LaVIN, section 3.1).

    Master weights are fp32 whatever the compute type is.

    :param vision_width: features of the vision tower.
    :param hidden: width between the two layers; LaVIN uses 128.
    :param language_width: hidden size of the language model.
    """

    def __init__(self, vision_width: int, hidden: int, language_width: int) -> None:
        super().__init__()
        self.down = nn.Linear(vision_width, hidden, dtype=torch.float32)
        self.up = nn.Linear(hidden, language_width, dtype=torch.float32)
        for layer in (self.down, self.up):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``[I, V, vision_width]`` to ``[I, V, language_width]`` in the type of ``features``."""
        dtype = features.dtype
        hidden = F.silu(F.linear(features, self.down.weight.to(dtype), self.down.bias.to(dtype)))
        return F.linear(hidden, self.up.weight.to(dtype), self.up.bias.to(dtype))

"""From the vision tower's features to tokens of the language model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lavintk.models.vision import PatchTower, VisionTower

if TYPE_CHECKING:
    from lavintk.recipe import ModelSection


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


class PatchProjector(nn.Module):
    """LLaVA-1.5's projector: ``W_2 GELU(W_1 v + b_1) + b_2`` for each patch, as wide as the language model.

    Source: Liu et al., "Improved Baselines with Visual Instruction Tuning", section 3.2. Master weights are fp32.

    :param vision_width: features of the vision tower.
    :param language_width: hidden size of the language model.
    """

    def __init__(self, vision_width: int, language_width: int) -> None:
        super().__init__()
        self.first = nn.Linear(vision_width, language_width, dtype=torch.float32)
        self.second = nn.Linear(language_width, language_width, dtype=torch.float32)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``[I, V, vision_width]`` to ``[I, V, language_width]`` in the type of ``features``."""
        dtype = features.dtype
        hidden = F.gelu(F.linear(features, self.first.weight.to(dtype), self.first.bias.to(dtype)))
        return F.linear(hidden, self.second.weight.to(dtype), self.second.bias.to(dtype))


def connect(
    model: nn.Module, section: ModelSection, language_width: int
) -> tuple[VisionTower, TapNeck | PatchProjector]:
    """Return a tower around transformers' vision model, and the connector that ``model.connector`` names.

    :raises ModelError: ``model.tap_every`` or ``model.patch_layer`` does not fit the tower's depth.
    """
    if section.connector == "patches":
        tower: VisionTower = PatchTower(model, section.patch_layer)
        return tower, PatchProjector(tower.width, language_width)
    tower = VisionTower(model, section.tap_every)
    return tower, TapNeck(tower.width, section.neck, language_width)

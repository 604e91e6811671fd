"""A frozen CLIP-like vision tower, tapped at several depths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lavintk.errors import ModelError

RunBlock = Callable[[nn.Module, Tensor], Tensor]


class VisionTower(nn.Module):
    """Runs transformers' CLIP or SigLIP encoder and returns one vector per tapped layer.

    LaVIN reads the class token after every 4th of CLIP's 24 blocks, before any final norm (LaVIN, section 3.1). A
    SigLIP encoder has no class token; there the mean over the patches takes its place.

    :param model: ``CLIPVisionModel`` or ``SiglipVisionModel``.
    :param tap_every: a tap after each so many blocks; blocks behind the last tap are not run.
    """

    def __init__(self, model: nn.Module, tap_every: int) -> None:
        super().__init__()
        self.model: Any = model  # transformers' towers share a structure, but no type that says so
        depth = len(self.blocks)
        if not 1 <= tap_every <= depth:
            raise ModelError(f"model.tap_every must lie between 1 and the tower's {depth} blocks, got {tap_every}")
        self.taps = tuple(range(tap_every, depth + 1, tap_every))

    @property
    def blocks(self) -> nn.ModuleList:
        """The encoder's blocks."""
        blocks: nn.ModuleList = self.model.encoder.layers
        return blocks

    @property
    def width(self) -> int:
        """Features per token."""
        return int(self.model.config.hidden_size)

    @property
    def tokens(self) -> int:
        """Vectors per image."""
        return len(self.taps)

    @property
    def has_class_token(self) -> bool:
        """Whether token 0 is a class token (CLIP) or a patch (SigLIP)."""
        return hasattr(self.model.embeddings, "class_embedding")

    def forward(self, pixel_values: Tensor, run: RunBlock | None = None) -> Tensor:
        """Return features ``[I, taps, width]`` of images ``[I, 3, height, width]``.

        :param run: how to run a block, for example under gradient checkpointing.
        """
        dtype = self.model.embeddings.patch_embedding.weight.dtype
        hidden = self.model.embeddings(pixel_values.to(dtype))
        if hasattr(self.model, "pre_layrnorm"):
            hidden = self.model.pre_layrnorm(hidden)
        features = []
        for depth, block in enumerate(self.blocks, start=1):
            hidden = (run or run_block)(block, hidden)
            if depth in self.taps:
                features.append(hidden[:, 0] if self.has_class_token else hidden.mean(dim=1))
            if depth == self.taps[-1]:
                break
        return torch.stack(features, dim=1)


def run_block(block: nn.Module, hidden: Tensor) -> Tensor:
    """Run one block of the tower."""
    output = block(hidden, None)
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)

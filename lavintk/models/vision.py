"""A frozen CLIP-like vision tower: class tokens tapped at several depths, or all patches of one late layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    def device(self) -> torch.device:
        """Where the tower lies."""
        device: torch.device = self.model.embeddings.patch_embedding.weight.device
        return device

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
        states = self.states(pixel_values, self.taps[-1], run)
        tapped = [hidden for depth, hidden in enumerate(states, start=1) if depth in self.taps]
        return torch.stack([h[:, 0] if self.has_class_token else h.mean(dim=1) for h in tapped], dim=1)

    def states(self, pixel_values: Tensor, depth: int, run: RunBlock | None = None) -> Iterator[Tensor]:
        """Yield the states ``[I, positions, width]`` behind each of the first ``depth`` blocks."""
        dtype = self.model.embeddings.patch_embedding.weight.dtype
        hidden = self.model.embeddings(pixel_values.to(dtype))
        if hasattr(self.model, "pre_layrnorm"):
            hidden = self.model.pre_layrnorm(hidden)
        for block in self.blocks[:depth]:
            hidden = (run or run_block)(block, hidden)
            yield hidden


class PatchTower(VisionTower):
    """Returns every patch of one late layer, as LLaVA does (Liu et al., "Visual Instruction Tuning", section 4.1).

    :param model: ``CLIPVisionModel`` or ``SiglipVisionModel``.
    :param layer: index into transformers' ``hidden_states``: L or -1 stands behind the last of L blocks, before any
        final norm; LLaVA takes -2, so its last block is not run.
    """

    def __init__(self, model: nn.Module, layer: int = -2) -> None:
        super().__init__(model, tap_every=1)
        depth = len(self.blocks)
        self.depth = layer if layer > 0 else depth + 1 + layer
        if layer == 0 or not 1 <= self.depth <= depth:
            ranges = f"between 1 and {depth} or between {-depth} and -1"
            raise ModelError(f"model.patch_layer must lie {ranges} for this tower, got {layer}")
        self.taps = (self.depth,)

    @property
    def tokens(self) -> int:
        """Patches per image of the size that the tower was trained for."""
        config = self.model.config
        return int(config.image_size // config.patch_size) ** 2

    def forward(self, pixel_values: Tensor, run: RunBlock | None = None) -> Tensor:
        """Return features ``[I, patches, width]`` of images ``[I, 3, height, width]``; the class token is left out."""
        *_, hidden = self.states(pixel_values, self.depth, run)
        return hidden[:, 1:] if self.has_class_token else hidden


def run_block(block: nn.Module, hidden: Tensor) -> Tensor:
    """Run one block of the tower."""
    output = block(hidden, None)
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)

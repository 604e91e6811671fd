"""A micro-batch: rows laid end to end, without padding.

Token-wise layers (embedding, norms, linear layers) need not know where a row ends; attention is told by
``lengths``. So no compute is spent on padding, and a packed sequence is nothing special.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lavintk.data.labels import IGNORED, IMAGE, TEXT

__all__ = ["IGNORED", "IMAGE", "TEXT", "Batch"]


@dataclass(frozen=True)
class Batch:
    """B rows with N tokens in all.

    :param input_ids: ``[N]`` int64; visual slots hold the id of any ordinary token and are overwritten.
    :param labels: ``[N]`` int64, already aligned so that ``labels[i]`` is what token ``i`` must predict (the next
        token of the same row); :data:`IGNORED` elsewhere.
    :param positions: ``[N]`` int64, restarting at 0 in each row.
    :param lengths: ``[B]`` tokens per row, on the host.
    :param conditions: ``[B]`` int64, :data:`TEXT` or :data:`IMAGE`.
    :param pixel_values: ``[I, 3, height, width]`` fp32, normalised, or None without images.
    :param visual_slots: ``[I * V]`` int64: where in ``input_ids`` the V visual tokens of each image go, in order.
    :param record_ids: ids of the rows, for error messages.
    :param features: ``[I, V, vision width]``: what the vision tower made of the images, in place of their pixels.
    """

    input_ids: Tensor
    labels: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    conditions: Tensor
    pixel_values: Tensor | None
    visual_slots: Tensor
    record_ids: tuple[str, ...]
    features: Tensor | None = None

    @property
    def tokens(self) -> int:
        """N, the tokens of all rows."""
        return self.input_ids.numel()

    @property
    def images(self) -> Tensor | None:
        """Features where the batch carries them, else pixels, ``[I, ...]``; None without images."""
        return self.pixel_values if self.features is None else self.features

    @property
    def labelled(self) -> int:
        """Number of trained tokens."""
        return int((self.labels != IGNORED).sum())

    def to(self, device: torch.device) -> Batch:
        """Return the batch with its tensors on ``device``."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

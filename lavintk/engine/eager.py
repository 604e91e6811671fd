"""The engine that launches each operation when Python comes to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lavintk.data.batch import Batch
from lavintk.models.multimodal import MultimodalModel


class EagerEngine:
    """Runs any model on any device, micro-batches of any shape."""

    name = "eager"
    records = False

    def __init__(self, model: MultimodalModel, scaler: torch.amp.GradScaler) -> None:
        self.model, self.scaler = model, scaler

    def backward(self, window: Sequence[Batch], labelled: int, step: int) -> list[Tensor]:
        """Add the window's gradients; see :class:`lavintk.engine.Engine`."""
        losses = []
        for batch in window:
            loss = self.model.loss_sum(batch.to(self.model.device)) / labelled
            self.scaler.scale(loss).backward()
            losses.append(loss.detach())
        return losses

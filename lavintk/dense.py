"""The quantizer ``none``: weights stay as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from lavintk.layers import DenseLinear


class DenseQuantizer:
    """Wraps weights into frozen layers without changing them."""

    requires_cuda = False

    def quantize(self, weight: Tensor, bias: Tensor | None) -> DenseLinear:
        """Return a layer that shares the memory of ``weight`` ``[out, in]`` and of ``bias``."""
        return DenseLinear(weight.detach(), None if bias is None else bias.detach())

    def empty(self, out_features: int, in_features: int, bias: bool, device: torch.device) -> DenseLinear:
        """Return a layer with undefined content in torch's default type.

        ``load_state_dict(assign=True)`` gives it the type of what is loaded.
        """
        weight = torch.empty(out_features, in_features, device=device)
        return DenseLinear(weight, torch.empty(out_features, device=device) if bias else None)

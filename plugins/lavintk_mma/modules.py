"""The two adapters of LaVIN as layers: the routed one and the plain one.

Symbols as in the paper's section 3.2: ``A`` maps to the bottleneck, ``B`` and ``C`` are the two experts' grouped up
projections, ``E`` the router, s the scale and tau the temperature.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GroupedUp(nn.Module):
    """A linear layer whose weight is block diagonal: group i of the bottleneck feeds group i of the outputs.

    :param dim: width of the bottleneck. :param width: number of outputs. :param groups: number of blocks.
    """

    def __init__(self, dim: int, width: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.zeros(width, dim // groups))
        self.bias = nn.Parameter(torch.zeros(width))

    def dense(self) -> Tensor:
        """Return the weight as a dense ``[width, dim]`` matrix."""
        return cast(Tensor, torch.block_diag(*self.weight.chunk(self.groups)))


class Bottleneck(nn.Module):
    """``A x + a`` with dropout; Xavier-uniform as in LaVIN."""

    def __init__(self, width: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, width))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.dropout = dropout
        nn.init.uniform_(self.weight, -math.sqrt(6 / (width + dim)), math.sqrt(6 / (width + dim)))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., width]`` to ``[..., dim]``."""
        z = F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))
        return F.dropout(z, self.dropout, self.training)


class AffineAdapter(nn.Module):
    """RepAdapter: ``x + s (B (A x + a) + b)``; changes nothing at the start, since B = 0."""

    def __init__(self, width: int, dim: int, groups: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.scale = scale
        self.down = Bottleneck(width, dim, dropout)
        self.up = GroupedUp(dim, width, groups)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., width]`` to the same shape."""
        z = self.down(x)
        return x + self.scale * F.linear(z, self.up.dense().to(x.dtype), self.up.bias.to(x.dtype))

    def affine(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return fp32 ``(down, up, bias)`` of ``x + up @ (down @ x) + bias``."""
        up = self.scale * self.up.dense()
        return self.down.weight, up, up @ self.down.bias + self.scale * self.up.bias


class BareAdapter(AffineAdapter):
    """LaVIN's ``RepAdapter``: ``B (A x + a) + b``, that is RepAdapter without "+ x" and without the scale."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., width]`` to the same shape."""
        return F.linear(self.down(x), self.up.dense().to(x.dtype), self.up.bias.to(x.dtype))


class RoutedAdapter(nn.Module):
    """The MM-adapter: ``x + s w0 (B z + b) + s w1 (C z + c)``, ``w = softmax((E t + e) / tau)``, ``z = A x + a``."""

    def __init__(self, width: int, dim: int, groups: int, scale: float, temperature: float, dropout: float) -> None:
        super().__init__()
        self.scale, self.temperature = scale, temperature
        self.down = Bottleneck(width, dim, dropout)
        self.up_first = GroupedUp(dim, width, groups)
        self.up_second = GroupedUp(dim, width, groups)
        self.router = nn.Linear(width, 2)

    def weights(self, tokens: Tensor) -> Tensor:
        """Return the routing weights ``[..., 2]`` of router inputs ``[..., width]``, in fp32."""
        scores = F.linear(tokens.float(), self.router.weight.float(), self.router.bias.float())
        return torch.softmax(scores / self.temperature, dim=-1)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """Map ``[..., width]`` to the same shape with routing weights ``[..., 2]``, which may be shared by tokens.

        Both experts share one product: their up projections stand side by side, ``[width, 2 dim + 2]``, and the
        routing weights scale the bottleneck, so no tensor of the width of ``x`` is built per expert.
        """
        weights = (self.scale * weights).to(x.dtype).expand(*x.shape[:-1], 2)
        z = self.down(x)
        first, second = weights[..., :1], weights[..., 1:]
        mixed = torch.cat([first * z, second * z, first, second], dim=-1)
        return x + F.linear(mixed, self._stacked_up().to(x.dtype))

    def affine(self, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return fp32 ``(down, up, bias)`` of ``x + up @ (down @ x) + bias`` at fixed routing weights ``[2]``."""
        first, second = self.scale * weights
        up = first * self.up_first.dense() + second * self.up_second.dense()
        bias = up @ self.down.bias + first * self.up_first.bias + second * self.up_second.bias
        return self.down.weight, up, bias

    def _stacked_up(self) -> Tensor:
        """Return ``[width, 2 dim + 2]``: B, C, b, c."""
        ups = (self.up_first, self.up_second)
        return torch.cat([*(up.dense() for up in ups), *(up.bias.unsqueeze(1) for up in ups)], dim=1)

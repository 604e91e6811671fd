"""The layer that ``log4`` makes, and how it is made."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lavintk.layers import FrozenLinear, PackedWeight, checked_weight


class Log4Linear(FrozenLinear):
    """A frozen linear layer with two codes in each byte, a scale for each block, and the value of each code.

    Rows are filled up with zeros to whole blocks.
    """

    scale_names = ("scales", "grid")

    def __init__(self, codes: Tensor, scales: Tensor, grid: Tensor, bias: Tensor | None, in_features: int) -> None:
        super().__init__(codes.shape[0], in_features, bias)
        self.codes: Tensor
        self.scales: Tensor
        self.grid: Tensor
        self.register_buffer("codes", codes)  # [out, blocks, block size / 2], uint8, the first code in the low half
        self.register_buffer("scales", scales)  # [out, blocks], fp32
        self.register_buffer("grid", grid)  # [16], fp32

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight ``[out, in]`` that the layer computes with, in ``dtype``."""
        codes = torch.stack([self.codes & 15, self.codes >> 4], dim=-1).flatten(2)
        weight = self.grid[codes.int()] * self.scales.unsqueeze(-1)
        return weight.flatten(1)[:, : self.in_features].to(dtype)

    def packed(self) -> PackedWeight:
        """Describe the storage for exporters."""
        return PackedWeight(
            "log4",
            (self.out_features, self.in_features),
            self.codes,
            self.scales,
            block_size=2 * self.codes.shape[2],
            layout="rows of blocks, first element in the low nibble",
            codebook=self.grid,
        )


class Log4Quantizer:
    """Rounds to the nearest value of the grid; see :class:`lavintk.contracts.Quantizer`.

    :param block_size: weights of a row that share a scale; even.
    :param ratio: of a value of the grid to the next smaller one.
    """

    requires_cuda = False

    def __init__(self, block_size: int, ratio: float) -> None:
        self.block_size = block_size
        positive = float(ratio) ** -torch.arange(7, -1, -1, dtype=torch.float32)  # up to 1
        self.grid = torch.cat([-positive.flip(0), positive])

    def quantize(self, weight: Tensor, bias: Tensor | None) -> Log4Linear:
        """Return a frozen layer that holds ``weight`` ``[out, in]`` quantized, on the weight's device.

        :raises ModelError: the weight cannot be quantized.
        """
        weight = checked_weight(weight, bias, "log4")
        grid = self.grid.to(weight.device)
        filled = F.pad(weight.float(), (0, -weight.shape[1] % self.block_size))
        blocks = filled.view(len(weight), -1, self.block_size)
        scales = blocks.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny)
        borders = (grid[1:] + grid[:-1]) / 2
        codes = torch.bucketize(blocks / scales.unsqueeze(-1), borders).to(torch.uint8)
        pairs = codes[..., 0::2] | codes[..., 1::2] << 4
        return Log4Linear(pairs, scales, grid, None if bias is None else bias.detach(), weight.shape[1])

    def empty(self, out_features: int, in_features: int, bias: bool, device: torch.device) -> Log4Linear:
        """Return a layer of that shape with undefined content, to load a ``state_dict`` into."""
        blocks = -(-in_features // self.block_size)
        return Log4Linear(
            torch.empty(out_features, blocks, self.block_size // 2, dtype=torch.uint8, device=device),
            torch.empty(out_features, blocks, device=device),
            torch.empty(16, device=device),
            torch.empty(out_features, device=device) if bias else None,
            in_features,
        )

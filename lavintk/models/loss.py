"""Cross entropy over a large vocabulary, of which only a block of logits exists at a time.

The loss needs the logits' logarithm of the sum of exponentials, which can be added up block by block, and the label's
own logit. The gradient is softmax minus one at the label, times the rows of the head; with the sum known, it can be
computed block by block too. Both are computed in the forward pass, so that the backward pass only multiplies by a
number, and nothing is kept but a gradient of the size of the states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lavintk.data.labels import IGNORED
from lavintk.layers import has_hooks
from lavintk.models.vocabulary import QuantizedHead

DENSE_BLOCK = 1 << 15
"""Rows of a plain head that make up a block. A vocabulary of one block takes two products instead of three."""
HALF_SCALE = 1024.0
"""Factor of probabilities on their way through fp16: they may be as small as 1e-10, and the product with the rows of a
head, which are below 32, stays within its range."""


@dataclass(frozen=True)
class HeadBlock:
    """Neighbouring rows of an output head.

    :param rows: how many there are.
    :param weight: returns them, ``[rows, hidden]``, in a type.
    :param bias: ``[rows]`` or None.
    """

    rows: int
    weight: Callable[[torch.dtype], Tensor]
    bias: Tensor | None = None


def head_blocks(head: nn.Module) -> list[HeadBlock] | None:
    """Return the blocks of a head that is frozen and does nothing but multiply; None for any other."""
    if has_hooks(head) or "forward" in vars(head):
        return None
    if type(head) is QuantizedHead:
        return [HeadBlock(block.out_features, block.dequantize) for block in head.table.blocks]
    if type(head) is not nn.Linear or any(parameter.requires_grad for parameter in head.parameters()):
        return None
    weights = head.weight.detach().split(DENSE_BLOCK)
    biases = [None] * len(weights) if head.bias is None else head.bias.detach().split(DENSE_BLOCK)
    return [HeadBlock(len(weight), weight.to, bias) for weight, bias in zip(weights, biases)]


def cross_entropy_sum(hidden: Tensor, labels: Tensor, blocks: Sequence[HeadBlock], chunk: int) -> Tensor:
    """Return the cross entropy summed over the labels, in nats, an fp32 scalar; the host never waits.

    :param hidden: ``[K, hidden]``, fp32, fp16 or bf16; gradients flow to it.
    :param labels: ``[K]`` int64; those that are :data:`IGNORED` count nothing.
    :param blocks: the head; its logits are computed in the type of ``hidden`` and summed in fp32.
    :param chunk: tokens whose logits exist at a time.
    """
    wanted = torch.is_grad_enabled() and hidden.requires_grad
    loss: Tensor = _CrossEntropySum.apply(hidden, labels, blocks, chunk, wanted)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, blocks: Sequence[HeadBlock], chunk: int, wanted: bool
    ) -> Tensor:
        sums = _Sums(hidden, labels, chunk)
        loss, gradient = sums.at_once(blocks[0], wanted) if len(blocks) == 1 else sums.in_turn(blocks, wanted)
        ctx.dtype = hidden.dtype
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * factor).to(ctx.dtype), None, None, None, None


class _Sums:
    """The sums over one head.

    Gradients lie in the type of the states, but those of fp16 in fp32 until they are scaled: loss scaling comes with
    the backward pass, and what would have vanished by then does not come back.
    """

    def __init__(self, hidden: Tensor, labels: Tensor, chunk: int) -> None:
        self.hidden, self.labels = hidden, labels
        self.counted = labels != IGNORED
        self.slices = [slice(first, first + chunk) for first in range(0, len(labels), chunk)]
        half = hidden.dtype == torch.float16
        self.scale = HALF_SCALE if half else 1.0
        self.kept = torch.float32 if half else hidden.dtype

    def at_once(self, block: HeadBlock, wanted: bool) -> tuple[Tensor, Tensor | None]:
        """Return loss and gradient with a head of one block, whose logits are used for both."""
        weight = block.weight(self.hidden.dtype)
        losses = self.hidden.new_zeros(len(self.labels), dtype=torch.float32)
        gradient = torch.empty_like(self.hidden, dtype=self.kept) if wanted else None
        for part in self.slices:
            self._both(part, block, weight, losses, gradient)
        return self._sum(losses), self._unscaled(gradient)

    def in_turn(self, blocks: Sequence[HeadBlock], wanted: bool) -> tuple[Tensor, Tensor | None]:
        """Return loss and gradient block by block; for the gradient the logits are computed again."""
        total = self.hidden.new_full((len(self.labels), 1), -torch.inf, dtype=torch.float32)
        own, first = torch.zeros_like(total), 0
        for block in blocks:
            self._add_sums(block, first, total, own)
            first += block.rows
        loss = self._sum((total - own).squeeze(1))
        if not wanted:
            return loss, None
        gradient, first = torch.zeros_like(self.hidden, dtype=torch.float32), 0  # a sum over blocks
        for block in blocks:
            self._add_gradient(block, first, total, gradient)
            first += block.rows
        unscaled = self._unscaled(gradient)
        return loss, None if unscaled is None else unscaled.to(self.kept)

    # what follows are functions of their own so that weights and logits are gone before the next ones are made

    def _both(self, part: slice, block: HeadBlock, weight: Tensor, losses: Tensor, gradient: Tensor | None) -> None:
        """Put losses and gradient of a chunk in their places."""
        logits = self._logits(part, weight, block.bias)
        place, inside = self._places(part, 0, block.rows)
        own, peak = logits.gather(1, place), logits.amax(1, keepdim=True)
        total = logits.sub_(peak).exp_().sum(1, keepdim=True)
        losses[part] = (total.log() + peak - own).squeeze(1)
        if gradient is not None:
            logits.mul_(self._shares(part) / total)
            gradient[part] = self._towards(logits, place, inside, weight)

    def _add_sums(self, block: HeadBlock, first: int, total: Tensor, own: Tensor) -> None:
        """Take a block up into the logarithm of the sum of exponentials and the label's own logit, ``[K, 1]`` each."""
        weight = block.weight(self.hidden.dtype)
        for part in self.slices:
            total[part], own[part] = self._added(part, block, weight, first, total[part], own[part])

    def _added(
        self, part: slice, block: HeadBlock, weight: Tensor, first: int, total: Tensor, own: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits = self._logits(part, weight, block.bias)
        place, inside = self._places(part, first, block.rows)
        own = torch.where(inside, logits.gather(1, place), own)
        peak = logits.amax(1, keepdim=True)
        here = logits.sub_(peak).exp_().sum(1, keepdim=True).log_().add_(peak)
        return torch.logaddexp(total, here), own

    def _add_gradient(self, block: HeadBlock, first: int, total: Tensor, gradient: Tensor) -> None:
        """Add a block's part of the gradient.

        :param total: the logarithm of the sum of exponentials over all blocks.
        """
        weight = block.weight(self.hidden.dtype)
        for part in self.slices:
            # in the exponent, so that it takes no further pass; what is ignored comes to exp(-inf)
            shifted = total[part] - self._shares(part).log()
            probabilities = self._logits(part, weight, block.bias).sub_(shifted).exp_()
            gradient[part].add_(self._towards(probabilities, *self._places(part, first, block.rows), weight))
            del probabilities

    def _logits(self, part: slice, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the logits of a chunk and a block, fp32, which the caller may change."""
        bias = None if bias is None else bias.to(weight.dtype)
        return F.linear(self.hidden[part].detach(), weight, bias).float()

    def _places(self, part: slice, first: int, rows: int) -> tuple[Tensor, Tensor]:
        """Return where the labels of a chunk stand in a block, and which of them do, ``[chunk, 1]`` each."""
        place = (self.labels[part] - first).unsqueeze(1)
        return place.clamp(0, rows - 1), (place >= 0) & (place < rows)

    def _shares(self, part: slice) -> Tensor:
        """Return what the probabilities of each token are multiplied by, ``[chunk, 1]``: 0 where it is ignored."""
        return self.counted[part].unsqueeze(1) * self.scale

    def _towards(self, probabilities: Tensor, place: Tensor, inside: Tensor, weight: Tensor) -> Tensor:
        """Return a block's part of the gradient, ``[chunk, hidden]``; probabilities, scaled ones, are changed."""
        at_label = probabilities.gather(1, place) - inside * self.scale
        return probabilities.scatter_(1, place, at_label).to(weight.dtype) @ weight

    def _sum(self, losses: Tensor) -> Tensor:
        return torch.where(self.counted, losses, 0.0).sum()

    def _unscaled(self, gradient: Tensor | None) -> Tensor | None:
        return gradient if gradient is None or self.scale == 1 else gradient.mul_(1 / self.scale)

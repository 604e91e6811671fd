"""The function of LoRA layers with a common input, forward and backward by hand.

For frozen W_i and trained A_i, B_i: ``y_i = W_i x + b_i + s_i B_i z_i`` with ``z_i = A_i x``. All A_i are multiplied at
once. An update counts before the sums of the product with W are rounded: on a CPU they begin with it, on a GPU they are
left in fp32 and a kernel adds it, and the residual if there is one. Added to the rounded product, as PEFT does, an
update below half the last digit would be lost: in bf16, of which two or three decimal digits are kept, that is most of
what a LoRA says in its first steps. The updates of a gated pair are left to SwiGLU's kernel, which reads the products
anyway and adds in fp32; a product has the same gradient with its update as without.

It is two autograd functions, since torch packs what a function saves only after its forward has run. A checkpointed
block is recomputed until its last tensor is saved; were that done by the function that multiplies with W, the product
of the block's last layer would be computed again for nothing. So :class:`_Inner` saves everything and multiplies with A
only, and :class:`_Outer`, which saves nothing, reads what the other has saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lavintk.kernels import LowRank, add_low_rank, fused, swiglu, swiglu_low_rank
from lavintk.layers import multiplies_wide

if TYPE_CHECKING:
    from lavintk_lora.adapter import LoraLinear


def lora_products(layers: Sequence[LoraLinear], x: Tensor) -> list[Tensor]:
    """Return ``[..., out]`` of each layer for the same ``x`` ``[..., in]``, in its type; dropout is left out.

    Gradients flow to ``x``, and to A and B in their own type. Kept for the backward pass are ``x``, the inner values,
    and A and B in the type of ``x``.
    """
    factors, inner = _inner(layers, x)
    return list(_outer(layers, factors, inner, x))


def lora_product_onto(layer: LoraLinear, x: Tensor, residual: Tensor) -> Tensor:
    """Return ``residual``, ``[..., out]`` in the type of ``x``, plus what :func:`lora_products` makes of ``x``.

    It stays as it is, and is not kept for the backward pass.
    """
    factors, inner = _inner([layer], x)
    (output,) = _outer([layer], factors, inner, x, residual)
    return output


def lora_gated(gate: LoraLinear, up: LoraLinear, x: Tensor) -> Tensor:
    """Return ``silu(g) * u``, where ``g`` and ``u`` are what :func:`lora_products` makes of ``x``."""
    layers = [gate, up]
    factors, inner = _inner(layers, x)
    if not (fused("low_rank", x, *factors.ups) and fused("swiglu", x)):
        return swiglu(*_outer(layers, factors, inner, x))
    gate_product, up_product = _outer(layers, factors, inner, x, updated=False)
    gate_update, up_update = _updates(layers, factors, inner.detach())
    return swiglu_low_rank(gate_product, up_product, gate_update, up_update)


def _inner(layers: Sequence[LoraLinear], x: Tensor) -> tuple[_Factors, Tensor]:
    factors = _Factors.of(layers, x.dtype)
    inner: Tensor = _Inner.apply(factors, x, *_masters(layers))  # type: ignore[no-untyped-call]
    return factors, inner


def _outer(
    layers: Sequence[LoraLinear],
    factors: _Factors,
    inner: Tensor,
    x: Tensor,
    residual: Tensor | None = None,
    *,
    updated: bool = True,
) -> tuple[Tensor, ...]:
    """Return the products; with ``updated=False`` without what A and B add to them, though with its gradients."""
    made = _Outer.apply(layers, factors, inner, x, residual, updated, *_masters(layers))  # type: ignore[no-untyped-call]
    return cast(tuple[Tensor, ...], made)


def _masters(layers: Sequence[LoraLinear]) -> list[Tensor]:
    return [*(layer.down for layer in layers), *(layer.up for layer in layers)]


def _updates(layers: Sequence[LoraLinear], factors: _Factors, inner: Tensor) -> list[LowRank]:
    """Return what A and B add to each product."""
    parts = inner.split([up.shape[1] for up in factors.ups], dim=1)
    return [LowRank(part, up, layer.scale) for part, up, layer in zip(parts, factors.ups, layers)]


@dataclass(frozen=True)
class _Factors:
    """A and B in the type of x, for one pass."""

    down: Tensor
    """A_i of all layers one below the other, ``[sum of ranks, in]``."""
    ups: list[Tensor]
    """B_i ``[out, rank]``."""

    @classmethod
    def of(cls, layers: Sequence[LoraLinear], dtype: torch.dtype) -> _Factors:
        downs, ups = ([matrix.detach() for matrix in side] for side in zip(*((x.down, x.up) for x in layers)))
        matrices = (*downs, *ups)
        # two kernels that use the whole device, however many matrices there are
        flat = torch.cat([matrix.flatten() for matrix in matrices]).to(dtype)
        pieces = flat.split([matrix.numel() for matrix in matrices])
        narrow = [piece.view(up.shape) for piece, up in zip(pieces[len(downs) :], ups)]
        return cls(flat[: sum(map(Tensor.numel, downs))].view(-1, downs[0].shape[1]), narrow)


class _Inner(torch.autograd.Function):
    """``z`` of all layers side by side, ``[rows of x, sum of ranks]``; saves what the gradients need.

    Its own backward, without gradients, only follows :class:`_Outer`'s, whereupon torch lets go of what is saved.
    """

    @staticmethod
    def forward(ctx: Any, factors: _Factors, x: Tensor, *masters: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        inner = x.reshape(-1, x.shape[-1]) @ factors.down.t()
        ctx.save_for_backward(x, inner, factors.down, *factors.ups)
        return inner

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)


class _Outer(torch.autograd.Function):
    """``W_i x + b_i + s_i B_i z_i``, plus the residual if there is one, and all gradients.

    Gradients are those of the updated products, even if the update is left to another function.
    """

    @staticmethod
    def forward(
        ctx: Any,
        layers: Sequence[LoraLinear],
        factors: _Factors,
        inner: Tensor,
        x: Tensor,
        residual: Tensor | None,
        updated: bool,
        *masters: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.layers, ctx.node = layers, inner.grad_fn
        if not updated:
            return tuple(layer.base.product(x) for layer in layers)
        updates = _updates(layers, factors, inner)
        return tuple(_updated(layer, x, update, residual) for layer, update in zip(layers, updates))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        _, _, _, x_needed, residual_needed, _, *needed = ctx.needs_input_grad
        residual_gradient = gradients[0] if residual_needed else None
        if ctx.node is None:  # nothing but the residual is trained
            return (None, None, None, None, residual_gradient, None, *(None for _ in needed))
        x, inner, down, *ups = ctx.node.saved_tensors
        layers, count, ranks = ctx.layers, len(ups), [up.shape[1] for up in ups]
        # None for an output that nobody used
        rows = [None if g is None else g.reshape(-1, up.shape[0]) for g, up in zip(gradients, ups)]
        inner_gradient = _inner_gradient(rows, ups, layers, inner)
        x_gradient: Tensor | None = None
        for layer, gradient in zip(layers, rows):
            if x_needed and gradient is not None:
                x_gradient = layer.base.input_gradient(gradient, x_gradient)
        if x_gradient is not None:
            x_gradient = x_gradient.addmm_(inner_gradient, down).view(x.shape)
        down_gradients: Sequence[Tensor | None] = [None] * count
        up_gradients: Sequence[Tensor | None] = [None] * count
        if any(needed[:count]):
            stacked = _product(inner_gradient.t(), x.reshape(-1, x.shape[-1]), layers[0].down.dtype)
            down_gradients = stacked.split(ranks)
        if any(needed[count:]):
            up_gradients = _up_gradients(rows, inner.split(ranks, dim=1), layers)
        return (None, None, None, x_gradient, residual_gradient, None, *down_gradients, *up_gradients)


def _updated(layer: LoraLinear, x: Tensor, update: LowRank, residual: Tensor | None) -> Tensor:
    """Return what ``layer`` makes of ``x``, plus ``residual``."""
    if multiplies_wide(x) and fused("low_rank", x, *update[:2]):
        return add_low_rank(layer.base.product(x, wide=True), update, residual)
    product = layer.base.product(x, _expanded(update, x))
    return product if residual is None else product.add_(residual)


def _expanded(update: LowRank, x: Tensor) -> Tensor:
    """Return what ``update`` adds to a product with ``x`` ``[..., in]``."""
    added = x.new_empty(update.inner.shape[0], update.up.shape[0])
    added.addmm_(update.inner, update.up.t(), beta=0, alpha=update.scale)  # scaled within the product
    return added.view(*x.shape[:-1], update.up.shape[0])


def _inner_gradient(
    gradients: Sequence[Tensor | None], ups: Sequence[Tensor], layers: Sequence[LoraLinear], inner: Tensor
) -> Tensor:
    """Return the gradient with respect to ``z``, in the shape of ``inner``."""
    result = torch.empty_like(inner)
    for gradient, up, layer, part in zip(gradients, ups, layers, result.split([up.shape[1] for up in ups], dim=1)):
        if gradient is None:
            part.zero_()
        else:
            part.addmm_(gradient, up, beta=0, alpha=layer.scale)
    return result


def _up_gradients(
    gradients: Sequence[Tensor | None], inner: Sequence[Tensor], layers: Sequence[LoraLinear]
) -> list[Tensor | None]:
    """Return the gradients with respect to the B_i."""
    results: list[Tensor | None] = [None] * len(layers)
    scaled, scales = [], []
    for i, (gradient, z, layer) in enumerate(zip(gradients, inner, layers)):
        if gradient is not None:
            results[i] = product = _product(gradient.t(), z, layer.up.dtype)
            scaled.append(product)
            scales.append(layer.scale)
    if scaled:
        torch._foreach_mul_(scaled, scales)  # one kernel
    return results


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``left @ right`` in ``dtype``, not rounded to their type in between where the device can do that."""
    if dtype == torch.float32 and multiplies_wide(left):
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)

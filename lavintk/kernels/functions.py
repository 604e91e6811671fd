"""The functions that models call: a fused kernel where it fits, torch's operations elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from lavintk.kernels import plain
from lavintk.kernels.choice import fused
from lavintk.kernels.plain import LowRank

WIDEST_ROW = 65536
"""Elements of a row that one program still takes whole."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise ``x`` along its last dimension as transformers' ``LlamaRMSNorm`` does.

    The mean square is taken in fp32, the normalised value rounded to the type of ``x`` and then multiplied by the
    weight. Kept are ``x`` and one fp32 number per row for the backward pass, which gives no gradient of the weight:
    one that is trained takes torch's operations.

    :param x: ``[..., H]``. :param weight: ``[H]``. :param eps: added to the mean square.
    :returns: the shape of ``x``.
    """
    if _norm_kernel_suits(x, weight):
        from lavintk.kernels import triton_norm

        return triton_norm.rms_norm(x, weight, eps)
    return _plain_norm(x, weight, eps)


def rms_norm_and_pass(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return ``x`` normalised as :func:`rms_norm` does, and ``x`` itself, for a residual that goes around what follows.

    Both lead back to one node of the graph, so the kernel that makes the gradient of ``x`` also adds what comes along
    the residual, in fp32. The second result shares memory with ``x``: neither may be changed in place.

    :param x: ``[..., H]``. :param weight: ``[H]``. :param eps: added to the mean square.
    """
    if _norm_kernel_suits(x, weight):
        from lavintk.kernels import triton_norm

        return triton_norm.rms_norm_and_pass(x, weight, eps)
    return _plain_norm(x, weight, eps), x


def _plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (plain.rms_norm if _is_trained(weight) else plain.frozen_rms_norm)(x, weight, eps)


def _is_trained(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


def _norm_kernel_suits(x: Tensor, weight: Tensor) -> bool:
    fits = weight.shape == x.shape[-1:] and x.shape[-1] <= WIDEST_ROW
    return not _is_trained(weight) and fits and fused("rms_norm", x, weight)


def add_low_rank(product: Tensor, update: LowRank, residual: Tensor | None = None) -> Tensor:
    """Return ``product`` plus ``update`` and ``residual`` in the type of the update, summed in fp32 and rounded once.

    For use inside an autograd function: without gradient.

    :param product: ``[..., out]``, contiguous, in fp32 or the type of the update: what is rounded already loses
        updates below half its last digit. :param residual: ``[..., out]`` in that type.
    """
    others = () if residual is None else (residual,)
    if product.is_contiguous() and fused("low_rank", *update[:2], *others):
        from lavintk.kernels import triton_low_rank

        return triton_low_rank.add_low_rank(product, update, residual)
    return plain.add_low_rank(product, update, residual)


def swiglu_low_rank(gate: Tensor, up: Tensor, gate_update: LowRank, up_update: LowRank) -> Tensor:
    """Return :func:`swiglu` of products to which the updates have yet to be added; all in fp32, rounded once.

    A sum in bf16 would lose updates that are small beside the product. The kernel keeps all arguments for the backward
    pass and adds the updates there once more, so that no sum is ever written. Gradients flow to ``gate`` and ``up``
    only: those of the sums, from which a caller gets the updates' own.

    :param gate: ``[..., I]``. :param up: likewise.
    """
    fits = gate.shape == up.shape and gate.is_contiguous() and up.is_contiguous()
    tensors = (gate, up, *gate_update[:2], *up_update[:2])
    if fits and fused("low_rank", *tensors) and fused("swiglu", *tensors):
        from lavintk.kernels import triton_low_rank

        return triton_low_rank.swiglu_low_rank(gate, up, gate_update, up_update)
    return plain.swiglu_low_rank(gate, up, gate_update, up_update)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return ``silu(gate) * up`` as transformers' gated layers do: ``silu`` is rounded before the product.

    The kernel keeps ``gate`` and ``up`` for the backward pass; they may be slices of one projection.

    :param gate: ``[..., I]``. :param up: likewise.
    :returns: ``[..., I]``, contiguous from the kernel.
    """
    if gate.shape == up.shape and gate.dim() > 0 and fused("swiglu", gate, up):
        from lavintk.kernels import triton_swiglu

        return triton_swiglu.swiglu(gate, up)
    return plain.swiglu(gate, up)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys as transformers' ``apply_rotary_pos_emb`` does: element i with element ``i + d / 2``.

    The kernel keeps ``cos`` and ``sin`` only: the backward pass is the rotation back. It treats them as constants;
    where they need a gradient, torch's operations are taken.

    :param q: ``[N, heads, d]``, also as a view of a wider projection. :param k: ``[N, kv_heads, d]``, likewise.
    :param cos: ``[N, d]`` as transformers' rotary embedding returns it, without its batch dimension.
    :param sin: likewise.
    :returns: the rotated q and k, contiguous from the kernel.
    """
    trained = _is_trained(cos) or _is_trained(sin)
    fits = q.dim() == k.dim() == 3 and (q.shape[0], q.shape[2]) == (k.shape[0], k.shape[2]) == cos.shape == sin.shape
    if not trained and fits and q.shape[2] % 2 == 0 and fused("rope", q, k, cos, sin):
        from lavintk.kernels import triton_rope

        return triton_rope.rope(q, k, cos, sin)
    return plain.rope(q, k, cos, sin)

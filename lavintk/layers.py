"""Frozen linear layers: the base class of what quantizers make, and the plain one that quantizes nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lavintk.errors import ModelError
from lavintk.kernels import swiglu

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""Number types that layers are made from and compute in."""
WIDE_PRODUCTS = torch.version.cuda is not None and "dtype" in torch.ops.aten.mm.overloads()
"""Whether a CUDA device can multiply fp16 or bf16 matrices to an fp32 one."""


@dataclass(frozen=True)
class PackedWeight:
    """How a frozen layer stores its weight, so that an exporter can copy it instead of re-quantizing.

    :param scheme: ``"dense"``, ``"nf4"``, ``"fp4"``, ``"int8-row"``, ``"int4-block"`` or a plugin's own name.
    :param shape: ``(out, in)``.
    :param codes: the stored codes, in the layout that ``layout`` names.
    :param scales: one scale per block or row, fp32, nested scales already resolved.
    :param zero_points: one per block, or None for symmetric schemes.
    :param block_size: weights sharing a scale; 0 for one scale per row.
    :param layout: for example ``"row-major, first element in the high nibble"``.
    :param codebook: value of each code before scaling, or None where codes are integers.
    """

    scheme: str
    shape: tuple[int, int]
    codes: Tensor
    scales: Tensor | None = None
    zero_points: Tensor | None = None
    block_size: int = 0
    layout: str = "row-major"
    codebook: Tensor | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


class FrozenLinear(nn.Module, ABC):
    """``y = x @ W.T + b`` with a weight that is stored in any form and never trained.

    A subclass registers its storage as buffers (so ``state_dict`` holds it bit for bit) and implements
    :meth:`dequantize` and :meth:`packed`. :meth:`product` and :meth:`input_gradient` dequantize the weight anew, so
    nothing but the storage stays in memory in between; a subclass with faster ways overrides these two, not
    :meth:`forward`, since adapters build their own functions on them.
    """

    graph_safe = True
    """Whether the forward and backward pass may be captured in a CUDA graph (no host synchronisation)."""
    scale_names: ClassVar[tuple[str, ...]] = ()
    """Names of the buffers that keep their type when the module is cast to another one: they only move."""

    def __init__(self, out_features: int, in_features: int, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.bias: Tensor | None
        self.register_buffer("bias", bias)

    @abstractmethod
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight ``[out, in]`` that the layer computes with, in ``dtype``."""

    @abstractmethod
    def packed(self) -> PackedWeight:
        """Describe the storage for exporters; tensors are views, not copies, where possible."""

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return ``dequantize(dtype)[index]``, rows of the weight, bit for bit: what an embedding looks up.

        A subclass whose rows can be unpacked by themselves overrides it. The host must not wait for the device.

        :param index: ``[N]`` int64, each from 0 to ``out - 1``.
        """
        return self.dequantize(dtype).index_select(0, index)

    def bits_per_weight(self) -> float:
        """Return the bits stored per weight, scales included, bias excluded."""
        stored = sum(b.numel() * b.element_size() for name, b in self.named_buffers() if name != "bias")
        return 8 * stored / (self.out_features * self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., out]`` in the type of ``x`` ``[..., in]``; gradients flow to ``x`` only."""
        product: Tensor = _FrozenProduct.apply(x, self, None)  # type: ignore[no-untyped-call]
        return product

    def product(self, x: Tensor, total: Tensor | None = None, *, wide: bool = False) -> Tensor:
        """Return ``x @ W.T + b`` as a new contiguous tensor, which the caller may change.

        For use inside an autograd function: called without gradient.

        :param x: ``[..., in]``, fp32, fp16 or bf16; the product ``[..., out]`` has its type.
        :param total: contiguous ``[..., out]`` of that type; the product is added to it in place, and it is returned.
            Where the sums of the product are wider than that type, ``total`` is added before they are rounded: what
            is small beside the product would else be lost, since a rounded product plus less than half its last
            digit is the rounded product.
        :param wide: return the sums in fp32 where they can be had so, as on CUDA devices, for a caller that adds to
            them and rounds. Not with ``total``.
        """
        bias = None if self.bias is None else self.bias.to(x.dtype)
        weight, rows = self.dequantize(x.dtype), x.reshape(-1, self.in_features)
        if multiplies_wide(x) and (wide or total is not None):
            # cuBLAS on Hopper rounds a product before it adds it to a matrix of 16 bits
            sums = torch.mm(rows, weight.t(), out_dtype=torch.float32).view(*x.shape[:-1], self.out_features)
            if bias is not None:
                sums += bias
            return sums if total is None else torch.add(sums, total, out=total)
        if total is None:
            return F.linear(x, weight, bias)
        total.view(-1, self.out_features).addmm_(rows, weight.t())
        return total if bias is None else total.add_(bias)

    def input_gradient(self, gradient: Tensor, total: Tensor | None = None) -> Tensor:
        """Return the gradient with respect to ``x``, ``gradient @ W``, in the type of ``gradient`` ``[..., out]``.

        :param total: contiguous ``[..., in]`` of that type; the gradient is added to it in place, and it is returned.
        """
        weight = self.dequantize(gradient.dtype)
        if total is None:
            return gradient @ weight
        total.view(-1, self.in_features).addmm_(gradient.reshape(-1, self.out_features), weight)
        return total

    def extra_repr(self) -> str:
        """Describe the layer in ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scales = [self._buffers[name] for name in self.scale_names]

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype != tensor.dtype and any(tensor is scale for scale in scales):
                return tensor.to(moved.device)
            return moved

        result: Self = super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return result


class DenseLinear(FrozenLinear):
    """A frozen layer that keeps its weight as it is."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight.shape[0], weight.shape[1], bias)
        self.weight: Tensor
        self.register_buffer("weight", weight)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight ``[out, in]`` in ``dtype``."""
        return self.weight.to(dtype)

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the rows ``index`` in ``dtype``."""
        return self.weight.index_select(0, index).to(dtype)

    def packed(self) -> PackedWeight:
        """Describe the dense storage."""
        return PackedWeight("dense", (self.out_features, self.in_features), self.weight)


def multiplies_wide(x: Tensor) -> bool:
    """Whether the device of ``x``, in fp16 or bf16, multiplies such matrices to one in fp32."""
    return WIDE_PRODUCTS and x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


class _FrozenProduct(torch.autograd.Function):
    """``x @ W.T + b``, plus an update, that keeps no dequantized weight for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear, update: Tensor | None) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        if update is None:
            return layer.product(x)
        ctx.mark_dirty(update)
        return layer.product(x, update)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (gradient,) = gradients
        of_update = gradient if ctx.needs_input_grad[2] else None
        if not ctx.needs_input_grad[0]:
            return None, None, of_update
        return ctx.layer.input_gradient(gradient.to(ctx.dtype)), None, of_update


def forward_with_update(layer: FrozenLinear, x: Tensor, update: Tensor) -> Tensor:
    """Return ``layer(x) + update``, for adapters; gradients flow to ``x`` and ``update``.

    In 16 bits a small update is lost if it is added to what ``layer`` returns; see :meth:`FrozenLinear.product`. A
    layer with hooks is called all the same.

    :param x: ``[..., in]``. :param update: contiguous ``[..., out]`` in the type of ``x``; it may be changed in place.
    """
    if has_hooks(layer):
        return cast(Tensor, layer(x)) + update
    return cast(Tensor, _FrozenProduct.apply(x, layer, update))  # type: ignore[no-untyped-call]


def forward_group(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """Return what each of ``layers`` makes of the same ``x`` ``[..., in]``, in one go where they can do that together.

    They can if all are of one class that has a class method ``forward_group(layers, x)``, as that of an adapter may.
    Layers with hooks are called one by one.
    """
    kind = type(layers[0])
    together = getattr(kind, "forward_group", None)
    if together is None or any(type(layer) is not kind or has_hooks(layer) for layer in layers):
        return [layer(x) for layer in layers]
    return cast(list[Tensor], together(layers, x))


def forward_onto(layer: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """Return ``residual + layer(x)``, ``[..., out]``, as a new tensor, in one go where the layer can do that.

    It can if its class has a method ``forward_onto(x, residual)``, as that of an adapter may. A layer with hooks is
    called. Frozen layers have no such method: before torch's ``addmm`` adds a product to a matrix that has to stay, it
    copies that matrix, which takes about as long as the sum.

    :param x: ``[..., in]``. :param residual: ``[..., out]``; it stays as it is.
    """
    together = getattr(type(layer), "forward_onto", None)
    if together is None or has_hooks(layer):
        return residual + cast(Tensor, layer(x))
    return cast(Tensor, together(layer, x, residual))


def forward_gated(gate: nn.Module, up: nn.Module, x: Tensor) -> Tensor:
    """Return ``silu(gate(x)) * up(x)``, ``[..., out]``, in one go where the two layers can do that.

    They can if they are of one class that has a method ``forward_gated(up, x)``. Others make use of
    :func:`forward_group`, and layers with hooks are called.
    """
    together = getattr(type(gate), "forward_gated", None)
    if together is None or type(up) is not type(gate) or has_hooks(gate) or has_hooks(up):
        return swiglu(*forward_group([gate, up], x))
    return cast(Tensor, together(gate, up, x))


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its ``forward``."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def checked_weight(weight: Tensor, bias: Tensor | None, scheme: str) -> Tensor:
    """Return ``weight`` ``[out, in]`` detached and contiguous, if it and ``bias`` ``[out]`` can be quantized.

    For quantizers that work on a CPU and on CUDA.

    :param scheme: how the error names the grid.
    :raises ModelError: with all that keeps it from being quantized.
    """
    faults = []
    if weight.dim() != 2 or weight.numel() == 0:
        faults.append(f"its shape is {list(weight.shape)}, [out, in] is needed")
    if weight.dtype not in FLOATS:
        faults.append(f"its type is {weight.dtype}, fp32, fp16 or bf16 is needed")
    if weight.device.type not in ("cpu", "cuda"):
        faults.append(f"it is on {weight.device}, a CPU or a CUDA device is needed")
    if bias is not None and bias.shape != weight.shape[:1]:
        faults.append(f"its bias has shape {list(bias.shape)}, {list(weight.shape[:1])} is needed")
    if not faults and not is_finite(weight):
        bad = int((~torch.isfinite(weight)).sum())
        faults.append(f"{bad} of its {weight.numel()} elements are NaN or infinite; is the file damaged?")
    if faults:
        raise ModelError(f"cannot quantize a weight to {scheme}: {'; '.join(faults)}")
    return weight.detach().contiguous()


def is_finite(weight: Tensor) -> bool:
    """Whether all elements are finite; one pass, without a mask of the weight's size."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all())

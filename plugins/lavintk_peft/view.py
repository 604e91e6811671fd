"""What PEFT sees of a frozen layer: an ``nn.Linear`` whose weight is there only while something computes with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lavintk.layers import FrozenLinear


class OnDemandWeight(torch.Tensor):
    """The weight ``[out, in]`` of a frozen layer in fp32, dequantized anew by every operation that reads it.

    Shape, type and device cost nothing. What autograd keeps for the backward pass is this tensor, not the values. It
    takes no gradient, and what is written into it is lost.
    """

    layer: FrozenLinear

    @staticmethod
    def __new__(cls, layer: FrozenLinear) -> OnDemandWeight:
        """Return the weight of ``layer``."""
        make: Callable[..., OnDemandWeight] = torch.Tensor._make_wrapper_subclass
        shape, device = (layer.out_features, layer.in_features), _device_of(layer)
        weight = make(cls, shape, dtype=torch.float32, device=device)
        weight.layer = layer
        return weight

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[Any, Any] | None = None
    ) -> Any:
        """Run an operation; those that only hand the tensor on dequantize nothing."""
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return OnDemandWeight(args[0].layer)
        args, kwargs = tree_map_only(cls, OnDemandWeight._values, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _values(self) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(self.shape, device="meta")
        return self.layer.dequantize(torch.float32)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Describe the tensor without its values."""
        return f"OnDemandWeight({list(self.shape)}, device={self.device})"


class LinearView(nn.Linear):
    """A frozen layer as PEFT knows linear layers."""

    def __init__(self, frozen: FrozenLinear) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate a weight
        self.in_features, self.out_features = frozen.in_features, frozen.out_features
        self.frozen = frozen
        self.train(frozen.training)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight ``[out, in]``, fp32."""
        return OnDemandWeight(self.frozen)

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The bias ``[out]``."""
        return self.frozen.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return what the frozen layer makes of ``x`` ``[..., in]``; some of PEFT's layers change it in place."""
        # of rows a product is a tensor of its own; of more dimensions, a view that autograd guards against that
        rows = cast(Tensor, self.frozen(x.reshape(-1, self.in_features)))
        return rows.view(*x.shape[:-1], self.out_features)


class _Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hf_device_map: dict[str, torch.device] = {}
        """PEFT asks the first parameter for the device unless it is told so, and there is none."""


def view_of(linears: Mapping[str, FrozenLinear]) -> nn.Module:
    """Return a module that holds nothing but views of ``linears``, each at the place that its dotted name says."""
    root = _Root()
    for name, frozen in linears.items():
        *path, leaf = name.split(".")
        place: nn.Module = root
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = cast(nn.Module, getattr(place, part))
        place.add_module(leaf, LinearView(frozen))
        root.hf_device_map[""] = _device_of(frozen)
    return root


def _device_of(layer: FrozenLinear) -> torch.device:
    return next((buffer.device for buffer in layer.buffers()), torch.device("cpu"))

"""LoRA on frozen linear layers of any storage."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lavintk.contracts import AffineUpdate
from lavintk.kernels import swiglu
from lavintk.layers import FrozenLinear, forward_with_update, has_hooks
from lavintk.targets import peft_targets, select_linears
from lavintk_lora.files import load_lora, save_lora
from lavintk_lora.fused import lora_gated, lora_product_onto, lora_products

if TYPE_CHECKING:
    from lavintk.models.multimodal import MultimodalModel
    from lavintk_lora import LoraOptions


class LoraLinear(nn.Module):
    """``y = base(x) + scale * B (A dropout(x))``; changes nothing at the start, since B = 0.

    A ``[r, in]`` and B ``[out, r]`` are fp32 master weights; the product runs in the type of ``x``.
    """

    def __init__(self, base: FrozenLinear, options: LoraOptions) -> None:
        super().__init__()
        self.base, self.scale, self.dropout = base, options.scale, options.dropout
        # drawn on the host, so that a seed gives the same start on every device
        down = torch.empty(options.r, base.in_features)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        device = next((buffer.device for buffer in base.buffers()), down.device)
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros(base.out_features, options.r, device=device))
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., out]`` in the type of ``x`` ``[..., in]``."""
        (output,) = self.forward_group([self], x)
        return output

    @classmethod
    def forward_group(cls, layers: Sequence[LoraLinear], x: Tensor) -> list[Tensor]:
        """Return what each layer makes of ``x``, with common products; see :func:`lavintk.layers.forward_group`.

        Each layer is computed for itself where its input differs, since dropout acts on it, and where hooks want to
        see its base.
        """
        if any(layer._needs_steps() for layer in layers):
            return [layer._forward_in_steps(x) for layer in layers]
        return lora_products(layers, x)

    def forward_onto(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return ``residual + self(x)``; see :func:`lavintk.layers.forward_onto`."""
        if self._needs_steps() or residual.dtype != x.dtype:
            return residual + self.forward(x)
        return lora_product_onto(self, x, residual)

    def forward_gated(self, up: LoraLinear, x: Tensor) -> Tensor:
        """Return ``silu(self(x)) * up(x)``; see :func:`lavintk.layers.forward_gated`."""
        if self._needs_steps() or up._needs_steps():
            return swiglu(*self.forward_group([self, up], x))
        return lora_gated(self, up, x)

    def _needs_steps(self) -> bool:
        return (self.dropout > 0 and self.training) or has_hooks(self.base)

    def _forward_in_steps(self, x: Tensor) -> Tensor:
        # scaling r values per token is cheaper than scaling out_features of them
        inner = self.scale * F.linear(F.dropout(x, self.dropout, self.training), self.down.to(x.dtype))
        update = F.linear(inner, self.up.to(x.dtype))
        return forward_with_update(self.base, x, update)

    def extra_repr(self) -> str:
        """Describe the layer in ``print(model)``."""
        return f"r={self.down.shape[0]}, scale={self.scale:g}, dropout={self.dropout:g}"


class LoraAdapter:
    """LoRA on the layers that ``options.targets`` selects."""

    conditions: tuple[str, ...] = ("all",)

    def __init__(self, options: LoraOptions) -> None:
        self.options = options
        self.layers: dict[str, LoraLinear] = {}
        """The wrapped layers by the name of the layer they wrap; empty until :meth:`attach`."""
        self._peft_targets: list[str] = []

    def attach(self, model: MultimodalModel) -> None:
        """Wrap the selected linear layers in place.

        :raises ModelError: a target fits no layer; the message lists the known names.
        """
        linears = model.linears()
        selected = select_linears(self.options.targets, linears, "lora")
        self._peft_targets = peft_targets(selected, linears)
        for name in selected:
            self.layers[name] = LoraLinear(linears[name], self.options)
            model.replace(name, self.layers[name])

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield A and B of each layer as ``<linear>.lora_A.weight`` and ``<linear>.lora_B.weight``."""
        for name, layer in self.layers.items():
            yield f"{name}.lora_A.weight", layer.down
            yield f"{name}.lora_B.weight", layer.up

    def side_tokens(self) -> None:
        """Return None: LoRA adds no tokens."""

    def save(self, folder: Path, base: str) -> None:
        """Write PEFT's ``adapter_config.json`` and ``adapter_model.safetensors``, fp32.

        Layers of the vision tower have no place there and go to ``vision_adapter.safetensors``.
        """
        save_lora(folder, dict(self.named_parameters()), self.options, self._peft_targets, base)

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` or PEFT wrote. Nothing is changed unless all of it fits.

        :raises CheckpointError: unreadable files, another rank or scale, features of PEFT that change the
            function, and missing, unexpected or misshapen tensors, all of them listed.
        """
        load_lora(folder, dict(self.named_parameters()), self.options)

    def affine_updates(self, prefix: str = "") -> Iterator[AffineUpdate]:
        """Yield A and scale * B of each layer; the same under every condition."""
        for name, layer in self.layers.items():
            if name.startswith(prefix):
                up = layer.scale * layer.up.detach().float()
                yield AffineUpdate(name, "all", layer.down.detach().float(), up)

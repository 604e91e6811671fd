"""What ``lowrank`` puts into a model, trains, saves and folds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lavintk.contracts import AffineUpdate
from lavintk.errors import ModelError
from lavintk.layers import FrozenLinear, forward_with_update
from lavintk.tensor_file import load_parameters

if TYPE_CHECKING:
    from lavintk.models.multimodal import MultimodalModel

PART = "language."
"""How the names of the layers begin that get an update."""
FILE = "lowrank.safetensors"


class LowrankLinear(nn.Module):
    """``y = base(x) + up @ (down @ x)``, with ``down`` ``[r, in]`` and ``up`` ``[out, r]`` in fp32.

    ``up`` is zero at the start, so that nothing changes until something is learnt.
    """

    def __init__(self, base: FrozenLinear, rank: int) -> None:
        super().__init__()
        self.base = base
        down = torch.empty(rank, base.in_features)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        device = next((buffer.device for buffer in base.buffers()), down.device)
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., out]`` in the type of ``x`` ``[..., in]``."""
        update = F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
        return forward_with_update(self.base, x, update)


class LowrankAdapter:
    """See :class:`lavintk.contracts.Adapter`.

    :param rank: of each update.
    """

    conditions: tuple[str, ...] = ("all",)

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.layers: dict[str, LowrankLinear] = {}

    def attach(self, model: MultimodalModel) -> None:
        """Wrap the linear layers of the language model in place.

        :raises ModelError: there are none.
        """
        for name, layer in model.linears().items():
            if name.startswith(PART):
                self.layers[name] = LowrankLinear(layer, self.rank)
                model.replace(name, self.layers[name])
        if not self.layers:
            raise ModelError(f"no linear layer of the model has a name that begins with {PART!r}")

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield both factors of each update."""
        for name, layer in self.layers.items():
            yield f"{name}.down", layer.down
            yield f"{name}.up", layer.up

    def side_tokens(self) -> None:
        """Return None: no tokens go beside those of the text."""

    def save(self, folder: Path, base: str) -> None:
        """Write the factors, fp32, and which model they belong to; the folder may have to be made."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in self.named_parameters()}
        save_file(tensors, folder / FILE, metadata={"base": base})

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote; nothing is changed unless all of it fits.

        :raises CheckpointError: the file cannot be read, or its tensors are not those of this adapter.
        """
        load_parameters(folder / FILE, dict(self.named_parameters()))

    def affine_updates(self, prefix: str = "") -> Iterator[AffineUpdate]:
        """Yield the update of each layer, from which exporters fold it into the weights."""
        for name, layer in self.layers.items():
            if name.startswith(prefix):
                yield AffineUpdate(name, "all", layer.down.detach(), layer.up.detach())

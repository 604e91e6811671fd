"""torchao's AdamW with quantized state, as a training loop expects an optimizer.

torchao compiles its step for each parameter, which needs a compiler on the machine, and keeps the learning rate as a
tensor, which it refuses to see replaced by a number. Here the step is run as it is written unless compiling is asked
for, and the learning rate stays a number outside of the step.

State of parameters below 4096 elements, or of no whole number of blocks, keeps 32 bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torchao.optim import AdamW4bit, AdamWFp8

from lavintk.errors import TrainingError


class AdamW:
    """AdamW whose two state values per parameter are stored in blocks of 128 (4 bits) or 256 (fp8) with one scale.

    Sources: Li et al., arXiv:2309.01507 (4 bits); torchao 0.18.

    :param state_bits: 4, or 8 for fp8 (E4M3).
    :param compiled: whether ``torch.compile`` makes a kernel of the step.
    """

    paged = False
    elementwise = True
    without_cuda = ""

    def __init__(self, state_bits: Literal[4, 8], compiled: bool = False) -> None:
        self.state_bits: int = state_bits
        self.compiled = compiled

    def build(
        self, groups: Sequence[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
    ) -> torch.optim.Optimizer:
        """Return the optimizer; see :class:`lavintk.contracts.Optimizer`.

        :raises TrainingError: parameters that are neither on a CPU nor on CUDA, or none at all.
        """
        devices = {parameter.device.type for group in groups for parameter in group["params"]}
        if not devices:
            raise TrainingError("there are no parameters to train: does the recipe name an adapter?")
        if not devices <= {"cpu", "cuda"}:
            found = " and ".join(sorted(devices))
            raise TrainingError(f"torchao's optimizers run on a CPU or with CUDA, not on {found}: use --optim adamw")
        kind: Any = FourBitAdamW if self.state_bits == 4 else Fp8AdamW
        optimizer: _PlainRate = kind([dict(group) for group in groups], lr=lr, betas=betas, eps=eps)
        optimizer.compiled = self.compiled
        return optimizer


class _PlainRate(torch.optim.Optimizer):
    """Lets torchao see the learning rate as a tensor during the step, and only then."""

    compiled = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the group, its learning rate a number."""
        rate = param_group.get("lr", self.defaults["lr"])
        super().add_param_group(param_group)
        self.param_groups[-1]["lr"] = rate

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step with the groups' present learning rates.

        :raises TrainingError: the step was to be compiled, and cannot be.
        """
        rates = [group["lr"] for group in self.param_groups]
        stance = contextlib.nullcontext() if self.compiled else torch.compiler.set_stance("force_eager")
        for group, rate in zip(self.param_groups, rates):
            group["lr"] = torch.tensor(rate, dtype=torch.float32)
        try:
            with stance:
                return super().step(closure)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise TrainingError(
                f"torch.compile could not make a kernel of torchao's step: {error}\n"
                "It needs a C++ compiler on a CPU, Triton and a C compiler on CUDA. Leave the option compile out: then "
                "the step runs as it is."
            ) from error
        finally:
            for group, rate in zip(self.param_groups, rates):
                group["lr"] = rate


class FourBitAdamW(_PlainRate, AdamW4bit):  # type: ignore[misc]
    """torchao's AdamW with 4-bit state."""


class Fp8AdamW(_PlainRate, AdamWFp8):  # type: ignore[misc]
    """torchao's AdamW with fp8 state."""

"""Flat parameters: optimizers that work element by element do the same on them as on the parameters themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lavintk.adamw import AdamW
from lavintk.contracts import Optimizer
from lavintk.flat import SMALL, flatten
from tests.test_bnb_optimizers import make_optimizer

SHAPES = ((96, 80), (7,), (64, 64), (3, 5), (4097,), (300, 13))
WHOLE_BLOCKS = ((96, 80), (7,), (64, 64), (3, 5))
"""AdEMAMix keeps 32-bit state for a parameter that is no multiple of 256, which a flat one always is."""


def parameters(shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(*shape, generator=generator)) for shape in shapes]


def train(optimizer: Optimizer, trained: list[nn.Parameter], flat: bool) -> None:
    groups = [{"params": trained[::2], "weight_decay": 0.1}, {"params": trained[1::2], "weight_decay": 0.0}]
    built = optimizer.build(flatten(groups) if flat else groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    for step in range(5):
        built.zero_grad(set_to_none=False)
        generator = torch.Generator().manual_seed(step)
        loss = sum((p * torch.randn(p.shape, generator=generator)).sum() + (p**2).sum() for p in trained)
        loss.backward()
        built.step()


@pytest.mark.parametrize("name", ["adamw", "paged", "8bit", "paged-8bit", "ademamix-8bit", "lion-8bit"])
def test_an_elementwise_optimizer_takes_the_same_steps_on_flat_parameters(name: str) -> None:
    optimizer: Optimizer = AdamW() if name == "adamw" else make_optimizer(name)
    assert optimizer.elementwise
    shapes = WHOLE_BLOCKS if "ademamix" in name else SHAPES
    alone, joined = parameters(shapes), parameters(shapes)
    train(optimizer, alone, flat=False)
    train(optimizer, joined, flat=True)
    for expected, found in zip(alone, joined, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_parameters_and_gradients_are_views_that_do_not_share_a_block_of_256() -> None:
    trained = parameters()
    (group,) = flatten([{"params": trained, "weight_decay": 0.5}])
    assert group["weight_decay"] == 0.5
    addresses = {flat.data_ptr(): flat for flat in group["params"]}
    big = max(addresses.values(), key=torch.Tensor.numel)
    for parameter in trained:
        assert parameter.grad is not None
        if parameter.numel() >= SMALL:
            offset = (parameter.data_ptr() - big.data_ptr()) // 4
            assert offset % 256 == 0
            assert parameter.grad.data_ptr() - big.grad.data_ptr() == 4 * offset  # type: ignore[union-attr]
    assert sorted(flat.numel() < SMALL for flat in group["params"]) == [False, True]


def test_small_parameters_stay_below_the_size_from_which_state_is_quantized() -> None:
    trained = [nn.Parameter(torch.randn(1000)) for _ in range(9)]
    (group,) = flatten([{"params": trained}])
    assert [flat.numel() for flat in group["params"]] == [4000, 4000, 1000]

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lavintk.dense import DenseQuantizer
from lavintk.layers import (
    DenseLinear,
    FrozenLinear,
    PackedWeight,
    forward_group,
    forward_onto,
    forward_with_update,
)
from lavintk_bnb.quantizers import FourBitQuantizer, Int8Quantizer
from lavintk_int4.quantizer import Int4Quantizer

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class HalvesLinear(FrozenLinear):
    """A quantizer's layer as small as can be: whole numbers of halves."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight.shape[0], weight.shape[1], bias)
        self.codes: Tensor
        self.register_buffer("codes", (weight * 2).round().to(torch.int8))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.codes.to(dtype) / 2

    def packed(self) -> PackedWeight:
        return PackedWeight("halves", (self.out_features, self.in_features), self.codes)


def make_halves(bias: bool = True) -> HalvesLinear:
    torch.manual_seed(0)
    return HalvesLinear(torch.randn(5, 7) * 3, torch.randn(5) if bias else None)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (0, 7)])
def test_frozen_layer_computes_what_linear_computes_with_its_weight(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    layer = make_halves()
    x = torch.randn(*shape).to(dtype)
    assert layer.bias is not None
    expected = F.linear(x, layer.dequantize(dtype), layer.bias.to(dtype))
    actual = layer(x)
    assert actual.dtype == dtype
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("bias", [True, False])
def test_gradient_of_a_frozen_layer_passes_gradcheck(bias: bool) -> None:
    layer = make_halves(bias).double()
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize("dense", [False, True])
def test_frozen_layer_keeps_no_tensor_for_the_backward_pass(dense: bool) -> None:
    halves, kept = make_halves(), []
    layer = DenseLinear(halves.dequantize(), halves.bias) if dense else halves
    x = torch.randn(3, 7, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t), lambda t: t):
        layer(x)
    assert kept == []


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (0, 7)])
def test_product_and_input_gradient_are_those_of_linear(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    layer = make_halves()
    weight, x = layer.dequantize(dtype), torch.randn(*shape).to(dtype)
    product = layer.product(x)
    assert torch.equal(product, layer(x))
    assert product.is_contiguous()
    gradient = torch.randn_like(product)
    assert torch.equal(layer.input_gradient(gradient), gradient @ weight)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    total = torch.randn_like(product)
    expected = total + product
    assert layer.product(x, total) is total
    torch.testing.assert_close(total, expected, rtol=tolerance, atol=10 * tolerance)
    total = torch.randn_like(x)
    expected = total + gradient @ weight
    assert layer.input_gradient(gradient, total) is total
    torch.testing.assert_close(total, expected, rtol=tolerance, atol=10 * tolerance)


def check_small_updates_are_seen(layer: FrozenLinear, dtype: torch.dtype) -> None:
    """Assert that updates below half the last digit of a product move it by their size on the whole."""
    x = torch.randn(400, layer.in_features, device=layer.dequantize().device).to(dtype)
    product = layer.product(x)
    update = 0.2 * torch.finfo(dtype).eps * product.abs() * torch.randn_like(product).sign()
    afterwards, before = product + update, layer.product(x, update.clone())

    def seen(updated: Tensor) -> float:
        moved, asked = updated.double() - product.double(), update.double()
        return float((moved * asked).sum() / asked.square().sum())

    assert seen(afterwards) < 0.3  # what rounding takes away where a product is updated after it
    assert seen(before) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quantizer", [None, FourBitQuantizer("nf4"), Int8Quantizer(), Int4Quantizer()])
def test_an_update_too_small_for_the_rounded_product_is_seen_by_one_that_begins_with_it(
    quantizer: Any, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 64)
    check_small_updates_are_seen(DenseLinear(weight) if quantizer is None else quantizer.quantize(weight, None), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quantizer", [None, FourBitQuantizer("nf4"), Int4Quantizer()])
def test_an_update_too_small_for_the_rounded_product_is_seen_on_a_gpu(quantizer: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(1024, 512, device="cuda")
    check_small_updates_are_seen(DenseLinear(weight) if quantizer is None else quantizer.quantize(weight, None), dtype)


def test_a_product_with_an_update_has_the_gradients_of_a_sum() -> None:
    layer = make_halves().double()
    x, update = torch.randn(2, 3, 7).double().requires_grad_(), torch.randn(2, 3, 5).double().requires_grad_()
    torch.testing.assert_close(forward_with_update(layer, x, update.clone()), update + layer(x))
    assert torch.autograd.gradcheck(lambda x, update: forward_with_update(layer, x, update.clone()), (x, update))
    layer.register_forward_hook(lambda layer, arguments, output: 2 * output)
    torch.testing.assert_close(forward_with_update(layer, x, update), update + layer(x))


def test_input_gradient_takes_a_gradient_that_is_not_contiguous() -> None:
    layer, total = make_halves(), torch.zeros(2, 3, 7)
    gradient = torch.randn(3, 2, 5).transpose(0, 1)
    torch.testing.assert_close(layer.input_gradient(gradient, total), gradient @ layer.dequantize())


class Paired(nn.Linear):
    """Notes which layers were computed together."""

    together: list[int] = []

    @classmethod
    def forward_group(cls, layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
        cls.together.append(len(layers))
        return [layer(x) for layer in layers]


def test_layers_of_one_class_that_offers_it_are_computed_together() -> None:
    Paired.together = []
    layers, x = [Paired(7, 5), Paired(7, 2), Paired(7, 5)], torch.randn(3, 7)
    expected = [layer(x) for layer in layers]
    assert all(map(torch.equal, forward_group(layers, x), expected))
    assert Paired.together == [3]


def test_layers_of_several_classes_or_with_hooks_are_called_one_by_one() -> None:
    Paired.together, called = [], []
    layers, x = [Paired(7, 5), Paired(7, 2)], torch.randn(3, 7)
    plain: list[nn.Module] = [make_halves(), make_halves()]
    for mixed in ([layers[0], plain[0]], [plain[0], layers[0]], plain):
        assert all(map(torch.equal, forward_group(mixed, x), [layer(x) for layer in mixed]))
    layers[1].register_forward_hook(lambda *_: called.append(1))
    forward_group(layers, x)
    assert (Paired.together, called) == ([], [1])


class Onto(nn.Linear):
    """Notes the residuals that it is given."""

    residuals: list[Tensor] = []

    def forward_onto(self, x: Tensor, residual: Tensor) -> Tensor:
        self.residuals.append(residual)
        return residual + self(x)


def test_a_layer_whose_class_offers_it_is_given_the_residual() -> None:
    Onto.residuals = []
    layer, x, residual = Onto(7, 5), torch.randn(3, 7), torch.randn(3, 5)
    assert torch.equal(forward_onto(layer, x, residual), residual + layer(x))
    assert [given is residual for given in Onto.residuals] == [True]


def test_other_layers_and_those_with_hooks_are_called_and_added_to_the_residual() -> None:
    Onto.residuals = []
    hooked, x, residual = Onto(7, 5), torch.randn(3, 7), torch.randn(3, 5, requires_grad=True)
    hooked.register_forward_hook(lambda layer, arguments, output: 2 * output)
    for layer in (hooked, nn.Linear(7, 5), make_halves()):
        before = residual.detach().clone()
        output = forward_onto(layer, x, residual)
        assert torch.equal(output, residual + layer(x))
        assert torch.equal(residual, before)
        assert torch.equal(torch.autograd.grad(output.sum(), residual)[0], torch.ones(3, 5))
    assert Onto.residuals == []


def test_frozen_layer_trains_nothing() -> None:
    layer = make_halves()
    assert list(layer.parameters()) == []
    assert not layer(torch.randn(3, 7)).requires_grad


def test_bits_per_weight_count_the_storage_but_not_the_bias() -> None:
    assert make_halves(bias=True).bits_per_weight() == 8
    assert DenseLinear(torch.zeros(5, 7), torch.zeros(5)).bits_per_weight() == 32
    assert DenseLinear(torch.zeros(5, 7, dtype=torch.bfloat16)).bits_per_weight() == 16


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias", [True, False])
def test_dense_layer_equals_torch_linear_with_its_gradient(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(7, 5, bias=bias, dtype=dtype)
    dense = DenseQuantizer().quantize(linear.weight, linear.bias)
    x = torch.randn(2, 3, 7).to(dtype).requires_grad_()
    other = x.detach().clone().requires_grad_()
    expected, actual = linear(x), dense(other)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (actual * weights).sum().backward()
    assert torch.equal(actual, expected)
    assert x.grad is not None
    assert other.grad is not None
    assert torch.equal(other.grad, x.grad)


def test_dense_layer_computes_in_the_type_of_x() -> None:
    weight, bias, x = torch.randn(5, 7), torch.randn(5), torch.randn(3, 7).bfloat16()
    expected = F.linear(x, weight.bfloat16(), bias.bfloat16())
    assert torch.equal(DenseLinear(weight, bias)(x), expected)


def test_dense_quantizer_shares_the_memory_and_freezes_it() -> None:
    linear = nn.Linear(7, 5)
    dense = DenseQuantizer().quantize(linear.weight, linear.bias)
    assert dense.weight.data_ptr() == linear.weight.data_ptr()
    assert not dense.weight.requires_grad
    assert list(dense.parameters()) == []
    packed = dense.packed()
    assert (packed.scheme, packed.shape, packed.scales) == ("dense", (5, 7), None)
    assert packed.codes.data_ptr() == linear.weight.data_ptr()


@pytest.mark.parametrize("dtype", FLOATS)
def test_empty_dense_layer_takes_a_saved_state_with_its_type(dtype: torch.dtype) -> None:
    source = DenseLinear(torch.randn(5, 7).to(dtype), torch.randn(5).to(dtype))
    for device in ("cpu", "meta"):
        target = DenseQuantizer().empty(5, 7, True, torch.device(device))
        target.load_state_dict(source.state_dict(), assign=True)
        assert target.bias is not None
        assert source.bias is not None
        assert target.weight.dtype == target.bias.dtype == dtype
        assert torch.equal(target.weight, source.weight)
        assert torch.equal(target.bias, source.bias)
    assert DenseQuantizer().empty(5, 7, False, torch.device("cpu")).bias is None


def test_copied_layer_is_independent() -> None:
    layer = DenseLinear(torch.ones(2, 2))
    duplicate = copy.deepcopy(layer)
    duplicate.weight.zero_()
    assert torch.equal(layer.weight, torch.ones(2, 2))


def test_printed_layer_shows_its_shape() -> None:
    assert "in_features=7, out_features=5, bias=True" in repr(make_halves())

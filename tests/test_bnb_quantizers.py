from __future__ import annotations

import copy
import io
import pickle
import re
import subprocess
import sys
from typing import Any

import bitsandbytes as bnb
import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch
from bitsandbytes import functional as bnb_functional
from torch import Tensor, nn
from torch.nn import functional as F

import lavintk_bnb
from lavintk.errors import ModelError, OptionsError
from lavintk.layers import FrozenLinear
from lavintk.registry import Choice, Registry
from lavintk_bnb.quantizers import FourBitLinear, FourBitQuantizer, Int8Linear, Int8Quantizer, Scheme

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SCHEMES: tuple[Scheme, ...] = ("nf4", "fp4")
Floats = npt.NDArray[np.float32]

NF4_NEGATIVE = [-1, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004]
NF4_POSITIVE = [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1]
NF4 = np.array([*NF4_NEGATIVE, 0, *NF4_POSITIVE], dtype=np.float32)
"""The values of QLoRA's appendix E."""
FP4 = np.array([0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4], dtype=np.float32)
CODEBOOKS = {"nf4": NF4, "fp4": np.concatenate([FP4, -FP4])}
FOUR_BIT = [FourBitQuantizer(scheme, 64, double) for scheme in SCHEMES for double in (True, False)]
ALL: list[Any] = [*FOUR_BIT, Int8Quantizer()]
NAMES = ["nf4", "nf4-plain", "fp4", "fp4-plain", "int8"]


def make_weight(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def quantize(quantizer: Any, *shape: int, bias: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    weight = make_weight(*shape, dtype=dtype)
    layer = quantizer.quantize(weight, make_weight(shape[0], seed=1) if bias else None)
    assert isinstance(layer, FrozenLinear)
    return layer


def unpack(codes: Tensor, count: int) -> npt.NDArray[np.uint8]:
    """First element in the high nibble."""
    as_bytes = codes.numpy().reshape(-1)
    return np.stack([as_bytes >> 4, as_bytes & 15], axis=1).reshape(-1)[:count]


def dynamic_code() -> Floats:
    """The 8-bit dynamic data type of arXiv:2110.02861: a sign, a decimal exponent, a linear fraction."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = np.linspace(0.1, 1, 2**exponent + 1)
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)
        values += [*means, *-means]
    return np.sort(np.array(values)).astype(np.float32)


@pytest.fixture
def registry() -> Registry[Any]:
    offered: Registry[Any] = Registry("quantizer")
    lavintk_bnb.lavintk_register_quantizers(offered.owned_by("bnb"))
    return offered


# --- 4 bits: codes, scales, values


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("block_size", [32, 64, 256, 4096])
@pytest.mark.parametrize("shape", [(64, 128), (96, 80), (5, 20)])
def test_storage_equals_that_of_bitsandbytes_bit_for_bit(
    dtype: torch.dtype, scheme: Scheme, block_size: int, shape: tuple[int, int]
) -> None:
    layer = quantize(FourBitQuantizer(scheme, block_size), *shape, dtype=dtype)
    codes, state = bnb_functional.quantize_4bit(
        make_weight(*shape, dtype=dtype), blocksize=block_size, compress_statistics=True, quant_type=scheme
    )
    assert torch.equal(layer.codes, codes.view(-1))
    assert torch.equal(layer.absmax, state.absmax)
    assert torch.equal(layer.nested_absmax, state.state2.absmax)
    assert torch.equal(layer.offset, state.offset)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_million_weights_of_every_size_get_the_codes_of_bitsandbytes(scheme: Scheme) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1024, 1024, generator=generator) * torch.rand(1024, 1, generator=generator) ** 4
    weight[3], weight[5, ::2], weight[7] = 0, 0, weight[7] * 1e-38
    weight[9] = torch.linspace(-1, 1, 1024)
    weight[11, :16] = torch.from_numpy(CODEBOOKS[scheme])
    weight[11, 16:31] = torch.from_numpy(np.sort(CODEBOOKS[scheme]))[:-1] / 2 + weight[11, 1:16] / 2
    codes, state = bnb_functional.quantize_4bit(weight, blocksize=64, quant_type=scheme)
    layer = FourBitQuantizer(scheme, 64, False).quantize(weight, None)
    assert torch.equal(layer.codes, codes.view(-1))
    assert torch.equal(layer.absmax, state.absmax)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(24, 64), (7, 36)])
def test_each_weight_gets_the_nearest_code_of_its_block(scheme: Scheme, shape: tuple[int, int]) -> None:
    layer = quantize(FourBitQuantizer(scheme, 64, double_quant=False), *shape)
    flat, codebook = make_weight(*shape).numpy().reshape(-1), CODEBOOKS[scheme]
    blocks = [flat[i : i + 64] for i in range(0, flat.size, 64)]
    scales = np.array([np.abs(block).max() for block in blocks])
    np.testing.assert_array_equal(layer.absmax.numpy(), scales)
    scaled = flat / np.repeat(scales, 64)[: flat.size]
    distance = np.abs(scaled[:, None] - codebook)
    chosen = distance[np.arange(flat.size), unpack(layer.codes, flat.size)]
    np.testing.assert_allclose(chosen, distance.min(axis=1), atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("block_size", [32, 64, 2048])
@pytest.mark.parametrize("shape", [(24, 64), (8, 48), (7, 36), (6, 5)])
def test_dequantized_weight_is_code_value_times_scale(scheme: Scheme, block_size: int, shape: tuple[int, int]) -> None:
    layer = quantize(FourBitQuantizer(scheme, block_size, double_quant=False), *shape)
    count = shape[0] * shape[1]
    values = CODEBOOKS[scheme][unpack(layer.codes, count)]
    scales = np.repeat(layer.absmax.numpy(), block_size)[:count]
    np.testing.assert_allclose(layer.dequantize().numpy().reshape(-1), values * scales, rtol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_dequantized_weight_equals_that_of_bitsandbytes(dtype: torch.dtype, scheme: Scheme, double_quant: bool) -> None:
    weight = make_weight(96, 128, dtype=dtype)
    layer = FourBitQuantizer(scheme, 64, double_quant).quantize(weight, None)
    codes, state = bnb_functional.quantize_4bit(weight, compress_statistics=double_quant, quant_type=scheme)
    assert torch.equal(layer.dequantize(dtype), bnb_functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_our_unpacking_equals_the_kernel_of_bitsandbytes(scheme: Scheme, dtype: torch.dtype) -> None:
    layer = quantize(FourBitQuantizer(scheme), 96, 128)
    assert torch.equal(layer._unpack().to(dtype), layer.dequantize(dtype))


def test_double_quantization_is_an_offset_and_8_bit_codes_in_blocks_of_256() -> None:
    layer = quantize(FourBitQuantizer("nf4"), 192, 128)
    plain = quantize(FourBitQuantizer("nf4", double_quant=False), 192, 128).absmax.numpy()
    code = dynamic_code()
    np.testing.assert_allclose(layer.offset.numpy(), plain.mean(), rtol=1e-6)
    centred = plain - layer.offset.numpy()
    peaks = np.array([np.abs(centred[i : i + 256]).max() for i in range(0, centred.size, 256)])
    np.testing.assert_array_equal(layer.nested_absmax.numpy(), peaks)
    scaled = centred / np.repeat(peaks, 256)[: centred.size]
    distance = np.abs(scaled[:, None] - code)
    chosen = distance[np.arange(centred.size), layer.absmax.numpy()]
    # bitsandbytes' search on a CPU takes a neighbour where both are about equally near
    np.testing.assert_allclose(chosen, distance.min(axis=1), rtol=0, atol=1e-4)
    restored = code[layer.absmax.numpy()] * np.repeat(peaks, 256)[: centred.size] + layer.offset.numpy()
    np.testing.assert_allclose(layer.packed().scales.numpy(), restored, rtol=1e-6)
    np.testing.assert_allclose(restored, plain, rtol=0.02)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(48, 64), (7, 36)])
def test_packed_storage_alone_gives_the_weight(scheme: Scheme, double_quant: bool, shape: tuple[int, int]) -> None:
    layer = quantize(FourBitQuantizer(scheme, 64, double_quant), *shape)
    packed, count = layer.packed(), shape[0] * shape[1]
    assert (packed.scheme, packed.shape, packed.block_size) == (scheme, shape, 64)
    assert packed.layout == "row-major, first element in the high nibble"
    assert packed.codes is layer.codes
    assert packed.scales.dtype == torch.float32
    np.testing.assert_allclose(packed.codebook.numpy(), CODEBOOKS[scheme], rtol=1e-6)
    values = packed.codebook.numpy()[unpack(packed.codes, count)]
    scales = np.repeat(packed.scales.numpy(), 64)[:count]
    np.testing.assert_array_equal(layer.dequantize().numpy().reshape(-1), values * scales)


def test_nf4_with_double_quantization_costs_little_more_than_4_bits() -> None:
    assert quantize(FourBitQuantizer("nf4"), 512, 512).bits_per_weight() == pytest.approx(4.127, abs=1e-3)
    plain = quantize(FourBitQuantizer("nf4", double_quant=False), 512, 512)
    assert plain.bits_per_weight() == pytest.approx(4.5)
    assert quantize(Int8Quantizer(), 512, 512).bits_per_weight() == pytest.approx(8 + 32 / 512)


# --- 8 bits


def test_int8_rows_are_rounded_multiples_of_their_maximum() -> None:
    layer = quantize(Int8Quantizer(), 24, 40)
    weight = make_weight(24, 40).half().float().numpy()
    peaks = np.abs(weight).max(axis=1)
    np.testing.assert_array_equal(layer.absmax.numpy(), peaks)
    exact = weight * (127 / peaks[:, None])
    assert np.abs(layer.codes.numpy() - exact).max() <= 0.5 + 1e-4
    assert np.abs(layer.codes.numpy()).max(axis=1).tolist() == [127] * 24
    packed = layer.packed()
    assert (packed.scheme, packed.shape, packed.block_size) == ("int8-row", (24, 40), 0)
    expected = packed.codes.numpy() * packed.scales.numpy()[:, None]
    np.testing.assert_array_equal(layer.dequantize().numpy(), expected)
    np.testing.assert_allclose(expected, weight, atol=float(peaks.max()) / 254 * 1.001)


@pytest.mark.parametrize("quantizer", ALL, ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("features", [128, 80])
def test_dequantized_weight_is_rounded_once(quantizer: Any, dtype: torch.dtype, features: int) -> None:
    layer = quantize(quantizer, 24, features)
    assert torch.equal(layer.dequantize(dtype), layer.dequantize().to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_product_on_a_cpu_equals_that_of_bitsandbytes_with_its_gradient(dtype: torch.dtype) -> None:
    layer = quantize(Int8Quantizer(), 24, 40, bias=False)
    state = bnb.MatmulLtState()  # type: ignore[attr-defined]
    state.CB, state.SCB, state.has_fp16_weights, state.is_training = layer.codes, layer.absmax, False, True
    x = torch.randn(5, 40).to(dtype).requires_grad_()
    other = x.detach().clone().requires_grad_()
    actual = layer(x)
    expected = bnb.matmul(other, layer.codes, state=state)  # type: ignore[attr-defined]
    assert torch.equal(actual, expected)
    actual.sum().backward()
    expected.sum().backward()
    assert x.grad is not None
    assert other.grad is not None
    assert torch.equal(x.grad, other.grad)


def test_a_row_of_zeros_stays_a_row_of_zeros() -> None:
    weight = make_weight(8, 64)
    weight[3] = 0
    for quantizer in ALL:
        dequantized = quantizer.quantize(weight, None).dequantize()
        assert torch.isfinite(dequantized).all()
        # with double quantization the scale of a block of zeros is not exactly zero, its codes are
        assert torch.equal(dequantized[3], torch.zeros(64))


# --- all of them: product, gradient, storage


@pytest.mark.parametrize("quantizer", ALL, ids=NAMES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(128,), (3, 128), (2, 3, 128), (0, 128)])
def test_product_and_gradient_are_those_of_the_dequantized_weight(
    quantizer: Any, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    layer = quantize(quantizer, 24, 128)
    weight = layer.dequantize(dtype)
    x = torch.randn(*shape).to(dtype).requires_grad_()
    other = x.detach().clone().requires_grad_()
    actual, expected = layer(x), F.linear(other, weight, layer.bias.to(dtype))
    assert actual.dtype == dtype
    assert torch.equal(actual, expected)
    gradient = torch.randn_like(actual)
    actual.backward(gradient)
    assert x.grad is not None
    assert torch.equal(x.grad, gradient @ weight)
    assert list(layer.parameters()) == []


@pytest.mark.parametrize("quantizer", ALL, ids=NAMES)
def test_quantized_product_is_near_the_exact_one(quantizer: Any) -> None:
    weight, x = make_weight(64, 256), torch.randn(10, 256)
    exact, actual = F.linear(x, weight), quantizer.quantize(weight, None)(x)
    limit = 0.01 if isinstance(quantizer, Int8Quantizer) else 0.15
    assert ((actual - exact).norm() / exact.norm()).item() < limit


@pytest.mark.parametrize("quantizer", ALL, ids=NAMES)
def test_nothing_is_kept_for_the_backward_pass(quantizer: Any) -> None:
    layer, kept = quantize(quantizer, 24, 128), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t), lambda t: t):
        layer(torch.randn(3, 128, requires_grad=True))
    assert kept == []


@pytest.mark.parametrize("quantizer", ALL, ids=NAMES)
@pytest.mark.parametrize("cast", ["to", "half", "bfloat16", "double", "parent"])
def test_casting_the_module_leaves_codes_and_scales_alone(quantizer: Any, cast: str) -> None:
    layer = quantize(quantizer, 24, 128)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    if cast == "to":
        layer.to(device="cpu", dtype=torch.bfloat16)
    elif cast == "parent":
        nn.Sequential(nn.Linear(2, 2), layer).half()
    else:
        getattr(layer, cast)()
    after = dict(layer.named_buffers())
    assert after.pop("bias").dtype not in (before.pop("bias").dtype,)
    assert {name: buffer.dtype for name, buffer in after.items()} == {n: b.dtype for n, b in before.items()}
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("quantizer", ALL, ids=NAMES)
@pytest.mark.parametrize("assign", [True, False])
def test_saved_state_comes_back_bit_for_bit(quantizer: Any, assign: bool) -> None:
    layer = quantize(quantizer, 24, 128)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    from_safetensors = safetensors.torch.load(safetensors.torch.save(layer.state_dict()))
    for state in (loaded, from_safetensors):
        target = quantizer.empty(24, 128, True, torch.device("meta" if assign else "cpu"))
        target.load_state_dict(state, assign=assign)
        assert target.state_dict().keys() == layer.state_dict().keys()
        for name, expected in layer.state_dict().items():
            assert target.state_dict()[name].dtype == expected.dtype
            assert torch.equal(target.state_dict()[name], expected)
        assert torch.equal(target.dequantize(), layer.dequantize())


@pytest.mark.parametrize("quantizer", ALL, ids=NAMES)
@pytest.mark.parametrize("assign", [True, False])
def test_a_layer_in_use_computes_with_what_is_loaded_into_it(quantizer: Any, assign: bool) -> None:
    layer, other = quantize(quantizer, 24, 128), quantizer.quantize(make_weight(24, 128, seed=7), None)
    layer = quantizer.quantize(make_weight(24, 128), None)
    layer(torch.randn(2, 128))
    layer.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(layer.dequantize(), other.dequantize())


@pytest.mark.parametrize("quantizer", ALL, ids=NAMES)
def test_copies_are_equal_and_independent(quantizer: Any) -> None:
    layer = quantize(quantizer, 24, 128)
    before = layer.dequantize()
    for duplicate in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(duplicate.dequantize(), before)
        duplicate.codes.zero_()
        assert not torch.equal(duplicate.dequantize(), before)
    assert torch.equal(layer.dequantize(), before)


@pytest.mark.parametrize("quantizer", ALL, ids=NAMES)
def test_weight_is_neither_changed_nor_kept(quantizer: Any) -> None:
    weight = nn.Parameter(make_weight(24, 128))
    layer = quantizer.quantize(weight, None)
    assert torch.equal(weight, make_weight(24, 128))
    storages = {buffer.untyped_storage().data_ptr() for buffer in layer.buffers()}
    assert weight.untyped_storage().data_ptr() not in storages
    assert not any(buffer.requires_grad for buffer in layer.buffers())


@pytest.mark.parametrize("quantizer", ALL, ids=NAMES)
def test_a_weight_that_is_not_contiguous_is_quantized_by_its_values(quantizer: Any) -> None:
    weight = make_weight(128, 24).t()
    expected = quantizer.quantize(weight.contiguous(), None)
    assert torch.equal(quantizer.quantize(weight, None).dequantize(), expected.dequantize())


@pytest.mark.parametrize("quantizer", ALL, ids=NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_weight_that_is_not_finite_is_refused(quantizer: Any, bad: float, dtype: torch.dtype) -> None:
    weight = make_weight(24, 128, dtype=dtype)
    weight[3, 5] = weight[4, 5] = bad
    with pytest.raises(ModelError, match="2 of its 3072 elements are NaN or infinite"):
        quantizer.quantize(weight, None)


@pytest.mark.parametrize("quantizer", ALL, ids=NAMES)
def test_all_faults_of_a_weight_are_named_together(quantizer: Any) -> None:
    with pytest.raises(ModelError) as caught:
        quantizer.quantize(torch.zeros(2, 3, 4, dtype=torch.float64, device="meta"), torch.zeros(5))
    for part in ("shape is [2, 3, 4]", "torch.float64", "on meta", "bias has shape [5], [2] is needed"):
        assert part in str(caught.value)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_odd_number_of_weights_is_refused_with_a_way_out(scheme: Scheme) -> None:
    with pytest.raises(ModelError, match=re.escape("[3, 7] is an odd number of elements")):
        FourBitQuantizer(scheme).quantize(make_weight(3, 7), None)


def test_int8_refuses_what_fp16_cannot_hold() -> None:
    with pytest.raises(ModelError, match="beyond 65504"):
        Int8Quantizer().quantize(torch.full((2, 4), 1e5), None)


# --- registration


def test_quantizers_are_offered_with_their_options(registry: Registry[Any]) -> None:
    assert registry.names() == ["fp4", "int8", "nf4"]
    assert [option.name for option in registry["nf4"].declared_options()] == ["block_size", "double_quant"]
    plain = registry.create(Choice.parse("nf4:double_quant=false,block_size=128"))
    layer = plain.quantize(make_weight(8, 128), None)
    assert isinstance(layer, FourBitLinear)
    assert (layer.scheme, layer.block_size, layer.offset) == ("nf4", 128, None)
    assert "double_quant=False" in repr(layer)
    assert registry.create(Choice("fp4")).quantize(make_weight(8, 128), None).scheme == "fp4"
    layer = registry.create(Choice.parse("int8:threshold=0")).quantize(make_weight(8, 128), None)
    assert isinstance(layer, Int8Linear)
    assert layer.threshold == 0


def test_wrong_options_are_refused(registry: Registry[Any]) -> None:
    with pytest.raises(OptionsError, match=r"must be one of 32, 64, .* 4096, got 48"):
        registry.create(Choice.parse("nf4:block_size=48"))
    with pytest.raises(OptionsError, match="'threshold' must be 0 or more"):
        registry.create(Choice.parse("int8:threshold=-1"))


def test_layers_say_whether_a_cuda_graph_may_hold_them() -> None:
    assert quantize(FourBitQuantizer(), 8, 64).graph_safe
    assert quantize(Int8Quantizer(0), 8, 64).graph_safe
    assert not quantize(Int8Quantizer(), 8, 64).graph_safe


def test_importing_the_plugin_imports_neither_torch_nor_bitsandbytes() -> None:
    code = "import sys, lavintk_bnb; print(sorted({'torch', 'bitsandbytes'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# --- with a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("quantizer", ALL, ids=NAMES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(96, 128), (96, 80), (7, 36)])
def test_moved_to_cuda_the_weight_is_the_same(quantizer: Any, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    layer = quantize(quantizer, *shape)
    expected = layer.dequantize(dtype)
    layer.to("cuda", torch.bfloat16)
    assert all(buffer.is_cuda for buffer in layer.buffers())
    assert torch.equal(layer.dequantize(dtype).cpu(), expected)
    assert torch.equal(layer.cpu().dequantize(dtype), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_on_cuda_the_weight_is_nearly_that_of_a_cpu(scheme: Scheme) -> None:
    quantizer, weight = FourBitQuantizer(scheme), make_weight(512, 512)
    on_cpu, on_cuda = quantizer.quantize(weight, None), quantizer.quantize(weight.cuda(), None)
    assert on_cuda.codes.is_cuda
    if scheme == "nf4":  # FP4 has two codes for 0
        assert (on_cpu.codes != on_cuda.codes.cpu()).float().mean().item() < 1e-3
    assert (on_cpu.dequantize() - on_cuda.dequantize().cpu()).abs().mean().item() < 1e-4
    codes, state = bnb_functional.quantize_4bit(weight.cuda(), compress_statistics=True, quant_type=scheme)
    assert torch.equal(on_cuda.dequantize(), bnb_functional.dequantize_4bit(codes, state))


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4, 16, 640])
@pytest.mark.parametrize("features", [512, 80])
def test_four_bit_product_on_cuda_is_that_of_the_dequantized_weight(
    scheme: Scheme, dtype: torch.dtype, rows: int, features: int
) -> None:
    layer = quantize(FourBitQuantizer(scheme), 256, features).cuda()
    x = torch.randn(rows, features, device="cuda", dtype=dtype, requires_grad=True)
    weight = layer.dequantize(dtype)
    expected = F.linear(x.float(), weight.float(), layer.bias.float())
    with torch.no_grad():
        torch.testing.assert_close(layer(x).float(), expected, rtol=2e-2, atol=5e-3)
    product = layer(x)
    torch.testing.assert_close(product.float(), expected, rtol=2e-2, atol=5e-3)
    gradient = torch.randn_like(product)
    product.backward(gradient)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, gradient @ weight)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_int8_product_on_cuda_is_llm_int8(dtype: torch.dtype, threshold: float) -> None:
    layer = quantize(Int8Quantizer(threshold), 256, 512).cuda()
    x = torch.randn(64, 512, device="cuda", dtype=dtype)
    x[:, 7] *= 20  # an outlier column
    x.requires_grad_()
    exact = F.linear(x.float(), layer.dequantize(), layer.bias.float())
    product = layer(x)
    error = ((product.float() - exact).norm() / exact.norm()).item()
    assert product.dtype == dtype
    assert error < (0.02 if threshold else 0.1)
    gradient = torch.randn_like(product)
    product.backward(gradient)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, gradient @ layer.dequantize(dtype))
    state = bnb.MatmulLtState()  # type: ignore[attr-defined]
    state.CB, state.SCB, state.has_fp16_weights = layer.codes, layer.absmax, False
    reference = bnb.matmul(  # type: ignore[attr-defined]
        x.detach(), layer.codes, bias=layer.bias.to(dtype), state=state, threshold=threshold
    )
    assert torch.equal(product, reference)


@pytest.mark.gpu
@pytest.mark.parametrize("quantizer", [*FOUR_BIT, Int8Quantizer(0)], ids=NAMES)
# The layer is warmed up on a side stream, as a capture needs it, so the leaf's node belongs to that stream. Torch
# warns; as an error, in the middle of a capture, that would break every test that follows.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
def test_a_cuda_graph_replays_forward_and_backward(quantizer: Any) -> None:
    layer = quantize(quantizer, 256, 512).cuda()
    x = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):  # tables and library handles are made before the capture
        torch.autograd.grad(layer(x).sum(), x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        product = layer(x)
        (gradient,) = torch.autograd.grad(product.sum(), x)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    leaf = x.detach().requires_grad_()  # x itself belongs to the stream it was warmed up on
    expected = layer(leaf)
    torch.testing.assert_close(product, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), leaf)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("quantizer", [*FOUR_BIT, Int8Quantizer(0)], ids=NAMES)
@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # torch says that it may overlook some waits
def test_the_host_never_waits_for_the_device(quantizer: Any, rows: int) -> None:
    layer = quantize(quantizer, 256, 512).cuda()
    x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step() -> None:
        layer(x).sum().backward()
        with torch.no_grad():
            layer(x)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")

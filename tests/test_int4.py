from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lavintk
import lavintk_int4
import lavintk_int4.quantizer
from lavintk.contracts import CalibratedQuantizer
from lavintk.dense import DenseQuantizer
from lavintk.errors import ModelError, OptionsError
from lavintk.layers import FrozenLinear
from lavintk.registry import Choice, Registry
from lavintk.testing.runs import multimodal, recipe, write_everything
from lavintk.threads import each
from lavintk_int4.quantizer import Int4Linear, Int4Quantizer
from lavintk_int4.search import Search, quantize_blocks

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SEARCHES: tuple[Search, ...] = ("balanced", "mse", "hqq", "none")
SHAPES = [(24, 128), (7, 96), (5, 40), (3, 7), (1, 1)]
"""Whole blocks; an odd number of them; a last block that is not full; fewer weights than a block."""
Floats = npt.NDArray[np.float32]


def make_weight(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def quantize(*shape: int, search: Search = "balanced", block_size: int = 32, bias: bool = True) -> Int4Linear:
    offset = make_weight(shape[0], seed=1) if bias else None
    return Int4Quantizer(block_size, search).quantize(make_weight(*shape), offset)


def nibbles(packed: Tensor) -> npt.NDArray[np.float32]:
    """Unpack the last dimension, low nibble first."""
    as_bytes = packed.numpy()
    return np.stack([as_bytes & 15, as_bytes >> 4], axis=-1).reshape(*as_bytes.shape[:-1], -1).astype(np.float32)


def by_formula(layer: Int4Linear) -> Floats:
    """``(q - zp) * scale`` in numpy, from what exporters are given."""
    packed = layer.packed()
    assert packed.scales is not None
    assert packed.zero_points is not None
    codes, scales = nibbles(packed.codes), packed.scales.numpy()
    zeros = nibbles(packed.zero_points)[:, : scales.shape[1]]
    weight: Floats = (codes - zeros[..., None]) * scales[..., None]
    return weight.reshape(weight.shape[0], -1)[:, : packed.shape[1]]


def plain_rounding(weight: Floats, block_size: int) -> Floats:
    """Asymmetric round-to-nearest, block by block."""
    result = np.empty_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], block_size):
            block = weight[row, start : start + block_size]
            low, high = min(block.min(), 0), max(block.max(), 0)
            scale = (high - low) / 15 or 1.0
            zero = np.round(-low / scale)
            result[row, start : start + block_size] = (np.clip(np.round(block / scale) + zero, 0, 15) - zero) * scale
    return result


# --- layout and values


@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_storage_has_the_shapes_of_matmulnbits(shape: tuple[int, int], block_size: int) -> None:
    layer, blocks = quantize(*shape, block_size=block_size), -(-shape[1] // block_size)
    packed = layer.packed()
    assert (packed.scheme, packed.shape, packed.block_size) == ("int4-block", shape, block_size)
    assert layer.codes.shape == (shape[0], blocks, block_size // 2)
    assert layer.scales.shape == (shape[0], blocks)
    assert layer.zero_points.shape == (shape[0], -(-blocks // 2))
    assert (layer.codes.dtype, layer.scales.dtype, layer.zero_points.dtype) == (torch.uint8, torch.float32, torch.uint8)
    assert packed.codes is layer.codes
    assert packed.scales is layer.scales
    assert packed.zero_points is layer.zero_points
    assert all(buffer.is_contiguous() for buffer in layer.buffers())


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantized_weight_is_code_minus_zero_point_times_scale(
    shape: tuple[int, int], block_size: int, search: Search
) -> None:
    layer = quantize(*shape, block_size=block_size, search=search)
    np.testing.assert_array_equal(layer.dequantize().numpy(), by_formula(layer))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_both_ways_to_unpack_give_the_same_bits(shape: tuple[int, int], dtype: torch.dtype) -> None:
    layer = quantize(*shape)
    by_shifts = layer._unpack_by_shifts(dtype).view(shape[0], -1)[:, : shape[1]]
    assert torch.equal(layer.dequantize(dtype), by_shifts)
    assert torch.equal(layer.dequantize(dtype), layer.dequantize().to(dtype))


@pytest.mark.parametrize("shape", [(1, 40), (2, 96)])
def test_weights_beyond_the_row_are_zero(shape: tuple[int, int]) -> None:
    layer = quantize(*shape)
    zeros = nibbles(layer.zero_points)[:, : layer.scales.shape[1], None]
    beyond = (nibbles(layer.codes) - zeros).reshape(shape[0], -1)[:, shape[1] :]
    assert not beyond.any()


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("shape", SHAPES)
def test_without_search_the_grid_is_that_of_plain_rounding(shape: tuple[int, int], block_size: int) -> None:
    layer = quantize(*shape, search="none", block_size=block_size)
    weight = make_weight(*shape).numpy()
    expected = plain_rounding(weight, block_size)
    # a weight in the middle between two codes may go to either of them: its error is the same
    np.testing.assert_allclose(np.abs(by_formula(layer) - weight), np.abs(expected - weight), atol=1e-7)


def test_plain_rounding_is_off_by_at_most_one_step_and_half_of_it_within_the_range() -> None:
    weight, layer = make_weight(64, 256), quantize(64, 256, search="none")
    error = (layer.dequantize() - weight).abs().view(64, -1, 32)
    step = layer.scales.unsqueeze(-1)
    assert bool((error <= step * 1.0001).all())
    assert float((error <= step * 0.5001).float().mean()) > 0.97


@pytest.mark.parametrize("search", SEARCHES)
def test_a_weight_on_the_grid_comes_back(search: Search) -> None:
    codes = torch.randint(0, 16, (8, 2, 32), generator=torch.Generator().manual_seed(0)).float()
    codes[..., 0], codes[..., 1] = 0, 15
    weight = ((codes - 6) * 0.0125).view(8, 64)
    layer = Int4Quantizer(32, search).quantize(weight, None)
    torch.testing.assert_close(layer.dequantize(), weight, rtol=1e-5, atol=1e-7)
    assert torch.equal(Int4Quantizer(32, search).quantize(layer.dequantize(), None).codes, layer.codes)


# --- search


def heavy_tailed(seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.distributions.StudentT(5.0).sample((256, 32)) * 0.02


def errors(columns: Tensor, search: Search, norm: float) -> Tensor:
    codes, scales, zeros = quantize_blocks(columns, search)
    return ((codes.float() - zeros.float()) * scales - columns).abs().pow(norm).sum(0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("search", "norm"), [("mse", 2.0), ("hqq", 0.7)])
def test_search_is_never_worse_than_plain_rounding_in_any_block(search: Search, norm: float, seed: int) -> None:
    columns = heavy_tailed(seed).t().contiguous()
    plain, found = errors(columns, "none", norm), errors(columns, search, norm)
    assert bool((found <= plain * 1.0001).all())
    assert float(found.sum()) < float(plain.sum()) * (0.95 if search == "mse" else 0.99)


def test_balanced_search_is_never_worse_where_columns_count_by_the_inverse_cube_of_their_norm() -> None:
    weight = make_weight(64, 64) * torch.linspace(0.2, 3, 64)
    norms = weight.norm(dim=0)
    importance = (norms / norms.mean()).clamp(0.1, 10) ** -3

    def weighted(search: Search) -> Tensor:
        error = Int4Quantizer(32, search).quantize(weight, None).dequantize() - weight
        loss: Tensor = (error.square() * importance).view(64, 2, 32).sum(-1)
        return loss

    assert bool((weighted("balanced") <= weighted("none") * 1.0001).all())
    assert float(weighted("balanced").sum()) < 0.9 * float(weighted("mse").sum())


def test_balanced_search_of_columns_of_one_norm_is_that_of_mse() -> None:
    signs = torch.randint(0, 2, (48, 32), generator=torch.Generator().manual_seed(0)) * 2 - 1
    weight = torch.roll(make_weight(48, 1).expand(48, 32), 1, 0) * signs
    found = [Int4Quantizer(32, search).quantize(weight, None).dequantize() for search in SEARCHES[:2]]
    torch.testing.assert_close(found[0], found[1])


def test_mse_comes_near_the_best_of_every_scale_and_zero_point() -> None:
    columns = heavy_tailed(7)[:24].t().contiguous()
    step = (columns.amax(0) - columns.amin(0)) / 15
    best = torch.full((24,), torch.inf)
    for factor in np.arange(0.4, 1.4, 0.002):
        scale = step * factor
        for zero in range(16):
            rounded = (columns / scale).round().clamp(-zero, 15 - zero) * scale
            best = torch.minimum(best, (rounded - columns).square().sum(0))
    found, plain = errors(columns, "mse", 2), errors(columns, "none", 2)
    assert float(found.sum()) <= float(best.sum()) * 1.02
    assert float(found.sum()) < float(plain.sum()) * 0.95


@pytest.mark.parametrize("search", SEARCHES)
def test_blocks_of_zeros_of_one_sign_and_of_any_size_are_finite_and_near(search: Search) -> None:
    weight = make_weight(6, 64)
    weight[0] = 0
    weight[1] = weight[1].abs() + 0.01
    weight[2] = -weight[2].abs()
    weight[3] *= 1e-36
    weight[4] *= 1e37
    weight[5, :32] = 0.02
    result = Int4Quantizer(32, search).quantize(weight, None).dequantize()
    assert torch.isfinite(result).all()
    assert torch.equal(result[0], torch.zeros(64))
    for row in (1, 2, 4, 5):
        assert float((result[row] - weight[row]).div(weight[row].abs().max()).norm()) < 0.5
    torch.testing.assert_close(result[5, :32], weight[5, :32])


def test_four_bits_cost_little_more() -> None:
    assert quantize(64, 512).bits_per_weight() == pytest.approx(4 + 32 / 32 + 4 / 32)
    assert quantize(64, 512, block_size=128).bits_per_weight() == pytest.approx(4 + 32 / 128 + 4 / 128)


# --- calibration: rounding that knows the inputs


def make_inputs(features: int, rows: int = 400, seed: int = 5) -> Tensor:
    """Return inputs ``[rows, features]`` of different sizes that depend on one another, as those of a layer do."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, features, generator=generator) @ torch.randn(features, features, generator=generator)
    inputs: Tensor = mixed * torch.rand(features, generator=generator) / features**0.5
    return inputs


def calibrated(weight: Tensor, x: Tensor, search: Search = "balanced", block_size: int = 32) -> Int4Linear:
    return Int4Quantizer(block_size, search).quantize_calibrated(weight, None, x.t() @ x)


def output_errors(layer: Int4Linear, weight: Tensor, x: Tensor) -> Tensor:
    """``|X (w - q)|`` of each output, in fp64."""
    difference = x.double() @ (layer.dequantize() - weight).double().t()
    errors: Tensor = torch.linalg.vector_norm(difference, dim=0)
    return errors


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("shape", [(24, 128), (7, 96), (5, 40), (3, 7)])
def test_calibration_never_makes_an_output_worse_and_most_of_them_better(
    shape: tuple[int, int], block_size: int, search: Search
) -> None:
    weight, x = make_weight(*shape), make_inputs(shape[1])
    plain = output_errors(Int4Quantizer(block_size, search).quantize(weight, None), weight, x)
    found = output_errors(calibrated(weight, x, search, block_size), weight, x)
    assert bool((found <= plain * 1.0001).all())
    if shape[0] * shape[1] > 500:
        assert float(found.norm()) < 0.85 * float(plain.norm())


def by_the_slow_way(weight: Tensor, x: Tensor, search: Search, block_size: int) -> Floats:
    """Round one weight after the other; after each, set the rest of the row to the least-squares optimum.

    The row's remaining weights r minimise ``d' H d`` of the whole row's change d given the weights rounded so far: by
    the normal equations, ``r = w_r - inverse(H_rr) H_rf (q_f - w_f)``, with f the inputs that are fixed. No Cholesky
    factor and no running update, unlike GPTQ; the same result (Frantar and Alistarh, "Optimal Brain Compression").
    """
    moment = (x.t() @ x).double().numpy()
    moment = moment + 0.01 * np.diagonal(moment).mean() * np.eye(len(moment))
    importance = torch.from_numpy(np.diagonal(moment).copy()).float()
    result = weight.double().numpy().copy()
    for row, original in zip(result, weight.double().numpy()):
        for i in range(len(row)):
            if i % block_size == 0:
                block = torch.from_numpy(row[i : i + block_size, None]).float()
                _, scale, zero = quantize_blocks(block, search, importance[i : i + block_size, None])
                step, lowest = float(scale), -float(zero)
            row[i] = np.clip(np.round(row[i] / step), lowest, 15 + lowest) * step
            rest, fixed = slice(i + 1, None), slice(0, i + 1)
            made_good = np.linalg.solve(moment[rest, rest], moment[rest, fixed] @ (row[fixed] - original[fixed]))
            row[rest] = original[rest] - made_good
    return result.astype(np.float32)


@pytest.mark.parametrize("search", SEARCHES)
def test_error_feedback_is_that_of_solving_for_the_rest_of_the_row_after_each_weight(search: Search) -> None:
    weight, x = make_weight(6, 64), make_inputs(64)
    expected = by_the_slow_way(weight, x, search, 16)
    plain = Int4Quantizer(16, search).quantize(weight, None)
    found = calibrated(weight, x, search, 16)
    slow_errors = (x.double() @ (torch.from_numpy(expected) - weight).double().t()).norm(dim=0)
    helped = slow_errors < output_errors(plain, weight, x)
    assert int(helped.sum()) >= 5
    np.testing.assert_allclose(found.dequantize()[helped].numpy(), expected[helped.numpy()], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("search", "same_as"), [("balanced", "mse"), ("mse", "mse"), ("hqq", "hqq"), ("none", "none")])
@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_that_do_not_depend_on_each_other_and_are_of_one_size_leave_the_plain_search(
    shape: tuple[int, int], search: Search, same_as: Search
) -> None:
    weight = make_weight(*shape)
    found = Int4Quantizer(32, search).quantize_calibrated(weight, None, 3 * torch.eye(shape[1])).dequantize()
    expected = Int4Quantizer(32, same_as).quantize(weight, None).dequantize()
    # a weight in the middle between two codes may go to either of them: its error is the same
    torch.testing.assert_close((found - weight).abs(), (expected - weight).abs(), rtol=1e-4, atol=1e-7)


def test_inputs_that_are_always_zero_or_equal_do_not_disturb() -> None:
    weight, x = make_weight(8, 64), make_inputs(64)
    x[:, 3], x[:, 40:] = 0, x[:, 10:11]
    found = calibrated(weight, x)
    assert torch.isfinite(found.dequantize()).all()
    plain = Int4Quantizer().quantize(weight, None)
    assert float(output_errors(found, weight, x).norm()) < 0.9 * float(output_errors(plain, weight, x).norm())
    assert torch.equal(calibrated(weight, torch.zeros(5, 64)).dequantize(), plain.dequantize())


def test_calibration_keeps_the_bias_and_changes_neither_weight_nor_moment() -> None:
    weight, x, bias = make_weight(8, 64), make_inputs(64), make_weight(8, seed=1, dtype=torch.bfloat16)
    moment = x.t() @ x
    before = weight.clone(), moment.clone()
    layer = Int4Quantizer().quantize_calibrated(weight, bias, moment)
    assert layer.bias is not None
    assert torch.equal(layer.bias, bias)
    assert torch.equal(weight, before[0])
    assert torch.equal(moment, before[1])
    assert isinstance(Int4Quantizer(), CalibratedQuantizer)
    assert not isinstance(DenseQuantizer(), CalibratedQuantizer)


@pytest.mark.parametrize(
    ("moment", "said"),
    [
        (torch.eye(63), r"has shape \[63, 63\], the layer needs \[64, 64\]"),
        (torch.full((64, 64), torch.nan), "holds NaN or infinity"),
        (-torch.eye(64), "has a negative diagonal"),
    ],
    ids=["shape", "not a number", "negative"],
)
def test_a_moment_that_is_none_is_refused(moment: Tensor, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        Int4Quantizer().quantize_calibrated(make_weight(8, 64), None, moment)


# --- ONNX Runtime


def run_matmulnbits(layer: Int4Linear, x: Tensor, accuracy_level: int) -> Tensor:
    """Compute ``x @ W.T + b`` by ONNX Runtime, from the tensors that exporters are given."""
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    packed = layer.packed()
    given = {"B": packed.codes, "scales": packed.scales, "zero_points": packed.zero_points, "bias": layer.bias}
    present = {name: tensor.numpy() for name, tensor in given.items() if tensor is not None}
    inputs = ["A", "B", "scales", "zero_points", *(["", "bias"] if "bias" in present else [])]
    node = onnx.helper.make_node(
        "MatMulNBits", inputs, ["Y"], domain="com.microsoft", K=packed.shape[1], N=packed.shape[0],
        bits=4, block_size=packed.block_size, accuracy_level=accuracy_level,
    )  # fmt: skip
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", size])
        for name, size in (("A", packed.shape[1]), ("Y", packed.shape[0]))
    ]
    stored = [onnx.numpy_helper.from_array(array, name) for name, array in present.items()]
    graph = onnx.helper.make_graph([node], "product", ends[:1], ends[1:], stored)
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"A": x.numpy()})[0])


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("shape", [(96, 256), (33, 96), (40, 200), (5, 24)])
def test_onnx_runtime_computes_our_product_from_our_storage(
    shape: tuple[int, int], block_size: int, bias: bool, rows: int
) -> None:
    layer, x = quantize(*shape, block_size=block_size, bias=bias), make_weight(rows, shape[1], seed=3) * 50
    torch.testing.assert_close(run_matmulnbits(layer, x, accuracy_level=1), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("shape", [(96, 256), (33, 96), (40, 200)])
def test_the_fast_kernel_that_rounds_activations_is_within_one_percent_of_the_largest_result(
    shape: tuple[int, int], rows: int
) -> None:
    layer, x = quantize(*shape), make_weight(rows, shape[1], seed=3) * 50
    expected = layer(x)
    difference = (run_matmulnbits(layer, x, accuracy_level=4) - expected).abs().max()
    assert float(difference) <= 0.01 * float(expected.abs().max())


# --- product, gradient, storage


@pytest.mark.parametrize("features", [128, 40])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,)])
def test_product_and_gradient_are_those_of_the_dequantized_weight(
    features: int, dtype: torch.dtype, leading: tuple[int, ...]
) -> None:
    layer = quantize(24, features)
    weight = layer.dequantize(dtype)
    assert layer.bias is not None
    x = torch.randn(*leading, features).to(dtype).requires_grad_()
    actual = layer(x)
    assert torch.equal(actual, F.linear(x, weight, layer.bias.to(dtype)))
    gradient = torch.randn_like(actual)
    actual.backward(gradient)
    assert x.grad is not None
    assert torch.equal(x.grad, gradient @ weight)
    assert list(layer.parameters()) == []


def test_nothing_is_kept_for_the_backward_pass() -> None:
    layer, kept = quantize(24, 128), list[Tensor]()

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(3, 128, requires_grad=True))
    assert kept == []
    assert layer.graph_safe


@pytest.mark.parametrize("cast", ["to", "half", "bfloat16", "double", "parent"])
def test_casting_the_module_leaves_codes_and_scales_alone(cast: str) -> None:
    layer = quantize(24, 128)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    if cast == "to":
        layer.to(device="cpu", dtype=torch.bfloat16)
    elif cast == "parent":
        nn.Sequential(nn.Linear(2, 2), layer).half()
    else:
        getattr(layer, cast)()
    after = dict(layer.named_buffers())
    assert after.pop("bias").dtype != before.pop("bias").dtype
    for name, expected in before.items():
        assert after[name].dtype == expected.dtype
        assert torch.equal(after[name], expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("assign", [True, False])
def test_saved_state_comes_back_bit_for_bit(shape: tuple[int, int], assign: bool) -> None:
    layer, file = quantize(*shape), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    for state in (loaded, safetensors.torch.load(safetensors.torch.save(layer.state_dict()))):
        target = Int4Quantizer().empty(*shape, True, torch.device("meta" if assign else "cpu"))
        target.load_state_dict(state, assign=assign)
        assert target.state_dict().keys() == layer.state_dict().keys()
        for name, expected in layer.state_dict().items():
            assert target.state_dict()[name].dtype == expected.dtype
            assert torch.equal(target.state_dict()[name], expected)
        assert torch.equal(target.dequantize(), layer.dequantize())


def test_copies_are_equal_and_independent() -> None:
    layer = quantize(24, 128)
    before = layer.dequantize()
    for duplicate in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(duplicate.dequantize(), before)
        duplicate.codes.zero_()
        assert not torch.equal(duplicate.dequantize(), before)
    assert torch.equal(layer.dequantize(), before)


def test_weight_is_neither_changed_nor_kept() -> None:
    weight = nn.Parameter(make_weight(24, 128))
    layer = Int4Quantizer().quantize(weight, None)
    assert torch.equal(weight, make_weight(24, 128))
    assert weight.untyped_storage().data_ptr() not in {b.untyped_storage().data_ptr() for b in layer.buffers()}
    assert not any(buffer.requires_grad for buffer in layer.buffers())


def test_the_result_does_not_depend_on_how_a_weight_is_cut_or_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = make_weight(128, 24)
    expected = Int4Quantizer(16).quantize(weight.t().contiguous(), None)
    assert torch.equal(Int4Quantizer(16).quantize(weight.t(), None).codes, expected.codes)
    monkeypatch.setitem(lavintk_int4.quantizer.PIECES, "cpu", 300)
    in_pieces = Int4Quantizer(16).quantize(weight.t().contiguous(), None)
    # sums over a block may be added up in another order
    torch.testing.assert_close(in_pieces.scales, expected.scales, rtol=1e-5, atol=0)
    assert torch.equal(in_pieces.codes, expected.codes)
    assert torch.equal(in_pieces.zero_points, expected.zero_points)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set torch's threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_is_the_same_whatever_the_number_of_threads_and_the_size_of_tiles(
    search: Search, dtype: torch.dtype, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = make_weight(40, 700, dtype=dtype)  # 24 rows of 22 blocks and the rest: neither is a multiple of 64
    monkeypatch.setitem(lavintk_int4.quantizer.PIECES, "cpu", 17_000)
    found = []
    for count, tile in ((1, 1 << 12), (2, 1 << 12), (3, 1 << 12), (1, 64), (3, 128)):
        threads(count)
        monkeypatch.setitem(lavintk_int4.quantizer.TILES, "cpu", tile)
        found.append(Int4Quantizer(32, search).quantize(weight, None))
        assert torch.get_num_threads() == count
    for layer in found[1:]:
        assert torch.equal(layer.codes, found[0].codes)
        assert torch.equal(layer.scales, found[0].scales)
        assert torch.equal(layer.zero_points, found[0].zero_points)
        assert torch.equal(layer.dequantize(), found[0].dequantize())


def test_each_piece_is_computed_by_one_thread(threads: Callable[[int], None]) -> None:
    for count in (1, 2, 4):
        threads(count)
        assert each(lambda _: torch.get_num_threads(), range(6)) == [1] * 6
        assert torch.get_num_threads() == count


def test_a_layer_made_in_inference_mode_by_several_threads_is_the_same(threads: Callable[[int], None]) -> None:
    weight = make_weight(600, 512)
    expected = Int4Quantizer().quantize(weight, None)
    threads(2)
    with torch.inference_mode():
        layer = Int4Quantizer().quantize(weight, None)
        assert torch.equal(layer.codes, expected.codes)
        assert torch.equal(layer.dequantize(), expected.dequantize())


# --- bad input


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_weight_that_is_not_finite_is_refused(bad: float, dtype: torch.dtype) -> None:
    weight = make_weight(24, 128, dtype=dtype)
    weight[3, 5] = weight[4, 5] = bad
    with pytest.raises(ModelError, match="2 of its 3072 elements are NaN or infinite"):
        Int4Quantizer().quantize(weight, None)


def test_all_faults_of_a_weight_are_named_together() -> None:
    with pytest.raises(ModelError) as caught:
        Int4Quantizer().quantize(torch.zeros(2, 3, 4, dtype=torch.float64, device="meta"), torch.zeros(5))
    for part in ("shape is [2, 3, 4]", "torch.float64", "on meta", "bias has shape [5], [2] is needed"):
        assert part in str(caught.value)


@pytest.fixture
def registry() -> Registry[Any]:
    offered: Registry[Any] = Registry("quantizer")
    lavintk_int4.lavintk_register_quantizers(offered.owned_by("int4"))
    return offered


def test_the_quantizer_is_offered_with_its_options(registry: Registry[Any]) -> None:
    assert registry.names() == ["int4"]
    layer = registry.create(Choice.parse("int4:block_size=64,search=none")).quantize(make_weight(8, 128), None)
    assert isinstance(layer, FrozenLinear)
    assert "int4, block_size=64" in repr(layer)
    assert registry.create(Choice("int4")).search == "balanced"


@pytest.mark.parametrize("block_size", [0, 8, 48, -32])
def test_block_sizes_that_onnx_runtime_refuses_are_refused(registry: Registry[Any], block_size: int) -> None:
    with pytest.raises(OptionsError, match=rf"must be a power of two from 16 on, got {block_size}"):
        registry.create(Choice.parse(f"int4:block_size={block_size}"))


def test_an_unknown_search_is_refused(registry: Registry[Any]) -> None:
    with pytest.raises(OptionsError, match="search"):
        registry.create(Choice.parse("int4:search=best"))


def test_importing_the_plugin_does_not_import_torch() -> None:
    code = "import sys, lavintk_int4; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_gpu_quantizes_and_computes_like_a_cpu(shape: tuple[int, int], search: Search) -> None:
    weight = make_weight(*shape)
    on_cpu = Int4Quantizer(32, search).quantize(weight, None)
    on_gpu = Int4Quantizer(32, search).quantize(weight.cuda(), None)
    error = [float((layer.dequantize().cpu() - weight).norm()) for layer in (on_cpu, on_gpu)]
    assert error[1] == pytest.approx(error[0], rel=1e-3, abs=1e-9)
    moved = copy.deepcopy(on_cpu).cuda()
    for dtype in FLOATS:
        assert torch.equal(moved.dequantize(dtype).cpu(), on_cpu.dequantize(dtype))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# make_graphed_callables warms up on a side stream, so the leaf's node belongs to that stream. Torch warns; as an error,
# in the middle of a capture, that would break every test that follows.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
def test_forward_and_backward_fit_a_cuda_graph() -> None:
    layer = quantize(64, 96).cuda()
    x = torch.randn(4, 96, device="cuda", requires_grad=True)
    graphed: Any = torch.cuda.make_graphed_callables(lambda y: layer(y), (x.detach().clone().requires_grad_(),))
    result = graphed(x)
    result.sum().backward()
    torch.testing.assert_close(result, layer(x))
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(4, 96))


# --- training


def layers_of(model: nn.Module) -> list[Int4Linear]:
    return [module for module in model.modules() if isinstance(module, Int4Linear)]


@pytest.mark.parametrize("adapter", ["lora", "mma"])
def test_a_run_trains_on_the_grid_and_its_base_is_the_same_after_loading(adapter: str, tmp_path: Path) -> None:
    folder = write_everything(tmp_path)
    content = (recipe if adapter == "lora" else multimodal)(folder, max_steps=2, batch_size=4) | {"quant": "int4"}
    run = lavintk.train(content, tmp_path / "run")
    losses = [json.loads(line)["loss"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2
    assert all(np.isfinite(losses))
    assert run.manifest["status"] == "finished"
    bases = [layers_of(run.assembly.model), layers_of(lavintk.load(run.folder).assembly.model)]
    assert len(bases[0]) == len(bases[1]) > 0
    for trained, loaded in zip(*bases):
        assert torch.equal(trained.codes, loaded.codes)
        assert torch.equal(trained.scales, loaded.scales)
        assert torch.equal(trained.zero_points, loaded.zero_points)

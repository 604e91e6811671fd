"""The plugin ``hqq``: what it stores against the package's own quantization, and a run from training to export."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lavintk
import lavintk_hqq
from lavintk.errors import ModelError, OptionsError, PluginError
from lavintk.layers import PackedWeight
from lavintk.registry import Choice, Registry
from lavintk.testing import Outcome, check_quantizer
from lavintk.testing.managers import PluginManager
from lavintk.testing.runs import recipe
from lavintk_hqq.packing import pack, unpack

MISSING = [name for name in ("hqq", "termcolor") if importlib.util.find_spec(name) is None]
needs_hqq = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
ERRORS = {4: 0.1, 3: 0.2, 2: 0.45}
"""Relative errors for normally distributed weights in groups of 64."""
MANNERS = [(bits, size, axis) for bits in ERRORS for size, axis in ((64, 1), (64, 0), (16, 1))]


def create(text: str) -> Any:
    registry: Registry[Any] = Registry("quantizer")
    lavintk_hqq.lavintk_register_quantizers(registry.owned_by("hqq"))
    return registry.create(Choice.parse(text))


def named(bits: int, size: int, axis: int) -> str:
    return f"hqq:bits={bits},group_size={size},axis={axis}"


def make_weight(*shape: int) -> Tensor:
    """Heavy-tailed and of the usual size."""
    torch.manual_seed(0)
    return torch.distributions.StudentT(5.0).sample(shape) * 0.02


def unpack_spread(packed: PackedWeight) -> Tensor:
    """Read axis 0 as its layout says: group g has every n-th weight from g on."""
    assert packed.scales is not None
    assert packed.zero_points is not None
    count = packed.scales.numel()
    assert packed.layout == f"row-major, group g has every {count}th weight from g on"
    group = torch.arange(packed.codes.numel()) % count
    values = (packed.codes.flatten().float() - packed.zero_points[group]) * packed.scales[group]
    return values.view(packed.shape)


@needs_hqq
@pytest.mark.parametrize(("bits", "size", "axis"), MANNERS)
def test_it_keeps_the_promises_of_a_quantizer(bits: int, size: int, axis: int) -> None:
    unpacked = None if axis == 1 else unpack_spread
    report = check_quantizer(lambda: create(named(bits, size, axis)), max_error=ERRORS[bits], unpack=unpacked)
    assert len(report.kept) > 10


@needs_hqq
@pytest.mark.parametrize(("bits", "size", "axis"), MANNERS)
def test_weights_are_those_of_the_package_but_for_scales_in_16_bits(bits: int, size: int, axis: int) -> None:
    from hqq.core.quantize import Quantizer

    weight = make_weight(64, 256)
    layer = create(named(bits, size, axis)).quantize(weight, None)
    unit = float(layer.unit)  # the package is asked about weights of the size that it has thresholds for
    codes, meta = Quantizer.quantize(
        weight / unit, nbits=bits, group_size=size, axis=axis, compute_dtype=torch.float32, device="cpu"
    )
    expected = Quantizer.dequantize(codes, meta | {"compute_dtype": torch.float32}) * unit
    found = layer.dequantize()
    wanted, reached = (float((values - weight).norm()) for values in (expected, found))
    assert reached <= 1.002 * wanted
    # a rounded scale moves a few weights between two codes to the other one
    step = float(layer.scales.float().max()) * unit
    assert float((found - expected).abs().max()) <= 1.05 * step
    assert int(((found - expected).abs() > 0.02 * step).sum()) <= 0.02 * weight.numel()


@needs_hqq
@pytest.mark.parametrize(("text", "expected"), [("hqq", 4.5), ("hqq:bits=3", 3.5), ("hqq:bits=2,group_size=16", 4.0)])
def test_storage_is_the_codes_and_32_bits_per_group(text: str, expected: float) -> None:
    layer = create(text).quantize(make_weight(256, 256), None)
    assert layer.bits_per_weight() == pytest.approx(expected, abs=1e-3)
    assert not any(buffer.is_inference() for buffer in layer.buffers())  # of those nothing could be changed in place


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_codes_lie_in_fields_that_fill_bytes_from_the_low_bits(bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 2**bits, 64, dtype=np.uint8)
    expected: list[int] = []
    for start, width in {4: [(0, 4)], 3: [(0, 2), (2, 1)], 2: [(0, 2)]}[bits]:
        fields = (codes >> start) & (2**width - 1)
        each = 8 // width
        expected += [sum(int(f) << (width * i) for i, f in enumerate(row)) for row in fields.reshape(-1, each)]
    packed = pack(torch.from_numpy(codes), bits)
    assert packed.tolist() == expected
    assert len(expected) == 64 * bits // 8
    assert torch.equal(unpack(packed, bits, 0, 64), torch.from_numpy(codes))
    assert torch.equal(unpack(packed, bits, 24, 40), torch.from_numpy(codes[24:40]))


@needs_hqq
@pytest.mark.parametrize("exponent", [-40, 30])
def test_a_weight_is_held_equally_well_whatever_its_size(exponent: int) -> None:
    weight, quantizer = make_weight(64, 128), create("hqq")
    small = quantizer.quantize(weight * 2.0**exponent, None).dequantize()
    assert torch.equal(small, quantizer.quantize(weight, None).dequantize() * 2.0**exponent)


@needs_hqq
def test_weights_in_several_pieces_are_as_exact_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from lavintk_hqq import quantizer

    weight = make_weight(128, 192)
    for axis in (0, 1):
        whole = create(f"hqq:axis={axis}").quantize(weight, None)
        monkeypatch.setitem(quantizer.PIECES, "cpu", 1 << 10)
        cut = create(f"hqq:axis={axis}").quantize(weight, None)
        pieces = whole.dequantize()
        monkeypatch.undo()
        assert torch.equal(pieces, whole.dequantize())
        errors = [float((layer.dequantize() - weight).norm()) for layer in (whole, cut)]
        assert errors[1] == pytest.approx(errors[0], rel=0.01)


@needs_hqq
def test_groups_that_overflow_in_the_package_lie_on_their_range(monkeypatch: pytest.MonkeyPatch) -> None:
    from hqq.core.quantize import Quantizer

    original = Quantizer.quantize

    def overflowing(*arguments: Any, **options: Any) -> Any:
        codes, meta = original(*arguments, **options)
        meta["zero"] = meta["zero"].clone()
        meta["zero"][3] = torch.inf
        return codes, meta

    weight = make_weight(8, 64)
    monkeypatch.setattr(Quantizer, "quantize", overflowing)
    found = create("hqq").quantize(weight, None).dequantize()
    low, high = weight[3].min(), weight[3].max()
    step = (high - low) / 15
    expected = ((weight[3] - low) / step).round() * step + low
    assert torch.allclose(found[3], expected, atol=float(step) * 0.02)


@needs_hqq
def test_what_cannot_be_quantized_is_refused() -> None:
    with pytest.raises(ModelError, match=r"to hqq: .* NaN or infinite"):
        create("hqq").quantize(torch.full((8, 64), torch.nan), None)


@pytest.mark.parametrize(
    ("text", "found"),
    [("hqq:bits=5", "'bits'"), ("hqq:group_size=12", "multiple of 8 from 8 on, got 12"), ("hqq:axis=2", "'axis'")],
)
def test_options_that_mean_nothing_are_refused(text: str, found: str) -> None:
    with pytest.raises(OptionsError, match=found):
        create(text)


def test_without_the_package_the_plugin_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "lavintk_hqq.quantizer", raising=False)
    for name in ("hqq", "hqq.core", "hqq.core.quantize"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(PluginError, match=r"quantizer 'hqq' \(plugin hqq\) cannot be used: .*hqq.* Install what is"):
        create("hqq")


def test_registering_imports_neither_the_package_nor_torch() -> None:
    code = "import sys, lavintk_hqq; assert not {'hqq', 'torch'} & set(sys.modules), 'too much is imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_hqq
def test_a_run_on_it_is_trained_loaded_and_exported(
    tiny_folder: Path, tmp_path: Path, plugin_manager: PluginManager, run_cli: Callable[..., Outcome]
) -> None:
    if "hqq" not in plugin_manager.plugins.names():
        plugin_manager.register(lavintk_hqq, "hqq")
    content = recipe(tiny_folder, max_steps=4) | {"quant": {"name": "hqq", "bits": 3}}
    run = lavintk.train(content, tmp_path / "run")
    trained, loaded = run.assembly.model.linears(), lavintk.load(tmp_path / "run").assembly.model.linears()
    for name, layer in trained.items():
        assert all(torch.equal(layer.state_dict()[n], b) for n, b in loaded[name].state_dict().items()), name
    outcome = run_cli("export", str(tmp_path / "run"), "--out", str(tmp_path / "onnx"))
    assert outcome.exit_code == 0, outcome.stderr
    assert "the base was trained as hqq3, which ONNX Runtime has no kernels for: it is encoded anew" in outcome.stdout

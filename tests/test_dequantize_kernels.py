"""The Triton kernels that dequantize, in Triton's interpreter on a CPU and, on a GPU, beside bitsandbytes."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb_functional
from torch import Tensor

from lavintk.errors import ModelError
from lavintk.kernels.choice import problem, using
from lavintk_bnb.quantizers import FourBitLinear, FourBitQuantizer, Scheme
from lavintk_int4.quantizer import Int4Linear, Int4Quantizer

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FOUR_BIT: list[tuple[int, tuple[int, int]]] = [
    (32, (96, 160)),  # several programs, and more scales than share a nested one
    (64, (40, 128)),
    (64, (5, 130)),  # blocks straddle rows, the last one is not full, nor is the last word of 8 codes
    (64, (9, 14)),
    (4096, (24, 40)),  # one block, not full
    (4096, (8, 2048)),  # a block of scales is half a program
    (64, (2, 1)),  # one byte
]
INT4: list[tuple[int, tuple[int, int]]] = [
    (32, (96, 160)),  # several programs; an odd number of blocks in a row
    (16, (24, 128)),
    (32, (70, 136)),  # the last block of a row is not full
    (32, (5, 43)),
    (128, (3, 7)),  # fewer weights than a block
    (256, (2, 512)),
    (32, (1, 1)),
]


def four_bit(scheme: Scheme, double: bool, block_size: int, shape: tuple[int, int]) -> FourBitLinear:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.02
    return FourBitQuantizer(scheme, block_size, double).quantize(weight, None)


def int4(block_size: int, shape: tuple[int, int]) -> Int4Linear:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.02
    return Int4Quantizer(block_size, "none").quantize(weight, None)


def cases() -> Iterator[tuple[str, FourBitLinear | Int4Linear]]:
    """Name and make every layer."""
    for scheme in ("nf4", "fp4"):
        for double in (True, False):
            for block_size, shape in FOUR_BIT:
                name = f"{scheme}{'' if double else '-plain'}-{block_size}-{shape[0]}x{shape[1]}"
                yield name, four_bit(scheme, double, block_size, shape)
    for block_size, shape in INT4:
        yield f"int4-{block_size}-{shape[0]}x{shape[1]}", int4(block_size, shape)


LAYERS = dict(cases())


def by_kernel(layer: FourBitLinear | Int4Linear, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    if isinstance(layer, Int4Linear):
        from lavintk_int4.kernels import dequantize_int4

        return dequantize_int4(layer.codes, layer.scales, layer.zero_points, layer.in_features, dtype, out=out)
    from lavintk_bnb.kernels import dequantize_4bit

    shape = (layer.out_features, layer.in_features)
    nested: dict[str, Any] = {"nested_absmax": layer.nested_absmax, "offset": layer.offset}
    return dequantize_4bit(layer.codes, layer.absmax, layer.scheme, layer.block_size, shape, dtype, out=out, **nested)


def steps_apart(first: Tensor, second: Tensor) -> int:
    """Return how many representable numbers lie between the elements of the two, at most."""
    whole = torch.int32 if first.dtype == torch.float32 else torch.int16
    ranks = []
    for tensor in (first, second):
        bits = tensor.contiguous().view(whole).long()
        ranks.append(torch.where(bits < 0, torch.iinfo(whole).min - bits, bits))
    return int((ranks[0] - ranks[1]).abs().max())


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, int]]:
    """What the interpreter computes, in steps apart from the CPU's way; Triton asks for it when it is imported."""
    made = subprocess.run(
        [sys.executable, "-m", "tests.test_dequantize_kernels"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    steps: dict[str, dict[str, int]] = json.loads(made.stdout.splitlines()[-1])
    return steps


@needs_triton
@pytest.mark.parametrize("name", LAYERS)
def test_the_kernel_gives_the_weights_of_the_cpu(found: dict[str, dict[str, int]], name: str) -> None:
    assert found[name]["float32"] == 0
    assert found[name]["float16"] == 0
    assert found[name]["bfloat16"] <= 1  # Triton's interpreter cuts bf16 off, a GPU rounds


@needs_triton
@pytest.mark.parametrize("name", ["nf4-32-96x160", "int4-32-96x160"])
def test_memory_for_the_result_must_fit(name: str) -> None:
    with pytest.raises(ModelError, match=r"shape \[96, 160\], out has \[160, 96\]"):
        by_kernel(LAYERS[name], torch.float32, torch.empty(160, 96))
    with pytest.raises(ModelError, match="contiguous"):
        by_kernel(LAYERS[name], torch.float32, torch.empty(160, 96).t())


def on_gpu(name: str) -> FourBitLinear | Int4Linear:
    return copy.deepcopy(LAYERS[name]).to("cuda")


def by_others(layer: FourBitLinear | Int4Linear, dtype: torch.dtype) -> Tensor:
    """Dequantize with bitsandbytes' kernels, or with torch's operations."""
    with using("none"):
        return layer.dequantize(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_on_a_gpu_the_weights_are_those_of_bitsandbytes_bit_by_bit(name: str, dtype: torch.dtype) -> None:
    layer = on_gpu(name)
    assert problem(layer.codes.device) == ""
    kernel = by_kernel(layer, dtype)
    assert torch.equal(kernel, by_others(layer, dtype))
    if isinstance(layer, FourBitLinear):
        state = layer._quant_state(dtype)
        expected = bnb_functional.dequantize_4bit(layer.codes.view(-1, 1), state)
        assert torch.equal(kernel, expected.view_as(kernel))  # of a single byte it comes transposed


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["nf4-32-96x160", "int4-32-70x136"])
def test_layers_use_the_kernel_unless_it_is_switched_off(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import lavintk_bnb.kernels
    import lavintk_int4.kernels

    layer, calls = on_gpu(name), []
    for module, function in ((lavintk_bnb.kernels, "dequantize_4bit"), (lavintk_int4.kernels, "dequantize_int4")):
        monkeypatch.setattr(module, function, lambda *arguments, **named: calls.append(1) or torch.ones(1))
    by_others(layer, torch.bfloat16)
    assert not calls
    layer.dequantize(torch.bfloat16)
    assert calls


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["nf4-32-96x160", "nf4-64-5x130", "int4-32-70x136"])
def test_a_recorded_graph_follows_changed_codes_and_reuses_memory(name: str) -> None:
    layer = on_gpu(name)
    out = torch.empty(layer.out_features, layer.in_features, dtype=torch.bfloat16, device="cuda")
    assert by_kernel(layer, torch.bfloat16, out) is out
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        by_kernel(layer, torch.bfloat16, out)
    layer.codes.copy_(layer.codes ^ 255)
    out.zero_()
    graph.replay()
    assert torch.equal(out, by_others(layer, torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["nf4-32-96x160", "fp4-plain-64-40x128", "int4-32-96x160"])
def test_compiled_code_calls_the_kernel(name: str) -> None:
    layer = on_gpu(name)

    def doubled() -> Tensor:
        return layer.dequantize(torch.bfloat16) * 2

    compiled = torch.compile(doubled, fullgraph=True)
    assert torch.equal(compiled(), by_others(layer, torch.bfloat16) * 2)


def main() -> None:
    """Print how far the kernels are from the CPU's way, by layer and number type."""
    steps = {
        name: {str(t).removeprefix("torch."): steps_apart(by_kernel(layer, t), layer.dequantize(t)) for t in DTYPES}
        for name, layer in LAYERS.items()
    }
    print(json.dumps(steps))


if __name__ == "__main__":
    main()

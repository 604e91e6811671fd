"""Time and bandwidth of the fused kernels beside torch's and bitsandbytes', on the shapes of LLaMA-7B.

    python benchmarks/fused_kernels.py [--tokens 512 --tokens 2048] [--only rope] [--json kernels.json]

Each figure is the median over replays of a CUDA graph that holds the same call on many sets of tensors, more than the
L2 cache holds together: what a captured training step pays, without the time of launching from Python. GB/s counts
what has to be moved at least, the same for both: inputs read once, outputs written once. "copy" is what the card gives.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import lavintk
from lavintk.contracts import Quantizer
from lavintk.devices import describe
from lavintk.kernels import (
    LowRank,
    add_low_rank,
    problem,
    rms_norm,
    rms_norm_and_pass,
    rope,
    swiglu,
    swiglu_low_rank,
    using,
)
from lavintk.plugins import installed_plugins
from lavintk.registry import Choice

HIDDEN, INNER, HEADS, HEAD_SIZE = 4096, 11008, 32, 128
"""Of LLaMA-7B."""
RANK = 16
"""Of LoRA."""
EPS = 1e-6
MOST_SETS = 32
"""Calls in a graph, at most."""
REPLAYS = 20

Call = Callable[[], object]
"""Does the work once; its tensors are its own."""


@dataclass(frozen=True)
class Row:
    """A line of the table.

    :param direction: forward or backward, or the kind of weight that is dequantized.
    :param moved: bytes that have to be read and written at least.
    :param variants: by heading, functions that make the tensors of a call on the current stream, and the call.
        The first is what the others are compared with.
    """

    kernel: str
    direction: str
    shape: str
    moved: int
    variants: Mapping[str, Callable[[], Call]]


@dataclass(frozen=True)
class Measured:
    """A variant of a row, measured.

    :param microseconds: of one call. :param gigabytes_per_second: 10^9 bytes of :attr:`Row.moved`.
    """

    kernel: str
    direction: str
    shape: str
    variant: str
    microseconds: float
    gigabytes_per_second: float


def normal(*shape: int, trained: bool = True) -> Tensor:
    """Return random bf16 values on the device."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_(trained)


def both_directions(
    kernel: str, shape: str, moved: tuple[int, int], function: Callable[..., Any], make: Callable[[], Sequence[Any]]
) -> Iterator[Row]:
    """Yield the rows of a function that chooses its kernel itself, forward and backward.

    :param moved: bytes that have to be moved forward, and backward.
    :param make: returns the function's arguments; gradients are taken of the tensors that want one.
    """

    def run_forward(choice: str) -> Call:
        arguments = make()

        def call() -> object:
            with using(choice), torch.no_grad():
                return function(*arguments)

        return call

    def run_backward(choice: str) -> Call:
        arguments = make()
        with using(choice):
            made = function(*arguments)
        outputs = made if isinstance(made, tuple) else (made,)
        inputs = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
        grads = [torch.randn_like(x) for x in outputs]
        return lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True)

    for direction, size, run in zip(("forward", "backward"), moved, (run_forward, run_backward)):
        yield Row(kernel, direction, shape, size, {"torch": partial(run, "none"), "fused": partial(run, "all")})


def copy_rows(rows: int) -> Iterator[Row]:
    """Yield what copying a tensor costs: the bound of all others."""

    def make() -> Call:
        return normal(rows, INNER, trained=False).clone

    yield Row("copy", "", f"{rows} x {INNER}", 4 * rows * INNER, {"torch": make})


def norm_rows(tokens: int) -> Iterator[Row]:
    """Yield the rows of RMSNorm."""
    size = 2 * tokens * HIDDEN

    def make() -> tuple[Any, ...]:
        return normal(tokens, HIDDEN), normal(HIDDEN, trained=False), EPS

    yield from both_directions("rms_norm", f"{tokens} x {HIDDEN}", (2 * size, 3 * size), rms_norm, make)
    yield from both_directions("norm + pass", f"{tokens} x {HIDDEN}", (2 * size, 4 * size), rms_norm_and_pass, make)


def swiglu_rows(tokens: int) -> Iterator[Row]:
    """Yield the rows of SwiGLU."""
    size = 2 * tokens * INNER

    def make() -> tuple[Any, ...]:
        return normal(tokens, INNER), normal(tokens, INNER)

    yield from both_directions("swiglu", f"{tokens} x {INNER}", (3 * size, 5 * size), swiglu, make)


def update(tokens: int, width: int) -> LowRank:
    """Return a low-rank update of a product ``[tokens, width]``."""
    return LowRank(normal(tokens, RANK, trained=False), normal(width, RANK, trained=False), 2.0)


def low_rank_rows(tokens: int) -> Iterator[Row]:
    """Yield the rows of LoRA's updates: with the product, rounded before it is updated or once; within SwiGLU."""
    for depth, onto in ((HIDDEN, False), (INNER, True)):

        def make(rounds_once: bool, depth: int = depth, onto: bool = onto) -> Call:
            x, weight = normal(tokens, depth, trained=False), normal(HIDDEN, depth, trained=False)
            added, residual = update(tokens, HIDDEN), normal(tokens, HIDDEN, trained=False) if onto else None

            def once() -> Tensor:
                return add_low_rank(torch.mm(x, weight.t(), out_dtype=torch.float32), added, residual)

            def afterwards() -> Tensor:
                product = torch.mm(x, weight.t()).addmm_(added.inner, added.up.t(), alpha=added.scale)
                return product if residual is None else product.add_(residual)

            return once if rounds_once else afterwards

        moved = 2 * (tokens * depth + HIDDEN * depth + tokens * HIDDEN * (2 if onto else 1))
        variants = {"torch": partial(make, False), "fused": partial(make, True)}
        part = "product + sum" if onto else "product"
        yield Row("low_rank", part, f"{tokens} x {depth} x {HIDDEN}", moved, variants)

    def make_pair() -> tuple[Any, ...]:
        return normal(tokens, INNER), normal(tokens, INNER), update(tokens, INNER), update(tokens, INNER)

    size = 2 * tokens * INNER
    yield from both_directions("in swiglu", f"{tokens} x {INNER}", (3 * size, 5 * size), swiglu_low_rank, make_pair)


def rope_rows(tokens: int) -> Iterator[Row]:
    """Yield the rows of the rotary embedding of queries and keys."""
    size = 2 * tokens * HEADS * HEAD_SIZE

    def make() -> tuple[Tensor, ...]:
        angles = torch.randn(tokens, HEAD_SIZE, device="cuda")
        q, k = (normal(tokens, HEADS, HEAD_SIZE) for _ in range(2))
        return q, k, angles.cos().bfloat16(), angles.sin().bfloat16()

    moved = 4 * size + 2 * 2 * tokens * HEAD_SIZE
    yield from both_directions("rope", f"{tokens} x 2 x {HEADS} x {HEAD_SIZE}", (moved, moved), rope, make)


def dequantize_rows() -> Iterator[Row]:
    """Yield a copy of a whole bf16 weight, and what making one of 4-bit codes costs."""
    yield from copy_rows(HIDDEN)
    for kind, others in {
        "nf4": "bitsandbytes", "nf4:double_quant=false": "bitsandbytes", "fp4": "bitsandbytes", "int4": "torch",
    }.items():  # fmt: skip
        quantizer = installed_plugins().quantizers.create(Choice.parse(kind))

        def make(choice: str, quantizer: Quantizer = quantizer) -> Call:
            layer = quantizer.quantize(normal(HIDDEN, INNER, trained=False), None)

            def call() -> object:
                with using(choice):
                    return layer.dequantize(torch.bfloat16)

            return call

        layer = quantizer.empty(HIDDEN, INNER, False, torch.device("meta"))
        moved = round(HIDDEN * INNER * (layer.bits_per_weight() / 8 + 2))
        variants = {others: partial(make, "none"), "fused": partial(make, "all")}
        yield Row("dequantize", kind, f"{HIDDEN} x {INNER}", moved, variants)


ROWS: dict[str, Callable[[int], Iterator[Row]]] = {
    "copy": copy_rows, "rms_norm": norm_rows, "swiglu": swiglu_rows, "rope": rope_rows,
    "low_rank": low_rank_rows,
}  # fmt: skip
"""By name for ``--only``: functions that yield rows for a number of tokens."""
WEIGHT_ROWS = {"dequantize": dequantize_rows}
"""Likewise, but rows that no number of tokens changes."""


def measure(row: Row, variant: str) -> Measured:
    """Record the calls of a variant in a CUDA graph, replay it, and return the median time of one call."""
    cache = torch.cuda.get_device_properties("cuda").L2_cache_size
    sets = min(MOST_SETS, max(2, 2 * cache // row.moved + 1))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # backward passes run on the stream of their forward pass
        calls = [row.variants[variant]() for _ in range(sets)]
        calls[0]()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        held = [call() for call in calls]  # or all would write to the same memory, which the cache holds
    times = []
    graph.replay()
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / sets)
    del held
    microseconds = median(times)
    rate = row.moved / microseconds / 1e3
    return Measured(row.kernel, row.direction, row.shape, variant, round(microseconds, 2), round(rate, 1))


def show(row: Row, measured: Sequence[Measured]) -> None:
    """Print a row: time and bandwidth of each variant, and how much faster than the first it is."""
    cells = [
        f"{m.variant} {m.microseconds:8.1f} us {m.gigabytes_per_second:6.0f} GB/s"
        f" {measured[0].microseconds / m.microseconds:5.2f}x"
        for m in measured
    ]
    print(f"{row.kernel:12} {row.direction:22} {row.shape:20} " + "   ".join(cells), flush=True)


def wanted_rows(counts: Sequence[int], names: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of these names for each number of tokens, and those of weights once."""
    for tokens in counts:
        for name, rows in ROWS.items():
            if name in names:
                yield from rows(tokens)
    for name, weight_rows in WEIGHT_ROWS.items():
        if name in names:
            yield from weight_rows()


def main() -> None:
    """Measure each row and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", action="append", type=int, default=None)
    parser.add_argument("--only", action="append", choices=[*ROWS, *WEIGHT_ROWS], default=None)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error(f"needs a CUDA device, and torch {torch.__version__} sees none")
    if trouble := problem(torch.device("cuda", torch.cuda.current_device())):
        parser.error(trouble)
    import triton

    packages = (lavintk, torch, triton)
    versions = ", ".join(f"{package.__name__} {package.__version__}" for package in packages)
    print(f"{describe(torch.device('cuda'))}; {versions}; bf16")
    results: list[Measured] = []
    for row in wanted_rows(arguments.tokens or [512, 2048], arguments.only or [*ROWS, *WEIGHT_ROWS]):
        measured = [measure(row, variant) for variant in row.variants]
        show(row, measured)
        results += measured
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=2))


if __name__ == "__main__":
    main()

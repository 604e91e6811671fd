"""The kernels' plain forms against transformers, and the Triton kernels against the plain forms.

Triton's interpreter runs kernels on CPU tensors if ``TRITON_INTERPRET`` is set before Triton is imported, so that part
runs in a process of its own (:func:`interpret`) and reports figures. It cuts bf16 off instead of rounding it, and has
to be told how to multiply matrices of bf16.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lavintk.errors import LavintkError
from lavintk.kernels import (
    NAMES,
    LowRank,
    add_low_rank,
    choice,
    functions,
    plain,
    problem,
    rms_norm,
    rms_norm_and_pass,
    rope,
    swiglu,
    swiglu_low_rank,
    using,
)

ROOT = Path(__file__).parents[1]
EPS = 1e-5
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PLAIN: dict[str, Callable[..., Any]] = {
    "rms_norm": plain.rms_norm,
    "rms_norm_and_pass": lambda x, weight, eps: (plain.rms_norm(x, weight, eps), x),
    "swiglu": plain.swiglu,
    "swiglu_low_rank": plain.swiglu_low_rank,
    "rope": plain.rope,
}
FUSED: dict[str, Callable[..., Any]] = {
    "rms_norm": rms_norm,
    "rms_norm_and_pass": rms_norm_and_pass,
    "swiglu": swiglu,
    "swiglu_low_rank": swiglu_low_rank,
    "rope": rope,
}
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed")


@dataclass(frozen=True)
class Case:
    """A kernel and what it is given.

    :param whole: shapes of the tensors that are trained.
    :param arguments: makes the kernel's arguments from them: views, frozen tensors, numbers.
    """

    kernel: str
    whole: tuple[tuple[int, ...], ...]
    arguments: Callable[..., tuple[Any, ...]]


def frozen(like: Tensor, *shape: int) -> Tensor:
    """Return random values near 1 of the type and device of ``like``."""
    return (1 + 0.3 * torch.randn(shape)).to(like)


def norm_of(x: Tensor) -> tuple[Any, ...]:
    return x, frozen(x, x.shape[-1]), EPS


def norm_of_a_slice(x: Tensor) -> tuple[Any, ...]:
    return norm_of(x[:, 4:-4])


def norm_of_columns(x: Tensor) -> tuple[Any, ...]:
    return norm_of(x.t())


def halves(x: Tensor) -> tuple[Any, ...]:
    return x.chunk(2, dim=-1)


def angles(like: Tensor, tokens: int, size: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of transformers' rotary embedding."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    embedding = LlamaRotaryEmbedding(LlamaConfig(head_dim=size))
    cos, sin = embedding(torch.empty(0, dtype=like.dtype), torch.arange(tokens).unsqueeze(0) + 3)
    return cos[0].to(like.device), sin[0].to(like.device)


def heads_of(q: Tensor, k: Tensor) -> tuple[Any, ...]:
    return q, k, *angles(q, q.shape[0], q.shape[2])


def heads_of_one_projection(x: Tensor, heads: int = 4, kv_heads: int = 2) -> tuple[Any, ...]:
    size = x.shape[1] // (heads + 2 * kv_heads)
    q, k, _ = x.split([heads * size, kv_heads * size, kv_heads * size], dim=1)
    return heads_of(q.unflatten(1, (heads, size)), k.unflatten(1, (kv_heads, size)))


def heads_before_tokens(q: Tensor, k: Tensor) -> tuple[Any, ...]:
    return heads_of(q.transpose(0, 1), k.transpose(0, 1))


def angles_that_differ_in_the_halves(q: Tensor, k: Tensor) -> tuple[Any, ...]:
    return q, k, frozen(q, q.shape[0], q.shape[2]), frozen(q, q.shape[0], q.shape[2])


def with_updates(gate: Tensor, up: Tensor, ranks: tuple[int, int]) -> tuple[Any, ...]:
    """Return updates of both, whose inner values lie side by side as in a group of layers."""
    inner = torch.randn(gate.shape[:-1].numel(), sum(ranks)).to(gate)
    updates = (
        LowRank(part, torch.randn(gate.shape[-1], part.shape[1]).to(gate) / 2, scale)
        for part, scale in zip(inner.split(ranks, dim=1), (0.5, 2.0))
    )
    return gate, up, *updates


CASES = {
    "norm of a single row": Case("rms_norm", ((1, 96),), norm_of),
    "norm of 7 rows of 96": Case("rms_norm", ((7, 96),), norm_of),
    "norm of rows of a power of 2": Case("rms_norm", ((2, 9, 128),), norm_of),
    "norm of rows of 1030": Case("rms_norm", ((3, 1030),), norm_of),
    "norm of a slice": Case("rms_norm", ((5, 104),), norm_of_a_slice),
    "norm of columns": Case("rms_norm", ((24, 7),), norm_of_columns),
    "norm passing on a single row": Case("rms_norm_and_pass", ((1, 96),), norm_of),
    "norm passing on 7 rows of 96": Case("rms_norm_and_pass", ((7, 96),), norm_of),
    "norm passing on rows of 1030": Case("rms_norm_and_pass", ((2, 3, 1030),), norm_of),
    "norm passing on a slice": Case("rms_norm_and_pass", ((5, 104),), norm_of_a_slice),
    "norm passing on columns": Case("rms_norm_and_pass", ((24, 7),), norm_of_columns),
    "swiglu of a single row": Case("swiglu", ((1, 5), (1, 5)), lambda *x: x),
    "swiglu of 2 x 7 rows of 100": Case("swiglu", ((2, 7, 100), (2, 7, 100)), lambda *x: x),
    "swiglu of halves of a projection": Case("swiglu", ((3, 2200),), halves),
    "swiglu of a single row with updates": Case(
        "swiglu_low_rank", ((1, 5), (1, 5)), partial(with_updates, ranks=(1, 2))
    ),
    "swiglu of 2 x 17 rows of 136 with updates": Case(
        "swiglu_low_rank", ((2, 17, 136), (2, 17, 136)), partial(with_updates, ranks=(16, 16))
    ),
    "swiglu with updates of more inner values than are multiplied at once": Case(
        "swiglu_low_rank", ((3, 130), (3, 130)), partial(with_updates, ranks=(100, 4))
    ),
    "rope of a single token": Case("rope", ((1, 4, 16), (1, 4, 16)), heads_of),
    "rope of 7 tokens, 6 and 2 heads of 24": Case("rope", ((7, 6, 24), (7, 2, 24)), heads_of),
    "rope of more heads than a program takes": Case("rope", ((3, 20, 128), (3, 5, 128)), heads_of),
    "rope of views of one projection": Case("rope", ((7, 8 * 16),), heads_of_one_projection),
    "rope of transposed heads": Case("rope", ((4, 7, 32), (2, 7, 32)), heads_before_tokens),
    "rope by unequal halves": Case("rope", ((7, 3, 10), (7, 1, 10)), angles_that_differ_in_the_halves),
}


def results(
    call: Callable[..., Any], case: Case, dtype: torch.dtype, device: str, *, exact: bool = False
) -> list[Tensor]:
    """Return what ``call`` gives for the case, and the gradients of what is trained, equal numbers for each call.

    :param exact: let it compute in fp64 from numbers of ``dtype``.
    """
    torch.manual_seed(0)
    whole = [torch.randn(shape).to(device, dtype).requires_grad_() for shape in case.whole]
    arguments = case.arguments(*whole)
    made = call(*map(in_fp64, arguments)) if exact else call(*arguments)
    outputs = made if isinstance(made, tuple) else (made,)
    # gradients as attention gives them: not contiguous
    grads = [torch.randn(*x.shape[:-1], 2 * x.shape[-1]).to(x)[..., : x.shape[-1]] for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, whole, grads)]


def in_fp64(argument: Any) -> Any:
    """Return an argument of a kernel with its tensors in fp64."""
    if isinstance(argument, LowRank):
        return LowRank(argument.inner.double(), argument.up.double(), argument.scale)
    return argument.double() if isinstance(argument, Tensor) else argument


def distance(found: list[Tensor], exact: list[Tensor]) -> float:
    """Return the largest relative error among results, in the 2-norm."""
    pairs = ((a.double(), b.double()) for a, b in zip(found, exact))
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def figures(case: Case, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Run the kernel beside torch's operations: how far apart they are, and from fp64; what is kept."""
    kept: list[list[int]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(list(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = results(FUSED[case.kernel], case, dtype, device)
    expected = results(PLAIN[case.kernel], case, dtype, device)
    exact = results(PLAIN[case.kernel], case, dtype, device, exact=True)
    worst = max(((a.float() - b.float()).abs() / (1 + b.float().abs())).max().item() for a, b in zip(found, expected))
    equal = min((a == b).float().mean().item() for a, b in zip(found, expected))
    same = all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(found, expected))
    node = found[0].grad_fn
    return {
        "worst": worst, "equal": equal, "same": same, "kept": kept, "node": node.name() if node else "",
        "error": distance(found, exact), "plain error": distance(expected, exact),
    }  # fmt: skip


LOW_RANK = {
    "a single row": ((1, 24), 4),
    "rows in two dimensions": ((2, 33, 136), 16),
    "more inner values than are multiplied at once": ((5, 130), 100),
}
"""The product's shape, and the rank."""


def low_rank_errors(shape: tuple[int, ...], rank: int, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Return how far the sum is from the exact one, by the kernel and by torch, in parts of the largest summand and 1.

    Products are in fp32 and in ``dtype``, and a residual is added or not.
    """
    torch.manual_seed(0)
    rows = torch.Size(shape[:-1]).numel()
    # as in a group of layers: a slice of the inner values of all
    inner = torch.randn(rows, 2 * rank).to(device, dtype)[:, rank:]
    update = LowRank(inner, torch.randn(shape[-1], rank).to(device, dtype), 0.3)
    added, residual = 0.3 * (inner.double() @ update.up.double().t()).view(shape), torch.randn(shape).to(device, dtype)
    errors = {"fused": 0.0, "plain": 0.0}
    for of_product in (torch.float32, dtype):
        product = torch.randn(shape).to(device, of_product)
        for onto in (None, residual):
            exact = product.double() + added + (0 if onto is None else onto.double())
            largest = 1 + torch.stack([product.double(), residual.double(), added, exact]).abs().amax(0)
            for name, function in {"fused": add_low_rank, "plain": plain.add_low_rank}.items():
                found = function(product, update, onto)
                assert (found.dtype, found.shape) == (dtype, product.shape)
                errors[name] = max(errors[name], ((found.double() - exact).abs() / largest).max().item())
    return errors


def teach_products_of_bf16() -> None:
    """Have the interpreter multiply bf16 matrices as numbers; it holds their bits and multiplies those."""
    import numpy as np
    from triton.runtime import interpreter

    def wide(handle: Any) -> Any:
        if not handle.dtype.scalar.is_bf16():
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), interpreter.tl.float32)

    create = interpreter.InterpreterBuilder.create_dot
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *others: create(self, wide(a), wide(b), *others)


def interpret() -> None:
    """Print what the kernels do in Triton's interpreter, as JSON; run in a process that has TRITON_INTERPRET set."""
    rms_norm(torch.randn(2, 8), torch.ones(8), EPS)
    unused = "triton" not in sys.modules
    teach_products_of_bf16()
    setattr(functions, "fused", lambda name, *tensors: choice.enabled(name))  # noqa: B010
    found = {f"{name} in {t}": figures(case, TYPES[t], "cpu") for (name, case), t in product(CASES.items(), TYPES)}
    low_rank = {f"{name} in {t}": low_rank_errors(*LOW_RANK[name], TYPES[t], "cpu") for name in LOW_RANK for t in TYPES}
    weight = torch.ones(8, requires_grad=True)
    rms_norm(torch.randn(2, 8), weight, EPS).sum().backward()
    one_sided = []
    for chosen in (0, 1):
        x = torch.randn(3, 8, requires_grad=True)
        (gradient,) = torch.autograd.grad(rms_norm_and_pass(x, torch.ones(8), EPS)[chosen].square().sum(), x)
        expected = PLAIN["rms_norm_and_pass"](x, torch.ones(8), EPS)[chosen].square().sum()
        one_sided.append(bool(torch.allclose(gradient, torch.autograd.grad(expected, x)[0], atol=1e-5)))
    with using("rope"):
        x = torch.randn(2, 8, requires_grad=True)
        node = swiglu(x, x).grad_fn
    print()
    print(json.dumps({
        "cases": found, "unused": unused, "trained": weight.grad is not None, "off": node.name() if node else "",
        "low_rank": low_rank, "one_sided": one_sided,
    }))  # fmt: skip


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("LAVINTK_KERNELS", None)
    command = [sys.executable, "-c", "from tests.test_kernels import interpret; interpret()"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def check(found: dict[str, Any], kernel: str, dtype: str, *, rounds: bool) -> None:
    """Assert that a kernel agrees with torch's operations.

    :param rounds: whether bf16 is rounded, as a GPU does and the interpreter does not.
    """
    assert found["same"]
    # two roundings in a row of a 16-bit type, or the order of an fp32 sum
    tolerance = {"fp32": 1e-5, "fp16": 2**-9, "bf16": 2**-6 if rounds else 2**-5}[dtype]
    rounds_less = kernel == "rms_norm_and_pass"  # than torch, which rounds each sum
    assert found["worst"] <= tolerance * (2 if rounds_less else 1)
    if dtype == "fp16" or (dtype == "bf16" and rounds):  # elsewhere than torch rounds, most values would differ
        assert found["equal"] > (0.6 if rounds_less else 0.95)
    if kernel == "rope" and (dtype != "bf16" or rounds):  # products and sums, rounded one by one
        assert found["equal"] == 1


# ---- the plain forms ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_and_its_gradient_are_those_of_transformers(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    theirs = LlamaRMSNorm(96, EPS).to(dtype)
    theirs.weight.data.normal_(1, 0.3)
    x, grad = torch.randn(2, 2, 7, 96).to(dtype)
    x.requires_grad_()
    inputs = [x, theirs.weight]
    ours, expected = rms_norm(x, theirs.weight, EPS), theirs(x)
    assert torch.equal(ours, expected)
    for a, b in zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(expected, inputs, grad)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_norm_and_its_gradient_are_those_of_transformers(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    theirs = LlamaRMSNorm(96, EPS).to(dtype).requires_grad_(False)
    theirs.weight.data.normal_(1, 0.3)
    x, grad = torch.randn(2, 2, 7, 96).to(dtype)
    x.requires_grad_()
    ours, expected = rms_norm(x, theirs.weight, EPS), theirs(x)
    torch.testing.assert_close(ours, expected)
    gradients = (torch.autograd.grad(y, x, grad)[0] for y in (ours, expected))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_and_its_gradient_are_those_of_transformers(dtype: torch.dtype) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    theirs = LlamaMLP(LlamaConfig(hidden_size=24, intermediate_size=40, num_attention_heads=2)).to(dtype)
    x, grad = torch.randn(2, 7, 24).to(dtype)
    x.requires_grad_()
    ours, expected = theirs.down_proj(swiglu(theirs.gate_proj(x), theirs.up_proj(x))), theirs(x)
    assert torch.equal(ours, expected)
    assert torch.equal(*(torch.autograd.grad(y, x, grad)[0] for y in (ours, expected)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rotation_and_its_gradient_are_those_of_transformers(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = (torch.randn(7, heads, 16).to(dtype).requires_grad_() for heads in (6, 2))
    cos, sin = angles(q, 7, 16)
    ours = rope(q, k, cos, sin)
    batched = [q.transpose(0, 1).unsqueeze(0), k.transpose(0, 1).unsqueeze(0), cos.unsqueeze(0), sin.unsqueeze(0)]
    theirs = [x[0].transpose(0, 1) for x in apply_rotary_pos_emb(*batched)]
    grads = [torch.randn_like(x) for x in ours]
    found, expected = (torch.autograd.grad(made, (q, k), grads) for made in (ours, theirs))
    for a, b in zip((*ours, *found), (*theirs, *expected)):
        assert torch.equal(a, b)


def test_the_gradient_of_a_rotation_is_the_rotation_by_the_negative_angle() -> None:
    q, k = (torch.randn(7, heads, 16, requires_grad=True) for heads in (6, 2))
    cos, sin = angles(q, 7, 16)
    outputs = rope(q, k, cos, sin)
    grads = [torch.randn_like(x) for x in outputs]
    for a, b in zip(torch.autograd.grad(outputs, (q, k), grads), rope(grads[0], grads[1], cos, -sin)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_that_passes_its_input_on_has_the_gradient_of_the_norm_plus_that_of_the_residual(
    dtype: torch.dtype,
) -> None:
    x, weight = torch.randn(7, 96).to(dtype).requires_grad_(), torch.randn(96).to(dtype)
    normed, passed = rms_norm_and_pass(x, weight, EPS)
    assert torch.equal(normed, rms_norm(x, weight, EPS))
    assert torch.equal(passed, x)
    through, along = torch.randn(2, 7, 96).to(dtype)
    (found,) = torch.autograd.grad((normed, passed), x, (through, along))
    (expected,) = torch.autograd.grad(rms_norm(x, weight, EPS), x, through)
    torch.testing.assert_close(found, expected + along)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_with_updates_is_that_of_the_updated_products_and_has_their_gradients(dtype: torch.dtype) -> None:
    gate, up = torch.randn(2, 2, 7, 24).to(dtype)
    arguments = with_updates(gate.requires_grad_(), up.requires_grad_(), (4, 2))
    sums = []
    for own, update in zip(arguments[:2], arguments[2:]):
        added = update.scale * update.inner.double() @ update.up.double().t()
        sums.append((own.detach().double() + added.view(2, 7, 24)).requires_grad_())
    found, expected, grad = swiglu_low_rank(*arguments), swiglu(*sums), torch.randn(2, 7, 24).to(dtype)
    one_rounding = {"rtol": 2**-7, "atol": 1e-5} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found, expected.to(dtype), **one_rounding)
    gradients = zip(torch.autograd.grad(found, (gate, up), grad), torch.autograd.grad(expected, sums, grad.double()))
    for a, b in gradients:
        torch.testing.assert_close(a, b.to(dtype), **one_rounding)


# ---- what is switched on -----------------------------------------------------------------------------------------


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Return a function that sets the variable as if no kernel had been wanted yet."""

    def set_to(text: str) -> None:
        monkeypatch.setenv("LAVINTK_KERNELS", text)
        choice._from_environment.cache_clear()

    yield set_to
    choice._from_environment.cache_clear()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", set(NAMES)),
        ("all", set(NAMES)),
        ("none", set()),
        ("rope", {"rope"}),
        (" swiglu, rope,", {"swiglu", "rope"}),
    ],
)
def test_the_environment_names_the_kernels(unread: Callable[[str], None], text: str, expected: set[str]) -> None:
    unread(text)
    assert {name for name in NAMES if choice.enabled(name)} == expected


def test_the_environment_is_read_once(unread: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    unread("rope")
    assert not choice.enabled("swiglu")
    monkeypatch.setenv("LAVINTK_KERNELS", "all")
    assert not choice.enabled("swiglu")


@pytest.mark.parametrize("text", ["rop", "rope,rop", "all,rop"])
def test_an_unknown_kernel_is_an_error_that_lists_the_known_ones(unread: Callable[[str], None], text: str) -> None:
    unread(text)
    with pytest.raises(LavintkError) as caught:
        choice.enabled("rope")
    assert f"LAVINTK_KERNELS={text}" in str(caught.value)
    assert all(name in str(caught.value) for name in ("all", "none", *NAMES))
    if text != "all,rop":
        assert "Did you mean 'rope'?" in str(caught.value)


def test_a_block_of_code_can_use_other_kernels_than_the_environment_names(unread: Callable[[str], None]) -> None:
    unread("none")
    with using("all"):
        with using("rope"):
            assert (choice.enabled("rope"), choice.enabled("swiglu")) == (True, False)
        assert choice.enabled("swiglu")
        with pytest.raises(LavintkError, match="no kernel named 'rms'"), using("rms"):
            pass
        assert choice.enabled("rms_norm")
    assert not choice.enabled("rope")


def test_a_cpu_has_no_kernels() -> None:
    assert problem(torch.device("cpu")) == "Triton has no kernels for the device cpu"
    assert not any(choice.fused(name, torch.ones(1)) for name in NAMES)


# ---- Triton, interpreted -----------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", CASES)
def test_an_interpreted_kernel_gives_what_torch_gives(interpreted: dict[str, Any], name: str, dtype: str) -> None:
    kernel, found = CASES[name].kernel, interpreted["cases"][f"{name} in {dtype}"]
    check(found, kernel, dtype, rounds=False)


@needs_triton
@pytest.mark.parametrize(
    ("name", "node", "kept"),
    [
        ("norm of 7 rows of 96", "_RMSNormBackward", [[7, 96], [96], [7]]),
        ("norm passing on 7 rows of 96", "_RMSNormAndPassBackward", [[7, 96], [96], [7]]),
        ("swiglu of 2 x 7 rows of 100", "_SwiGLUBackward", [[2, 7, 100], [2, 7, 100]]),
        (
            "swiglu of 2 x 17 rows of 136 with updates",
            "_SwiGLULowRankBackward",
            [[2, 17, 136], [2, 17, 136], [34, 16], [136, 16], [34, 16], [136, 16]],
        ),
        ("rope of 7 tokens, 6 and 2 heads of 24", "_RopeBackward", [[7, 24], [7, 24]]),
    ],
)
def test_a_kernel_keeps_its_inputs_only(interpreted: dict[str, Any], name: str, node: str, kept: list[Any]) -> None:
    found = interpreted["cases"][f"{name} in bf16"]
    assert (found["node"], found["kept"]) == (node, kept)


@needs_triton
def test_a_norm_of_which_one_result_is_used_has_that_ones_gradient(interpreted: dict[str, Any]) -> None:
    assert interpreted["one_sided"] == [True, True]


def check_low_rank(found: dict[str, float], dtype: str, *, rounds: bool) -> None:
    """Assert that a sum errs by one rounding.

    :param rounds: whether the kernel rounds to the nearest, as a GPU does, and the interpreter with bf16 does not.
    """
    rounding = {"fp32": 2e-6, "fp16": 2**-11, "bf16": 2**-8}[dtype]
    assert found["plain"] <= 1.01 * rounding
    assert found["fused"] <= 1.01 * (rounding if rounds else 2 * rounding)


@needs_triton
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", LOW_RANK)
def test_an_interpreted_low_rank_update_is_the_exact_sum_rounded_once(
    interpreted: dict[str, Any], name: str, dtype: str
) -> None:
    check_low_rank(interpreted["low_rank"][f"{name} in {dtype}"], dtype, rounds=dtype != "bf16")


@needs_triton
def test_a_trained_norm_weight_gets_its_gradient(interpreted: dict[str, Any]) -> None:
    assert interpreted["trained"]


@needs_triton
def test_a_kernel_that_is_switched_off_is_not_used(interpreted: dict[str, Any]) -> None:
    assert interpreted["off"] == "MulBackward0"


@needs_triton
def test_triton_is_not_imported_where_no_kernel_runs(interpreted: dict[str, Any]) -> None:
    assert interpreted["unused"]


# ---- Triton, compiled --------------------------------------------------------------------------------------------

POINTERS = (
    "x", "weight", "out", "gate", "up", "of_gate", "of_up", "grad", "passed", "q", "k", "q_out", "k_out", "cos", "sin",
    "gate_inner", "gate_factor", "up_inner", "up_factor", "inner", "factor", "residual",
)  # fmt: skip
TILE = {"depth": 16, "rows": 64, "columns": 64}
COMPILED = [
    ("triton_norm", "_forward", {"width": 4096, "height": 1, "block": 4096}),
    ("triton_norm", "_backward", {"passes": False, "width": 4096, "height": 1, "block": 4096}),
    ("triton_norm", "_backward", {"passes": True, "width": 4096, "height": 1, "block": 4096}),
    ("triton_low_rank", "_add", {"adds": False, "rank": 16, **TILE}),
    ("triton_low_rank", "_add", {"adds": True, "rank": 16, **TILE}),
    ("triton_low_rank", "_gated", {"gate_rank": 16, "up_rank": 16, **TILE}),
    ("triton_low_rank", "_gated_backward", {"gate_rank": 16, "up_rank": 16, **TILE}),
    ("triton_swiglu", "_forward", {"block": 1024}),
    ("triton_swiglu", "_backward", {"block": 1024}),
    ("triton_rope", "_rotate", {"half": 64, "together": 16, "block": 64, "back": False}),
    ("triton_rope", "_rotate", {"half": 64, "together": 16, "block": 64, "back": True}),
]


@needs_triton
@pytest.mark.parametrize(("module", "kernel", "constants"), COMPILED)
def test_a_kernel_compiles_for_a_gpu_that_need_not_be_there_and_moves_16_bytes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, kernel: str, constants: dict[str, Any]
) -> None:
    from importlib import import_module

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(import_module(f"lavintk.kernels.{module}"), kernel)
    kinds = (
        {"rstd_ptr": "*fp32", "product_ptr": "*fp32", "eps": "fp32", "scale": "fp32"}
        | {f"{name}_scale": "fp32" for name in ("gate", "up")}
        | {f"{name}_ptr": "*bf16" for name in POINTERS}
    )
    signature = {
        name: "constexpr" if name in constants else kinds.get(name, "i32") for name in function.arg_names
    }  # fmt: skip
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(signature.items())
        if kind == "*bf16"
        or name == "product_ptr"
        or (kind == "i32" and name.endswith(("stride", "_token", "_head", "width")))
    }
    source = ASTSource(function, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": 4, "enable_fp_fusion": False}
    made = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)
    assert made.asm["cubin"]
    moves = [word for word in made.asm["ptx"].split() if word.startswith(("ld.global", "st.global"))]
    assert moves
    narrow = {"ld.global.b32", "st.global.b32"}  # one fp32 of a row
    if module == "triton_low_rank":
        narrow = {
            "ld.global.v2.b32"
        }  # of the few inner values; the tiles of products have several of 16 bytes a thread
        assert sum(".v4" in move for move in moves) >= 4
    assert {move for move in moves if ".v4" not in move} <= narrow


# ---- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_on_a_gpu_gives_what_torch_gives(name: str, dtype: str) -> None:
    assert problem(torch.device("cuda", torch.cuda.current_device())) == ""
    with using("all"):
        found = figures(CASES[name], TYPES[dtype], "cuda")
    assert found["node"] in (
        "_RMSNormBackward",
        "_RMSNormAndPassBackward",
        "_SwiGLUBackward",
        "_SwiGLULowRankBackward",
        "_RopeBackward",
    )
    check(found, CASES[name].kernel, dtype, rounds=True)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "case",
    [
        Case("rms_norm", ((512, 4096),), norm_of),
        Case("rms_norm_and_pass", ((512, 4096),), norm_of),
        Case("swiglu", ((512, 11008), (512, 11008)), lambda *x: x),
        Case("swiglu_low_rank", ((512, 11008), (512, 11008)), partial(with_updates, ranks=(16, 16))),
        Case("rope", ((512, 32, 128), (512, 8, 128)), heads_of),
    ],
    ids=lambda case: case.kernel,
)
def test_a_kernel_on_a_gpu_gives_what_torch_gives_at_the_size_of_a_model(case: Case, dtype: str) -> None:
    with using("all"):
        check(figures(case, TYPES[dtype], "cuda"), case.kernel, dtype, rounds=True)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize(
    "name",
    [
        "norm of 7 rows of 96",
        "norm passing on 7 rows of 96",
        "swiglu of 2 x 7 rows of 100",
        "swiglu of 2 x 17 rows of 136 with updates",
        "rope of 7 tokens, 6 and 2 heads of 24",
    ],
)
def test_a_recorded_kernel_computes_from_what_its_inputs_hold_at_replay(name: str) -> None:
    case = CASES[name]
    whole = [torch.randn(shape, device="cuda") for shape in case.whole]
    arguments = case.arguments(*whole)  # frozen ones come from the host, which no recording can hold

    def run() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in whole]  # autograd ties a leaf to the stream of its first use
        made = FUSED[case.kernel](*leaves, *arguments[len(leaves) :])
        outputs = made if isinstance(made, tuple) else (made,)
        return [*outputs, *torch.autograd.grad(outputs, leaves, [x.detach() for x in outputs])]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with using("all"), torch.cuda.stream(stream):
        run()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with using("all"), torch.cuda.graph(graph):
        recorded = run()
    for x in whole:
        x.normal_()
    graph.replay()
    with using("all"):
        fresh = run()
    for a, b in zip(recorded, fresh):
        assert torch.equal(a, b)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("shape", "rank"), [*LOW_RANK.values(), ((2048, 4096), 16)])
def test_a_low_rank_update_on_a_gpu_is_the_exact_sum_rounded_once(
    shape: tuple[int, ...], rank: int, dtype: str
) -> None:
    with using("all"):
        check_low_rank(low_rank_errors(shape, rank, TYPES[dtype], "cuda"), dtype, rounds=True)


@pytest.mark.gpu
@needs_triton
def test_a_trained_norm_weight_on_a_gpu_gets_its_gradient() -> None:
    x, weight = torch.randn(7, 96, device="cuda"), torch.ones(96, device="cuda", requires_grad=True)
    rms_norm(x, weight, EPS).sum().backward()
    assert weight.grad is not None


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("call", [partial(rms_norm, eps=EPS), swiglu])
def test_other_number_types_and_nothing_at_all_take_torchs_operations(call: Callable[..., Tensor]) -> None:
    wide = torch.randn(7, 96, device="cuda", dtype=torch.float64)
    assert call(wide, wide[0] if call is not swiglu else wide).shape == (7, 96)
    empty = torch.randn(0, 96, device="cuda")
    assert call(empty, wide[0].float() if call is not swiglu else empty).shape == (0, 96)

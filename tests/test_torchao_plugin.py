"""The plugin ``torchao``: AdamW with quantized state, and Muon, against torch's own optimizers."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lavintk
import lavintk_torchao
from lavintk.errors import OptionsError, PluginError, TrainingError
from lavintk.registry import Choice, Registry
from lavintk.run import Run
from lavintk.testing import check_optimizer
from lavintk.testing.managers import PluginManager
from lavintk.testing.runs import recipe
from tests.test_train import PressCtrlC, weights

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
QUANTIZED = ["adamw-4bit", "adamw-fp8"]
RATES = {"adamw-4bit": 0.1, "adamw-fp8": 0.05, "muon": 0.25}
"""What the kit's quadratic wants: 4 bits hold small second moments as 1/16 of the largest, which shortens steps."""
BETAS, EPS, RATE = (0.9, 0.99), 1e-8, 1e-2


def make(text: str) -> Any:
    registry: Registry[Any] = Registry("optimizer")
    lavintk_torchao.lavintk_register_optimizers(registry.owned_by("torchao"))
    return registry.create(Choice.parse(text))


def make_parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(*shape, generator=generator)) for shape in shapes]


def build(text: str, parameters: list[nn.Parameter], decay: float = 0.1) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = make(text).build(
        [{"params": parameters, "weight_decay": decay}], lr=RATE, betas=BETAS, eps=EPS
    )
    return optimizer


def train(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: int = 5) -> list[Tensor]:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("name", [*(pytest.param(name, marks=needs_torchao) for name in QUANTIZED), "muon"])
def test_they_keep_the_promises_of_an_optimizer(name: str) -> None:
    report = check_optimizer(lambda: make(name), lr=RATES[name], language_lr=0.01)
    assert len(report.kept) > 8


# AdamW


@needs_torchao
@pytest.mark.parametrize("name", QUANTIZED)
def test_small_parameters_take_the_steps_of_torchs_adamw(name: str) -> None:
    shapes = (31, 33), (7,)
    ours, theirs = make_parameters(*shapes), make_parameters(*shapes)
    found = train(ours, build(name, ours))
    expected = train(theirs, torch.optim.AdamW(theirs, lr=RATE, betas=BETAS, eps=EPS, weight_decay=0.1))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@needs_torchao
@pytest.mark.parametrize(("name", "bits", "error"), [("adamw-4bit", 4 + 32 / 128, 0.5), ("adamw-fp8", 8.125, 0.05)])
def test_large_ones_take_nearly_those_steps_with_a_state_of_few_bits(name: str, bits: float, error: float) -> None:
    ours, theirs = make_parameters((128, 256)), make_parameters((128, 256))
    start = ours[0].detach().clone()
    optimizer = build(name, ours, decay=0.0)
    (found,) = train(ours, optimizer)
    (expected,) = train(theirs, torch.optim.AdamW(theirs, lr=RATE, betas=BETAS, eps=EPS, weight_decay=0.0))
    assert float((found - expected).norm() / (expected - start).norm()) < error
    moments: list[Any] = [optimizer.state[ours[0]][key] for key in ("exp_avg", "exp_avg_sq")]
    for moment in moments:
        stored = sum(8 * part.numel() * part.element_size() for part in (moment.codes, moment.scale))
        assert stored / found.numel() == bits


@needs_torchao
@pytest.mark.parametrize("name", QUANTIZED)
def test_the_learning_rate_stays_a_number_that_is_saved(name: str) -> None:
    optimizer = build(name, make_parameters((4, 4)))
    assert optimizer.state_dict()["param_groups"][0]["lr"] == RATE
    optimizer.param_groups[0]["lr"] = 0.5 * RATE
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.5 * RATE


@needs_torchao
def test_only_a_compiled_step_needs_a_compiler_and_says_so() -> None:
    from torch._inductor import config

    with config.patch({"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True}):
        parameters = make_parameters((64, 64))
        train(parameters, build("adamw-fp8", parameters), steps=1)
        with pytest.raises(TrainingError, match=r"needs a C\+\+ compiler on a CPU, .* Leave the option compile out"):
            train(parameters, build("adamw-fp8:compile=true", parameters), steps=1)


@needs_torchao
def test_other_devices_and_no_parameters_are_refused() -> None:
    with pytest.raises(TrainingError, match="on a CPU or with CUDA, not on meta: use --optim adamw"):
        build("adamw-4bit", [nn.Parameter(torch.empty(4, 4, device="meta"))])
    for name in ("adamw-4bit", "muon"):
        with pytest.raises(TrainingError, match="no parameters to train"):
            make(name).build([], lr=RATE, betas=BETAS, eps=EPS)


@needs_torchao
def test_an_interrupted_run_resumes_to_exactly_the_same_weights(
    tiny_folder: Path, tmp_path: Path, plugin_manager: PluginManager
) -> None:
    if "torchao" not in plugin_manager.plugins.names():
        plugin_manager.register(lavintk_torchao, "torchao")
    content = recipe(tiny_folder, max_steps=5) | {"optim": "adamw-4bit", "adapter": {"name": "lora", "r": 64}}
    straight = weights(lavintk.train(content, tmp_path / "straight"))
    plugin_manager.register(PressCtrlC(2), "ctrl-c")
    stopped = lavintk.train(content, tmp_path / "resumed")
    assert stopped.manifest["status"] == "interrupted"
    resumed = lavintk.train(Run.open(tmp_path / "resumed").recipe, tmp_path / "resumed", resume=True)
    assert resumed.manifest["status"] == "finished"
    for name, expected in straight.items():
        assert torch.equal(weights(resumed)[name], expected), name


# Muon


def test_matrices_take_the_steps_of_muon_and_the_rest_those_of_adamw() -> None:
    shapes = (24, 16), (9,), (2, 3, 4)
    ours, theirs = make_parameters(*shapes), make_parameters(*shapes)
    found = train(ours, build("muon:momentum=0.9,steps=4", ours))
    muon = torch.optim.Muon(
        theirs[:1], lr=RATE, momentum=0.9, ns_steps=4, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(theirs[1:], lr=RATE, betas=BETAS, eps=EPS, weight_decay=0.1)
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for parameter in theirs:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        muon.step()
        adamw.step()
    assert all(torch.equal(one, other.detach()) for one, other in zip(found, theirs, strict=True))


def test_its_steps_have_a_fifth_of_the_learning_rates_size() -> None:
    parameters = make_parameters((64, 96))
    before = parameters[0].detach().clone()
    (after,) = train(parameters, build("muon", parameters, decay=0.0), steps=1)
    # the singular values are near 1, so those of a wide matrix have the mean square 1 / 96
    assert float((after - before).square().mean().sqrt()) == pytest.approx(0.2 * RATE, rel=0.15)


def test_a_copy_of_it_goes_on_alike_and_alone() -> None:
    parameters = make_parameters((8, 6), (5,))
    optimizer = build("muon", parameters)
    train(parameters, optimizer, steps=2)
    others, other = copy.deepcopy((parameters, optimizer))
    found = train(others, other, steps=2)
    assert all(not torch.equal(one, two) for one, two in zip(parameters, found, strict=True))
    assert all(torch.equal(one, two) for one, two in zip(train(parameters, optimizer, steps=2), found, strict=True))


@pytest.mark.parametrize(
    ("text", "found"),
    [("muon:momentum=1", "at least 0 and below 1, got 1"), ("muon:steps=0", "from 1 to 99, got 0")],
)
def test_options_that_mean_nothing_are_refused(text: str, found: str) -> None:
    with pytest.raises(OptionsError, match=found):
        make(text)


# Without the package


@pytest.mark.parametrize("name", QUANTIZED)
def test_without_the_package_the_plugin_says_what_is_missing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "lavintk_torchao.adamw", raising=False)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(
        PluginError, match=rf"optimizer '{name}' \(plugin torchao\) cannot be used: .*torchao.* Install"
    ):
        make(name)
    assert make("muon").state_bits == 32


def test_registering_imports_neither_the_package_nor_torch() -> None:
    code = "import sys, lavintk_torchao; assert not {'torchao', 'torch'} & set(sys.modules), 'too much is imported'"
    subprocess.run([sys.executable, "-c", code], check=True)

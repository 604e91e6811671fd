"""Does the optimizer keep its promises, and does lavintk train with it?"""

from collections.abc import Callable
from pathlib import Path

import torch
from lavintk_signum import SignumOptions, make_signum

from lavintk.testing import Outcome, TinyModel, check_optimizer

RunCli = Callable[..., Outcome]


def test_the_optimizer_keeps_its_promises() -> None:
    check_optimizer(lambda: make_signum(SignumOptions()))


def test_the_first_step_is_as_long_as_the_learning_rate() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, -1.0, 0.5]))
    groups = [{"params": [parameter], "weight_decay": 0.0}]
    optimizer = make_signum(SignumOptions()).build(groups, lr=0.125, betas=(0.9, 0.999), eps=1e-8)
    parameter.grad = torch.tensor([3.0, -0.01, 0.0])
    optimizer.step()
    assert parameter.tolist() == [0.875, -0.875, 0.5]


def test_lavintk_finds_the_plugin(run_cli: RunCli) -> None:
    assert "optimizer signum (plugin signum)" in run_cli("plugins", "show", "signum").stdout


def test_a_model_trains_with_it(run_cli: RunCli, tiny_llm: TinyModel, tmp_path: Path) -> None:
    outcome = run_cli("train", *tiny_llm.arguments(), "--optim", "signum", "--out", str(tmp_path / "run"))
    assert outcome.exit_code == 0, outcome.stderr

"""Does the adapter keep its promises, and does lavintk train it?"""

from collections.abc import Callable
from pathlib import Path

from lavintk_lowrank import LowrankOptions, make_lowrank

from lavintk.testing import Outcome, TinyModel, check_adapter

RunCli = Callable[..., Outcome]


def test_the_adapter_keeps_its_promises() -> None:
    check_adapter(lambda: make_lowrank(LowrankOptions(rank=4)))


def test_lavintk_finds_the_plugin(run_cli: RunCli) -> None:
    assert "adapter lowrank (plugin lowrank)" in run_cli("plugins", "show", "lowrank").stdout


def test_a_model_trains_with_it(run_cli: RunCli, tiny_llm: TinyModel, tmp_path: Path) -> None:
    outcome = run_cli("train", *tiny_llm.arguments(), "--adapter", "lowrank:rank=4", "--out", str(tmp_path / "run"))
    assert outcome.exit_code == 0, outcome.stderr

"""Does the quantizer keep its promises, and does lavintk train with it?"""

from collections.abc import Callable
from pathlib import Path

import torch
from lavintk_log4 import Log4Options, make_log4

from lavintk.testing import Outcome, TinyModel, check_quantizer

RunCli = Callable[..., Outcome]


def test_the_quantizer_keeps_its_promises() -> None:
    check_quantizer(lambda: make_log4(Log4Options()), max_error=0.12)


def test_blocks_of_another_size_keep_them_too() -> None:
    check_quantizer(lambda: make_log4(Log4Options(block_size=64)), max_error=0.12)


def test_a_weight_on_the_grid_is_kept_as_it_is() -> None:
    quantizer = make_log4(Log4Options(block_size=4, ratio=2.0))
    weight = torch.tensor([[8.0, -4.0, 2.0, 0.0625], [-0.5, 0.25, 0.125, -0.0625]])
    assert torch.equal(quantizer.quantize(weight, None).dequantize(), weight)


def test_lavintk_finds_the_plugin(run_cli: RunCli) -> None:
    assert "quantizer log4 (plugin log4)" in run_cli("plugins", "show", "log4").stdout


def test_a_model_trains_on_it(run_cli: RunCli, tiny_llm: TinyModel, tmp_path: Path) -> None:
    outcome = run_cli("train", *tiny_llm.arguments(), "--quant", "log4", "--out", str(tmp_path / "run"))
    assert outcome.exit_code == 0, outcome.stderr

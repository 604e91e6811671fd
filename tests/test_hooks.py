"""Every hook does what docs/plugins/hooks.md says: each test installs the example there and looks at its effect."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lavintk
from lavintk import hookspecs
from lavintk.data.records import Message, Record
from lavintk.plugins import Plugins, installed_plugins, load_plugins
from lavintk.registry import Choice
from lavintk.testing import Outcome, TinyModel, check_adapter, check_optimizer, check_quantizer

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/plugins/hooks.md").read_text(encoding="utf-8")
SPECS = {name: spec for name, spec in vars(hookspecs).items() if name.startswith("lavintk_")}
EXAMPLES = dict(re.findall(r"^<!-- example: (\w+) -->\n```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))

RunCli = Callable[..., Outcome]
Install = Callable[..., Path]
Use = Callable[[str], Plugins]


@pytest.fixture
def use(install_plugin: Install) -> Use:
    """Return a function that installs the example of a hook as the plugin ``example``."""

    def install(hook: str) -> Plugins:
        install_plugin("example", EXAMPLES[hook])
        installed_plugins.cache_clear()
        plugins = load_plugins()
        (record,) = [record for record in plugins.records() if record.name == "example"]
        assert (record.hooks, record.api) == ((hook,), 1)
        return plugins

    return install


def train(run_cli: RunCli, model: TinyModel, out: Path, *arguments: str) -> Outcome:
    outcome = run_cli("train", *model.arguments(steps=2), *arguments, "--out", str(out))
    assert outcome.exit_code == 0, outcome.stderr
    return outcome


# The page


def test_each_hook_is_a_heading_with_exactly_its_arguments() -> None:
    headings = dict(re.findall(r"^### (lavintk_\w+)\((.*)\)$", PAGE, re.MULTILINE))
    assert list(headings) == list(SPECS)
    for name, spec in SPECS.items():
        arguments = {p.name: str(p.annotation) for p in inspect.signature(spec).parameters.values()}
        assert headings[name] == ", ".join(f"{argument}: {kind}" for argument, kind in arguments.items())


def test_each_hook_has_an_example_below_its_heading_that_implements_it() -> None:
    parts = dict(re.findall(r"^### (lavintk_\w+)\(.*?\)$(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL))
    for name in SPECS:
        assert f"<!-- example: {name} -->" in parts[name]
        assert f"@hookimpl\ndef {name}(" in EXAMPLES[name]


def test_each_hook_has_a_test_that_is_called_like_it() -> None:
    tests = {
        node.name
        for file in (ROOT / "tests").glob("test_*.py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    assert not [name for name in SPECS if not any(re.match(f"test_hook_{name}(_|$)", test) for test in tests)]


# Offering something


def test_hook_lavintk_register_quantizers_offers_what_train_takes(
    use: Use, run_cli: RunCli, tiny_llm: TinyModel, tmp_path: Path
) -> None:
    entry = use("lavintk_register_quantizers").quantizers["half"]
    check_quantizer(lambda: entry.create(), max_error=1e-3)
    weight = torch.randn(8, 4)
    assert torch.equal(entry.create().quantize(weight, None).dequantize(), weight.half().float())
    train(run_cli, tiny_llm, tmp_path / "run", "--quant", "half")


def test_hook_lavintk_register_optimizers_offers_what_train_takes(
    use: Use, run_cli: RunCli, tiny_llm: TinyModel, tmp_path: Path
) -> None:
    entry = use("lavintk_register_optimizers").optimizers["adagrad"]
    check_optimizer(lambda: entry.create(), lr=0.3)
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = entry.create().build([{"params": [parameter], "weight_decay": 0.0}], lr=0.5, betas=(0.9, 0.9), eps=0.0)
    parameter.grad = torch.full((1,), 3.0)
    optimizer.step()
    assert parameter.item() == pytest.approx(1 - 0.5 * 3 / np.sqrt(3**2))
    train(run_cli, tiny_llm, tmp_path / "run", "--optim", "adagrad")


def test_hook_lavintk_register_adapters_offers_what_train_takes(
    use: Use, run_cli: RunCli, tiny_llm: TinyModel, tmp_path: Path
) -> None:
    entry = use("lavintk_register_adapters").adapters["biases"]
    check_adapter(lambda: entry.create())
    train(run_cli, tiny_llm, tmp_path / "run", "--adapter", "biases")
    named = lavintk.load(tmp_path / "run").assembly.model.trainable()
    assert named
    assert all(parameter.abs().max() > 0 for parameter in named.values())


def test_hook_lavintk_register_exporters_offers_what_export_takes(
    use: Use, run_cli: RunCli, tiny_run: lavintk.Run, tmp_path: Path
) -> None:
    use("lavintk_register_exporters")
    outcome = run_cli("export", str(tiny_run.folder), "--format", "updates", "--out", str(tmp_path / "out"))
    assert outcome.exit_code == 0, outcome.stderr
    written = np.load(tmp_path / "out" / "updates.npz")
    adapter = tiny_run.assembly.model.adapter
    assert adapter is not None
    for update in adapter.affine_updates():
        assert np.array_equal(written[f"all.{update.linear}.up"], update.up.numpy())


def test_hook_lavintk_register_datasets_offers_what_data_takes(
    use: Use, run_cli: RunCli, tiny_llm: TinyModel, tmp_path: Path
) -> None:
    records = use("lavintk_register_datasets").datasets.create(Choice.parse("sums:largest=2")).load("train")
    assert [(record.id, record.reference) for record in records][-1] == ("2+2", "4")
    assert len(records) == 9
    train(run_cli, tiny_llm, tmp_path / "run", "--data", "sums:largest=2")


def test_hook_lavintk_register_evaluations_offers_what_eval_takes(use: Use) -> None:
    class Model:
        def answer(self, records: Sequence[Record], *, max_new_tokens: int) -> list[str]:
            return ["It is Red.", "no"]

        def log_likelihoods(self, records: Any, completions: Any) -> Any:
            raise NotImplementedError

    evaluation = use("lavintk_register_evaluations").evaluations["contains"].create()
    records = [Record(answer, (Message("user", "?"), Message("assistant", answer))) for answer in ("red", "blue")]
    assert evaluation.evaluate(Model(), records, max_new_tokens=4).scores == {"accuracy": 0.5, "questions": 2}


def test_hook_lavintk_register_commands_adds_a_command(
    use: Use, run_cli: RunCli, tiny_run: lavintk.Run, tmp_path: Path
) -> None:
    use("lavintk_register_commands")
    assert run_cli("status", str(tiny_run.folder)) == Outcome(0, "finished\n", "")


# Following a run


def test_hook_lavintk_run_started_is_called_with_the_recipe(
    use: Use, run_cli: RunCli, tiny_llm: TinyModel, tmp_path: Path
) -> None:
    use("lavintk_run_started")
    train(run_cli, tiny_llm, tmp_path / "run")
    asked = json.loads((tmp_path / "run/asked/recipe.json").read_text())
    assert asked == json.loads((tmp_path / "run/manifest.json").read_text())["recipe"]


def test_hook_lavintk_step_finished_is_called_with_each_step(
    use: Use, run_cli: RunCli, tiny_llm: TinyModel, tmp_path: Path
) -> None:
    use("lavintk_step_finished")
    train(run_cli, tiny_llm, tmp_path / "run")
    *_, last = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert re.fullmatch(r"2 of 2, loss \d+\.\d{3}", (tmp_path / "run/progress/now").read_text())
    assert (tmp_path / "run/progress/now").read_text().endswith(f"{json.loads(last)['loss']:.3f}")


def test_hook_lavintk_evaluation_finished_is_called_with_the_scores(
    use: Use, run_cli: RunCli, tiny_llm: TinyModel, tmp_path: Path
) -> None:
    use("lavintk_evaluation_finished")
    printed = train(run_cli, tiny_llm, tmp_path / "run", f"--set=data.test={tiny_llm.choice}").stdout
    scores = dict(re.findall(r"^score exact-match (\w+) (\S+) at step 2$", printed, re.MULTILINE))
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert float(scores["accuracy"]) == manifest["evaluation"]["accuracy_after"]


def test_hook_lavintk_checkpoint_saved_is_called_with_its_folder(
    use: Use, run_cli: RunCli, tiny_llm: TinyModel, tmp_path: Path
) -> None:
    use("lavintk_checkpoint_saved")
    train(run_cli, tiny_llm, tmp_path / "run")
    newest = (tmp_path / "run/newest/checkpoint").read_text()
    assert (tmp_path / "run/checkpoints" / newest).is_dir()


def test_hook_lavintk_run_finished_is_called_with_how_it_ended(
    use: Use, run_cli: RunCli, tiny_llm: TinyModel, tmp_path: Path
) -> None:
    use("lavintk_run_finished")
    assert "\acustom is finished after 2 steps were planned" in train(run_cli, tiny_llm, tmp_path / "run").stdout

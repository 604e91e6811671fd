from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lavintk import __version__
from lavintk.cli import main
from lavintk.cli.train import FLAGS
from lavintk.errors import RecipeError
from lavintk.recipe import known_keys, make_recipe, read_recipe
from lavintk.testing import Outcome

RunCli = Callable[..., Outcome]
COMMANDS = ("train", "eval", "chat", "import", "data", "models", "plugins", "doctor")


def resolved(outcome: Outcome) -> dict[str, Any]:
    """Return the recipe that ``--dry-run`` printed."""
    assert outcome.exit_code == 0, outcome.stderr
    content: dict[str, Any] = yaml.safe_load(outcome.stdout)
    return content


# Help and mistakes


@pytest.mark.parametrize("arguments", [["--help"], ["-h"]])
def test_help_names_every_command(run_cli: RunCli, arguments: list[str]) -> None:
    outcome = run_cli(*arguments)
    assert outcome.exit_code == 0
    for command in COMMANDS:
        assert f"\n  {command} " in outcome.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_of_its_own(run_cli: RunCli, command: str) -> None:
    outcome = run_cli(command, "--help")
    assert outcome.exit_code == 0
    assert outcome.stdout.startswith(f"Usage: lavintk {command} ")


def test_the_version_is_printed(run_cli: RunCli) -> None:
    assert run_cli("--version") == Outcome(0, f"lavintk, version {__version__}\n", "")


def test_an_unknown_command_is_refused_with_a_way_to_help(run_cli: RunCli) -> None:
    outcome = run_cli("trian")
    assert outcome.exit_code == 2
    assert "No such command 'trian'" in outcome.stderr
    assert "'lavintk --help'" in outcome.stderr
    assert outcome.stdout == ""


def test_an_unknown_flag_is_refused_with_a_suggestion(run_cli: RunCli) -> None:
    outcome = run_cli("train", "--optimm", "paged")
    assert outcome.exit_code == 2
    assert "--optimm" in outcome.stderr
    assert "'--optim'" in outcome.stderr


# Errors


def test_an_expected_error_is_one_message_without_a_traceback(run_cli: RunCli) -> None:
    outcome = run_cli("train", "deemo")
    assert outcome.exit_code == 1
    assert outcome.stdout == ""
    assert outcome.stderr.startswith("Error: recipe 'deemo' has 1 fault:\n")
    assert "Did you mean 'demo'?" in outcome.stderr
    assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize("arguments", [["--debug", "train", "deemo"], ["train", "deemo", "--debug"]])
def test_debug_lets_the_traceback_through(arguments: list[str]) -> None:
    with pytest.raises(RecipeError, match="deemo"):
        main(arguments)


def test_anything_else_is_a_bug_and_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(reference: str) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("lavintk.recipe.read_recipe", fail)
    with pytest.raises(ZeroDivisionError):
        main(["train", "demo", "--dry-run"])


def test_ctrl_c_ends_a_command_with_130(run_cli: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(reference: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lavintk.recipe.read_recipe", interrupt)
    outcome = run_cli("train", "demo")
    assert outcome.exit_code == 130
    assert "Traceback" not in outcome.stderr


def test_all_faults_of_a_recipe_are_shown_together(run_cli: RunCli, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: {langauge: x}\ndata: {train: 'alpaca:a.json'}\ntrain: {lr: -1}\n")
    outcome = run_cli("train", str(recipe), "--batch-size", "0", "--dry-run")
    assert outcome.exit_code == 1
    assert "recipe 'mine' has 4 faults:" in outcome.stderr
    assert "model.language is required" in outcome.stderr
    assert "unknown key 'model.langauge'. Did you mean 'model.language'?" in outcome.stderr
    assert "train.lr: " in outcome.stderr
    assert "train.batch_size: " in outcome.stderr


def test_faults_in_the_options_of_plugins_are_shown_together(run_cli: RunCli) -> None:
    outcome = run_cli("train", "--quant", "nf5", "--optim", "adamw:momentum=1", "--dry-run")
    assert outcome.exit_code == 1
    assert "recipe 'demo' has 2 faults:" in outcome.stderr
    assert "no quantizer named 'nf5'" in outcome.stderr
    assert "unknown option 'momentum'" in outcome.stderr


# train --dry-run


def test_without_recipe_model_and_data_the_demo_runs(run_cli: RunCli) -> None:
    assert resolved(run_cli("train", "--dry-run")) == make_recipe(read_recipe("demo")).dump()


def test_what_a_dry_run_prints_is_a_recipe_with_every_key(run_cli: RunCli, tmp_path: Path) -> None:
    first = run_cli("train", "demo", "--quant", "nf4:double_quant=false", "--dry-run")
    for key in known_keys():
        section, _, leaf = key.partition(".")
        assert section in resolved(first)
        assert not leaf or leaf in resolved(first)[section]
    recipe = tmp_path / "again.yaml"
    recipe.write_text(first.stdout, encoding="utf-8")
    assert run_cli("train", str(recipe), "--dry-run").stdout == first.stdout


def test_a_dry_run_leaves_nothing_behind(run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_cli("train", "demo", "--out", "here", "--dry-run")
    assert list(tmp_path.iterdir()) == []


def test_flags_override_the_recipe(run_cli: RunCli) -> None:
    flags = ["--quant", "none", "--optim", "adamw", "--lr", "0.5", "--max-steps", "7", "--seed", "3"]
    made = resolved(run_cli("train", "demo", *flags, "--dry-run"))
    assert (made["quant"], made["optim"]) == ("none", "adamw")
    assert (made["train"]["lr"], made["train"]["max_steps"], made["train"]["seed"]) == (0.5, 7, 3)
    assert made["model"]["language"] == "smollm2-135m-instruct"


def test_every_flag_sets_a_key_that_exists() -> None:
    assert set(FLAGS.values()) <= set(known_keys())


def test_set_overrides_any_key_and_wins_over_flags(run_cli: RunCli) -> None:
    assignments = ["--set", "train.lr=1e-3", "--set", "train.clip=null", "--set", "quant.double_quant=false"]
    made = resolved(run_cli("train", "demo", "--lr", "0.5", *assignments, "--dry-run"))
    assert made["train"]["lr"] == 1e-3
    assert made["train"]["clip"] is None
    assert made["quant"] == {"name": "nf4", "double_quant": False}


def test_set_refuses_an_unknown_key_with_a_suggestion(run_cli: RunCli) -> None:
    outcome = run_cli("train", "demo", "--set", "train.learning_rat=1", "--dry-run")
    assert outcome.exit_code == 1
    assert "unknown key 'train.learning_rat'" in outcome.stderr


def test_model_and_data_are_enough_for_a_recipe(run_cli: RunCli) -> None:
    arguments = ["--model", "some/model", "--data", "alpaca:a.json", "--adapter", "lora:r=4"]
    made = resolved(run_cli("train", *arguments, "--dry-run"))
    assert made["model"]["language"] == "some/model"
    assert made["data"]["train"] == {"name": "alpaca", "path": "a.json"}
    assert made["adapter"] == {"name": "lora", "r": "4"}


def test_a_model_without_data_says_what_is_missing(run_cli: RunCli) -> None:
    outcome = run_cli("train", "--model", "some/model", "--dry-run")
    assert outcome.exit_code == 1
    assert "data.train is required" in outcome.stderr


def test_resume_takes_no_other_settings(run_cli: RunCli, tmp_path: Path) -> None:
    outcome = run_cli("train", "--resume", str(tmp_path), "--lr", "1")
    assert outcome.exit_code == 1
    assert "a run goes on with its own recipe" in outcome.stderr


@pytest.mark.parametrize("command", [["train", "--resume"], ["eval"]])
def test_a_folder_that_is_no_run_is_said_to_be_none(run_cli: RunCli, tmp_path: Path, command: list[str]) -> None:
    outcome = run_cli(*command, str(tmp_path / "nowhere"))
    assert outcome.exit_code == 1
    assert "does not exist, so it is no run" in outcome.stderr

"""What is said of plugins that are broken, clash, are outdated or slow, and how they are kept out."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lavintk import doctor, plugin_api
from lavintk.errors import PluginError, UnknownNameError
from lavintk.plugins import CORE, installed_plugins, load_plugins, only_builtin
from lavintk.testing import Outcome, TinyModel

RunCli = Callable[..., Outcome]
Install = Callable[..., Path]

OFFERING = """
from lavintk import hookimpl

lavintk_api = 1

@hookimpl
def lavintk_register_quantizers(registry):
    registry.add("mine", lambda options: options, summary="mine")
"""


@pytest.fixture
def only_the_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the doctor look at nothing else."""
    monkeypatch.setattr(doctor, "CHECKS", {"plugins": doctor.check_plugins})


def version(number: int, source: str = OFFERING) -> str:
    return source.replace("lavintk_api = 1", f"lavintk_api = {number}")


def findings() -> dict[str, doctor.Finding]:
    """Return what the doctor finds, by plugin."""
    return {str(finding.facts.get("name", "")): finding for finding in doctor.check_plugins()}


# Versions of the interface


def test_a_plugin_of_a_newer_interface_is_left_out_with_what_it_wants_and_what_helps(
    install_plugin: Install, run_cli: RunCli
) -> None:
    install_plugin("future", version(2), version="3.1")
    outcome = run_cli("plugins", "list")
    assert outcome.exit_code == 0
    assert outcome.stderr == (
        "plugin 'future' of lavintk-future 3.1 is left out: it wants version 2 of lavintk's plugin interface, "
        "and lavintk 0.1.0 has 1.\n"
        "pip install --upgrade lavintk may help; LAVINTK_DISABLE=future takes this message away\n"
    )
    assert not any(line.startswith("future") for line in outcome.stdout.splitlines())
    assert "left out, as it wants another version of the plugin interface: future" in outcome.stdout


def test_a_plugin_of_an_older_interface_is_the_one_to_upgrade(
    install_plugin: Install, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin_api, "SUPPORTED", (2, 3))
    install_plugin("past", OFFERING)
    reason = load_plugins().left_out["past"]
    assert "it wants version 1 of lavintk's plugin interface, and lavintk 0.1.0 has 2 and 3." in reason
    assert "pip install --upgrade lavintk-past may help" in reason


def test_what_a_left_out_plugin_offers_is_not_there_and_the_reason_stands_beside_the_error(
    install_plugin: Install, run_cli: RunCli
) -> None:
    install_plugin("future", version(2))
    outcome = run_cli("train", "demo", "--quant", "mine", "--dry-run")
    assert outcome.exit_code == 1
    assert "plugin 'future' of lavintk-future 1.2.3 is left out" in outcome.stderr
    assert "no quantizer named 'mine'" in outcome.stderr


def test_disabling_an_outdated_plugin_takes_the_message_away(
    install_plugin: Install, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_plugin("future", version(2))
    monkeypatch.setenv("LAVINTK_DISABLE", "future")
    assert run_cli("plugins", "list").stderr == ""


def test_a_plugin_that_cannot_even_be_imported_for_its_version_is_reported_by_its_version(
    install_plugin: Install,
) -> None:
    install_plugin("future", "lavintk_api = 2\nfrom lavintk import something_that_will_come")
    plugins = load_plugins()
    assert "it wants version 2" in plugins.left_out["future"]
    assert "future" not in plugins.names()


def test_hooks_that_only_a_newer_interface_has_do_no_harm(install_plugin: Install) -> None:
    install_plugin("future", version(2, OFFERING.replace("quantizers(registry)", "quantizers(registry, planets)")))
    assert "it wants version 2" in load_plugins().left_out["future"]


def test_a_plugin_that_declares_no_version_is_taken_for_the_first_and_the_doctor_says_so(
    install_plugin: Install,
) -> None:
    install_plugin("silent", OFFERING.replace("lavintk_api = 1", ""))
    assert "mine" in load_plugins().quantizers
    finding = findings()["silent"]
    assert finding.status == "advice"
    assert finding.text == "silent names no version of the plugin interface; 1 is taken"
    assert "lavintk_api = 1" in finding.advice


def test_a_version_that_still_works_but_is_going_is_advice(
    install_plugin: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_plugin("steady", OFFERING)
    monkeypatch.setattr(plugin_api, "SUPPORTED", (1, 2))
    assert "mine" in load_plugins().quantizers
    assert "wants version 1 of the plugin interface, which still works, but is going" in findings()["steady"].text


@pytest.mark.parametrize("declared", ["'1'", "1.0", "True"])
def test_a_version_that_is_no_whole_number_is_an_error(install_plugin: Install, declared: str) -> None:
    install_plugin("odd", OFFERING.replace("= 1", f"= {declared}"))
    with pytest.raises(PluginError, match=r"plugin 'odd' of lavintk-odd failed to load: .*is no whole number"):
        load_plugins()


def test_every_plugin_of_lavintk_declares_the_current_version() -> None:
    records = load_plugins(builtin_only=True).records()
    assert {record.name for record in records if record.api != plugin_api.SUPPORTED[-1]} == set()
    assert len(records) > 10


def test_the_core_declares_it_too() -> None:
    (core,) = [record for record in load_plugins().records() if record.name == CORE]
    assert core.api == plugin_api.SUPPORTED[-1]


# Keeping plugins out


def test_all_plugins_of_strangers_can_be_left_out_at_once(
    install_plugin: Install, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_plugin("stranger", OFFERING)
    install_plugin("broken", "import package_that_nobody_has")
    monkeypatch.setenv("LAVINTK_PLUGINS", "builtin")
    outcome = run_cli("plugins", "list")
    assert outcome.exit_code == 0, outcome.stderr
    assert "left out by LAVINTK_PLUGINS=builtin: stranger" in outcome.stdout
    assert "left out by LAVINTK_PLUGINS=builtin: broken" in outcome.stdout
    plugins = installed_plugins()
    assert "mine" not in plugins.quantizers
    assert {record.distribution for record in plugins.records()} == {"lavintk"}


def test_a_stranger_that_takes_the_name_of_a_builtin_is_left_out_too(
    install_plugin: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_plugin("lora", "raise SystemExit('imported')", distribution="lavintk-impostor")
    with pytest.raises(PluginError, match="plugin 'lora' is offered by lavintk and lavintk-impostor"):
        load_plugins()
    assert load_plugins(builtin_only=True).adapters["lora"].owner == "lora"


def test_what_is_left_out_is_not_imported_by_the_doctor_either(
    install_plugin: Install, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mark = tmp_path / "imported"
    install_plugin("stranger", f"open({str(mark)!r}, 'a').write('x')\n" + OFFERING)
    monkeypatch.setenv("LAVINTK_PLUGINS", "builtin")
    *_, finding = doctor.check_plugins()
    assert finding.text.endswith("others are left out by LAVINTK_PLUGINS=builtin")
    monkeypatch.delenv("LAVINTK_PLUGINS")
    monkeypatch.setenv("LAVINTK_DISABLE", "stranger")
    list(doctor.check_plugins())
    assert not mark.exists()


def test_another_wish_than_builtin_is_an_error_with_what_it_may_be(
    run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAVINTK_PLUGINS", "none")
    with pytest.raises(PluginError, match="LAVINTK_PLUGINS=none means nothing: set it to builtin"):
        only_builtin()
    assert run_cli("--help").exit_code == 1
    *_, finding = doctor.check_plugins()
    assert finding.status == "fault"


# Faults at run time


def test_a_hook_that_fails_in_training_names_plugin_hook_and_way_out(
    install_plugin: Install, run_cli: RunCli, tiny_llm: TinyModel, tmp_path: Path
) -> None:
    source = "from lavintk import hookimpl\n@hookimpl\ndef lavintk_step_finished(step):\n    step.step / 0\n"
    install_plugin("faulty", source)
    outcome = run_cli("train", *tiny_llm.arguments(), "--out", str(tmp_path / "run"))
    assert outcome.exit_code == 1
    assert "plugin 'faulty' failed in lavintk_step_finished: ZeroDivisionError: division by zero" in outcome.stderr
    assert "LAVINTK_DISABLE=faulty" in outcome.stderr


def test_a_factory_that_fails_names_plugin_and_what_was_to_be_made(
    install_plugin: Install, run_cli: RunCli, tiny_llm: TinyModel, tmp_path: Path
) -> None:
    install_plugin("faulty", OFFERING.replace("lambda options: options", "lambda options: options.nothing"))
    with pytest.raises(PluginError, match="plugin 'faulty' failed to make quantizer 'mine': AttributeError") as caught:
        load_plugins().quantizers["mine"].create()
    assert "LAVINTK_DISABLE=faulty" in str(caught.value)
    assert isinstance(caught.value.__cause__, AttributeError)


FAULTY_LATER = """
from lavintk import hookimpl

class Faulty:
    requires_cuda = False

    def quantize(self, weight, bias):
        return {}["scale"]

@hookimpl
def lavintk_register_quantizers(registry):
    registry.add("mine", lambda options: Faulty())
"""


def test_a_fault_deep_in_a_plugins_code_keeps_its_traceback_and_names_the_plugin(
    install_plugin: Install, run_cli: RunCli, tiny_llm: TinyModel, tmp_path: Path
) -> None:
    install_plugin("faulty", FAULTY_LATER)
    with pytest.raises(KeyError) as caught:
        run_cli("train", *tiny_llm.arguments(), "--quant", "mine", "--out", str(tmp_path / "run"))
    (note,) = caught.value.__notes__
    assert note.startswith("this came through plugin 'faulty': quantize, ")
    assert note.endswith("lavintk_faulty.py, line 8; skip the plugin with LAVINTK_DISABLE=faulty")


def test_a_fault_of_the_core_names_no_plugin() -> None:
    with pytest.raises(UnknownNameError) as caught:
        load_plugins().quantizers["mine"]
    assert load_plugins().blame(caught.value) == ""


# What the doctor says


def test_the_doctor_tells_broken_clashing_outdated_and_slow_plugins_apart(
    install_plugin: Install, run_cli: RunCli, only_the_plugins: None
) -> None:
    install_plugin("broken", "import package_that_nobody_has")
    install_plugin("one", OFFERING)
    install_plugin("two", OFFERING)
    install_plugin("outdated", version(0).replace('"mine"', '"old"'))
    install_plugin("slow", "import time\ntime.sleep(0.6)\n" + OFFERING.replace('"mine"', '"late"'))
    outcome = run_cli("doctor")
    said = " ".join(outcome.stdout.split())
    assert outcome.exit_code == 1
    assert "broken failed to load: ModuleNotFoundError" in said
    assert "quantizer 'mine' is offered by plugin 'one' and by plugin 'two'" in said
    assert "slow takes 0.6 s to load" in said
    assert "every command waits for it" in said


def test_the_doctor_names_an_outdated_plugin(install_plugin: Install) -> None:
    install_plugin("outdated", version(0))
    install_plugin("future", "lavintk_api = 2\nfrom lavintk import something_that_will_come")
    found = findings()
    assert (found["outdated"].status, found["future"].status) == ("fault", "fault")
    assert "it wants version 0" in found["outdated"].text
    assert "it wants version 2" in found["future"].text
    assert "LAVINTK_DISABLE=outdated" in found["outdated"].advice


def test_the_doctor_says_which_heavy_package_a_plugin_imports_however_quick_that_was(install_plugin: Install) -> None:
    install_plugin("heavy", "import numpy\n" + OFFERING)
    finding = findings()["heavy"]
    assert finding.status == "advice"
    assert finding.text.endswith("s to load, and imports numpy")


def test_the_doctor_shows_the_import_time_of_each_plugin(install_plugin: Install) -> None:
    install_plugin("mine", OFFERING)
    *_, finding = doctor.check_plugins()
    assert {"mine", "lora"} <= set(finding.facts["seconds"])
    assert all(seconds >= 0 for seconds in finding.facts["seconds"].values())


def test_what_the_package_declares_is_read_without_running_it(install_plugin: Install) -> None:
    install_plugin("mine", "raise SystemExit\nlavintk_api = 7\n")
    assert plugin_api.declared_in_source("lavintk_mine") == 7
    assert plugin_api.declared_in_source("lavintk_that_nobody_has") is None
    assert "lavintk_mine" not in sys.modules
    command = [sys.executable, "-c", "import sys, lavintk.plugin_api as api; print('torch' in sys.modules)"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pluggy
import pytest

from lavintk import builtin, hookimpl, hookspecs
from lavintk.contracts import RunInfo
from lavintk.errors import LavintkError, PluginError
from lavintk.plugins import CORE, Plugins, disabled_names, load_plugins
from lavintk.testing import Outcome

HELLO = """
from dataclasses import dataclass, field
from lavintk import hookimpl

@dataclass(frozen=True)
class HelloOptions:
    rank: int = field(default=3, metadata={"help": "how loud"})

@hookimpl
def lavintk_register_adapters(registry):
    registry.add("hello", lambda options: options, options=HelloOptions, summary="says hello")
"""

RunCli = Callable[..., Outcome]
Install = Callable[..., Path]


class Recorder:
    """A plugin of all life-cycle hooks."""

    def __init__(self) -> None:
        self.heard: list[tuple[object, ...]] = []

    @hookimpl
    def lavintk_run_started(self, run: RunInfo) -> None:
        self.heard.append(("started", run.name))

    @hookimpl
    def lavintk_step_finished(self, run: RunInfo, step: Any) -> None:
        self.heard.append(("step", step))

    @hookimpl
    def lavintk_evaluation_finished(self, step: int, name: str, scores: dict[str, float]) -> None:
        self.heard.append(("evaluation", step, name, scores))

    @hookimpl
    def lavintk_checkpoint_saved(self, folder: str) -> None:
        self.heard.append(("checkpoint", folder))

    @hookimpl
    def lavintk_run_finished(self, status: str) -> None:
        self.heard.append(("finished", status))


def plugins_of(**named: object) -> Plugins:
    """Return the core and the given plugin objects, registered inline."""
    manager = pluggy.PluginManager("lavintk")
    manager.add_hookspecs(hookspecs)
    manager.register(builtin, CORE)
    for name, plugin in named.items():
        manager.register(plugin, name)
    manager.check_pending()
    return Plugins(manager)


# Finding


def test_an_installed_plugin_is_found_with_version_and_distribution(install_plugin: Install) -> None:
    install_plugin("hello", HELLO, version="4.5")
    plugins = load_plugins()
    record = next(record for record in plugins.records() if record.name == "hello")
    assert (record.version, record.distribution) == ("4.5", "lavintk-hello")
    assert record.hooks == ("lavintk_register_adapters",)
    assert record.offers == {"adapters": ["hello"]}
    assert plugins.adapters["hello"].owner == "hello"


def test_the_core_comes_first_and_the_others_in_alphabetical_order(install_plugin: Install) -> None:
    install_plugin("zebra", "")
    install_plugin("ape", "")
    first, *others = load_plugins().names()
    assert first == CORE
    assert others == sorted(others)
    assert {"ape", "zebra"} <= set(others)


def test_the_core_offers_its_entries_through_the_same_hooks() -> None:
    plugins = load_plugins()
    owners = {entry.owner for entry in (plugins.quantizers["none"], plugins.optimizers["adamw"])} | {
        plugins.evaluations["exact-match"].owner
    }
    assert owners == {CORE}


def test_a_plugin_that_fails_to_load_is_named_with_the_way_out(install_plugin: Install) -> None:
    install_plugin("broken", "import package_that_nobody_has")
    with pytest.raises(PluginError) as caught:
        load_plugins()
    assert "plugin 'broken' of lavintk-broken failed to load" in str(caught.value)
    assert "package_that_nobody_has" in str(caught.value)
    assert "LAVINTK_DISABLE=broken" in str(caught.value)
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    assert "broken" not in load_plugins(frozenset({"broken"})).names()


def test_a_plugin_that_ends_python_is_named_too(install_plugin: Install) -> None:
    install_plugin("quitter", "import sys; sys.exit('no licence')")
    with pytest.raises(PluginError, match="plugin 'quitter' of lavintk-quitter failed to load: SystemExit"):
        load_plugins()


def test_a_misspelt_hook_is_an_error_that_names_hook_and_plugin(install_plugin: Install) -> None:
    install_plugin("sloppy", HELLO.replace("lavintk_register_adapters", "lavintk_register_adaptors"))
    with pytest.raises(PluginError) as caught:
        load_plugins()
    assert "lavintk_register_adaptors" in str(caught.value)
    assert "LAVINTK_DISABLE=sloppy" in str(caught.value)


def test_a_hook_with_an_unknown_argument_is_an_error_that_names_the_plugin(install_plugin: Install) -> None:
    install_plugin("sloppy", HELLO.replace("(registry)", "(register)").replace("registry.add", "register.add"))
    with pytest.raises(PluginError, match="plugin 'sloppy' of lavintk-sloppy failed to load"):
        load_plugins()


def test_two_distributions_that_offer_one_plugin_are_both_named(install_plugin: Install) -> None:
    install_plugin("hello", HELLO)
    install_plugin("hello", HELLO, distribution="other-hello")
    with pytest.raises(PluginError) as caught:
        load_plugins()
    assert "plugin 'hello' is offered by lavintk-hello and other-hello" in str(caught.value)
    assert "uninstall one of them" in str(caught.value)


def test_two_plugins_that_offer_one_name_are_both_named(install_plugin: Install) -> None:
    install_plugin("hello", HELLO)
    install_plugin("world", HELLO)
    with pytest.raises(PluginError, match="adapter 'hello' is offered by plugin 'hello' and by plugin 'world'"):
        load_plugins()


def test_a_plugin_may_not_take_the_name_of_the_core(install_plugin: Install) -> None:
    install_plugin(CORE, HELLO, distribution="lavintk-impostor")
    with pytest.raises(PluginError, match="plugin 'core' of lavintk-impostor uses the core's own name"):
        load_plugins()


# Calling


def test_a_fault_in_a_hook_names_plugin_hook_and_way_out() -> None:
    class Faulty:
        @hookimpl
        def lavintk_run_started(self) -> None:
            raise ZeroDivisionError("oh")

    with pytest.raises(PluginError) as caught:
        plugins_of(faulty=Faulty()).call("lavintk_run_started", run=None)
    assert "plugin 'faulty' failed in lavintk_run_started: ZeroDivisionError: oh" in str(caught.value)
    assert "LAVINTK_DISABLE=faulty" in str(caught.value)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_error_that_a_plugin_words_itself_is_passed_on() -> None:
    class Careful:
        @hookimpl
        def lavintk_run_started(self) -> None:
            raise LavintkError("log in first")

    with pytest.raises(LavintkError, match=r"^log in first$"):
        plugins_of(careful=Careful()).call("lavintk_run_started", run=None)


def test_every_life_cycle_hook_reaches_the_plugins_with_the_arguments_they_ask_for() -> None:
    first, second = Recorder(), Recorder()
    plugins = plugins_of(first=first, second=second)
    run = RunInfo(Path("runs/x"), "x", {}, 2, 10)
    plugins.call("lavintk_run_started", run=run)
    plugins.call("lavintk_step_finished", run=run, step="one")
    plugins.call("lavintk_evaluation_finished", run=run, step=1, name="loss", scores={"loss": 0.5})
    plugins.call("lavintk_checkpoint_saved", run=run, step=1, folder="runs/x/1")
    plugins.call("lavintk_run_finished", run=run, status="finished")
    assert first.heard == second.heard
    assert first.heard == [
        ("started", "x"),
        ("step", "one"),
        ("evaluation", 1, "loss", {"loss": 0.5}),
        ("checkpoint", "runs/x/1"),
        ("finished", "finished"),
    ]


def test_call_one_reaches_no_other_plugin() -> None:
    first, second = Recorder(), Recorder()
    plugins_of(first=first, second=second).call_one("second", "lavintk_run_finished", run=None, status="failed")
    assert (first.heard, second.heard) == ([], [("finished", "failed")])


@pytest.mark.parametrize("plural", ["quantizers", "optimizers", "adapters", "exporters", "datasets", "evaluations"])
def test_each_registering_hook_fills_its_registry(install_plugin: Install, plural: str) -> None:
    install_plugin("hello", HELLO.replace("adapters", plural))
    assert "hello" in load_plugins().registries()[plural]


def test_each_hook_has_a_spec_that_says_when_and_what() -> None:
    specs = [getattr(hookspecs, name) for name in dir(hookspecs) if name.startswith("lavintk_")]
    assert len(specs) >= 12
    for spec in specs:
        documented = spec.__doc__ or ""
        arguments = spec.__code__.co_varnames[: spec.__code__.co_argcount]
        assert all(f":param {argument}:" in documented for argument in arguments), spec.__name__


# Commands

SHOUT = """
import click
from lavintk import hookimpl

@click.command()
def NAME():
    "Shout."
    click.echo("HELLO")

@hookimpl
def lavintk_register_commands(group):
    group.add_command(NAME)
"""


def test_a_plugins_command_appears_and_runs(install_plugin: Install, run_cli: RunCli) -> None:
    install_plugin("shout", SHOUT.replace("NAME", "shout"))
    assert "shout" in run_cli("--help").stdout
    assert run_cli("shout") == Outcome(0, "HELLO\n", "")


def test_a_command_named_like_one_of_lavintk_is_an_error(install_plugin: Install, run_cli: RunCli) -> None:
    install_plugin("shout", SHOUT.replace("NAME", "train"))
    outcome = run_cli("--help")
    assert outcome.exit_code == 1
    assert "command 'train' of plugin 'shout' clashes with that of 'lavintk'" in outcome.stderr
    assert "LAVINTK_DISABLE=shout" in outcome.stderr


def test_a_command_that_two_plugins_offer_is_an_error_naming_both() -> None:
    class Offering:
        @hookimpl
        def lavintk_register_commands(self, group: click.Group) -> None:
            group.add_command(click.Command("shout"))

    with pytest.raises(PluginError, match="command 'shout' of plugin 'b' clashes with that of 'a'"):
        plugins_of(a=Offering(), b=Offering()).add_commands(click.Group())


# Seeing and putting aside


def test_plugins_list_shows_each_plugin_with_what_it_offers(install_plugin: Install, run_cli: RunCli) -> None:
    install_plugin("hello", HELLO)
    listed = run_cli("plugins", "list").stdout
    row = next(line for line in listed.splitlines() if line.startswith("hello"))
    assert row.split() == ["hello", "1.2.3", "(lavintk-hello)", "adapters:", "hello"]
    assert "adamw" in listed


def test_plugins_list_as_json_holds_the_same(install_plugin: Install, run_cli: RunCli) -> None:
    install_plugin("hello", HELLO)
    listed = {record["name"]: record for record in json.loads(run_cli("plugins", "list", "--json").stdout)}
    assert listed["hello"] == {
        "name": "hello",
        "version": "1.2.3",
        "distribution": "lavintk-hello",
        "api": None,
        "hooks": ["lavintk_register_adapters"],
        "offers": {"adapters": ["hello"]},
    }


def test_plugins_show_prints_summary_and_options(install_plugin: Install, run_cli: RunCli) -> None:
    install_plugin("hello", HELLO)
    assert run_cli("plugins", "show", "hello").stdout == (
        "adapter hello (plugin hello)\n  says hello\n  options:\n    rank (int, default 3): how loud\n"
    )


def test_plugins_show_suggests_for_an_unknown_name(install_plugin: Install, run_cli: RunCli) -> None:
    install_plugin("hello", HELLO)
    outcome = run_cli("plugins", "show", "helo")
    assert outcome.exit_code == 1
    assert outcome.stderr.endswith("Did you mean 'hello'?\n")


def test_a_disabled_plugin_and_its_names_vanish(
    install_plugin: Install, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_plugin("hello", HELLO)
    monkeypatch.setenv("LAVINTK_DISABLE", " hello, ")
    assert disabled_names() == {"hello"}
    plugins = load_plugins(disabled_names())
    assert "hello" not in plugins.names()
    assert "hello" not in plugins.adapters
    listed = run_cli("plugins", "list").stdout
    assert not any(line.startswith("hello") for line in listed.splitlines())
    assert "left out by LAVINTK_DISABLE: hello" in listed


def test_disabling_bitsandbytes_takes_nf4_away(run_cli: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "nf4" in run_cli("plugins", "list").stdout
    monkeypatch.setenv("LAVINTK_DISABLE", "bnb")
    assert "nf4" not in run_cli("plugins", "list").stdout
    outcome = run_cli("train", "demo", "--dry-run")
    assert outcome.exit_code == 1
    assert "no quantizer named 'nf4'" in outcome.stderr


def test_disabling_a_name_that_is_no_plugin_is_said(run_cli: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVINTK_DISABLE", "nf4")
    listed = run_cli("plugins", "list").stdout
    assert "LAVINTK_DISABLE=nf4 names no plugin. It is offered by plugin 'bnb'." in listed
    monkeypatch.setenv("LAVINTK_DISABLE", "lorra")
    assert "LAVINTK_DISABLE=lorra names no plugin. Did you mean 'lora'?" in run_cli("plugins", "list").stdout


def test_tracing_prints_each_hook_call_with_its_plugin(
    install_plugin: Install, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_plugin("hello", HELLO)
    assert run_cli("plugins", "list").stderr == ""
    monkeypatch.setenv("LAVINTK_TRACE", "1")
    lines = run_cli("plugins", "list").stderr.splitlines()
    traced = [line for line in lines if line.endswith("-> hello")]
    assert len(traced) == 1
    assert traced[0].startswith("trace: lavintk_register_adapters(registry=")


def test_tracing_prints_what_a_hook_raised(
    install_plugin: Install, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install_plugin("hello", HELLO.replace("registry.add", "registry.ad"))
    monkeypatch.setenv("LAVINTK_TRACE", "1")
    with pytest.raises(PluginError):
        load_plugins()
    assert "trace: lavintk_register_adapters raised AttributeError(" in capsys.readouterr().err

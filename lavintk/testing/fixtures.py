"""The kit's pytest plugin: fixtures for tests of plugins. pytest loads it wherever lavintk is installed.

So it imports nothing but pytest; what a fixture needs is imported when a test asks for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from lavintk.run import Run
    from lavintk.testing.managers import PluginManager
    from lavintk.testing.outcome import Outcome, TinyModel

OUTCOME = "lavintk.testing.outcome"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List what checks of the kit could not ask on this machine."""
    if OUTCOME not in sys.modules:
        return
    if reasons := sys.modules[OUTCOME].not_asked():
        terminalreporter.section("lavintk: not asked here")
        for reason, subjects in reasons.items():
            terminalreporter.line(f"{reason} ({', '.join(subjects)})")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny language model, a vision tower, pictures and data files; do not write into it."""
    from lavintk.testing.runs import write_everything  # imports transformers

    return write_everything(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_llm(tiny_folder: Path) -> TinyModel:
    """A tiny language model like LLaMA with eight questions; :class:`lavintk.testing.TinyModel`, read only."""
    from lavintk.testing.outcome import TinyModel

    return TinyModel(tiny_folder, tiny_folder / "llm", None, "alpaca", tiny_folder / "alpaca.json")


@pytest.fixture(scope="session")
def tiny_vlm(tiny_folder: Path) -> TinyModel:
    """The same with a vision tower like CLIP's and pictures; :class:`lavintk.testing.TinyModel`, read only."""
    from lavintk.testing.outcome import TinyModel

    return TinyModel(tiny_folder, tiny_folder / "llm", tiny_folder / "vit", "jsonl", tiny_folder / "mixed.jsonl")


@pytest.fixture(scope="session")
def tiny_run(tiny_llm: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished text run of a few steps, LoRA on ``tiny_llm``; read only."""
    import lavintk

    return lavintk.train(tiny_llm.recipe(), tmp_path_factory.mktemp("tiny_run") / "run")


@pytest.fixture
def run_cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """A function that runs ``lavintk`` in this process: ``run_cli("plugins", "list").stdout``.

    It returns a :class:`lavintk.testing.Outcome`. Plugins are loaded anew each time, so that what a test installed,
    registered or disabled counts.
    """
    from lavintk.cli import main
    from lavintk.plugins import installed_plugins
    from lavintk.testing.outcome import Outcome

    monkeypatch.setenv("COLUMNS", "160")  # rich would fold lines at 80
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments: str) -> Outcome:
        installed_plugins.cache_clear()
        capsys.readouterr()
        exit_code = main(arguments)
        captured = capsys.readouterr()
        return Outcome(exit_code, captured.out, captured.err)

    return run


@pytest.fixture
def plugin_manager() -> Iterator[PluginManager]:
    """A fresh manager with lavintk's own plugins: ``plugin_manager.register(my_plugin, "mine")``.

    A :class:`lavintk.testing.managers.PluginManager`. Other installed plugins are left out. For the length of the test
    it is what ``lavintk.train`` and ``run_cli`` use.
    """
    from lavintk.testing.managers import PluginManager

    manager = PluginManager()
    with pytest.MonkeyPatch.context() as patch:
        manager.take_over(patch)
        yield manager
    manager.forget()

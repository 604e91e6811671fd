"""Packages of plugins, as strangers make them: those of `lavintk plugins new`, and the finished ones of the tutorial.

They are installed into a fresh virtual environment that sees the packages of the running one, so that nothing is
downloaded, and used there.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from lavintk import plugin_api, scaffold
from lavintk.errors import PluginError, RunError
from lavintk.plugins import load_plugins
from lavintk.scaffold import KINDS, new_plugin, rendered
from lavintk.testing import Outcome

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs/plugins/examples"
TUTORIAL = (ROOT / "docs/plugins/tutorial.md").read_text(encoding="utf-8")
STARTED = {
    "quantizer": "log4",
    "optimizer": "signum",
    "adapter": "lowrank",
    "exporter": "plain",
    "dataset": "csv",
    "logger": "csvlog",
}
"""What the tutorial starts of each kind."""
LIMIT = 240
"""Seconds that a command in the fresh environment may take."""

RunCli = Callable[..., Outcome]


@dataclass(frozen=True)
class Fresh:
    """A virtual environment with packages of ours."""

    python: Path
    packages: dict[str, Path]
    """Folders of the packages that `lavintk plugins new` wrote, by kind."""

    def run(self, *arguments: str, cwd: Path) -> str:
        """Run a module of Python's and return what it printed; fail with all of it otherwise."""
        command = [str(self.python), "-m", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160", "LAVINTK_CACHE": str(cwd)}
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=LIMIT)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout


def files_of(folder: Path) -> dict[str, str]:
    """Return the text of each file below a folder by its path."""
    paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def need(module: str, reason: str) -> None:
    """Skip a test where a tool of packaging is not installed."""
    pytest.importorskip(module, reason=reason)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    """Install the examples, and a new package of each kind, into a fresh environment."""
    need("pip", "pip is needed to install packages")
    need("hatchling", "hatchling is needed to build packages without the network")
    place = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place / "venv")], check=True)
    python = place / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    (site,) = (place / "venv").glob("**/site-packages")
    outer = [path for path in sys.path if path.endswith("site-packages")]
    (site / "outer.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in outer))
    packages = {}
    for kind in KINDS:
        packages[kind] = place / kind
        new_plugin(kind, f"my-{kind}", packages[kind], load_plugins())
    shutil.copytree(EXAMPLES, place / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    install(python, [*packages.values(), *(place / "examples").iterdir()])
    return Fresh(python, packages)


def install(python: Path, folders: Sequence[Path]) -> None:
    """Install packages as pip does, without a look at the network."""
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", *options, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr


# Writing a package


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_package_is_complete_and_all_its_names_are_filled_in(kind: str, run_cli: RunCli, tmp_path: Path) -> None:
    outcome = run_cli("plugins", "new", kind, "two-words", "--out", str(tmp_path / "out"))
    assert outcome.exit_code == 0, outcome.stderr
    files = files_of(tmp_path / "out")
    tests = "tests/test_two_words.py"
    assert {"pyproject.toml", "README.md", tests, "lavintk_two_words/__init__.py", "lavintk_two_words/py.typed"} <= set(
        files
    )
    assert all(str(tmp_path / "out" / name) in outcome.stdout for name in files)
    for name, text in files.items():
        assert not re.search(r"@\w+@|\.template", name + text), name
        if name.endswith(".py"):
            compile(text, name, "exec")
    project = tomllib.loads(files["pyproject.toml"])["project"]
    assert project["name"] == "lavintk-two-words"
    assert project["entry-points"]["lavintk"] == {"two-words": "lavintk_two_words"}
    assert f"\nlavintk_api = {plugin_api.SUPPORTED[-1]}\n" in files["lavintk_two_words/__init__.py"]
    assert "lavintk.testing" in files[tests]


def test_the_folder_is_called_like_the_package_unless_another_is_named(
    run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    printed = run_cli("plugins", "new", "logger", "diary").stdout
    assert (tmp_path / "lavintk-diary/lavintk_diary/__init__.py").is_file()
    assert "pip install -e 'lavintk-diary[test]'" in printed


@pytest.mark.parametrize("name", ["Loud", "1st", "two words", "a--b", "-a", "a-", "ä", "", "../up", "a" * 41])
def test_a_name_that_cannot_be_one_is_refused_with_what_a_name_looks_like(
    name: str, run_cli: RunCli, tmp_path: Path
) -> None:
    outcome = run_cli("plugins", "new", "--out", str(tmp_path / "out"), "adapter", "--", name)
    assert outcome.exit_code == 1
    assert f"{name!r} cannot be the name of a plugin: small letters and digits" in outcome.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("quantizer", "nf4", "quantizer 'nf4' is offered by plugin 'bnb' already"),
        ("logger", "wandb", "a plugin 'wandb' is installed already"),
        ("adapter", "core", "a plugin 'core' is installed already"),
        ("dataset", "lavintk-rows", "begins with lavintk"),
    ],
)
def test_a_name_that_is_taken_is_refused_with_whose_it_is(
    kind: str, name: str, said: str, run_cli: RunCli, tmp_path: Path
) -> None:
    outcome = run_cli("plugins", "new", kind, name, "--out", str(tmp_path / "out"))
    assert outcome.exit_code == 1
    assert said in outcome.stderr
    assert list(tmp_path.iterdir()) == []


def test_names_of_other_kinds_are_free(tmp_path: Path) -> None:
    assert new_plugin("optimizer", "nf4", tmp_path / "out", load_plugins())


def test_an_unknown_kind_is_refused_with_the_known_ones(run_cli: RunCli) -> None:
    outcome = run_cli("plugins", "new", "quantiser", "mine")
    assert outcome.exit_code == 2
    assert all(kind in outcome.stderr for kind in KINDS)


def test_a_folder_in_use_is_left_as_it_is(run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/work").write_text("of a day")
    outcome = run_cli("plugins", "new", "logger", "mine", "--out", str(tmp_path / "mine"))
    assert outcome.exit_code == 1
    assert "exists and is not empty; choose another --out" in outcome.stderr
    assert files_of(tmp_path) == {"mine/work": "of a day"}


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert (tmp_path / "mine/README.md") in new_plugin("logger", "mine", tmp_path / "mine", load_plugins())


def test_nothing_is_left_of_a_package_that_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files(kind: str, name: str) -> list[tuple[str, str]]:
        return [("first", "text"), ("first/second", "text")]  # a file in a file

    monkeypatch.setattr(scaffold, "rendered", files)
    with pytest.raises(RunError, match="out cannot be"):
        new_plugin("logger", "mine", tmp_path / "deep/out", load_plugins())
    assert list(tmp_path.iterdir()) == []


def test_a_name_is_checked_before_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PluginError):
        new_plugin("logger", "No", tmp_path / "file", load_plugins())


# The tutorial


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "quantizer"])
def test_the_examples_are_what_is_written_for_their_kind(kind: str) -> None:
    assert dict(rendered(kind, STARTED[kind])) == files_of(EXAMPLES / f"lavintk-{STARTED[kind]}")


def test_the_tutorial_arrives_at_its_example(tmp_path: Path) -> None:
    new_plugin("quantizer", "log4", tmp_path / "log4", load_plugins())
    steps = re.findall(r"^<!-- file: (lavintk_log4/\S+|tests/\S+) -->\n```python\n(.*?)^```$", TUTORIAL, re.S | re.M)
    assert [name for name, _ in steps] == ["lavintk_log4/__init__.py", "lavintk_log4/layer.py", "tests/test_log4.py"]
    for name, text in steps:
        assert (tmp_path / "log4" / name).is_file()
        (tmp_path / "log4" / name).write_text(text, encoding="utf-8")
    found, example = files_of(tmp_path / "log4"), files_of(EXAMPLES / "lavintk-log4")
    assert found.pop("README.md") != example.pop("README.md")  # which points to the tutorial
    assert found == example


def test_what_the_tutorial_shows_of_the_other_examples_stands_in_them() -> None:
    parts = re.findall(r"^<!-- from: (\S+) -->\n```python\n(.*?)^```$", TUTORIAL, re.DOTALL | re.MULTILINE)
    others = {f"lavintk-{name}" for kind, name in STARTED.items() if kind != "quantizer"}
    assert {Path(name).parts[0] for name, _ in parts} == others
    for name, text in parts:
        assert text in (EXAMPLES / name).read_text(encoding="utf-8"), name


def test_each_kind_is_started_in_the_tutorial() -> None:
    started = re.findall(r"^lavintk plugins new (\w+) (\S+)$", TUTORIAL, re.MULTILINE)
    assert dict(started) == STARTED


def test_the_started_quantizer_shows_what_the_tutorial_says(
    run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_plugin("quantizer", "log4", tmp_path, load_plugins())
    metadata = tmp_path / "lavintk_log4-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: lavintk-log4\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text("[lavintk]\nlog4 = lavintk_log4\n")
    monkeypatch.syspath_prepend(tmp_path)
    (shown,) = re.findall(r"<!-- started: lavintk plugins show log4 -->\n```text\n(.*?)```", TUTORIAL, re.DOTALL)
    try:
        assert run_cli("plugins", "show", "log4").stdout == shown
    finally:
        sys.modules.pop("lavintk_log4", None)


# In a fresh environment


def test_the_examples_train_a_model_together_which_is_exported(fresh: Fresh, tiny_folder: Path, tmp_path: Path) -> None:
    records = json.loads(fresh.run("lavintk", "plugins", "list", "--json", cwd=tmp_path))
    listed = {record["name"]: record for record in records}
    for name in STARTED.values():
        assert (listed[name]["distribution"], listed[name]["api"]) == (f"lavintk-{name}", 1)

    rows = [("question", "answer"), ("what color is it?", "red"), ("is it round?", "no"), ("how many?", "one, or two")]
    with (tmp_path / "data.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    model = ["--model", str(tiny_folder / "llm"), "--data", "csv:data.csv", "--set", "data.max_length=128"]
    chosen = ["--quant", "log4", "--optim", "signum", "--adapter", "lowrank:rank=4"]
    short = ["--max-steps", "2", "--device", "cpu", "--out", "run"]
    fresh.run("lavintk", "train", *model, *chosen, *short, cwd=tmp_path)
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert (manifest["status"], manifest["steps"]) == ("finished", 2)
    assert (tmp_path / "run/csvlog/runs.csv").read_text().splitlines()[-1].endswith(",finished")

    printed = fresh.run("lavintk", "export", "run", "--out", "onnx", cwd=tmp_path)
    (said,) = re.findall(r"<!-- said by: lavintk export -->\n```text\n(.*?)\n```", TUTORIAL, re.DOTALL)
    assert said in printed.splitlines()
    description = json.loads((tmp_path / "onnx/lavintk_export.json").read_text())
    assert (description["quant"]["grid"], description["quant"]["trained"]) == ("int8", "log4")
    assert description["report"]["verification"]["faults"] == []  # onnxruntime against torch

    fresh.run("lavintk", "export", "run", "--format", "plain", "--out", "plain", cwd=tmp_path)
    assert (tmp_path / "plain/model.safetensors").is_file()


def test_packages_of_all_kinds_pass_their_own_tests(fresh: Fresh, tmp_path: Path) -> None:
    kit = [] if entry_points(group="pytest11", name="lavintk") else ["-p", "lavintk.testing.fixtures"]
    folders = [str(folder / "tests") for folder in fresh.packages.values()]
    finished = str(EXAMPLES / "lavintk-log4/tests")  # the one that is more than what was written
    options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", f"--rootdir={tmp_path}", *kit]
    report = f"--junitxml={tmp_path / 'report.xml'}"
    fresh.run("pytest", *options, report, *folders, finished, cwd=tmp_path)
    assert re.search(r'errors="0" failures="0" skipped="0" tests="2\d"', (tmp_path / "report.xml").read_text())


def test_packages_of_all_kinds_pass_twine_check(fresh: Fresh, tmp_path: Path) -> None:
    need("twine", "twine is needed to check packages")
    for folder in fresh.packages.values():
        fresh.run("hatchling", "build", "-d", str(tmp_path / "dist"), cwd=folder)
    archives = sorted(map(str, (tmp_path / "dist").iterdir()))
    assert len(archives) == 2 * len(KINDS)
    assert fresh.run("twine", "check", "--strict", *archives, cwd=tmp_path).count("PASSED") == len(archives)

"""The pages against the code: nothing that they show may differ from what is."""

from __future__ import annotations

import configparser
import contextlib
import importlib.util
import json
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest

from lavintk.cli import main, make_group
from lavintk.plugins import installed_plugins, load_plugins
from lavintk.recipe import Recipe, known_keys, shipped
from lavintk.registry import Choice
from lavintk.run import load_records
from lavintk.testing import Outcome

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part == "node_modules" for part in path.relative_to(ROOT).parts)
)
GUIDES = [path for path in PAGES if path.parent in (DOCS, DOCS / "plugins") or path == ROOT / "README.md"]
FENCE = re.compile(r"(<!-- [^\n]* -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SHELLS = ("", "sh", "bash", "shell", "console")
OPERATORS = ("&&", "||", "|", ";", "&")

RunCli = Callable[..., Outcome]
Install = Callable[..., Path]


def load_generator() -> ModuleType:
    """Import docs/generate.py, which is no part of any package."""
    spec = importlib.util.spec_from_file_location("lavintk_docs_generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = load_generator()


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(page: str) -> list[tuple[str, str, str]]:
    """Return mark, language and content of each code block; a mark is a comment in the line above."""
    return [(mark.strip(), language, content) for mark, language, content in FENCE.findall(page)]


def marked(page: str, mark: str) -> str:
    """Return the content of the code block below ``<!-- mark -->``."""
    (found,) = [content for above, _, content in blocks(page) if above == f"<!-- {mark} -->"]
    return found


def keys_of_table(page: str, mark: str = "") -> list[str]:
    """Return what stands in backticks in the first column of the table below a mark, or of all tables."""
    start = page.index(f"<!-- {mark} -->\n|") if mark else 0
    table = page[start : page.find("\n\n", start)] if mark else page
    return [
        key for cell in re.findall(r"^\| (`[^|]*`) \|", table, re.MULTILINE) for key in re.findall(r"`(.+?)`", cell)
    ]


@pytest.fixture
def workspace(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Return a function that makes the folder in which a page's examples run, and goes there.

    It holds the page's files, and tiny models in folders named like those of the catalog: a path comes before a name.
    """

    def make(page: str) -> Path:
        generate.write_examples(page, tmp_path)
        for name, source in {"smollm2-135m-instruct": "llm", "easyvqa-vit": "vit"}.items():
            shutil.copytree(tiny_folder / source, tmp_path / name)
        if not (tmp_path / "alpaca.json").exists():
            shutil.copy(tiny_folder / "alpaca.json", tmp_path)
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return make


# What is generated


@pytest.mark.parametrize("name", generate.PAGES)
def test_generated_parts_say_what_the_code_says(name: str) -> None:
    page = (DOCS / name).read_text(encoding="utf-8")
    assert generate.refreshed(page) == page, "run: python docs/generate.py"


def test_every_page_with_generated_parts_is_looked_at() -> None:
    marked = {path for path in DOCS.rglob("*.md") if "<!-- generated:" in path.read_text(encoding="utf-8")}
    assert {path.relative_to(DOCS).as_posix() for path in marked} == set(generate.PAGES)


def test_the_page_of_commands_shows_what_help_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(generate.WIDTH))
    page = read("docs/cli.md")
    shown = dict(re.findall(r"^## (lavintk[^\n]*)\n\n```text\n(.*?)```$", page, re.DOTALL | re.MULTILINE))
    assert list(shown) == [path for path, _ in generate.commands(generate.own_commands())]
    for path, expected in shown.items():
        assert main([*path.split()[1:], "--help"]) == 0
        assert capsys.readouterr().out == expected, path


def test_the_page_of_recipes_has_each_key_once_and_every_key_says_what_it_is() -> None:
    sections = {key.partition(".")[0] for key in known_keys() if "." in key}
    documented = [key for key in keys_of_table(read("docs/recipe.md")) if not key.startswith("--")]
    assert sorted(documented) == sorted(key for key in known_keys() if key not in sections)
    models: list[Any] = [Recipe, *(Recipe.model_fields[name].annotation for name in sections)]
    assert not [name for model in models for name, field in model.model_fields.items() if not field.description]


def test_the_page_of_recipes_names_every_shipped_recipe() -> None:
    assert [name for name in shipped() if f"\n- `{name}`: " not in read("docs/recipe.md")] == []


# Examples


def test_the_example_of_each_record_format_is_read(workspace: Callable[[str], Path]) -> None:
    page = read("docs/data.md")
    workspace(page)
    choices = [Choice.parse(text) for text in re.findall(r"^`--data (\S+)` reads:$", page, re.MULTILINE)]
    offered = {entry.name for entry in load_plugins().datasets if entry.owner == "formats"}
    assert {choice.name for choice in choices} == offered
    assert set(re.findall(r"^### (\w+)$", page, re.MULTILINE)) >= offered
    for choice in choices:
        records = load_records(choice, "train")
        assert records
        assert all(record.reference for record in records)


@pytest.mark.parametrize("kind", ["chat", "plain", "lavin"])
def test_what_is_trained_is_what_the_page_marks(kind: str, workspace: Callable[[str], Path]) -> None:
    from transformers import AutoTokenizer

    from lavintk.data.preview import render_row
    from lavintk.data.records import Message, Record
    from lavintk.data.template import make_template

    page = read("docs/data.md")
    tokenizer = AutoTokenizer.from_pretrained(workspace(page) / "smollm2-135m-instruct")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|start|>", "<|im_start|>").replace(
        "<|end|>", "<|im_end|>"
    )
    questions = [Message("user", "What color is it?"), Message("user", "Is it round?")]
    answers = [Message("assistant", "Red."), Message("assistant", "No.")]
    messages = tuple(message for turn in zip(questions, answers) for message in turn)
    record = Record("r", messages, (Path("pictures/1.png"),))
    row = make_template(tokenizer, kind, visual_tokens=6).tokenize_record(record)
    assert render_row(row, tokenizer, brackets=True).plain.strip() == marked(page, f"trained: {kind}").strip()


def test_the_previews_that_the_page_of_data_shows_can_be_made(
    workspace: Callable[[str], Path], run_cli: RunCli
) -> None:
    page = read("docs/data.md")
    workspace(page)
    previews = [arguments for arguments in command_lines(page) if arguments[:2] == ["data", "preview"]]
    assert len(previews) >= 3
    for arguments in previews:
        outcome = run_cli(*arguments)
        assert outcome.exit_code == 0, outcome.stderr
        assert "trained" in outcome.stdout
        assert "«" in outcome.stdout


def run_blocks(page: str, workspace: Callable[[str], Path]) -> dict[str, Any]:
    """Run the Python blocks of a page, one after the other, and return their variables."""
    workspace(page)
    variables: dict[str, Any] = {"__name__": "page"}
    for mark, language, content in blocks(page):
        if language == "python" and not mark.startswith("<!-- file:"):
            exec(compile(content, "page", "exec"), variables)
    return variables


def test_the_page_of_training_runs_and_shows_what_a_run_leaves(
    workspace: Callable[[str], Path], run_cli: RunCli
) -> None:
    page = read("docs/training.md")
    run = run_blocks(page, workspace)["run"]
    files = [path for path in sorted(run.folder.rglob("*")) if path.is_file()]
    left = {re.sub(r"(events\.out\.tfevents)\..*", r"\1.*", path.relative_to(run.folder).as_posix()) for path in files}
    assert sorted(left) == marked(page, "tree: runs/first").split()
    assert sorted(keys_of_table(page, "keys: manifest")) == sorted(run.manifest)
    (evaluation,) = re.findall(r"^\| `evaluation` \|(.*)\|$", page, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", evaluation)) == set(run.manifest["evaluation"])
    written = {key for line in (run.folder / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    assert sorted(keys_of_table(page, "keys: metrics")) == sorted(written)
    lines = [arguments for arguments in command_lines(page) if "runs/first" in arguments]
    assert len(lines) == 3
    for arguments in lines:
        outcome = run_cli(*arguments)
        assert outcome.exit_code == 0, outcome.stderr


def test_the_page_of_models_runs(workspace: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    run_blocks(read("docs/models.md"), workspace)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("language.model.layers.0.self_attn.q_proj ")
    assert last.endswith(" trained values")


def test_the_page_of_evaluation_shows_what_scoring_prints(workspace: Callable[[str], Path], run_cli: RunCli) -> None:
    page = read("docs/evaluation.md")
    run_blocks(page, workspace)
    commands = re.findall(r"^<!-- output: lavintk (eval .*) -->$", page, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        printed = run_cli(*command.split()).stdout.splitlines()
        assert [line.rstrip() for line in printed] == marked(page, f"output: lavintk {command}").splitlines()


def install_page_plugin(page: str, folder: Path, install: Install) -> None:
    """Install the plugin of a page by what its pyproject.toml says, as pip would."""
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ((name, module),) = project["entry-points"]["lavintk"].items()
    assert module == project["name"].replace("-", "_")
    source = (folder / f"{module}.py").read_text(encoding="utf-8")
    install(name, source, distribution=project["name"], version=project["version"])


@pytest.fixture
def install_examples(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], None]]:
    """Return a function that puts the tutorial's finished packages on the path, as pip would; gone after the test."""
    modules: list[str] = []

    def install() -> None:
        site = tmp_path_factory.mktemp("site")
        for folder in (DOCS / "plugins/examples").iterdir():
            project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            ((name, module),) = project["entry-points"]["lavintk"].items()
            metadata = site / f"{module}-{project['version']}.dist-info"
            metadata.mkdir()
            (metadata / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
            (metadata / "entry_points.txt").write_text(f"[lavintk]\n{name} = {module}\n")
            monkeypatch.syspath_prepend(folder)
            modules.append(module)
        monkeypatch.syspath_prepend(site)

    yield install
    for name in [name for name in sys.modules if name.partition(".")[0] in modules]:
        del sys.modules[name]


def test_the_plugin_of_the_page_trains_a_model(
    workspace: Callable[[str], Path], install_plugin: Install, run_cli: RunCli
) -> None:
    page = read("docs/plugins/README.md")
    install_page_plugin(page, workspace(page), install_plugin)
    assert run_cli("plugins", "show", "sgd").stdout == marked(page, "output: lavintk plugins show sgd")
    flags = ["--optim", "sgd:momentum=0.5", "--max-steps", "2", "--device", "cpu"]
    outcome = run_cli(
        "train", "--model", "smollm2-135m-instruct", "--data", "alpaca:alpaca.json", *flags, "--out", "run"
    )
    assert outcome.exit_code == 0, outcome.stderr
    manifest = json.loads(Path("run/manifest.json").read_text())
    assert (manifest["status"], manifest["steps"]) == ("finished", 2)
    assert manifest["recipe"]["optim"] == {"name": "sgd", "momentum": "0.5"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_and_json_and_toml_on_a_page_are_valid(page: Path) -> None:
    for _, language, content in blocks(page.read_text(encoding="utf-8")):
        if language == "python":
            compile(content, name_of(page), "exec")
        elif language == "toml":
            tomllib.loads(content)
        elif language == "json":
            with contextlib.suppress(json.JSONDecodeError):
                json.loads(content)
                continue
            for line in content.splitlines():
                json.loads(line)


# Commands


def command_lines(page: str) -> list[list[str]]:
    """Return the arguments of every ``lavintk`` command in the shell blocks of a page."""
    found = []
    for _, language, content in blocks(page):
        if language in SHELLS:
            for line in content.replace("\\\n", " ").splitlines():
                if "lavintk" in line:
                    found += list(calls(line.strip().removeprefix("$ ")))
    return found


def calls(line: str) -> Iterator[list[str]]:
    """Yield the arguments of each call of ``lavintk`` in a line of shell."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    part: list[str] = []
    for word in [*lexer, ";"]:
        if word not in OPERATORS:
            part.append(word)
            continue
        while part and re.match(r"[A-Z_]+=", part[0]):
            part.pop(0)
        if part[:1] == ["lavintk"]:
            yield part[1:]
        part = []


def resolve(arguments: list[str]) -> tuple[click.Command, list[str]]:
    """Return the command that the arguments name and what is left of them."""
    command: click.Command = make_group()
    rest = [argument for argument in arguments if argument != "--debug"]
    while (
        isinstance(command, click.Group) and rest and re.fullmatch(r"[a-z-]+", rest[0]) and not rest[0].startswith("-")
    ):
        assert rest[0] in command.commands, f"no command {rest[0]!r}"
        command = command.commands[rest.pop(0)]
    return command, rest


def test_the_finder_of_commands_sees_each_way_to_write_one() -> None:
    lines = ("A=1 lavintk x --y  # lavintk no", "pip install lavintk && lavintk z 'a b' | less", "$ lavintk \\\n  w")
    page = "\n".join(["```sh", *lines, "```\n"])
    assert command_lines(page) == [["x", "--y"], ["z", "a b"], ["w"]]


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_every_command_line_of_a_page_can_be_called_so(
    page: Path,
    workspace: Callable[[str], Path],
    install_plugin: Install,
    run_cli: RunCli,
    install_examples: Callable[[], None],
) -> None:
    text = page.read_text(encoding="utf-8")
    folder = workspace(text)
    if page == DOCS / "plugins/tutorial.md":
        install_examples()
    if (folder / "pyproject.toml").exists():
        install_page_plugin(text, folder, install_plugin)
    installed_plugins.cache_clear()
    for arguments in command_lines(text):
        command, rest = resolve(arguments)
        with contextlib.suppress(click.exceptions.Exit):  # --help ends so
            context = command.make_context(command.name, list(rest))
            recipe = context.params.get("recipe")
            ready = recipe is None or recipe in shipped() or Path(recipe).exists()
            if command.name == "train" and context.params["resume"] is None and ready:
                outcome = run_cli(*arguments, "--dry-run")
                assert outcome.exit_code == 0, outcome.stderr


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_commands_and_options_in_the_text_of_a_page_exist(page: Path) -> None:
    text = FENCE.sub("", generate.PART.sub("", page.read_text(encoding="utf-8")))
    for code in re.findall(r"`(lavintk [^`]+)`", text):
        command, rest = resolve(code.split()[1:])
        options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        used = {word.partition("=")[0] for word in rest if word.startswith("-")}
        assert used <= options | {"--help", "-h"}, code


# Links and paths


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)[^)]*\)", text):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if re.match(r"[a-z]+:", target):
            continue  # another site, or mail
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            lost.append(target)
    assert not lost


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+?) *$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_of_this_repository_that_a_page_names_exist(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    named = re.findall(r"`((?:lavintk|plugins|exporters|tests|docs|benchmarks)/[\w./-]*)`", text)
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_tree_in_contributing_names_what_is_there() -> None:
    page = read("CONTRIBUTING.md")
    paths = keys_of_table(page, "paths")
    assert len(paths) > 15
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_contributing_names_each_environment_of_tox() -> None:
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    environments = re.split(r"[,\s]+", tox["tox"]["env_list"].strip())
    assert set(re.findall(r"`tox -e (\w+)`", read("CONTRIBUTING.md"))) == set(environments)

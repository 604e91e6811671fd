import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE_FILES = sorted((ROOT / "lavintk").rglob("*.py"))
PLUGIN_FOLDERS = sorted(
    path.parent for group in ("plugins", "exporters") for path in (ROOT / group).glob("*/__init__.py")
)
PLUGIN_NAMES = {folder.name for folder in PLUGIN_FOLDERS}
PLUGIN_FILES = sorted(file for folder in PLUGIN_FOLDERS for file in folder.rglob("*.py"))
HEAVY = ("torch", "transformers", "bitsandbytes", "numpy", "PIL", "onnxruntime", "pydantic")


def imported_packages(tree: ast.AST) -> Iterator[str]:
    """Yield the top-level package of every import, wherever it stands, under TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def imported_by_text(tree: ast.AST) -> Iterator[str]:
    """Yield every piece of text that a call of ``import_module`` and its like is given."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__", "find_spec", "load_module"):
                yield from texts(ast.Tuple([*node.args, *(keyword.value for keyword in node.keywords)]))


def texts(tree: ast.AST) -> Iterator[str]:
    """Yield every string of a module that is not a docstring or another statement of its own."""
    spoken = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in spoken:
            yield node.value


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def test_there_is_something_to_look_at() -> None:
    assert len(CORE_FILES) > 10
    assert {"lavintk_bnb", "lavintk_lora", "lavintk_mma"} <= PLUGIN_NAMES


@pytest.mark.parametrize("file", CORE_FILES, ids=name_of)
def test_the_core_imports_no_plugin(file: Path) -> None:
    tree = parse(file)
    assert not {name for name in imported_packages(tree) if name.startswith("lavintk_")}
    assert not [text for text in imported_by_text(tree) if text.startswith("lavintk_")]
    named = {name for text in texts(tree) for name in PLUGIN_NAMES if name in text}
    assert not named, "the core must find plugins by entry point, not by name"


@pytest.mark.parametrize("file", PLUGIN_FILES, ids=name_of)
def test_a_plugin_imports_no_other_plugin(file: Path) -> None:
    tree, own = parse(file), file.relative_to(ROOT).parts[1]
    assert {name for name in imported_packages(tree) if name.startswith("lavintk_")} <= {own}
    named = {name for text in texts(tree) for name in PLUGIN_NAMES - {own} if name in text}
    assert not named, "a plugin must not need another one"


@pytest.mark.parametrize("file", CORE_FILES + PLUGIN_FILES, ids=name_of)
def test_only_the_command_line_knows_the_command_line(file: Path) -> None:
    if file.parent.name == "cli" or file.name in ("__main__.py", "fixtures.py"):
        return  # the fixtures of lavintk.testing run commands
    modules = {node.module for node in ast.walk(parse(file)) if isinstance(node, ast.ImportFrom) and node.module}
    assert not {module for module in modules if module.startswith("lavintk.cli")}


def test_the_finder_of_imports_sees_each_way_to_import() -> None:
    tree = ast.parse(
        "import lavintk_a.b\nif TYPE_CHECKING:\n    from lavintk_c.d import e\n"
        "def f():\n    import lavintk_g\n"
        "import_module('lavintk_h')\nimportlib.import_module(name=f'lavintk_{i}')\n'lavintk_said'\n"
    )
    assert set(imported_packages(tree)) == {"lavintk_a", "lavintk_c", "lavintk_g"}
    assert set(texts(tree)) == {"lavintk_h", "lavintk_"}
    assert set(imported_by_text(tree)) == {"lavintk_h", "lavintk_"}


def heavy_modules_after(*arguments: str) -> list[str]:
    """Return which heavy packages a fresh ``lavintk`` has imported after running with ``arguments``."""
    code = (
        "import sys, json; from lavintk.cli import main; code = main(sys.argv[2:]);"
        "print('\\n' + json.dumps([code, [name for name in json.loads(sys.argv[1]) if name in sys.modules]]))"
    )
    command = [sys.executable, "-c", code, json.dumps(HEAVY), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    exit_code, found = json.loads(done.stdout.splitlines()[-1])
    assert exit_code == 0
    return list(found)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--help"], ["plugins", "list"], ["plugins", "show", "nf4"]],
    ids=" ".join,
)
def test_help_and_listings_import_nothing_heavy(arguments: list[str]) -> None:
    assert heavy_modules_after(*arguments) == []


def test_checking_a_recipe_imports_no_model_code() -> None:
    assert "torch" not in heavy_modules_after("train", "demo", "--dry-run")

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import lavintk

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
GROUPS = ("plugins", "exporters")
FOLDERS = sorted(path.parent for group in GROUPS for path in (ROOT / group).glob("*/__init__.py"))
WHEEL_PACKAGES: list[str] = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
ENTRY_POINTS: dict[str, str] = PROJECT["project"]["entry-points"]["lavintk"]
PAGES = sorted(path for pattern in ("*.md", "docs/**/*.md") for path in ROOT.glob(pattern))
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)[^)]*\)|!\[[^\]]*\]\(([^)\s]+)[^)]*\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


# Packages


def test_folders_entry_points_and_wheel_list_the_same_plugins() -> None:
    folders = {name_of(folder) for folder in FOLDERS}
    assert folders == set(WHEEL_PACKAGES) - {"lavintk"}
    assert {folder.name for folder in FOLDERS} == set(ENTRY_POINTS.values())


def test_a_plugin_is_called_like_its_package() -> None:
    assert {f"lavintk_{name}" for name in ENTRY_POINTS} == set(ENTRY_POINTS.values())


def test_the_lists_of_plugins_are_sorted() -> None:
    assert list(ENTRY_POINTS) == sorted(ENTRY_POINTS)
    assert WHEEL_PACKAGES[1:] == sorted(WHEEL_PACKAGES[1:], key=lambda path: (path.startswith("exporters"), path))


@pytest.mark.parametrize("folder", [ROOT / "lavintk", *FOLDERS], ids=name_of)
def test_each_package_says_that_it_is_typed(folder: Path) -> None:
    assert (folder / "py.typed").is_file()


@pytest.mark.parametrize("group", GROUPS)
def test_the_folders_of_plugins_are_no_packages_themselves(group: str) -> None:
    assert not (ROOT / group / "__init__.py").exists()


def test_every_folder_of_plugins_is_a_package() -> None:
    found = {path for group in GROUPS for path in (ROOT / group).glob("*") if list(path.glob("*.py"))}
    assert found == set(FOLDERS)


# Metadata


def test_the_version_is_the_same_everywhere() -> None:
    assert PROJECT["project"]["version"] == lavintk.__version__


def test_the_two_onnxruntimes_are_never_asked_for_together() -> None:
    extras: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
    asked = {
        extra: {re.split(r"[<>=\[ ;]", requirement)[0] for requirement in requirements}
        for extra, requirements in extras.items()
    }
    assert "onnxruntime" in asked["cpu"]
    assert "onnxruntime-gpu" in asked["gpu"]
    assert not any({"onnxruntime", "onnxruntime-gpu"} <= names for names in asked.values())
    assert not any("onnxruntime" in requirement for requirement in PROJECT["project"]["dependencies"])


def test_the_readme_named_in_the_metadata_is_there() -> None:
    assert (ROOT / PROJECT["project"]["readme"]).read_text(encoding="utf-8").startswith("# ")


# Pages


def targets(page: Path) -> list[str]:
    """Return what the links of a page point to; code is no link."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [link or image for link, image in LINK.findall(re.sub(r"`[^`]*`", "", text))]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    lost = []
    for target in targets(page):
        if re.match(r"[a-z]+:", target):
            continue  # another site, or mail
        path, _, anchor = target.partition("#")
        file = page if not path else (page.parent / path)
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            lost.append(target)
    assert not lost

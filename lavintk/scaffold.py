"""Starts a plugin: a complete small package, made from the files under ``lavintk/templates``.

A template is a file as it will be, with ``@words@`` in its text and its path where the plugin's names belong, and
``.template`` behind its name, so that no tool takes it for code of lavintk's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from lavintk import __version__, plugin_api
from lavintk.errors import PluginError
from lavintk.export import check_free, folder_beside
from lavintk.plugins import Plugins, installed_names

KINDS = {
    "quantizer": "quantizers",
    "optimizer": "optimizers",
    "adapter": "adapters",
    "exporter": "exporters",
    "dataset": "datasets",
    "logger": "",
}
"""What can be started, and the registry that it enters; a logger offers no name."""
USES = {
    "quantizer": "lavintk train demo --quant {name}",
    "optimizer": "lavintk train demo --optim {name}",
    "adapter": "lavintk train demo --adapter {name}",
    "exporter": "lavintk export runs/my-run --format {name}",
    "dataset": "lavintk train --model ORG/MODEL --data {name}:FILE",
    "logger": "lavintk train demo",
}
"""How each is used."""
COMMON = "common"
"""Templates of every kind; those of a kind come on top."""
SUFFIX = ".template"
NAME = re.compile(r"[a-z][a-z0-9]*(?:[-_][a-z0-9]+)*")
LONGEST = 40
PLACEHOLDER = re.compile(r"@(\w+)@")


def new_plugin(kind: str, name: str, out: Path, plugins: Plugins) -> list[Path]:
    """Write a package for a plugin of ``kind`` called ``name`` into the new folder ``out``; return its files.

    It appears complete or not at all.

    :param kind: one of :data:`KINDS`.
    :param plugins: the installed ones, whose names are taken.
    :raises PluginError: the name cannot be one, or is taken.
    :raises RunError: ``out`` is in use or cannot be written.
    """
    check_name(kind, name, plugins)
    check_free(out)
    files = dict(rendered(kind, name))
    with folder_beside(out) as partial:
        for path, text in files.items():
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            (partial / path).write_text(text, encoding="utf-8")
        if out.exists():
            out.rmdir()  # empty, as checked
        partial.chmod(0o755)
        partial.rename(out)
    return [out / path for path in sorted(files)]


def check_name(kind: str, name: str, plugins: Plugins) -> None:
    """Refuse a name that cannot be that of a plugin.

    :raises PluginError: says why, and what a name looks like.
    """
    if not NAME.fullmatch(name) or len(name) > LONGEST:
        raise PluginError(
            f"{name!r} cannot be the name of a plugin: small letters and digits, parts joined by - or _, "
            f"a letter first, at most {LONGEST} characters, as in 'log-grid'"
        )
    if name.replace("_", "-").split("-")[0] == "lavintk":
        raise PluginError(f"{name!r} begins with lavintk, which packages of plugins get by themselves: leave it out")
    if name.replace("_", "-") in {installed.replace("_", "-") for installed in installed_names()}:
        raise PluginError(f"a plugin {name!r} is installed already (`lavintk plugins list`): choose another name")
    registry = plugins.registries().get(KINDS[kind])
    if registry is not None and name in registry:
        raise PluginError(
            f"{registry.kind} {name!r} is offered by plugin {registry[name].owner!r} already: choose another name"
        )


def rendered(kind: str, name: str) -> Iterator[tuple[str, str]]:
    """Yield path and text of each file of a package for a plugin of ``kind`` called ``name``."""
    words = placeholders(kind, name)

    def fill(text: str) -> str:
        return PLACEHOLDER.sub(lambda found: words[found[1]], text)

    templates = resources.files("lavintk") / "templates"
    for folder in (COMMON, kind):
        for path, file in _files(templates / folder):
            yield fill(path.removesuffix(SUFFIX)), fill(file.read_text(encoding="utf-8"))


def placeholders(kind: str, name: str) -> dict[str, str]:
    """Return what the words in templates stand for: ``@module@`` for ``lavintk_log_grid``, for example."""
    snake = name.replace("-", "_")
    return {
        "api": str(plugin_api.SUPPORTED[-1]),
        "class": "".join(part.capitalize() for part in snake.split("_")),
        "distribution": f"lavintk-{name.replace('_', '-')}",
        "kind": kind,
        "lavintk": ".".join(__version__.split(".")[:2]),
        "module": f"lavintk_{snake}",
        "name": name,
        "snake": snake,
        "use": USES[kind].format(name=name),
    }


def _files(folder: Traversable, path: str = "") -> Iterator[tuple[str, Traversable]]:
    """Yield the templates below ``folder`` with their paths, in alphabetical order."""
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _files(entry, f"{path}{entry.name}/")
        elif entry.name.endswith(SUFFIX):
            yield path + entry.name, entry

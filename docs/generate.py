"""Writes the parts of the pages that follow from the code.

    python docs/generate.py            write what is out of date
    python docs/generate.py --check    only name it, and end with 1

``<!-- generated: NAME -->`` and ``<!-- end -->`` in a page enclose such a part. ``<!-- file: NAME -->`` in front of a
code block says that the block is a file of the page's examples, ``<!-- image: NAME -->`` that they need a picture.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import click
import yaml
from pydantic.fields import FieldInfo

from lavintk import hookspecs
from lavintk.cli import make_group
from lavintk.cli.train import FLAGS
from lavintk.data.records import Record
from lavintk.models.catalog import CATALOG
from lavintk.plugins import load_plugins
from lavintk.recipe import Recipe, Section, shipped
from lavintk.registry import Choice, Registry

if TYPE_CHECKING:
    from lavintk.registry import Option

DOCS = Path(__file__).parent
PAGES = ("cli.md", "recipe.md", "data.md", "evaluation.md", "models.md", "plugins/hooks.md")
"""The pages with generated parts."""
WIDTH = 98
"""Columns of the terminal for which help is written."""

PART = re.compile(r"(<!-- generated: (\S+)(?: ([^\n]+?))? -->\n)(.*?)(<!-- end -->)", re.DOTALL)
FILE = re.compile(r"<!-- file: (\S+) -->\n+```\w*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
IMAGE = re.compile(r"<!-- image: (\S+) -->")


def main(arguments: list[str]) -> int:
    """Write or check the pages and return the exit code."""
    checking, stale = "--check" in arguments, False
    for page in (DOCS / name for name in PAGES):
        text = page.read_text(encoding="utf-8")
        if (fresh := refreshed(text)) == text:
            continue
        stale = True
        if not checking:
            page.write_text(fresh, encoding="utf-8")
        print(
            f"docs/{page.relative_to(DOCS)} {'is out of date: run python docs/generate.py' if checking else 'written'}"
        )
    return int(checking and stale)


def refreshed(page: str) -> str:
    """Return the text of a page with its generated parts made anew."""

    def made(part: re.Match[str]) -> str:
        opening, kind, argument, _, closing = part.groups()
        return f"{opening}\n{PARTS[kind](*filter(None, [argument]))}\n\n{closing}"

    with TemporaryDirectory() as folder:
        write_examples(page, Path(folder))
        with contextlib.chdir(folder):
            return PART.sub(made, page)


def write_examples(page: str, folder: Path) -> list[str]:
    """Write the example files and pictures of a page into ``folder``; return the names of the files."""
    files = dict(FILE.findall(page))
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    for name in IMAGE.findall(page):
        from PIL import Image

        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (28, 28), "red").save(folder / name)
    return list(files)


def commands(command: click.Command, path: str = "lavintk") -> Iterator[tuple[str, click.Command]]:
    """Yield each command below ``command`` with how it is called, groups before what they hold."""
    yield path, command
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from commands(inner, f"{path} {name}")


# The parts


def command_help() -> str:
    """Return the help of every command, those of plugins of this distribution included."""
    group = own_commands()
    return "\n\n".join(f"## {path}\n\n{_block(_help(group, path))}" for path, _ in commands(group))


def own_commands() -> click.Group:
    """Return the command line with what plugins of this distribution alone add."""
    group, plugins = make_group(with_plugins=False), load_plugins()
    for record in plugins.records():
        if record.distribution == "lavintk":
            plugins.call_one(record.name, "lavintk_register_commands", group=group)
    return group


def _help(group: click.Group, path: str) -> str:
    context = click.Context(group, info_name="lavintk", terminal_width=WIDTH - 2, **group.context_settings)
    command: click.Command = group
    for name in path.split()[1:]:
        assert isinstance(command, click.Group)
        command = command.commands[name]
        context = click.Context(command, info_name=name, parent=context)
    return command.get_help(context)


def shipped_recipes() -> str:
    """Return a list of the recipes that come with lavintk: each with the first line of its file."""
    first_lines = {name: path.read_text(encoding="utf-8").splitlines()[0] for name, path in shipped().items()}
    return "\n".join(f"- `{name}`: {line.removeprefix('# ')}" for name, line in first_lines.items())


def recipe_keys() -> str:
    """Return a table of all keys for each section of a recipe."""
    top = {name: field for name, field in Recipe.model_fields.items() if not _is_section(field)}
    tables = [f"### Top level\n\n{_keys(top)}"]
    for name, field in Recipe.model_fields.items():
        if _is_section(field):
            section: Any = field.annotation
            inner = {f"{name}.{key}": value for key, value in section.model_fields.items()}
            tables.append(f"### {name}\n\n{inspect.getdoc(section)}\n\n{_keys(inner)}")
    return "\n\n".join(tables)


def recipe_flags() -> str:
    """Return which key each flag of ``lavintk train`` overrides."""
    rows = ((f"`--{flag.replace('_', '-')}`", f"`{key}`") for flag, key in FLAGS.items())
    return _table(("flag", "key"), rows)


def entries(kind: str) -> str:
    """Return what lavintk's own plugins offer of one kind, with the options of each."""
    offered = []
    for entry in _registry(kind):
        options = entry.declared_options()
        offered.append(f"- `{entry.name}`: {entry.summary}.")
        offered += [f"    - `{o.name}={_value(o.default)}`: {o.help}" for o in options]
    return "\n".join(offered)


def format_options(name: str) -> str:
    """Return the options of a record format."""
    options = _registry("datasets")[name].declared_options()
    return _table(("option", "type", "default", "what it says"), map(_option_row, options))


def format_records(choice: str) -> str:
    """Return what the records of a page's example file look like once they are read."""
    shown = [_record(record) for record in _registry("datasets").create(Choice.parse(choice)).load("train")]
    return _block("\n\n".join(shown))


def catalog() -> str:
    """Return the models known by name."""
    rows = ((f"`{e.name}`", e.kind, e.licence, e.summary) for e in CATALOG.values())
    return _table(("name", "kind", "licence", "what it is"), rows)


def model_types(which: str) -> str:
    """Return the kinds of models that are supported: ``language``, ``gguf`` or ``vision``."""
    from lavintk.models.gguf_source import ARCHITECTURES
    from lavintk.models.language import LANGUAGE_TYPES, VISION_TYPES

    types = {"language": LANGUAGE_TYPES, "gguf": ARCHITECTURES, "vision": VISION_TYPES}
    return ", ".join(f"`{name}`" for name in types[which])


def hook(name: str) -> str:
    """Return a hook: its signature as heading, when it is called, and its arguments."""
    spec = getattr(hookspecs, name)
    said, *arguments = re.split(r"^:param (\w+): ", inspect.getdoc(spec) or "", flags=re.MULTILINE)
    listed = [f"- `{name}`: {' '.join(text.split())}" for name, text in zip(arguments[::2], arguments[1::2])]
    declared = ", ".join(f"{p.name}: {p.annotation}" for p in inspect.signature(spec).parameters.values())
    return _markdown("\n\n".join([f"### {spec.__name__}({declared})", said.strip(), "\n".join(listed)]))


PARTS: dict[str, Callable[..., str]] = {
    "commands": command_help,
    "recipes": shipped_recipes,
    "recipe-keys": recipe_keys,
    "recipe-flags": recipe_flags,
    "entries": entries,
    "options": format_options,
    "records": format_records,
    "catalog": catalog,
    "model-types": model_types,
    "hook": hook,
}


# How they are written


def type_in_words(annotation: Any) -> str:
    """Return a type as a reader of recipes calls it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_in_words(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(type_in_words, arguments)))
    if origin is Literal:
        return " or ".join(f"`{_value(value)}`" for value in arguments)
    if origin is tuple:
        return f"list of {len(arguments)} numbers"
    names = {Choice: "name", str: "text", int: "whole number", float: "number", bool: "`true` or `false`"}
    return {**names, type(None): "`null`"}[annotation]


def _keys(fields: dict[str, FieldInfo]) -> str:
    rows = []
    for key, field in fields.items():
        default = "required" if field.is_required() else f"`{_value(field.get_default(call_default_factory=True))}`"
        kind = type_in_words(field.annotation) + "".join(map(_limit, field.metadata))
        rows.append((f"`{key}`", kind, default, field.description or ""))
    return _table(("key", "type", "default", "what it says"), rows)


def _limit(metadata: Any) -> str:
    limits = {"ge": "at least", "gt": "above"}
    return "".join(f", {word} {getattr(metadata, name):g}" for name, word in limits.items() if hasattr(metadata, name))


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def _option_row(option: Option) -> tuple[str, ...]:
    default = "required" if option.required else f"`{_value(option.default)}`"
    return f"`{option.name}`", f"`{option.type}`", default, option.help


def _value(value: Any) -> str:
    """Return a value as a recipe writes it."""
    if isinstance(value, Choice) or value == "":
        return str(value) or '""'
    if isinstance(value, tuple):
        value = list(value)
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def _registry(kind: str) -> Registry[Any]:
    """Return a registry with what is offered by plugins of this distribution alone."""
    plugins = load_plugins()
    own = {record.name for record in plugins.records() if record.distribution == "lavintk"}
    kept: Registry[Any] = Registry(kind)
    for entry in plugins.registries()[kind]:
        if entry.owner in own:
            kept.owned_by(entry.owner).add(entry.name, entry.factory, options=entry.options, summary=entry.summary)
    return kept


def _record(record: Record) -> str:
    lines = [f"record {record.id}"]
    for message in record.messages:
        lines.append(f"  {message.role}: " + message.text.replace("\n", "\n    "))
    for image in record.images:
        place = f"{len(image)} bytes" if isinstance(image, bytes) else image.name if image.is_absolute() else str(image)
        lines.append(f"  image: {place}")
    return "\n".join(lines)


def _markdown(text: str) -> str:
    """Turn a docstring's marks into those of Markdown."""
    return re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text.replace("``", "`"))


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _block(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

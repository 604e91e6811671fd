"""``lavintk_export.json``: what an exported folder says of itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lavintk.data.images import ImageProcessor
from lavintk.errors import ModelError
from lavintk.registry import Choice

DESCRIPTION = "lavintk_export.json"
"""The file that makes a folder an export of lavintk's."""
FORMAT = 1
"""Version of the description that this code reads."""
CONDITIONS = ({"all"}, {"text", "image"})
"""Keys under which a folder may name its decoders."""


def is_export(folder: Path) -> bool:
    """Whether ``folder`` was written by ``lavintk export``."""
    return (folder / DESCRIPTION).is_file()


@dataclass(frozen=True)
class Manifest:
    """The parts of the description that running the model takes.

    :param decoders: graph of each condition: ``{"all": ...}``, or ``{"text": ..., "image": ...}``.
    :param embed_tokens: graph from ids to embeddings; None where the decoders take ids.
    :param vision: graph from pixels to the embeddings of visual tokens, or None.
    :param template: kind for :func:`lavintk.data.template.make_template`, or path of a Jinja file.
    :param visual_tokens: per image; 0 without vision.
    :param evaluation: the recipe's data, split, evaluation and longest answer, where there is any.
    :param context_length: tokens that the decoders can read; None if no file says.
    :param content: all that the file holds.
    """

    folder: Path
    decoders: Mapping[str, Path]
    embed_tokens: Path | None
    vision: Path | None
    template: str
    system: str | None
    visual_tokens: int
    images: ImageProcessor | None
    evaluation: Mapping[str, Any]
    context_length: int | None
    content: Mapping[str, Any] = field(repr=False)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the description and see that the files it names are there.

        :raises ModelError: no export, of another version, or with faults, which are all listed.
        """
        content = _read_description(folder)
        faults: list[str] = []
        graphs, prompt = _section(content, "graphs", faults), _section(content, "prompt", faults)
        decoders = graphs.get("decoder")
        if not isinstance(decoders, dict) or set(decoders) not in CONDITIONS:
            faults.append(f"graphs.decoder must name graphs for 'all', or for 'text' and 'image'; found {decoders!r}")
            decoders = {}
        embed_tokens, vision = graphs.get("embed_tokens"), graphs.get("vision")
        paths = {f"graphs.decoder.{key}": path for key, path in decoders.items()}
        paths |= {f"graphs.{key}": graphs[key] for key in ("embed_tokens", "vision") if graphs.get(key)}
        faults += [f"{key}: {fault}" for key, path in paths.items() if (fault := _file_fault(folder, path))]
        template = prompt.get("template")
        if isinstance(template, str) and template.endswith(".jinja"):
            if fault := _file_fault(folder, template):
                faults.append(f"prompt.template: {fault}")
            template = str(folder / template)
        if not isinstance(template, str):
            faults.append(f"prompt.template must be a text, found {template!r}")
        images = _image_processor(content.get("image"), faults)
        if vision is not None and not (images and embed_tokens and prompt.get("visual_tokens")):
            faults.append("a vision graph needs graphs.embed_tokens, image and prompt.visual_tokens as well")
        if faults:
            raise ModelError(
                f"{folder} is damaged, or {DESCRIPTION} was changed by hand:\n"
                + "\n".join(f"  - {fault}" for fault in faults)
                + "\nExport the run anew with `lavintk export`."
            )
        return cls(
            folder=folder,
            decoders={key: folder / path for key, path in decoders.items()},
            embed_tokens=folder / embed_tokens if embed_tokens else None,
            vision=folder / vision if vision else None,
            template=str(template),
            system=prompt.get("system"),
            visual_tokens=int(prompt.get("visual_tokens") or 0) if vision else 0,
            images=images,
            evaluation=content.get("evaluation") or {},
            context_length=_context_length(folder),
            content=content,
        )

    def test_data(self) -> Choice | None:
        """Return the records that the recipe tests on, where it names some."""
        return as_choice(self.evaluation.get("data"))


def as_choice(value: Any) -> Choice | None:
    """Return what a recipe writes as ``NAME:option=value`` or as a mapping with ``name``; None for nothing."""
    if not value:
        return None
    if isinstance(value, Mapping):
        return Choice(str(value["name"]), {key: option for key, option in value.items() if key != "name"})
    return Choice.parse(str(value))


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    if not path.is_file():
        found = "does not exist" if not folder.exists() else f"has no {DESCRIPTION}"
        found = "is a file" if folder.is_file() else found
        if program := _whose(folder):
            raise ModelError(
                f"{folder} {found}: it is a folder for {program}. lavintk runs, measures and compares onnx folders "
                "only; `lavintk export RUN --format onnx` makes one"
            )
        raise ModelError(f"{folder} {found}, so it is no exported folder; `lavintk export RUN` makes one")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}. Export the run anew with `lavintk export`.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object, found {type(content).__name__}")
    if content.get("format") != FORMAT:
        raise ModelError(
            f"{path} has format {content.get('format')!r} (written by lavintk {content.get('lavintk', 'unknown')}), "
            f"this version reads format {FORMAT}. Export the run anew, or install the version that wrote it."
        )
    return content


def _whose(folder: Path) -> str:
    """Return the program whose model files lie in ``folder``; empty where there are none."""
    for pattern, program in (("adapter_config.json", "PEFT"), ("*.gguf", "llama.cpp"), ("config.json", "transformers")):
        if next(folder.glob(pattern), None) is not None:
            return program
    return ""


def _section(content: Mapping[str, Any], name: str, faults: list[str]) -> Mapping[str, Any]:
    found = content.get(name)
    if isinstance(found, dict):
        return found
    faults.append(f"{name} must be a mapping, found {found!r}")
    return {}


def _file_fault(folder: Path, path: Any) -> str:
    if not isinstance(path, str):
        return f"a path is needed, found {path!r}"
    if Path(path).is_absolute() or ".." in Path(path).parts:
        return f"{path} leads out of the folder"
    return "" if (folder / path).is_file() else f"{path} is missing"


def _image_processor(content: Any, faults: list[str]) -> ImageProcessor | None:
    if content is None:
        return None
    known = {declared.name for declared in fields(ImageProcessor)}
    if not isinstance(content, dict) or not {"height", "width"} <= content.keys() <= known:
        faults.append(f"image must hold height and width, and may hold {', '.join(sorted(known))}; found {content!r}")
        return None
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
    return ImageProcessor(**values)


def _context_length(folder: Path) -> int | None:
    """Return how many tokens the decoders can read, from the configuration of whichever client has one."""
    for name, keys in (
        ("genai_config.json", ("model", "context_length")),
        ("config.json", ("max_position_embeddings",)),
        ("config.json", ("text_config", "max_position_embeddings")),
    ):
        try:
            value: Any = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # meant for other programs
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, int):
            return value
    return None

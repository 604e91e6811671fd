"""What the kit hands back. Imports nothing heavy."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    exit_code: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Report:
    """What a check asked of a plugin.

    :param kept: promises that were kept, a few words each.
    :param skipped: promises that could not be asked here, each with the reason; a fault would have been raised.
    """

    kept: tuple[str, ...]
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class TinyModel:
    """Folders of random models and a little data; read only, since all tests of a session share them.

    :param folder: holds all of it.
    :param language: folder of a language model of Llama's kind with two layers and its tokenizer, as transformers
        writes it.
    :param vision: folder of a CLIP vision tower for images of 28 pixels, or None.
    :param format: name of the data's format.
    :param data: the data file: eight questions about colours; with a tower, six of them have a picture.
    """

    folder: Path
    language: Path
    vision: Path | None
    format: str
    data: Path

    @property
    def choice(self) -> str:
        """The data as the command line takes it: ``FORMAT:PATH``."""
        return f"{self.format}:{self.data}"

    def recipe(self, **sections: Any) -> dict[str, Any]:
        """Return a recipe of a few steps on a CPU for :func:`lavintk.train`: LoRA, or ``mma`` with a tower.

        :param sections: what replaces or adds to it: ``recipe(quant="mine", train={"max_steps": 2})``. Sections that
            are dictionaries on both sides are merged.
        """
        from lavintk.testing import runs

        content = (runs.recipe if self.vision is None else runs.multimodal)(self.folder)
        for name, value in sections.items():
            both = isinstance(value, dict) and isinstance(content.get(name), dict)
            content[name] = {**content[name], **value} if both else value
        return content

    def arguments(self, steps: int = 2) -> list[str]:
        """Return options for ``run_cli("train", *arguments, ...)``: the models, the data and ``steps`` steps."""
        tower = [] if self.vision is None else ["--vision", str(self.vision), "--set", "model.tap_every=2"]
        settings = (f"train.max_steps={steps}", "train.batch_size=2", "train.device=cpu", "data.max_length=128")
        return [
            "--model", str(self.language), *tower, "--data", self.choice, *(f"--set={setting}" for setting in settings)
        ]  # fmt: skip


@functools.cache
def not_asked() -> dict[str, dict[str, None]]:
    """Return what checks of this process could not ask, and of which plugins; pytest shows it at the end."""
    return {}

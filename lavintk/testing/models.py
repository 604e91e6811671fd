"""Tiny models in memory, and batches for them."""

from __future__ import annotations

import functools
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lavintk.data.batch import IGNORED, IMAGE, TEXT, Batch
from lavintk.dense import DenseQuantizer
from lavintk.models.connector import TapNeck
from lavintk.models.language import load_language_model, load_vision_model
from lavintk.models.multimodal import MultimodalModel
from lavintk.models.sources import open_source
from lavintk.models.vision import VisionTower
from lavintk.testing.tiny import VOCABULARY, write_language_model, write_vision_tower

LENGTHS = {TEXT: (5, 9), IMAGE: (8, 6)}
"""Tokens of the rows of a batch, by condition."""
TAP_EVERY, PIXELS = 2, 28


def tiny_model(vision: bool) -> MultimodalModel:
    """Return a model in fp32 on the CPU, in eval mode; each call gives the same one.

    :param vision: with a vision tower and a neck.
    """
    folder = Path(_folder().name)
    device, dtype = torch.device("cpu"), torch.float32
    language: Any = load_language_model(open_source(str(folder / "llm")), DenseQuantizer(), device=device, dtype=dtype)
    if not vision:
        return MultimodalModel(language).eval()
    tower = VisionTower(load_vision_model(open_source(str(folder / "vit")), device=device, dtype=dtype), TAP_EVERY)
    torch.manual_seed(1)
    return MultimodalModel(language, tower, TapNeck(tower.width, 8, language.config.hidden_size)).eval()


def tiny_batch(model: MultimodalModel, conditions: tuple[int, ...]) -> Batch:
    """Return two rows of each of ``conditions``; those of :data:`IMAGE` hold an image each behind the first token."""
    generator = torch.Generator().manual_seed(2)
    lengths = tuple(length for condition in conditions for length in LENGTHS[condition])
    rows = torch.tensor([condition for condition in conditions for _ in LENGTHS[condition]])
    ids = torch.randint(5, VOCABULARY, (sum(lengths),), generator=generator)
    labels, slots, start = ids.roll(-1), list[int](), 0
    for length, condition in zip(lengths, rows.tolist()):
        labels[start + length - 1] = IGNORED
        if condition == IMAGE:
            slots += range(start + 1, start + 1 + model.visual_tokens)
        start += length
    images = int((rows == IMAGE).sum())
    pixels = torch.randn(images, 3, PIXELS, PIXELS, generator=generator) if images else None
    return Batch(
        ids, labels, torch.cat([torch.arange(length) for length in lengths]), lengths, rows, pixels,
        torch.tensor(slots, dtype=torch.int64), tuple(f"row {place}" for place in range(len(lengths))),
    )  # fmt: skip


@functools.cache
def _folder() -> TemporaryDirectory[str]:
    """Return a folder with the files of the models; it lasts as long as the process."""
    folder = TemporaryDirectory(prefix="lavintk-testing-", ignore_cleanup_errors=True)
    write_language_model(Path(folder.name) / "llm")
    write_vision_tower(Path(folder.name) / "vit")
    return folder

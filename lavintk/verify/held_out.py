"""Which records an exported folder and its run are compared on."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lavintk.data.records import IMAGE_MARKER, Record
from lavintk.errors import RunError
from lavintk.registry import Choice
from lavintk.run import Run, load_records
from lavintk.scoring import evaluation_for

SEED = 0
"""Of the draw of records and of the picture that stands in for one."""
PROBES = 8
"""Records that are asked once more in the modality of which the data has none."""


@dataclass(frozen=True)
class HeldOut:
    """Records to compare on.

    :param evaluation: that fits the data.
    :param trained_on: there are no others than those of the training: its last ones are taken.
    """

    choice: Choice
    split: str
    records: list[Record]
    evaluation: Choice
    trained_on: bool

    @classmethod
    def of(cls, run: Run, data: str | Choice | None, split: str | None) -> HeldOut:
        """Read the records that the caller names, or else those of the recipe.

        :raises RunError: there are none.
        :raises DataError: the file has faults.
        """
        recipe = run.recipe.data
        given = Choice.parse(data) if isinstance(data, str) else data
        if given is not None:
            choice, default = given, recipe.test_split
        elif recipe.test is not None:
            choice, default = recipe.test, recipe.test_split
        elif recipe.validation is not None:
            choice, default = recipe.validation, recipe.validation_split
        elif recipe.train is not None:
            choice, default = recipe.train, recipe.split
        else:
            raise RunError("the recipe names no records to compare on: name some with --data FORMAT:PATH")
        trained_on = given is None and recipe.test is None and recipe.validation is None
        found = load_records(choice, split or default)
        if not found:
            raise RunError(f"{choice} has no records in split {split or default!r} to compare on")
        evaluation = evaluation_for(given, default=run.recipe.evaluation.name)
        return cls(choice, split or default, found, evaluation, trained_on)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the figures should know of the records."""
        return ("the recipe names no held-out data: these records were trained on",) if self.trained_on else ()

    def draw(self, count: int) -> list[Record]:
        """Return at most ``count`` records, the same ones each time."""
        if self.trained_on:
            return self.records[-count:]
        return random.Random(f"{SEED}/verify").sample(self.records, min(count, len(self.records)))


def in_the_other_modality(records: Sequence[Record]) -> tuple[list[Record], str]:
    """Return some records without images where all have one, and with a random picture where none has; and a note."""
    pictured = sum(bool(record.images) for record in records)
    some = records[:PROBES]
    if pictured == len(records):
        note = f"all records have images: the first {len(some)} are read once more without"
        return [_without_images(record) for record in some], note
    if pictured == 0:
        note = f"no record has an image: the first {len(some)} are read once more with a random picture"
        picture = _random_picture()
        return [replace(record, id=f"{record.id}/picture", images=(picture,)) for record in some], note
    return [], ""


def _without_images(record: Record) -> Record:
    messages = tuple(replace(message, text=message.text.replace(IMAGE_MARKER, "")) for message in record.messages)
    return replace(record, id=f"{record.id}/text", messages=messages, images=())


def _random_picture(size: int = 64) -> bytes:
    """Return smooth random colours as PNG."""
    from PIL import Image

    small = np.random.default_rng(SEED).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()

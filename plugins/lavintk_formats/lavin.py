"""``lavin``: LaVIN's chat data, ``all_data.json`` beside folders of COCO and ScienceQA images."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lavintk.data.records import Message, Record
from lavintk_formats.llava import llava_message
from lavintk_formats.reading import FileOptions, Row, conversation, describe, read_records


@dataclass(frozen=True)
class LavinOptions(FileOptions):
    """The file and where its images lie."""

    images: Path | None = field(
        default=None,
        metadata={"help": "folder with train2014/ (COCO) and train/ (ScienceQA); default: images/ beside the file"},
    )


class LavinFormat:
    """``{"all": [{"instruction", "answer", "image", "image_source", "qid"}, ...]}``.

    Instructions are complete prompts (``Instruction: ...\\nResponse:``), so records carry ``raw_prompt``. A row may
    bring ``conversations``, turns in LLaVA's form with the same kind of prompts; they then stand for instruction and
    answer, which are the first turn. LaVIN's own reader does not look at them.
    """

    def __init__(self, options: LavinOptions) -> None:
        self.options = options

    def load(self, split: str) -> list[Record]:
        """Return all records, whatever the split.

        :raises DataError: every fault of the file, missing images among them.
        """
        return read_records(self.options, self._record, key="all")

    def _record(self, row: Row) -> Record:
        folder = self.options.images.expanduser() if self.options.images else row.folder / "images"
        if row.fields.get("conversations") is None:
            messages: tuple[Message, ...] = (
                Message("user", row.text("instruction")),
                Message("assistant", row.text("answer")),
            )
        else:
            messages = conversation(row, "conversations", row.fields["conversations"], llava_message)
        return Record(row.identifier("qid"), messages, _images(row, folder), {"raw_prompt": True})


def _images(row: Row, folder: Path) -> tuple[Path, ...]:
    name, source = row.text("image", required=False), row.fields.get("image_source")
    if not name:
        return ()
    if source == "mscoco":
        return (row.image_file("image", folder / "train2014" / f"COCO_train2014_{name}"),)
    if source == "sqa":
        return (row.image_file("image", folder / "train" / row.identifier("qid") / "image.png"),)
    row.fault("image_source", f"expected 'mscoco' or 'sqa', found {describe(source)}")
    return ()

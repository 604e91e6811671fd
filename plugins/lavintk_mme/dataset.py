"""The format ``mme``: the benchmark's folder, one folder for each sub-task.

A sub-task holds either images beside text files of the same name, or ``images/`` and ``questions_answers_YN/``. A text
file has two lines ``question<TAB>Yes`` or ``question<TAB>No``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from lavintk.contracts import Questions
from lavintk.data.records import Message, Record
from lavintk.errors import DataError
from lavintk_mme.files import read_text
from lavintk_mme.subtasks import BY_FOLDED_NAME, SUBTASKS

IMAGE_ENDINGS = (".jpg", ".png", ".jpeg")


@dataclass(frozen=True)
class MmeOptions:
    """The folder."""

    path: Path = field(metadata={"help": "folder with one folder for each sub-task"})
    limit: int = field(default=0, metadata={"help": "read only the first images of each sub-task; 0 reads all"})

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise ValueError(f"limit must be 0 (all images) or more, got {self.limit}")


class MmeFormat:
    """Two records for each image, ``SUBTASK/IMAGE/1`` and ``/2``; meta holds ``subtask`` and ``image``."""

    def __init__(self, options: MmeOptions) -> None:
        self.options = options

    def load(self, split: str) -> list[Record]:
        """Return all records, sub-tasks in the order of the published tables, whatever the split.

        :raises DataError: every fault, missing images among them.
        """
        return self._records(look_for_image=True)

    def questions(self, split: str) -> Questions:
        """Return all records without looking for images."""
        return Questions(self._records(look_for_image=False))

    def _records(self, *, look_for_image: bool) -> list[Record]:
        root = self.options.path.expanduser()
        if not root.is_dir():
            raise DataError(str(root), ["it is a file; name the folder" if root.exists() else "no such folder"])
        folders = {BY_FOLDED_NAME.get(path.name.casefold()): path for path in root.iterdir() if path.is_dir()}
        faults: list[str] = []
        records: list[Record] = []
        for name in (name for name in SUBTASKS if name in folders):
            before = len(records), len(faults)
            for text_file in islice(_text_files(folders[name]), self.options.limit or None):
                records += _image_records(name, text_file, faults, look_for_image)
            if (len(records), len(faults)) == before:
                faults.append(f"{name}: no text files with questions")
        if not faults and not records:
            faults.append(f"it has no folder of a sub-task; they are {', '.join(SUBTASKS)}")
        if faults:
            raise DataError(str(root), faults)
        return records


def _text_files(folder: Path) -> Iterator[Path]:
    inner = folder / "questions_answers_YN"
    return iter(sorted((inner if inner.is_dir() else folder).glob("*.txt")))


def _image_records(subtask: str, text_file: Path, faults: list[str], look_for_image: bool) -> list[Record]:
    image = _image_of(text_file)
    where = f"{subtask}/{text_file.name}"
    if image is None and look_for_image:
        faults.append(f"{where}: no image of this name ending in {', '.join(IMAGE_ENDINGS)}")
    name = image.name if image else text_file.stem
    inner: list[str] = []
    lines = [line.rstrip("\r") for line in read_text(text_file, inner).split("\n") if line.strip()]
    faults += [f"{subtask}/{fault}" for fault in inner]
    if not inner and len(lines) != 2:
        faults.append(f"{where}: expected two lines, found {len(lines)}")
    records = []
    for number, line in enumerate(lines, 1):
        question, tab, reference = line.rpartition("\t")
        if not tab or reference.strip().lower() not in ("yes", "no"):
            faults.append(f"{where}, line {number}: expected question, tab, Yes or No, found {line!r}")
            continue
        messages = (Message("user", question.strip()), Message("assistant", reference.strip()))
        images = (image,) if image and look_for_image else ()
        records.append(Record(f"{subtask}/{name}/{number}", messages, images, {"subtask": subtask, "image": name}))
    return records


def _image_of(text_file: Path) -> Path | None:
    folder = text_file.parent
    if folder.name == "questions_answers_YN":
        folder = folder.parent / "images"
    for ending in IMAGE_ENDINGS:
        for candidate in (folder / f"{text_file.stem}{ending}", folder / f"{text_file.stem}{ending.upper()}"):
            if candidate.is_file():
                return candidate
    return None

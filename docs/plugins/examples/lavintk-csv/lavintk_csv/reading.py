"""Reads the files of ``csv``."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from lavintk.data.records import Message, Record
from lavintk.errors import DataError

REQUIRED = ("question", "answer")
KNOWN = (*REQUIRED, "image")


class CsvFormat:
    """See :class:`lavintk.contracts.DatasetFormat`.

    :param path: the file; paths of images start at its folder.
    :param delimiter: what stands between the cells of a row.
    """

    def __init__(self, path: Path, delimiter: str) -> None:
        self.path, self.delimiter = path.expanduser(), delimiter

    def load(self, split: str) -> list[Record]:
        """Return all records, whatever the split, in the order of the file.

        :raises DataError: every fault of the file.
        """
        faults: list[str] = []
        records = []
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as file:
                rows = csv.DictReader(file, delimiter=self.delimiter)
                faults += _faults_of_head(rows.fieldnames or ())
                for row in () if faults else rows:
                    records.append(self._record(row, rows.line_num, faults))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            faults.append(f"it cannot be read: {error}")
        if not records and not faults:
            faults.append("it holds no records")
        if faults:
            raise DataError(str(self.path), faults)
        return records

    def _record(self, row: Mapping[str | None, str | None], line: int, faults: list[str]) -> Record:
        """Return the record of a row; what is wrong with it is added to ``faults``."""
        faults += [f"line {line}: {name}: it is empty" for name in REQUIRED if not (row[name] or "").strip()]
        if None in row:
            faults.append(f"line {line}: it has more cells than the head")
        images: tuple[Path, ...] = ()
        if name := row.get("image"):
            images = (self.path.parent / name,)
            if not images[0].is_file():
                faults.append(f"line {line}: image: no file {images[0]}")
        question, answer = row["question"] or "", row["answer"] or ""
        return Record(f"{self.path.stem}-{line}", (Message("user", question), Message("assistant", answer)), images)


def _faults_of_head(names: object) -> list[str]:
    """Return what is wrong with the names of the columns."""
    columns = list(names) if isinstance(names, (list, tuple)) else []
    found = ", ".join(columns) or "nothing"
    faults = [f"line 1: the column {name!r} is missing; found {found}" for name in REQUIRED if name not in columns]
    return faults + [f"line 1: nothing is known of the column {name!r}" for name in columns if name not in KNOWN]

"""The record format ``csv``: a CSV file with the columns question and answer, and image where there are pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lavintk import hookimpl

if TYPE_CHECKING:
    from lavintk.contracts import DatasetFormat
    from lavintk.registry import Registry

lavintk_api = 1


@dataclass(frozen=True)
class CsvOptions:
    """Where the file is and how it is written."""

    path: Path = field(metadata={"help": "the data file"})
    delimiter: str = field(default=",", metadata={"help": "what stands between the cells of a row"})

    def __post_init__(self) -> None:
        if len(self.delimiter) != 1:
            raise ValueError(f"option 'delimiter' must be one character, got {self.delimiter!r}")


def make_csv(options: CsvOptions) -> DatasetFormat:
    """Return what reads the file."""
    from lavintk_csv.reading import CsvFormat

    return CsvFormat(options.path, options.delimiter)


@hookimpl
def lavintk_register_datasets(registry: Registry[DatasetFormat]) -> None:
    """Offer ``csv``."""
    registry.add("csv", make_csv, options=CsvOptions, summary="CSV with question, answer and image")

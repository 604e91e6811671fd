"""Reads data files and keeps every fault, so that one error shows all of them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from lavintk.data.records import IMAGE_MARKER, ImageSource, Message, Record
from lavintk.errors import DataError, did_you_mean


@dataclass(frozen=True)
class FileOptions:
    """Options of every format that reads one file."""

    path: Path = field(metadata={"help": "the data file"})
    limit: int = field(default=0, metadata={"help": "read only the first records; 0 reads all"})

    def __post_init__(self) -> None:
        check_limit(self.limit)


def check_limit(limit: int) -> None:
    """Refuse a negative limit with a ValueError, as options dataclasses do."""
    if limit < 0:
        raise ValueError(f"limit must be 0 (all records) or more, got {limit}")


@dataclass(frozen=True)
class Row:
    """One row of a file, with the list that collects the file's faults.

    :param place: where the row stands, for example ``"line 3"``.
    :param default_id: the record's id if the row brings none.
    :param fields: what the row holds.
    :param folder: relative image paths start here.
    :param faults: shared by all rows of a file.
    """

    place: str
    default_id: str
    fields: Mapping[str, Any]
    folder: Path
    faults: list[str]

    @property
    def where(self) -> str:
        """How faults name the row: its place, and its id if it has one."""
        return f"{self.place} (id {self.fields['id']!r})" if self.fields.get("id") else self.place

    def fault(self, name: str, found: str) -> None:
        """Note that the field ``name`` is wrong."""
        self.faults.append(f"{self.where}: {name}: {found}")

    def text(self, name: str, *, required: bool = True) -> str:
        """Return the text in ``name``; anything else is a fault and gives an empty string.

        :param required: if False, a missing or null field gives an empty string without a fault.
        """
        value = self.fields.get(name)
        if isinstance(value, str):
            return value
        if name in self.fields and (value is not None or required):
            self.fault(name, f"expected text, found {describe(value)}")
        elif required:
            present = ", ".join(self.fields) or "nothing"
            self.fault(name, f"missing; the row holds: {present}.{did_you_mean(name, self.fields)}")
        return ""

    def identifier(self, name: str = "id") -> str:
        """Return the row's id as text, or the default."""
        value = self.fields.get(name)
        if value is None:
            return self.default_id
        if isinstance(value, (str, int)) and not isinstance(value, bool):
            return str(value)
        self.fault(name, f"expected text or a whole number, found {describe(value)}")
        return self.default_id

    def images(self, name: str, value: object, folder: Path | None = None) -> tuple[ImageSource, ...]:
        """Return the images that ``value`` names: a path, a ``data:`` URL, a list of those, or None.

        :param folder: where relative paths start; the file's own folder if not given.
        """
        if value is None or value == "":
            return ()
        names = value if isinstance(value, list) else [value]
        found = (self._image(name, one, folder or self.folder) for one in names)
        return tuple(image for image in found if image is not None)

    def _image(self, name: str, value: object, folder: Path) -> ImageSource | None:
        if not isinstance(value, str):
            self.fault(name, f"expected a path or a data: URL, found {describe(value)}")
        elif value.startswith("data:"):
            try:
                return decode_data_url(value)
            except ValueError as error:
                self.fault(name, f"cannot read the data: URL {describe(value)}: {error}")
        elif "://" in value:
            self.fault(name, f"{describe(value)} is not a local file; download the image and name its path")
        else:
            return self.image_file(name, folder / Path(value).expanduser())
        return None

    def image_file(self, name: str, path: Path) -> Path:
        """Return ``path``; a file that is not there is a fault."""
        if not path.is_file():
            self.fault(name, f"no image file {path}")
        return path


def read_records(
    options: FileOptions,
    convert: Callable[[Row], Record],
    *,
    key: str | None = None,
    check: Callable[[], list[str]] = list,
) -> list[Record]:
    """Return what ``convert`` makes of each row of a JSONL file or a JSON list.

    :param convert: notes faults at the row; what it returns for a faulty row is not used.
    :param key: the list stands under this key of a JSON object.
    :param check: called after the last row; returns faults of the file as a whole.
    :raises DataError: all faults of the file, or no rows at all.
    """
    path = options.path.expanduser()
    faults: list[str] = []
    rows = islice(read_rows(path, faults, key), options.limit or None)
    return convert_rows(str(path), rows, convert, faults, check)


def convert_rows(
    subject: str,
    rows: Iterable[Row],
    convert: Callable[[Row], Record],
    faults: list[str],
    check: Callable[[], list[str]] = list,
) -> list[Record]:
    """Return the records of ``rows`` with unique ids.

    :raises DataError: ``faults`` is not empty afterwards, or there are no rows.
    """
    records: list[Record] = []
    seen: set[str] = set()
    for row in rows:
        before = len(faults)
        record = convert(row)
        if len(faults) == before:
            check_messages(row, record)
        if len(faults) > before:
            continue
        if record.id in seen:  # published files do repeat ids; errors must still name one row
            record = replace(record, id=f"{record.id} ({row.place})")
        seen.add(record.id)
        records.append(record)
    faults += check()
    if faults:
        raise DataError(subject, faults)
    if not records:
        raise DataError(subject, ["it holds no records"])
    return records


def check_messages(row: Row, record: Record) -> None:
    """Note a conversation without a question, and image markers that do not fit the images."""
    if not any(message.role == "user" and message.text.strip() for message in record.messages):
        row.fault("messages", "no user message with text")
    if any(message.role == "system" for message in record.messages[1:]):
        row.fault("messages", "a system message after the first message")
    if any(IMAGE_MARKER in message.text for message in record.messages if message.role != "user"):
        row.fault("messages", f"the marker {IMAGE_MARKER} outside a user message")
    markers = sum(message.text.count(IMAGE_MARKER) for message in record.messages)
    if markers and markers != len(record.images):
        row.fault("messages", f"{markers} markers {IMAGE_MARKER} in the text, {len(record.images)} images")


def read_rows(path: Path, faults: list[str], key: str | None = None) -> Iterator[Row]:
    """Yield the rows of a JSONL file or of a JSON list, noting lines that are not valid.

    Rows are numbered from 1.

    :raises DataError: the file is missing, is not UTF-8, or is no JSON.
    """
    check_file(path)
    if key is None and _first_byte(path) != b"[":
        numbered: Iterator[tuple[str, int, Any]] = _lines(path, faults)
    else:
        numbered = (("record", number, value) for number, value in enumerate(_listed(path, key), 1))
    for unit, number, value in numbered:
        if isinstance(value, dict):
            yield Row(f"{unit} {number}", f"{path.stem}-{number}", value, path.parent, faults)
        else:
            faults.append(f"{unit} {number}: expected an object with fields, found {describe(value)}")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    :raises DataError: the file is missing, is not UTF-8, or is no JSON.
    """
    check_file(path)
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(str(path), [f"byte {error.start} is not UTF-8"], "Save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        fault = f"line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}"
        raise DataError(str(path), [fault]) from error


def check_file(path: Path) -> None:
    """Refuse a path that is no file."""
    if path.is_dir():
        raise DataError(str(path), ["it is a folder; name the file"])
    if not path.is_file():
        raise DataError(str(path), ["no such file"])


def decode_data_url(url: str) -> bytes:
    """Return the bytes of a ``data:...;base64,...`` URL; raise ValueError for any other."""
    header, comma, payload = url.partition(",")
    if not comma or not header.endswith(";base64"):
        raise ValueError("expected data:image/...;base64,...")
    return base64.b64decode(payload, validate=True)


def describe(value: object, limit: int = 48) -> str:
    """Return ``value`` as short JSON, for messages."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _lines(path: Path, faults: list[str]) -> Iterator[tuple[str, int, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield "line", number, json.loads(text)
            except UnicodeDecodeError as error:
                faults.append(f"line {number}: byte {error.start} is not UTF-8; save the file as UTF-8")
            except json.JSONDecodeError as error:
                faults.append(f"line {number}, column {error.colno}: not valid JSON: {error.msg}")


def _listed(path: Path, key: str | None) -> list[Any]:
    content = read_json(path)
    if key is not None:
        if not isinstance(content, dict) or key not in content:
            raise DataError(str(path), [f"expected an object with the key {key!r}, found {describe(content)}"])
        content = content[key]
    if not isinstance(content, list):
        raise DataError(str(path), [f"expected a list of records, found {describe(content)}"])
    return content


def conversation(
    row: Row, name: str, turns: object, convert: Callable[[Row, str, Mapping[str, Any]], Message | None]
) -> tuple[Message, ...]:
    """Return the messages of a list of turns; ``convert`` gets each turn and the name that faults use."""
    if not isinstance(turns, list) or not turns:
        row.fault(name, f"expected a list of messages, found {describe(turns)}")
        return ()
    messages = []
    for index, turn in enumerate(turns):
        if isinstance(turn, dict):
            messages.append(convert(row, f"{name}[{index}]", turn))
        else:
            row.fault(f"{name}[{index}]", f"expected an object, found {describe(turn)}")
    return tuple(message for message in messages if message is not None)

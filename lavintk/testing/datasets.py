"""What :func:`lavintk.testing.check_dataset` asks."""

from __future__ import annotations

import functools
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

from lavintk.contracts import DatasetFormat, QuestionSource
from lavintk.data.labels import IGNORED
from lavintk.data.records import IMAGE_MARKER, ImageSource, Message, Record, Role
from lavintk.data.template import Template, make_template
from lavintk.errors import DataError
from lavintk.testing.outcome import Report
from lavintk.testing.promises import Promise, Promises, class_name

VISUAL_TOKENS = 3
LOAD = "DatasetFormat.load"
FEWEST = 3
"""Rows that a file must have for some of them to be spoilt."""


def check(
    make: Callable[[Path], DatasetFormat], path: Path | None, split: str, bad: Path | None, faults: Sequence[str]
) -> Report:
    """See :func:`lavintk.testing.check_dataset`."""
    if bad is None and faults:
        raise ValueError("faults are what the error on bad data must say: name that data with bad=")
    promises = Promises(class_name(make(path or Path())))
    records = _read(promises, make, path, split)
    _schema(promises, records)
    _images(promises, records)
    _masks(promises, records)
    _questions(promises, make(path or Path()), records, split)
    _missing(promises, make, path, split)
    if bad is not None:
        _told_faults(promises, make, bad, split, faults)
    elif path is None or not path.is_file():
        promises.skip(LOAD, "bad rows: the data is no file of rows; give some that are wrong with bad= and faults=")
    else:
        _spoilt_rows(promises, make, path, split)
    return promises.report()


def _read(promises: Promises, make: Callable[[Path], DatasetFormat], path: Path | None, split: str) -> list[Record]:
    with promises.keep(LOAD, "returns a list of records, the same each time") as promise:
        records, again = make(path or Path()).load(split), make(path or Path()).load(split)
        promise.require(isinstance(records, list), f"it is a {type(records).__name__}")
        promise.require(len(records) > 0, f"the split {split!r} has none")
        strangers = {type(record).__name__ for record in records} - {"Record"}
        promise.require(not strangers, f"among them are {', '.join(sorted(strangers))}")
        promise.require(records == again, f"{len(records)} at first, then {len(again)}, and they are not equal")
    return records


def _schema(promises: Promises, records: Sequence[Record]) -> None:
    with promises.keep("Record.id", "is a text, unique within its file") as promise:
        ids = [record.id for record in records]
        wrong = [found for found in ids if not isinstance(found, str) or not found]
        promise.require(not wrong, f"{len(wrong)} of {len(ids)} are no text or empty, for example {wrong[:1]!r}")
        twice = sorted({found for found in ids if ids.count(found) > 1}) if len(set(ids)) < len(ids) else []
        promise.require(not twice, f"{', '.join(map(repr, twice[:3]))} stands for more than one record")
    with promises.keep(
        "Record.messages", "are messages of known roles with text, a system message only first"
    ) as promise:
        for record in records:
            _messages(promise, record)
    with promises.keep("Record.meta", "is a mapping with names as keys") as promise:
        for record in records:
            good = isinstance(record.meta, Mapping) and all(isinstance(key, str) for key in record.meta)
            promise.require(good, f"record {record.id!r} has {record.meta!r}")


def _messages(promise: Promise, record: Record) -> None:
    where = f"record {record.id!r}"
    promise.require(isinstance(record.messages, tuple), f"{where} has a {type(record.messages).__name__}, not a tuple")
    for place, message in enumerate(record.messages):
        promise.require(isinstance(message, Message), f"{where}: message {place} is a {type(message).__name__}")
        promise.require(message.role in get_args(Role), f"{where}: message {place} has the role {message.role!r}")
        promise.require(isinstance(message.text, str), f"{where}: the text of message {place} is {message.text!r}")
        late = place > 0 and message.role == "system"
        promise.require(not late, f"{where}: message {place} is a system message")
    asked = any(message.role == "user" and message.text.strip() for message in record.messages)
    promise.require(asked, f"{where} has no user message with text, so nothing would be asked")


def _images(promises: Promises, records: Sequence[Record]) -> None:
    with promises.keep(
        "Record.images", f"can be read, and fit the markers {IMAGE_MARKER}, which users write"
    ) as promise:
        for record in records:
            promise.require(isinstance(record.images, tuple), f"record {record.id!r} has no tuple of images")
            for image in record.images:
                found = _about_image(image)
                promise.require(not found, f"record {record.id!r}: {found}")
            markers = sum(message.text.count(IMAGE_MARKER) for message in record.messages)
            fit = markers in (0, len(record.images))
            promise.require(fit, f"record {record.id!r} has {markers} markers and {len(record.images)} images")
            astray = any(IMAGE_MARKER in message.text for message in record.messages if message.role != "user")
            promise.require(not astray, f"record {record.id!r} has a marker outside a user message")


def _about_image(image: ImageSource) -> str:
    """Return what is wrong with an image, or nothing."""
    from PIL import Image, UnidentifiedImageError

    if not isinstance(image, (Path, bytes)):
        return f"an image is a {type(image).__name__}, not a Path or bytes"
    try:
        with Image.open(image if isinstance(image, Path) else io.BytesIO(image)) as opened:
            opened.load()
    except (OSError, UnidentifiedImageError) as error:
        return f"an image cannot be read: {error}"
    return ""


def _masks(promises: Promises, records: Sequence[Record]) -> None:
    text = "end with an assistant message where an answer is known: training sees the answers and nothing else"
    template, tokenizer = _template()
    with promises.keep("Record.messages", text) as promise:
        for record in records:
            row = template.tokenize_record(record)
            where = f"record {record.id!r}"
            last = record.messages[-1].role
            promise.require(row.trained > 0, f"{where} has no trained token; its last message is the {last}'s")
            answers = "".join(message.text for message in record.messages if message.role == "assistant")
            labels = [label for label in row.labels if label != IGNORED]
            trained = tokenizer.decode(labels, skip_special_tokens=True)
            promise.require(trained == answers, f"{where} trains {trained[:60]!r}, its answers are {answers[:60]!r}")


@functools.cache
def _template() -> tuple[Template, Any]:
    """Return a chat template and its tokenizer, which knows every byte."""
    from transformers import AutoTokenizer

    from lavintk.testing.tiny import write_tokenizer

    with TemporaryDirectory() as folder:
        make: Any = AutoTokenizer
        tokenizer = make.from_pretrained(write_tokenizer(Path(folder)))
    return make_template(tokenizer, "chat", visual_tokens=VISUAL_TOKENS), tokenizer


def _questions(promises: Promises, format: DatasetFormat, records: Sequence[Record], split: str) -> None:
    if not isinstance(format, QuestionSource):
        return
    with promises.keep(
        "QuestionSource.questions", "returns the records that load() does, without their images"
    ) as promise:
        known = {record.id: record.messages for record in records}
        for record in format.questions(split).records:
            promise.require(known.get(record.id) == record.messages, f"record {record.id!r} is another one there")


def _missing(promises: Promises, make: Callable[[Path], DatasetFormat], path: Path | None, split: str) -> None:
    if path is None:
        promises.skip(LOAD, "missing files: the format reads no file")
        return
    with promises.keep(LOAD, "raises DataError for a file that is not there, and names it") as promise:
        nowhere = path.with_name(f"not-there-{path.name}")
        error = _error_of(promise, make, nowhere, split)
        promise.require(nowhere.name in str(error), f"the message does not name it: {error}")
    with promises.keep(LOAD, "takes any name of a split, or raises DataError"), suppress(DataError):
        make(path).load("no-such-split")


def _error_of(promise: Promise, make: Callable[[Path], DatasetFormat], path: Path, split: str) -> DataError:
    """Return the DataError that reading ``path`` raises."""
    try:
        records = make(path).load(split)
    except DataError as error:
        return error
    raise AssertionError(promise.broken(f"it returned {len(records)} records instead"))


def _told_faults(
    promises: Promises, make: Callable[[Path], DatasetFormat], bad: Path, split: str, faults: Sequence[str]
) -> None:
    with promises.keep(LOAD, "raises one DataError with every fault found") as promise:
        error = _error_of(promise, make, bad, split)
        for expected in faults:
            told = any(expected in fault for fault in error.faults)
            promise.require(told, f"none of its {len(error.faults)} faults says {expected!r}:\n{error}")
        promise.require(len(error.faults) >= len(faults), f"{len(error.faults)} faults told, {len(faults)} expected")


def _spoilt_rows(promises: Promises, make: Callable[[Path], DatasetFormat], path: Path, split: str) -> None:
    """Spoil rows of a copy; each fault must be told with its row's number, and no good row have one."""
    spoilt = spoil(path.read_text(encoding="utf-8-sig"))
    if spoilt is None:
        promises.skip(
            LOAD,
            f"bad rows: {path.name} is no JSON list or lines of at least {FEWEST} rows; give wrong data with bad= "
            "and faults=",
        )
        return
    text, unit, wrong = spoilt
    with promises.keep(LOAD, "raises one DataError with every bad row, by its line or record") as promise:
        with _beside(path) as copy:
            copy.write_text(text, encoding="utf-8")
            error = _error_of(promise, make, copy, split)
        for number, what in wrong.items():
            told = any(re.search(rf"\b{number}\b", fault) for fault in error.faults)
            promise.require(told, f"{unit} {number} is {what}, and no fault names it:\n{error}")
        for fault in error.faults:
            named = any(re.search(rf"\b{number}\b", fault) for number in wrong)
            promise.require(named, f"wrong are {unit}s {', '.join(map(str, wrong))} only, but it says: {fault}")


def spoil(text: str) -> tuple[str, str, dict[int, str]] | None:
    """Return ``text`` with bad rows, how rows are counted, and what is wrong by number (from 1).

    None if it is neither JSON lines, nor a JSON list, nor an object with such a list, of enough rows.
    """
    try:
        content = json.loads(text)
    except ValueError:
        lines = text.splitlines()
        if len(lines) < FEWEST or not all(line.lstrip().startswith("{") for line in lines if line.strip()):
            return None
        return "\n".join(["7", '{"broken": ', "{}", *lines[FEWEST:]]) + "\n", "line", {
            1: "no object", 2: "no JSON", 3: "an object without fields",
        }  # fmt: skip
    rows = content
    if isinstance(content, dict):
        rows = next((value for value in content.values() if isinstance(value, list)), None)
    if not isinstance(rows, list) or len(rows) < FEWEST:
        return None
    rows[0], rows[2] = 7, {}
    return json.dumps(content), "record", {1: "no object", 3: "an object without fields"}


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Yield a place of the same name in a folder that holds what lies beside ``path``."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        for sibling in path.absolute().parent.iterdir():
            if sibling.name == path.name:
                continue
            try:
                (folder / sibling.name).symlink_to(sibling, target_is_directory=sibling.is_dir())
            except OSError:  # where links need a right that tests seldom have
                copy: Callable[..., object] = shutil.copytree if sibling.is_dir() else shutil.copyfile
                copy(sibling, folder / sibling.name)
        yield folder / path.name

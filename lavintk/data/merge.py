"""Alpaca's and LLaVA's files to one file in the form of LaVIN's ``all_data.json``.

Each row is ``{"instruction", "answer", "image", "options", "image_source", "qid"}`` as LaVIN's own scripts write it:
the instruction is a whole prompt. A conversation of several turns stays one row; its turns stand in LLaVA's form under
``conversations``, with ``instruction`` and ``answer`` for the first of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lavintk.data.records import IMAGE_MARKER
from lavintk.errors import DataError, LavintkError

Row = dict[str, Any]
HUMAN, ASSISTANT = "human", "gpt"
COCO_FOLDER, COCO_PREFIX = "train2014", "COCO_train2014_"
"""Where LaVIN looks for the images of these rows."""


@dataclass
class Merged:
    """The rows and how many there are of each kind."""

    rows: list[Row] = field(default_factory=list)
    alpaca: int = 0
    llava: int = 0
    several_turns: int = 0
    with_image: int = 0


def merge(alpaca: Sequence[Path], llava: Sequence[Path], out: Path, images: Path | None = None) -> Merged:
    """Write ``all_data.json`` from the files, in their order; the same files give the same bytes.

    :param alpaca: files of instruction, input, output; rows get the ids ``alpaca_0``, ``alpaca_1``, ...
    :param llava: files of conversations; rows get the ids ``gpt4_0``, ``gpt4_1``, ..., counted over all files.
    :param images: LaVIN's image folder; each image is then looked for in its ``train2014/``.
    :raises DataError: every fault of all files; nothing is written then.
    """
    if out.absolute() in {path.absolute() for path in (*alpaca, *llava)}:
        raise LavintkError(f"--out {out} is one of the files to merge; name another one")
    if not out.absolute().parent.is_dir():
        raise LavintkError(f"--out {out}: the folder {out.absolute().parent} does not exist")
    faults: list[str] = []
    merged = Merged()
    for number, (place, row) in enumerate(_rows(alpaca, faults)):
        merged.rows.append(_from_alpaca(row, f"alpaca_{number}", place, faults))
    merged.alpaca = len(merged.rows)
    for number, (place, row) in enumerate(_rows(llava, faults)):
        merged.rows.append(_from_llava(row, f"gpt4_{number}", place, faults, images))
    merged.llava = len(merged.rows) - merged.alpaca
    if faults:
        raise DataError("the data to merge", faults, "Nothing was written.")
    if not merged.rows:
        raise DataError("the data to merge", ["the files hold no rows"])
    merged.several_turns = sum("conversations" in row for row in merged.rows)
    merged.with_image = sum(row["image"] is not None for row in merged.rows)
    _write(merged.rows, out)
    return merged


def as_prompt(text: str) -> str:
    r"""Return the whole prompt for an instruction, as LaVIN's scripts make it.

    The image's marker goes with its newline, and one pass turns two spaces into one.
    """
    for marker in (f"{IMAGE_MARKER}\n", f"\n{IMAGE_MARKER}", IMAGE_MARKER):
        text = text.replace(marker, "")
    return f"Instruction: {text}\nResponse:".replace("  ", " ").strip()


def _from_alpaca(row: Any, name: str, place: str, faults: list[str]) -> Row:
    texts = []
    for key, required in (("instruction", True), ("input", False), ("output", True)):
        value = row.get(key) if isinstance(row, dict) else None
        if not isinstance(value, str) and (required or value is not None):
            faults.append(f"{place}: {key}: expected text, found {_short(value)}")
        texts.append(value if isinstance(value, str) else "")
    instruction, given, answer = texts
    return _row(name, f"{instruction} {given}" if given else instruction, answer, None)


def _from_llava(row: Any, name: str, place: str, faults: list[str], images: Path | None) -> Row:
    if not isinstance(row, dict):
        faults.append(f"{place}: expected an object with fields, found {_short(row)}")
        return {}
    turns = _turns(row.get("conversations"), place, faults)
    image = _image(row.get("image"), place, faults, images)
    if image is None and turns and IMAGE_MARKER in turns[0]:
        faults.append(f"{place}: the marker {IMAGE_MARKER} in the first question, but no image")
    if not turns:
        return {}
    made = _row(name, turns[0], turns[1], image)
    if len(turns) > 2:
        pairs = zip(turns[::2], turns[1::2], strict=True)
        made["conversations"] = [
            turn
            for question, answer in pairs
            for turn in ({"from": HUMAN, "value": as_prompt(question)}, {"from": ASSISTANT, "value": answer})
        ]
    return made


def _row(name: str, instruction: str, answer: str, image: str | None) -> Row:
    return {
        "instruction": as_prompt(instruction),
        "answer": answer,
        "image": image,
        "options": None,
        "image_source": None if image is None else "mscoco",
        "qid": name,
    }


def _turns(turns: Any, place: str, faults: list[str]) -> list[str]:
    """Return the texts, question and answer in turn; empty after a fault."""
    if not isinstance(turns, list) or not turns:
        faults.append(f"{place}: conversations: expected a list of turns, found {_short(turns)}")
        return []
    before = len(faults)
    texts = []
    for number, turn in enumerate(turns):
        where, wanted = f"{place}: conversations[{number}]", ASSISTANT if number % 2 else HUMAN
        speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if speaker != wanted:
            faults.append(f"{where}.from: expected {wanted!r}, since both take turns, found {_short(speaker)}")
        if not isinstance(text, str):
            faults.append(f"{where}.value: expected text, found {_short(text)}")
            continue
        if number and IMAGE_MARKER in text:
            faults.append(f"{where}.value: the marker {IMAGE_MARKER} belongs in the first question")
        texts.append(text)
    if len(turns) % 2:
        faults.append(f"{place}: conversations: the last question has no answer")
    return [] if len(faults) > before else texts


def _image(name: Any, place: str, faults: list[str], images: Path | None) -> str | None:
    """Return the name as LaVIN's reader completes it: without folder and ``COCO_train2014_``."""
    if name is None or name == "":
        return None
    if not isinstance(name, str) or Path(name).name != name:
        faults.append(f"{place}: image: expected the name of a file of COCO's train2014, found {_short(name)}")
        return None
    short = name.removeprefix(COCO_PREFIX)
    if images is not None and not (path := images / COCO_FOLDER / f"{COCO_PREFIX}{short}").is_file():
        faults.append(f"{place}: image: no image file {path}")
    return short


def _rows(paths: Sequence[Path], faults: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield each row of the files with its place; a file that cannot be read is a fault."""
    for path in paths:
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            faults.append(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8")
        except OSError as error:
            faults.append(f"{path}: {error.strerror or error}")
        else:
            read = _list if text.lstrip().startswith("[") else _lines
            yield from read(path, text, faults)


def _list(path: Path, text: str, faults: list[str]) -> Iterator[tuple[str, Any]]:
    try:
        for number, row in enumerate(json.loads(text), 1):
            yield f"{path}, record {number}", row
    except json.JSONDecodeError as error:
        faults.append(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}")


def _lines(path: Path, text: str, faults: list[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield f"{path}, line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            faults.append(f"{path}, line {number}: expected a JSON list or one object per line: {error.msg}")


def _write(rows: Sequence[Row], out: Path) -> None:
    """Write one row per line, replacing an old file in one step."""
    partial = out.with_name(f"{out.name}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.write('{"all": [\n')
            for place, row in enumerate(rows):
                file.write(json.dumps(row, ensure_ascii=False) + (",\n" if place + 1 < len(rows) else "\n"))
            file.write("]}\n")
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def _short(value: object, limit: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."

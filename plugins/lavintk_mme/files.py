"""Answer files in the layout of MME's evaluation tool: ``<subtask>.txt``, two adjacent lines for each image."""

from __future__ import annotations

from pathlib import Path

from lavintk.errors import DataError
from lavintk_mme.subtasks import BY_FOLDED_NAME, SUBTASKS

AnswerLine = tuple[str, str, str, str]
"""Image, question, reference and answer."""


def read_answer_files(folder: Path) -> tuple[dict[str, list[AnswerLine]], list[str]]:
    """Return the lines of each sub-task, and the names of text files that belong to none.

    :raises DataError: every fault of every file, or the folder holds none.
    """
    if not folder.is_dir():
        found = "it is a file; name the folder" if folder.exists() else "no such folder"
        raise DataError(str(folder), [f"{found} with one <subtask>.txt for each sub-task"])
    found_files = {}
    others = []
    for path in sorted(folder.glob("*.txt")):
        name = BY_FOLDED_NAME.get(path.stem.casefold())
        if name is None:
            others.append(path.name)
        else:
            found_files[name] = path
    if not found_files:
        raise DataError(str(folder), [f"no <subtask>.txt; the sub-tasks are {', '.join(SUBTASKS)}"])
    faults: list[str] = []
    lines = {name: _read(found_files[name], faults) for name in SUBTASKS if name in found_files}
    faults += [f"{found_files[name].name}: it holds no answers" for name, inner in lines.items() if not inner]
    if faults:
        raise DataError(str(folder), faults)
    return lines, others


def _read(path: Path, faults: list[str]) -> list[AnswerLine]:
    text = read_text(path, faults)
    before, lines = len(faults), []
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        fields = line.split("\t", 3)
        if len(fields) != 4:
            faults.append(
                f"{path.name}, line {number}: expected image, question, reference and answer with tabs between"
            )
        elif fields[2].strip().lower() not in ("yes", "no"):
            faults.append(f"{path.name}, line {number}: the reference must be Yes or No, found {fields[2]!r}")
        else:
            lines.append((fields[0], fields[1], fields[2].strip(), fields[3]))
    if len(faults) == before:
        _check_pairs(path, lines, faults)
    return lines


def _check_pairs(path: Path, lines: list[AnswerLine], faults: list[str]) -> None:
    for place in range(0, len(lines) - 1, 2):
        first, second = lines[place][0], lines[place + 1][0]
        if first != second:
            faults.append(f"{path.name}: the lines of an image must be adjacent, found {first!r} and {second!r}")
            return  # everything behind it is shifted
    if len(lines) % 2:
        faults.append(f"{path.name}: image {lines[-1][0]!r} has one line instead of two")


def read_text(path: Path, faults: list[str]) -> str:
    """Return a file's text, or nothing and a fault if it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        faults.append(f"{path.name}: byte {error.start} is not UTF-8")
    except OSError as error:
        faults.append(f"{path.name}: {error}")
    return ""

"""The logger ``csvlog``: writes what a run reports into CSV files, in the folder ``csvlog`` of the run."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lavintk import hookimpl

if TYPE_CHECKING:
    from lavintk.contracts import RunInfo, StepInfo

lavintk_api = 1

FOLDER = "csvlog"
"""Where the files lie in the folder of a run: a logger keeps to a folder of its own."""


@hookimpl
def lavintk_run_started(run: RunInfo) -> None:
    """Make the folder; a run that goes on after an interruption finds it there."""
    (run.folder / FOLDER).mkdir(exist_ok=True)


@hookimpl
def lavintk_step_finished(run: RunInfo, step: StepInfo) -> None:
    """Add a row to ``steps.csv``; memory in GiB, the rest in the units of :class:`lavintk.contracts.StepInfo`."""
    append(run.folder / FOLDER / "steps.csv", {"step": step.step, **step.figures()})


@hookimpl
def lavintk_evaluation_finished(run: RunInfo, step: int, name: str, scores: dict[str, float]) -> None:
    """Add a row for each score to ``evaluations.csv``."""
    for score, value in scores.items():
        row = {"step": step, "evaluation": name, "score": score, "value": value}
        append(run.folder / FOLDER / "evaluations.csv", row)


@hookimpl
def lavintk_run_finished(run: RunInfo, status: str) -> None:
    """Write down how the run ended."""
    append(run.folder / FOLDER / "runs.csv", {"name": run.name, "status": status})


def append(path: Path, row: Mapping[str, object]) -> None:
    """Add a row to a CSV file, which gets a head with the names of the columns when it is new."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)

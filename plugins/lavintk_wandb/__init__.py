"""Weights & Biases: sends configuration, metrics and summary of a run to wandb.

Only when asked to: install ``wandb`` and set ``LAVINTK_WANDB=1`` or wandb's own ``WANDB_PROJECT``
(``LAVINTK_WANDB=0`` overrules it). Entity, API key and offline mode are set as wandb documents them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavintk import hookimpl

if TYPE_CHECKING:
    from lavintk.contracts import RunInfo, StepInfo

lavintk_api = 1

DEFAULT_PROJECT = "lavintk"

_runs: dict[Path, Any] = {}


def _asked() -> bool:
    wish = os.environ.get("LAVINTK_WANDB", "")
    return wish != "0" if wish else bool(os.environ.get("WANDB_PROJECT"))


@hookimpl
def lavintk_run_started(run: RunInfo) -> None:
    """Open a run of wandb, if the user asked for it and wandb is installed."""
    if not _asked():
        return
    try:
        from wandb import init  # by name: a folder "wandb" full of old runs imports as an empty package
    except ImportError as error:
        if error.name == "wandb":
            return
        raise  # installed, but broken: who asked for it should know
    _runs[run.folder] = init(
        project=os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT,
        name=run.name,
        dir=str(run.folder),
        config={
            **run.recipe,
            "total_steps": run.total_steps,
            "trainable_parameters": run.trainable_parameters,
        },
    )


@hookimpl
def lavintk_step_finished(run: RunInfo, step: StepInfo) -> None:
    """Send the figures of a step; memory in GiB, the rest in the units of :meth:`StepInfo.figures`."""
    if run.folder not in _runs:
        return
    _runs[run.folder].log({f"train/{name}": value for name, value in step.figures().items()}, step=step.step)


@hookimpl
def lavintk_evaluation_finished(run: RunInfo, step: int, name: str, scores: dict[str, float]) -> None:
    """Send the scores of an evaluation; the last ones stand in the summary."""
    if run.folder not in _runs:
        return
    figures = {f"evaluation/{name}/{score}": value for score, value in scores.items()}
    _runs[run.folder].log(figures, step=step)
    _runs[run.folder].summary.update(figures)


@hookimpl
def lavintk_run_finished(run: RunInfo, status: str) -> None:
    """Add how the run ended to the summary, and close it."""
    if run.folder in _runs:
        opened = _runs.pop(run.folder)
        opened.summary.update({"status": status})
        opened.finish(exit_code=1 if status == "failed" else 0)

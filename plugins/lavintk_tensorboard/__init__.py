"""TensorBoard: writes event files of each run under ``<run>/tensorboard``.

Nothing to set; look at them with ``tensorboard --logdir runs``. ``LAVINTK_DISABLE=tensorboard`` turns it off.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from lavintk import hookimpl

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from lavintk.contracts import RunInfo, StepInfo

lavintk_api = 1

FLUSH_SECONDS = 10
"""How far a running TensorBoard lags behind training at most."""

_writers: dict[Path, SummaryWriter] = {}


def _writer(run: RunInfo) -> SummaryWriter:
    """Return the run's open writer; a resumed run gets a further event file in the same folder."""
    if run.folder not in _writers:
        from torch.utils.tensorboard import SummaryWriter  # takes a second, and --help does without

        _writers[run.folder] = SummaryWriter(str(run.folder / "tensorboard"), flush_secs=FLUSH_SECONDS)
    return _writers[run.folder]


@hookimpl
def lavintk_run_started(run: RunInfo) -> None:
    """Open the event file and note the recipe in it."""
    recipe = json.dumps(dict(run.recipe), indent=2, default=str)
    writer = _writer(run)
    writer.add_text("recipe", f"```json\n{recipe}\n```")
    writer.add_scalar("run/trainable_parameters", run.trainable_parameters)


@hookimpl
def lavintk_step_finished(run: RunInfo, step: StepInfo) -> None:
    """Write the figures of a step; memory in GiB, the rest in the units of :meth:`StepInfo.figures`."""
    for name, value in step.figures().items():
        _writer(run).add_scalar(f"train/{name}", value, step.step)


@hookimpl
def lavintk_evaluation_finished(run: RunInfo, step: int, name: str, scores: dict[str, float]) -> None:
    """Write the scores of an evaluation, and to disk at once: the next ones may be far off."""
    for score, value in scores.items():
        _writer(run).add_scalar(f"evaluation/{name}/{score}", value, step)
    _writer(run).flush()


@hookimpl
def lavintk_checkpoint_saved(run: RunInfo) -> None:
    """Bring to disk what led to the checkpoint, so that a crash later on does not lose it."""
    _writer(run).flush()


@hookimpl
def lavintk_run_finished(run: RunInfo) -> None:
    """Close the event file."""
    if run.folder in _writers:
        _writers.pop(run.folder).close()

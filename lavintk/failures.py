"""What is said of a step that failed: which records took part, what to lower, and where."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lavintk.data.batch import Batch
from lavintk.fitting import advice_for
from lavintk.plugins import Plugins
from lavintk.run import RECIPE, Run


def not_finite(what: str, value: float, guilty: Sequence[Batch], run: Run, step: int, dtype: torch.dtype) -> str:
    """Return what is said of a step whose ``what``, its loss for example, became infinite or no number.

    :param guilty: micro-batches that may be the cause. :param step: steps taken before. :param dtype: of the computing.
    """
    ids = [name for batch in guilty for name in batch.record_ids]
    shown = f"{', '.join(ids[:20])}{f' and {len(ids) - 20} more' if len(ids) > 20 else ''}"
    wider = " or use train.precision=bf16" if dtype == torch.float16 else ""
    return (
        f"the {what} became {value} in step {step + 1}, with the records {shown}. Nothing of this step "
        f"was applied. Look at these records with `lavintk data preview`, or lower train.lr "
        f"({run.recipe.train.lr:g}){wider}{_in_which_file(run, step)}."
    )


def what_to_lower(
    window: Sequence[Batch], run: Run, step: int, plugins: Plugins, device: torch.device, recomputing: bool
) -> str:
    """Return what to change after a step over ``window`` for which the device's memory did not suffice.

    :param step: steps taken before. :param recomputing: whether layers are computed again in the backward pass.
    """
    recipe = run.recipe
    longest = max(max(batch.lengths) for batch in window)
    advice = [f"train.batch_size (now {recipe.train.batch_size})"] if recipe.train.batch_size > 1 else []
    advice.append(f"data.max_length (now {recipe.data.max_length}; this row has {longest} tokens)")
    first = "" if recomputing else "Set train.checkpointing=true. "
    fitting = advice_for(recipe, plugins, device, same_base=step > 0)
    return f"{fitting} {first}Lower {', or '.join(advice)}{_in_which_file(run, step)}."


def _in_which_file(run: Run, step: int) -> str:
    """Say where a run that goes on takes its settings from; one that took no step can be given others."""
    return f"; to go on, in {run.folder / RECIPE}" if step else ""

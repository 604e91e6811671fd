"""Whether a run can go on: what its checkpoints rest on must be as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lavintk.checkpoints import checkpoints, how_to_go_on
from lavintk.errors import RunError
from lavintk.run import RECIPE, Run

SETTLED = (
    "model.connector", "model.tap_every", "model.neck", "model.patch_layer", "quant", "vision_quant", "embed_quant",
    "adapter", "optim", "train.adapter_precision",
)  # fmt: skip
"""Settings that a run keeps to its end: what is in its checkpoints means nothing under others."""


def check_resumable(run: Run) -> None:
    """Check that ``run`` has a checkpoint and still the settings that this rests on.

    :raises RunError: what is missing or was changed, and what to do.
    """
    if not checkpoints(run.folder):
        raise RunError(how_to_go_on(run.folder))
    before, now = (dict(_settings(recipe)) for recipe in (run.manifest.get("recipe", {}), run.recipe.dump()))
    changed = [f"{k} was {before[k]!r}, is {now[k]!r}" for k in SETTLED if before.get(k, now[k]) != now[k]]
    if changed:
        raise RunError(
            f"{run.folder / RECIPE} was changed in what a run cannot change on its way: {'; '.join(changed)}. "
            "Change it back to go on, or start anew with another --out."
        )


def _settings(recipe: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every section and setting of a dumped recipe by its dotted key."""
    for key, value in recipe.items():
        yield prefix + key, value
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{key}.")

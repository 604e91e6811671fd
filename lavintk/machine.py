"""What a run asks of the machine that it starts on, checked before anything is loaded."""

from __future__ import annotations

from lavintk.errors import RecipeError
from lavintk.recipe import Recipe


def check_machine(recipe: Recipe) -> None:
    """Check that this machine has what ``recipe`` insists on; torch is imported only where it has to be asked.

    :raises RecipeError: ``train.engine`` is ``graph``, and the device is not one of CUDA or is not there.
    """
    if recipe.train.engine != "graph":
        return
    from lavintk.devices import pick_device

    device = pick_device(recipe.train.device)
    if device.type != "cuda":
        found = f"train.device is {recipe.train.device!r}"
        if recipe.train.device == "auto":
            found += ", which finds none here"
        raise RecipeError(
            "train.engine", [f"'graph' was asked for, but CUDA graphs need a CUDA device, and {found}"],
            "Use --engine auto or eager (train.engine).",
        )  # fmt: skip

"""How many decoder layers are computed again in the backward pass, where a recipe leaves that open.

A layer that keeps what it computed saves a third of its time and takes some ten times the memory of its input. With
``train.checkpointing: auto`` layers keep it as far as memory goes, the last ones first, since they are gone through
first on the way back.
"""

from __future__ import annotations

from bisect import bisect_left

import torch

from lavintk.data.batch import IGNORED, TEXT, Batch
from lavintk.engine.randomness import random_state_kept
from lavintk.models.multimodal import MultimodalModel
from lavintk.plan import engine_of, plan_of
from lavintk.plugins import Plugins
from lavintk.recipe import Recipe, make_recipe

FILLED = 0.9
"""How much of the memory layers may fill that keep what they computed: validation needs some, and plans err."""
WORTH_IT = 1 / 8
"""Share of the layers below which none keeps anything: it would save less than a twentieth of a step."""


def recomputes_freely(recipe: Recipe, engine: str | None = None) -> bool:
    """Whether it is left open how many decoder layers are recomputed; streamed ones all are.

    :param engine: the one that was chosen, by default the one that the recipe asks for.
    """
    train = recipe.train
    all_are = train.stream != "none" or (engine or engine_of(recipe)) == "layerwise"
    return train.checkpointing == "auto" and not all_are


def recomputing_least(
    model: MultimodalModel,
    recipe: Recipe,
    plugins: Plugins,
    limit: float,
    engine: str | None = None,
    tokens: int | None = None,
    kept: int | None = None,
    least: int = 0,
) -> tuple[Recipe, int]:
    """Return ``recipe`` with as few recomputed decoder layers as memory demands, and how many those are.

    They are all where ``limit`` does not suffice either way.

    :param model: loaded, or an outline. :param limit: bytes of device memory in all, of which :data:`FILLED` is used.
    :param engine: see :func:`lavintk.plan.plan_of`; likewise ``tokens`` and ``kept``.
    :param least: recompute no fewer.
    """
    layers = len(model.layers)

    def recomputing(count: int) -> Recipe:
        setting = True if count == layers else count or False
        return make_recipe(recipe.dump(), {"train.checkpointing": setting})

    def fits(count: int) -> bool:
        return plan_of(model, recomputing(count), plugins, engine, tokens, kept).device <= FILLED * limit

    count = bisect_left(range(layers), True, lo=min(least, layers), key=fits)
    if layers - count < WORTH_IT * layers:
        count = layers
    return recomputing(count), count


def kept_by_layer(model: MultimodalModel, tokens: int) -> int:
    """Return the bytes that the first decoder layer of a loaded model keeps for its backward pass, on a CUDA device.

    It is run once over ``tokens`` made-up tokens, since no formula knows what an adapter, or its dropout, keeps.

    :raises torch.OutOfMemoryError: not even one layer fits.
    """
    device, none = model.device, torch.zeros(0, dtype=torch.int64)
    row = Batch(
        torch.zeros(tokens, dtype=torch.int64), torch.full((tokens,), IGNORED), torch.arange(tokens), (tokens,),
        torch.full((1,), TEXT), None, none, ("made up",),
    )  # fmt: skip
    training = model.training
    model.train()
    with random_state_kept(device), torch.no_grad():
        states, passage = model.start(row.to(device))
        states.requires_grad_()
        with torch.enable_grad():
            model.run_layer(0, states, passage)  # libraries make their workspaces
            before = torch.cuda.memory_allocated(device)
            behind = model.run_layer(0, states, passage)
        # its output is what the next layer keeps of its input
        kept = torch.cuda.memory_allocated(device) - before
        del behind
    model.train(training)
    return kept

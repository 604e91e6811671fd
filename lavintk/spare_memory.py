"""What memory that is left is used for, where a recipe leaves that open: it makes steps faster, and changes no result.

A decoder layer that keeps what it computed saves a third of its time and takes some ten times the memory of its input
(``train.checkpointing: auto``); the first layers are recomputed rather than the last ones, since the way back goes
through the last ones first. A larger pack takes more memory at work, and weights are unpacked less often
(``train.pack_tokens: null``). Which pays more depends on the card, so plans decide. Layers of a streamed base that stay
on the device need not come there (``train.resident_layers``).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil

import torch

from lavintk.cards import Card
from lavintk.data.batch import IGNORED, TEXT, Batch
from lavintk.data.pack import GRAIN, round_up
from lavintk.engine.randomness import random_state_kept
from lavintk.models.multimodal import MultimodalModel
from lavintk.plan import MicroBatch, Plan, engine_of, micro_batch_tokens, plan_of
from lavintk.plugins import Plugins
from lavintk.recipe import Recipe, make_recipe

FILLED = 0.9
"""How much of the memory may be filled so: validation needs some, and plans err."""
WORTH_IT = 1 / 8
"""Share of the layers below which none keeps anything: it would save less than a twentieth of a step."""
LARGEST_PACK = 2048
"""Tokens of a pack up to which it grows by itself: unpacking weights takes a tenth of a step then, and less beyond."""
LARGEST_ON_HOST = 1024
"""Likewise on a CPU, where twice as many tokens are a tenth faster and take twice the memory."""
HOST_SHARE = 1 / 4
"""Share of the free host memory that packs may grow by: it belongs to other programs too."""
HOST_FACTOR = 2
"""How much more activations take on a CPU than a plan counts, since nothing is fused there."""


@dataclass(frozen=True)
class Settled:
    """What was settled.

    :param recipe: with its values in place. :param batch: micro-batches as they are now.
    :param recomputed: decoder layers that are recomputed.
    """

    recipe: Recipe
    batch: MicroBatch
    recomputed: int
    plan: Plan


def recomputes_freely(recipe: Recipe, engine: str | None = None) -> bool:
    """Whether it is left open how many decoder layers are recomputed; streamed ones all are.

    :param engine: the one that was chosen, by default the one that the recipe asks for.
    """
    all_are = recipe.train.stream != "none" or (engine or engine_of(recipe)) == "layerwise"
    return recipe.train.checkpointing == "auto" and not all_are


def packs_freely(recipe: Recipe, engine: str | None = None) -> bool:
    """Whether it is left open how many tokens a pack holds."""
    train = recipe.train
    return train.pack_tokens is None and train.pack is not False and (engine or engine_of(recipe)) == "graph"


def pack_sizes(smallest: int, step: int, largest: int = LARGEST_PACK) -> list[int]:
    """Return tokens that a pack may hold: ``smallest``, and twice as many as long as a step has that many.

    :param step: tokens of an optimizer step. :param largest: to which packs grow.
    """
    sizes = [smallest]
    while sizes[-1] < min(step, largest):
        sizes.append(min(2 * sizes[-1], round_up(step, GRAIN), max(smallest, largest)))
    return sizes


def possible_batches(recipe: Recipe) -> list[MicroBatch]:
    """Return the micro-batches that ``recipe`` leaves open, as far as it tells alone."""
    if not packs_freely(recipe):
        return [MicroBatch.of(recipe)]
    tokens, step = (
        micro_batch_tokens(recipe),
        recipe.train.batch_size * recipe.train.accumulate * recipe.data.max_length,
    )
    return [MicroBatch(size, ceil(size / recipe.data.max_length)) for size in pack_sizes(tokens, step)]


def settle(
    model: MultimodalModel,
    recipe: Recipe,
    plugins: Plugins,
    limit: float,
    card: Card,
    batches: Sequence[MicroBatch],
    engine: str | None = None,
    least: int = 0,
) -> Settled:
    """Return what takes the least time for a token within ``limit``; the first batch with least memory if nothing fits.

    :param model: loaded, or an outline. :param limit: bytes of device memory in all, of which :data:`FILLED` is used.
    :param card: on which it should be fast.
    :param batches: what micro-batches may be like, the smallest first, which is that of the recipe as it is.
    :param engine: the one that was chosen, by default the one that the recipe asks for.
    :param least: recompute no fewer layers.
    """
    layers, free = len(model.layers), recomputes_freely(recipe, engine)

    def settled(batch: MicroBatch, count: int) -> Settled:
        changes: dict[str, object] = {"train.pack_tokens": batch.tokens} if batch is not batches[0] else {}
        if free:
            changes["train.checkpointing"] = True if count == layers else count or False
        changed = make_recipe(recipe.dump(), changes)
        return Settled(changed, batch, count, plan_of(model, changed, plugins, engine, batch))

    def best_of(batch: MicroBatch) -> Settled:
        if not free:
            return settled(batch, layers)
        fits = lambda count: settled(batch, count).plan.device <= FILLED * limit  # noqa: E731
        count = bisect_left(range(layers), True, lo=min(least, layers), key=fits)
        return settled(batch, layers if layers - count < WORTH_IT * layers else count)

    first, *larger = (best_of(batch) for batch in batches)
    fitting = [first, *(found for found in larger if found.plan.device <= FILLED * limit)]
    return min(fitting, key=lambda found: found.plan.seconds(card) / found.batch.tokens)


def resident_layers(model: MultimodalModel, recipe: Recipe, plugins: Plugins, limit: float) -> int:
    """Return how many decoder layers of a streamed base the device has room for; 0 where none is streamed.

    :param model: loaded, or an outline. :param limit: bytes of device memory in all, of which :data:`FILLED` is used.
    """
    if recipe.train.stream == "none":
        return 0

    def taken(count: int) -> int:
        return plan_of(model, make_recipe(recipe.dump(), {"train.resident_layers": count}), plugins).device

    return max(0, bisect_right(range(len(model.layers)), FILLED * limit, key=taken) - 1)


def settle_on_host(
    model: MultimodalModel, recipe: Recipe, plugins: Plugins, free: int, batches: Sequence[MicroBatch]
) -> MicroBatch:
    """Return the largest micro-batch that takes little enough of the ``free`` bytes of host memory, on a CPU.

    :param batches: the smallest first, which takes what the recipe asks for.
    """
    if len(batches) == 1:
        return batches[0]
    recomputed = {"train.checkpointing": model.checkpointing}
    planned = [
        plan_of(model, make_recipe(recipe.dump(), recomputed), plugins, "eager", batch).allocated for batch in batches
    ]
    more = [HOST_FACTOR * (size - planned[0]) for size in planned]
    return [batch for batch, size in zip(batches, more) if size <= HOST_SHARE * free][-1]


def with_kept(batches: Iterable[MicroBatch], model: MultimodalModel) -> list[MicroBatch]:
    """Return ``batches`` with what a layer keeps of them measured on the device of ``model``.

    :raises torch.OutOfMemoryError: not even one layer fits.
    """
    first, *others = batches
    kept = kept_by_layer(model, first.tokens)
    return [replace(batch, kept=kept * batch.tokens // first.tokens) for batch in (first, *others)]


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

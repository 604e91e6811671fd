"""Makes a recipe fit into a card's memory, and says what would have fitted where a run did not.

What is learned stays the same: the rows of each optimizer step, the learning rate, and the precision of what is trained
are never touched. Measures are taken in the order of what they cost (:func:`_measures`); only one kind of them, fewer
bits for the vision tower and the embedding, changes what the frozen base computes, and it comes behind those that
change nothing but time. Measures that turn out not to be needed are taken back. Memory that is left then makes steps
faster (:mod:`lavintk.spare_memory`).
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, floor
from typing import Any

import torch

from lavintk.cards import UNKNOWN, Card
from lavintk.data.pack import GRAIN, round_up
from lavintk.errors import LavintkError, RecipeError
from lavintk.models.multimodal import MultimodalModel
from lavintk.plan import CONTEXT, GIB, Plan, micro_batch_tokens, outline_of, plan_of, recomputed_layers
from lavintk.plugins import Plugins
from lavintk.recipe import Recipe, make_recipe
from lavintk.spare_memory import possible_batches, recomputes_freely, resident_layers, settle

Changes = Mapping[str, Any]
"""The recipe's keys with their new values."""
FEW_BITS = 5.0
"""Bits per weight up to which a base counts as one of 4 bits."""
SPARE = GIB // 8
"""What ``--fit auto`` leaves free."""


@dataclass(frozen=True)
class Level:
    """How far a measure goes.

    :param changes: of the recipe. :param cost: what it costs, in words.
    """

    changes: Changes
    cost: str


@dataclass(frozen=True)
class Measure:
    """One way to take less memory.

    :param levels: each takes less than the one before.
    :param alters_base: whether the frozen base computes other numbers.
    """

    levels: tuple[Level, ...]
    alters_base: bool = False


@dataclass(frozen=True)
class Step:
    """A measure that was taken, as far as that took.

    :param plan: of the recipe with this and all earlier steps.
    """

    level: Level
    plan: Plan


@dataclass(frozen=True)
class Fit:
    """A recipe that fits.

    :param before: what was foretold of it as it was given. :param steps: what was changed, in order.
    """

    recipe: Recipe
    before: Plan
    steps: tuple[Step, ...]

    @property
    def plan(self) -> Plan:
        """What is foretold of the recipe."""
        return self.steps[-1].plan if self.steps else self.before

    @property
    def changes(self) -> dict[str, Any]:
        """All that was changed, by the recipe's keys."""
        return {key: value for step in self.steps for key, value in step.level.changes.items()}


def fit(
    recipe: Recipe,
    plugins: Plugins,
    limit: int,
    host: int | None = None,
    *,
    same_base: bool = False,
    spend: bool = True,
    card: Card = UNKNOWN,
    model: MultimodalModel | None = None,
) -> Fit:
    """Return ``recipe`` with as few changes as make it fit into ``limit`` bytes of device memory in all.

    :param host: bytes of host memory for what waits there; None for no limit.
    :param same_base: take no measure that alters what the frozen base computes.
    :param spend: use memory that is left for speed. :param card: on which it should be fast.
    :param model: the recipe's outline, if there is one.
    :raises RecipeError: nothing suffices; says how much is lacking and what takes most.
    """
    search = _Search(outline_of(recipe, plugins) if model is None else model, recipe, plugins, limit, host)
    found = _fit(search, same_base)
    return _spent(search, found, card) if spend else found


def _spent(search: _Search, found: Fit, card: Card) -> Fit:
    """Return ``found`` with memory that is left used for speed."""
    layers, batches = len(search.model.layers), possible_batches(found.recipe)
    settled = settle(search.model, found.recipe, search.plugins, search.limit, card, batches)
    changes: dict[str, Any] = {}
    costs = []
    if settled.batch is not batches[0]:
        changes["train.pack_tokens"] = settled.batch.tokens
        costs.append(f"packs of {settled.batch.tokens} tokens, so that weights are unpacked less often")
    if recomputes_freely(found.recipe) and settled.recomputed < layers:
        changes["train.checkpointing"] = settled.recipe.train.checkpointing
        costs.append(f"{settled.recomputed} of {layers} layers are computed again, the others keep what they computed")
    recipe, planned = settled.recipe, settled.plan
    resident = resident_layers(search.model, recipe, search.plugins, search.limit)
    if resident > recipe.train.resident_layers:
        changes["train.resident_layers"] = resident
        costs.append(f"{resident} of {layers} layers stay on the device, the others come in between")
        recipe = make_recipe(recipe.dump(), {"train.resident_layers": resident})
        planned = plan_of(search.model, recipe, search.plugins)
    if not changes:
        return replace(found, recipe=recipe)
    level = Level(changes, f"memory is left: {'; '.join(costs)}")
    return Fit(recipe, found.before, (*found.steps, Step(level, planned)))


def _fit(search: _Search, same_base: bool) -> Fit:
    taken: list[tuple[Measure, int]] = []
    if search.fits(taken):
        return search.result(taken)
    for measure in _measures(search, taken):
        if same_base and measure.alters_base:
            continue
        for level in range(len(measure.levels)):
            if search.fits([*taken, (measure, level)]):
                return search.result(search.without_needless([*taken, (measure, level)]))
        taken.append((measure, len(measure.levels) - 1))
    raise search.refusal()


def _measures(search: _Search, taken: Sequence[tuple[Measure, int]]) -> Iterator[Measure]:
    """Yield what may be done, in the order of what it costs.

    :param taken: those that were, up to the one that is asked for.
    """
    model, recipe, plugins = search.model, search.recipe, search.plugins
    if levels := tuple(_recomputing(recipe, len(model.layers))):
        yield Measure(levels)
    if recipe.train.offload is False:
        cost = "layer inputs are copied to host memory and back, behind the computing"
        yield Measure((Level({"train.offload": True}, cost),))
    if sizes := tuple(_smaller_packs(recipe)):
        cost = "smaller micro-batches of the same rows per step: weights are unpacked more often"
        yield Measure(tuple(Level({"train.pack": True, "train.pack_tokens": tokens}, cost) for tokens in sizes))
    if (quant := _few_bits(model, recipe, plugins)) is not None:
        what = f"stored as {recipe.quant} too, so the frozen base computes slightly other numbers"
        if recipe.model.vision is not None and recipe.vision_quant.name == "none":
            yield Measure((Level({"vision_quant": quant}, f"the vision tower is {what}"),), alters_base=True)
        if recipe.embed_quant.name == "none":
            yield Measure((Level({"embed_quant": quant}, f"embedding and head are {what}"),), alters_base=True)
    if recipe.train.stream == "none":
        yield Measure(tuple(_streaming(search, _together(taken))))


def _recomputing(recipe: Recipe, layers: int) -> Iterator[Level]:
    """Yield one quarter of the decoder layers, two and three, as far as more are recomputed then than now, and all."""
    now = recomputed_layers(recipe, layers)
    if now == layers:
        return
    for some in sorted({ceil(layers * quarters / 4) for quarters in (1, 2, 3)} - {layers}):
        if some > now:
            cost = f"{some} of {layers} layers are computed again in the backward pass"
            yield Level({"train.checkpointing": some}, cost)
    yield Level({"train.checkpointing": True}, "all layers are computed again in the backward pass")


def _streaming(search: _Search, before: Changes) -> Iterator[Level]:
    """Yield where the base's layers may wait, how they are asked for, and how many cannot wait where memory is short.

    :param before: changes by other measures.
    """
    places = {
        "cpu": "the base waits in host memory",
        "disk": "the base waits on the disk, and host memory need not hold it",
    }
    engines = {
        "layerwise": "each layer comes to the device twice per step, behind the computing, and the inputs of a whole "
        "step's layers wait on the host",
        "eager": "each layer comes to the device twice per micro-batch, and no inputs of a whole step have to wait",
    }
    for place, where in places.items():
        for engine, how in engines.items():
            changes = {"train.stream": place, "train.engine": engine}
            yield Level(changes, f"{where}; {how}")
            if count := search.too_many_for_host({**before, **changes}):
                cost = f"{where}, all but {count} layers, for which it has no room; {how}"
                yield Level({**changes, "train.resident_layers": count}, cost)


def _smaller_packs(recipe: Recipe) -> Iterator[int]:
    """Yield half the tokens of a micro-batch, a quarter, and so on down to one row."""
    tokens, row = micro_batch_tokens(recipe), round_up(recipe.data.max_length, GRAIN)
    while tokens > row:
        tokens = max(row, round_up(ceil(tokens / 2), GRAIN))
        yield tokens


def _few_bits(model: MultimodalModel, recipe: Recipe, plugins: Plugins) -> Any:
    """Return the base's quantizer, as a recipe writes it, if it is one of 4 bits."""
    linear = next(iter(model.linears().values()))
    quantizer = plugins.quantizers.create(recipe.quant)
    layer = quantizer.empty(linear.out_features, linear.in_features, False, torch.device("meta"))
    return recipe.dump()["quant"] if layer.bits_per_weight() <= FEW_BITS else None


class _Search:
    """Tries measures and remembers what came nearest."""

    def __init__(self, model: MultimodalModel, recipe: Recipe, plugins: Plugins, limit: int, host: int | None) -> None:
        self.model, self.recipe, self.plugins = model, recipe, plugins
        self.limit, self.host = limit, host
        self.nearest: tuple[Changes, Plan] | None = None

    def fits(self, taken: Sequence[tuple[Measure, int]]) -> bool:
        """Whether the recipe fits with these levels of measures."""
        changes = _together(taken)
        found = self._plan(changes)
        if self.nearest is None or self._lacking(found) <= self._lacking(self.nearest[1]):
            self.nearest = changes, found
        return self._lacking(found) == 0

    def without_needless(self, taken: list[tuple[Measure, int]]) -> list[tuple[Measure, int]]:
        """Return what is left when each measure but the last is taken back as far as it still fits."""
        for place in reversed(range(len(taken) - 1)):
            before, (measure, level), behind = taken[:place], taken[place], taken[place + 1 :]
            lighter = [[*before, *behind], *([*before, (measure, lower), *behind] for lower in range(level))]
            taken = next((candidate for candidate in lighter if self.fits(candidate)), taken)
        return taken

    def too_many_for_host(self, changes: Changes) -> int:
        """Return how many layers of a streamed base host memory has no room for; 0 also if it has none at all."""
        layers, host = len(self.model.layers), self.host
        if host is None:
            return 0
        fits = lambda count: self._plan({**changes, "train.resident_layers": count}).on_host <= host  # noqa: E731
        found = bisect_left(range(layers), True, key=fits)
        return found if found < layers else 0

    def result(self, taken: Sequence[tuple[Measure, int]]) -> Fit:
        """Return the recipe with these measures, and what each of them brings."""
        steps, before = [], self._plan({})
        for place, (measure, level) in enumerate(taken):
            found = self._plan(_together(taken[: place + 1]))
            steps.append(Step(measure.levels[level], found))
        return Fit(self._changed(_together(taken)), before, tuple(steps))

    def refusal(self) -> RecipeError:
        """Return the error that says how much is lacking and what takes most."""
        assert self.nearest is not None
        changes, found = self.nearest
        tried = ", ".join(f"{key}={value}" for key, value in changes.items()) or "nothing could be changed"
        faults = []
        if found.device > self.limit:
            faults.append(
                f"it needs {found.device / GIB:.2f} GiB of device memory at least ({tried}), "
                f"{(found.device - self.limit) / GIB:.2f} GiB more than {self.limit / GIB:.2f} GiB"
            )
        if self.host is not None and found.on_host > self.host:
            faults.append(
                f"it needs {found.on_host / GIB:.2f} GiB of host memory ({tried}), "
                f"{(found.on_host - self.host) / GIB:.2f} GiB more than {self.host / GIB:.2f} GiB"
            )
        return RecipeError(
            f"recipe {self.recipe.name!r}", faults,
            f"Most of the device is taken by: {_most(found)}. Take fewer bits (quant is "
            f"{self.recipe.quant}), a smaller model, shorter rows (data.max_length is {self.recipe.data.max_length}) "
            f"or fewer micro-batches in a step (train.accumulate is {self.recipe.train.accumulate}).",
        )  # fmt: skip

    def _lacking(self, found: Plan) -> int:
        on_host = 0 if self.host is None else max(0, found.on_host - self.host)
        return max(0, found.device - self.limit) + on_host

    def _plan(self, changes: Changes) -> Plan:
        return plan_of(self.model, self._changed(changes), self.plugins)

    def _changed(self, changes: Changes) -> Recipe:
        return make_recipe(self.recipe.dump(), changes) if changes else self.recipe


def _most(found: Plan) -> str:
    """Return what takes most of the device, and the context too where that takes more."""
    name, size = found.largest
    context = f"the CUDA context, {CONTEXT / GIB:.2f} GiB whatever the recipe says, then " if size < CONTEXT else ""
    return f"{context}{name}, {size / GIB:.2f} GiB"


def _together(taken: Sequence[tuple[Measure, int]]) -> dict[str, Any]:
    """Return the changes of levels of measures; later ones go over earlier ones."""
    return {key: value for measure, level in taken for key, value in measure.levels[level].changes.items()}


def parse_size(text: str, option: str = "--fit") -> int:
    """Return bytes of ``8GB`` or ``7.5GiB``. GB means GiB too, as on the boxes of graphics cards.

    :raises RecipeError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:G|GB|GiB)\s*", text, re.IGNORECASE)
    if match is None:
        raise RecipeError(option, [f"{text!r} is no size; give one such as 8GB"])
    return round(float(match[1]) * GIB)


def cuda_device(recipe: Recipe, option: str) -> torch.device:
    """Return the recipe's device, which ``option`` makes sense for if it is one of CUDA.

    :raises RecipeError: it is a CPU, or is not there.
    """
    from lavintk.devices import pick_device

    device = pick_device(recipe.train.device)
    if device.type == "cuda":
        return device
    raise RecipeError(
        option,
        [f"it is about the memory of a CUDA device, and train.device={recipe.train.device} is a CPU here"],
        "Leave --fit out: on a CPU it changes nothing for the better. For a card elsewhere, `lavintk plan` with --fit "
        "8GB prints the flags to train with.",
    )


def free_memory(recipe: Recipe) -> int:
    """Return the bytes of the recipe's CUDA device that are free, less a little; what ``--fit auto`` means.

    The context of this process is taken by then, though plans count it: that part is left free as well.

    :raises RecipeError: the recipe's device is a CPU, or is not there.
    """
    free, _ = torch.cuda.mem_get_info(cuda_device(recipe, "--fit auto"))
    return max(0, free - SPARE)


def advice_for(recipe: Recipe, plugins: Plugins, device: torch.device, same_base: bool = False) -> str:
    """Return what took most where ``device`` was full, and the ``--fit`` that would have worked; ends with a stop.

    :param same_base: see :func:`fit`; for runs that have begun.
    """
    try:
        now = plan_of(outline_of(recipe, plugins), recipe, plugins)
    except (LavintkError, OSError) as error:  # the device's fault is the one to show
        return f"No plan can be made of the recipe: {str(error).splitlines()[0]}."
    said = f"Foretold were {now.device / GIB:.2f} GiB, most of it for: {_most(now)}."
    # what was foretold did not suffice, so less than that is asked for
    limit = floor(min(available(device), 0.95 * now.device) / GIB * 10) / 10
    try:
        found = fit(recipe, plugins, round(limit * GIB), same_base=same_base, spend=False)
    except RecipeError:
        return f"{said} No --fit that leaves what is learned as it is would fit into {limit:.1f} GiB."
    changes = ", ".join(f"{key}={value}" for key, value in found.changes.items())
    return f"{said} With `--fit {limit:.1f}GB` it would take {found.plan.device / GIB:.2f} GiB ({changes})."


def largest_part(model: MultimodalModel) -> str:
    """Return which part of a loaded model takes most of its device, as a sentence."""
    sizes: Counter[str] = Counter()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device == model.device:
            sizes[_part(name)] += tensor.nbytes
    part, size = sizes.most_common(1)[0]
    return f"Of the model, {part} takes most: {size / GIB:.2f} of {sizes.total() / GIB:.2f} GiB."


def _part(name: str) -> str:
    if name.startswith("vision."):
        return "the vision tower"
    if "embed_tokens" in name or "lm_head" in name:
        return "the embedding with the output head"
    return "the stack of decoder layers" if ".layers." in name else "the rest"


def available(device: torch.device) -> int:
    """Return the bytes of a device that this process has or may have, its context included."""
    total = int(torch.cuda.get_device_properties(device).total_memory)
    if not torch.cuda.is_available():
        return total
    free, _ = torch.cuda.mem_get_info(device)
    return min(total, free + torch.cuda.memory_reserved(device) + CONTEXT)

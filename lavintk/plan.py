"""Memory and time of a training step, foretold from names and shapes: no weights are read and no GPU is needed.

Every item is a formula over the model's outline; two numbers were fitted to runs of LLaMA-7B on an H100: the
activations of the layer in work (:data:`LAYER_WORK`) and what is neither a matrix product nor unpacking
(:data:`OTHER_PER_LAYER`, :data:`OTHER_BYTES`). docs/benchmarks.md compares predictions with measurements.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch

from lavintk.contracts import Optimizer
from lavintk.data.pack import GRAIN, round_up
from lavintk.errors import RecipeError, did_you_mean
from lavintk.models.build import outline
from lavintk.models.config_source import open_config
from lavintk.models.multimodal import LOSS_CHUNK, MultimodalModel
from lavintk.plugins import Plugins
from lavintk.recipe import Recipe, make_recipe

GIB = 2**30
CONTEXT = round(0.92 * GIB)
"""Device memory of the CUDA context and its libraries on an H100; smaller cards need less."""
RESERVED = {"graph": 0.11, "eager": 0.04}
"""What the allocator holds beyond the peak, as a share of it; graphs have a pool of their own."""
PAGED_FROM = 100_000
"""Elements from which on paged optimizers keep state on the host."""
LAYER_WORK = (8, 6)
"""Tensors of the hidden and of the intermediate width that exist while a layer goes backward."""
LAYER_KEPT = (7, 3)
"""Likewise those that a layer keeps for its backward pass where it is not recomputed."""
MATRIX_SHARE, COPY_SHARE = 0.60, 0.82
"""What matrix products and unpacking reach of a card's peaks."""
OTHER_PER_LAYER, OTHER_BYTES = 0.25e-3, 300
"""The rest of a step: seconds per layer, and bytes moved per hidden value of a token and layer."""


@dataclass(frozen=True)
class Card:
    """A GPU: memory in GiB, dense 16-bit FLOP/s, memory bandwidth in bytes/s. From the makers' data sheets."""

    gib: int
    flops: float
    bandwidth: float


CARDS = {
    "t4": Card(16, 65e12, 320e9),
    "l4": Card(24, 121e12, 300e9),
    "rtx3090": Card(24, 71e12, 936e9),
    "rtx4090": Card(24, 165e12, 1008e9),
    "a100": Card(40, 312e12, 1555e9),
    "l40s": Card(48, 362e12, 864e9),
    "h100": Card(80, 990e12, 3350e9),
}


@dataclass(frozen=True)
class Plan:
    """What a micro-batch takes.

    :param items: bytes on the device at the peak, by name. :param host: bytes that are paged to the host.
    :param tokens: of a micro-batch. :param engine: ``"graph"`` or ``"eager"``.
    :param products: FLOP of the matrix products. :param unpacked: bytes read and written to unpack weights.
    :param moved: bytes moved besides. :param layers: decoder layers.
    """

    items: Mapping[str, int]
    host: Mapping[str, int]
    tokens: int
    engine: str
    products: float
    unpacked: float
    moved: float
    layers: int

    @property
    def allocated(self) -> int:
        """Peak of what torch allocates, in bytes."""
        return sum(self.items.values())

    @property
    def device(self) -> int:
        """Device memory in use in all, context included, in bytes."""
        return round(self.allocated * (1 + RESERVED[self.engine])) + CONTEXT

    def seconds(self, card: Card) -> float:
        """Return the time of a micro-batch on ``card`` where launching costs nothing."""
        products = self.products / (card.flops * MATRIX_SHARE)
        memory = self.unpacked / (card.bandwidth * COPY_SHARE) + self.moved / card.bandwidth
        return products + memory + self.layers * OTHER_PER_LAYER


def plan(recipe: Recipe, plugins: Plugins, engine: str = "graph") -> Plan:
    """Return the plan of ``recipe`` on a CUDA device in 16 bits.

    :param engine: whose memory is foretold.
    :raises LavintkError: the models cannot be found, or do not fit the recipe.
    """
    return plan_of(_outline(recipe, plugins), recipe, plugins, engine)


def plan_of(
    model: MultimodalModel, recipe: Recipe, plugins: Plugins, engine: str = "graph", tokens: int | None = None
) -> Plan:
    """Return the plan for a model of which only names and shapes are looked at.

    :param tokens: of a micro-batch, if they are known better than from the recipe.
    """
    config, tokens = model.language.config, tokens or micro_batch_tokens(recipe)
    hidden, inner, layers = config.hidden_size, config.intermediate_size, len(model.layers)
    setting = recipe.train.checkpointing
    recomputed = layers if setting in (True, "auto") else int(setting)
    sizes, largest, weights, packed = _base(model, recipe, plugins)
    trained, states, host = _trained(model, plugins.optimizers.create(recipe.optim))
    kept = 2 * tokens * (LAYER_KEPT[0] * hidden + LAYER_KEPT[1] * inner)
    items = {
        **sizes,
        "adapter and connector": trained,
        "their gradients": trained,
        "optimizer state": states,
        "layer inputs": 2 * tokens * hidden * recomputed,
        "activations of layers that are kept": kept * (layers - recomputed),
        "a layer at work": 2 * tokens * (LAYER_WORK[0] * hidden + LAYER_WORK[1] * inner),
        "an unpacked weight": largest,
        "logits of a chunk": _logits_beyond_a_layer(tokens, hidden, inner, config.vocab_size),
        "images at work": _images(model, recipe, tokens),
    }
    passes = 2 + recomputed / layers
    return Plan(
        items={name: size for name, size in items.items() if size},
        host=host,
        tokens=tokens,
        engine=engine,
        products=2.0 * weights * tokens * passes,
        unpacked=(packed + 2.0 * weights) * passes if packed < 2 * weights else 0.0,
        moved=float(OTHER_BYTES * tokens * hidden * layers),
        layers=layers,
    )


def _outline(recipe: Recipe, plugins: Plugins) -> MultimodalModel:
    """Return the recipe's model without values; of models on the hub only the configuration is fetched."""
    names = {"language": recipe.model.language, "vision": recipe.model.vision}
    return outline(recipe, plugins, {role: open_config(name) for role, name in names.items() if name is not None})


def micro_batch_tokens(recipe: Recipe) -> int:
    """Return the most tokens of a micro-batch; rows are taken to be as long as they may be."""
    train = recipe.train
    return train.pack_tokens or round_up(train.batch_size * recipe.data.max_length, GRAIN)


def _base(model: MultimodalModel, recipe: Recipe, plugins: Plugins) -> tuple[dict[str, int], int, int, int]:
    """Return bytes by kind, those of the largest unpacked weight, and weights and bytes of the decoder's layers."""
    quantizers = [plugins.quantizers.create(choice) for choice in (recipe.quant, recipe.vision_quant)]
    stored, largest, weights = [0, 0], 0, 0
    for name, linear in model.linears().items():
        in_tower, count = name.startswith("vision."), linear.out_features * linear.in_features
        layer = quantizers[in_tower].empty(
            linear.out_features, linear.in_features, linear.bias is not None, torch.device("meta")
        )
        unquantized = any(buffer.dtype.is_floating_point and buffer.numel() == count for buffer in layer.buffers())
        stored[in_tower] += 2 * count if unquantized else sum(buffer.nbytes for buffer in layer.buffers())
        weights += 0 if in_tower else count
        largest = max(largest, 0 if unquantized else 2 * count)
    shared: dict[int, tuple[str, int]] = {}
    for name, parameter in model.frozen_parameters().items():
        shared[id(parameter)] = (name, 2 * parameter.numel())
    stored[True] += sum(size for name, size in shared.values() if name.startswith("vision."))
    rest = sum(size for name, size in shared.values() if not name.startswith("vision."))
    sizes = {
        f"linear layers ({recipe.quant})": stored[False],
        "embedding, head, norms": rest,
        f"vision tower ({recipe.vision_quant})": stored[True],
    }
    return sizes, largest, weights, stored[False]


def _trained(model: MultimodalModel, optimizer: Optimizer) -> tuple[int, int, dict[str, int]]:
    """Return bytes of the trained parameters, of the state on the device, and what is paged to the host."""
    counts = [parameter.numel() for parameter in model.trainable().values()]
    state = sum(counts) * 2 * optimizer.state_bits // 8
    flat = getattr(optimizer, "elementwise", False)
    pages = optimizer.paged and (sum(counts) if flat else max(counts)) >= PAGED_FROM
    return 4 * sum(counts), 0 if pages else state, {"optimizer state (paged)": state} if pages else {}


def _logits_beyond_a_layer(tokens: int, hidden: int, inner: int, vocabulary: int) -> int:
    """Return what the logits take more than a layer at work, which does not exist at the same time."""
    logits = min(tokens, LOSS_CHUNK) * vocabulary * (2 + 3 * 4)
    layer = 2 * tokens * (LAYER_WORK[0] * hidden + LAYER_WORK[1] * inner)
    return max(0, logits - layer)


def _images(model: MultimodalModel, recipe: Recipe, tokens: int) -> int:
    """Return what the inputs of the tower's blocks and one block at work take, with an image in each row."""
    if model.vision is None:
        return 0
    config = model.vision.model.config
    places = (config.image_size // config.patch_size) ** 2 + 1
    images = max(1, tokens // recipe.data.max_length) if recipe.train.pack_tokens else recipe.train.batch_size
    widths = len(model.vision.blocks) * config.hidden_size + 8 * config.hidden_size + 2 * config.intermediate_size
    return int(2 * images * places * widths)


def parse_size(text: str) -> int:
    """Return bytes of ``8GB`` or ``7.5GiB``. GB means GiB too, as on the boxes of graphics cards.

    :raises RecipeError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:G|GB|GiB)\s*", text, re.IGNORECASE)
    if match is None:
        raise RecipeError("--fit", [f"{text!r} is no size; give one such as 8GB"])
    return round(float(match[1]) * GIB)


def find_card(name: str) -> Card:
    """Return the card called ``name``.

    :raises RecipeError: it is unknown.
    """
    if name.lower() not in CARDS:
        known = list(CARDS)
        raise RecipeError("--gpu", [f"unknown card {name!r}; known are {', '.join(known)}.{did_you_mean(name, known)}"])
    return CARDS[name.lower()]


@dataclass(frozen=True)
class Fit:
    """A recipe that fits.

    :param changes: what was changed, by the recipe's key.
    """

    recipe: Recipe
    plan: Plan
    changes: Mapping[str, Any]


def fit(recipe: Recipe, plugins: Plugins, limit: int, engine: str = "graph") -> Fit:
    """Return ``recipe`` with as few changes as make it fit into ``limit`` bytes of device memory in all.

    What is learned stays the same: rows per step, numbers and precision. Tried are recomputing all layers and then
    smaller and smaller micro-batches.

    :raises RecipeError: nothing suffices; says how much is lacking and what takes most.
    """
    model = _outline(recipe, plugins)
    smallest, least = None, None
    for changes in _changes(recipe):
        changed = make_recipe(recipe.dump(), changes) if changes else recipe
        found = plan_of(model, changed, plugins, engine)
        if found.device <= limit:
            return Fit(changed, found, changes)
        if least is None or found.device < least.device:
            smallest, least = changes, found
    assert least is not None
    name, size = max(least.items.items(), key=lambda item: item[1])
    tried = ", ".join(f"{key}={value}" for key, value in (smallest or {}).items()) or "nothing could be changed"
    raise RecipeError(
        f"recipe {recipe.name!r}",
        [
            f"it needs {least.device / GIB:.2f} GiB of device memory at least ({tried}), "
            f"{(least.device - limit) / GIB:.2f} GiB more than {limit / GIB:.2f} GiB"
        ],
        f"Most of it is: {name}, {size / GIB:.2f} GiB. Take fewer bits (quant is {recipe.quant}), a smaller model or "
        f"shorter rows (data.max_length is {recipe.data.max_length}).",
    )


def _changes(recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Yield changes of the recipe, each taking less memory than the one before."""
    yield {}
    changes: dict[str, Any] = {}
    if recipe.train.checkpointing not in (True, "auto"):
        changes["train.checkpointing"] = True
        yield dict(changes)
    tokens, row = micro_batch_tokens(recipe), round_up(recipe.data.max_length, GRAIN)
    while tokens > row:
        tokens = max(row, round_up(ceil(tokens / 2), GRAIN))
        changes |= {"train.pack": True, "train.pack_tokens": tokens}
        yield dict(changes)

"""Memory and time of a training step, foretold from names and shapes: no weights are read and no GPU is needed.

Every item is a formula over the model's outline; two numbers were fitted to runs of LLaMA-7B on an H100: the
activations of the layer in work (:data:`LAYER_WORK`) and what is neither a matrix product nor unpacking
(:data:`OTHER_PER_LAYER`, :data:`OTHER_BYTES`). docs/memory.md says what the items are, docs/benchmarks.md compares
predictions with measurements.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

import torch

from lavintk.contracts import Optimizer, Quantizer
from lavintk.data.pack import GRAIN, round_up
from lavintk.errors import RecipeError, did_you_mean
from lavintk.models.build import outline
from lavintk.models.config_source import open_config
from lavintk.models.host_memory import LEAVING
from lavintk.models.loss import DENSE_BLOCK
from lavintk.models.multimodal import LOSS_CHUNK, MultimodalModel
from lavintk.models.stream import SLOTS
from lavintk.models.vocabulary import BLOCK_ROWS
from lavintk.plugins import Plugins
from lavintk.recipe import Recipe

GIB = 2**30
CONTEXT = round(0.92 * GIB)
"""Device memory of the CUDA context and its libraries on an H100; smaller cards need less."""
WORKSPACES = 64 << 20
"""What the library of matrix products takes, on each of two streams 32 MiB on an H100; on smaller cards it is less."""
AT_WORK, UNPACKED = "a layer at work", "an unpacked weight"
"""Names of two items."""
INPUTS_ON_DEVICE = LEAVING + 1
"""Layer inputs that are on the device at a time where they wait on the host."""
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
DISK = 2.5e9
"""Bytes per second that a solid-state disk delivers; what the system still has in memory comes faster."""
PCIE_3, PCIE_4, PCIE_5 = 12e9, 22e9, 53e9
"""Bytes per second from pinned host memory over sixteen lanes, of 16, 32 and 63 GB/s by the standard."""


@dataclass(frozen=True)
class Card:
    """A GPU: memory in GiB, dense 16-bit FLOP/s, bytes/s of its memory and from the host. From data sheets."""

    gib: int
    flops: float
    bandwidth: float
    bus: float = PCIE_4


CARDS = {
    "t4": Card(16, 65e12, 320e9, PCIE_3),
    "l4": Card(24, 121e12, 300e9),
    "rtx2060": Card(6, 26e12, 336e9, PCIE_3),
    "rtx3060": Card(12, 25e12, 360e9),
    "rtx3070": Card(8, 41e12, 448e9),
    "rtx3090": Card(24, 71e12, 936e9),
    "rtx4060": Card(8, 30e12, 272e9, PCIE_4 / 2),
    "rtx4090": Card(24, 165e12, 1008e9),
    "a100": Card(40, 312e12, 1555e9),
    "l40s": Card(48, 362e12, 864e9),
    "h100": Card(80, 990e12, 3350e9, PCIE_5),
}


@dataclass(frozen=True)
class Plan:
    """What a micro-batch takes, and the optimizer step that it is a part of.

    :param items: bytes on the device at the peak, by name. :param host: bytes that wait on the host, by name.
    :param tokens: of a micro-batch. :param micro_batches: of an optimizer step.
    :param engine: ``"graph"``, ``"eager"`` or ``"layerwise"``.
    :param products: FLOP of a micro-batch's matrix products. :param unpacked: bytes it reads and writes to unpack
        weights. :param moved: bytes it moves besides.
    :param layers: decoder layers.
    :param streamed: bytes of weights that go from the host to the device in an optimizer step; ``first`` of them before
        anything can be computed.
    :param returning: bytes of layer inputs that come back from the host in an optimizer step.
    :param from_disk: whether the weights come from a disk.
    """

    items: Mapping[str, int]
    host: Mapping[str, int]
    tokens: int
    micro_batches: int
    engine: str
    products: float
    unpacked: float
    moved: float
    layers: int
    streamed: int
    first: int
    returning: int
    from_disk: bool

    @property
    def allocated(self) -> int:
        """Peak of what torch allocates, in bytes."""
        return sum(self.items.values())

    @property
    def device(self) -> int:
        """Device memory in use in all, context included, in bytes.

        The allocator holds what a layer works with once more: graphs have a pool of their own, and what is free in one
        place does not always suit the next.
        """
        return self.allocated + self.items[AT_WORK] + self.items.get(UNPACKED, 0) + CONTEXT

    @property
    def on_host(self) -> int:
        """What waits on the host in all, in bytes."""
        return sum(self.host.values())

    @property
    def largest(self) -> tuple[str, int]:
        """The item that takes most of the device, and its bytes."""
        return max(self.items.items(), key=lambda item: item[1])

    def seconds(self, card: Card) -> float:
        """Return the time of a micro-batch on ``card`` where launching costs nothing."""
        return self.step_seconds(card) / self.micro_batches

    def step_seconds(self, card: Card) -> float:
        """Return the time of an optimizer step on ``card``: what is copied is hidden behind what is computed."""
        weights = min(card.bus, DISK) if self.from_disk else card.bus
        copying = self.streamed / weights + self.returning / card.bus
        return max(self.micro_batches * self._computing(card), copying) + self.first / weights

    def _computing(self, card: Card) -> float:
        products = self.products / (card.flops * MATRIX_SHARE)
        memory = self.unpacked / (card.bandwidth * COPY_SHARE) + self.moved / card.bandwidth
        return products + memory + self.layers * OTHER_PER_LAYER


def plan(recipe: Recipe, plugins: Plugins, engine: str | None = None) -> Plan:
    """Return the plan of ``recipe`` on a CUDA device in 16 bits.

    :param engine: whose memory is foretold; by default the one that the recipe asks for.
    :raises LavintkError: the models cannot be found, or do not fit the recipe.
    """
    return plan_of(outline_of(recipe, plugins), recipe, plugins, engine)


def plan_of(
    model: MultimodalModel, recipe: Recipe, plugins: Plugins, engine: str | None = None, tokens: int | None = None
) -> Plan:
    """Return the plan for a model of which only names and shapes are looked at.

    :param tokens: of a micro-batch, if they are known better than from the recipe.
    """
    engine = engine or engine_of(recipe)
    config, tokens, train = model.language.config, tokens or micro_batch_tokens(recipe), recipe.train
    hidden, inner, layers = config.hidden_size, config.intermediate_size, len(model.layers)
    window = micro_batches(recipe, tokens)
    streaming = train.stream != "none"
    everything = streaming or engine == "layerwise" or train.checkpointing in (True, "auto")
    recomputed = layers if everything else min(layers, int(train.checkpointing))
    base = _base(model, recipe, plugins)
    ends = _vocabulary(model, recipe, plugins.quantizers.create(recipe.embed_quant))
    trained, states, host = _trained(model, recipe, plugins.optimizers.create(recipe.optim))
    input_of_layer = 2 * tokens * hidden
    inputs, waiting, gradients = _layer_inputs(recipe, engine, recomputed, window)
    at_work = 2 * tokens * (LAYER_WORK[0] * hidden + LAYER_WORK[1] * inner)
    kept = 2 * tokens * (LAYER_KEPT[0] * hidden + LAYER_KEPT[1] * inner)
    stored = sum(base.layers)
    quantized = "" if recipe.embed_quant.name == "none" else f" ({recipe.embed_quant})"
    items = {
        f"linear layers ({recipe.quant})": 0 if streaming else stored,
        f"linear layers ({recipe.quant}), {SLOTS} of {layers}": SLOTS * max(base.layers) if streaming else 0,
        f"embedding, head{quantized}, norms": ends.stored + base.norms,
        f"vision tower ({recipe.vision_quant})": base.tower,
        "adapter and connector": trained,
        "their gradients": trained,
        "optimizer state": states,
        "layer inputs": inputs * input_of_layer,
        "the window's states or gradients": gradients * input_of_layer,
        "activations of layers that are kept": kept * (layers - recomputed),
        AT_WORK: at_work,
        UNPACKED: base.largest,
        "workspaces of matrix products": WORKSPACES,
        "logits of a chunk": max(0, _loss(tokens, hidden, ends) - at_work - base.largest),
        "images at work": _images(model, recipe, tokens),
    }
    aside = {
        f"linear layers ({recipe.quant})": stored if train.stream == "cpu" else 0,
        "a layer on its way from the disk": max(base.layers) if train.stream == "disk" else 0,
        "layer inputs": waiting * input_of_layer,
        **host,
    }
    passes = 2 + recomputed / layers
    times = 2 * (1 if engine == "layerwise" else window)  # each weight once forward and once backward
    packed = stored < 2 * base.weights
    return Plan(
        items={name: size for name, size in items.items() if size},
        host={name: size for name, size in aside.items() if size},
        tokens=tokens,
        micro_batches=window,
        engine=engine,
        products=2.0 * base.weights * tokens * passes,
        unpacked=(stored + 2.0 * base.weights) * passes if packed else 0.0,
        moved=float(OTHER_BYTES * tokens * hidden * layers),
        layers=layers,
        streamed=times * stored if streaming else 0,
        first=base.layers[0] if streaming else 0,
        returning=(waiting if engine == "layerwise" else window * waiting) * input_of_layer,
        from_disk=train.stream == "disk",
    )


def engine_of(recipe: Recipe) -> str:
    """Return the engine that the recipe asks for; ``auto`` is taken to be the fastest that it allows."""
    train = recipe.train
    if train.engine != "auto":
        return train.engine
    return "graph" if train.stream == "none" else "layerwise"


def outline_of(recipe: Recipe, plugins: Plugins) -> MultimodalModel:
    """Return the recipe's model without values; of models on the hub only the configuration is fetched."""
    names = {"language": recipe.model.language, "vision": recipe.model.vision}
    return outline(recipe, plugins, {role: open_config(name) for role, name in names.items() if name is not None})


def micro_batch_tokens(recipe: Recipe) -> int:
    """Return the most tokens of a micro-batch; rows are taken to be as long as they may be."""
    train = recipe.train
    return train.pack_tokens or round_up(train.batch_size * recipe.data.max_length, GRAIN)


def micro_batches(recipe: Recipe, tokens: int) -> int:
    """Return the most micro-batches of ``tokens`` tokens that the rows of an optimizer step make."""
    train = recipe.train
    if train.pack_tokens is None:
        return train.accumulate
    return ceil(train.batch_size * train.accumulate / max(1, tokens // recipe.data.max_length))


@dataclass(frozen=True)
class _Base:
    """Bytes of each decoder layer's linear layers, of norms, of the tower, of the largest weight unpacked.

    :param weights: how many weights the decoder's linear layers have.
    """

    layers: list[int]
    norms: int
    tower: int
    largest: int
    weights: int


def _base(model: MultimodalModel, recipe: Recipe, plugins: Plugins) -> _Base:
    quantizers = [plugins.quantizers.create(choice) for choice in (recipe.quant, recipe.vision_quant)]
    sizes: dict[tuple[bool, int, int, bool], tuple[int, int]] = {}
    layers: Counter[int] = Counter()
    tower, largest, weights = 0, 0, 0
    for name, linear in model.linears().items():
        in_tower, bias = name.startswith("vision."), linear.bias is not None
        shape = in_tower, linear.out_features, linear.in_features, bias
        if shape not in sizes:
            sizes[shape] = _stored(quantizers[in_tower], linear.out_features, linear.in_features, bias)
        stored, unpacked = sizes[shape]
        largest = max(largest, unpacked)
        if in_tower:
            tower += stored
            continue
        weights += linear.out_features * linear.in_features
        layers[_layer_index(name)] += stored
    ends = ("embed_tokens.", "lm_head.")
    norms = 0
    for name, parameter in model.frozen_parameters().items():
        if name.startswith("vision."):
            tower += 2 * parameter.numel()
        elif not any(end in name for end in ends):
            norms += 2 * parameter.numel()
    return _Base([layers[index] for index in sorted(layers)], norms, tower, largest, weights)


def _layer_index(name: str) -> int:
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _stored(quantizer: Quantizer, out_features: int, in_features: int, bias: bool) -> tuple[int, int]:
    """Return the bytes that a layer takes, and those of its weight unpacked, 0 if it is not packed."""
    count = out_features * in_features
    layer = quantizer.empty(out_features, in_features, bias, torch.device("meta"))
    if any(buffer.dtype.is_floating_point and buffer.numel() == count for buffer in layer.buffers()):
        return 2 * (count + out_features * bias), 0
    return sum(buffer.nbytes for buffer in layer.buffers()), 2 * count


@dataclass(frozen=True)
class _Ends:
    """Embedding and head: their bytes, tied ones once, rows of a block of the head, bytes of one that is unpacked."""

    stored: int
    rows: int
    unpacked: int
    blocks: int


def _vocabulary(model: MultimodalModel, recipe: Recipe, quantizer: Quantizer) -> _Ends:
    language, config = model.language, model.language.config
    tied = bool(config.tie_word_embeddings)
    modules = [language.model.embed_tokens] if tied else [language.model.embed_tokens, language.lm_head]
    most = DENSE_BLOCK if recipe.embed_quant.name == "none" else BLOCK_ROWS
    rows = [min(most, config.vocab_size - first) for first in range(0, config.vocab_size, most)]
    sizes = {count: _stored(quantizer, count, config.hidden_size, False) for count in set(rows)}
    biases = [bias for module in modules if (bias := getattr(module, "bias", None)) is not None]
    stored = len(modules) * sum(sizes[count][0] for count in rows) + sum(2 * bias.numel() for bias in biases)
    return _Ends(stored, rows[0], sizes[rows[0]][1], len(rows))


def _trained(model: MultimodalModel, recipe: Recipe, optimizer: Optimizer) -> tuple[int, int, dict[str, int]]:
    """Return bytes of the trained parameters, of the state on the device, and what is paged to the host."""
    counts = [parameter.numel() for parameter in model.trainable().values()]
    size = 2 if recipe.train.adapter_precision == "bf16" else 4
    state = sum(counts) * 2 * optimizer.state_bits // 8
    flat = getattr(optimizer, "elementwise", False)
    pages = optimizer.paged and (sum(counts) if flat else max(counts)) >= PAGED_FROM
    return size * sum(counts), 0 if pages else state, {"optimizer state (paged)": state} if pages else {}


def _layer_inputs(recipe: Recipe, engine: str, recomputed: int, window: int) -> tuple[int, int, int]:
    """Return how many layer inputs are on the device and on the host, and states of a window besides.

    Micro-batch by micro-batch, the input of each recomputed layer is kept, and with ``offload`` all but the last wait
    on the host. Layer by layer, those of the whole window are; besides there is what goes from layer to layer.
    """
    aside = recipe.train.offload is not False and recomputed > 0
    kept = recomputed * window if engine == "layerwise" else recomputed
    between = window if engine == "layerwise" else 0
    if not aside:
        return kept, 0, between
    return min(kept, INPUTS_ON_DEVICE), kept if engine == "layerwise" else kept - 1, between


def _loss(tokens: int, hidden: int, ends: _Ends) -> int:
    """Return what the loss takes: logits of a chunk over a block of words, the block, and a sum of gradients.

    Logits are in 16 bits and in fp32 for a moment; over several blocks the gradients of the states add up in fp32.
    """
    logits = min(tokens, LOSS_CHUNK) * ends.rows * (2 + 4)
    return logits + ends.unpacked + (4 * tokens * hidden if ends.blocks > 1 else 0)


def _images(model: MultimodalModel, recipe: Recipe, tokens: int) -> int:
    """Return what the inputs of the tower's blocks and one block at work take, with an image in each row."""
    if model.vision is None:
        return 0
    config = model.vision.model.config
    places = (config.image_size // config.patch_size) ** 2 + 1
    images = max(1, tokens // recipe.data.max_length) if recipe.train.pack_tokens else recipe.train.batch_size
    widths = len(model.vision.blocks) * config.hidden_size + 8 * config.hidden_size + 2 * config.intermediate_size
    return int(2 * images * places * widths)


def find_card(name: str) -> Card:
    """Return the card called ``name``.

    :raises RecipeError: it is unknown.
    """
    if name.lower() not in CARDS:
        known = list(CARDS)
        raise RecipeError("--gpu", [f"unknown card {name!r}; known are {', '.join(known)}.{did_you_mean(name, known)}"])
    return CARDS[name.lower()]

"""Memory and time of a training step, foretold from names and shapes: no weights are read and no GPU is needed.

Every item is a formula over the model's outline; some numbers were fitted to runs of LLaMA on an H100 and an H200: the
activations of the layer in work (:data:`LAYER_WORK`), what the allocator holds (:data:`HELD`) and what is neither a
matrix product nor unpacking (:data:`OTHER_PER_LAYER`, :data:`OTHER_BYTES`). The vision tower's operations were counted
(:data:`BLOCK_KERNELS`). docs/memory.md says what the items are, docs/benchmarks.md compares predictions with
measurements.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from itertools import pairwise
from math import ceil

import torch

from lavintk.cards import DISK, Card
from lavintk.contracts import Optimizer, Quantizer
from lavintk.data.pack import GRAIN, round_up
from lavintk.features import why_not_the_same
from lavintk.models.build import outline
from lavintk.models.config_source import open_config
from lavintk.models.host_memory import LEAVING
from lavintk.models.loss import DENSE_BLOCK
from lavintk.models.multimodal import LOSS_CHUNK, MultimodalModel
from lavintk.models.stream import SLOTS, which_stay
from lavintk.models.vision import VisionTower
from lavintk.models.vocabulary import BLOCK_ROWS
from lavintk.plugins import Plugins
from lavintk.recipe import Recipe
from lavintk.registry import Choice

GIB = 2**30
CONTEXT = round(0.92 * GIB)
"""Device memory of the CUDA context and its libraries on an H100; smaller cards need less."""
WORKSPACES = 64 << 20
"""What the library of matrix products takes, on each of two streams 32 MiB on an H100; on smaller cards it is less."""
HELD, HELD_UNPACKED = GIB // 20, 1.75
"""What the allocator holds beyond what is allocated: bytes, and times the largest unpacked weight. Fitted to runs on an
H100 and an H200, with segments that grow (:func:`lavintk.devices.grow_segments`); the length of rows made no odds."""
EAGER = "with the engine eager the host launches operations one by one, and sets the pace"
"""Why its time cannot be foretold."""
AT_WORK, UNPACKED = "a layer at work", "an unpacked weight"
"""Names of two items."""
OUTSIDE = -1
"""The index of a linear layer in no decoder layer or block."""
INPUTS_ON_DEVICE = LEAVING + 1
"""Layer inputs that are on the device at a time where they wait on the host."""
PAGED_FROM = 100_000
"""Elements from which on paged optimizers keep state on the host."""
LAYER_WORK, LAYER_KEPT, MLP_TRAINED = (8, 4), (7, 2), (1, 1)
"""Tensors of the hidden and of the intermediate width that exist while a layer goes backward; those that it keeps for
that where it is not recomputed; how many more it keeps where something is trained in its MLP, of which those of the
intermediate width are also at work. What is kept was counted: frozen linear layers keep nothing."""
BLOCK_KEPT = (7, 2)
"""Likewise those that a block of a vision tower keeps; counted, with attention that keeps no scores."""
MATRIX_SHARE, COPY_SHARE = 0.60, 0.82
"""What matrix products and unpacking reach of a card's peaks."""
OTHER_PER_LAYER, OTHER_BYTES = 0.25e-3, 300
"""The rest of a step: seconds per layer, and bytes moved per hidden value of a token and layer."""
KERNEL, BLOCK_KERNELS = 5e-6, (24, 154)
"""Seconds of a small kernel on an H100, a round number, and how many a block of a vision tower has: forward alone, and
forward, again and backward with LaVIN's routed adapter in it. These were counted; decoder layers have fewer, fused."""


@dataclass(frozen=True)
class Work:
    """What is computed.

    :param products: FLOP of matrix products. :param unpacked: bytes read and written to unpack weights.
    :param moved: bytes moved besides. :param small: seconds in kernels that are too small for any of that to count.
    """

    products: float = 0.0
    unpacked: float = 0.0
    moved: float = 0.0
    small: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def seconds(self, card: Card) -> float:
        """Return the time on ``card`` where launching costs nothing."""
        products = self.products / (card.flops * MATRIX_SHARE)
        return products + self.unpacked / (card.bandwidth * COPY_SHARE) + self.moved / card.bandwidth + self.small


@dataclass(frozen=True)
class Streaming:
    """Weights that come to the device while it computes, once on the way forward and once on the way back.

    :param block: bytes of a decoder layer that comes. :param layers: those that come, in order.
    :param rounds: how often they all come in an optimizer step, there and back.
    :param from_disk: whether they come from a disk.
    """

    block: int
    layers: tuple[int, ...]
    rounds: int
    from_disk: bool

    def waiting(self, card: Card, forward: float, back: float) -> float:
        """Return the seconds for which computing waits in an optimizer step.

        A layer is copied from the turn of the streamed one before it to its own, while what lies between is computed.
        The first :data:`SLOTS` of a way are there already: they were the last ones of the way before.

        :param forward: seconds of a layer on the way there, in a round.
        :param back: on the way back, as far as the bus is free meanwhile.
        """
        copying = self.block / (min(card.bus, DISK) if self.from_disk else card.bus)
        gaps = [later - earlier for earlier, later in pairwise(self.layers)]
        there = sum(max(0.0, copying - gap * forward) for gap in gaps[SLOTS - 1 :])
        return self.rounds * (there + sum(max(0.0, copying - gap * back) for gap in gaps[: 1 - SLOTS]))


@dataclass(frozen=True)
class Plan:
    """What a micro-batch takes, and the optimizer step that it is a part of.

    :param items: bytes on the device at the peak, by name. :param host: bytes that wait on the host, by name.
    :param tokens: of a micro-batch. :param micro_batches: of an optimizer step.
    :param engine: ``"graph"``, ``"eager"`` or ``"layerwise"``.
    :param untimed: why no time can be foretold; an empty text if one can.
    :param decoder: what a micro-batch computes in the decoder layers; ``tower``, in the vision tower.
    :param layers: how many decoder layers there are. :param passes: how often a micro-batch goes through each of them.
    :param returning: bytes of layer inputs that come back from the host in an optimizer step.
    :param streaming: what is streamed; None if nothing is.
    """

    items: Mapping[str, int]
    host: Mapping[str, int]
    tokens: int
    micro_batches: int
    engine: str
    untimed: str
    decoder: Work
    tower: Work
    layers: int
    passes: float
    returning: int
    streaming: Streaming | None

    @property
    def allocated(self) -> int:
        """Peak of what torch allocates, in bytes."""
        return sum(self.items.values())

    @property
    def device(self) -> int:
        """Device memory in use in all, context included, in bytes.

        The allocator holds more than is allocated: graphs have a pool of their own, and what is free in one place does
        not always suit the next.
        """
        return self.allocated + HELD + round(HELD_UNPACKED * self.items.get(UNPACKED, 0)) + CONTEXT

    @property
    def held(self) -> int:
        """What the allocator holds beyond what is allocated, in bytes."""
        return self.device - self.allocated - CONTEXT

    @property
    def on_host(self) -> int:
        """What waits on the host in all, in bytes."""
        return sum(self.host.values())

    @property
    def work(self) -> Work:
        """What a micro-batch computes in all."""
        return self.decoder + self.tower

    @property
    def largest(self) -> tuple[str, int]:
        """The item that takes most of the device, and its bytes."""
        return max(self.items.items(), key=lambda item: item[1])

    def seconds(self, card: Card) -> float:
        """Return the time of a micro-batch on ``card`` where launching costs nothing; see :attr:`untimed`."""
        return self.step_seconds(card) / self.micro_batches

    def step_seconds(self, card: Card) -> float:
        """Return the time of an optimizer step on ``card`` where launching costs nothing; see :attr:`untimed`.

        What is copied is hidden behind what the decoder computes in the same direction.
        """
        decoder = self.micro_batches * self.decoder.seconds(card)
        forward = decoder / self.passes
        returning = self.returning / card.bus
        back = max(decoder - forward, returning)
        waiting = 0.0
        if self.streaming is not None:
            turns = self.layers * self.streaming.rounds
            waiting = self.streaming.waiting(card, forward / turns, (back - returning) / turns)
        return forward + back + waiting + self.micro_batches * self.tower.seconds(card)


@dataclass(frozen=True)
class MicroBatch:
    """What is known of micro-batches beside the recipe.

    :param tokens: of a full one. :param images: the most of one.
    :param kept: bytes that a decoder layer keeps of one where it is not recomputed; None: its shapes tell.
    """

    tokens: int
    images: int
    kept: int | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> MicroBatch:
        """Return what the recipe alone tells: rows are as long as they may be, and each has an image."""
        tokens, train = micro_batch_tokens(recipe), recipe.train
        return cls(tokens, max(1, tokens // recipe.data.max_length) if train.pack_tokens else train.batch_size)


def plan(recipe: Recipe, plugins: Plugins, engine: str | None = None) -> Plan:
    """Return the plan of ``recipe`` on a CUDA device in 16 bits.

    :param engine: whose memory is foretold; by default the one that the recipe asks for.
    :raises LavintkError: the models cannot be found, or do not fit the recipe.
    """
    return plan_of(outline_of(recipe, plugins), recipe, plugins, engine)


def plan_of(
    model: MultimodalModel,
    recipe: Recipe,
    plugins: Plugins,
    engine: str | None = None,
    batch: MicroBatch | None = None,
) -> Plan:
    """Return the plan for a model of which only names and shapes are looked at.

    :param engine: the one that was chosen, by default the one that the recipe asks for.
    :param batch: what is known of micro-batches, by default what the recipe tells.
    """
    engine, batch = engine or engine_of(recipe), batch or MicroBatch.of(recipe)
    config, tokens, train = model.language.config, batch.tokens, recipe.train
    hidden, inner, layers = config.hidden_size, config.intermediate_size, len(model.layers)
    window = micro_batches(recipe, tokens)
    everything = train.stream != "none" or engine == "layerwise"
    recomputed = layers if everything else recomputed_layers(recipe, layers)
    base = _base(model, recipe, plugins)
    ends = _vocabulary(model, recipe, plugins.quantizers.create(recipe.embed_quant))
    trained, states, host = _trained(model, recipe, plugins.optimizers.create(recipe.optim))
    input_of_layer = 2 * tokens * hidden
    inputs, waiting, gradients = _layer_inputs(recipe, engine, recomputed, window)
    at_work = 2 * tokens * (LAYER_WORK[0] * hidden + (LAYER_WORK[1] + _trains_mlp(model) * MLP_TRAINED[1]) * inner)
    images, of_a_block = _images(model, recipe, batch.images)
    kept = _kept_by_layer(model, tokens, hidden, inner) if batch.kept is None else batch.kept
    outside = _outside(recipe, base)
    rounds = 1 if engine == "layerwise" else window
    quantized = "" if recipe.embed_quant.name == "none" else f" ({recipe.embed_quant})"
    items = {
        **_linears(recipe, base, outside),
        f"embedding, head{quantized}, norms": ends.stored + base.norms,
        f"vision tower ({_bits(recipe.vision_quant)})": base.tower,
        "adapter" if model.connector is None else "adapter and connector": trained,
        "their gradients": trained,
        "optimizer state": states,
        "layer inputs": inputs * input_of_layer,
        "the window's states or gradients": gradients * input_of_layer,
        "activations of layers that are kept": kept * (layers - recomputed),
        AT_WORK: at_work,
        UNPACKED: base.largest,
        "workspaces of matrix products": WORKSPACES,
        "logits of a chunk": max(0, _loss(tokens, hidden, ends) - at_work - base.largest),
        "images at work": images + max(0, of_a_block - at_work - base.largest),
    }
    aside = {
        _of_linears(recipe): sum(base.layers[i] for i in outside) if train.stream == "cpu" else 0,
        "a layer on its way from the disk": max(base.layers) if train.stream == "disk" else 0,
        "layer inputs": waiting * input_of_layer,
        **host,
    }
    passes = 2 + recomputed / layers
    return Plan(
        items={name: size for name, size in items.items() if size},
        host={name: size for name, size in aside.items() if size},
        tokens=tokens,
        micro_batches=window,
        engine=engine,
        untimed=EAGER if engine == "eager" else "",
        decoder=_decoder(base, tokens, hidden, layers, passes),
        tower=_tower(model, recipe, base, batch.images, again=engine == "layerwise"),
        layers=layers,
        passes=passes,
        returning=rounds * waiting * input_of_layer,
        streaming=Streaming(max(base.layers), outside, rounds, train.stream == "disk") if outside else None,
    )


def _linears(recipe: Recipe, base: _Base, outside: tuple[int, ...]) -> dict[str, int]:
    """Return the bytes of linear layers that are on the device, by item, if the layers ``outside`` come in turn."""
    name, layers = _of_linears(recipe), len(base.layers)
    if recipe.train.stream == "none":
        return {name: sum(base.layers)}
    resident = [size for index, size in enumerate(base.layers) if index not in outside]
    return {
        f"{name}, {len(resident)} of {layers} resident": sum(resident),
        f"{name}, {SLOTS} of {layers}": SLOTS * max(base.layers),
    }


def _outside(recipe: Recipe, base: _Base) -> tuple[int, ...]:
    """Return which decoder layers wait outside of the device; none where the base is not streamed."""
    if recipe.train.stream == "none":
        return ()
    layers = len(base.layers)
    stays = which_stay(layers, min(recipe.train.resident_layers, layers))
    return tuple(index for index in range(layers) if not stays[index])


def _of_linears(recipe: Recipe) -> str:
    return f"linear layers ({_bits(recipe.quant)})"


def recomputed_layers(recipe: Recipe, layers: int) -> int:
    """Return how many of ``layers`` decoder layers the recipe recomputes on a CUDA device, where none are streamed."""
    setting = recipe.train.checkpointing
    return layers if setting is True or setting == "auto" else min(layers, int(setting))


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
    :param blocks: bytes and weights of the linear layers in each block of the tower.
    """

    layers: list[int]
    norms: int
    tower: int
    largest: int
    weights: int
    blocks: list[tuple[int, int]]


def _base(model: MultimodalModel, recipe: Recipe, plugins: Plugins) -> _Base:
    quantizers = [plugins.quantizers.create(choice) for choice in (recipe.quant, recipe.vision_quant)]
    sizes: dict[tuple[bool, int, int, bool], tuple[int, int]] = {}
    layers: Counter[int] = Counter()
    blocks: dict[int, tuple[int, int]] = {}
    tower, largest, weights = 0, 0, 0
    for name, linear in model.linears().items():
        in_tower, bias = name.startswith("vision."), linear.bias is not None
        shape = in_tower, linear.out_features, linear.in_features, bias
        if shape not in sizes:
            sizes[shape] = _stored(quantizers[in_tower], linear.out_features, linear.in_features, bias)
        stored, unpacked = sizes[shape]
        largest = max(largest, unpacked)
        index, count = _layer_index(name), linear.out_features * linear.in_features
        if in_tower:
            tower += stored
            before = blocks.get(index, (0, 0))
            blocks[index] = before[0] + stored, before[1] + count
        else:
            weights += count
            layers[index] += stored
    ends = ("embed_tokens.", "lm_head.")
    norms = 0
    for name, parameter in model.frozen_parameters().items():
        if name.startswith("vision."):
            tower += 2 * parameter.numel()
        elif not any(end in name for end in ends):
            norms += 2 * parameter.numel()
    blocks.pop(OUTSIDE, None)
    in_order = [layers[index] for index in sorted(layers)]
    return _Base(in_order, norms, tower, largest, weights, [blocks[index] for index in sorted(blocks)])


def _layer_index(name: str) -> int:
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found[1]) if found else OUTSIDE


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


def _kept_by_layer(model: MultimodalModel, tokens: int, hidden: int, inner: int) -> int:
    """Return the bytes that a layer keeps where it is not recomputed, copies in 16 bits of what is trained included."""
    trained = _trained_ids(model)
    wide, widest = (kept + _trains_mlp(model) * more for kept, more in zip(LAYER_KEPT, MLP_TRAINED))
    copies = 2 * sum(p.numel() for p in model.layers[0].parameters() if id(p) in trained)
    return 2 * tokens * (wide * hidden + widest * inner) + copies


def _trained_ids(model: MultimodalModel) -> set[int]:
    return {id(parameter) for parameter in model.trainable().values()}


def _trains_mlp(model: MultimodalModel) -> bool:
    """Return whether something is trained in the MLPs of decoder layers."""
    trained = _trained_ids(model)
    return any(id(p) in trained for name, p in model.layers[0].named_parameters() if name.startswith("mlp."))


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


def _decoder(base: _Base, tokens: int, hidden: int, layers: int, passes: float) -> Work:
    """Return the work of a micro-batch in the decoder layers, each gone through ``passes`` times."""
    stored = sum(base.layers)
    return Work(
        products=2.0 * base.weights * tokens * passes,
        unpacked=_unpacked(stored, base.weights) * passes,
        moved=float(OTHER_BYTES * tokens * hidden * layers),
        small=layers * OTHER_PER_LAYER,
    )


def _tower(model: MultimodalModel, recipe: Recipe, base: _Base, images: int, *, again: bool) -> Work:
    """Return the work of a micro-batch with ``images`` images in the vision tower.

    That is one pass forward and, from the first block on in which something is trained, one backward and one again if
    blocks are recomputed. There is none where features are the same in each step, and so are computed before the first.

    :param again: it goes forward once more, since nothing is kept of the first time.
    """
    tower = model.vision
    if tower is None or (recipe.data.cache_features is not False and not why_not_the_same(model)):
        return Work()
    backward = 1 if recipe.train.checkpointing is False else 2
    places, work = images * _positions(tower), Work()
    for goes_back, (stored, weights) in zip(_goes_back(model), base.blocks, strict=False):  # some are not run
        passes = 1 + again + backward * goes_back
        work += Work(
            products=2.0 * weights * places * passes,
            unpacked=_unpacked(stored, weights) * passes,
            moved=OTHER_BYTES * places * tower.width * passes / 3,  # fitted to decoder layers with three passes
            small=KERNEL * (BLOCK_KERNELS[goes_back] + again * BLOCK_KERNELS[0]),
        )
    return work


def _images(model: MultimodalModel, recipe: Recipe, images: int) -> tuple[int, int]:
    """Return what the tower's blocks keep of ``images`` images for the backward pass, and what one at work takes.

    That is their inputs; where they are not recomputed, all that the backward pass needs.
    """
    if model.vision is None:
        return 0, 0
    config = model.vision.model.config
    hidden, inner = config.hidden_size, config.intermediate_size
    if recipe.train.checkpointing is False:
        kept = sum(_goes_back(model)) * (BLOCK_KEPT[0] * hidden + BLOCK_KEPT[1] * inner)
    else:
        kept = len(model.vision.blocks) * hidden
    values = 2 * images * _positions(model.vision)
    return values * kept, values * (8 * hidden + 2 * inner)


def _goes_back(model: MultimodalModel) -> list[bool]:
    """Return for each block of the tower that is run whether the backward pass goes through it."""
    assert model.vision is not None
    trained = _trained_ids(model)
    holds = [any(id(p) in trained for p in block.parameters()) for block in model.vision.blocks]
    return [any(holds[: index + 1]) for index in range(model.vision.taps[-1])]


def _positions(tower: VisionTower) -> int:
    """Return the positions of an image in the tower."""
    config = tower.model.config
    return int((config.image_size // config.patch_size) ** 2 + 1)


def _unpacked(stored: int, weights: int) -> float:
    """Return the bytes read and written to unpack weights once; none where they are stored in 16 bits."""
    return stored + 2.0 * weights if stored < 2 * weights else 0.0


def _bits(quant: Choice) -> str:
    return "16 bits" if quant.name == "none" else str(quant)

"""The multimodal model: a frozen language model, a frozen vision tower, and what is trained between them.

The layers are transformers' own; ours are the order of the tokens, the feature taps, the neck, the side tokens of an
adapter, and the loss. Hidden states have the shape ``[1, N + M, hidden]``: N tokens of all rows laid end to end, then
M side tokens (LaVIN's modality tokens), each of which attends only to itself. M is the number of conditions, or the
number of rows where an adapter wants a side token for each (:class:`Manner`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lavintk.contracts import Adapter
from lavintk.data.batch import IGNORED, TEXT, Batch
from lavintk.data.pack import Pack
from lavintk.errors import ModelError
from lavintk.layers import FrozenLinear, has_hooks
from lavintk.models import decoder_layer
from lavintk.models.attention import AttentionPlan, KeyValueCache, PackPlan
from lavintk.models.connector import PatchProjector, TapNeck
from lavintk.models.decoder_layer import Place
from lavintk.models.host_memory import HostTensors
from lavintk.models.loss import cross_entropy_sum, head_blocks
from lavintk.models.stream import LayerStream
from lavintk.models.vision import VisionTower, run_block
from lavintk.models.vocabulary import QuantizedTable, tables_of

Recompute = Callable[[Callable[..., Tensor], nn.Module, Tensor], Tensor]
"""Takes what runs a layer, the layer and its input; see :func:`recompute`."""
LOSS_CHUNK = 256
"""Labelled tokens whose logits exist at a time; of a block of 32k words in fp32 they make 32 MiB."""


@dataclass(frozen=True)
class Manner:
    """How a model runs for its adapter; an adapter may set :attr:`MultimodalModel.manner` when it is attached.

    :param side_per_row: a side token for each row instead of one for each condition.
    :param blank_first: the tower always sees the first row's image first, a blank one if that row has none.
    :param decode_shift: added to the position of each token decoded from a cache.
    """

    side_per_row: bool = False
    blank_first: bool = False
    decode_shift: int = 0


@dataclass
class ForwardContext:
    """What an adapter inside a layer may need to know of the micro-batch that runs through it.

    :param owners: ``[N + M]`` int64: which of the M side tokens each token belongs to, side tokens included. Side
        tokens stand for conditions or, with :attr:`Manner.side_per_row`, for rows.
    :param side: M, the side tokens at the end; 0 while decoding from a cache.
    :param cached: whether a key/value cache is filled or used.
    """

    owners: Tensor
    side: int
    cached: bool


@dataclass(frozen=True)
class Passage:
    """What stays the same while a micro-batch goes through the layers.

    :param positions: ``[1, N + M]`` int64. :param rotary: cosines and sines as transformers' layers take them.
    """

    place: Place
    positions: Tensor
    rotary: tuple[Tensor, Tensor]
    context: ForwardContext

    def clone(self) -> Passage:
        """Return the passage of a pack with tensors of its own."""
        plan = self.place.plan
        assert isinstance(plan, PackPlan)
        cos, sin = (x.clone() for x in self.rotary)
        return Passage(
            Place(PackPlan(plan.boundaries.clone(), plan.longest), cos[0], sin[0]),
            self.positions.clone(),
            (cos, sin),
            ForwardContext(self.context.owners.clone(), self.context.side, self.context.cached),
        )


class ContextHolder:
    """Holds the :class:`ForwardContext` of the layer call in progress; adapters keep a reference to it."""

    def __init__(self) -> None:
        self._current: ForwardContext | None = None

    @property
    def current(self) -> ForwardContext:
        """The context; only defined inside a layer."""
        if self._current is None:
            raise RuntimeError("an adapter asked for its context outside of a forward pass")
        return self._current

    @contextmanager
    def set(self, context: ForwardContext) -> Iterator[None]:
        """Make ``context`` the current one; also around the recomputation of a checkpointed layer."""
        before, self._current = self._current, context
        try:
            yield
        finally:
            self._current = before


class MultimodalModel(nn.Module):
    """A causal language model that also sees images.

    :param language: transformers' causal LM whose layers hold :class:`FrozenLinear`; its attention implementation
        must be :data:`lavintk.models.attention.IMPLEMENTATION`.
    :param vision: the tower, or None for text only.
    :param connector: maps the tower's features to tokens; required with a tower.
    """

    def __init__(
        self,
        language: nn.Module,
        vision: VisionTower | None = None,
        connector: TapNeck | PatchProjector | None = None,
    ) -> None:
        super().__init__()
        if (vision is None) != (connector is None):
            raise ModelError("a vision tower and a connector come together: one of them is missing")
        self.language: Any = language  # transformers' causal LMs share a structure, but no type that says so
        self.vision, self.connector = vision, connector
        self.requires_grad_(False)
        if connector is not None:
            connector.requires_grad_(True)
        self.adapter: Adapter | None = None
        self.manner = Manner()
        self.context = ContextHolder()
        self.checkpointing: bool | int = False
        """Whether layers are recomputed in the backward pass instead of keeping what they computed; a number: the
        first so many decoder layers (and the tower's blocks)."""
        self.recompute: Recompute = recompute
        """How a layer is run whose activations are not kept; an engine may put its own in place."""
        self.offload: HostTensors | None = None
        """Where the inputs of recomputed decoder layers wait for the backward pass; None: on the device."""
        self.stream: LayerStream | None = getattr(language, "layer_stream", None)
        """Brings decoder layers onto the device; None: they are there. All of them are recomputed then."""
        self._tables = tables_of(language, "language")
        blocks = {id(block) for table in self._tables.values() for block in table.blocks}
        self._linears = {n: m for n, m in self.named_modules() if isinstance(m, FrozenLinear) and id(m) not in blocks}
        self._tower = {} if vision is None else dict(vision.named_modules())
        connected = set() if connector is None else {id(p) for p in connector.parameters()}
        self._frozen = {n: p for n, p in self.named_parameters() if id(p) not in connected}

    @property
    def hidden_size(self) -> int:
        """Width of the language model's residual stream."""
        return int(self.language.config.hidden_size)

    @property
    def layers(self) -> nn.ModuleList:
        """The language model's decoder layers."""
        return cast(nn.ModuleList, self.language.model.layers)

    @property
    def visual_tokens(self) -> int:
        """Tokens per image; 0 without a tower."""
        return self.vision.tokens if self.vision else 0

    @property
    def device(self) -> torch.device:
        """Where the language model lies."""
        return cast(torch.device, self.language.model.norm.weight.device)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the residual stream."""
        return cast(torch.dtype, self.language.model.norm.weight.dtype)

    def linears(self) -> dict[str, FrozenLinear]:
        """Return the frozen linear layers by the name they had before anything was attached."""
        return dict(self._linears)

    def frozen_parameters(self) -> dict[str, nn.Parameter]:
        """Return embeddings, norms and head by the name they had before anything was attached.

        An embedding or head that is quantized is no parameter: :meth:`tables` has it.
        """
        return dict(self._frozen)

    def tables(self) -> dict[str, QuantizedTable]:
        """Return the quantized embedding and head by the name that their weight has where it is not quantized.

        A head that is tied to the embedding has no entry of its own.
        """
        return dict(self._tables)

    def frozen_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of :meth:`frozen_parameters` and :meth:`tables`."""
        shapes: dict[str, tuple[int, ...]] = {name: tuple(p.shape) for name, p in self._frozen.items()}
        return shapes | {name: table.shape for name, table in self._tables.items()}

    def replace(self, name: str, module: nn.Module) -> None:
        """Put ``module`` in place of the submodule ``name``."""
        parent, _, leaf = name.rpartition(".")
        setattr(self.get_submodule(parent), leaf, module)

    def attach(self, adapter: Adapter) -> None:
        """Attach ``adapter``; a model carries one.

        :raises ModelError: there is one already, or the model lacks what the adapter needs.
        """
        if self.adapter is not None:
            raise ModelError("the model already carries an adapter")
        adapter.attach(self)
        self.adapter = adapter
        if self.stream is not None:  # what an adapter puts beside a streamed layer is on the host, as the layer is now
            for parameter in self.trainable().values():
                parameter.data = parameter.data.to(self.device)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that training changes: ``adapter.*`` and ``connector.*``."""
        named = dict(self.adapter.named_parameters()) if self.adapter else {}
        parameters = {f"adapter.{name}": parameter for name, parameter in named.items()}
        if self.connector is not None:
            parameters |= {f"connector.{name}": p for name, p in self.connector.named_parameters()}
        return parameters

    def hidden(self, batch: Batch, cache: KeyValueCache | None = None) -> Tensor:
        """Return the states ``[N, hidden]`` after the last norm.

        :param cache: filled with the keys and values of the rows; the batch must then hold whole prompts.
        """
        return self.hidden_with_side(batch, cache)[0]

    def hidden_with_side(self, batch: Batch, cache: KeyValueCache | None = None) -> tuple[Tensor, Tensor]:
        """Return what :meth:`hidden` does, and the states ``[M, hidden]`` of the side tokens."""
        states = self._run_layers(*self._start_batch(batch, cache))
        if cache is not None:
            cache.advance(_as_tensor(batch.lengths, states.device))
        return states[: batch.tokens], states[batch.tokens :]

    def decode(self, tokens: Tensor, conditions: Tensor, cache: KeyValueCache) -> Tensor:
        """Return ``[B, hidden]`` for one further token of each row.

        :param tokens: ``[B]`` ids; :param conditions: ``[B]`` as in :class:`Batch`.
        """
        embedded = self.language.model.embed_tokens(tokens)
        lengths = (1,) * tokens.numel()
        positions = cache.lengths + self.manner.decode_shift
        states = self._run_layers(*self._start_rows(embedded, positions, lengths, conditions, None, cache))
        cache.advance(_as_tensor(lengths, states.device))
        return states

    @torch.no_grad()
    def run_side_tokens(self) -> None:
        """Send the adapter's side tokens, one per condition in order, through the layers without any text.

        In fp32 whatever the model computes in: what adapters read off it is folded into weights, and should not depend
        on the precision that a run is loaded with.
        """
        side = self._side_tokens()
        if side is None:
            return
        conditions = torch.arange(len(side), device=self.device)
        first = torch.zeros_like(conditions)  # a row of one token, any token, for each condition
        embedded = self.language.model.embed_tokens(first).float()
        self._run_layers(*self._start_rows(embedded, first, (1,) * len(side), conditions, side))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return ``[..., vocabulary]`` in fp32."""
        return cast(Tensor, self.language.lm_head(hidden)).float()

    def loss_sum(self, batch: Batch) -> Tensor:
        """Return the cross entropy summed over the labelled tokens, in nats, fp32.

        Only labelled tokens reach the output head, a chunk of them and a block of words at a time
        (:mod:`lavintk.models.loss`), so the logits of a whole batch never exist.
        """
        rows = (batch.labels != IGNORED).nonzero().flatten()
        return self._cross_entropy(self.hidden(batch).index_select(0, rows), batch.labels.index_select(0, rows))

    def pack_loss_sum(self, pack: Pack) -> Tensor:
        """Return what :meth:`loss_sum` does, by operations whose shapes follow from the pack's alone.

        Nothing waits for the device, so that a CUDA graph can hold it. Not for :attr:`Manner.side_per_row` and
        :attr:`Manner.blank_first`.
        """
        states = self._run_layers(*self._start_pack(pack))
        return self._cross_entropy(states.index_select(0, pack.trained), pack.labels)

    def visual_embeddings(self, pixel_values: Tensor, *, blank_first: bool = False) -> Tensor:
        """Return the visual tokens ``[I, visual_tokens, hidden]`` of images ``[I, 3, height, width]``."""
        return self.connected(self.visual_features(pixel_values, blank_first=blank_first))

    def connected(self, features: Tensor) -> Tensor:
        """Return the visual tokens ``[I, visual_tokens, hidden]`` of the tower's features."""
        assert self.connector is not None
        return cast(Tensor, self.connector(features.to(self.dtype)))

    def visual_features(self, pixel_values: Tensor, *, blank_first: bool = False) -> Tensor:
        """Return the tower's features ``[I, visual_tokens, vision width]`` of images ``[I, 3, height, width]``.

        :param blank_first: an all-zero image goes through the tower in front of the others; its features are dropped.
        """
        if self.vision is None:
            raise ModelError("the batch holds images, but the model was loaded without a vision tower")
        if self.vision.device != self.device:  # set aside until now
            self.vision.to(self.device)
        how = self._recomputed_block if self.checkpointing else run_block
        if blank_first:
            pixel_values = torch.cat([torch.zeros_like(pixel_values[:1]), pixel_values])
        features = cast(Tensor, self.vision(pixel_values, how))
        return features[1:] if blank_first else features

    def set_vision_aside(self) -> None:
        """Keep the tower on the host until pixels come, to make room on the device."""
        if self.vision is not None:
            self.vision.to("cpu")

    def bring_vision_back(self) -> None:
        """Put a tower that was set aside beside the language model again."""
        if self.vision is not None:
            self.vision.to(self.device)

    def changed_in_vision(self) -> list[str]:
        """Return the names, within the tower, of what is not as it was loaded; without any, its features stay the same.

        Those are modules that were put in, taken out, wrapped, parametrized or given hooks or a ``forward`` of their
        own, and parameters that are trained.
        """
        if self.vision is None:
            return []
        now = dict(self.vision.named_modules())
        changed = {name for name in {*now, *self._tower} if now.get(name) is not self._tower.get(name)}
        changed |= {name for name, module in now.items() if has_hooks(module) or "forward" in vars(module)}
        changed |= {name for name, module in now.items() if hasattr(module, "parametrizations")}
        trained = {id(parameter) for parameter in self.trainable().values()}
        parameters = self.vision.named_parameters()
        changed |= {name for name, p in parameters if p.requires_grad or id(p) in trained}
        return sorted(name or "the tower itself" for name in changed)

    def _side_tokens(self) -> Tensor | None:
        return self.adapter.side_tokens() if self.adapter else None

    def _embed(self, rows: Batch | Pack, blank_first: bool) -> Tensor:
        """Return ``[N, hidden]``: the tokens' embeddings, and visual tokens in their slots."""
        embedded = cast(Tensor, self.language.model.embed_tokens(rows.input_ids))
        if rows.features is not None:
            visual = self.connected(rows.features)
        elif rows.pixel_values is not None:
            visual = self.visual_embeddings(rows.pixel_values, blank_first=blank_first)
        else:
            return embedded
        return embedded.index_copy(0, rows.visual_slots, visual.flatten(0, 1).to(embedded.dtype))

    def _cross_entropy(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return the sum over labelled tokens ``[K, hidden]``, a chunk of logits at a time.

        The logits of a head that is trained or wrapped are computed as a whole, and again in the backward pass.
        """
        blocks = head_blocks(self.language.lm_head)
        if blocks is not None:
            return cross_entropy_sum(hidden, labels, blocks, LOSS_CHUNK)
        total = hidden.new_zeros((), dtype=torch.float32)
        for part, target in zip(hidden.split(LOSS_CHUNK), labels.split(LOSS_CHUNK)):
            total = total + checkpoint(self._chunk_loss, part, target, use_reentrant=False, preserve_rng_state=False)
        return total

    def _chunk_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(hidden), labels, reduction="sum", ignore_index=IGNORED)

    def _start_rows(
        self,
        embedded: Tensor,
        positions: Tensor,
        lengths: tuple[int, ...],
        conditions: Tensor,
        side: Tensor | None,
        cache: KeyValueCache | None = None,
    ) -> tuple[Tensor, Passage]:
        """Return the states in front of the first layer, of rows of ``lengths`` tokens, and their passage."""
        owners = torch.arange(len(lengths), device=conditions.device) if self.manner.side_per_row else conditions
        owners = owners.repeat_interleave(_as_tensor(lengths, conditions.device), output_size=embedded.shape[0])
        if side is not None and self.manner.side_per_row:
            side = side[conditions]
        plan = AttentionPlan.of(lengths, embedded.device, 0 if side is None else side.shape[0], cache)
        return self._start(embedded, positions, owners, plan, side, cached=cache is not None)

    def _start(
        self,
        embedded: Tensor,
        positions: Tensor,
        owners: Tensor,
        plan: AttentionPlan | PackPlan,
        side: Tensor | None,
        *,
        cached: bool = False,
    ) -> tuple[Tensor, Passage]:
        """Return the states ``[1, N + M, hidden]`` in front of the first layer, and their passage.

        :param owners: ``[N]``: the side token that each token belongs to.
        """
        count = 0
        if side is not None:
            count = side.shape[0]
            embedded = torch.cat([embedded, side.to(embedded.dtype)])
            positions = F.pad(positions, (0, count))
            owners = torch.cat([owners, torch.arange(count, device=owners.device)])
        states, positions = embedded.unsqueeze(0), positions.unsqueeze(0)
        rotary = self.language.model.rotary_emb(states, position_ids=positions)
        place = Place(plan, rotary[0][0], rotary[1][0])
        return states, Passage(place, positions, rotary, ForwardContext(owners, count, cached=cached))

    def _start_batch(self, batch: Batch, cache: KeyValueCache | None = None) -> tuple[Tensor, Passage]:
        blank_first = self.manner.blank_first and int(batch.conditions[0]) == TEXT
        embedded, side = self._embed(batch, blank_first), self._side_tokens()
        return self._start_rows(embedded, batch.positions, batch.lengths, batch.conditions, side, cache)

    def _start_pack(self, pack: Pack) -> tuple[Tensor, Passage]:
        # the token behind the last one takes the features of images that only fill up the pack
        embedded = self._embed(pack, False)[:-1]
        plan = PackPlan(pack.boundaries, pack.tokens)
        return self._start(embedded, pack.positions, pack.conditions, plan, self._side_tokens())

    def start(self, rows: Batch | Pack) -> tuple[Tensor, Passage]:
        """Return the states ``[1, N + M, hidden]`` of a micro-batch in front of the first layer, and their passage.

        For who takes it through the layers one by one: :meth:`bring_layer`, :meth:`run_layer`, then
        :meth:`loss_behind`. For packs see :meth:`pack_loss_sum`.
        """
        return self._start_pack(rows) if isinstance(rows, Pack) else self._start_batch(rows)

    def bring_layer(self, index: int) -> None:
        """Let decoder layer ``index`` be on the device for what is given to that next."""
        if self.stream is not None:
            self.stream.use(index)

    def run_layer(self, index: int, states: Tensor, passage: Passage) -> Tensor:
        """Return the states behind decoder layer ``index``, the last one that was brought."""
        return self._run_module(self.layers[index], states, passage)

    def loss_behind(self, states: Tensor, rows: Batch | Pack) -> Tensor:
        """Return what :meth:`loss_sum` does, of the states behind the last layer."""
        if isinstance(rows, Pack):
            places, labels = rows.trained, rows.labels
        else:
            places = (rows.labels != IGNORED).nonzero().flatten()
            labels = rows.labels.index_select(0, places)
        return self._cross_entropy(self.language.model.norm(states[0]).index_select(0, places), labels)

    def _run_module(self, layer: nn.Module, states: Tensor, passage: Passage) -> Tensor:
        with self.context.set(passage.context):
            if decoder_layer.is_known(layer):
                return decoder_layer.run_layer(layer, states, passage.place)
            return _first(
                layer(
                    states, attention_mask=passage.place.plan, position_embeddings=passage.rotary,
                    position_ids=passage.positions,
                )
            )  # fmt: skip

    def _run_layers(self, states: Tensor, passage: Passage) -> Tensor:
        """Return the states ``[N + M, hidden]`` after the last norm."""
        recomputed = len(self.layers) if self.checkpointing is True or self.stream else int(self.checkpointing)
        if not torch.is_grad_enabled():
            recomputed = 0
        for index, layer in enumerate(self.layers):

            def run(module: nn.Module, hidden: Tensor, index: int = index) -> Tensor:
                self.bring_layer(index)
                return self._run_module(module, hidden, passage)

            if index >= recomputed:
                states = run(layer, states)
                continue
            # the last one's input is needed again at once
            away = self.offload is not None and index < recomputed - 1 and states.requires_grad
            with self.offload.saving(index, states) if self.offload is not None and away else nullcontext():
                states = self.recompute(run, layer, states)
            if self.stream is not None and states.requires_grad:
                # some of its gradients are computed before anything asks for the recomputation
                states.register_hook(partial(self._bring_back, index))
        return cast(Tensor, self.language.model.norm(states[0]))

    def _bring_back(self, index: int, gradient: Tensor) -> None:
        """Let a layer be on the device when the gradient with respect to its output is there."""
        self.bring_layer(index)

    def _recomputed_block(self, block: nn.Module, hidden: Tensor) -> Tensor:
        return self.recompute(run_block, block, hidden)


def recompute(run: Callable[..., Tensor], module: nn.Module, hidden: Tensor) -> Tensor:
    """Run a whole layer keeping only its input; dropout draws the same mask again in the recomputation.

    Without gradients nothing is kept.
    """
    if not torch.is_grad_enabled():
        return run(module, hidden)
    return cast(Tensor, checkpoint(run, module, hidden, use_reentrant=False))


def _first(output: Any) -> Tensor:
    """Return the hidden states of a layer, which some versions of transformers put into a tuple."""
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)


def _as_tensor(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(lengths, dtype=torch.int64, device=device)


def count_parameters(parameters: dict[str, Any]) -> int:
    """Return the number of values in ``parameters``."""
    return sum(p.numel() for p in parameters.values())

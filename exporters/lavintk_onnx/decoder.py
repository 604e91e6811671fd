"""The decoder of a Llama-like language model as an ONNX graph, one for each condition of the adapter.

The recipe is that of onnxruntime-genai's builder: fused norms with the residual stream as their second output, q, k and
v in one product, ``GroupQueryAttention`` that rotates by itself and takes the lengths of rows from the attention mask.
Beyond it: gate and up projection in one product, rotary tables computed when the session starts instead of stored,
literal sizes of heads, and an adapter's low-rank path as nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lavintk.errors import ModelError
from lavintk.folded import SHARED
from lavintk.merge import LayerUpdates
from lavintk.models.vocabulary import HEAD
from lavintk.threads import each
from lavintk_onnx.graph import MICROSOFT, DataFile, GraphBuilder, Shape, StoredWeight
from lavintk_onnx.grids import (
    EncodedWeight,
    Grid,
    StoredMatrix,
    cut,
    decode,
    encode,
    encode_layer,
    encode_table,
    pieces_of,
    product,
    stack,
    stackable,
    store,
)
from lavintk_onnx.updates import Side, Trained, bias_of, effective_weight, side_of, side_target

if TYPE_CHECKING:
    import onnx_ir as ir

    from lavintk.contracts import AffineUpdate
    from lavintk.layers import FrozenLinear
    from lavintk.models.multimodal import MultimodalModel

PREFIX = "language.model.layers"
GROUPS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
"""Linear layers with the same input, which become one product."""
Quantizers: TypeAlias = "Mapping[Grid, Callable[[Tensor], FrozenLinear]]"
HEAD_MULTIPLE = 16
"""What the size of a head must be a multiple of for ``GroupQueryAttention`` to rotate it."""
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
"""Factors of Granite's configuration that the graph does not have."""
FIXED_ROTARY = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not depend on the length of the text."""


@dataclass(frozen=True)
class DecoderPlan:
    """How the decoder is written.

    :param grid_of: the grid of a linear layer, by the name it has in the model.
    :param head: grid of the output head.
    :param merge: fold the adapter into the weights; else its low-rank path becomes nodes.
    :param accuracy_level: see :func:`lavintk_onnx.grids.product`.
    :param context: tokens that the rotary tables reach.
    :param quantizers: what makes layers of a grid, by grid.
    :param rounded: layers that were made of folded weights already, by name and condition; see
        :attr:`lavintk.folded.FoldedDecoder.rounded`.
    :param trained: what errors are measured against, where that is not the model itself.
    :param exact_norms: keep the norms apart from the sums in front of them. ONNX Runtime's fused operator adds up the
        squares of a row one by one in fp32, which for 576 values is four times less exact than its plain norm.
    """

    grid_of: Callable[[str], Grid]
    head: Grid
    merge: bool
    accuracy_level: int
    context: int
    quantizers: Quantizers = field(default_factory=dict)
    rounded: Mapping[tuple[str, str], FrozenLinear] = field(default_factory=dict)
    trained: Trained | None = None
    exact_norms: bool = False


@dataclass(frozen=True)
class Geometry:
    """Sizes of a Llama-like decoder."""

    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    epsilon: float

    @classmethod
    def of(cls, model: MultimodalModel) -> Geometry:
        """Read them off the model's configuration.

        :raises ModelError: the architecture needs something that the graph does not have; all of it listed.
        """
        config, faults = model.language.config, []
        if config.hidden_act not in ("silu", "swish"):
            faults.append(f"its feed-forward layers use {config.hidden_act!r}, silu is needed")
        rotary = model.language.model.rotary_emb
        kind = getattr(rotary, "rope_type", "default")
        if kind not in FIXED_ROTARY:
            faults.append(f"its rotary embedding is of type {kind!r}, known are {', '.join(FIXED_ROTARY)}")
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if 2 * rotary.inv_freq.numel() != head_size:
            faults.append(f"it rotates {2 * rotary.inv_freq.numel()} of {head_size} values of a head, all are needed")
        if head_size % HEAD_MULTIPLE:
            faults.append(f"its heads have {head_size} values, ONNX Runtime rotates multiples of {HEAD_MULTIPLE}")
        faults += _other_structure(model)
        if faults:
            raise ModelError(
                f"a model of type {config.model_type!r} cannot be exported to ONNX:\n"
                + "\n".join(f"  - {fault}" for fault in faults)
            )
        return cls(
            int(config.hidden_size),
            int(config.num_attention_heads),
            int(config.num_key_value_heads),
            int(head_size),
            int(config.vocab_size),
            float(config.rms_norm_eps),
        )


def _other_structure(model: MultimodalModel) -> list[str]:
    """Return what keeps the layers from being Llama's: weights that are missing or too many, factors on states."""
    faults, config = [], model.language.config
    norms = {f"{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")}
    head_norms = {f"self_attn.{norm}.weight" for norm in ("q_norm", "k_norm")}
    linears = {leaf for leaves in GROUPS.values() for leaf in leaves}
    for weights, needed, more in ((model.linears(), linears, set()), (model.frozen_parameters(), norms, head_norms)):
        found = {name.split(".", 4)[-1] for name in weights if name.startswith(f"{PREFIX}.")}
        if not needed <= found <= needed | more:
            known = ", ".join(sorted(needed | more))
            faults.append(f"its layers hold {', '.join(sorted(found))}; the graph has {known}")
    used = [name for name in MULTIPLIERS if getattr(config, name, 1) != 1]
    return faults + [f"its states are scaled by {name} {getattr(config, name)}" for name in used]


@dataclass(frozen=True)
class Linear:
    """Linear layers with one input, as they are stored: one or more matrices side by side, bias and side path."""

    matrices: tuple[StoredMatrix, ...]
    bias: StoredWeight | None
    side: tuple[StoredWeight, StoredWeight] | None


class DecoderWriter:
    """Writes the weights of a decoder once and its graphs layer by layer.

    :param model: its frozen layers are asked for one after the other, and each is forgotten before the next.
    :param updates: the adapter's, of which the writer takes one layer after the other.
    :param embedding: adds the embedding of ``input_ids`` to a graph; None for graphs that take ``inputs_embeds``.
    """

    def __init__(
        self,
        model: MultimodalModel,
        plan: DecoderPlan,
        data: DataFile,
        updates: LayerUpdates,
        embedding: Callable[[GraphBuilder, ir.Value], ir.Value] | None = None,
    ) -> None:
        self.model, self.plan, self.data, self.updates = model, plan, data, updates
        self.geometry = Geometry.of(model)
        self.embedding = embedding
        self.error = ErrorSum()
        """How far the weights that the adapter changes lie from what was trained."""
        self.copied = True
        """Whether the codes of all linear layers written so far are those that were trained on."""
        self._linears = model.linears()
        self.frozen = model.frozen_parameters()
        conditions = model.adapter.conditions if model.adapter else ("all",)
        self.graphs = {condition: _Graph(self, condition) for condition in conditions}

    def write(self, head: StoredMatrix | None, progress: Callable[[int, int], None] | None = None) -> None:
        """Add all layers and the head to the graphs.

        :param head: the output head where it is stored already, for example tied to the embedding.
        """
        layers = len(self.model.layers)
        for index in range(layers):
            norms = {
                norm: self.data.write(f"layers.{index}.{norm}", _numpy(self.frozen[f"{PREFIX}.{index}.{norm}.weight"]))
                for norm in ("input_layernorm", "post_attention_layernorm")
            }
            changes = self.updates.take(f"{PREFIX}.{index}")
            groups = {
                group: self._group(f"layers.{index}.{group}", [f"{PREFIX}.{index}.{leaf}" for leaf in leaves], changes)
                for group, leaves in GROUPS.items()
            }
            for condition, graph in self.graphs.items():
                graph.add_layer(index, norms, {name: group[condition] for name, group in groups.items()})
            if progress is not None:
                progress(index + 1, layers)
        self.updates.check_all_taken()
        norm = self.data.write("norm", _numpy(self.frozen["language.model.norm.weight"]))
        if head is None:
            quantize = self.plan.quantizers.get(self.plan.head)
            head = store(self.data, "lm_head", encode_table(self.model, HEAD, self.plan.head, quantize))
        for graph in self.graphs.values():
            graph.finish(norm, head)

    def _group(
        self, name: str, linears: Sequence[str], updates: Mapping[tuple[str, str], AffineUpdate]
    ) -> dict[str, Linear]:
        """Store the linear layers ``linears``; return what each condition's graph takes."""
        layers = [self._linears[linear] for linear in linears]
        base: list[EncodedWeight] | None = None
        shared: tuple[StoredMatrix, ...] = ()
        made: dict[str, Linear] = {}
        for condition in self.graphs:
            change = [updates.get((linear, condition)) for linear in linears]
            changed = any(update is not None for update in change)
            where = f"{name}.{condition}" if changed else name
            if self.plan.merge and changed:
                matrices = self._store(where, self._merged(linears, change, condition))
            else:
                if base is None:
                    base = [self._base(linear, condition) for linear in linears]
                    self.copied &= all(weight.copied for weight in base)
                    shared = self._store(name, base)
                matrices = shared
                self._compare(base, linears, change, condition)
            bias = bias_of(layers, change)
            side = side_of(layers, change) if changed and not self.plan.merge else None
            made[condition] = Linear(
                matrices,
                None if bias is None else self.data.write(f"{where}.bias", bias),
                None if side is None else self._store_side(where, side),
            )
        return made

    def _base(self, linear: str, condition: str) -> EncodedWeight:
        """Return a layer without any update, as it was rounded already or as it is."""
        made = self.plan.rounded.get((linear, SHARED)) or self.plan.rounded.get((linear, condition))
        encoded = encode_layer(made or self._linears[linear], *self._grid(linear))
        return encoded if made is None else replace(encoded, copied=False)

    def _merged(
        self, linears: Sequence[str], change: Sequence[AffineUpdate | None], condition: str
    ) -> list[EncodedWeight]:
        encoded = []
        for linear, update in zip(linears, change):
            exact = effective_weight(self._linears[linear], update)
            made = self.plan.rounded.get((linear, condition))
            if update is None:
                encoded.append(self._base(linear, condition))
            elif made is None:
                encoded.append(encode(exact, *self._grid(linear)))
            else:
                encoded.append(encode_layer(made, *self._grid(linear)))
            self.copied = False
            self.error.add(encoded[-1], exact, exact)
        return encoded

    def _compare(
        self, base: Sequence[EncodedWeight], linears: Sequence[str], change: Sequence[AffineUpdate | None],
        condition: str,
    ) -> None:  # fmt: skip
        """Take up the error of layers whose update stays beside them: base and update against those of the training."""
        for weight, linear, update in zip(base, linears, change):
            if update is not None:
                exact, wanted = side_target(self._linears[linear], update, self.plan.trained)
                self.error.add(weight, exact, wanted)

    def _grid(self, linear: str) -> tuple[Grid, Callable[[Tensor], FrozenLinear] | None]:
        grid = self.plan.grid_of(linear)
        return grid, self.plan.quantizers.get(grid)

    def _store(self, name: str, parts: list[EncodedWeight]) -> tuple[StoredMatrix, ...]:
        if stackable(parts):
            return (store(self.data, name, stack(parts)),)
        return tuple(store(self.data, f"{name}.{place}", part) for place, part in enumerate(parts))

    def _store_side(self, name: str, side: Side) -> tuple[StoredWeight, StoredWeight]:
        return (
            self.data.write(f"{name}.down", np.ascontiguousarray(side.down.T)),
            self.data.write(f"{name}.up", np.ascontiguousarray(side.up.T)),
        )


class ErrorSum:
    """Adds up squared differences of weights: how far the exported ones lie from the trained ones."""

    def __init__(self) -> None:
        self.squared, self.total = 0.0, 0.0

    def add(self, weight: EncodedWeight, exact: Tensor, whole: Tensor) -> None:
        """Compare an encoded weight with ``exact``; the difference is seen in relation to ``whole``."""

        def squares(rows: slice) -> tuple[float, float]:
            difference = decode(cut(weight, rows)) - exact[rows]  # fp32 values are decoded to themselves, no copy
            parts = (difference, whole[rows])
            squared, total = (float(part.square().sum(dtype=torch.float64)) for part in parts)
            return squared, total

        for squared, total in each(squares, pieces_of(weight)):
            self.squared += squared
            self.total += total

    @property
    def relative(self) -> float | None:
        """Frobenius norm of the difference in relation to the trained weights; None where nothing was added."""
        return (self.squared / self.total) ** 0.5 if self.total else None


class _Graph:
    """One graph under construction."""

    def __init__(self, writer: DecoderWriter, condition: str) -> None:
        self.writer, self.condition = writer, condition
        self.builder = graph = GraphBuilder("decoder", writer.data)
        size = writer.geometry
        batch, tokens = "batch_size", "sequence_length"
        if writer.embedding is None:
            self.root = graph.input("inputs_embeds", "float32", [batch, tokens, size.hidden])
        else:
            self.root = writer.embedding(graph, graph.input("input_ids", "int64", [batch, tokens]))
        mask = graph.input("attention_mask", "int64", [batch, "total_sequence_length"])
        counted = graph.op("ReduceSum", mask, graph.constant([1], "int64"), keepdims=0, name="mask/count")
        last = graph.op("Sub", counted, graph.constant([1], "int64"), name="mask/last")
        self.last = graph.op("Cast", last, to=6, name="seqlens_k")
        length = graph.op("Gather", graph.op("Shape", mask, name="mask/shape"), graph.constant(1, "int64"), axis=0)
        self.total = graph.op("Cast", length, to=6, name="total_sequence_length")
        self.cosine, self.sine = self._rotary_tables()
        self._present: list[tuple[str, ir.Value]] = []
        self.pending: ir.Value | None = None
        """What the last block adds to the residual stream; the next norm does it."""

    def add_layer(self, index: int, norms: Mapping[str, StoredWeight], groups: Mapping[str, Linear]) -> None:
        """Add attention and feed-forward block ``index``."""
        normed = self._norm(norms["input_layernorm"])
        mixed = self._attention(index, self._linear(normed, groups["self_attn.qkv_proj"], f"layers.{index}/qkv_proj"))
        self.pending = self._linear(mixed, groups["self_attn.o_proj"], f"layers.{index}/o_proj")
        normed = self._norm(norms["post_attention_layernorm"])
        both = self._linear(normed, groups["mlp.gate_up_proj"], f"layers.{index}/gate_up_proj")
        graph, name = self.builder, f"layers.{index}/mlp"
        gate, up = graph.ops("Split", both, outputs=2, axis=-1, num_outputs=2, name=f"{name}/split")
        gate = graph.op("QuickGelu", gate, domain=MICROSOFT, alpha=1.0, name=f"{name}/silu")
        product = graph.op("Mul", gate, up, name=f"{name}/mul")
        self.pending = self._linear(product, groups["mlp.down_proj"], f"layers.{index}/down_proj")

    def finish(self, norm: StoredWeight, head: StoredMatrix) -> None:
        """Add the last norm and the head."""
        graph, size = self.builder, self.writer.geometry
        logits = product(graph, self._norm(norm), head, None, "lm_head", self.writer.plan.accuracy_level)
        graph.output(logits, "logits", "float32", ["batch_size", "sequence_length", size.vocabulary])
        for name, value in self._present:
            shape: Shape = ["batch_size", size.kv_heads, "total_sequence_length", size.head_size]
            graph.output(value, name, "float32", shape)

    def _norm(self, weight: StoredWeight) -> ir.Value:
        """Add what is pending to the residual stream and normalize it."""
        graph, scale = self.builder, self.builder.stored(weight)
        epsilon = self.writer.geometry.epsilon
        if self.pending is not None and self.writer.plan.exact_norms:
            self.root, self.pending = graph.op("Add", self.root, self.pending), None
        if self.pending is None:
            return graph.op("SimplifiedLayerNormalization", self.root, scale, axis=-1, epsilon=epsilon, stash_type=1)
        normed, mean, deviation, total = graph.ops(
            "SkipSimplifiedLayerNormalization", self.root, self.pending, scale,
            outputs=4, domain=MICROSOFT, epsilon=epsilon,
        )  # fmt: skip
        graph.skip_output(mean)
        graph.skip_output(deviation)
        self.root = total
        return normed

    def _linear(self, x: ir.Value, linear: Linear, name: str) -> ir.Value:
        graph, level = self.builder, self.writer.plan.accuracy_level
        bias = None if linear.bias is None else graph.stored(linear.bias)
        if len(linear.matrices) == 1:
            y = product(graph, x, linear.matrices[0], bias, name, level)
        else:
            parts = [product(graph, x, matrix, None, name, level) for matrix in linear.matrices]
            y = graph.op("Concat", *parts, axis=-1, name=f"{name}/concat")
            y = y if bias is None else graph.op("Add", y, bias, name=f"{name}/bias")
        if linear.side is None:
            return y
        down, up = (graph.stored(weight) for weight in linear.side)
        inner = graph.op("MatMul", x, down, name=f"{name}/down")
        return graph.op("Add", y, graph.op("MatMul", inner, up, name=f"{name}/up"), name=f"{name}/side")

    def _attention(self, index: int, qkv: ir.Value) -> ir.Value:
        graph, size = self.builder, self.writer.geometry
        attention: Any = self.writer.model.layers[index].self_attn
        shape: Shape = ["batch_size", size.kv_heads, "past_sequence_length", size.head_size]
        past = [graph.input(f"past_key_values.{index}.{kind}", "float32", shape) for kind in ("key", "value")]
        query, key, value = self._normed_heads(index, qkv) if hasattr(attention, "q_norm") else (qkv, None, None)
        rotated = bool(getattr(attention, "use_rope", True))  # SmolLM3 leaves every fourth layer without
        mixed, *present = graph.ops(
            "GroupQueryAttention", query, key, value, *past, self.last, self.total,
            *((self.cosine, self.sine) if rotated else ()),
            outputs=3, domain=MICROSOFT, name=f"layers.{index}/attention",
            num_heads=size.heads, kv_num_heads=size.kv_heads, scale=float(attention.scaling),
            do_rotary=int(rotated), rotary_interleaved=0, local_window_size=_window(attention),
        )  # fmt: skip
        self._present += [(f"present.{index}.{kind}", out) for kind, out in zip(("key", "value"), present)]
        return mixed

    def _normed_heads(self, index: int, qkv: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Normalize each head of q and k (Qwen 3)."""
        graph, size, name = self.builder, self.writer.geometry, f"layers.{index}"
        width = [heads * size.head_size for heads in (size.heads, size.kv_heads, size.kv_heads)]
        query, key, value = graph.ops("Split", qkv, graph.constant(width, "int64"), outputs=3, axis=-1)
        normed = []
        for leaf, heads in (("q_norm", query), ("k_norm", key)):
            scale = graph.weight(
                f"{name}.{leaf}", _numpy(self.writer.frozen[f"{PREFIX}.{index}.self_attn.{leaf}.weight"])
            )
            split = graph.op("Reshape", heads, graph.constant([0, 0, -1, size.head_size], "int64"))
            split = graph.op("SimplifiedLayerNormalization", split, scale, axis=-1, epsilon=size.epsilon, stash_type=1)
            normed.append(graph.op("Reshape", split, graph.constant([0, 0, -1], "int64")))
        return normed[0], normed[1], value

    def _rotary_tables(self) -> tuple[ir.Value, ir.Value]:
        """Compute the cosines and sines ``[context, head size / 2]`` from the frequencies, once per session."""
        graph, rotary = self.builder, self.writer.model.language.model.rotary_emb
        scaling = graph.constant(float(getattr(rotary, "attention_scaling", 1.0)), "float32")
        frequencies = graph.weight("rotary.frequencies", _numpy(rotary.inv_freq)[None])
        first, step = graph.constant(0, "int64"), graph.constant(1, "int64")
        positions = graph.op("Range", first, graph.constant(self.writer.plan.context, "int64"), step, name="positions")
        column = graph.op("Unsqueeze", graph.op("Cast", positions, to=1), graph.constant([1], "int64"))
        angles = graph.op("Mul", column, frequencies, name="rotary/angles")
        cosine, sine = (graph.op("Mul", graph.op(kind, angles), scaling) for kind in ("Cos", "Sin"))
        return cosine, sine


def _window(attention: Any) -> int:
    """Return how many tokens attention sees, the newest included, as the operator counts too; -1 for all."""
    # Mistral alone asks its configuration, in each forward pass; a Llama whose configuration has the entry ignores it
    owner = attention.config if attention.config.model_type == "mistral" else attention
    return int(getattr(owner, "sliding_window", None) or -1)


def _numpy(tensor: Tensor) -> Any:
    return tensor.detach().float().cpu().numpy()

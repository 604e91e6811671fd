"""The vision tower and the connector as one graph: pixels in, visual tokens out.

The graph is built by hand from fused operators where that is exact: CLIP and SigLIP blocks whose adapters fold into the
linear layers. Whatever else an adapter did to the tower is traced instead (:mod:`lavintk_onnx.traced`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor, nn

from lavintk.errors import ModelError, NotAffineError
from lavintk.layers import FrozenLinear
from lavintk.models.connector import PatchProjector, TapNeck
from lavintk.models.vision import PatchTower, VisionTower
from lavintk_onnx.graph import MICROSOFT, DataFile, GraphBuilder
from lavintk_onnx.grids import INT8_BLOCK, EncodedWeight, Grid, encode, product, stack, store
from lavintk_onnx.traced import replay, trace
from lavintk_onnx.updates import bias_of, effective_weight

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from lavintk.contracts import AffineUpdate
    from lavintk.models.multimodal import MultimodalModel

VisionGrid = Literal["fp32", "fp16", "int8"]
Updates = Mapping[str, "AffineUpdate"]
"""What the adapter adds to linear layers of the tower, by their names."""
TO_END = np.iinfo(np.int64).max
INT8_LEVEL = 4
"""``accuracy_level`` of the int8 products: activations are rounded to int8 in blocks, as the fast kernel needs it."""
ACTIVATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "quick_gelu": ("QuickGelu", MICROSOFT, {"alpha": 1.702}),
    "gelu": ("Gelu", "", {}),
    "gelu_pytorch_tanh": ("Gelu", "", {"approximate": "tanh"}),
    "gelu_new": ("Gelu", "", {"approximate": "tanh"}),
    "relu": ("Relu", "", {}),
}
"""Operator, its domain and attributes for each of transformers' ``hidden_act``; a tower with another one is traced."""


def write_vision(model: MultimodalModel, path: Path, *, height: int, width: int, grid: VisionGrid) -> None:
    """Write the graph ``path`` and its weights to ``<path>_data``.

    Input ``pixel_values``, fp32, of any rank whose last dimensions are 3, height and width, such as
    onnxruntime-genai's ``[1, images, 3, height, width]``. Output ``image_features``, fp32,
    ``[images * visual_tokens, hidden]``, the images in order.

    :param height: of the images in pixels, as is ``width``; what the tower was trained for.
    :param grid: of the weights of linear layers. int8: blocks of 32 with zero points. fp16: stored in 16 bits,
        tables and convolution too, and computed with in fp32. Weights of fewer than 32 rows or columns, as those of
        adapters are, keep to fp32 instead of int8.
    :raises ModelError: no tower, other images than it takes, or an adapter that neither folds nor can be traced.
    """
    tower = _checked_tower(model, height, width)
    updates = _foldable_updates(model)
    traced = trace(model, height, width) if updates is None else None  # before a file is opened: it may fail
    with DataFile(path.with_name(f"{path.name}_data")) as data:
        writer = VisionGraph(GraphBuilder("vision_encoder", data), data, grid)
        pixel_values = writer.graph.input("pixel_values", "float32", None)
        shape = writer.graph.constant([-1, 3, height, width], "int64")
        images = writer.graph.op("Reshape", pixel_values, shape, name="images")
        if traced is not None:
            features = replay(traced, writer, images)
        else:
            assert updates is not None
            features = _connected(writer, model.connector, _Tower(writer, tower, model.linears(), updates).run(images))
        shape = writer.graph.constant([-1, model.hidden_size], "int64")
        features = writer.graph.op("Reshape", features, shape, name="rows")
        writer.graph.output(features, "image_features", "float32", ["num_image_tokens", model.hidden_size])
        writer.graph.save(path)


class VisionGraph:
    """A graph whose weights are put on a grid as they come."""

    def __init__(self, graph: GraphBuilder, data: DataFile, grid: VisionGrid) -> None:
        self.graph, self.data, self.grid = graph, data, grid

    def encode(self, weight: Tensor) -> EncodedWeight:
        """Return a weight ``[out, in]`` on the grid."""
        small = min(weight.shape) < INT8_BLOCK  # nothing to gain, and such a weight is an adapter's: it was trained
        grid: Grid = "fp32" if self.grid == "int8" and small else self.grid
        return encode(weight.detach().float().cpu(), grid)

    def product(self, x: ir.Value, weight: EncodedWeight, bias: NDArray[Any] | None, name: str) -> ir.Value:
        """Add ``x @ W.T + bias``."""
        offset = None if bias is None else self.graph.weight(f"{name}.bias", bias)
        return product(self.graph, x, store(self.data, name, weight), offset, name, INT8_LEVEL)

    def layer(self, x: ir.Value, layer: nn.Linear, name: str) -> ir.Value:
        """Add a linear layer of torch."""
        return self.product(x, self.encode(layer.weight), layer.bias.detach().float().cpu().numpy(), name)

    def exact(self, name: str, values: Tensor) -> ir.Value:
        """Add values in fp32, whatever the grid: norms and biases."""
        return self.graph.weight(name, values.detach().float().cpu().numpy())

    def table(self, name: str, values: Tensor) -> ir.Value:
        """Add values in fp32, or stored in 16 bits on the grid fp16: convolutions and embeddings."""
        if self.grid != "fp16":
            return self.exact(name, values)
        stored = self.graph.weight(name, values.detach().cpu().numpy().astype(np.float16))
        return self.graph.op("Cast", stored, name=f"{name}/values", to=1)


class _Tower:
    """Builds CLIP's and SigLIP's encoder up to the last layer that is looked at.

    :param linears: the frozen layers by the names they had before an adapter was attached.
    :param updates: what adapters add to them.
    """

    def __init__(
        self, writer: VisionGraph, tower: VisionTower, linears: Mapping[str, FrozenLinear], updates: Updates
    ) -> None:
        self.writer, self.graph, self.tower = writer, writer.graph, tower
        self.config = tower.model.config
        self.linears, self.updates = linears, updates

    def run(self, images: ir.Value) -> ir.Value:
        """Return features ``[I, visual tokens, width]`` of images ``[I, 3, height, width]``."""
        hidden, features = self._embedded(images), []
        for depth in range(1, self.tower.taps[-1] + 1):
            hidden = self._block(hidden, depth - 1)
            if depth in self.tower.taps:
                features.append(self._looked_at(hidden))
        return self.graph.op("Concat", *features, name="taps", axis=1) if len(features) > 1 else features[0]

    def _embedded(self, images: ir.Value) -> ir.Value:
        graph, embeddings = self.graph, self.tower.model.embeddings
        convolution, positions = (
            embeddings.patch_embedding,
            embeddings.position_embedding.weight.detach().float().clone(),
        )
        kernel = self.writer.table("patches.weight", convolution.weight)
        bias = None if convolution.bias is None else self.writer.exact("patches.bias", convolution.bias)
        patches = graph.op("Conv", images, kernel, bias, name="patches", strides=list(convolution.stride))
        width = self.tower.width
        flat = graph.op("Reshape", patches, graph.constant([0, width, -1], "int64"), name="patches/flat")
        hidden = graph.op("Transpose", flat, name="patches/rows", perm=[0, 2, 1])
        if self.tower.has_class_token:
            # a row of zeros is put in front, so that the class token can come with the position embeddings
            positions[0] += embeddings.class_embedding.detach().float()
            hidden = graph.op("Pad", hidden, graph.constant([0, 1, 0, 0, 0, 0], "int64"), name="class_token")
        hidden = graph.op("Add", hidden, self.writer.table("positions", positions), name="embedded")
        first_norm = getattr(self.tower.model, "pre_layrnorm", None)
        return hidden if first_norm is None else self._norm(hidden, first_norm, "pre_layernorm")

    def _block(self, hidden: ir.Value, index: int) -> ir.Value:
        graph, name = self.graph, f"blocks.{index}"
        block: Any = self.tower.blocks[index]
        normed = self._norm(hidden, block.layer_norm1, f"{name}.norm1")
        hidden = graph.op("Add", hidden, self._attention(normed, index, name), name=f"{name}.attended")
        normed = self._norm(hidden, block.layer_norm2, f"{name}.norm2")
        kind, domain, attributes = ACTIVATIONS[self.config.hidden_act]
        wide = self._linear(normed, index, ["mlp.fc1"], f"{name}.fc1")
        wide = graph.op(kind, wide, domain=domain, name=f"{name}.activation", **attributes)
        return graph.op("Add", hidden, self._linear(wide, index, ["mlp.fc2"], f"{name}.fc2"), name=f"{name}.done")

    def _attention(self, normed: ir.Value, index: int, name: str) -> ir.Value:
        leaves = [f"self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj")]
        together = self._linear(normed, index, leaves, f"{name}.qkv")
        q, k, v = self.graph.ops("Split", together, outputs=3, name=f"{name}.split", axis=-1, num_outputs=3)
        heads = self.config.num_attention_heads
        mixed = self.graph.op(
            "MultiHeadAttention", q, k, v, domain=MICROSOFT, name=f"{name}.attention", num_heads=heads
        )
        return self._linear(mixed, index, ["self_attn.out_proj"], f"{name}.out")

    def _linear(self, x: ir.Value, index: int, leaves: Sequence[str], name: str) -> ir.Value:
        """Add layers of one block that share their input as one product, the adapter's part merged into each."""
        names = [f"vision.model.encoder.layers.{index}.{leaf}" for leaf in leaves]
        layers, change = [self.linears[n] for n in names], [self.updates.get(n) for n in names]
        weight = stack([self.writer.encode(effective_weight(layer, own)) for layer, own in zip(layers, change)])
        return self.writer.product(x, weight, bias_of(layers, change), name)

    def _norm(self, x: ir.Value, module: nn.Module, name: str) -> ir.Value:
        norm = _inner_norm(module)
        scale, offset = (self.writer.exact(f"{name}.{part}", getattr(norm, part)) for part in ("weight", "bias"))
        return self.graph.op("LayerNormalization", x, scale, offset, name=name, axis=-1, epsilon=norm.eps)

    def _looked_at(self, hidden: ir.Value) -> ir.Value:
        """Return what the connector gets of the states ``[I, positions, width]`` behind a block."""
        graph, tower = self.graph, self.tower
        if isinstance(tower, PatchTower) and not tower.has_class_token:
            return hidden
        if tower.has_class_token and not isinstance(tower, PatchTower):
            return graph.op("Gather", hidden, graph.constant([0], "int64"), name="tap", axis=1)
        positions = graph.constant([1], "int64")  # the axis
        if not tower.has_class_token:
            return graph.op("ReduceMean", hidden, positions, name="tap", keepdims=1)
        end = graph.constant([TO_END], "int64")
        return graph.op("Slice", hidden, graph.constant([1], "int64"), end, positions, name="without_class_token")


def _connected(writer: VisionGraph, connector: nn.Module | None, features: ir.Value) -> ir.Value:
    """Add the connector: its two layers, SiLU between those of the neck and GELU between those of the projector."""
    if isinstance(connector, TapNeck):
        hidden = writer.layer(features, connector.down, "neck.down")
        hidden = writer.graph.op("Mul", hidden, writer.graph.op("Sigmoid", hidden, name="neck.gate"), name="neck.silu")
        return writer.layer(hidden, connector.up, "neck.up")
    assert isinstance(connector, PatchProjector), "another connector is traced"
    hidden = writer.layer(features, connector.first, "projector.first")
    hidden = writer.graph.op("Gelu", hidden, name="projector.gelu")
    return writer.layer(hidden, connector.second, "projector.second")


def _checked_tower(model: MultimodalModel, height: int, width: int) -> VisionTower:
    if model.vision is None:
        raise ModelError("the model has no vision tower: there is no vision graph to write")
    size = model.vision.model.config.image_size
    if (height, width) != (size, size):
        raise ModelError(
            f"the vision tower has position embeddings for images of {size}x{size} pixels, but the run's images are "
            f"scaled to {width}x{height} (width x height)"
        )
    return model.vision


def _foldable_updates(model: MultimodalModel) -> Updates | None:
    """Return by linear layer what the adapter adds where there is an image; None where the tower must be traced."""
    assert model.vision is not None
    known = isinstance(model.connector, TapNeck | PatchProjector) and type(model.vision) in (VisionTower, PatchTower)
    if not known or model.vision.model.config.hidden_act not in ACTIVATIONS:
        return None
    updates: dict[str, AffineUpdate] = {}
    try:
        for update in model.adapter.affine_updates("vision.") if model.adapter else ():
            # LoRA's "all" and LaVIN's "image"; under "text" the tower does not run
            if update.condition in ("all", "image"):
                updates[update.linear] = update
            elif update.condition != "text":
                return None
    except NotAffineError:
        return None
    return updates


def _inner_norm(module: nn.Module) -> nn.LayerNorm:
    """Return the tower's own norm, which an adapter that folds may have wrapped."""
    norms = [inner for inner in module.modules() if isinstance(inner, nn.LayerNorm)]
    if len(norms) != 1:
        raise ModelError(f"{type(module).__name__} stands for a norm of the vision tower but holds {len(norms)} norms")
    return norms[0]

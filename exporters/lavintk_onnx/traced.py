"""The vision tower traced by torch, for adapters that do not fold: routers that look at the image, anyone's own.

The trace is copied node by node, so that weights reach the same grids and the same data file as in a graph built by
hand.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lavintk.errors import ModelError
from lavintk_onnx.graph import INLINE_BYTES, OPSET

if TYPE_CHECKING:
    import onnx_ir as ir

    from lavintk.models.multimodal import MultimodalModel
    from lavintk_onnx.vision import VisionGraph


class _Visual(nn.Module):
    """What :meth:`MultimodalModel.visual_embeddings` does, without the language model beside it."""

    def __init__(self, vision: nn.Module, connector: nn.Module) -> None:
        super().__init__()
        self.vision, self.connector = vision, connector

    def forward(self, pixel_values: Tensor) -> Any:
        return self.connector(self.vision(pixel_values))


def trace(model: MultimodalModel, height: int, width: int) -> ir.Model:
    """Return tower, adapters and connector as an ONNX model from images ``[I, 3, height, width]`` to their tokens.

    :raises ModelError: the tower is not in fp32, or torch cannot trace it.
    """
    assert model.vision is not None
    assert model.connector is not None
    types = sorted({str(p.dtype) for p in model.vision.parameters() if p.dtype != torch.float32})
    if types:
        raise ModelError(f"a vision tower whose adapters do not fold is exported from fp32 weights, but it has {types}")
    visual = _Visual(model.vision, model.connector)
    modes = {module: module.training for module in visual.modules()}
    try:
        # two images: torch takes a dimension of one for a constant
        example = torch.zeros(2, 3, height, width, device=model.device)
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                visual.eval(), (example,), dynamo=True, opset_version=OPSET, verbose=False,
                dynamic_shapes={"pixel_values": {0: torch.export.Dim("images")}},
            )  # fmt: skip
    except Exception as error:  # what torch raises here depends on what the adapter does
        kind = type(model.adapter).__name__
        raise ModelError(
            f"the vision tower cannot be exported: {kind} has no affine form there and torch cannot trace it: "
            f"{_root(error)}. Give the adapter affine_updates() for the vision tower, or keep it out of the tower"
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training
    assert program is not None
    traced: ir.Model = program.model
    return traced


def replay(traced: ir.Model, writer: VisionGraph, images: ir.Value) -> ir.Value:
    """Add the nodes of a traced model to ``writer``; return its output.

    :raises ModelError: the trace holds control flow.
    """
    copy = _Copy(traced.graph, writer, images)
    for node in traced.graph:
        copy.add(node)
    return copy.value(traced.graph.outputs[0])


class _Copy:
    def __init__(self, graph: ir.Graph, writer: VisionGraph, images: ir.Value) -> None:
        self.writer = writer
        self._values: dict[ir.Value, ir.Value] = {graph.inputs[0]: images}

    def add(self, node: ir.Node) -> None:
        """Add a node; a product with a stored matrix is put on the grid."""
        matrix = _stored_matrix(node)
        if matrix is not None:
            x = node.inputs[0]
            assert x is not None
            name = node.outputs[0].name or ""
            self._values[node.outputs[0]] = self.writer.product(
                self.value(x), self.writer.encode(matrix.T), None, f"product.{name}"
            )
            return
        if any(attribute.type.name in ("GRAPH", "GRAPHS") for attribute in node.attributes.values()):
            raise ModelError(
                f"the vision tower cannot be exported: its adapter decides by values ({node.op_type}) what to compute"
            )
        inputs = [None if value is None else self.value(value) for value in node.inputs]
        made = self.writer.graph.ops(
            node.op_type,
            *inputs,
            outputs=len(node.outputs),
            domain=node.domain,
            name=node.name or "",
            **node.attributes,
        )
        self._values.update(zip(node.outputs, made, strict=True))

    def value(self, old: ir.Value) -> ir.Value:
        """Return the copy of a value; weights are copied when they are first asked for."""
        if old not in self._values:
            self._values[old] = self._weight(old)
        return self._values[old]

    def _weight(self, old: ir.Value) -> ir.Value:
        assert old.const_value is not None, f"{old.name} is neither computed nor stored"
        array, name = old.const_value.numpy(), f"traced.{old.name}"
        if array.dtype == "float32" and array.ndim > 1 and array.nbytes >= INLINE_BYTES:
            return self.writer.table(name, torch.from_numpy(array.copy()))
        return self.writer.graph.weight(name, array)


def _stored_matrix(node: ir.Node) -> Tensor | None:
    """Return the weight ``[in, out]`` that a node multiplies with, if that is all it does."""
    if node.op_type != "MatMul" or node.domain:
        return None
    right = node.inputs[1]
    assert right is not None
    source = right.producer()
    # torch folds the transposition of a weight into it only where the weight is small
    turned = source is not None and source.op_type == "Transpose" and len(source.inputs[0].shape or ()) == 2  # type: ignore[union-attr]
    stored = source.inputs[0] if turned and source is not None else right
    if stored is None or stored.const_value is None:
        return None
    matrix = torch.from_numpy(stored.const_value.numpy().copy())
    if matrix.dim() != 2 or matrix.dtype != torch.float32:
        return None
    return matrix.T if turned else matrix


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's remarks on its own workings from the user; its errors come through."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _root(error: BaseException) -> str:
    """Return the first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(". ")

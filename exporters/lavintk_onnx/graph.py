"""ONNX graphs built node by node, with weights that go to external data as soon as they are given.

Only one weight is in memory at a time: :class:`DataFile` writes it and keeps where it lies. Several graphs can refer to
the same stored weight, and to the same bytes under another shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

Shape = Sequence[int | str]
"""Literal sizes, and names of those that are only known when the graph runs."""
OPSET, IR_VERSION = 21, 10
"""What ONNX Runtime, onnxruntime-genai and transformers.js of the versions we test with all load."""
MICROSOFT = "com.microsoft"
ALIGNMENT = 64
"""Bytes; each stored weight begins at a multiple of it."""
INLINE_BYTES = 1024
"""Smaller weights stay in the graph's own file."""
TYPES = {
    "float32": "FLOAT", "float16": "FLOAT16", "uint8": "UINT8", "int8": "INT8", "int32": "INT32", "int64": "INT64",
    "bool": "BOOL",
}  # fmt: skip
"""ONNX's names of NumPy's number types."""


@dataclass(frozen=True)
class StoredWeight:
    """Where a weight lies in an external data file.

    :param file: name of the file, beside the graphs.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def reshaped(self, name: str, shape: tuple[int, ...]) -> StoredWeight:
        """Return the same bytes under another name and shape, so that two nodes can share them."""
        return replace(self, name=name, shape=shape)


class DataFile:
    """An external data file that grows weight by weight; a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, name: str, values: NDArray[Any]) -> StoredWeight:
        """Append an array, row-major; return where it lies."""
        self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        self._file.write(np.asarray(values, order="C").data)
        return StoredWeight(name, self.path.name, str(values.dtype), values.shape, offset, values.nbytes)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class GraphBuilder:
    """Collects the nodes of one graph.

    :param name: of the graph.
    :param data: takes the weights; None keeps all of them in the graph's file.
    """

    def __init__(self, name: str, data: DataFile | None = None) -> None:
        self.name, self.data = name, data
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}
        self._names: dict[str, int] = {}

    def input(self, name: str, dtype: str, shape: Shape | None) -> ir.Value:
        """Declare an input; ``shape`` None leaves its rank open."""
        import onnx_ir as ir

        value = ir.val(name, ir.DataType[TYPES[dtype]], None if shape is None else list(shape))
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: str, shape: Shape) -> None:
        """Make ``value`` an output called ``name``."""
        import onnx_ir as ir

        value.name = name
        value.type = ir.TensorType(ir.DataType[TYPES[dtype]])
        value.shape = ir.Shape(list(shape))
        self._outputs.append(value)

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", name: str = "", **attributes: Any) -> ir.Value:
        """Add a node with one output and return it; None stands for an input that is left out."""
        return self.ops(kind, *inputs, outputs=1, domain=domain, name=name, **attributes)[0]

    def ops(
        self, kind: str, *inputs: ir.Value | None, outputs: int, domain: str = "", name: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """Add a node and return its outputs."""
        import onnx_ir as ir

        name = self._unique(name or kind)
        made = ir.node(kind, inputs, attributes=attributes, domain=domain, num_outputs=outputs, name=name)
        for place, value in enumerate(made.outputs):
            value.name = f"{name}.{place}" if outputs > 1 else f"{name}.out"
        self._nodes.append(made)
        return made.outputs

    def skip_output(self, value: ir.Value) -> None:
        """Leave an output of a node out; nothing may use it."""
        value.name = ""

    def weight(self, name: str, values: NDArray[Any]) -> ir.Value:
        """Add a weight; unless it is small it goes to the data file at once."""
        if self.data is None or values.nbytes < INLINE_BYTES:
            return self._inline(name, values)
        return self.stored(self.data.write(name, values))

    def stored(self, weight: StoredWeight) -> ir.Value:
        """Refer to a weight that was written before, by this graph or by another one."""
        import onnx_ir as ir

        if weight.name in self._initializers:
            return self._initializers[weight.name]
        shape = ir.Shape(weight.shape)
        tensor = ir.ExternalTensor(
            weight.file, weight.offset, weight.nbytes, ir.DataType[TYPES[weight.dtype]], shape=shape, name=weight.name
        )
        return self._register(weight.name, tensor, weight.shape)

    def constant(self, values: Any, dtype: str) -> ir.Value:
        """Add a small constant; equal ones are shared."""
        array = np.asarray(values, dtype=dtype)
        name = f"constant.{dtype}.{'x'.join(map(str, array.shape))}.{'_'.join(map(str, array.reshape(-1).tolist()))}"
        return self._initializers.get(name) or self._inline(name, array)

    def save(self, path: Path) -> None:
        """Write the graph."""
        import onnx
        import onnx_ir as ir

        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": OPSET, MICROSOFT: 1},
            name=self.name,
        )
        model = ir.Model(graph, ir_version=IR_VERSION, producer_name="lavintk")
        onnx.save_model(ir.to_proto(model), path)

    def _inline(self, name: str, values: NDArray[Any]) -> ir.Value:
        import onnx_ir as ir

        return self._register(name, ir.tensor(np.asarray(values, order="C"), name=name), values.shape)

    def _register(self, name: str, tensor: ir.TensorProtocol, shape: tuple[int, ...]) -> ir.Value:
        import onnx_ir as ir

        if name in self._initializers:
            raise ValueError(f"the graph {self.name} has a weight {name!r} already")
        value = ir.val(name, tensor.dtype, ir.Shape(shape), const_value=tensor)
        self._initializers[name] = value
        return value

    def _unique(self, name: str) -> str:
        count = self._names[name] = self._names.get(name, -1) + 1
        return f"{name}_{count}" if count else name

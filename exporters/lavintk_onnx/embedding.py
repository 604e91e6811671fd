"""The embedding table as two graphs over one data file: for transformers.js, and for onnxruntime-genai.

transformers.js overwrites the placeholders' rows itself (``embed_tokens``); onnxruntime-genai lets the graph do it
(``embedding``). Our own runtime takes the first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavintk.errors import ModelError
from lavintk_onnx.graph import MICROSOFT, DataFile, GraphBuilder, StoredWeight
from lavintk_onnx.grids import BITS, EncodedWeight, Grid

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

SMALLEST_BLOCK = 16
"""``GatherBlockQuantized`` takes blocks of this size or of a larger power of two."""


@dataclass(frozen=True)
class StoredTable:
    """An embedding table that lies in an external data file.

    :param shape: ``(vocabulary, hidden)``.
    """

    grid: Grid
    shape: tuple[int, int]
    block_size: int
    parts: dict[str, StoredWeight] = field(default_factory=dict)


def write_embedding_graphs(table: EncodedWeight, embed_tokens: Path, embedding: Path, *, image_id: int) -> None:
    """Write both graphs and, beside the first, the data file ``<embed_tokens>_data`` that both refer to.

    :param embedding: in the same folder.
    :param image_id: the image placeholder's, see :func:`write_embedding`.
    :raises ModelError: see :func:`store_table` and :func:`write_embedding`.
    """
    with DataFile(embed_tokens.with_name(f"{embed_tokens.name}_data")) as data:
        stored = store_table(data, table)
    write_embed_tokens(stored, embed_tokens)
    write_embedding(stored, embedding, image_id=image_id)


def store_table(data: DataFile, table: EncodedWeight) -> StoredTable:
    """Write a table ``[vocabulary, hidden]`` as the gathering operators take it.

    :raises ModelError: it is on a grid that no operator gathers from, or in blocks of another size.
    """
    size = table.block_size
    fits = size >= SMALLEST_BLOCK and size & (size - 1) == 0
    if table.grid not in ("fp16", "fp32") and (table.grid not in BITS or not fits):
        raise ModelError(
            f"an embedding table cannot be stored on the grid {table.grid} with blocks of {size}: ONNX Runtime gathers "
            "from fp32, fp16, int8 and int4, blocks being a power of two from 16 on; choose another --embed-quant"
        )
    parts = {name: data.write(f"embed_tokens.{name}", array) for name, array in _rows(table).items()}
    return StoredTable(table.grid, table.shape, size, parts)


def _rows(table: EncodedWeight) -> dict[str, NDArray[Any]]:
    """Return the arrays with one row per token, without what fills the last block up."""
    if "codes" not in table.arrays:
        return table.arrays
    rows, hidden = table.shape
    codes = table.arrays["codes"].reshape(rows, -1)[:, : -(-hidden * BITS[table.grid] // 8)]
    return {**table.arrays, "codes": codes}


def write_embed_tokens(table: StoredTable, path: Path) -> None:
    """Write ``input_ids`` int64 ``[batch, sequence]`` -> ``inputs_embeds`` fp32 ``[batch, sequence, hidden]``.

    Ids behind the table's end, placeholders that are to be overwritten, give row 0.

    :param path: in the folder of the data file that holds the table.
    """
    graph = GraphBuilder("embed_tokens")
    embedded = _gathered(graph, table, graph.input("input_ids", "int64", ["batch_size", "sequence_length"]))
    _finish(graph, embedded, table, path)


def write_embedding(table: StoredTable, path: Path, *, image_id: int) -> None:
    """Write ``input_ids`` and ``image_features`` fp32 ``[n, hidden]`` -> ``inputs_embeds``, features at placeholders.

    The i-th placeholder, counted through the rows of the batch, gets row i of the features; there may be none of
    either, as in every step after the prompt. Running the graph with other numbers of both is an error.

    :param image_id: the placeholder's; behind the table's end, so that the output head has no row for it.
    :raises ModelError: the placeholder is one of the table's rows.
    """
    vocabulary, hidden = table.shape
    if image_id < vocabulary:
        raise ModelError(
            f"the image placeholder has id {image_id}, a row of the vocabulary of {vocabulary}: the model could answer "
            "with it; add it to the tokenizer behind the last row"
        )
    graph = GraphBuilder("embedding")
    ids = graph.input("input_ids", "int64", ["batch_size", "sequence_length"])
    features = graph.input("image_features", "float32", ["num_image_tokens", hidden])
    places = graph.op("Equal", ids, graph.constant(image_id, "int64"), name="is_placeholder")
    places = graph.op("Transpose", graph.op("NonZero", places, name="places"), name="places/rows", perm=[1, 0])
    # onnx-targets.md 7.2: cutting the places to the features' number would let a sampled placeholder pass as a token.
    # Ours cannot be sampled, so a mismatch is a mistake of the caller, and ScatterND says so.
    embedded = graph.op("ScatterND", _gathered(graph, table, ids), places, features, name="scattered")
    _finish(graph, embedded, table, path)


def _gathered(graph: GraphBuilder, table: StoredTable, ids: ir.Value) -> ir.Value:
    """Add the rows ``[batch, sequence, hidden]`` of the ids, fp32; row 0 for ids behind the table's end."""
    known = graph.op("Less", ids, graph.constant(table.shape[0], "int64"), name="is_token")
    return lookup(graph, graph.op("Where", known, ids, graph.constant(0, "int64"), name="tokens"), table)


def lookup(graph: GraphBuilder, ids: ir.Value, table: StoredTable) -> ir.Value:
    """Add the rows ``[batch, sequence, hidden]`` of ``ids``, fp32."""
    parts = {name: graph.stored(part) for name, part in table.parts.items()}
    if "values" in parts:
        rows = graph.op("Gather", parts["values"], ids, name="rows")
        return graph.op("Cast", rows, name="rows/fp32", to=1) if table.grid == "fp16" else rows
    return graph.op(
        "GatherBlockQuantized", parts["codes"], ids, parts["scales"], parts["zero_points"], domain=MICROSOFT,
        name="rows", bits=BITS[table.grid], block_size=table.block_size, gather_axis=0, quantize_axis=1,
    )  # fmt: skip


def _finish(graph: GraphBuilder, embedded: ir.Value, table: StoredTable, path: Path) -> None:
    graph.output(embedded, "inputs_embeds", "float32", ["batch_size", "sequence_length", table.shape[1]])
    graph.save(path)

"""Weights on the grids that ONNX Runtime computes with, and the node that multiplies with them.

A frozen layer that lies on the wanted grid already is copied, code by code. Layouts: ``MatMulNBits`` takes rows in
blocks, the first of two 4-bit codes in the low nibble; ``MatMulBnb4`` takes one flat row-major run of codes, the first
in the high nibble.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lavintk.errors import ModelError
from lavintk.layers import is_finite
from lavintk.models.vocabulary import QuantizedEmbedding, QuantizedHead
from lavintk.threads import slices
from lavintk_onnx.graph import MICROSOFT, DataFile, GraphBuilder, StoredWeight

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from lavintk.layers import FrozenLinear, PackedWeight
    from lavintk.models.multimodal import MultimodalModel

Grid = Literal["int4", "int8", "nf4", "fp16", "fp32"]
BITS = {"int4": 4, "int8": 8}
INT8_BLOCK = 32
"""Weights that share a scale and a zero point on the int8 grid."""
NF4_BLOCKS = (16, 32, 64, 128, 256)
"""Block sizes that ``MatMulBnb4`` has kernels for on a CPU; with others it fails at run time."""
NF4_CODES = (
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip
"""Values of the NF4 codes (Dettmers et al., "QLoRA", appendix E), as ONNX Runtime has them."""
ROWS_AT_ONCE = 4096
"""Rows of a table or a weight that are encoded at a time, so that intermediate results stay small."""
DECODED_AT_ONCE = 1 << 18
"""Weights that a thread decodes at a time."""


@dataclass(frozen=True)
class EncodedWeight:
    """A weight ``[out, in]`` on a grid.

    ``arrays`` holds for int4 and int8 ``codes`` uint8 ``[out, blocks, block bytes]``, ``scales`` fp32 ``[out, blocks]``
    and ``zero_points`` uint8 ``[out, bytes]``; for nf4 ``codes`` uint8 ``[out * in / 2]`` and ``scales`` fp32
    ``[out * in / block size]``; for fp16 and fp32 ``values`` ``[out, in]``.

    :param block_size: weights that share a scale; 0 for fp16 and fp32.
    :param copied: the codes are those of a frozen layer, as it was trained on.
    """

    grid: Grid
    shape: tuple[int, int]
    arrays: dict[str, NDArray[Any]]
    block_size: int = 0
    copied: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return sum(array.nbytes for array in self.arrays.values())


def encode_layer(
    layer: FrozenLinear, grid: Grid, quantize: Callable[[Tensor], FrozenLinear] | None = None
) -> EncodedWeight:
    """Return the weight of a frozen layer on ``grid``: copied if it lies there already, else encoded anew.

    :param quantize: makes a layer on the int4 or nf4 grid from a weight.
    """
    copied = _copied(layer.packed(), grid)
    if copied is not None:
        return replace(copied, copied=True)
    return encode(layer.dequantize(torch.float32), grid, quantize)


def encode(weight: Tensor, grid: Grid, quantize: Callable[[Tensor], FrozenLinear] | None = None) -> EncodedWeight:
    """Return ``weight`` ``[out, in]`` on ``grid``.

    :param quantize: as in :func:`encode_layer`.
    :raises ModelError: a value is not finite or beyond fp16, or the quantizer gives something else than the grid.
    """
    shape = (weight.shape[0], weight.shape[1])
    if not is_finite(weight):
        raise ModelError("a weight holds values that are NaN or infinite: did the training diverge, is a file damaged?")
    if grid in ("fp16", "fp32"):
        values = weight.to(getattr(torch, _FLOATS[grid]))
        if not is_finite(values):
            raise ModelError("a weight holds values beyond fp16, whose largest is 65504: choose another grid (--quant)")
        return EncodedWeight(grid, shape, {"values": values.numpy()})
    if grid == "int8":
        parts = [_int8_blocks(rows.float()) for rows in weight.split(ROWS_AT_ONCE)]
        return EncodedWeight(grid, shape, {n: np.concatenate([p[n] for p in parts]) for n in parts[0]}, INT8_BLOCK)
    if quantize is None:
        raise ModelError(f"no quantizer is known for the grid {grid}")
    packed = quantize(weight.float()).packed()
    encoded = _copied(packed, grid)
    if encoded is None:
        raise ModelError(f"the quantizer made a weight of scheme {packed.scheme!r}, which is not the grid {grid}")
    return encoded


def encode_table(
    model: MultimodalModel, name: str, grid: Grid, quantize: Callable[[Tensor], FrozenLinear] | None = None
) -> EncodedWeight:
    """Return the embedding or the output head on ``grid``; blocks that lie there already are copied.

    :param name: the module's, as in :mod:`lavintk.models.vocabulary`; where they are tied, both are one table.
    :param quantize: as in :func:`encode_layer`.
    :raises ModelError: see :func:`encode`.
    """
    module = model.language.get_submodule(name)
    if not isinstance(module, QuantizedEmbedding | QuantizedHead):
        return encode(module.weight.detach(), grid, quantize)
    parts = [encode_layer(block, grid, quantize) for block in module.table.blocks]
    return stack(parts) if stackable(parts) else encode(module.table.dequantize(torch.float32), grid, quantize)


_FLOATS = {"fp16": "float16", "fp32": "float32"}


def decode(weight: EncodedWeight) -> Tensor:
    """Return the fp32 values ``[out, in]`` that the encoded weight stands for."""
    arrays = weight.arrays
    if "values" in arrays:
        return torch.from_numpy(arrays["values"]).float()
    codes, scales = torch.from_numpy(arrays["codes"]), torch.from_numpy(arrays["scales"])
    if weight.grid == "nf4":
        pairs = torch.stack([codes >> 4, codes & 15], dim=-1).flatten().long()
        values = torch.tensor(NF4_CODES)[pairs].view(-1, weight.block_size) * scales.unsqueeze(-1)
        return values.view(weight.shape)
    zero_points = torch.from_numpy(arrays["zero_points"])
    if weight.grid == "int4":
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(2)
        zero_points = torch.stack([zero_points & 15, zero_points >> 4], dim=-1).flatten(1)[:, : codes.shape[1]]
    values = (codes.float() - zero_points.float().unsqueeze(-1)) * scales.unsqueeze(-1)
    return values.flatten(1)[:, : weight.shape[1]]


def pieces_of(weight: EncodedWeight) -> list[slice]:
    """Return the rows that :func:`cut` can take out, in pieces that fit a cache."""
    rows, columns = weight.shape
    whole = weight.grid != "nf4" or columns % weight.block_size == 0  # its blocks may reach into the next row
    return slices(rows, max(1, DECODED_AT_ONCE // columns) if whole else rows)


def cut(weight: EncodedWeight, rows: slice) -> EncodedWeight:
    """Return rows of an encoded weight, one of :func:`pieces_of` it, without copying."""
    count = weight.shape[0]
    arrays = {n: a[rows.start * len(a) // count : rows.stop * len(a) // count] for n, a in weight.arrays.items()}
    return replace(weight, shape=(rows.stop - rows.start, weight.shape[1]), arrays=arrays)


def _copied(packed: PackedWeight, grid: Grid) -> EncodedWeight | None:
    """Return the codes as they are stored, or None where they lie on another grid."""
    if packed.scheme == "int4-block" and grid == "int4" and packed.zero_points is not None:
        arrays = {"codes": packed.codes, "scales": _scales(packed), "zero_points": packed.zero_points}
    elif packed.scheme == "nf4" and grid == "nf4" and packed.block_size in NF4_BLOCKS:
        arrays = {"codes": packed.codes.reshape(-1), "scales": _scales(packed).reshape(-1)}
    elif packed.scheme == "int8-row" and grid == "int8":
        return _int8_rows(packed)
    else:
        return None
    return EncodedWeight(
        grid, packed.shape, {n: a.cpu().contiguous().numpy() for n, a in arrays.items()}, packed.block_size
    )


def _scales(packed: PackedWeight) -> Tensor:
    assert packed.scales is not None, f"{packed.scheme} has scales"
    return packed.scales.float()


def _int8_rows(packed: PackedWeight) -> EncodedWeight:
    """Return a weight with one scale per row in blocks: the codes stay, the scale is repeated."""
    codes = packed.codes.cpu()
    blocks = -(-codes.shape[1] // INT8_BLOCK)
    padded = F.pad(codes.to(torch.int16) + 128, (0, -codes.shape[1] % INT8_BLOCK), value=128).to(torch.uint8)
    scales = _scales(packed).cpu().reshape(-1, 1).expand(-1, blocks).contiguous()
    return EncodedWeight(
        "int8",
        packed.shape,
        {
            "codes": padded.view(-1, blocks, INT8_BLOCK).numpy(),
            "scales": scales.numpy(),
            "zero_points": np.full(scales.shape, 128, dtype=np.uint8),
        },
        INT8_BLOCK,
    )


def _int8_blocks(rows: Tensor) -> dict[str, NDArray[Any]]:
    """Round to nearest between the least and the greatest weight of each block, zero always being exact."""
    blocks = F.pad(rows, (0, -rows.shape[1] % INT8_BLOCK)).view(rows.shape[0], -1, INT8_BLOCK)
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    scales = (high - low).clamp(min=torch.finfo(torch.float32).tiny) / 255
    zero_points = (-low / scales).round().clamp(0, 255)
    codes = (blocks / scales.unsqueeze(-1)).round().add_(zero_points.unsqueeze(-1)).clamp_(0, 255)
    return {
        "codes": codes.to(torch.uint8).numpy(),
        "scales": scales.numpy(),
        "zero_points": zero_points.to(torch.uint8).numpy(),
    }


def stack(parts: Sequence[EncodedWeight]) -> EncodedWeight:
    """Return weights of the same input as one, below each other.

    :raises ValueError: they differ in grid, width or block size, or an nf4 block would straddle two of them.
    """
    first = parts[0]
    if not stackable(parts):
        raise ValueError(f"weights of {[(p.grid, p.shape, p.block_size) for p in parts]} cannot be stacked")
    shape = (sum(part.shape[0] for part in parts), first.shape[1])
    arrays = {name: np.concatenate([part.arrays[name] for part in parts]) for name in first.arrays}
    return EncodedWeight(first.grid, shape, arrays, first.block_size)


def stackable(parts: Sequence[EncodedWeight]) -> bool:
    """Whether :func:`stack` can put them below each other."""
    first = parts[0]
    same = all((p.grid, p.shape[1], p.block_size) == (first.grid, first.shape[1], first.block_size) for p in parts)
    whole = first.grid != "nf4" or all(p.shape[0] * p.shape[1] % p.block_size == 0 for p in parts)
    return same and whole


@dataclass(frozen=True)
class StoredMatrix:
    """An encoded weight that lies in an external data file, ready for nodes of any graph beside it.

    :param rows_first: fp16 and fp32 values lie as ``[out, in]``, because an embedding shares them.
    """

    grid: Grid
    shape: tuple[int, int]
    block_size: int
    parts: dict[str, StoredWeight] = field(default_factory=dict)
    rows_first: bool = False


def store(data: DataFile, name: str, weight: EncodedWeight) -> StoredMatrix:
    """Write an encoded weight; fp16 and fp32 values are transposed, as ``MatMul`` takes them."""
    arrays = weight.arrays
    if "values" in arrays:
        arrays = {"values": arrays["values"].T}
    parts = {part: data.write(f"{name}.{part}", array) for part, array in arrays.items()}
    return StoredMatrix(weight.grid, weight.shape, weight.block_size, parts)


def product(
    graph: GraphBuilder, x: ir.Value, matrix: StoredMatrix, bias: ir.Value | None, name: str, accuracy_level: int
) -> ir.Value:
    """Add ``x @ W.T + bias``.

    :param accuracy_level: of ``MatMulNBits`` on the int4 grid: 4 computes with activations rounded to int8, 1 in fp32.
        On the int8 grid it is always 4: without, its kernel takes 100 times as long.
    """
    inputs = {part: graph.stored(weight) for part, weight in matrix.parts.items()}
    rows, columns = matrix.shape
    if matrix.grid in BITS:
        level = accuracy_level if matrix.grid == "int4" else 4
        return graph.op(
            "MatMulNBits", x, inputs["codes"], inputs["scales"], inputs["zero_points"], None, bias,
            domain=MICROSOFT, name=name, K=columns, N=rows, bits=BITS[matrix.grid], block_size=matrix.block_size,
            accuracy_level=level,
        )  # fmt: skip
    if matrix.grid == "nf4":
        y = graph.op(
            "MatMulBnb4", x, inputs["codes"], inputs["scales"], domain=MICROSOFT, name=name,
            K=columns, N=rows, block_size=matrix.block_size, quant_type=1,
        )  # fmt: skip
    else:
        values = inputs["values"]
        if matrix.grid == "fp16":  # folded when the session starts: 16 bits on disk, 32 in memory
            values = graph.op("Cast", values, name=f"{name}/values", to=1)
        if matrix.rows_first:
            y = graph.op("FusedMatMul", x, values, domain=MICROSOFT, name=name, transB=1)
        else:
            y = graph.op("MatMul", x, values, name=name)
    return y if bias is None else graph.op("Add", y, bias, name=f"{name}/bias")


@functools.cache
def quantizer_for(grid: Grid) -> Callable[[Tensor], FrozenLinear] | None:
    """Return the installed quantizer of the grid's name, as a function from a weight to a layer."""
    if grid not in ("int4", "nf4"):
        return None
    from lavintk.plugins import installed_plugins
    from lavintk.registry import Choice

    quantizer = installed_plugins().quantizers.create(Choice(grid))
    return lambda weight: quantizer.quantize(weight, None)

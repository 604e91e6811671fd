"""Writes safetensors files one tensor at a time, so that memory holds one tensor, whatever the model's size.

The format is safetensors' (https://github.com/huggingface/safetensors#format): the length of the header, the header as
JSON, the bytes of the tensors. The names of the files and the index are transformers'.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lavintk.errors import ModelError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Types of the option ``dtype``."""
_STORED = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@dataclass
class _Shard:
    """A file to be written: the shapes of its tensors by name."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    nbytes: int = 0


def write_sharded(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    shard_bytes: int,
) -> int:
    """Write ``tensors`` as ``model.safetensors``, or as several files and their index; return the bytes of all tensors.

    :param shapes: of all tensors, in the order in which ``tensors`` yields them.
    :param dtype: what each tensor is cast to.
    :param shard_bytes: largest size of a file, unless a single tensor is larger.
    :raises ModelError: a value does not fit into ``dtype``.
    """
    shards = _plan(shapes, dtype, shard_bytes)
    count, index, source = len(shards), {}, iter(tensors)
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        with (folder / name).open("wb") as file:
            _write_header(file, shard, dtype)
            for expected in shard.shapes:
                found, tensor = next(source)
                if found != expected:
                    raise RuntimeError(f"{found} came where {expected} was planned")
                _write_tensor(file, found, tensor, dtype)
                index[found] = name
    total = sum(shard.nbytes for shard in shards)
    if count > 1:
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return total


def _plan(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, shard_bytes: int) -> list[_Shard]:
    shards = [_Shard()]
    for name, shape in shapes.items():
        size = prod(shape) * dtype.itemsize
        if shards[-1].shapes and shards[-1].nbytes + size > shard_bytes:
            shards.append(_Shard())
        shards[-1].shapes[name] = shape
        shards[-1].nbytes += size
    return shards


def _write_header(file: BinaryIO, shard: _Shard, dtype: torch.dtype) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, shape in shard.shapes.items():
        end = begin + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _STORED[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data start at a multiple of eight bytes
    file.write(len(text).to_bytes(8, "little") + text)


def _write_tensor(file: BinaryIO, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    stored = tensor.to(dtype).contiguous()
    if not torch.isfinite(stored).all():
        largest = float(tensor.abs().max())
        raise ModelError(
            f"{name} does not fit into {dtype} (its largest value is {largest:.3g}): export with dtype=bf16 or fp32"
        )
    file.write(memoryview(stored.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]

"""The embedding and the output head of a language model in quantized form: one table, cut into blocks of rows.

With a large vocabulary they are the largest tensors of all: 128,256 rows of 4,096 values take 1 GiB in 16 bits, and as
much again where the two are not tied. Cut into blocks that are layers of their own, a table never exists unpacked as a
whole: a lookup unpacks rows, a product one block at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from lavintk.contracts import Quantizer
from lavintk.errors import LavintkError, ModelError
from lavintk.layers import FrozenLinear

BLOCK_ROWS = 1 << 14
"""Rows of a block: with 4,096 columns 128 MiB in 16 bits, as much as a large linear layer takes unpacked."""
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
"""transformers' names of the two modules."""
TABLES = (f"{EMBEDDING}.weight", f"{HEAD}.weight")
"""The tensors of a checkpoint that become tables."""


class QuantizedTable(nn.Module):
    """A table ``[vocabulary, hidden]`` as frozen layers that hold :data:`BLOCK_ROWS` rows each, the last one the rest.

    :param blocks: from the first row to the last.
    """

    def __init__(self, blocks: Iterable[FrozenLinear]) -> None:
        super().__init__()
        self._blocks = nn.ModuleList(blocks)

    @property
    def blocks(self) -> list[FrozenLinear]:
        """The layers, in the order of their rows."""
        return [cast(FrozenLinear, block) for block in self._blocks]

    @property
    def shape(self) -> tuple[int, int]:
        """``(vocabulary, hidden)``."""
        return sum(block.out_features for block in self.blocks), self.blocks[0].in_features

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the rows ``[..., hidden]`` of ``ids`` ``[...]`` in ``dtype``; the host never waits.

        Every block looks all ids up, so shapes do not depend on their values. Ids outside of the table give its first
        or its last row.
        """
        first, flat, found = 0, ids.reshape(-1), None
        for block in self.blocks:
            place = flat - first
            rows = block.rows(place.clamp(0, block.out_features - 1), dtype)
            found = rows if found is None else torch.where((place >= 0).unsqueeze(1), rows, found)
            first += block.out_features
        assert found is not None, "a table has at least one block"
        return found.view(*ids.shape, -1)

    def dequantize(self, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """Return the whole table, for exporters: unpacked block by block and put together on ``device``.

        :param device: by default where the blocks are.
        """
        whole: Tensor | None = None
        first = 0
        for block in self.blocks:
            rows = block.dequantize(dtype)
            if whole is None:
                whole = torch.empty(self.shape, dtype=dtype, device=device or rows.device)
            whole[first : first + block.out_features] = rows
            first += block.out_features
        assert whole is not None, "a table has at least one block"
        return whole


class QuantizedEmbedding(nn.Module):
    """An embedding that looks its rows up in a table.

    :param table: perhaps that of a :class:`QuantizedHead` too.
    :param dtype: of what it returns; it changes as that of a parameter does when the module is cast.
    """

    def __init__(self, table: QuantizedTable, dtype: torch.dtype) -> None:
        super().__init__()
        self.table = table
        self._like: Tensor
        self.register_buffer("_like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return ``[..., hidden]`` for ids ``[...]``."""
        return self.table.rows(ids, self._like.dtype)


class QuantizedHead(nn.Module):
    """An output head, without bias, that multiplies with the rows of a table."""

    def __init__(self, table: QuantizedTable) -> None:
        super().__init__()
        self.table = table

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the logits ``[..., vocabulary]`` of ``hidden`` ``[..., hidden]``, in its type."""
        return torch.cat([block(hidden) for block in self.table.blocks], dim=-1)


def quantize_table(pieces: Iterable[Tensor], quantizer: Quantizer) -> QuantizedTable:
    """Return a table of what ``quantizer`` makes of each of ``pieces``, ``[rows, hidden]``; none of them is kept.

    :raises ModelError: the quantizer cannot store such rows.
    """
    blocks = []
    for piece in pieces:
        try:
            blocks.append(quantizer.quantize(piece, None))
        except LavintkError as error:
            raise ModelError(f"embedding and head cannot be stored as embed_quant says: {error}") from error
    return QuantizedTable(blocks)


def check_plain(model: Any) -> None:
    """Make sure that embedding and head of a causal LM do nothing but look up and multiply.

    :raises ModelError: they do more, and a table would not.
    """
    embedding, head = model.get_submodule(EMBEDDING), model.get_submodule(HEAD)
    faults = [type(module).__name__ for module in (embedding, head) if type(module) not in (nn.Embedding, nn.Linear)]
    faults += ["a head with a bias"] if getattr(head, "bias", None) is not None else []
    if faults:
        raise ModelError(
            f"this model has {' and '.join(faults)}, which embed_quant cannot store. Use embed_quant none."
        )


def outline_table(rows: int, columns: int, quantizer: Quantizer) -> QuantizedTable:
    """Return a table on the meta device: its storage without values."""
    meta = torch.device("meta")
    return QuantizedTable(quantizer.empty(count, columns, False, meta) for count in _counts(rows))


def pieces(table: Tensor) -> Iterator[Tensor]:
    """Yield views of the rows ``[vocabulary, hidden]`` that make up a block each."""
    yield from table.split(BLOCK_ROWS)


def put_table(model: Any, name: str, table: QuantizedTable, dtype: torch.dtype) -> None:
    """Put ``table`` in the place of the embedding or the head of a causal LM, and of both where they are tied.

    :param name: one of :data:`TABLES`.
    :param dtype: of the embeddings.
    """
    tied = bool(model.config.tie_word_embeddings)
    if tied or name.startswith(EMBEDDING):
        model.model.embed_tokens = QuantizedEmbedding(table, dtype)
    if tied or name.startswith(HEAD):
        model.lm_head = QuantizedHead(table)


def tables_of(model: nn.Module, prefix: str = "") -> dict[str, QuantizedTable]:
    """Return the tables of ``model`` under the name that their weight has where it is not quantized.

    A head that is tied has no entry of its own, as it has no parameter of its own otherwise.
    """
    found: dict[int, tuple[str, QuantizedTable]] = {}
    for name, module in model.named_modules(prefix=prefix):
        if isinstance(module, QuantizedEmbedding | QuantizedHead):
            found.setdefault(id(module.table), (f"{name}.weight", module.table))
    return dict(found.values())


def _counts(rows: int) -> list[int]:
    return [min(BLOCK_ROWS, rows - first) for first in range(0, rows, BLOCK_ROWS)]

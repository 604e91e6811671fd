"""Causal attention over rows that lie end to end, with or without a key/value cache.

transformers' attention modules call a registered function with whatever stands in ``attention_mask``; here that is
an :class:`AttentionPlan`. Every row attends to itself alone. For attention only, rows are gathered into a right-padded
``[B, S]`` block: under a causal mask right padding is invisible, so no mask tensor is needed and the fused kernels run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

IMPLEMENTATION = "lavintk"
"""Name under which :func:`attend` is registered with transformers."""


@dataclass(frozen=True)
class AttentionPlan:
    """Which tokens belong together.

    :param lengths: new tokens of each row, on the host; they lie end to end in the hidden states.
    :param side: trailing tokens that attend only to themselves (an adapter's side tokens).
    :param gather: ``[B * S]`` positions of the padded block in the flat order, or None for a single row.
    :param scatter: ``[N]`` positions of the flat tokens in the padded block, or None for a single row.
    :param cache: filled with, and attended together with, the new keys and values; None in training.
    """

    lengths: tuple[int, ...]
    side: int = 0
    gather: Tensor | None = None
    scatter: Tensor | None = None
    cache: KeyValueCache | None = None

    @classmethod
    def of(
        cls, lengths: tuple[int, ...], device: torch.device, side: int = 0, cache: KeyValueCache | None = None
    ) -> AttentionPlan:
        """Plan rows of ``lengths`` tokens followed by ``side`` side tokens."""
        if len(lengths) == 1 or set(lengths) == {1}:
            return cls(lengths, side, cache=cache)
        longest = max(lengths)
        gather = torch.zeros(len(lengths), longest, dtype=torch.int64)
        scatter, start = [], 0
        for row, length in enumerate(lengths):
            gather[row, :length] = torch.arange(start, start + length)
            scatter.append(torch.arange(length) + row * longest)
            start += length
        return cls(lengths, side, gather.flatten().to(device), torch.cat(scatter).to(device), cache)

    def to_rows(self, flat: Tensor) -> Tensor:
        """Turn ``[heads, N, d]`` into ``[B, heads, S, d]``, padded on the right."""
        rows = len(self.lengths)
        if self.gather is not None:
            flat = flat.index_select(1, self.gather)
        return cast(Tensor, flat.unflatten(1, (rows, -1))).transpose(0, 1)

    def to_flat(self, rows: Tensor) -> Tensor:
        """Turn ``[B, heads, S, d]`` back into ``[N, heads, d]``."""
        flat = rows.transpose(1, 2).flatten(0, 1)
        return flat if self.scatter is None else flat.index_select(0, self.scatter)


class KeyValueCache:
    """Keys and values of B rows, as long as needed and no longer.

    :param capacity: tokens per row, prompt and answer together.
    """

    def __init__(self, rows: int, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.device = device
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def holds(self, layer: int) -> bool:
        """Whether the prompt's keys and values of ``layer`` are stored."""
        return layer in self._layers

    def write_prompt(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store ``[B, heads, S, d]`` of the prompts, right-padded."""
        shape = (*keys.shape[:2], self.capacity, keys.shape[3])
        stored = (keys.new_zeros(shape), values.new_zeros((*shape[:3], values.shape[3])))
        for target, source in zip(stored, (keys, values)):
            target[:, :, : source.shape[2]] = source
        self._layers[layer] = stored

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store one token per row, ``[B, heads, 1, d]``, and return all keys and values of the layer."""
        stored = self._layers[layer]
        index = self.lengths.view(-1, 1, 1, 1)
        for target, source in zip(stored, (keys, values)):
            target.scatter_(2, index.expand(source.shape), source)
        return stored

    def advance(self, tokens: Tensor | int) -> None:
        """Count the tokens that every layer has stored."""
        self.lengths += tokens

    def visible(self, window: int | None) -> Tensor:
        """Return ``[B, 1, 1, capacity]``: what a newly appended token may attend to, itself included."""
        places, newest = torch.arange(self.capacity, device=self.device), self.lengths.unsqueeze(1)
        seen = places <= newest
        if window is not None:
            seen &= places > newest - window
        return seen[:, None, None, :]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: AttentionPlan,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within rows.

    :param query: ``[1, heads, N + side, d]``; key and value have their own number of heads.
    :returns: ``[1, N + side, heads, d]`` and None for the attention weights.
    """
    plan = attention_mask
    tokens = query.shape[2] - plan.side
    q, k, v = (plan.to_rows(x[0, :, :tokens]) for x in (query, key, value))
    layer = cast(int, module.layer_idx)
    if plan.cache is not None and plan.cache.holds(layer):
        k, v = plan.cache.append(layer, k, v)
        mask: Tensor | None = plan.cache.visible(sliding_window)
    else:
        if plan.cache is not None:
            plan.cache.write_prompt(layer, k, v)
        mask = _band(q.shape[2], sliding_window, q.device)
    attended = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    flat = plan.to_flat(attended)
    if plan.side:  # the softmax over a single key is 1, so a side token's output is its own value
        own = value[0, :, tokens:].transpose(0, 1)
        flat = torch.cat([flat, own.repeat_interleave(query.shape[1] // value.shape[1], dim=1)])
    return flat.unsqueeze(0), None


def _band(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return the causal mask ``[length, length]`` limited to the last ``window`` tokens; None if that is no limit."""
    if window is None or length <= window:
        return None
    full = torch.ones(length, length, dtype=torch.bool, device=device)
    return full.tril() & ~full.tril(-window)


AttentionInterface.register(IMPLEMENTATION, attend)

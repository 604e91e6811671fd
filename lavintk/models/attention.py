"""Causal attention over rows that lie end to end, with or without a key/value cache.

transformers' attention modules call a registered function with whatever stands in ``attention_mask``; here that is
an :class:`AttentionPlan`. Every row attends to itself alone. For attention only, rows are gathered into a right-padded
``[B, S]`` block: under a causal mask right padding is invisible, so no mask tensor is needed and the fused kernels run.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

IMPLEMENTATION = "lavintk"
"""Name under which :func:`attend` is registered with transformers."""
FLASH_TYPES = (torch.float16, torch.bfloat16)
"""What the flash kernel computes in."""


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

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None,
        dropout: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """Attend within rows, from a key/value cache where the plan has one.

        :param layer: index of the decoder layer.
        :param query: ``[N + M, heads, d]``; key and value may have fewer heads.
        :param window: tokens back that are seen, itself included; None for all.
        :returns: ``[N + M, heads, d]``.
        """
        tokens = query.shape[0] - self.side
        q, k, v = (self.to_rows(x[:tokens]) for x in (query, key, value))
        if self.cache is not None and self.cache.holds(layer):
            k, v = self.cache.append(layer, k, v)
            mask: Tensor | None = self.cache.visible(window)
        else:
            if self.cache is not None:
                self.cache.write_prompt(layer, k, v)
            mask = _band(q.shape[2], window, q.device)
        computed = _suited_to_gradients(q)
        attended = F.scaled_dot_product_attention(
            q.to(computed), k.to(computed), v.to(computed), attn_mask=mask, dropout_p=dropout, is_causal=mask is None,
            scale=scale, enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        flat = self.to_flat(attended.to(q.dtype))
        if self.side:  # the softmax over a single key is 1, so a side token's output is its own value
            flat = torch.cat([flat, value[tokens:].repeat_interleave(query.shape[1] // value.shape[1], dim=1)])
        return flat

    def to_rows(self, flat: Tensor) -> Tensor:
        """Turn ``[N, heads, d]`` into ``[B, heads, S, d]``, padded on the right."""
        rows = len(self.lengths)
        if self.gather is not None:
            flat = flat.index_select(0, self.gather)
        return cast(Tensor, flat.unflatten(0, (rows, -1))).transpose(1, 2)

    def to_flat(self, rows: Tensor) -> Tensor:
        """Turn ``[B, heads, S, d]`` back into ``[N, heads, d]``."""
        flat = rows.transpose(1, 2).flatten(0, 1)
        return flat if self.scatter is None else flat.index_select(0, self.scatter)


@dataclass(frozen=True)
class PackPlan:
    """Which tokens belong together, where only tensors may change from call to call: for CUDA graphs.

    :param boundaries: ``[S + 1]`` int32: where each of S segments begins, and where the last one ends. Segments may be
        empty; a side token is a segment by itself.
    :param longest: tokens that no segment exceeds.
    """

    boundaries: Tensor
    longest: int

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None,
        dropout: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """Attend within segments, as :meth:`AttentionPlan.attend` does within rows; no dropout."""
        if window is not None and window >= self.longest:
            window = None
        grouped = query.shape[1] != key.shape[1]
        if query.is_cuda and query.dtype in FLASH_TYPES and query.shape[2] % 8 == 0 and query.shape[2] <= 256:
            return _varlen_attention(query, key, value, self, scale, window, grouped)
        mask = self._mask(query.shape[0], window)
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
        return attended[0].transpose(0, 1)

    def _mask(self, tokens: int, window: int | None) -> Tensor:
        """Return ``[tokens, tokens]``: true where a token sees another one."""
        places = torch.arange(tokens, device=self.boundaries.device)
        segments = torch.searchsorted(self.boundaries, places.to(torch.int32), right=True)
        back = places.unsqueeze(1) - places
        seen = (segments.unsqueeze(1) == segments) & (back >= 0)
        return seen if window is None else seen & (back < window)


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: PackPlan, scale: float, window: int | None, grouped: bool
) -> Tensor:
    """Run the flash kernel that takes segments of any length."""
    from torch.nn.attention.varlen import varlen_attn

    attended = varlen_attn(
        query, key, value, plan.boundaries, plan.boundaries, plan.longest, plan.longest, scale=scale,
        window_size=(-1 if window is None else window - 1, 0), **_grouped_heads() if grouped else {},
    )  # fmt: skip
    return cast(Tensor, attended)


@functools.cache
def _grouped_heads() -> dict[str, Any]:
    """Return how varlen_attn is told of fewer heads in keys and values; torch 2.11 takes them without a word."""
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


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
    attention_mask: AttentionPlan | PackPlan,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend as the plan says; what transformers' attention modules call.

    :param query: ``[1, heads, N + M, d]``; key and value have their own number of heads.
    :returns: ``[1, N + M, heads, d]`` and None for the attention weights.
    """
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = q.shape[2] ** -0.5 if scaling is None else scaling
    attended = attention_mask.attend(
        cast(int, module.layer_idx), q, k, v, scale=scale, window=sliding_window, dropout=dropout
    )
    return attended.unsqueeze(0), None


def _suited_to_gradients(query: Tensor) -> torch.dtype:
    """Return the type to attend in: on a CPU, gradients of short rows take twice as long in bf16 as in fp32."""
    slow = query.device.type == "cpu" and query.requires_grad and torch.is_grad_enabled()
    return torch.float32 if slow else query.dtype


def _band(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return the causal mask ``[length, length]`` limited to the last ``window`` tokens; None if that is no limit."""
    if window is None or length <= window:
        return None
    full = torch.ones(length, length, dtype=torch.bool, device=device)
    return full.tril() & ~full.tril(-window)


AttentionInterface.register(IMPLEMENTATION, attend)

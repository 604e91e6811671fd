"""Batched generation with a key/value cache sized by need."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lavintk.data.batch import Batch
from lavintk.errors import OptionsError
from lavintk.models.attention import KeyValueCache
from lavintk.models.multimodal import MultimodalModel


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    :param temperature: divides the logits; 0 takes the most likely token.
    :param top_p: a token is kept while the mass of the more likely ones is at most this, as in LaVIN; 1 keeps all.
    :param top_k: keep so many tokens, before top_p is applied; 0 keeps all.
    :param seed: of the draw.
    :raises OptionsError: values out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        faults = []
        if not 0 <= self.temperature < math.inf:
            faults.append(f"temperature must be at least 0, got {self.temperature}")
        if not 0 <= self.top_p <= 1:
            faults.append(f"top_p must lie between 0 and 1, got {self.top_p}")
        if self.top_k < 0:
            faults.append(f"top_k must be at least 0, got {self.top_k}")
        if faults:
            raise OptionsError("sampling", faults)


@torch.no_grad()
def generate_tokens(
    model: MultimodalModel,
    prompts: Batch,
    *,
    max_new_tokens: int,
    stop: frozenset[int],
    sampling: Sampling | None = None,
) -> Iterator[list[int | None]]:
    """Yield the next token id of each row, step by step; None for rows that have stopped.

    Rows are prefilled together, without padding. A row stops at an id in ``stop`` (which is yielded).

    :param prompts: whole prompts; labels are ignored.
    """
    rows = len(prompts.lengths)
    draw = make_sampler(sampling or Sampling(), prompts.input_ids.device)
    cache = KeyValueCache(rows, max(prompts.lengths) + max_new_tokens, prompts.input_ids.device)
    ends = torch.tensor(prompts.lengths, device=prompts.input_ids.device).cumsum(0) - 1
    hidden = model.hidden(prompts, cache).index_select(0, ends)
    running = [True] * rows
    for step in range(max_new_tokens):
        tokens = draw(model.logits(hidden))
        ids: list[int] = tokens.tolist()
        yield [token if alive else None for token, alive in zip(ids, running)]
        running = [alive and token not in stop for alive, token in zip(running, ids)]
        if not any(running) or step + 1 == max_new_tokens:
            return
        hidden = model.decode(tokens, prompts.conditions, cache)


def make_sampler(sampling: Sampling, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return a function that draws ``[B]`` ids from logits ``[B, vocabulary]``."""
    if sampling.temperature == 0:
        return lambda logits: logits.argmax(dim=-1)
    generator = torch.Generator(device).manual_seed(sampling.seed)

    def draw(logits: Tensor) -> Tensor:
        logits = logits / sampling.temperature
        if sampling.top_k:
            lowest_kept = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < lowest_kept, -torch.inf)
        if sampling.top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True)
            probabilities = ordered.softmax(dim=-1)
            # the mass before a token decides, so the most likely token always stays
            beyond = probabilities.cumsum(dim=-1) - probabilities > sampling.top_p
            logits = logits.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)

    return draw

"""Batched generation with a key/value cache sized by need."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lavintk.data.batch import Batch
from lavintk.models.attention import KeyValueCache
from lavintk.models.multimodal import MultimodalModel
from lavintk.sampling import Sampling

__all__ = ["Sampling", "generate_tokens", "make_sampler"]


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

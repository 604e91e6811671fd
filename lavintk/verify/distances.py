"""How far two models are apart: distributions at each position, greedy answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lavintk.data.labels import IGNORED
from lavintk.verify.report import Continuations, Likeness


def divergences(trained: Tensor, exported: Tensor) -> Tensor:
    """Return KL(trained || exported) of each position, in nats, from logits ``[N, vocabulary]``; float64 ``[N]``."""
    goal, found = trained.double().log_softmax(-1), exported.double().log_softmax(-1)
    return (goal.exp() * (goal - found)).sum(-1).clamp(min=0)


def continuations(trained: Sequence[Sequence[int]], exported: Sequence[Sequence[int]]) -> Continuations:
    """Return how far answers, given as ids, run together."""
    prefixes = []
    for ours, theirs in zip(trained, exported, strict=True):
        parted = (place for place, (one, other) in enumerate(zip(ours, theirs)) if one != other)
        prefixes.append(next(parted, min(len(ours), len(theirs))))
    count = len(prefixes)
    identical = sum(list(ours) == list(theirs) for ours, theirs in zip(trained, exported))
    return Continuations(count, identical / count, sum(prefixes) / count, sum(map(len, trained)) / count)


def positions(ours: Tensor, theirs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return figures of each position; the losses are NaN where nothing is labelled."""
    ignored, chosen = labels == IGNORED, labels.clamp(min=0).unsqueeze(1)
    losses = {
        name: -logits.double().log_softmax(-1).gather(1, chosen).squeeze(1)
        for name, logits in (("ours", ours), ("theirs", theirs))
    }
    return {
        "divergence": divergences(ours, theirs),
        "same": ours.argmax(-1) == theirs.argmax(-1),
        "difference": (ours - theirs).abs().amax(-1),
        "labelled": ~ignored,
        **losses,
    }


class Figures:
    """Gathers figures of positions, row by row."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Tensor]] = []

    def add(self, figures: dict[str, Tensor]) -> None:
        """Take up a row's, as :func:`positions` returns them."""
        self.rows.append(figures)

    def likeness(self) -> Likeness:
        """Return means and maxima; torch's are NaN where a figure is, Python's are not."""
        all_of = {name: torch.cat([row[name] for row in self.rows]) for name in self.rows[0]}
        labelled = all_of["labelled"]
        count = int(labelled.sum())
        ours, theirs = (float(all_of[name][labelled].mean().exp()) if count else None for name in ("ours", "theirs"))
        return Likeness(
            rows=len(self.rows),
            positions=len(labelled),
            divergence=float(all_of["divergence"].mean()),
            largest_divergence=float(all_of["divergence"].max()),
            agreement=float(all_of["same"].double().mean()),
            difference=float(all_of["difference"].max()),
            labelled=count,
            trained_perplexity=ours,
            exported_perplexity=theirs,
        )

"""Packs: micro-batches of constant shape, and which rows go into which.

A CUDA graph replays the very operations that it recorded, so shapes must not change from one micro-batch to the next.
Rows are put together until a pack is nearly full; the rest is filled up with tokens that train nothing and that no row
sees. Rows never see each other either: attention ends at their boundaries, positions begin anew.

Packing does not change what an optimizer step learns: its rows stay the same and every labelled token weighs the
same; there are only fewer micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from itertools import accumulate
from math import ceil
from typing import Any

import torch
from torch import Tensor

from lavintk.data.batch import IGNORED, TEXT, Batch

GRAIN = 64
"""Token counts are multiples of it, which matrix kernels like."""
FILL_STEPS = 4
"""A pack that is not full has one of so many sizes."""
FEWEST_SEGMENTS = 16
"""Empty segments cost nothing, and each shape that need not be recorded saves a second or two."""


@dataclass(frozen=True)
class PackShape:
    """All that a graph is recorded for.

    :param tokens: N. :param segments: S, rows, side tokens and the filling. :param trained: K, labelled tokens.
    :param images: I. :param visual_tokens: V, per image.
    :param image_shape: ``(3, height, width)`` of pixels, ``(V, vision width)`` of features.
    """

    tokens: int
    segments: int
    trained: int
    images: int
    visual_tokens: int
    image_shape: tuple[int, ...]

    @classmethod
    def of(cls, batch: Batch, capacity: int, visual_tokens: int, side: int) -> PackShape:
        """Return the smallest of few shapes that holds ``batch``; of its tokens a quarter, half or all are trained.

        :param capacity: tokens of a full pack; a longer batch gets a shape of its own.
        :param side: M, the adapter's side tokens.
        """
        step = max(GRAIN, round_up(ceil(capacity / FILL_STEPS), GRAIN))
        tokens = round_up(batch.tokens, step)
        trained = next(size for size in (ceil(tokens / 4), ceil(tokens / 2), tokens) if size >= batch.labelled)
        images = batch.images
        return cls(
            tokens=tokens,
            segments=_power_of_two(max(FEWEST_SEGMENTS, len(batch.lengths) + side + 1)),
            trained=trained,
            images=0 if images is None else few_sizes(images.shape[0]),
            visual_tokens=visual_tokens,
            image_shape=() if images is None else tuple(images.shape[1:]),
        )


@dataclass(frozen=True)
class Pack:
    """A micro-batch of a :class:`PackShape`. On the host or on a device.

    :param input_ids: ``[N + 1]`` int64; the last token takes the features of images that are not there.
    :param positions: ``[N]`` int64. :param conditions: ``[N]`` int64, of each token's row.
    :param boundaries: ``[S + 1]`` int32: rows, the filling, empty segments, then M side tokens.
    :param trained: ``[K]`` int64, places of the labelled tokens.
    :param labels: ``[K]`` int64; :data:`IGNORED` fills up.
    :param visual_slots: ``[I * V]`` int64. :param pixel_values: ``[I, 3, height, width]`` or None.
    :param features: ``[I, V, vision width]`` in place of pixels, or None.
    """

    input_ids: Tensor
    positions: Tensor
    conditions: Tensor
    boundaries: Tensor
    trained: Tensor
    labels: Tensor
    visual_slots: Tensor
    pixel_values: Tensor | None
    features: Tensor | None = None

    @property
    def tokens(self) -> int:
        """N."""
        return self.positions.numel()

    @classmethod
    def of(cls, batch: Batch, shape: PackShape, side: int) -> Pack:
        """Return ``batch``, on the host, filled up to ``shape``."""
        filling = shape.tokens - batch.tokens
        trained = (batch.labels != IGNORED).nonzero().flatten()
        lengths = torch.tensor(batch.lengths)
        ends = [*accumulate(batch.lengths), shape.tokens]
        ends += [shape.tokens] * (shape.segments - side - len(ends))
        ends += [shape.tokens + place + 1 for place in range(side)]
        spare_labels = shape.trained - trained.numel()
        slots = batch.visual_slots
        spare_slots = shape.images * shape.visual_tokens - slots.numel()
        return cls(
            input_ids=_filled(batch.input_ids, filling + 1, 0),
            positions=torch.cat([batch.positions, torch.arange(filling)]),
            conditions=_filled(batch.conditions.repeat_interleave(lengths), filling, TEXT),
            boundaries=torch.tensor([0, *ends], dtype=torch.int32),
            trained=_filled(trained, spare_labels, 0),
            labels=_filled(batch.labels[trained], spare_labels, IGNORED),
            visual_slots=_filled(slots, spare_slots, shape.tokens),
            pixel_values=_filled_images(batch.pixel_values, shape),
            features=_filled_images(batch.features, shape),
        )

    def tensors(self) -> list[Tensor]:
        """Return the tensors in a fixed order."""
        return [value for value in vars(self).values() if value is not None]

    def map(self, change: Callable[[Tensor], Tensor]) -> Pack:
        """Return the pack with ``change`` of each tensor."""
        changed: dict[str, Any] = {n: None if value is None else change(value) for n, value in vars(self).items()}
        return Pack(**changed)


def pack_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return which rows share a pack: indices into ``lengths``, pack by pack.

    Best fit, longest first: each row goes where it leaves the least room. A row longer than ``capacity`` stands alone.
    The packs are in the order of their first rows, and rows within a pack in their own order.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        fitting = [(space, pack) for pack, space in enumerate(room) if space >= lengths[index]]
        if fitting:
            _, pack = min(fitting)
        else:
            pack = len(packs)
            packs.append([])
            room.append(capacity)
        packs[pack].append(index)
        room[pack] -= lengths[index]
    return sorted(sorted(pack) for pack in packs)


def repack(rows: Sequence[Sized], batches: Sequence[Sequence[int]], capacity: int) -> list[list[int]]:
    """Return the rows of ``batches``, indices into ``rows``, in packs of ``capacity`` tokens."""
    indices = [index for batch in batches for index in batch]
    packs = pack_rows([len(rows[index]) for index in indices], capacity)
    return [[indices[place] for place in pack] for pack in packs]


def round_up(number: int, step: int) -> int:
    """Return the smallest multiple of ``step`` that is no less than ``number``."""
    return ceil(number / step) * step


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def few_sizes(number: int) -> int:
    """Return 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: at most half as much again as needed."""
    power = _power_of_two(number)
    return power * 3 // 4 if power >= 4 and power * 3 // 4 >= number else power


def _filled(values: Tensor, count: int, value: int) -> Tensor:
    return torch.cat([values, values.new_full((count,), value)])


def _filled_images(images: Tensor | None, shape: PackShape) -> Tensor | None:
    if images is None:
        return None
    return torch.cat([images, images.new_zeros(shape.images - images.shape[0], *shape.image_shape)])

"""Rows to batches: which rows go together, in which order, and their pixels, ready before they are needed."""

from __future__ import annotations

import os
import random
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from lavintk.data.batch import Batch
from lavintk.data.records import ImageSource
from lavintk.data.tokenize import TokenizedRecord
from lavintk.errors import DataError

Rows = Sequence[TokenizedRecord]
ReadImage = Callable[[ImageSource, str], Tensor]
"""Takes an image and the record's id; an :class:`~lavintk.data.images.ImageProcessor` is one."""
FindFeatures = Callable[[ImageSource], Tensor | None]
"""Takes an image and returns the tower's features ``[V, width]`` if they are known (:mod:`lavintk.data.features`)."""
Asked = TypeVar("Asked")
Made = TypeVar("Made")

WINDOW = 64
"""Batches whose rows are sorted by length together: large for little waste, small to stay random."""


def make_batches(
    rows: Rows,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    max_tokens: int | None = None,
) -> list[list[int]]:
    """Return the plan of an epoch: indices of rows, batch by batch. Each row occurs once.

    The plan follows from the arguments alone. Shuffled rows are sorted by length within windows, so that the
    rows of a batch are about equally long, and the batches are shuffled again. Unshuffled rows stay in order.

    :param batch_size: most rows of a batch.
    :param max_tokens: most tokens of a batch; a longer row gets a batch of its own.
    """
    order = list(range(len(rows)))
    if not shuffle:
        return _chunks(rows, order, batch_size, max_tokens)
    random_order = random.Random(f"{seed}/{epoch}")
    random_order.shuffle(order)
    window = batch_size * WINDOW
    sorted_order: list[int] = []
    for start in range(0, len(order), window):
        sorted_order += sorted(order[start : start + window], key=lambda index: len(rows[index]))
    batches = _chunks(rows, sorted_order, batch_size, max_tokens)
    random_order.shuffle(batches)
    return batches


def _chunks(rows: Rows, order: Sequence[int], batch_size: int, max_tokens: int | None) -> list[list[int]]:
    batches: list[list[int]] = []
    tokens = 0
    for index in order:
        length = len(rows[index])
        full = not batches or len(batches[-1]) == batch_size
        if full or (max_tokens is not None and tokens + length > max_tokens):
            batches.append([])
            tokens = 0
        batches[-1].append(index)
        tokens += length
    return batches


def collate(rows: Rows, read_image: ReadImage | None, find_features: FindFeatures | None = None) -> Batch:
    """Return the rows laid end to end, with the features of their images if those of all are known, else the pixels.

    :param read_image: None for models without a vision tower.
    :param find_features: None where no features are kept.
    :raises DataError: an image cannot be read, or there is none to read it with.
    """
    ids: list[int] = []
    labels: list[int] = []
    slots: list[int] = []
    for row in rows:
        slots += (len(ids) + slot for slot in row.visual_slots)
        ids += row.input_ids
        labels += row.labels
    features = None if find_features is None else _features(rows, find_features)
    return Batch(
        input_ids=torch.tensor(ids, dtype=torch.int64),
        labels=torch.tensor(labels, dtype=torch.int64),
        positions=torch.cat([torch.arange(len(row)) for row in rows]),
        lengths=tuple(len(row) for row in rows),
        conditions=torch.tensor([row.condition for row in rows], dtype=torch.int64),
        pixel_values=_pixels(rows, read_image) if features is None else None,
        visual_slots=torch.tensor(slots, dtype=torch.int64),
        record_ids=tuple(row.id for row in rows),
        features=features,
    )


def _pixels(rows: Rows, read_image: ReadImage | None) -> Tensor | None:
    sources = [(source, row.id) for row in rows for source in row.images]
    if not sources:
        return None
    if read_image is None:
        raise DataError("the data", [f"record {id!r} has an image, but the model takes none" for _, id in sources])
    return torch.stack([read_image(source, id) for source, id in sources])


def _features(rows: Rows, find_features: FindFeatures) -> Tensor | None:
    found = []
    for source in (source for row in rows for source in row.images):
        if (features := find_features(source)) is None:
            return None
        found.append(features)
    return torch.stack(found) if found else None


class ImageCache:
    """Keeps the pixels of the images used last, by path, up to a number of bytes. Safe in threads."""

    def __init__(self, read_image: ReadImage, max_bytes: int = 256 * 2**20) -> None:
        self._read_image, self._max_bytes, self._bytes = read_image, max_bytes, 0
        self._pixels: OrderedDict[Path, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, source: ImageSource, record_id: str = "") -> Tensor:
        """Return the pixels, which must not be changed in place."""
        if isinstance(source, bytes):
            return self._read_image(source, record_id)
        with self._lock:
            if source in self._pixels:
                self._pixels.move_to_end(source)
                return self._pixels[source]
        pixels = self._read_image(source, record_id)  # two threads may read one image: wasteful, not wrong
        with self._lock:
            if source not in self._pixels:
                self._pixels[source] = pixels
                self._bytes += pixels.nbytes
            while self._bytes > self._max_bytes:
                self._bytes -= self._pixels.popitem(last=False)[1].nbytes
        return pixels


class BatchLoader:
    """Iterates over the batches of a plan, reading images ahead in threads.

    :param plan: from :func:`make_batches`.
    :param start: batches to skip, to resume in the middle of an epoch.
    :param find_features: as for :func:`collate`.
    :param prefetch: batches prepared ahead.
    :param workers: threads; 0 prepares each batch when it is asked for, None stands for :func:`default_workers`.

    The order never depends on the threads. A fault in a batch is raised when the batch is due.
    """

    def __init__(
        self,
        rows: Rows,
        plan: Sequence[Sequence[int]],
        read_image: ReadImage | None = None,
        *,
        find_features: FindFeatures | None = None,
        start: int = 0,
        prefetch: int = 4,
        workers: int | None = None,
    ) -> None:
        self.rows, self.plan, self.read_image, self.find_features = rows, plan[start:], read_image, find_features
        self.workers = default_workers() if workers is None else workers
        self.prefetch = max(1, prefetch)

    def __len__(self) -> int:
        """Return the number of batches, skipped ones left out."""
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches in order."""
        yield from read_ahead(self._batch, self.plan, prefetch=self.prefetch, workers=self.workers)

    def _batch(self, indices: Sequence[int]) -> Batch:
        return collate([self.rows[index] for index in indices], self.read_image, self.find_features)


def default_workers() -> int:
    """Return how many threads prepare batches: one for each core that the process may use, from 2 to 8.

    Threads and no processes: Pillow decodes and resizes without holding Python's lock, and pixels need not be copied.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, max(2, cores))


def read_ahead(
    make: Callable[[Asked], Made], items: Iterable[Asked], *, prefetch: int = 4, workers: int = 2
) -> Iterator[Made]:
    """Yield ``make`` of each item, in order, some of them made ahead in threads. What ``make`` raises, when it is due.

    :param prefetch: results made ahead, at least one for each thread.
    :param workers: threads; 0 makes each result when it is asked for.
    """
    if not workers:
        yield from map(make, items)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="lavintk-batches")
    pending: deque[Future[Made]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(make, item))
            if len(pending) > max(prefetch, workers):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:  # also when the caller stops early
        pool.shutdown(wait=False, cancel_futures=True)

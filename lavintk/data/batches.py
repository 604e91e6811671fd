"""Rows to batches: which rows go together, in which order, and their pixels, ready before they are needed."""

from __future__ import annotations

import random
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from lavintk.data.batch import Batch
from lavintk.data.records import ImageSource
from lavintk.data.tokenize import TokenizedRecord
from lavintk.errors import DataError

Rows = Sequence[TokenizedRecord]
ReadImage = Callable[[ImageSource, str], Tensor]
"""Takes an image and the record's id; an :class:`~lavintk.data.images.ImageProcessor` is one."""

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


def collate(rows: Rows, read_image: ReadImage | None) -> Batch:
    """Return the rows laid end to end, with the pixels of those that have images.

    :param read_image: None for models without a vision tower.
    :raises DataError: an image cannot be read, or there is none to read it with.
    """
    ids: list[int] = []
    labels: list[int] = []
    slots: list[int] = []
    for row in rows:
        slots += (len(ids) + slot for slot in row.visual_slots)
        ids += row.input_ids
        labels += row.labels
    return Batch(
        input_ids=torch.tensor(ids, dtype=torch.int64),
        labels=torch.tensor(labels, dtype=torch.int64),
        positions=torch.cat([torch.arange(len(row)) for row in rows]),
        lengths=tuple(len(row) for row in rows),
        conditions=torch.tensor([row.condition for row in rows], dtype=torch.int64),
        pixel_values=_pixels(rows, read_image),
        visual_slots=torch.tensor(slots, dtype=torch.int64),
        record_ids=tuple(row.id for row in rows),
    )


def _pixels(rows: Rows, read_image: ReadImage | None) -> Tensor | None:
    sources = [(source, row.id) for row in rows for source in row.images]
    if not sources:
        return None
    if read_image is None:
        raise DataError("the data", [f"record {id!r} has an image, but the model takes none" for _, id in sources])
    return torch.stack([read_image(source, id) for source, id in sources])


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
    :param prefetch: batches prepared ahead.
    :param workers: threads; 0 prepares each batch when it is asked for.

    The order never depends on the threads. A fault in a batch is raised when the batch is due.
    """

    def __init__(
        self,
        rows: Rows,
        plan: Sequence[Sequence[int]],
        read_image: ReadImage | None = None,
        *,
        start: int = 0,
        prefetch: int = 4,
        workers: int = 2,
    ) -> None:
        self.rows, self.plan, self.read_image = rows, plan[start:], read_image
        self.prefetch, self.workers = max(1, prefetch), workers

    def __len__(self) -> int:
        """Return the number of batches, skipped ones left out."""
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches in order."""
        if not self.workers:
            yield from map(self._batch, self.plan)
            return
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="lavintk-batches")
        pending: deque[Future[Batch]] = deque()
        ahead = iter(self.plan)
        try:
            for indices in ahead:
                pending.append(pool.submit(self._batch, indices))
                if len(pending) > self.prefetch:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:  # also when the caller stops early
            pool.shutdown(wait=False, cancel_futures=True)

    def _batch(self, indices: Sequence[int]) -> Batch:
        return collate([self.rows[index] for index in indices], self.read_image)

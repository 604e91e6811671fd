"""Which rows each optimizer step of a run takes, and in which micro-batches.

All of it follows from the rows and the recipe, so a resumed run goes on where it stopped without anything stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice

from lavintk.data.batches import make_batches
from lavintk.data.pack import repack
from lavintk.data.tokenize import TokenizedRecord
from lavintk.recipe import TrainSection

Window = list[list[int]]
"""The micro-batches of an optimizer step, as indices of rows."""
SAMPLED = 100
"""Steps that are looked at where it would take long to look at all."""


class StepOrder:
    """The optimizer steps of a run.

    :param capacity: tokens of a packed micro-batch; None leaves micro-batches as they are.
    """

    def __init__(self, rows: Sequence[TokenizedRecord], settings: TrainSection, capacity: int | None = None) -> None:
        self.rows, self.settings, self.capacity = rows, settings, capacity
        self._latest: tuple[int, list[Window]] | None = None

    @property
    def per_epoch(self) -> int:
        """Steps that see every row once."""
        micro_batches = -(-len(self.rows) // self.settings.batch_size)
        return -(-micro_batches // self.settings.accumulate)

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.settings.max_steps or max(1, round(self.settings.epochs * self.per_epoch))

    def epoch(self, number: int) -> list[Window]:
        """Return the steps of an epoch; the latest one asked for is kept, since a start asks several times."""
        if self._latest is None or self._latest[0] != number:
            self._latest = number, list(self._make_epoch(number))
        return self._latest[1]

    def _make_epoch(self, number: int) -> Iterator[Window]:
        settings = self.settings
        batches = make_batches(self.rows, batch_size=settings.batch_size, seed=settings.seed, epoch=number)
        for first in range(0, len(batches), settings.accumulate):
            window = batches[first : first + settings.accumulate]
            yield window if self.capacity is None else repack(self.rows, window, self.capacity)

    def most_images(self) -> int:
        """Return the most images of a micro-batch in the first steps."""
        batches = chain.from_iterable(islice(self._make_epoch(0), SAMPLED))
        return max(sum(len(self.rows[index].images) for index in batch) for batch in batches)

    def epochs_from(self, step: int) -> Iterator[list[Window]]:
        """Yield the steps behind the first ``step`` ones, epoch by epoch."""
        while step < self.total:
            number, offset = divmod(step, self.per_epoch)
            windows = self.epoch(number)[offset:][: self.total - step]
            yield windows
            step += len(windows)

    def rows_from(self, step: int) -> list[int]:
        """Return the rows that the steps behind the first ``step`` ones will see, in their own order."""
        ahead: set[int] = set()
        for windows in self.epochs_from(step):
            ahead.update(index for window in windows for batch in window for index in batch)
            if len(ahead) == len(self.rows):
                break
        return sorted(ahead)

    def describe(self) -> str:
        """Return how full the packs are, or an empty text without packs."""
        if self.capacity is None:
            return ""
        packs, tokens = sum(map(len, self.epoch(0))), sum(map(len, self.rows))
        return f"{packs} packs of {self.capacity} tokens, {tokens / packs / self.capacity:.0%} full"

"""Batches: each row once, little waste, the same plan again, and pixels in order whatever the threads do."""

import gc
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from lavintk.data.batch import IGNORED, IMAGE, TEXT
from lavintk.data.batches import BatchLoader, ImageCache, collate, make_batches
from lavintk.data.tokenize import TokenizedRecord
from lavintk.errors import DataError


def row(length: int, name: str = "r", images: int = 0, first: int = 100) -> TokenizedRecord:
    """Return a row of ``length`` tokens; each image has two slots, from token 1 on."""
    ids = list(range(first, first + length))
    labels = [IGNORED] * (length - 2) + [ids[-1], IGNORED]
    sources = tuple(Path(f"{name}-{place}.png") for place in range(images))
    return TokenizedRecord(name, ids, labels, list(range(1, 1 + 2 * images)), sources, IMAGE if images else TEXT, 1)


def pixels_of(source: Any, record_id: str = "") -> torch.Tensor:
    """Return pixels that say which image they are."""
    return torch.full((3, 2, 2), float(sum(str(source).encode())))


LENGTHS = torch.randint(5, 200, (500,), generator=torch.Generator().manual_seed(0)).tolist()
ROWS = [row(length, f"r{place}") for place, length in enumerate(LENGTHS)]


def test_each_row_is_in_exactly_one_batch() -> None:
    for shuffle in (True, False):
        for batch_size in (1, 7, 64):
            plan = make_batches(ROWS, batch_size=batch_size, seed=1, epoch=0, shuffle=shuffle)
            assert sorted(index for batch in plan for index in batch) == list(range(500))
            assert max(map(len, plan)) <= batch_size
            assert len(plan) == -(-500 // batch_size)


def test_the_plan_follows_from_seed_and_epoch_alone() -> None:
    def plan(seed: int, epoch: int) -> list[list[int]]:
        return make_batches(ROWS, batch_size=8, seed=seed, epoch=epoch)

    assert plan(1, 0) == plan(1, 0)
    assert plan(1, 0) != plan(1, 1)
    assert plan(1, 0) != plan(2, 0)
    assert plan(1, 12) != plan(11, 2)


def test_without_shuffling_the_order_is_kept() -> None:
    plan = make_batches(ROWS, batch_size=8, seed=1, epoch=0, shuffle=False)
    assert [index for batch in plan for index in batch] == list(range(500))


def test_rows_of_a_batch_are_of_similar_length_and_batches_are_not_sorted() -> None:
    plan = make_batches(ROWS, batch_size=8, seed=1, epoch=0)
    longest = [max(LENGTHS[index] for index in batch) for batch in plan]
    padded = sum(length * len(batch) for length, batch in zip(longest, plan, strict=True))
    assert padded < 1.1 * sum(LENGTHS)
    steps = [abs(after - before) for before, after in pairwise(longest)]
    assert sum(steps) / len(steps) > 40, "sorted batches would step by 3"


def test_a_limit_of_tokens_closes_batches_early() -> None:
    rows = [*ROWS, row(900, "giant")]
    plan = make_batches(rows, batch_size=64, seed=1, epoch=0, max_tokens=600)
    assert sorted(index for batch in plan for index in batch) == list(range(501))
    tokens = [sum(len(rows[index]) for index in batch) for batch in plan]
    assert sorted(tokens)[-2] <= 600
    assert [500] in plan, "a row above the limit gets a batch of its own"


def test_a_batch_holds_the_rows_end_to_end() -> None:
    rows = [row(5, "a", images=1), row(3, "b", first=200), row(6, "c", images=2, first=300)]
    batch = collate(rows, pixels_of)
    assert batch.lengths == (5, 3, 6)
    assert batch.record_ids == ("a", "b", "c")
    assert batch.conditions.tolist() == [IMAGE, TEXT, IMAGE]
    assert batch.tokens == 14
    assert batch.labelled == 3
    start = 0
    for one in rows:
        part = slice(start, start + len(one))
        assert batch.input_ids[part].tolist() == one.input_ids
        assert batch.labels[part].tolist() == one.labels
        assert batch.positions[part].tolist() == list(range(len(one)))
        start += len(one)
    assert batch.input_ids.dtype == batch.labels.dtype == batch.positions.dtype == torch.int64
    # row a starts at 0, row c at 8; slots are the tokens behind the first
    assert batch.visual_slots.tolist() == [1, 2, 9, 10, 11, 12]
    assert batch.pixel_values is not None
    expected = [pixels_of(source) for source in (*rows[0].images, *rows[2].images)]
    assert torch.equal(batch.pixel_values, torch.stack(expected))


def test_a_batch_of_text_has_no_pixels() -> None:
    batch = collate([row(4), row(5)], None)
    assert batch.pixel_values is None
    assert batch.visual_slots.tolist() == []
    assert batch.visual_slots.dtype == torch.int64


def test_images_without_a_tower_are_an_error_naming_the_records() -> None:
    with pytest.raises(DataError, match="record 'a' has an image, but the model takes none"):
        collate([row(4, "a", images=1), row(5)], None)


IMAGE_ROWS = [row(5, f"r{place}", images=1) for place in range(30)]
IMAGE_PLAN = [[index, (index * 7) % 30] for index in range(30)]


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_batches_come_in_the_plans_order_whatever_the_threads_do(workers: int) -> None:
    def slow(source: Any, record_id: str) -> torch.Tensor:
        time.sleep(0.003 if "5" in str(source) else 0)
        return pixels_of(source)

    batches = list(BatchLoader(IMAGE_ROWS, IMAGE_PLAN, slow, workers=workers, prefetch=3))
    assert [batch.record_ids for batch in batches] == [tuple(f"r{index}" for index in pair) for pair in IMAGE_PLAN]
    for batch in batches:
        expected = torch.stack([pixels_of(f"{name}-0.png") for name in batch.record_ids])
        assert batch.pixel_values is not None
        assert torch.equal(batch.pixel_values, expected)


def test_a_loader_starts_where_it_is_told() -> None:
    loader = BatchLoader(IMAGE_ROWS, IMAGE_PLAN, pixels_of, start=28)
    assert len(loader) == 2
    assert [batch.record_ids[0] for batch in loader] == ["r28", "r29"]
    assert [batch.record_ids[0] for batch in loader] == ["r28", "r29"], "it can be iterated again"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fault_reaches_the_caller_when_its_batch_is_due(workers: int) -> None:
    def broken(source: Any, record_id: str) -> torch.Tensor:
        if record_id == "r3":
            raise DataError("the images", ["record 'r3': broken"])
        return pixels_of(source)

    seen: list[str] = []
    loader = BatchLoader(IMAGE_ROWS, [[index] for index in range(30)], broken, workers=workers)
    batches = iter(loader)
    for _ in range(3):
        seen.append(next(batches).record_ids[0])
    with pytest.raises(DataError, match="record 'r3': broken"):
        next(batches)
    assert seen == ["r0", "r1", "r2"]


def test_images_are_read_ahead_but_not_further_than_asked() -> None:
    read: list[str] = []

    def note(source: Any, record_id: str) -> torch.Tensor:
        read.append(record_id)
        return pixels_of(source)

    batches = iter(BatchLoader(IMAGE_ROWS, [[index] for index in range(30)], note, prefetch=4, workers=2))
    next(batches)
    deadline = time.monotonic() + 5
    while len(read) < 5 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert sorted(read) == ["r0", "r1", "r2", "r3", "r4"]


def test_stopping_early_leaves_no_threads() -> None:
    batches = iter(BatchLoader(IMAGE_ROWS, IMAGE_PLAN, pixels_of, workers=3))
    next(batches)
    del batches
    gc.collect()
    deadline = time.monotonic() + 5
    while any("lavintk-batches" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_the_cache_reads_an_image_once_and_forgets_the_one_used_least_recently() -> None:
    read: list[str] = []

    def note(source: Any, record_id: str) -> torch.Tensor:
        read.append(str(source))
        return pixels_of(source)

    cache = ImageCache(note, max_bytes=2 * 48)  # one image takes 3 * 2 * 2 * 4 bytes
    a, b, c = Path("a"), Path("b"), Path("c")
    for source in (a, b, a, c, a, b):
        assert torch.equal(cache(source), pixels_of(source))
    assert read == ["a", "b", "c", "b"]
    assert torch.equal(cache(b"a"), pixels_of(b"a"))
    cache(b"a")
    assert len(read) == 6, "bytes are not kept"


def test_an_image_larger_than_the_cache_is_passed_through() -> None:
    cache = ImageCache(pixels_of, max_bytes=10)
    assert torch.equal(cache(Path("a")), pixels_of("a"))
    assert torch.equal(cache(Path("a")), pixels_of("a"))

"""Packs of constant shape: what goes into them, and that the model computes on them what it computes on rows."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lavintk.data.pack import Pack, PackShape, pack_rows, repack
from lavintk.models.language import LANGUAGE_TYPES
from lavintk.testing.tiny import VOCABULARY, write_language_model
from tests.test_language import load, rows_batch


def rows_of(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize("seed", range(20))
def test_each_row_is_packed_once_and_no_pack_overflows(seed: int) -> None:
    draw = random.Random(seed)
    capacity = draw.randint(64, 256)
    lengths = [draw.randint(1, 300) for _ in range(draw.randint(1, 40))]
    packs = pack_rows(lengths, capacity)
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
    for pack in packs:
        assert len(pack) == 1 or sum(lengths[row] for row in pack) <= capacity
    loads = [sum(lengths[row] for row in pack) for pack in packs]
    least, second = (sorted(loads) + [capacity] * 2)[:2]
    assert least + second > capacity or len(packs) == 1  # else the two would have shared one


def test_packs_of_a_window_hold_the_rows_of_its_batches() -> None:
    rows = [range(length) for length in (30, 50, 20, 64, 10)]
    assert repack(rows, [[3, 0], [2, 4]], 64) == [[3], [0, 2, 4]]


def test_a_shape_has_room_for_the_batch_and_there_are_few_of_them() -> None:
    shapes = set()
    for length in range(1, 513):
        batch = rows_batch([torch.zeros(length, dtype=torch.int64)])
        shape = PackShape.of(batch, 512, visual_tokens=6, side=2)
        pack = Pack.of(batch, shape, side=2)
        assert pack.input_ids.numel() == shape.tokens + 1 > length
        assert pack.trained.numel() == pack.labels.numel() == shape.trained >= batch.labelled
        assert pack.boundaries.numel() == shape.segments + 1
        shapes.add(shape)
    assert len(shapes) <= 16


def test_segments_of_a_pack_are_the_rows_the_filling_and_the_side_tokens() -> None:
    batch = rows_batch(rows_of(9, 4, 13))
    shape = PackShape.of(batch, 64, visual_tokens=0, side=2)
    pack = Pack.of(batch, shape, side=2)
    boundaries = pack.boundaries.tolist()
    assert boundaries[:5] == [0, 9, 13, 26, 64]
    assert boundaries[-3:] == [64, 65, 66]
    assert boundaries == sorted(boundaries)
    assert pack.positions.tolist()[:15] == [*range(9), *range(4), 0, 1]


@pytest.fixture(scope="module", params=LANGUAGE_TYPES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language_model(tmp_path_factory.mktemp(request.param), request.param)


def test_a_pack_has_the_loss_of_its_rows(folder: Path) -> None:
    model = load(folder)
    batch = rows_batch(rows_of(9, 4, 13, 30))
    pack = Pack.of(batch, PackShape.of(batch, 64, visual_tokens=0, side=0), side=0)
    with torch.no_grad():
        torch.testing.assert_close(model.pack_loss_sum(pack), model.loss_sum(batch), atol=1e-4, rtol=1e-6)

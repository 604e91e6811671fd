"""What free memory is used for: sizes of packs, the card that decides, and the batches that a recipe leaves open."""

from __future__ import annotations

from typing import Any

import pytest

from lavintk.cards import CARDS, UNKNOWN, card_called
from lavintk.data.steps import StepOrder
from lavintk.data.tokenize import TokenizedRecord
from lavintk.plan import MicroBatch
from lavintk.plugins import installed_plugins
from lavintk.recipe import TrainSection
from lavintk.spare_memory import pack_sizes as sizes
from lavintk.spare_memory import packs_freely, possible_batches, recomputes_freely, settle_on_host
from tests.test_plan import LORA, outline, text_recipe


@pytest.mark.parametrize(
    ("smallest", "step", "expected"),
    [
        (256, 5200, [256, 512, 1024, 2048]),
        (512, 512, [512]),  # a step is a single row
        (64, 300, [64, 128, 256, 320]),  # no more than a step has
        (4096, 40_000, [4096]),  # large as it is
        (1536, 40_000, [1536, 2048]),
    ],
)
def test_a_pack_holds_the_smallest_or_twice_as_many_tokens_up_to_a_step(
    smallest: int, step: int, expected: list[int]
) -> None:
    assert sizes(smallest, step) == expected


@pytest.mark.parametrize(("free", "expected"), [(0, 256), (4e9, 256), (20e9, 512), (100e9, 1024)])
def test_packs_grow_on_a_cpu_by_a_quarter_of_the_free_memory(free: float, expected: int) -> None:
    """A token through the layers of 7B takes 2 bytes x (8 widths + 3 of the MLP) x 32, counted twice: 8.4 MB."""
    model, recipe = outline("7b", LORA), text_recipe(LORA, "paged-8bit", 1, 256)
    batches = [MicroBatch(tokens, 0) for tokens in sizes(256, 40_000, largest=1024)]
    assert settle_on_host(model, recipe, installed_plugins(), int(free), batches).tokens == expected


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "rtx4070"),
        ("NVIDIA GeForce RTX 3070 Laptop GPU", "rtx3070"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("Tesla T4", "t4"),
    ],
)
def test_cards_are_known_by_what_drivers_call_them(device: str, name: str) -> None:
    assert card_called(device) is CARDS[name]


def test_a_card_that_is_not_listed_is_taken_for_a_usual_one() -> None:
    assert card_called("NVIDIA RTX A6000") is UNKNOWN


@pytest.mark.parametrize(
    ("train", "packs", "recomputes"),
    [
        ({}, True, True),
        ({"pack": True}, True, True),
        ({"pack": False}, False, True),
        ({"pack_tokens": 512}, False, True),
        ({"checkpointing": True}, True, False),
        ({"checkpointing": 8}, True, False),
        ({"engine": "eager"}, False, True),
        ({"stream": "cpu"}, False, False),
        ({"engine": "layerwise"}, False, False),
    ],
)
def test_only_what_a_recipe_leaves_open_is_settled(train: dict[str, Any], packs: bool, recomputes: bool) -> None:
    recipe = text_recipe(LORA, "adamw", 1, 512, **train)
    assert (packs_freely(recipe), recomputes_freely(recipe)) == (packs, recomputes)


def test_a_recipe_alone_tells_of_rows_that_are_as_long_as_they_may_be() -> None:
    recipe = text_recipe(LORA, "adamw", 2, 256, accumulate=4)
    assert possible_batches(recipe) == [MicroBatch(512, 2), MicroBatch(1024, 4), MicroBatch(2048, 8)]
    assert possible_batches(text_recipe(LORA, "adamw", 2, 256, pack=False)) == [MicroBatch(512, 2)]


def test_the_most_images_of_a_micro_batch_are_counted_in_packs() -> None:
    def row(length: int, images: int) -> TokenizedRecord:
        ids = [0] * length
        return TokenizedRecord(str(length), ids, ids, [], (b"",) * images, 0, length)

    rows = [row(30, 1), row(30, 2), row(30, 0), row(30, 4)]
    settings = TrainSection(batch_size=1, accumulate=4)
    assert StepOrder(rows, settings).most_images() == 4
    assert StepOrder(rows, settings, 128).most_images() == 7

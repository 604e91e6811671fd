import math

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from lavintk.schedule import decay_groups, learning_rate

PEAK, TOTAL = 3e-4, 40


def rates(schedule: str, warmup: float, lowest: float = 0.0, total: int = TOTAL) -> list[float]:
    return [
        learning_rate(step, total, peak=PEAK, lowest=lowest, schedule=schedule, warmup=warmup) for step in range(total)
    ]


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)],
)
@pytest.mark.parametrize("warmup", [0, 1, 7, 39])
def test_the_rate_is_that_of_transformers_but_for_a_warm_up_that_begins_one_step_later(
    schedule: str, reference: type, warmup: int
) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = reference(optimizer, warmup, TOTAL)
    expected = []
    for step in range(TOTAL):
        # theirs wastes the first step at 0 and rises by peak / warmup; ours is one step ahead of it
        expected.append(scheduler.get_last_lr()[0] + (PEAK / warmup if step < warmup else 0))
        optimizer.step()
        scheduler.step()
    assert rates(schedule, warmup) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warm_up_rises_evenly_and_reaches_the_peak_at_its_end(schedule: str) -> None:
    made = rates(schedule, warmup=4)
    assert made[:4] == pytest.approx([PEAK / 4, PEAK / 2, 3 * PEAK / 4, PEAK])
    assert max(made) == pytest.approx(PEAK)


def test_the_cosine_ends_near_the_lowest_rate_and_passes_the_middle_halfway() -> None:
    made = rates("cosine", warmup=0, lowest=1e-5)
    assert made[TOTAL // 2] == pytest.approx((PEAK + 1e-5) / 2)
    share = (1 + math.cos(math.pi * 39 / 40)) / 2
    assert made[-1] == pytest.approx(1e-5 + (PEAK - 1e-5) * share)
    assert made == sorted(made, reverse=True)


def test_a_constant_schedule_stays_at_the_peak_after_warm_up() -> None:
    assert rates("constant", warmup=2)[2:] == [PEAK] * 38


def test_a_warm_up_below_one_is_a_share_of_all_steps() -> None:
    assert rates("cosine", warmup=0.1) == rates("cosine", warmup=4)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0.03), (1, 5), (3, 10), (2, 1)])
def test_short_runs_have_positive_rates_up_to_the_peak(schedule: str, total: int, warmup: float) -> None:
    made = rates(schedule, warmup, total=total)
    assert all(0 < rate <= PEAK for rate in made)


def test_steps_past_the_end_keep_the_lowest_rate() -> None:
    late = learning_rate(99, TOTAL, peak=PEAK, lowest=1e-6, schedule="cosine", warmup=0)
    assert late == pytest.approx(1e-6)


def test_only_matrices_are_decayed_and_no_parameter_is_lost() -> None:
    parameters = dict(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False)).named_parameters())
    matrices, vectors = decay_groups(parameters, 0.1)
    assert matrices["weight_decay"] == 0.1
    assert vectors["weight_decay"] == 0.0
    assert all(parameter.ndim == 2 for parameter in matrices["params"])
    assert {id(p) for group in (matrices, vectors) for p in group["params"]} == {id(p) for p in parameters.values()}


def test_a_group_without_parameters_is_left_out() -> None:
    assert len(decay_groups({"a": nn.Parameter(torch.zeros(2, 2))}, 0.1)) == 1

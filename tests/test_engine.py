"""Which engine computes a run's steps, and what happens where a graph cannot be recorded. Graphs: tests/test_gpu.py."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import lavintk
import lavintk.training
from lavintk.data.batch import Batch
from lavintk.engine import EagerEngine, NotRecordableError, choose_engine
from lavintk.engine.graph import why_not_recordable
from lavintk.errors import RecipeError, TrainingError
from lavintk.models.multimodal import Manner, MultimodalModel
from lavintk.testing.runs import multimodal, recipe
from tests.test_mma import MixtureOptions, make_model

SCALER = torch.amp.GradScaler("cpu", enabled=False)


def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MultimodalModel, "device", property(lambda self: torch.device("cuda")))


def test_on_a_cpu_steps_are_eager_and_a_graph_is_refused_with_the_reason() -> None:
    model = make_model(MixtureOptions())
    for setting in ("auto", "eager"):
        engine, _ = choose_engine(setting, model, SCALER, 64)
        assert isinstance(engine, EagerEngine)
    with pytest.raises(RecipeError, match="'graph' was asked for, but CUDA graphs need a CUDA device"):
        choose_engine("graph", model, SCALER, 64)


def test_layers_that_make_the_host_wait_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(MixtureOptions())
    on_cuda(monkeypatch)
    assert why_not_recordable(model) == ""
    first = next(iter(model.linears().values()))
    monkeypatch.setattr(type(first), "graph_safe", False)
    assert type(first).__name__ in why_not_recordable(model)


@pytest.mark.parametrize("manner", [Manner(side_per_row=True), Manner(blank_first=True)])
def test_lavins_own_way_of_routing_is_not_recorded(monkeypatch: pytest.MonkeyPatch, manner: Manner) -> None:
    model = make_model(MixtureOptions())
    on_cuda(monkeypatch)
    model.manner = manner
    assert "as LaVIN's own code does" in why_not_recordable(model)


class Unrecordable:
    """An engine that finds out within the first step, when it has added some gradients, that it cannot."""

    name = "graph"

    def __init__(self, model: MultimodalModel) -> None:
        self.model = model

    def backward(self, window: Sequence[Batch], labelled: int, step: int) -> list[Tensor]:
        for parameter in self.model.trainable().values():
            assert parameter.grad is not None
            parameter.grad += 1.0
        raise NotRecordableError("an operation cannot be recorded: it waits")


@pytest.mark.parametrize("setting", ["auto", "graph"])
def test_a_model_that_cannot_be_recorded_goes_on_eagerly_unless_a_graph_was_asked_for(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    def choose(_: str, model: MultimodalModel, *rest: Any) -> tuple[Unrecordable, str]:
        return Unrecordable(model), ""

    expected = lavintk.train(recipe(tiny_folder, max_steps=2), tmp_path / "eager")
    monkeypatch.setattr(lavintk.training, "choose_engine", choose)
    said = io.StringIO()
    content = recipe(tiny_folder, max_steps=2, engine=setting, pack=False)
    if setting == "graph":
        with pytest.raises(TrainingError, match="it waits"):
            lavintk.train(content, tmp_path / "run")
        return
    run = lavintk.train(content, tmp_path / "run", console=Console(file=said, width=200))
    assert "note: engine eager: an operation cannot be recorded: it waits" in said.getvalue()
    for name, parameter in run.assembly.model.trainable().items():
        assert torch.equal(parameter, expected.assembly.model.trainable()[name])


def test_the_start_says_how_full_packs_are(tiny_folder: Path, tmp_path: Path) -> None:
    said = io.StringIO()
    content = multimodal(tiny_folder, max_steps=1, batch_size=1, accumulate=4, pack=True, pack_tokens=128)
    lavintk.train(content, tmp_path / "run", console=Console(file=said, width=200))
    assert "engine eager, " in said.getvalue()
    assert "packs of 128 tokens, " in said.getvalue()
    assert "% full" in said.getvalue()

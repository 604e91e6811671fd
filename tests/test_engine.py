"""Which engine computes a run's steps, and what happens where a graph cannot be recorded. Graphs: tests/test_gpu.py."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import lavintk
import lavintk.training
from lavintk.data.batch import Batch
from lavintk.engine import (
    EagerEngine,
    EagerLayers,
    GraphEngine,
    LayerwiseEngine,
    NotRecordableError,
    RecordedLayers,
    choose_engine,
    graph,
    layer_graphs,
)
from lavintk.engine.graph import why_not_recordable
from lavintk.errors import RecipeError, TrainingError
from lavintk.models.multimodal import Manner, MultimodalModel
from lavintk.testing.runs import multimodal, recipe
from tests.test_mma import MixtureOptions, make_batch, make_model, randomize

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


class Unrecordable(GraphEngine):
    """An engine that finds out within the first step, when it has added some gradients, that it cannot."""

    def __init__(self, model: MultimodalModel) -> None:
        self.model, self.scaler = model, SCALER

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
    monkeypatch.setattr(lavintk.training, "check_machine", lambda recipe: None)  # as if there were a CUDA device
    said = io.StringIO()
    content = recipe(tiny_folder, max_steps=2, engine=setting, pack=False)
    if setting == "graph":
        with pytest.raises(TrainingError, match="it waits"):
            lavintk.train(content, tmp_path / "run")
        return
    run = lavintk.train(content, tmp_path / "run", console=Console(file=said, width=200))
    assert "note: engine eager without CUDA graphs: an operation cannot be recorded: it waits" in said.getvalue()
    for name, parameter in run.assembly.model.trainable().items():
        assert torch.equal(parameter, expected.assembly.model.trainable()[name])


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, "engine eager (CUDA graphs need a CUDA device)"),
        ({"engine": "eager"}, "engine eager"),
        ({"stream": "cpu"}, "engine layerwise (layers are not recorded: CUDA graphs need a CUDA device)"),
    ],
)
def test_the_start_on_a_cpu_says_why_nothing_is_recorded_unless_that_was_asked_for(
    tiny_folder: Path, tmp_path: Path, settings: dict[str, Any], line: str
) -> None:
    said = io.StringIO()
    content = recipe(tiny_folder, max_steps=1, **settings)
    lavintk.train(content, tmp_path / "run", console=Console(file=said, width=20))
    assert line in [found.partition(", ")[0] for found in said.getvalue().splitlines()]


def test_the_start_says_how_full_packs_are(tiny_folder: Path, tmp_path: Path) -> None:
    said = io.StringIO()
    content = multimodal(tiny_folder, max_steps=1, batch_size=1, accumulate=4, pack=True, pack_tokens=128)
    lavintk.train(content, tmp_path / "run", console=Console(file=said, width=200))
    assert "engine eager (CUDA graphs need a CUDA device), " in said.getvalue()
    assert "packs of 128 tokens, " in said.getvalue()
    assert "% full" in said.getvalue()


# ---- more shapes than are recorded -------------------------------------------------------------------------------


class Repeats:
    """Stands in for what records CUDA graphs: a replay does the work again; results stay in the same place."""

    def __init__(self, device: torch.device) -> None:
        self.recorded = 0

    def warm_up(self, work: Callable[[], Any]) -> Any:
        return work()

    def record(self, work: Callable[[], Any], prepare: object = None) -> tuple[Callable[[], None], Any]:
        self.recorded += 1
        result, keeps_graph = work(), torch.is_grad_enabled()

        def replay() -> None:
            with torch.set_grad_enabled(keeps_graph):
                values = tensors_in(work())
            with torch.no_grad():
                for place, value in zip(tensors_in(result), values, strict=True):
                    place.copy_(value)

        return replay, result


def tensors_in(result: Any) -> list[Tensor]:
    """Return the tensors of what is recorded: nothing, a tensor, or states and their passage."""
    if result is None:
        return []
    if isinstance(result, Tensor):
        return [result]
    states, passage = result
    return [states, *layer_graphs._tensors(passage)]


def text_batch() -> Batch:
    """A row of 70 tokens, which is more than fills a pack."""
    ids, none = torch.arange(70) % 50, torch.empty(0, dtype=torch.int64)
    return Batch(ids, ids.roll(-1), torch.arange(70), (70,), torch.tensor([0]), None, none, ("alone",))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraphEngine, "_warm_up", lambda *_: (0, False))
    for module in (graph, layer_graphs):
        monkeypatch.setattr(module, "Recorder", Repeats)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)


def gradients(model: MultimodalModel, engine: Any) -> dict[str, Tensor]:
    """Return the gradients of two steps over micro-batches of two shapes."""
    window = [make_batch(model, 0), text_batch(), make_batch(model, 1)]
    model.zero_grad(set_to_none=True)
    for step in range(2):
        engine.backward(window, sum(batch.labelled for batch in window), step)
    return {name: p.grad.clone() for name, p in model.trainable().items() if p.grad is not None}


@pytest.mark.usefixtures("recorder")
@pytest.mark.parametrize("most", [0, 1, 2])
@pytest.mark.parametrize("name", ["graph", "layerwise"])
def test_shapes_beyond_the_limit_are_told_of_once_and_give_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch, name: str, most: int
) -> None:
    monkeypatch.setattr(graph, "MOST_GRAPHS", most)
    monkeypatch.setattr(layer_graphs, "MOST_SHAPES", most)
    model, said = make_model(MixtureOptions(dropout=0.0)), []
    randomize(model)
    engine = (
        GraphEngine(model, SCALER, 64, 0, said.append)
        if name == "graph"
        else LayerwiseEngine(model, SCALER, RecordedLayers(model, 64, said.append), 0)
    )
    plain = EagerEngine(model, SCALER) if name == "graph" else LayerwiseEngine(model, SCALER, EagerLayers(model), 0)
    expected, found = gradients(model, plain), gradients(model, engine)
    assert expected
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, atol=1e-6, rtol=1e-4, msg=key)
    assert said == [
        f"note: {most} shapes of micro-batches are recorded as CUDA graphs, and no more will be; "
        "micro-batches of other shapes run without, more slowly"
    ] * (most < 2)


@pytest.mark.parametrize("setting", ["graph", "layerwise"])
@pytest.mark.usefixtures("recorder")
def test_what_an_engine_notes_reaches_the_terminal_in_one_line(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    def choose(_: str, model: MultimodalModel, *rest: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            on_cuda(patch)
            return choose_engine(setting, model, *rest)

    monkeypatch.setattr(lavintk.training, "choose_engine", choose)
    monkeypatch.setattr(graph, "MOST_GRAPHS", 0)
    monkeypatch.setattr(layer_graphs, "MOST_SHAPES", 0)
    said = io.StringIO()
    run = lavintk.train(recipe(tiny_folder, max_steps=2), tmp_path / "run", console=Console(file=said, width=20))
    assert run.manifest["steps"] == 2
    notes = [line for line in said.getvalue().splitlines() if line.startswith("note: 0 shapes of micro-batches ")]
    assert len(notes) == 1
    assert notes[0].endswith(" run without, more slowly")

"""Memory for less: streamed layers, layer-major accumulation and offloaded inputs give the gradients they stand for."""

from __future__ import annotations

import errno
import itertools
import os
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lavintk
from lavintk.data.batch import Batch
from lavintk.data.pack import Pack, PackShape
from lavintk.engine import (
    EagerEngine,
    EagerLayers,
    Engine,
    LayerwiseEngine,
    NotRecordableError,
    RecordedLayers,
    choose_engine,
    layer_graphs,
    without_graphs,
)
from lavintk.errors import ModelError
from lavintk.models.build import build
from lavintk.models.host_memory import HostTensors
from lavintk.models.multimodal import MultimodalModel, recompute
from lavintk.models.stream import SLOTS, Block, LayerStream, which_stay
from lavintk.plugins import installed_plugins
from lavintk.recipe import make_recipe
from lavintk.testing.runs import multimodal, recipe
from lavintk.testing.tiny import write_language_model
from tests.test_engine import Repeats
from tests.test_mma import make_batch, randomize

SCALER = torch.amp.GradScaler("cpu", enabled=False)
CAPACITY = 64
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LORA, LAVIN = {"name": "lora", "r": 4}, {"name": "mma", "visual": "router", "dropout": 0.0}
Found = tuple[dict[str, Tensor], list[Tensor]]
"""Gradients by parameter, and losses."""


@pytest.fixture(scope="module")
def deep_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a tiny run needs, with a model of more layers than a device has slots for."""
    folder = tmp_path_factory.mktemp("deep")
    for path in tiny_folder.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "llm").unlink()
    write_language_model(folder / "llm", num_hidden_layers=SLOTS + 3)
    return folder


def model_of(
    folder: Path,
    quant: str,
    adapter: dict[str, Any],
    outside: Any = "none",
    device: torch.device = CPU,
    *,
    resident: int = 0,
) -> MultimodalModel:
    """The model of a recipe, with random values in what is trained.

    :param resident: layers that stay on the device though others are outside.
    """
    content = multimodal(folder) | {"adapter": adapter, "quant": quant}
    dtype = torch.float32 if device == CPU else torch.bfloat16
    model = build(
        make_recipe(content), installed_plugins(), device, dtype, outside=outside, resident_layers=resident
    ).model
    randomize(model)
    return model.train()


def batches_for(model: MultimodalModel) -> list[Batch]:
    return [make_batch(model, seed) for seed in range(3)]


def layerwise(model: MultimodalModel, seed: int = 0) -> LayerwiseEngine:
    return LayerwiseEngine(model, SCALER, EagerLayers(model), seed)


class Packed(EagerLayers):
    """Runs the packs that :class:`RecordedLayers` makes, without recording."""

    def place(self, batch: Batch) -> Batch | Pack:
        return RecordedLayers.place(RecordedLayers(self._model, CAPACITY), batch)


def gradients(model: MultimodalModel, engine: Engine) -> Found:
    for parameter in model.trainable().values():
        if parameter.grad is not None:
            parameter.grad.zero_()  # in its place, which a graph has recorded
    batches = batches_for(model)
    losses = engine.backward(batches, sum(batch.labelled for batch in batches), 3)
    found = {name: p.grad.clone() for name, p in model.trainable().items() if p.grad is not None}
    assert found.keys() == model.trainable().keys()
    return found, losses


def assert_same(one: Found, other: Found) -> None:
    for name, gradient in one[0].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(other[0][name], gradient, rtol=0, atol=5e-6 * max(1.0, scale), msg=name)
    assert sum(float(gradient.abs().max()) > 0 for gradient in one[0].values()) > len(one[0]) / 2
    torch.testing.assert_close(torch.stack(other[1]), torch.stack(one[1]))


@pytest.mark.parametrize("adapter", [LORA, LAVIN], ids=["lora", "lavin"])
@pytest.mark.parametrize("quant", ["nf4", "int4", "int8", "none"])
def test_streamed_layers_give_the_gradients_of_resident_ones(
    deep_folder: Path, quant: str, adapter: dict[str, Any]
) -> None:
    resident = model_of(deep_folder, quant, adapter)
    streamed = model_of(deep_folder, quant, adapter, outside="cpu")
    assert streamed.stream is not None
    assert len(streamed.stream.blocks) == len(streamed.layers) > SLOTS
    expected = gradients(resident, EagerEngine(resident, SCALER))
    assert_same(expected, gradients(streamed, EagerEngine(streamed, SCALER)))
    assert_same(expected, gradients(streamed, layerwise(streamed)))


@pytest.mark.parametrize("adapter", [LORA, LAVIN], ids=["lora", "lavin"])
@pytest.mark.parametrize("resident", range(1, SLOTS + 3))
def test_where_some_layers_stay_on_the_device_gradients_are_those_of_all_resident_ones(
    deep_folder: Path, resident: int, adapter: dict[str, Any]
) -> None:
    whole = model_of(deep_folder, "nf4", adapter)
    streamed = model_of(deep_folder, "nf4", adapter, outside="cpu", resident=resident)
    assert streamed.stream is not None
    assert len(streamed.stream.blocks) == len(streamed.layers) - resident
    expected = gradients(whole, EagerEngine(whole, SCALER))
    for engine in (EagerEngine(streamed, SCALER), layerwise(streamed), layerwise(streamed)):
        assert_same(expected, gradients(streamed, engine))


def test_layers_that_stay_are_spread_evenly() -> None:
    for count in (1, 5, 32, 80):
        assert not any(which_stay(count, 0))
        for resident in range(1, count):
            places = [index for index, stays in enumerate(which_stay(count, resident)) if not stays]
            assert len(places) == count - resident
            gaps = {after - before for before, after in itertools.pairwise(places)}
            assert not gaps or max(gaps) - min(gaps) <= 1, (count, resident)


@pytest.mark.parametrize("resident", [5, 9])
def test_a_base_of_which_nothing_would_be_streamed_is_an_error_that_says_what_to_ask_for(
    deep_folder: Path, resident: int
) -> None:
    with pytest.raises(ModelError, match=rf"resident_layers={resident} .* has 5 decoder layers. Ask for 4 at most"):
        model_of(deep_folder, "nf4", LORA, outside="cpu", resident=resident)


def test_layers_that_are_streamed_from_disk_give_the_gradients_of_resident_ones(
    deep_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAVINTK_CACHE", str(tmp_path))
    resident = model_of(deep_folder, "nf4", LORA)
    expected = gradients(resident, EagerEngine(resident, SCALER))
    content = multimodal(deep_folder) | {"adapter": LORA, "quant": "nf4"}
    content["model"] |= {"cache": True}
    # from a file without a name, then from the base that the first one kept
    for kept, resident in ((False, 0), (True, 0), (True, 2)):
        built = build(
            make_recipe(content), installed_plugins(), CPU, torch.float32, outside="disk", resident_layers=resident
        )
        randomize(built.model)
        assert_same(expected, gradients(built.model.train(), layerwise(built.model)))
        assert list(tmp_path.rglob("layer-*.safetensors")) or not kept


@pytest.mark.parametrize("adapter", [{**LORA, "dropout": 0.5}, LAVIN], ids=["lora", "lavin"])
@pytest.mark.parametrize(("outside", "resident"), [("none", 0), ("cpu", 0), ("cpu", 2)])
def test_layers_that_are_replayed_one_by_one_give_the_gradients_of_layers_that_are_run(
    deep_folder: Path, adapter: dict[str, Any], outside: str, resident: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_graphs, "Recorder", Repeats)
    model = model_of(deep_folder, "nf4", adapter, outside, resident=resident)
    expected = gradients(model, LayerwiseEngine(model, SCALER, Packed(model), 5))
    layers = RecordedLayers(model, CAPACITY)
    engine = LayerwiseEngine(model, SCALER, layers, 5)
    for _ in range(2):
        assert_same(expected, gradients(model, engine))
    shapes = {PackShape.of(batch, CAPACITY, model.visual_tokens, layers._side) for batch in batches_for(model)}
    assert all(shape.images for shape in shapes)
    # forward and backward: each layer, and what lies in front of them
    of_layers, of_entries = len(model.layers) * len({(s.tokens, s.segments) for s in shapes}), len(shapes)
    assert layers._recorder.recorded == 2 * (of_layers + of_entries)  # type: ignore[attr-defined]


def test_more_shapes_than_are_recorded_are_run_without_recording(
    deep_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_graphs, "Recorder", Repeats)
    monkeypatch.setattr(layer_graphs, "MOST_SHAPES", 0)
    model = model_of(deep_folder, "nf4", LORA)
    layers = RecordedLayers(model, CAPACITY)
    expected = gradients(model, LayerwiseEngine(model, SCALER, Packed(model), 0))
    assert_same(expected, gradients(model, LayerwiseEngine(model, SCALER, layers, 0)))
    assert layers._recorder.recorded == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("resident", [0, 1, 2, 3])
def test_a_streamed_layer_is_in_the_same_place_whenever_it_is_used(deep_folder: Path, resident: int) -> None:
    model = model_of(deep_folder, "nf4", LORA, outside="cpu", resident=resident)
    count, places = len(model.layers), dict[int, set[tuple[int, ...]]]()
    for index in [*range(count), *reversed(range(count)), *range(count)]:
        model.bring_layer(index)
        found = tuple(buffer.data_ptr() for buffer in model.layers[index].buffers())
        places.setdefault(index, set()).add(found)
    assert {len(found) for found in places.values()} == {1}


@pytest.mark.parametrize("adapter", [LORA, LAVIN], ids=["lora", "lavin"])
@pytest.mark.parametrize("offload", [False, True], ids=["on the device", "on the host"])
def test_layer_major_accumulation_is_ordinary_accumulation(
    deep_folder: Path, adapter: dict[str, Any], offload: bool
) -> None:
    model = model_of(deep_folder, "nf4", adapter)
    expected = gradients(model, EagerEngine(model, SCALER))
    model.offload = HostTensors(CPU) if offload else None
    assert_same(expected, gradients(model, layerwise(model)))


@pytest.mark.parametrize("adapter", [LORA, LAVIN], ids=["lora", "lavin"])
def test_micro_batches_without_images_may_come_first(deep_folder: Path, adapter: dict[str, Any]) -> None:
    """Nothing in front of the layers is trained by them with LoRA, but the connector is by those that follow."""
    model = model_of(deep_folder, "none", adapter)
    mixed = make_batch(model)
    text = replace(
        mixed, input_ids=mixed.input_ids[7:], labels=mixed.labels[7:], positions=mixed.positions[7:], lengths=(5,),
        conditions=mixed.conditions[1:], pixel_values=None, visual_slots=mixed.visual_slots[:0],
    )  # fmt: skip
    found = []
    for engine in (EagerEngine(model, SCALER), layerwise(model)):
        model.zero_grad()
        engine.backward([text, mixed, text], 22, 0)
        found.append({name: p.grad for name, p in model.trainable().items()})
    for name, gradient in found[0].items():
        assert gradient is not None
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_what_a_recording_left_behind_is_not_taken_for_what_is_put_there_next() -> None:
    inputs = HostTensors(CPU)
    inputs.put(0, torch.ones(3))
    inputs.fetch(0)
    inputs.put(0, torch.full((3,), 7.0))
    assert inputs.get(0).tolist() == [7.0] * 3
    inputs.put(1, torch.ones(3))
    inputs.forget()
    inputs.fetch(1)
    with pytest.raises(KeyError):
        inputs.get(1)


def test_a_disk_without_room_for_the_layers_is_an_error_that_says_so(
    deep_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAVINTK_CACHE", str(tmp_path))

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ModelError, match=r"has no room for 0\.\d\d GB more(.|\n)*LAVINTK_CACHE"):
        model_of(deep_folder, "nf4", LORA, outside="disk")


class OrdinaryFromSeeds:
    """Ordinary accumulation whose dropout draws from a seed for each micro-batch and layer."""

    name = "eager"
    records = False

    def __init__(self, model: MultimodalModel, seed: int) -> None:
        self.model, self.seed = model, seed

    def backward(self, window: Any, labelled: int, step: int) -> list[Tensor]:
        losses = []
        self.model.checkpointing = len(self.model.layers)
        for number, batch in enumerate(window):
            first, layers = Random(f"{self.seed}/{step}/{number}").getrandbits(62), iter(range(1, 99))

            def seeded(
                run: Callable[..., Tensor], module: nn.Module, hidden: Tensor, first: int = first, layers: Any = layers
            ) -> Tensor:
                if module in self.model.layers:  # not a block of the tower, which draws nothing
                    torch.manual_seed(first + next(layers))
                return recompute(run, module, hidden)

            self.model.recompute = seeded
            losses += EagerEngine(self.model, SCALER).backward([batch], labelled, step)
        return losses


def test_layer_major_accumulation_draws_the_same_dropout_again_in_the_backward_pass(deep_folder: Path) -> None:
    adapter = {"name": "lora", "r": 4, "dropout": 0.5}
    model = model_of(deep_folder, "nf4", adapter)
    found = gradients(model, layerwise(model, 7))
    assert_same(gradients(model, OrdinaryFromSeeds(model, 7)), found)
    other = gradients(model, layerwise(model, 8))
    assert not torch.equal(torch.stack(found[1]), torch.stack(other[1]))


def test_the_layerwise_engine_leaves_the_random_numbers_of_others_alone(deep_folder: Path) -> None:
    model = model_of(deep_folder, "none", {"name": "lora", "r": 4, "dropout": 0.5})
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    gradients(model, layerwise(model))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("layers", [True, 4, 1], ids=["all", "some", "one"])
def test_offloaded_inputs_give_the_gradients_of_kept_ones(deep_folder: Path, layers: bool | int) -> None:
    model = model_of(deep_folder, "nf4", LAVIN)
    model.checkpointing = layers
    expected = gradients(model, EagerEngine(model, SCALER))
    model.offload = HostTensors(CPU)
    for _ in range(2):  # the second pass takes the memory of the first
        found = gradients(model, EagerEngine(model, SCALER))
        for name, gradient in expected[0].items():
            assert torch.equal(gradient, found[0][name]), name
    recomputed = len(model.layers) if layers is True else layers
    longest = max(batch.tokens for batch in batches_for(model)) + 2  # a side token for text and one for pictures
    assert model.offload.nbytes == (recomputed - 1) * longest * model.hidden_size * 4


def test_a_tensor_that_waits_on_the_host_is_kept_by_nobody_on_the_device() -> None:
    inputs, weight = HostTensors(CPU), torch.randn(4, 4, requires_grad=True)
    kept, states = [], torch.randn(2, 4) @ weight
    for index in range(6):
        with inputs.saving(index, states):
            states = recompute(lambda _, hidden: torch.tanh(hidden @ weight), nn.Identity(), states)
        kept.append(weakref.ref(states))
    assert [reference() is not None for reference in kept] == [False] * 5 + [True]
    states.sum().backward()
    assert weight.grad is not None


def test_a_layer_crosses_the_bus_twice_per_step_however_many_micro_batches_there_are(
    deep_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(deep_folder, "nf4", LORA, outside="cpu")
    brought: list[int] = []
    bring = LayerStream._bring

    def counted(self: LayerStream, index: int) -> None:
        brought.append(index)
        bring(self, index)

    monkeypatch.setattr(LayerStream, "_bring", counted)
    last = len(model.layers) - 1
    forward, back = list(range(last + 1)), list(range(last - SLOTS, -1, -1))
    engine = layerwise(model)
    gradients(model, engine)
    assert brought == forward + back
    brought.clear()
    gradients(model, engine)
    assert brought == forward[SLOTS:] + back  # the first layers are still there


def test_each_layer_begins_to_come_when_the_streamed_one_before_it_is_used(
    deep_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(deep_folder, "nf4", LORA, outside="cpu", resident=2)
    assert which_stay(5, 2) == [False, False, True, False, True]
    events: list[tuple[str, int]] = []
    bring, use = LayerStream._bring, LayerStream.use

    def brings(self: LayerStream, number: int) -> None:
        events.append(("bring", [0, 1, 3][number]))
        bring(self, number)

    def uses(self: LayerStream, index: int) -> None:
        events.append(("use", index))
        use(self, index)

    gradients(model, layerwise(model))  # the first layers are there from then on
    monkeypatch.setattr(LayerStream, "_bring", brings)
    monkeypatch.setattr(LayerStream, "use", uses)
    gradients(model, layerwise(model))
    # a layer is used by one micro-batch after the other
    first = [event for place, event in enumerate(events) if event not in events[max(0, place - 3) : place]]
    assert first == [
        ("use", 0), ("use", 1), ("bring", 3), ("use", 2), ("use", 3), ("use", 4),
        ("use", 3), ("use", 2), ("use", 1), ("bring", 0), ("use", 0),
    ]  # fmt: skip


@pytest.mark.parametrize("adapter", [LORA, LAVIN], ids=["lora", "lavin"])
@pytest.mark.parametrize("resident", [0, 2])
def test_no_layer_computes_while_it_is_not_on_the_device(
    deep_folder: Path, adapter: dict[str, Any], resident: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(deep_folder, "nf4", adapter, outside="cpu", resident=resident)
    assert model.stream is not None
    slots = [range(slot.data_ptr(), slot.data_ptr() + slot.numel()) for slot in model.stream._slots]
    for layer in (layer for layer, stays in zip(model.layers, which_stay(5, resident)) if stays):
        slots += [range(buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes) for buffer in layer.buffers()]
    kind = type(model.linears()["language.model.layers.0.mlp.up_proj"])
    dequantize, where = kind.dequantize, []

    def noted(self: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        where.append(any(self.codes.data_ptr() in slot for slot in slots))
        return dequantize(self, dtype)

    monkeypatch.setattr(kind, "dequantize", noted)
    for engine in (EagerEngine(model, SCALER), layerwise(model)):
        where.clear()
        gradients(model, engine)
        assert where
        assert all(where)


@pytest.mark.parametrize("some", [0, 2])
def test_a_layer_that_is_not_in_use_is_what_it_was(deep_folder: Path, some: int) -> None:
    resident = model_of(deep_folder, "nf4", LORA)
    streamed = model_of(deep_folder, "nf4", LORA, outside="cpu", resident=some)
    gradients(streamed, layerwise(streamed))
    for name, layer in streamed.linears().items():
        for key, value in resident.linears()[name].state_dict().items():
            assert torch.equal(layer.state_dict()[key], value), (name, key)


def test_a_device_holds_two_layers_of_a_streamed_base(deep_folder: Path) -> None:
    model = model_of(deep_folder, "nf4", LORA, outside="cpu")
    assert model.stream is not None
    block = model.stream.blocks[0].memory.numel()
    assert sum(slot.numel() for slot in model.stream._slots) == SLOTS * block
    stored = sum(buffer.nbytes for layer in model.layers[0].modules() for buffer in layer.buffers(recurse=False))
    assert stored <= block <= stored + 256 * len(model.stream.blocks[0].pieces)
    assert isinstance(model.stream.blocks[0], Block)


def test_a_streamed_run_trains_evaluates_and_is_loaded_like_a_resident_one(deep_folder: Path, tmp_path: Path) -> None:
    made = []
    for name, train in (("resident", {}), ("streamed", {"stream": "cpu", "offload": True, "resident_layers": 2})):
        content = recipe(deep_folder, max_steps=3, accumulate=2, **train) | {"quant": "nf4", "adapter": LORA}
        content["data"]["validation"] = content["data"]["train"]
        made.append(lavintk.train(content, tmp_path / name))
    resident, streamed = made
    assert streamed.assembly.model.stream is not None
    assert streamed.manifest["steps"] == 3
    for name, parameter in resident.assembly.model.trainable().items():
        torch.testing.assert_close(streamed.assembly.model.trainable()[name], parameter, rtol=0, atol=2e-4)
    prompt = "what color is red?"
    assert lavintk.load(tmp_path / "streamed").generate(prompt) == streamed.generate(prompt)


def test_streaming_chooses_the_layerwise_engine_and_says_why_there_is_no_graph(deep_folder: Path) -> None:
    model = model_of(deep_folder, "nf4", LORA, outside="cpu")
    assert isinstance(choose_engine("auto", model, SCALER, 64)[0], LayerwiseEngine)
    assert isinstance(choose_engine("eager", model, SCALER, 64)[0], EagerEngine)


@pytest.mark.parametrize("adapter", [LORA, LAVIN], ids=["lora", "lavin"])
def test_what_is_trained_can_be_stored_in_bf16(deep_folder: Path, tmp_path: Path, adapter: dict[str, Any]) -> None:
    content = multimodal(deep_folder, max_steps=2, adapter_precision="bf16") | {"quant": "nf4", "adapter": adapter}
    run = lavintk.train(content, tmp_path / "run")
    parameters = run.assembly.model.trainable().values()
    assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}
    loaded = lavintk.load(tmp_path / "run").assembly.model
    for name, parameter in run.assembly.model.trainable().items():
        assert torch.equal(loaded.trainable()[name], parameter), name
    assert loaded.adapter is not None
    updates = list(loaded.adapter.affine_updates("language."))
    assert {matrix.dtype for update in updates for matrix in (update.down, update.up)} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.parametrize("quant", ["nf4", "int4"])
@pytest.mark.parametrize("adapter", [LORA, LAVIN], ids=["lora", "lavin"])
@pytest.mark.parametrize(("outside", "some"), [("cpu", 0), ("cpu", 2), ("disk", 0), ("disk", 3)])
def test_on_a_gpu_streamed_layers_give_the_gradients_of_resident_ones(
    deep_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quant: str,
    adapter: dict[str, Any],
    outside: str,
    some: int,
) -> None:
    monkeypatch.setenv("LAVINTK_CACHE", str(tmp_path))
    resident = model_of(deep_folder, quant, adapter, device=CUDA)
    resident.checkpointing = True
    streamed = model_of(deep_folder, quant, adapter, outside, CUDA, resident=some)
    assert streamed.stream is not None
    assert streamed.stream.blocks[0].memory.is_pinned() == (outside == "cpu")
    expected = gradients(resident, EagerEngine(resident, SCALER))
    for offload in (False, True):
        streamed.offload = HostTensors(CUDA) if offload else None
        for engine in (EagerEngine(streamed, SCALER), layerwise(streamed)):
            assert_near(expected, gradients(streamed, engine))
        # in bf16 this model's gradients depend more on the form of a micro-batch than on anything else
        packed = gradients(streamed, LayerwiseEngine(streamed, SCALER, Packed(streamed), 0))
        recorded = LayerwiseEngine(streamed, SCALER, RecordedLayers(streamed, CAPACITY), 0)
        for _ in range(2):
            assert_near(packed, gradients(streamed, recorded))


@pytest.mark.gpu
@pytest.mark.parametrize("outside", ["none", "cpu"])
def test_on_a_gpu_replayed_layers_draw_the_same_dropout_in_both_passes(deep_folder: Path, outside: str) -> None:
    model = model_of(deep_folder, "nf4", {**LORA, "dropout": 0.5}, outside, CUDA)
    expected = gradients(model, LayerwiseEngine(model, SCALER, Packed(model), 5))
    engine, reason = choose_engine("layerwise", model, SCALER, CAPACITY, seed=5)
    assert not reason
    assert isinstance(engine, LayerwiseEngine)
    assert isinstance(engine.layers, RecordedLayers)
    torch.manual_seed(8)
    following = torch.rand(3, device=CUDA)
    torch.manual_seed(8)
    for _ in range(3):
        assert_near(expected, gradients(model, engine))
    assert torch.equal(torch.rand(3, device=CUDA), following)


@pytest.mark.gpu
def test_on_a_gpu_a_replayed_tower_draws_the_same_dropout_in_both_passes(deep_folder: Path) -> None:
    content = multimodal(deep_folder) | {"adapter": {**LAVIN, "dropout": 0.5}}
    model = build(make_recipe(content), installed_plugins(), CUDA, torch.float32).model.train()
    randomize(model)
    model.checkpointing = True
    layers = RecordedLayers(model, CAPACITY)
    pack = layers.place(make_batch(model))
    assert isinstance(pack, Pack)
    states, _ = layers.enter(pack, 7)
    weights = torch.randn_like(states)
    layers.back_through_entry(pack, weights, 7)
    trained = [p for p in model.trainable().values() if p.grad is not None and p.grad.any()]
    steepest = float(sum(p.grad.double().square().sum() for p in trained if p.grad is not None)) ** 0.5
    assert steepest > 0
    assert not torch.equal(layers.enter(pack, 8)[0], states)
    assert torch.equal(layers.enter(pack, 7)[0], states)
    step, moved = 3e-3, []
    for sign in (1, -2):  # a step up, and from there the same step down from where it began
        for parameter in trained:
            assert parameter.grad is not None
            parameter.data += sign * step / steepest * parameter.grad
        moved.append(float((layers.enter(pack, 7)[0].double() * weights).sum()))
    assert (moved[0] - moved[1]) / (2 * step) == pytest.approx(steepest, rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_graph_with_offloaded_inputs_gives_the_gradients_of_one_without(deep_folder: Path, dropout: float) -> None:
    model = model_of(deep_folder, "nf4", {"name": "lora", "r": 4, "dropout": dropout}, device=CUDA)
    model.checkpointing = True
    found = []
    for offload in (False, True):
        model.offload = HostTensors(CUDA) if offload else None
        engine, reason = choose_engine("graph", model, torch.amp.GradScaler("cuda", enabled=False), 64, seed=3)
        assert not reason
        found += [gradients(model, engine) for _ in range(2)]
        assert model.offload is None or model.offload.nbytes > 0
    for other in found[1:]:
        assert_near(found[0], other)


class NotInARecording(torch.autograd.Function):
    """Waits for the device in its backward pass, which no graph can hold."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        assert gradient.sum().item() == gradient.sum().item()
        return gradient


@pytest.mark.gpu
@pytest.mark.parametrize("engine_name", ["graph", "layerwise"])
def test_after_a_recording_that_failed_half_way_gradients_are_those_of_a_model_that_was_never_recorded(
    deep_folder: Path, engine_name: str
) -> None:
    model = model_of(deep_folder, "nf4", LORA, device=CUDA)
    model.checkpointing, model.offload = True, HostTensors(CUDA)
    output = model.layers[2].get_submodule("self_attn.o_proj")
    output.register_forward_hook(lambda module, given, made: NotInARecording.apply(made))  # type: ignore[no-untyped-call]
    expected = gradients(model, EagerEngine(model, SCALER))
    engine, reason = choose_engine(engine_name, model, SCALER, CAPACITY)
    assert not reason
    with pytest.raises(NotRecordableError):
        gradients(model, engine)
    assert_near(expected, gradients(model, without_graphs(engine)))
    torch.manual_seed(7)
    drawn = torch.rand(4, device=CUDA)  # dropout, for example
    torch.manual_seed(7)
    assert torch.equal(torch.rand(4, device=CUDA), drawn)


def assert_near(one: Found, other: Found) -> None:
    """Within what the order of sums on a device makes out in bf16."""
    for name, gradient in one[0].items():
        error = float((other[0][name] - gradient).norm() / gradient.norm().clamp_min(1e-12))
        assert error < 0.02, (name, error)

"""The exported vision graph against the torch model, in ONNX Runtime."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from lavintk.contracts import AffineUpdate
from lavintk.errors import ModelError, NotAffineError
from lavintk.models.connector import connect
from lavintk.models.language import load_vision_model
from lavintk.models.multimodal import MultimodalModel
from lavintk.models.sources import open_source
from lavintk.plugins import installed_plugins
from lavintk.recipe import ModelSection
from lavintk.registry import Choice
from lavintk.testing.tiny import write_vision_tower
from lavintk_mma import MixtureOptions
from lavintk_onnx import vision
from lavintk_onnx.traced import trace
from lavintk_onnx.vision import VisionGrid, write_vision
from tests.test_mma import make_model

PIXELS = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
FOLDED = ("none", "lora:targets=vision.*.fc1+vision.*.q_proj+q_proj", "mma", "mma:placement=block")
TRACED = (
    ("mma:visual=router", "patches"),
    ("mma:visual=router_block", "taps"),
    ("mma:visual=router_block,compat=lavin", "taps"),
    ("mma:visual=normal,compat=lavin", "taps"),
)
BOUNDS: dict[VisionGrid, float] = {"fp16": 1e-3, "int8": 0.02}


def build(
    folder: Path, tower: str = "clip", connector: str = "taps", adapter: str = "none", blocks: int = 4
) -> MultimodalModel:
    """A model whose every adapter parameter is random, so that each of them shows in the output."""
    write_vision_tower(folder, tower)
    wanted = {"connector": connector, "tap_every": max(1, blocks // 2), "neck": 40, "patch_layer": -min(2, blocks)}
    section = ModelSection.model_validate({"language": "unused", "vision": "unused", **wanted})
    loaded: Any = load_vision_model(open_source(str(folder)), device=torch.device("cpu"), dtype=torch.float32)
    loaded.encoder.layers = loaded.encoder.layers[:blocks]
    language: Any = make_model(MixtureOptions(), width=48, vision=False).language
    model = MultimodalModel(language, *connect(loaded, section, 48))
    if adapter != "none":
        model.attach(installed_plugins().adapters.create(Choice.parse(adapter)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in [*loaded.parameters(), *model.trainable().values()]:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def write(model: MultimodalModel, folder: Path, grid: VisionGrid = "fp32") -> Path:
    path = folder / "vision_encoder.onnx"
    write_vision(model, path, height=28, width=28, grid=grid)
    return path


def run(path: Path, pixels: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (features,) = session.run(["image_features"], {"pixel_values": pixels.numpy()})
    return torch.from_numpy(features)


def expected(model: MultimodalModel, pixels: Tensor = PIXELS) -> Tensor:
    with torch.no_grad():
        return model.visual_embeddings(pixels).flatten(0, 1)


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}


@pytest.mark.parametrize("adapter", FOLDED)
@pytest.mark.parametrize("connector", ["taps", "patches"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_an_adapter_that_folds_leaves_a_graph_of_fused_operators_and_the_same_features(
    tower: str, connector: str, adapter: str, tmp_path: Path
) -> None:
    model = build(tmp_path / "vit", tower, connector, adapter)
    path = write(model, tmp_path)
    torch.testing.assert_close(run(path, PIXELS), expected(model), atol=1e-5, rtol=1e-5)
    assert "MultiHeadAttention" in operators(path)


@pytest.mark.parametrize(("adapter", "connector"), TRACED)
def test_an_adapter_that_does_not_fold_is_traced_and_gives_the_same_features(
    adapter: str, connector: str, tmp_path: Path
) -> None:
    model = build(tmp_path / "vit", "clip", connector, adapter, blocks=1)
    path = write(model, tmp_path)
    for pixels in (PIXELS, PIXELS[1:], PIXELS[None]):  # in five dimensions last
        torch.testing.assert_close(run(path, pixels), expected(model, pixels.flatten(0, -4)), atol=1e-5, rtol=1e-5)


def test_images_may_come_one_by_one_together_or_in_onnxruntime_genais_five_dimensions(tmp_path: Path) -> None:
    model = build(tmp_path / "vit", adapter="mma")
    path = write(model, tmp_path)
    together = run(path, PIXELS)
    assert together.shape == (2 * model.visual_tokens, model.hidden_size)
    torch.testing.assert_close(run(path, PIXELS[None]), together, atol=0, rtol=0)
    torch.testing.assert_close(torch.cat([run(path, p[None]) for p in PIXELS]), together, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("adapter", ["mma", "mma:visual=router"])
def test_a_coarser_grid_costs_little(adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative error of the features: below 0.1 % with 16 bits, below 2 % with 8."""
    monkeypatch.setattr(vision, "trace", functools.cache(trace))  # seconds each time
    model = build(tmp_path / "vit", connector="patches", adapter=adapter, blocks=1)
    wanted = expected(model)
    for grid, bound in BOUNDS.items():
        path = write(model, tmp_path, grid)
        error = float((run(path, PIXELS) - wanted).norm() / wanted.norm())
        assert 0 < error < bound
        assert ("MatMulNBits" in operators(path)) == (grid == "int8")


def test_int8_products_take_activations_in_int8_as_their_fast_kernel_needs(tmp_path: Path) -> None:
    path = write(build(tmp_path / "vit"), tmp_path, "int8")
    nodes = [n for n in onnx.load(path, load_external_data=False).graph.node if n.op_type == "MatMulNBits"]
    found = [{a.name: a.i for a in node.attribute} for node in nodes]
    assert len(found) == 4 * 4 + 2
    assert {(a["bits"], a["block_size"], a["accuracy_level"]) for a in found} == {(8, 32, 4)}


def test_the_input_has_no_declared_shape_and_the_output_has_the_language_models_width(tmp_path: Path) -> None:
    graph = onnx.load(write(build(tmp_path / "vit"), tmp_path), load_external_data=False).graph
    assert [i.name for i in graph.input] == ["pixel_values"]
    assert not graph.input[0].type.tensor_type.HasField("shape")
    sizes = [d.dim_param or d.dim_value for d in graph.output[0].type.tensor_type.shape.dim]
    assert sizes == ["num_image_tokens", 48]


@pytest.mark.parametrize("adapter", ["mma", "mma:visual=router"])
def test_writing_leaves_the_model_as_it_was(adapter: str, tmp_path: Path) -> None:
    model = build(tmp_path / "vit", adapter=adapter, blocks=1).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    write(model, tmp_path)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_an_activation_that_no_operator_knows_is_traced(tmp_path: Path) -> None:
    model = build(tmp_path / "vit", blocks=1)
    assert model.vision is not None
    model.vision.model.config.hidden_act = "mish"
    for block in model.vision.blocks:
        block.mlp.activation_fn = nn.Mish()  # type: ignore[union-attr]
    path = write(model, tmp_path)
    assert "MultiHeadAttention" not in operators(path)
    torch.testing.assert_close(run(path, PIXELS), expected(model), atol=1e-5, rtol=1e-5)


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    model = build(tmp_path / "vit", blocks=1)
    with pytest.raises(ModelError, match="for images of 28x28 pixels, but the run's images are scaled to 28x56"):
        write_vision(model, tmp_path / "x.onnx", height=56, width=28, grid="fp32")
    assert not (tmp_path / "x.onnx").exists()


def test_a_model_without_a_tower_has_no_vision_graph(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no vision tower"):
        write(make_model(MixtureOptions(), vision=False), tmp_path)


class Stranger(nn.Module):
    """Someone's adapter without affine form: it wraps the first block's feed-forward part."""

    conditions: tuple[str, ...] = ("all",)

    def __init__(self, around: type[Squared]) -> None:
        super().__init__()
        self.around = around

    def attach(self, model: MultimodalModel) -> None:
        name = "vision.model.encoder.layers.0.mlp"
        model.replace(name, self.around(model.get_submodule(name)))

    def side_tokens(self) -> None:
        return None

    def save(self, folder: Path, base: str) -> None:
        raise NotImplementedError

    def load(self, folder: Path) -> None:
        raise NotImplementedError

    def affine_updates(self, prefix: str = "") -> Iterator[AffineUpdate]:
        raise NotAffineError("it squares")
        yield


class Squared(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        squared: Tensor = self.inner(hidden) ** 2
        return squared


class Undecided(Squared):
    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) if float(hidden.sum()) > 0 else hidden


def test_a_strangers_adapter_is_traced(tmp_path: Path) -> None:
    model = build(tmp_path / "vit", blocks=1)
    model.attach(Stranger(Squared))
    path = write(model, tmp_path)
    torch.testing.assert_close(run(path, PIXELS), expected(model), atol=1e-5, rtol=1e-5)


def test_an_adapter_that_torch_cannot_trace_is_an_error_that_says_so(tmp_path: Path) -> None:
    model = build(tmp_path / "vit", blocks=1)
    model.attach(Stranger(Undecided))
    with pytest.raises(ModelError, match=r"Stranger has no affine form there and torch cannot trace it: \S"):
        write(model, tmp_path)


def test_a_traced_tower_has_to_be_in_fp32(tmp_path: Path) -> None:
    model = build(tmp_path / "vit", adapter="mma:visual=router", blocks=1)
    assert model.vision is not None
    model.vision.model.to(torch.bfloat16)
    with pytest.raises(ModelError, match=r"exported from fp32 weights, but it has \['torch.bfloat16'\]"):
        write(model, tmp_path)

"""LLaVA's way into the language model: all patches of a late layer through a projector."""

from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionModel, SiglipVisionModel

import lavintk
from lavintk.errors import ModelError
from lavintk.models.connector import PatchProjector, connect
from lavintk.models.language import load_vision_model
from lavintk.models.sources import open_source
from lavintk.models.vision import PatchTower
from lavintk.recipe import ModelSection
from lavintk.testing import runs
from lavintk.testing.tiny import write_vision_tower

PIXELS = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))


def tower(folder: Path, layer: int) -> PatchTower:
    model = load_vision_model(open_source(str(folder)), device=torch.device("cpu"), dtype=torch.float32)
    return PatchTower(model, layer).eval()


@pytest.mark.parametrize("layer", [-2, -1, -4, 1, 3])
@pytest.mark.parametrize(("kind", "loader"), [("clip", CLIPVisionModel), ("siglip", SiglipVisionModel)])
def test_patches_are_those_of_the_hidden_states(kind: str, loader: type, layer: int, tmp_path: Path) -> None:
    folder = write_vision_tower(tmp_path, kind)
    ours = tower(folder, layer)
    with torch.no_grad():
        found = ours(PIXELS)
        states = loader.from_pretrained(folder)(PIXELS, output_hidden_states=True).hidden_states  # type: ignore[attr-defined]
    expected = states[layer][:, 1:] if kind == "clip" else states[layer]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert ours.tokens == found.shape[1] == 4


@pytest.mark.parametrize("layer", [0, 5, -5])
def test_a_layer_that_is_not_there_is_refused(layer: int, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"between 1 and 4 or between -4 and -1 for this tower, got {layer}"):
        tower(write_vision_tower(tmp_path), layer)


def test_the_projector_is_two_layers_with_gelu_between() -> None:
    projector = PatchProjector(6, 10)
    plain = torch.nn.Sequential(projector.first, torch.nn.GELU(), projector.second)
    features = torch.randn(2, 4, 6)
    torch.testing.assert_close(projector(features), plain(features))
    assert projector(features.bfloat16()).dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in projector.parameters())


def test_the_recipe_names_the_connector(tmp_path: Path) -> None:
    model = tower(write_vision_tower(tmp_path), -1).model
    section = ModelSection(language="x", connector="patches", patch_layer=-3)
    patches, projector = connect(model, section, 24)
    assert isinstance(patches, PatchTower)
    assert patches.depth == 2
    assert projector(patches(PIXELS)).shape == (2, 4, 24)


@pytest.mark.parametrize("adapter", ["mma", "mma:visual=router", "lora"])
def test_a_run_trains_and_answers_with_patches(adapter: str, tiny_folder: Path, tmp_path: Path) -> None:
    content = runs.multimodal(tiny_folder, max_steps=2)
    content["model"]["connector"] = "patches"
    content["adapter"] = adapter
    run = lavintk.train(content, tmp_path / "run")
    model = run.assembly.model.eval()
    assert model.visual_tokens == 4
    assert isinstance(model.connector, PatchProjector)
    fresh = lavintk.load(tmp_path / "run").assembly.model
    with torch.no_grad():
        torch.testing.assert_close(fresh.visual_embeddings(PIXELS), model.visual_embeddings(PIXELS))
    assert model.connector.first.weight.shape == (64, 32)
    assert isinstance(run.generate("what color is the shape?", tiny_folder / "1.png", max_new_tokens=2), str)

"""The vision tower against transformers' hidden states."""

from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, SiglipVisionModel

from lavintk.errors import ModelError
from lavintk.models.language import load_vision_model
from lavintk.models.sources import open_source
from lavintk.models.vision import VisionTower
from lavintk.testing.tiny import write_language_model, write_vision_tower

PIXELS = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))


def tower(folder: Path, tap_every: int) -> VisionTower:
    model = load_vision_model(open_source(str(folder)), device=torch.device("cpu"), dtype=torch.float32)
    return VisionTower(model, tap_every).eval()


@pytest.mark.parametrize(("tap_every", "taps"), [(1, (1, 2, 3, 4)), (2, (2, 4)), (3, (3,)), (4, (4,))])
def test_features_are_the_class_tokens_of_clips_hidden_states(
    tmp_path: Path, tap_every: int, taps: tuple[int, ...]
) -> None:
    folder = write_vision_tower(tmp_path, "clip")
    with torch.no_grad():
        found = tower(folder, tap_every)(PIXELS)
        states = CLIPVisionModel.from_pretrained(folder)(PIXELS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found, torch.stack([states[k][:, 0] for k in taps], dim=1), atol=1e-5, rtol=1e-5)


def test_siglip_has_no_class_token_and_gives_the_mean_of_its_patches(tmp_path: Path) -> None:
    folder = write_vision_tower(tmp_path, "siglip")
    with torch.no_grad():
        found = tower(folder, 2)(PIXELS)
        states = SiglipVisionModel.from_pretrained(folder)(PIXELS, output_hidden_states=True).hidden_states
    expected = torch.stack([states[k].mean(dim=1) for k in (2, 4)], dim=1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_tower_of_a_whole_clip_is_taken_out_of_it(tmp_path: Path) -> None:
    vision = CLIPVisionModel.from_pretrained(write_vision_tower(tmp_path / "vision", "clip"))
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=vision.config.to_dict()))
    whole.vision_model.load_state_dict(vision.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    with torch.no_grad():
        torch.testing.assert_close(tower(tmp_path / "whole", 4)(PIXELS), tower(tmp_path / "vision", 4)(PIXELS))


def test_a_language_model_is_no_vision_tower(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds a 'llama', not a vision tower"):
        tower(write_language_model(tmp_path), 1)


def test_more_blocks_between_taps_than_there_are_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="between 1 and the tower's 4 blocks, got 5"):
        tower(write_vision_tower(tmp_path), 5)

"""OpenAI's CLIP in one file, as files that the tests write from the golden weights."""

import io
import pickle
import shutil
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPImageProcessor

from lavintk.data.images import ImageProcessor
from lavintk.errors import CheckpointError, ModelError
from lavintk.models.language import load_vision_model
from lavintk.models.sources import open_source
from lavintk.models.torch_files import find_scripted_tensors
from lavintk.models.vision import VisionTower
from lavintk.testing.golden_file import Golden, read_golden
from tests.original import Bare, Evil, clip_weights, write_torchscript

SHARED = Path(__file__).parent / "data" / "lavin_tiny.safetensors"
PIXELS = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def golden() -> Golden:
    return read_golden(SHARED)


def write(path: Path, weights: dict[str, Tensor]) -> Path:
    """Write a state dict in the form that the suffix names."""
    if path.suffix == ".safetensors":
        save_file(weights, path)
    elif path.suffix == ".pt":
        write_torchscript(path, weights)
    else:
        torch.save(OrderedDict(weights), path)
    return path


def features(w: dict[str, Tensor], images: Tensor, depth: int) -> Tensor:
    """Return OpenAI's class tokens after blocks 4 and 8, from the equations (reference section 2.2)."""

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"visual.{name}.weight"], w[f"visual.{name}.bias"], 1e-5)

    patches = F.conv2d(images, w["visual.conv1.weight"], stride=14).flatten(2).transpose(1, 2)
    first = w["visual.class_embedding"].expand(len(images), 1, -1)
    x = norm("ln_pre", torch.cat([first, patches], 1) + w["visual.positional_embedding"])
    taps = []
    for i in range(depth):
        block = f"transformer.resblocks.{i}"
        n = norm(f"{block}.ln_1", x)
        joined = F.linear(n, w[f"visual.{block}.attn.in_proj_weight"], w[f"visual.{block}.attn.in_proj_bias"])
        q, k, v = joined.chunk(3, -1)  # one head of width 64
        mixed = (q @ k.transpose(1, 2) / 8).softmax(-1) @ v
        out = f"visual.{block}.attn.out_proj"
        x = x + F.linear(mixed, w[f"{out}.weight"], w[f"{out}.bias"])
        mlp = f"visual.{block}.mlp"
        hidden = F.linear(norm(f"{block}.ln_2", x), w[f"{mlp}.c_fc.weight"], w[f"{mlp}.c_fc.bias"])
        hidden = hidden * torch.sigmoid(1.702 * hidden)
        x = x + F.linear(hidden, w[f"{mlp}.c_proj.weight"], w[f"{mlp}.c_proj.bias"])
        if (i + 1) % 4 == 0:
            taps.append(x[:, 0])
    return torch.stack(taps, 1)


@pytest.mark.parametrize("name", ["ViT-L-14.pt", "state.pth", "clip.safetensors"])
def test_each_form_gives_the_features_of_openais_equations(name: str, golden: Golden, tmp_path: Path) -> None:
    weights = clip_weights(golden)
    source = open_source(write(tmp_path / name, weights))
    config = source.config()
    assert (config.hidden_act, config.image_size, config.patch_size) == ("quick_gelu", 28, 14)
    assert (config.num_hidden_layers, config.num_attention_heads, config.intermediate_size) == (8, 1, 256)
    tower = VisionTower(load_vision_model(source, device=torch.device("cpu"), dtype=torch.float32), 4).eval()
    with torch.no_grad():
        found = tower(PIXELS)
    torch.testing.assert_close(found, features(weights, PIXELS, 8), atol=1e-5, rtol=0)


def test_half_precision_files_keep_their_type(golden: Golden, tmp_path: Path) -> None:
    weights = {n: t.half() if t.is_floating_point() else t for n, t in clip_weights(golden).items()}
    for name in ("a.pt", "b.pth", "c.safetensors"):
        value = open_source(write(tmp_path / name, weights)).read("encoder.layers.3.self_attn.k_proj.weight")
        assert torch.equal(value, weights["visual.transformer.resblocks.3.attn.in_proj_weight"][64:128])


def test_a_torchscript_archive_holds_what_torch_reads_from_it(golden: Golden, tmp_path: Path) -> None:
    path = write(tmp_path / "clip.pt", clip_weights(golden))
    expected = clip_weights(golden)
    found = find_scripted_tensors(path)
    assert {name: tensor.shape for name, tensor in found.items()} == {n: tuple(t.shape) for n, t in expected.items()}


def test_images_are_prepared_as_openais_clip_does() -> None:
    image = Image.effect_noise((41, 30), 90).convert("RGB")
    reference = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    expected = torch.as_tensor(reference(image, return_tensors="np")["pixel_values"][0])
    ours = ImageProcessor.for_clip(28)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    torch.testing.assert_close(ours(buffer.getvalue()), expected, atol=1e-2, rtol=0)


# What is wrong


def config_faults(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_source(path).config()
    return str(caught.value)


def test_tensors_that_lack_or_are_too_many_are_listed_by_name(golden: Golden, tmp_path: Path) -> None:
    weights = clip_weights(golden)
    del weights["visual.transformer.resblocks.2.mlp.c_fc.bias"]
    weights["visual.extra"] = torch.ones(1)
    weights["visual.transformer.resblocks.1.attn.in_proj_weight"] = torch.ones(190, 64)
    source = open_source(write(tmp_path / "clip.pth", weights))
    with pytest.raises(CheckpointError) as caught:
        load_vision_model(source, device=torch.device("cpu"), dtype=torch.float32)
    for text in (
        "encoder.layers.2.mlp.fc1.bias is missing",
        "visual.extra is not part of the model",
        "visual.transformer.resblocks.1.attn.in_proj_weight is not part of the model",
        "encoder.layers.1.self_attn.v_proj.weight is missing",
    ):
        assert text in str(caught.value)


def test_shapes_that_no_tower_has_are_refused(golden: Golden, tmp_path: Path) -> None:
    weights = clip_weights(golden)
    weights["visual.conv1.weight"] = torch.ones(60, 3, 14, 14)
    weights["visual.positional_embedding"] = torch.ones(6, 64)
    text = config_faults(write(tmp_path / "clip.pth", weights))
    assert "visual.conv1.weight has shape [60, 3, 14, 14], expected [a multiple of 64, 3, patch, patch]" in text
    assert "visual.positional_embedding has shape [6, 64]: no square" in text


def test_resnet_towers_and_other_models_are_told_apart(golden: Golden, tmp_path: Path) -> None:
    weights = clip_weights(golden) | {"visual.layer1.0.conv1.weight": torch.ones(1)}
    with pytest.raises(ModelError, match="ResNet"):
        open_source(write(tmp_path / "RN50.pth", weights))
    with pytest.raises(ModelError, match=r"no visual\.conv1\.weight\. Found: layers\.0"):
        open_source(write(tmp_path / "other.pth", {"layers.0.weight": torch.ones(1)}))


@pytest.mark.parametrize("name", ["clip.pt", "clip.pth", "clip.safetensors"])
def test_truncated_files_are_refused(name: str, golden: Golden, tmp_path: Path) -> None:
    path = write(tmp_path / name, clip_weights(golden))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="truncated"):
        open_source(path)


def test_a_state_dict_that_would_run_code_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    torch.save({"visual.conv1.weight": Evil(tmp_path / "written")}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="is refused: it holds more than tensors"):
        open_source(tmp_path / "evil.pth")
    assert not (tmp_path / "written").exists()


class SetsState:
    """Pickled, it names a class of torch's and hands it a state."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


@pytest.mark.parametrize(
    "call", [(open, "written", "w"), (eval, "open('written', 'w')"), (torch.load, "x"), (getattr, "x", "y")], ids=str
)
def test_a_torchscript_archive_that_would_run_code_is_refused_and_nothing_runs(
    call: tuple[Any, ...], golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    evil = replaced_pickle(
        write(tmp_path / "clip.pt", clip_weights(golden)), pickle.dumps(SetsState(*call), protocol=2)
    )
    with pytest.raises(CheckpointError, match="which no module of tensors needs"):
        open_source(evil)
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x02", b"\x80\x02}.", b"\x80\x02K\x01a.", b"garbage"], ids=repr)
def test_a_damaged_torchscript_pickle_is_refused(content: bytes, golden: Golden, tmp_path: Path) -> None:
    path = replaced_pickle(write(tmp_path / "clip.pt", clip_weights(golden)), content)
    with pytest.raises(CheckpointError, match="is no TorchScript module that can be read"):
        open_source(path)


def replaced_pickle(archive: Path, content: bytes) -> Path:
    """Return a copy of an archive with another data.pkl."""
    copy = archive.with_name("replaced.pt")
    with zipfile.ZipFile(archive) as before, zipfile.ZipFile(copy, "w") as after:
        for name in before.namelist():
            after.writestr(name, content if name.endswith("/data.pkl") else before.read(name))
    return copy


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path: Path) -> None:
    module = Bare()
    module.register_buffer("x", torch.ones(3))
    path = write_torchscript(tmp_path / "small.pt", {"x": torch.ones(3)})
    with zipfile.ZipFile(path) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("/data.pkl")]
        content = archive.read(name)
    assert content.count(b"K\x03\x85") + content.count(b"(K\x03t") == 1
    larger = content.replace(b"(K\x03t", b"(K\x7ft").replace(b"K\x03\x85", b"K\x7f\x85")
    with pytest.raises(CheckpointError, match=r"a tensor of shape \[127\] is larger than its storage"):
        open_source(replaced_pickle(path, larger))


def test_a_weights_file_of_a_folder_is_led_to_the_folder(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder / "vit", tmp_path / "vit")
    with pytest.raises(ModelError, match=f"Name its folder instead: {folder}"):
        open_source(folder / "model.safetensors")

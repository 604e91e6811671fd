"""Features of images kept on disk: the same training without running the vision tower, and when that is not allowed."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import lavintk
from lavintk.data.batches import collate
from lavintk.data.features import FeatureStore, KeptFeatures, digest_images, features_folder, missing_images
from lavintk.data.pack import Pack, PackShape
from lavintk.errors import DataError, RecipeError, RunError
from lavintk.features import why_not_the_same
from lavintk.hookspecs import hookimpl
from lavintk.models.build import Assembly, build
from lavintk.models.vision import VisionTower
from lavintk.plugins import installed_plugins
from lavintk.recipe import make_recipe
from lavintk.run import Run, load_records
from lavintk.testing.runs import multimodal

PICTURES = 3
"""Different pictures of the tiny data: six rows have one, and each colour comes twice."""
FROZEN = ["lora", {"name": "mma", "visual": "none", "dropout": 0.0}, None]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of images of each call of a tower."""
    calls: list[int] = []
    real = VisionTower.forward

    def counted(self: VisionTower, pixel_values: Tensor, run: Any = None) -> Tensor:
        calls.append(len(pixel_values))
        return real(self, pixel_values, run)

    monkeypatch.setattr(VisionTower, "forward", counted)
    return calls


def content(folder: Path, cache: bool | str, adapter: Any = "lora", **train: Any) -> dict[str, Any]:
    recipe = multimodal(folder, **{"max_steps": 6, "batch_size": 3, **train}) | {"adapter": adapter}
    recipe["data"] |= {"cache_features": cache}
    return recipe


def losses(run: Run) -> list[float]:
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("validation_loss")) for line in lines]


def train(recipe: dict[str, Any], out: Path) -> tuple[Run, str]:
    """Return the finished run and what it printed."""
    printed = io.StringIO()
    run = lavintk.train(recipe, out, console=Console(file=printed, width=200))
    return run, printed.getvalue()


def assembled(folder: Path, adapter: Any = "lora", **model: Any) -> Assembly:
    recipe = multimodal(folder) | {"adapter": adapter}
    recipe["model"] |= model
    return build(make_recipe(recipe), installed_plugins(), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("adapter", FROZEN, ids=["lora", "mma", "connector only"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packs"])
def test_runs_with_kept_features_learn_the_same_and_the_second_never_runs_the_tower(
    tiny_folder: Path, tmp_path: Path, seen: list[int], adapter: Any, packed: bool
) -> None:
    recipes = {cache: content(tiny_folder, cache, adapter, pack=packed, pack_tokens=128) for cache in (False, "auto")}
    for recipe in recipes.values():
        recipe["data"]["validation"] = recipe["data"]["test"] = recipe["data"]["train"]
    plain, printed = train(recipes[False], tmp_path / "plain")
    assert "features of images" not in printed
    assert sum(seen) > 2 * PICTURES
    seen.clear()
    first, printed = train(recipes["auto"], tmp_path / "first")
    assert f"features of images: 0 from disk, {PICTURES} computed" in printed
    assert sum(seen) == PICTURES
    seen.clear()
    second, printed = train(recipes["auto"], tmp_path / "second")
    assert f"features of images: {PICTURES} from disk, 0 computed" in printed
    assert str(features_folder()) in printed
    assert seen == []
    assert losses(first) == pytest.approx(losses(plain), rel=1e-5)
    assert losses(second) == losses(first)
    for name in ("accuracy_before", "accuracy_after"):
        assert second.manifest["evaluation"][name] == plain.manifest["evaluation"][name]


def test_patch_features_are_kept_too(tiny_folder: Path, tmp_path: Path, seen: list[int]) -> None:
    recipes = [content(tiny_folder, cache, max_steps=2) for cache in (False, True, True)]
    for recipe in recipes:
        recipe["model"]["connector"] = "patches"
    plain, first = (train(recipe, tmp_path / str(i))[0] for i, recipe in enumerate(recipes[:2]))
    seen.clear()
    second, _ = train(recipes[2], tmp_path / "2")
    assert losses(first) == losses(second) == pytest.approx(losses(plain), rel=1e-5)


def test_an_image_that_is_not_kept_goes_through_the_tower(tiny_folder: Path, tmp_path: Path, seen: list[int]) -> None:
    run, _ = train(content(tiny_folder, "auto"), tmp_path / "run")
    seen.clear()
    question = "what color is the shape?"
    known = run.generate(question, tiny_folder / "1.png", max_new_tokens=4)
    assert seen == []
    assert run.generate(question, (tiny_folder / "1.png").read_bytes(), max_new_tokens=4) == known
    run.generate(question, tiny_folder / "0.png", max_new_tokens=4)  # row 0 has no image
    assert seen == [1, 1]
    assert lavintk.load(run.folder).generate(question, tiny_folder / "1.png", max_new_tokens=4) == known


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_only_images_that_a_run_will_see_are_computed(
    tiny_folder: Path, tmp_path: Path, seen: list[int], seed: int
) -> None:
    """A run of one row: the row's picture, if it has one, and none of the others."""
    train(content(tiny_folder, False, max_steps=1, batch_size=1, seed=seed), tmp_path / "plain")
    needed = sum(seen)
    train(content(tiny_folder, "auto", max_steps=1, batch_size=1, seed=seed), tmp_path / "kept")
    assert sum(seen) == 2 * needed
    assert len(list(features_folder().rglob("*.safetensors"))) == needed <= 1


class PressCtrlC:
    """A plugin that interrupts the run after a step."""

    @hookimpl
    def lavintk_step_finished(self, step: Any) -> None:
        if step.step == 4:
            signal.raise_signal(signal.SIGINT)


def test_an_interrupted_run_resumes_to_the_weights_of_an_uninterrupted_one(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = content(tiny_folder, "auto", max_steps=7)
    straight, _ = train(recipe, tmp_path / "straight")
    manager = installed_plugins().manager
    manager.register(plugin := PressCtrlC(), "ctrl-c")
    try:
        train(recipe, tmp_path / "resumed")
    finally:
        manager.unregister(plugin)
    resumed = lavintk.train(Run.open(tmp_path / "resumed").recipe, tmp_path / "resumed", resume=True)
    found = resumed.assembly.model.trainable()
    for name, expected in straight.assembly.model.trainable().items():
        assert torch.equal(found[name], expected), name


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_number_of_workers_changes_nothing_and_faults_name_the_record(
    tiny_folder: Path, tmp_path: Path, workers: int
) -> None:
    recipe = content(tiny_folder, "auto", max_steps=2)
    expected = losses(train(recipe, tmp_path / "default")[0])
    recipe["data"] |= {"workers": workers, "cache_features": False}
    assert losses(train(recipe, tmp_path / "run")[0]) == pytest.approx(expected, rel=1e-5)
    for path in tiny_folder.glob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes()[:60])  # a sound header with nothing behind it
    (tmp_path / "mixed.jsonl").write_bytes((tiny_folder / "mixed.jsonl").read_bytes())
    recipe["data"] |= {"train": {"name": "jsonl", "path": str(tmp_path / "mixed.jsonl")}}
    for cache in ("auto", False):
        recipe["data"] |= {"cache_features": cache}
        with pytest.raises(DataError, match=r"record 'row\d': image .*\.png"):
            train(recipe, tmp_path / f"broken-{cache}")


@pytest.mark.parametrize("adapter", ["mma", {"name": "mma", "visual": "affine"}, "lora:targets=all+vision.*q_proj"])
def test_a_tower_that_an_adapter_changes_is_run_in_each_step(
    tiny_folder: Path, tmp_path: Path, seen: list[int], adapter: Any
) -> None:
    run, printed = train(content(tiny_folder, "auto", adapter, max_steps=2, batch_size=8), tmp_path / "run")
    assert "features of images" not in printed
    assert seen == [6, 6]
    assert run.assembly.find_features is None
    assert not features_folder().exists()
    with pytest.raises(RecipeError, match="the adapter changes the vision tower"):
        train(content(tiny_folder, True, adapter), tmp_path / "forced")


def hooked(model: Any) -> None:
    model.vision.blocks[1].register_forward_hook(lambda module, given, output: output)


def overridden(model: Any) -> None:
    model.vision.blocks[0].mlp.forward = lambda hidden: hidden


def wrapped(model: Any) -> None:
    model.vision.blocks[0].layer_norm1 = torch.nn.Sequential(model.vision.blocks[0].layer_norm1)


def trained(model: Any) -> None:
    next(model.vision.parameters()).requires_grad_(True)


def parametrized(model: Any) -> None:
    torch.nn.utils.parametrize.register_parametrization(
        model.vision.blocks[0].layer_norm1, "weight", torch.nn.Identity()
    )


def dropping(model: Any) -> None:
    model.vision.model.config.attention_dropout = 0.1


@pytest.mark.parametrize("change", [hooked, overridden, wrapped, trained, parametrized, dropping])
def test_whatever_may_change_features_is_found_in_the_tower_itself(
    tiny_folder: Path, change: Callable[[Any], None]
) -> None:
    model = assembled(tiny_folder).model
    assert why_not_the_same(model) == ""
    change(model)
    assert "vision tower" in why_not_the_same(model)


def test_damaged_and_foreign_files_are_ignored_and_rewritten(
    tiny_folder: Path, tmp_path: Path, seen: list[int]
) -> None:
    recipe = content(tiny_folder, "auto")
    first, _ = train(recipe, tmp_path / "first")
    flipped, other, text = sorted(features_folder().rglob("*.safetensors"))
    sound = {path: path.read_bytes() for path in (flipped, other, text)}
    flipped.write_bytes(sound[flipped][:-1] + bytes([sound[flipped][-1] ^ 1]))
    other.write_bytes(sound[text])  # sound in itself, but of another image
    text.write_text("no tensors")
    seen.clear()
    second, printed = train(recipe, tmp_path / "second")
    assert "0 from disk, 3 computed" in printed
    assert sum(seen) == PICTURES
    assert losses(second) == losses(first)
    for path, bytes_before in sound.items():
        assert path.read_bytes() == bytes_before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_store_gives_back_the_very_bits_and_only_to_its_own_kind(dtype: torch.dtype) -> None:
    store = FeatureStore({"weights": "a"}, (2, 8), dtype)
    features = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    store.write("0" * 64, features)
    found = store.read("0" * 64)
    assert found is not None
    assert found.dtype == dtype
    assert torch.equal(found, features)
    assert store.read("1" * 64) is None
    for other in (
        FeatureStore({"weights": "b"}, (2, 8), dtype),
        FeatureStore({"weights": "a"}, (4, 4), dtype),
        FeatureStore({"weights": "a"}, (2, 8), torch.float64),
    ):
        assert other.read("0" * 64) is None
        other.path("0" * 64).parent.mkdir(parents=True)
        other.path("0" * 64).write_bytes(store.path("0" * 64).read_bytes())
        assert other.read("0" * 64) is None
    with pytest.raises(ValueError, match="expected"):
        store.write("2" * 64, features.double())
    assert [path.name for path in store.folder.rglob("*.*")] == ["0" * 64 + ".safetensors"]


def test_another_preparation_of_images_has_its_own_features(tiny_folder: Path, tmp_path: Path) -> None:
    for index, changes in enumerate(({}, {"normalization": "imagenet"}, {"resize": "crop"})):
        recipe = content(tiny_folder, "auto", max_steps=1)
        recipe["data"] |= changes
        _, printed = train(recipe, tmp_path / str(index))
        assert "0 from disk" in printed
    assert len(list(features_folder().iterdir())) == 3


def kept(assembly: Assembly, images: list[Path]) -> KeptFeatures:
    """Return the tower's features of ``images``, computed here and put into a store."""
    assert assembly.model.vision is not None
    assert assembly.images is not None
    digests = digest_images(dict.fromkeys(images, "record"), 2)
    store = FeatureStore({}, (assembly.model.vision.tokens, assembly.model.vision.width), torch.float32)
    with torch.no_grad():
        for image in missing_images(store, digests, 2):
            assert not isinstance(image, bytes)
            store.write(digests[image], assembly.model.visual_features(assembly.images(image)[None])[0])
    return KeptFeatures(store, digests)


def test_a_batch_with_features_and_its_pack_have_the_loss_and_gradients_of_pixels(tiny_folder: Path) -> None:
    assembly = assembled(tiny_folder, {"name": "mma", "visual": "none", "dropout": 0.0})
    model = assembly.model
    records = load_records(make_recipe(multimodal(tiny_folder)).data.train, "train")  # type: ignore[arg-type]
    rows = [assembly.template.tokenize_record(record) for record in records]
    find = kept(assembly, [source for row in rows for source in row.images if isinstance(source, Path)])
    pixels, features = (collate(rows, assembly.images, finder) for finder in (None, find))
    assert pixels.features is None
    assert features.pixel_values is None
    assert features.features is not None
    assert features.features.shape == (6, model.visual_tokens, model.vision.width)  # type: ignore[union-attr]
    shape = PackShape.of(features, 512, model.visual_tokens, side=2)
    pack = Pack.of(features, replace(shape, images=9), side=2)
    assert pack.features is not None
    assert len(pack.features) == 9
    results = []
    for loss in (model.loss_sum(pixels), model.loss_sum(features), model.pack_loss_sum(pack)):
        model.zero_grad(set_to_none=True)
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.trainable().items()}))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-4, rtol=1e-5)


def test_a_batch_carries_pixels_if_the_features_of_one_image_are_gone(tiny_folder: Path) -> None:
    assembly = assembled(tiny_folder)
    records = load_records(make_recipe(multimodal(tiny_folder)).data.train, "train")  # type: ignore[arg-type]
    rows = [assembly.template.tokenize_record(record) for record in records]
    find = kept(assembly, [source for row in rows for source in row.images if isinstance(source, Path)])
    find.store.path(find.digests[rows[1].images[0]]).unlink()
    batch = collate(rows, assembly.images, find)
    assert batch.features is None
    assert batch.pixel_values is not None
    assert collate(rows[2:4], assembly.images, find).features is not None
    assert collate(rows[:1], assembly.images, find).images is None


def test_a_full_disk_leaves_pixels_in_place_unless_features_were_demanded(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: list[int]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FeatureStore, "write", full)
    run, printed = train(content(tiny_folder, "auto"), tmp_path / "run")
    assert "note: features of images are not kept on disk: [Errno 28] No space left on device" in printed
    assert run.assembly.find_features is None
    assert sum(seen) > PICTURES
    with pytest.raises(RunError, match="LAVINTK_CACHE"):
        train(content(tiny_folder, True), tmp_path / "forced")


def test_auto_keeps_no_more_than_its_limit(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lavintk.features.LARGEST", 100)
    _, printed = train(content(tiny_folder, "auto", max_steps=1, batch_size=8), tmp_path / "auto")
    assert "3 images need" in printed
    _, printed = train(content(tiny_folder, True, max_steps=1, batch_size=8), tmp_path / "forced")
    assert "3 computed" in printed


def test_an_image_that_vanished_is_named_with_its_record(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"record 'r7'.*gone\.png.*No such file"):
        digest_images({tmp_path / "gone.png": "r7", b"encoded": "r8"}, 2)


def test_a_tower_is_moved_only_when_pixels_need_it(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a device that is not there: what is asked of the tower, not the move itself."""
    model = assembled(tiny_folder).model
    device, places = torch.device("cuda:0"), [torch.device("cuda:0")]
    monkeypatch.setattr(type(model), "device", device)
    monkeypatch.setattr(VisionTower, "device", property(lambda tower: places[-1]))
    monkeypatch.setattr(VisionTower, "to", lambda tower, place: places.append(torch.device(place)))
    pixels = torch.zeros(1, 3, 28, 28)
    model.visual_features(pixels)
    assert places == [device]
    assert model.vision is not None
    model.set_vision_aside()
    model.connected(torch.zeros(1, model.visual_tokens, model.vision.width))
    assert places[1:] == [torch.device("cpu")]
    model.visual_features(pixels)
    model.visual_features(pixels)
    model.set_vision_aside()
    model.bring_vision_back()
    assert places[2:] == [device, torch.device("cpu"), device]


@pytest.mark.gpu
def test_a_tower_that_was_set_aside_comes_back_when_pixels_do(tiny_folder: Path) -> None:
    recipe = make_recipe(multimodal(tiny_folder) | {"adapter": "lora"})
    model = build(recipe, installed_plugins(), torch.device("cuda:0"), torch.float32).model
    pixels = torch.randn(2, 3, 28, 28, device="cuda:0")
    with torch.no_grad():
        expected = model.visual_features(pixels)
        model.set_vision_aside()
        assert model.vision is not None
        assert model.vision.device.type == "cpu"
        assert why_not_the_same(model) == ""
        assert torch.equal(model.visual_features(pixels), expected)
    assert model.vision.device.type == "cuda"

"""Bad input as a person meets it: each command ends with one message that says what to do, and nothing is lost."""

import errno
import json
import os
import re
import shutil
import signal
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import lavintk
import lavintk.plugins
from lavintk.checkpoints import checkpoints
from lavintk.data.batches import make_batches
from lavintk.errors import RunError
from lavintk.hookspecs import hookimpl
from lavintk.models.multimodal import MultimodalModel
from lavintk.testing import Outcome
from lavintk.testing.runs import multimodal, recipe
from lavintk.testing.tiny import write_language_model, write_tokenizer, write_vision_tower

RunCli = Callable[..., Outcome]
Damage = Callable[[Path], object]


def write_recipe(folder: Path, content: dict[str, Any]) -> str:
    """Write a recipe file and return its path as an argument."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "recipe.yaml")


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below ``folder`` but the loggers', which may add to theirs."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if "tensorboard" not in path.parts}


def check_message(outcome: Outcome, *texts: str) -> None:
    """Check that a command ended with one error that a person can read, and that it says each of ``texts``."""
    assert outcome.exit_code == 1, outcome
    assert outcome.stderr.startswith("Error: "), outcome.stderr
    assert "\nError: " not in outcome.stderr
    assert "Traceback" not in outcome.stderr + outcome.stdout
    for text in texts:
        assert text in outcome.stderr, outcome.stderr


@pytest.fixture
def refused(run_cli: RunCli, tmp_path: Path) -> Callable[..., None]:
    """Return a function that trains, expects to be refused with ``texts``, and finds no run folder afterwards."""

    def check(content: dict[str, Any], *texts: str, flags: tuple[str, ...] = ()) -> None:
        out = tmp_path / "out" / "run"
        check_message(run_cli("train", write_recipe(tmp_path / "asked", content), "--out", str(out), *flags), *texts)
        assert not out.exists()

    return check


@contextmanager
def taking_part(plugin: object) -> Iterator[None]:
    """Let ``plugin`` take part in the commands of the block."""
    new_manager = lavintk.plugins._new_manager

    def manager_with_it() -> Any:
        manager = new_manager()
        manager.register(plugin, "test")
        return manager

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lavintk.plugins._new_manager", manager_with_it)
        yield


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps with two checkpoints; copy it before changing anything."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    lavintk.train(recipe(tiny_folder, save_every=1), folder)
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copied"))


# Files that are not there


@pytest.mark.parametrize("name", ["language", "vision"])
def test_a_model_folder_that_does_not_exist_is_named(
    tiny_folder: Path, refused: Callable[..., None], name: str
) -> None:
    content = multimodal(tiny_folder)
    content["model"][name] = str(tiny_folder / "nowhere")
    refused(content, f"no model at '{tiny_folder / 'nowhere'}'", "no such file or folder")


def test_a_model_name_that_is_unknown_is_answered_with_the_known_ones(
    tiny_folder: Path, refused: Callable[..., None]
) -> None:
    content = recipe(tiny_folder)
    content["model"]["language"] = "smollm2-135m"
    refused(content, "no model named 'smollm2-135m'", "Did you mean 'smollm2-135m-instruct'?")


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_a_missing_data_file_is_found_before_the_model_is_loaded(
    tiny_folder: Path, refused: Callable[..., None], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test records too, which are answered only at the end if asked so."""
    monkeypatch.setattr("lavintk.training.build", lambda *_, **__: pytest.fail("the model was loaded"))
    content = recipe(tiny_folder) | {"evaluation": {"before": False}}
    content["data"][part] = {"name": "alpaca", "path": str(tiny_folder / "none.json")}
    refused(content, f"{tiny_folder / 'none.json'} has 1 fault", "no such file")


def test_a_missing_recipe_is_answered_with_the_shipped_ones(run_cli: RunCli, tmp_path: Path) -> None:
    outcome = run_cli("train", str(tmp_path / "none.yaml"))
    check_message(outcome, f"recipe '{tmp_path / 'none.yaml'}'", "neither a file nor a shipped recipe (demo, ")


def test_missing_images_are_all_listed_with_line_and_id(
    tiny_folder: Path, tmp_path: Path, refused: Callable[..., None]
) -> None:
    rows = [{"id": f"r{i}", "prompt": "q", "answer": "a", "image": f"none{i}.png"} for i in range(3)]
    refused(
        with_rows(tiny_folder, tmp_path, rows),
        "has 3 faults",
        *(f"line {i + 1} (id 'r{i}'): image: no image file {tmp_path / f'none{i}.png'}" for i in range(3)),
    )


# What the machine or its environment does not have


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in ("load_records", "build", "Run.create"):
        monkeypatch.setattr(
            f"lavintk.training.{stage}", lambda *_, stage=stage, **__: pytest.fail(f"{stage} was called")
        )


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize("flags", [("--dry-run",), ()])
def test_graphs_without_a_cuda_device_are_refused_before_anything_is_loaded(
    tiny_folder: Path, tmp_path: Path, refused: Callable[..., None], run_cli: RunCli, flags: tuple[str, ...]
) -> None:
    content = recipe(tiny_folder, engine="graph")
    said = "'graph' was asked for, but CUDA graphs need a CUDA device, and train.device is 'cpu'"
    refused(content, "train.engine has 1 fault", said, "Use --engine auto or eager (train.engine).", flags=flags)
    planned = run_cli("plan", write_recipe(tmp_path / "planned", content))
    assert planned.exit_code == 0  # that needs no GPU
    assert "engine graph" in " ".join(planned.stdout.split())


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize("command", [("plan",), ("train", "--dry-run"), ("train",)])
def test_graphs_of_a_streamed_base_are_refused_by_each_command_that_takes_a_recipe(
    tiny_folder: Path, tmp_path: Path, run_cli: RunCli, command: tuple[str, ...]
) -> None:
    path = write_recipe(tmp_path / "asked", recipe(tiny_folder, engine="graph", stream="cpu"))
    check_message(run_cli(*command, path), "recipe 'tiny' has 1 fault", "train.engine: 'graph' does not go with ")


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize("command", ["plan", "train"])
def test_an_unknown_kernel_is_refused_on_any_device_before_anything_is_loaded(
    tiny_folder: Path, tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("LAVINTK_KERNELS", "ropes")
    check_message(
        run_cli(command, write_recipe(tmp_path / "asked", recipe(tiny_folder))),
        "LAVINTK_KERNELS=ropes: no kernel named 'ropes'. Say all, none, or some of dequantize, ",
        "Did you mean 'rope'?",
    )


# Models of the wrong kind


def write_bert(folder: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def all_of(*damages: Damage) -> Damage:
    def damage(folder: Path) -> None:
        for one in damages:
            one(folder)

    return damage


WRONG_KINDS: list[tuple[str, Damage, tuple[str, ...]]] = [
    (
        "a vision tower",
        write_vision_tower,
        ("holds a 'clip_vision_model' (CLIPVisionModel)", "A vision tower is named with --vision"),
    ),
    ("an encoder", write_bert, ("holds a 'bert' (BertModel)", "lavintk takes llama, mistral, ")),
    (
        "an encoder with a tokenizer",
        all_of(write_bert, write_tokenizer),
        ("holds a 'bert' (BertModel)", "no Llama-like language model"),
    ),
    ("an empty folder", Path.mkdir, ("has no config.json", "The folder is empty")),
    (
        "no config.json",
        all_of(write_language_model, lambda folder: (folder / "config.json").unlink()),
        ("has no config.json", "Found: ", "model.safetensors"),
    ),
    (
        "a broken config.json",
        all_of(write_language_model, lambda folder: (folder / "config.json").write_text('{"model')),
        ("config.json cannot be read as JSON",),
    ),
    (
        "a model that transformers does not know",
        all_of(write_language_model, lambda folder: change_config(folder, model_type="llamaa")),
        ("(model_type 'llamaa')", "lavintk runs no code that comes with a model"),
    ),
    (
        "weights that are quantized already",
        all_of(
            write_language_model,
            lambda folder: change_config(folder, quantization_config={"quant_method": "gptq"}),
        ),
        ("quantized already (method 'gptq')", "Give the 16-bit base"),
    ),
    (
        "a pickle",
        all_of(
            write_language_model,
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        ),
        ("holds no safetensors", "pytorch_model.bin is a pickle", "save_pretrained"),
    ),
]


@pytest.mark.parametrize(("damage", "texts"), [c[1:] for c in WRONG_KINDS], ids=[c[0] for c in WRONG_KINDS])
def test_what_is_no_language_model_is_said_to_be_what_it_is(
    tiny_folder: Path, tmp_path: Path, refused: Callable[..., None], damage: Damage, texts: tuple[str, ...]
) -> None:
    damage(tmp_path / "model")
    content = recipe(tiny_folder)
    content["model"]["language"] = str(tmp_path / "model")
    refused(content, str(tmp_path / "model"), *texts)


def test_a_language_model_as_vision_tower_is_refused_before_weights_are_read(
    tiny_folder: Path, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lavintk.models.language.fill", lambda *_, **__: pytest.fail("weights were read"))
    content = multimodal(tiny_folder)
    content["model"]["vision"] = str(tiny_folder / "llm")
    refused(content, "holds a 'llama', not a vision tower", "A language model is named with --model")


def test_a_weights_file_instead_of_its_folder_is_led_to_the_folder(
    tiny_folder: Path, refused: Callable[..., None]
) -> None:
    content = recipe(tiny_folder)
    content["model"]["language"] = str(tiny_folder / "llm" / "model.safetensors")
    refused(content, "is no model", f"Name its folder instead: {tiny_folder / 'llm'}")


# Weights, vocabulary


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def misfit(tensors: dict[str, torch.Tensor]) -> None:
    """Take a tensor away, add one, and cut one."""
    del tensors["model.norm.weight"]
    tensors["model.layers.9.extra"] = torch.zeros(3)
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(10, 64)


def cut(file: Path, share: float) -> None:
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


def write_shards(folder: Path) -> None:
    """Name the weights as the first of two shards; the index places the norm in the second, which is not there."""
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    names = load_file(folder / "model.safetensors").keys()
    (folder / "model.safetensors").rename(folder / first)
    placed = {name: second if name == "model.norm.weight" else first for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))


def remove_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def grow_tokenizer(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(50)])
    tokenizer.save_pretrained(folder)


LAYER = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"),
    *("mlp.down_proj", "input_layernorm", "post_attention_layernorm"),
)
BAD_WEIGHTS: list[tuple[str, Damage, tuple[str, ...]]] = [
    (
        "missing, unexpected and misshapen tensors",
        lambda folder: change_weights(folder, misfit),
        (
            "model.norm.weight is missing",
            "model.layers.9.extra is not part of the model",
            "model.layers.0.self_attn.q_proj.weight has shape [10, 64], the model expects [64, 64]",
            "In all: 1 missing, 1 unexpected, 1 misshapen",
        ),
    ),
    (
        "a layer too few",
        lambda folder: change_config(folder, num_hidden_layers=3, layer_types=None),
        (*(f"model.layers.2.{name}.weight is missing" for name in LAYER), "In all: 9 missing"),
    ),
    (
        "more faults than fit the screen",
        lambda folder: change_config(folder, num_hidden_layers=6, layer_types=None),
        ("has 36 faults", "... and 16 more", "In all: 36 missing, 0 unexpected, 0 misshapen"),
    ),
    (
        "truncated weights",
        lambda folder: cut(folder / "model.safetensors", 0.9),
        ("model.safetensors is truncated: it has ", "Download or copy the files again."),
    ),
    (
        "a truncated header",
        lambda folder: cut(folder / "model.safetensors", 0.001),
        ("model.safetensors is truncated or no safetensors file",),
    ),
    (
        "an empty file",
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        ("0 bytes do not hold its header",),
    ),
    (
        "a header that is no JSON",
        lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", 20) + b"{not json" + bytes(50)),
        ("model.safetensors is corrupt", "Download or copy the files again."),
    ),
    ("a missing shard", write_shards, ("names model-00002-of-00002.safetensors, which is missing",)),
    (
        "a tokenizer with more entries than the embedding",
        grow_tokenizer,
        ("the tokenizer goes up to id ", "(ids 0 to 299)", "Use the tokenizer files that came with the weights"),
    ),
    (
        "no tokenizer",
        remove_tokenizer,
        ("holds no tokenizer", "Found: ", "Copy the tokenizer files"),
    ),
    (
        "a broken tokenizer",
        lambda folder: (folder / "tokenizer.json").write_text('{"version'),
        ("the tokenizer in ", "cannot be loaded"),
    ),
]


@pytest.mark.parametrize(("damage", "texts"), [c[1:] for c in BAD_WEIGHTS], ids=[c[0] for c in BAD_WEIGHTS])
def test_weights_and_tokenizer_that_do_not_fit_are_refused_with_all_that_is_wrong(
    tiny_folder: Path, tmp_path: Path, refused: Callable[..., None], damage: Damage, texts: tuple[str, ...]
) -> None:
    model = Path(shutil.copytree(tiny_folder / "llm", tmp_path / "model"))
    damage(model)
    content = recipe(tiny_folder)
    content["model"]["language"] = str(model)
    refused(content, *texts)


def test_a_damaged_vision_tower_is_refused_in_the_same_way(
    tiny_folder: Path, tmp_path: Path, refused: Callable[..., None]
) -> None:
    tower = Path(shutil.copytree(tiny_folder / "vit", tmp_path / "tower"))
    content = multimodal(tiny_folder)
    content["model"]["vision"] = str(tower)
    whole = load_file(tower / "model.safetensors")
    missing = next(name for name in whole if name.endswith("layers.3.mlp.fc2.weight"))
    change_weights(tower, lambda tensors: tensors.pop(missing))
    refused(content, f"{tower} has 1 fault", "encoder.layers.3.mlp.fc2.weight is missing")
    (tower / "preprocessor_config.json").unlink()
    refused(content, f"{tower} has no preprocessor_config.json", "copy the one that came with the weights")


def test_a_file_that_is_no_gguf_is_said_to_be_none(
    tiny_folder: Path, tmp_path: Path, refused: Callable[..., None]
) -> None:
    (tmp_path / "model.gguf").write_bytes(b"not a gguf file at all" * 10)
    content = recipe(tiny_folder)
    content["model"]["language"] = str(tmp_path / "model.gguf")
    refused(content, str(tmp_path / "model.gguf"))


# Images


def with_rows(folder: Path, place: Path, rows: list[dict[str, Any]], **train: Any) -> dict[str, Any]:
    """Return a multimodal recipe on ``rows``, written into ``place``."""
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    content = multimodal(folder, **train)
    content["data"]["train"]["path"] = str(place / "rows.jsonl")
    return content


def with_pictures(folder: Path, place: Path, pictures: list[Path], **train: Any) -> dict[str, Any]:
    rows = [{"id": f"r{i}", "prompt": "q", "answer": "red", "image": str(path)} for i, path in enumerate(pictures)]
    return with_rows(folder, place, rows, **train)


def write_noise(path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_huge(path: Path) -> Path:
    """Write a PNG of some bytes whose header declares 30000 x 30000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return path


def test_unreadable_and_absurdly_large_images_are_all_listed_before_the_model_is_loaded(
    tiny_folder: Path, tmp_path: Path, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lavintk.training.build", lambda *_, **__: pytest.fail("the model was loaded"))
    garbage, empty = tmp_path / "garbage.png", tmp_path / "empty.jpg"
    garbage.write_bytes(b"no image" * 20)
    empty.write_bytes(b"")
    huge = write_huge(tmp_path / "huge.png")
    assert huge.stat().st_size < 200
    refused(
        with_pictures(tiny_folder, tmp_path, [tiny_folder / "1.png", garbage, empty, huge]),
        "the image data has 3 faults",
        f"record 'r1': image {garbage}: not an image that Pillow can read",
        f"record 'r2': image {empty}: not an image that Pillow can read",
        f"record 'r3': image {huge}: 900 million pixels are more than the 100 million allowed; scale it down",
        "Replace these images, or leave their records out.",
    )


def test_images_for_a_model_that_sees_none_are_refused_with_the_way_to_a_tower(
    tiny_folder: Path, refused: Callable[..., None]
) -> None:
    content = recipe(tiny_folder)
    content["data"]["train"] = {"name": "jsonl", "path": str(tiny_folder / "mixed.jsonl")}
    refused(content, "6 of 8 records have an image (the first is 'row1')", "Name a vision tower with --vision")


def truncated_last(folder: Path, place: Path, **train: Any) -> tuple[dict[str, Any], Path]:
    """Return a recipe whose last step of the epoch needs a picture that is cut off behind its header."""
    picture = write_noise(place / "cut.png")
    cut(picture, 0.5)
    last = make_batches([range(26)] * 4, batch_size=1, seed=0, epoch=0)[-1][0]  # type: ignore[list-item]
    pictures = [picture if i == last else folder / "1.png" for i in range(4)]
    return with_pictures(folder, place, pictures, batch_size=1, **train), picture


def test_an_image_that_fails_in_mid_training_keeps_what_was_learned(
    tiny_folder: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    content, picture = truncated_last(tiny_folder, tmp_path)
    out = tmp_path / "run"
    outcome = run_cli("train", write_recipe(tmp_path, content), "--out", str(out))
    check_message(
        outcome,
        f"image {picture}: image file is truncated",
        f"What was learned up to step 3 is safe in {out / 'checkpoints' / 'step-000003'}.",
        f"Go on with: lavintk train --resume {out}",
    )
    assert json.loads((out / "manifest.json").read_text())["status"] == "failed"
    write_noise(picture)
    mended = run_cli("train", "--resume", str(out))
    assert mended.exit_code == 0, mended.stderr
    assert "the training records are not those that the run began with" in mended.stdout
    assert json.loads((out / "manifest.json").read_text())["status"] == "finished"


def test_an_image_that_fails_in_the_validation_keeps_what_was_learned(
    tiny_folder: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    content, picture = truncated_last(tiny_folder, tmp_path)
    content["data"]["validation"] = content["data"]["train"]
    content["data"]["train"] = {"name": "jsonl", "path": str(tiny_folder / "mixed.jsonl")}
    content["train"]["eval_every"] = 2
    outcome = run_cli("train", write_recipe(tmp_path, content), "--out", str(tmp_path / "run"))
    check_message(outcome, f"image {picture}: image file is truncated", "up to step 2 is safe", "train --resume")


def test_an_image_that_fails_in_the_first_step_leaves_no_run_so_the_command_can_be_repeated(
    tiny_folder: Path, tmp_path: Path, refused: Callable[..., None], run_cli: RunCli
) -> None:
    picture = write_noise(tmp_path / "cut.png")
    cut(picture, 0.5)
    content = with_pictures(tiny_folder, tmp_path, [picture], max_steps=1)
    refused(content, "image file is truncated")
    write_noise(picture)
    command = ["train", str(tmp_path / "asked" / "recipe.yaml"), "--out", str(tmp_path / "out" / "run")]
    assert run_cli(*command).exit_code == 0


# Records


BAD_RECORDS: list[tuple[str, str, tuple[str, ...]]] = [
    ("an empty file", "", ("it holds no records",)),
    ("an empty list", "[]", ("it holds no records",)),
    ("no JSON", '[{"instruction": "q", "output"}]', ("line 1, column ", "not valid JSON")),
    ("a list of numbers", "[1, 2]", ("record 1: expected an object with fields, found 1",)),
    (
        "wrong fields",
        '[{"instruction": "q", "outptu": "a"}, {"instruction": 7, "output": "a"}]',
        ("record 1: output: missing", "Did you mean 'outptu'?", "record 2: instruction: expected text, found 7"),
    ),
]


@pytest.mark.parametrize(("written", "texts"), [c[1:] for c in BAD_RECORDS], ids=[c[0] for c in BAD_RECORDS])
def test_data_without_usable_records_is_refused_with_every_fault(
    tiny_folder: Path, tmp_path: Path, refused: Callable[..., None], written: str, texts: tuple[str, ...]
) -> None:
    (tmp_path / "data.json").write_text(written)
    content = recipe(tiny_folder)
    content["data"]["train"]["path"] = str(tmp_path / "data.json")
    refused(content, str(tmp_path / "data.json"), *texts)


def test_records_without_a_single_trained_token_are_refused(
    tiny_folder: Path, tmp_path: Path, refused: Callable[..., None]
) -> None:
    rows = [{"id": f"m{i}", "messages": [{"role": "user", "content": "hello"}]} for i in range(2)]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    content = recipe(tiny_folder)
    content["data"]["train"] = {"name": "openai", "path": str(tmp_path / "chat.jsonl")}
    refused(
        content,
        "record 'm0': no trained token",
        "record 'm1': no trained token",
        "Labels are all masked: nothing can be learned. Do the records end with an assistant message?",
    )


def test_records_that_are_all_too_long_say_how_long(
    tiny_folder: Path, tmp_path: Path, refused: Callable[..., None]
) -> None:
    (tmp_path / "data.json").write_text(json.dumps([{"instruction": "z" * 500, "output": "x"}] * 3))
    content = recipe(tiny_folder)
    content["data"]["train"]["path"] = str(tmp_path / "data.json")
    refused(content, "all 3 records are longer than 128 tokens (longest: 5", "Raise max_length")
    content["data"]["too_long"] = "truncate"
    refused(content, "its answer lies behind the 128 tokens that are kept", "Labels are all masked")


# Names, options, device


BAD_SETTINGS: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
    ("quantizer", ("--quant", "nf5"), ("no quantizer named 'nf5'", "Did you mean 'nf4'?")),
    ("optimizer", ("--optim", "adam"), ("no optimizer named 'adam'", "Did you mean 'adamw'?")),
    ("adapter", ("--adapter", "lroa"), ("no adapter named 'lroa'", "Did you mean 'lora'?")),
    ("format", ("--data", "alpca:x.json"), ("no dataset format named 'alpca'", "Did you mean 'alpaca'?")),
    ("evaluation", ("--set", "evaluation.name=exact"), ("no evaluation named 'exact'", "Did you mean 'exact-match'?")),
    ("option", ("--quant", "nf4:foo=1"), ("unknown option 'foo'; known: block_size, double_quant",)),
    ("value", ("--adapter", "lora:r=many"), ("option 'r': Input should be a valid integer", "got 'many'")),
    ("range", ("--adapter", "lora:r=0"), ("r must be at least 1, got 0",)),
    ("twice", ("--quant", "nf4:block_size=64,block_size=128"), ("option 'block_size' is given twice",)),
    ("target", ("--adapter", "lora:targets=q_porj"), ("'q_porj' fits no linear layer. Did you mean 'q_proj'?",)),
    ("key", ("--set", "train.batch=2"), ("unknown key 'train.batch'. Did you mean 'train.batch_size'?",)),
    ("number", ("--lr", "-1"), ("train.lr: Input should be greater than 0, got -1",)),
    ("assignment", ("--set", "train.lr"), ("--set train.lr", "expected key=value")),
    ("template", ("--template", "chatt"), ("no template 'chatt'", "Did you mean 'chat'?")),
    ("device", ("--device", "gpu"), ("'gpu' is not a device; use auto, cpu, cuda or cuda:N",)),
    ("other device", ("--device", "mps"), ("'mps' is not supported; use auto, cpu, cuda or cuda:N",)),
]


@pytest.mark.parametrize(("flags", "texts"), [c[1:] for c in BAD_SETTINGS], ids=[c[0] for c in BAD_SETTINGS])
def test_an_unknown_name_or_a_bad_value_is_refused_with_what_would_do(
    tiny_folder: Path, refused: Callable[..., None], flags: tuple[str, ...], texts: tuple[str, ...]
) -> None:
    refused(recipe(tiny_folder), *texts, flags=flags)


def test_taps_deeper_than_the_tower_are_refused(tiny_folder: Path, refused: Callable[..., None]) -> None:
    content = multimodal(tiny_folder)
    content["model"]["tap_every"] = 40
    refused(content, "model.tap_every must lie between 1 and the tower's 4 blocks, got 40")


def test_cuda_without_a_cuda_device_is_refused_with_the_way_to_find_out_why(
    tiny_folder: Path, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(
        recipe(tiny_folder, device="cuda"),
        f"'cuda' was asked for, but torch {torch.__version__} sees no CUDA device",
        "`lavintk doctor` says why",
        "--device cpu",
    )


def test_a_cuda_device_beyond_the_last_is_refused(
    tiny_folder: Path, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refused(recipe(tiny_folder, device="cuda:7"), "'cuda:7' was asked for; there are cuda:0 to cuda:1")


# Faults in mid-run


def spoil_loss(monkeypatch: pytest.MonkeyPatch, call: int, spoil: Callable[..., torch.Tensor]) -> list[Any]:
    """Let ``spoil`` change the loss at a call (from 1); return the ids of each call's records."""
    real, seen = MultimodalModel.loss_sum, list[Any]()

    def loss_sum(self: MultimodalModel, batch: Any) -> torch.Tensor:
        seen.append(batch.record_ids)
        loss = real(self, batch)
        return spoil(self, loss) if len(seen) == call else loss

    monkeypatch.setattr(MultimodalModel, "loss_sum", loss_sum)
    return seen


def infinite_slope(model: MultimodalModel, loss: torch.Tensor) -> torch.Tensor:
    """Leave the value as it is and make the gradient NaN."""
    nothing = sum(parameter.sum() * 0 for parameter in model.trainable().values())
    return loss + torch.sqrt(torch.as_tensor(nothing))


@pytest.mark.parametrize(
    ("what", "spoil"),
    [("loss became nan", lambda model, loss: loss * float("nan")), ("gradient's norm became nan", infinite_slope)],
)
def test_a_loss_or_gradient_that_is_not_finite_stops_with_its_records_and_can_be_resumed(
    tiny_folder: Path, tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch, what: str, spoil: Any
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        seen = spoil_loss(patch, 3, spoil)
        outcome = run_cli("train", write_recipe(tmp_path, recipe(tiny_folder)), "--out", str(out))
    check_message(
        outcome,
        f"the {what} in step 3, with the records {', '.join(seen[2])}. Nothing of this step was applied.",
        f"lower train.lr (0.01); to go on, in {out / 'recipe.yaml'}",
        "What was learned up to step 2 is safe",
        f"lavintk train --resume {out}",
    )
    stored = load_file(checkpoints(out)[-1] / "adapter" / "adapter_model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in stored.values())
    assert run_cli("train", "--resume", str(out)).exit_code == 0


def test_broken_weights_are_not_taken_for_what_was_learned(
    tiny_folder: Path, tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_weights(model: MultimodalModel, loss: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            next(iter(model.trainable().values())).fill_(float("nan"))
        return loss * float("nan")

    spoil_loss(monkeypatch, 3, break_weights)
    out = tmp_path / "run"
    outcome = run_cli("train", write_recipe(tmp_path, recipe(tiny_folder)), "--out", str(out))
    check_message(outcome, "the loss became nan in step 3", f"{out} has no checkpoint to go on from: start anew")
    assert not (out / "checkpoints").exists()


def no_memory(*_: object, **__: object) -> Any:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture
def card_of_24_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.mark.usefixtures("card_of_24_gib")
def test_a_full_device_in_mid_run_says_what_to_lower_and_the_run_goes_on_with_less(
    tiny_folder: Path, tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        spoil_loss(patch, 3, no_memory)
        outcome = run_cli("train", write_recipe(tmp_path, recipe(tiny_folder)), "--out", str(out))
    check_message(
        outcome,
        "ran out of memory in step 3",
        " GiB allocated at peak of 24.0 GiB; 2.00 GiB more were asked for. Foretold were ",
        "Set train.checkpointing=true. Lower train.batch_size (now 2), or data.max_length (now 128; ",
        "What was learned up to step 2 is safe",
        f"to go on, in {out / 'recipe.yaml'}",
    )
    lowered = yaml.safe_load((out / "recipe.yaml").read_text())
    lowered["train"]["batch_size"] = 1
    (out / "recipe.yaml").write_text(yaml.safe_dump(lowered))
    assert run_cli("train", "--resume", str(out)).exit_code == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["steps"], manifest["recipe"]["train"]["batch_size"]) == (4, 1)


@pytest.mark.usefixtures("card_of_24_gib")
@pytest.mark.parametrize(
    ("place", "texts"),
    [
        ("lavintk.models.build.load_language_model", ("while loading the model", "(quant is none)")),
        ("lavintk.answer.Answerer.answer", ("while answering", "batch_size (now 32)", "max_new_tokens (now 16)")),
        ("lavintk.models.multimodal.MultimodalModel.loss_sum", ("in step 1", "train.batch_size (now 2)")),
    ],
)
def test_a_full_device_before_the_first_step_leaves_no_run(
    tiny_folder: Path, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch, place: str, texts: tuple[str, ...]
) -> None:
    monkeypatch.setattr(place, no_memory)
    content = recipe(tiny_folder)
    content["data"]["test"] = content["data"]["train"] if "answering" in texts[0] else None
    refused(content, "ran out of memory", " GiB allocated at peak of 24.0 GiB", *texts)


def test_a_disk_that_is_full_at_a_checkpoint_leaves_the_earlier_one_whole(
    tiny_folder: Path, tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real, kept = tmp_path / "run", torch.save, dict[str, bytes]()

    def save(content: Any, path: Path) -> None:
        if content["state"]["step"] == 3:
            kept.update(snapshot(out / "checkpoints" / "step-000002"))
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(content, path)

    with monkeypatch.context() as patch:
        patch.setattr("torch.save", save)
        written = write_recipe(tmp_path, recipe(tiny_folder, save_every=1))
        outcome = run_cli("train", written, "--out", str(out))
    check_message(
        outcome,
        f"{out / 'checkpoints' / 'step-000003'} cannot be written: ",
        "No space left on device",
        " MiB left: make room if that is too little",
        f"What was learned up to step 2 is safe in {out / 'checkpoints' / 'step-000002'}",
    )
    assert snapshot(out / "checkpoints" / "step-000002") == kept
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
    assert run_cli("train", "--resume", str(out)).exit_code == 0


class LimitFiles:
    """A plugin that lets no file grow beyond some bytes after a step, as a full disk would."""

    def __init__(self, step: int, nbytes: int) -> None:
        self.at, self.nbytes = step, nbytes

    @hookimpl
    def lavintk_step_finished(self, step: Any) -> None:
        import resource

        if step.step == self.at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.nbytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize(("step", "text"), [(1, "no checkpoint to go on from"), (2, "up to step 1 is safe")])
def test_a_write_that_really_fails_is_reported_and_cleared_away(
    tiny_folder: Path, tmp_path: Path, run_cli: RunCli, step: int, text: str
) -> None:
    resource = pytest.importorskip("resource", reason="limits files by POSIX's setrlimit")
    before, out = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "run"
    limit = LimitFiles(step, 40_000)  # less than an optimizer's state, more than anything else here
    try:
        with taking_part(limit):
            written = write_recipe(tmp_path, recipe(tiny_folder, save_every=1))
            outcome = run_cli("train", written, "--out", str(out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    check_message(outcome, f"step-00000{step} cannot be written: torch could not write state.pt", " MiB left", text)
    assert not list(out.rglob("*.partial"))


def test_any_other_write_that_fails_in_mid_run_keeps_what_was_learned(
    tiny_folder: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    class InTheWay:
        @hookimpl
        def lavintk_run_started(self, run: Any) -> None:
            (run.folder / "metrics.jsonl").mkdir()

    out = tmp_path / "run"
    with taking_part(InTheWay()):
        outcome = run_cli("train", write_recipe(tmp_path, recipe(tiny_folder)), "--out", str(out))
    check_message(outcome, f"Is a directory: '{out / 'metrics.jsonl'}'", "up to step 1 is safe", "--resume")


def test_a_plugin_that_fails_in_mid_run_is_named_and_costs_nothing(
    tiny_folder: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    class Broken:
        @hookimpl
        def lavintk_step_finished(self, step: Any) -> None:
            if step.step == 2:
                raise ValueError("no such server")

    out = tmp_path / "run"
    with taking_part(Broken()):
        outcome = run_cli("train", write_recipe(tmp_path, recipe(tiny_folder)), "--out", str(out))
    check_message(
        outcome,
        "plugin 'test' failed in lavintk_step_finished: ValueError: no such server",
        "LAVINTK_DISABLE=test",
        "What was learned up to step 2 is safe",
    )


def test_a_fault_in_the_last_evaluation_leaves_the_trained_model_in_place(
    tiny_folder: Path, tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    content = recipe(tiny_folder) | {"evaluation": {"before": False}}
    content["data"]["test"] = content["data"]["train"]
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("lavintk.answer.Answerer.answer", answer)
        outcome = run_cli("train", write_recipe(tmp_path, content), "--out", str(out))
    check_message(outcome, os.strerror(errno.EIO), "What was learned up to step 4 is safe", "--resume")
    trained = snapshot(out / "model")
    assert run_cli("train", "--resume", str(out)).exit_code == 0  # only answers what is left to answer
    assert snapshot(out / "model") == trained
    assert "accuracy_after" in json.loads((out / "manifest.json").read_text())["evaluation"]


# Ctrl-C


class PressCtrlC:
    """A plugin that presses Ctrl-C some times after a step."""

    def __init__(self, step: int, times: int) -> None:
        self.at, self.times = step, times

    @hookimpl
    def lavintk_step_finished(self, step: Any) -> None:
        for _ in range(self.times if step.step == self.at else 0):
            signal.raise_signal(signal.SIGINT)


def trained_tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(("times", "safe"), [(1, 3), (2, 2)], ids=["once", "twice"])
def test_ctrl_c_ends_a_run_that_resumes_to_the_same_weights(
    tiny_folder: Path, tmp_path: Path, run_cli: RunCli, finished: Path, times: int, safe: int
) -> None:
    """Once: the step is finished and saved. Twice: at once, and the checkpoints are as they were."""
    written, out = write_recipe(tmp_path, recipe(tiny_folder, save_every=1)), tmp_path / "run"
    with taking_part(PressCtrlC(3, times)):
        stopped = run_cli("train", written, "--out", str(out))
    assert stopped.exit_code == 130
    assert "Traceback" not in stopped.stderr + stopped.stdout
    assert "Ctrl-C once more stops at once" in stopped.stdout
    assert f"lavintk train --resume {out}" in stopped.stdout
    assert json.loads((out / "manifest.json").read_text())["status"] == "interrupted"
    assert checkpoints(out)[-1].name == f"step-00000{safe}"
    assert run_cli("train", "--resume", str(out)).exit_code == 0
    for name, expected in trained_tensors(finished).items():
        assert torch.equal(trained_tensors(out)[name], expected), name


def test_ctrl_c_twice_while_a_checkpoint_is_written_leaves_the_one_before(
    tiny_folder: Path, tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch, finished: Path
) -> None:
    real, out = torch.save, tmp_path / "run"

    def save(content: Any, path: Path) -> None:
        if content["state"]["step"] == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        real(content, path)

    with monkeypatch.context() as patch:
        patch.setattr("torch.save", save)
        stopped = run_cli("train", write_recipe(tmp_path, recipe(tiny_folder, save_every=1)), "--out", str(out))
    assert stopped.exit_code == 130
    assert "What was learned up to step 2 is safe" in stopped.stdout
    assert run_cli("train", "--resume", str(out)).exit_code == 0
    assert not list(out.rglob("*.partial"))
    for name, expected in trained_tensors(finished).items():
        assert torch.equal(trained_tensors(out)[name], expected), name


def test_ctrl_c_while_the_model_loads_leaves_no_run(
    tiny_folder: Path, tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lavintk.training.build", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have jobs in the background ignore it
    try:
        stopped = run_cli("train", write_recipe(tmp_path, recipe(tiny_folder)), "--out", str(tmp_path / "run"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert (stopped.exit_code, stopped.stderr.strip()) == (130, "Stopped.")
    assert not (tmp_path / "run").exists()


# Run folders


def test_a_folder_in_use_is_refused_and_left_alone(
    tiny_folder: Path, tmp_path: Path, run_cli: RunCli, copied: Path
) -> None:
    written = write_recipe(tmp_path / "asked", recipe(tiny_folder))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    cases = [
        (mine, f"{mine} exists and is not empty; choose another --out"),
        (mine / "notes.txt", "exists and is not empty; choose another --out"),
        (mine / "notes.txt" / "run", "cannot be made"),
        (copied, f"holds a run already; choose another --out, or go on with: lavintk train --resume {copied}"),
    ]
    before = snapshot(tmp_path)
    for folder, text in cases:
        check_message(run_cli("train", written, "--out", str(folder)), text, "another --out")
    assert snapshot(tmp_path) == before


def test_a_run_that_never_got_to_a_checkpoint_says_so_whatever_is_asked_of_it(
    tiny_folder: Path, tmp_path: Path, run_cli: RunCli, copied: Path
) -> None:
    shutil.rmtree(copied / "checkpoints")
    shutil.rmtree(copied / "model")
    before = snapshot(copied)
    again = run_cli("train", write_recipe(tmp_path, recipe(tiny_folder)), "--out", str(copied))
    check_message(again, "holds a run that has no checkpoint to go on from; delete it, or choose another --out")
    check_message(run_cli("train", "--resume", str(copied)), "no checkpoint to go on from: start anew")
    check_message(run_cli("eval", str(copied)), "holds no trained weights yet", "no checkpoint to go on from")
    assert snapshot(copied) == before


def test_a_file_of_ones_own_in_a_run_folder_outlives_the_failed_run(
    tiny_folder: Path, tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def build(*_: object, **__: object) -> None:
        (out / "notes.txt").write_text("written while the model loaded")
        raise RunError("something is wrong")

    monkeypatch.setattr("lavintk.training.build", build)
    check_message(run_cli("train", write_recipe(tmp_path, recipe(tiny_folder)), "--out", str(out)), "something is")
    assert (out / "notes.txt").is_file()


@pytest.mark.parametrize("command", [("train", "--resume"), ("eval",)], ids=["resume", "eval"])
def test_what_is_no_run_is_said_to_be_none(
    tiny_folder: Path, tmp_path: Path, run_cli: RunCli, command: tuple[str, ...]
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, text in (("nowhere", "does not exist"), ("file", "is a file"), ("empty", "lacks recipe.yaml and man")):
        check_message(run_cli(*command, str(tmp_path / name)), f"{tmp_path / name} {text}", "so it is no run")
    check_message(run_cli(*command, str(tiny_folder / "llm")), "lacks recipe.yaml and manifest.json, so it is no run")


@pytest.mark.parametrize(
    ("name", "written", "text"),
    [
        ("manifest.json", '{"status": ', "manifest.json is not valid JSON"),
        ("manifest.json", "[]", "manifest.json must hold a JSON object, found list"),
        ("recipe.yaml", "name: [", "recipe.yaml has 1 fault:\n  - not valid YAML"),
        ("recipe.yaml", "name: x", "model is required"),
    ],
)
@pytest.mark.parametrize("command", [("train", "--resume"), ("eval",)], ids=["resume", "eval"])
def test_a_damaged_manifest_or_recipe_is_named_and_left_alone(
    run_cli: RunCli, copied: Path, command: tuple[str, ...], name: str, written: str, text: str
) -> None:
    (copied / name).write_text(written)
    before = snapshot(copied)
    check_message(run_cli(*command, str(copied)), text)
    assert snapshot(copied) == before


class Foreign:
    """What no checkpoint may make lavintk run."""

    def __reduce__(self) -> Any:
        return os.system, ("exit 1",)


BAD_STATES: list[tuple[str, Damage, str]] = [
    ("garbage", lambda file: file.write_bytes(b"garbage" * 99), "cannot be read"),
    ("truncated", lambda file: cut(file, 0.5), "cannot be read"),
    ("empty", lambda file: file.write_bytes(b""), "cannot be read"),
    ("missing", Path.unlink, "is missing"),
    ("code", lambda file: torch.save({"state": Foreign()}, file), "cannot be read"),
    ("a list", lambda file: torch.save([1], file), "holds a list, not the state of a run"),
]


@pytest.mark.parametrize(("damage", "text"), [c[1:] for c in BAD_STATES], ids=[c[0] for c in BAD_STATES])
def test_a_damaged_state_is_refused_with_the_way_to_the_checkpoint_before_it(
    run_cli: RunCli, copied: Path, tmp_path: Path, damage: Damage, text: str
) -> None:
    newest = copied / "checkpoints" / "step-000004"
    damage(newest / "state.pt")
    before = snapshot(copied)
    outcome = run_cli("train", "--resume", str(copied))
    check_message(outcome, f"{newest / 'state.pt'} {text}", f"To go on from step-000003 instead, move {newest} away")
    assert snapshot(copied) == before
    newest.rename(tmp_path / "away")
    resumed = run_cli("train", "--resume", str(copied))
    assert resumed.exit_code == 0, resumed.stderr
    assert "resuming after step 3 of 4" in resumed.stdout


def test_damaged_weights_of_a_checkpoint_are_refused_with_the_way_to_the_one_before(
    run_cli: RunCli, copied: Path
) -> None:
    newest = copied / "checkpoints" / "step-000004"
    cut(newest / "adapter" / "adapter_model.safetensors", 0.5)
    before = snapshot(copied)
    outcome = run_cli("train", "--resume", str(copied))
    check_message(outcome, "adapter_model.safetensors cannot be read", f"from step-000003 instead, move {newest} away")
    assert snapshot(copied) == before


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("optim", "paged", "optim was 'adamw', is 'paged'"),
        ("quant", "nf4", "quant was 'none', is 'nf4'"),
        ("adapter", {"name": "lora", "r": 8}, "adapter was {'name': 'lora', 'r': 4, 'dropout': 0.1}, is "),
    ],
)
def test_a_run_does_not_go_on_with_another_optimizer_quantizer_or_adapter(
    run_cli: RunCli, copied: Path, key: str, value: Any, text: str
) -> None:
    content = yaml.safe_load((copied / "recipe.yaml").read_text()) | {key: value}
    (copied / "recipe.yaml").write_text(yaml.safe_dump(content))
    before = snapshot(copied)
    outcome = run_cli("train", "--resume", str(copied))
    check_message(outcome, text, "Change it back to go on, or start anew with another --out.")
    assert snapshot(copied) == before


# Scoring


def test_scoring_refuses_bad_input_with_what_would_do(
    tiny_folder: Path, tmp_path: Path, run_cli: RunCli, finished: Path
) -> None:
    good = ("--data", f"alpaca:{tiny_folder / 'alpaca.json'}")
    unanswered = tmp_path / "chat.jsonl"
    unanswered.write_text(json.dumps({"id": "m0", "messages": [{"role": "user", "content": "hello"}]}))
    cases: list[tuple[tuple[str, ...], str]] = [
        ((), "the recipe names no test data; give some, for example --data"),
        (("--data", "alpaca:none.json"), "none.json has 1 fault"),
        (("--data", f"alpca:{tiny_folder / 'alpaca.json'}"), "Did you mean 'alpaca'?"),
        (("--data", f"openai:{unanswered}"), "record m0: no assistant message to compare with"),
        (
            ("--data", f"jsonl:{tiny_folder / 'mixed.jsonl'}"),
            "record 'row1': it has an image, but the model takes none",
        ),
        ((*good, "--evaluation", "exact"), "Did you mean 'exact-match'?"),
        ((*good, "--batch-size", "0"), "batch_size must be at least 1, got 0"),
        ((*good, "--max-new-tokens", "-1"), "max_new_tokens must be at least 1, got -1"),
        ((*good, "--device", "gpu"), "use auto, cpu, cuda or cuda:N"),
        (
            (*good, "--save-predictions", str(tmp_path / "no" / "p.jsonl")),
            f"the folder {tmp_path / 'no'} does not exist",
        ),
    ]
    for arguments, text in cases:
        check_message(run_cli("eval", str(finished), *arguments), text)


def test_damaged_weights_of_a_run_are_refused_with_the_way_to_get_them_back(
    tiny_folder: Path, run_cli: RunCli, copied: Path
) -> None:
    weights = copied / "model" / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    cut(weights, 0.5)
    scored = run_cli("eval", str(copied), "--data", f"alpaca:{tiny_folder / 'alpaca.json'}")
    check_message(scored, "adapter_model.safetensors cannot be read", f"lavintk train --resume {copied}")
    assert run_cli("train", "--resume", str(copied)).exit_code == 0  # no step is left; the weights are put in place
    assert load_file(weights).keys() == trained_tensors(copied).keys()
    assert weights.read_bytes() == whole


def test_a_preview_of_missing_data_says_so(tiny_folder: Path, run_cli: RunCli) -> None:
    outcome = run_cli("data", "preview", "alpaca:none.json", "--model", str(tiny_folder / "llm"))
    check_message(outcome, "none.json has 1 fault", "no such file")


# The base has changed


@pytest.fixture
def on_own_base(tiny_folder: Path, tmp_path: Path) -> Path:
    """A multimodal run whose models lie in folders of their own, ``llm`` and ``vit`` beside it."""
    content = multimodal(tiny_folder, max_steps=1)
    for role, name in (("language", "llm"), ("vision", "vit")):
        content["model"][role] = str(shutil.copytree(tiny_folder / name, tmp_path / name))
    lavintk.train(content, tmp_path / "run")
    return tmp_path / "run"


def refusals(run_cli: RunCli, run: Path, data: Path) -> list[str]:
    """Return what resuming, scoring and loading the run say."""
    with pytest.raises(RunError) as caught:
        lavintk.load(run)
    outcomes = [run_cli("train", "--resume", str(run)), run_cli("eval", str(run), "--data", f"jsonl:{data}")]
    for outcome in outcomes:
        check_message(outcome)
    return [str(caught.value), *(outcome.stderr for outcome in outcomes)]


def test_a_run_refuses_to_go_on_or_answer_on_another_base_and_shows_both_hashes(
    tiny_folder: Path, run_cli: RunCli, on_own_base: Path
) -> None:
    trained_on = json.loads((on_own_base / "manifest.json").read_text())["base"]
    write_language_model(on_own_base.parent / "llm", seed=1)
    before = snapshot(on_own_base)
    for message in refusals(run_cli, on_own_base, tiny_folder / "mixed.jsonl"):
        assert f"language: trained on sha256 {trained_on['language']['sha256']}" in message
        assert re.search(r"found sha256 [0-9a-f]{64}", message)
        assert "  - vision" not in message
        assert f"Put the old model back, or name its place in {on_own_base / 'recipe.yaml'}" in message
    assert snapshot(on_own_base) == before
    write_vision_tower(on_own_base.parent / "vit", seed=1)
    for message in refusals(run_cli, on_own_base, tiny_folder / "mixed.jsonl"):
        for role, base in trained_on.items():
            assert f"{role}: trained on sha256 {base['sha256']}" in message


def test_a_base_that_only_moved_is_the_same_base(tiny_folder: Path, run_cli: RunCli, on_own_base: Path) -> None:
    (on_own_base.parent / "llm").rename(on_own_base.parent / "moved")
    check_message(run_cli("train", "--resume", str(on_own_base)), "no model at ", "no such file or folder")
    content = yaml.safe_load((on_own_base / "recipe.yaml").read_text())
    content["model"]["language"] = str(on_own_base.parent / "moved")
    (on_own_base / "recipe.yaml").write_text(yaml.safe_dump(content))
    assert lavintk.load(on_own_base).generate("hello", max_new_tokens=1) is not None
    assert run_cli("train", "--resume", str(on_own_base)).exit_code == 0


def test_a_person_who_knows_better_can_take_another_base(on_own_base: Path) -> None:
    write_language_model(on_own_base.parent / "llm", seed=1)
    manifest = json.loads((on_own_base / "manifest.json").read_text())
    del manifest["base"]
    (on_own_base / "manifest.json").write_text(json.dumps(manifest))
    assert lavintk.load(on_own_base).assembly.base["language"]["sha256"]


# Beyond any list


def test_a_file_that_may_not_be_read_is_an_error_without_a_traceback(
    tiny_folder: Path, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.read_bytes

    def read_bytes(self: Path) -> bytes:
        if self.name == "alpaca.json":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return real(self)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    refused(recipe(tiny_folder), f"Permission denied: '{tiny_folder / 'alpaca.json'}'", "--debug shows where")


def test_a_bug_in_mid_run_keeps_its_traceback_and_says_what_is_safe(
    tiny_folder: Path, tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def bug(*_: object) -> torch.Tensor:
        raise ZeroDivisionError

    spoil_loss(monkeypatch, 3, bug)
    out = tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        run_cli("train", write_recipe(tmp_path, recipe(tiny_folder, save_every=1)), "--out", str(out))
    assert "What was learned up to step 2 is safe" in capsys.readouterr().out
    assert json.loads((out / "manifest.json").read_text())["status"] == "failed"

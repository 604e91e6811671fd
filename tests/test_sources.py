"""Folders of safetensors and their tokenizers, compared with what transformers makes of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPConfig, CLIPModel

from lavintk.errors import CheckpointError, ModelError, UnknownNameError
from lavintk.models.sources import check_names, open_source
from lavintk.models.tokenizer import check_vocabulary, load_tokenizer
from lavintk.testing.tiny import VOCABULARY, write_language_model, write_tokenizer, write_vision_tower

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language_model(tmp_path_factory.mktemp("language"))


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy that the test may spoil."""
    return Path(shutil.copytree(written, tmp_path / "model"))


@pytest.fixture
def sharded(folder: Path) -> Path:
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    (folder / "model.safetensors").unlink()
    index: dict[str, str] = {}
    for number, part in enumerate((names[:7], names[7:]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    content = json.loads((folder / INDEX).read_text())
    change(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


@pytest.mark.parametrize("kind", ["folder", "sharded"])
def test_a_folder_gives_the_parameters_that_transformers_loads(kind: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(kind)
    source = open_source(path)
    expected = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
    assert set(source.names()) == set(expected)
    for name in source.names():
        assert torch.equal(source.read(name), expected[name])
        assert source.shape(name) == tuple(expected[name].shape)
        assert source.tensor_nbytes(name) == expected[name].nbytes
    assert source.nbytes() == sum(tensor.nbytes for tensor in expected.values())
    assert source.config().to_dict() == AutoModelForCausalLM.from_pretrained(path).config.to_dict()
    assert source.description == str(path)
    source.close()


def test_tensors_come_in_the_type_they_are_stored_in(folder: Path) -> None:
    stored = {
        "a": torch.randn(3, 4).bfloat16(),
        "b": torch.randn(5).half(),
        "c": torch.arange(3),
        "d": torch.zeros(0, 2),
    }
    save_file(stored, folder / "model.safetensors")
    source = open_source(folder)
    assert {name: source.read(name).dtype for name in source.names()} == {n: t.dtype for n, t in stored.items()}
    assert all(torch.equal(source.read(name), tensor) for name, tensor in stored.items())


def test_a_tensor_outlives_its_source_and_may_be_changed_without_touching_the_file(folder: Path) -> None:
    source = open_source(folder)
    name = source.names()[0]
    tensor = source.read(name)
    source.close()
    tensor.zero_()
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.get_tensor(name).any()


def test_reading_a_whole_file_holds_one_tensor_at_a_time(folder: Path) -> None:
    size = 8 << 20
    save_file({f"t{i}": torch.ones(size, dtype=torch.uint8) for i in range(24)}, folder / "model.safetensors")
    source = open_source(folder)
    before = psutil.Process().memory_info().rss
    peak = 0
    for name in source.names():
        tensor = source.read(name)
        assert int(tensor.sum(dtype=torch.int64)) == size
        peak = max(peak, psutil.Process().memory_info().rss - before)
    # two are held while one is read and the one before is not forgotten; torch's allocator gives memory back late
    assert peak < 16 * size


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_vision_folder_keeps_its_names(kind: str, tmp_path: Path) -> None:
    source = open_source(write_vision_tower(tmp_path, kind))
    assert set(source.names()) == set(load_file(tmp_path / "model.safetensors"))
    assert source.config().hidden_size == 32


def test_a_whole_clip_model_keeps_its_names(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, "image_size": 28, "patch_size": 14}
    CLIPModel(CLIPConfig(text_config={**small, "vocab_size": 50}, vision_config=vision)).save_pretrained(tmp_path)
    source = open_source(tmp_path)
    assert "vision_model.embeddings.patch_embedding.weight" in source.names()
    assert "text_projection.weight" in source.names()


# Fingerprints


def test_the_fingerprint_does_not_depend_on_where_the_folder_lies(written: Path, folder: Path) -> None:
    assert open_source(written).fingerprint() == open_source(folder).fingerprint()


def test_any_change_of_a_small_tensor_changes_the_fingerprint(folder: Path) -> None:
    before = open_source(folder).fingerprint()
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][5] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert open_source(folder).fingerprint() != before


@pytest.mark.parametrize("change", ["name", "shape", "dtype"])
def test_the_fingerprint_covers_names_shapes_and_types(change: str, folder: Path) -> None:
    tensor = torch.zeros(4, 6, dtype=torch.float16)
    changed = {"name": ("b", tensor), "shape": ("a", tensor.view(6, 4)), "dtype": ("a", tensor.bfloat16())}
    marks = []
    for name, value in (("a", tensor), changed[change]):
        save_file({name: value}, folder / "model.safetensors")
        marks.append(open_source(folder).fingerprint())
    assert marks[0] != marks[1]


def test_the_fingerprint_sees_first_and_last_byte_of_a_large_tensor(folder: Path) -> None:
    marks = set()
    for position in (None, 0, -1):
        tensor = torch.zeros(200_000, dtype=torch.uint8)
        if position is not None:
            tensor[position] = 1
        save_file({"a": tensor}, folder / "model.safetensors")
        marks.add(open_source(folder).fingerprint())
    assert len(marks) == 3


# Names


def test_names_that_fit_pass(written: Path) -> None:
    source = open_source(written)
    check_names(source, {name: source.shape(name) for name in source.names()}, lambda name: False)


def test_all_missing_unexpected_and_misshapen_tensors_are_listed(written: Path) -> None:
    source = open_source(written)
    expected = {name: source.shape(name) for name in source.names()}
    del expected["model.norm.weight"], expected["lm_head.weight"]
    expected["model.embed_tokens.weight"] = (7, 64)
    expected |= {f"model.extra.{i}": (1,) for i in range(40)}
    with pytest.raises(CheckpointError) as caught:
        check_names(source, expected, lambda name: name == "lm_head.weight")
    assert len(caught.value.faults) == 42
    message = str(caught.value)
    assert "model.norm.weight is not part of the model" in message
    assert f"model.embed_tokens.weight has shape [{VOCABULARY}, 64], the model expects [7, 64]" in message
    assert "and 22 more" in message
    assert "40 missing, 1 unexpected, 1 misshapen" in message
    assert "lm_head" not in message


# Faults of folders


def test_a_truncated_file_is_named_with_its_sizes(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1000])
    with pytest.raises(CheckpointError, match=rf"is truncated: it has {len(whole) - 1000} of {len(whole)} bytes"):
        open_source(folder)


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 100, b"\x10" + bytes(7) + b"not json at all!"])
def test_a_file_that_is_no_safetensors_file_is_refused(content: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is (truncated|corrupt)"):
        open_source(folder)


def test_a_git_lfs_pointer_is_recognised(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        open_source(folder)


def test_every_contradiction_between_index_and_shards_is_listed(sharded: Path) -> None:
    def spoil(index: dict[str, str]) -> None:
        index["model.ghost.weight"] = "model-00001-of-00002.safetensors"
        index["model.lost.weight"] = "model-00003-of-00003.safetensors"
        del index["lm_head.weight"]

    edit_index(sharded, spoil)
    save_file({"x": torch.zeros(1)}, sharded / "model-00009-of-00009.safetensors")
    with pytest.raises(CheckpointError) as caught:
        open_source(sharded)
    assert sorted(caught.value.faults) == [
        f"lm_head.weight lies in model-00001-of-00002.safetensors, but {INDEX} does not name it",
        f"model-00009-of-00009.safetensors is a shard that {INDEX} does not name",
        f"{INDEX} names model-00003-of-00003.safetensors, which is missing",
        f"{INDEX} places model.ghost.weight in model-00001-of-00002.safetensors, which does not hold it",
    ]


def test_a_missing_and_a_truncated_shard_are_shown_together(sharded: Path) -> None:
    first, second = sorted(sharded.glob("model-*.safetensors"))
    first.write_bytes(first.read_bytes()[:-10])
    second.unlink()
    with pytest.raises(CheckpointError) as caught:
        open_source(sharded)
    assert len(caught.value.faults) == 2


def test_a_file_of_another_layout_beside_the_shards_does_no_harm(sharded: Path) -> None:
    save_file({"x": torch.zeros(1)}, sharded / "consolidated.safetensors")
    assert "x" not in open_source(sharded).names()


def test_an_index_cannot_lead_out_of_the_folder(sharded: Path) -> None:
    edit_index(sharded, lambda index: index.update({"lm_head.weight": "../other/model.safetensors"}))
    with pytest.raises(CheckpointError, match="outside the folder"):
        open_source(sharded)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}'])
def test_an_index_that_cannot_be_read_is_refused(content: str, sharded: Path) -> None:
    (sharded / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match="weight_map"):
        open_source(sharded)


def test_several_files_without_an_index_are_refused(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    with pytest.raises(CheckpointError, match=f"cannot be placed without {INDEX}"):
        open_source(sharded)


def test_a_folder_without_config_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ModelError, match=r"has no config\.json\. Found: notes\.txt"):
        open_source(tmp_path)


def test_an_adapter_folder_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(ModelError, match="It holds an adapter"):
        open_source(tmp_path)


@pytest.mark.parametrize(("content", "reason"), [("{nope", "as JSON"), ("[1]", "must hold a JSON object")])
def test_a_config_that_is_no_json_object_is_refused(content: str, reason: str, folder: Path) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=reason):
        open_source(folder)


def test_a_model_type_that_transformers_does_not_know_is_refused(folder: Path) -> None:
    own_code = {"model_type": "mystery", "auto_map": {"AutoConfig": "mystery.MysteryConfig"}}
    (folder / "config.json").write_text(json.dumps(own_code))
    with pytest.raises(ModelError, match="model_type 'mystery'"):
        open_source(folder).config()


def test_weights_that_are_quantized_already_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="quantized already \\(method 'gptq'\\)"):
        open_source(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickled_weights_are_refused_with_a_way_out(name: str, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ModelError, match=rf"(?s){name} is a pickle.*writes safetensors"):
        open_source(folder)


def test_references_that_mean_nothing_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file or folder"):
        open_source(tmp_path / "absent")
    with pytest.raises(UnknownNameError, match="Did you mean 'smollm2-135m-instruct'"):
        open_source("smollm2-135m-instuct")
    save_file({"norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="Name its folder instead"):
        open_source(tmp_path / "model.safetensors")


def test_a_file_that_shrinks_after_opening_is_a_checkpoint_error(folder: Path) -> None:
    source = open_source(folder)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        source.read("model.norm.weight")
    with pytest.raises(CheckpointError):
        source.fingerprint()


# Tokenizers of folders


def test_a_folders_tokenizer_is_the_one_transformers_loads(written: Path) -> None:
    ours, theirs = load_tokenizer(written), AutoTokenizer.from_pretrained(written)
    text = "what color is the shape? red"
    assert ours(text, return_offsets_mapping=True) == theirs(text, return_offsets_mapping=True)


def test_a_tokenizer_without_padding_gets_the_end_token_and_no_new_entry(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (tmp_path / name).is_file():
            settings = json.loads((tmp_path / name).read_text())
            settings.pop("pad_token", None)
            (tmp_path / name).write_text(json.dumps(settings))
    size = len(AutoTokenizer.from_pretrained(tmp_path))
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token_id is None
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert len(tokenizer) == size


def test_a_tokenizer_larger_than_the_embedding_is_refused_with_both_numbers(folder: Path) -> None:
    config, tokenizer = open_source(folder).config(), load_tokenizer(folder)
    check_vocabulary(tokenizer, config)
    highest = max(tokenizer.get_vocab().values())
    config.vocab_size = highest
    with pytest.raises(ModelError, match=rf"id {highest} .*has {highest} rows"):
        check_vocabulary(tokenizer, config)


def test_a_slow_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"<unk>": 0, "a": 1}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CTRLTokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "ctrl"}')
    with pytest.raises(ModelError, match="slow one"):
        load_tokenizer(tmp_path)


def test_a_folder_without_tokenizer_says_what_is_there(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"holds no tokenizer .*Found: .*config\.json"):
        load_tokenizer(folder)


def test_a_broken_tokenizer_is_a_model_error(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(folder)

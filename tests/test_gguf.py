"""GGUF files written here as llama.cpp would, compared with the transformers models they hold."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lavintk.cache import cache_folder
from lavintk.errors import CheckpointError, ModelError
from lavintk.models.gguf_source import read_header
from lavintk.models.sources import open_source
from lavintk.models.tokenizer import check_vocabulary, load_tokenizer
from lavintk.testing.tiny import CHAT_TEMPLATE, write_language_model

REAL_FILE = os.environ.get("LAVINTK_TEST_GGUF", "")
needs_real_file = pytest.mark.skipif(
    not Path(REAL_FILE).is_file(),
    reason="LAVINTK_TEST_GGUF does not name SmolLM2-135M-Instruct as a .gguf file",
)

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "smollm3": {"num_hidden_layers": 5, "no_rope_layer_interval": 4, "bos_token_id": 1, "eos_token_id": 2},
}


def written_name(name: str) -> str:
    module, suffix = name.rsplit(".", 1)
    if module.startswith("model.layers."):
        _, _, layer, part = module.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[part]}.{suffix}"
    return f"{GGUF_NAMES[module]}.{suffix}"


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of each head from two halves to pairs, one row at a time, as llama.cpp stores them."""
    size = rows.shape[0] // heads
    order = [h * size + half * size // 2 + i for h in range(heads) for i in range(size // 2) for half in (0, 1)]
    return rows[order]


def write_gguf(
    path: Path, model: Any, kind: GGMLQuantizationType = GGMLQuantizationType.F32, **extra: Any
) -> dict[str, torch.Tensor]:
    """Write ``model`` as llama.cpp's converter would; return the weights that the file holds, in fp32."""
    config = model.config
    architecture = {"mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    add_metadata(writer, config)
    for key, value in extra.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(key.replace("ARCH", architecture).replace("__", "."), value)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    held = {}
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = parameter.float().numpy()
        stored = kind if values.ndim == 2 and values.shape[1] % 32 == 0 else GGMLQuantizationType.F32
        packed = quantize(values, stored)
        held[name] = torch.from_numpy(np.array(dequantize(packed, stored)))
        projection = name.split(".")[-2]
        if architecture in ("llama", "smollm3") and projection in heads:
            packed = permuted(packed, heads[projection])
        writer.add_tensor(written_name(name), packed, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def add_metadata(writer: gguf.GGUFWriter, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    if head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def tiny_model(folder: Path, architecture: str, **overrides: Any) -> Any:
    write_language_model(folder, architecture, **{**ARCHITECTURES[architecture], **overrides})
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def rebuilt(path: Path) -> Any:
    """Return the transformers model with the configuration and weights that lavintk reads from the file."""
    source = open_source(path)
    make: Any = AutoModelForCausalLM
    model = make.from_config(source.config(), dtype=torch.float32).eval()
    left = model.load_state_dict({name: source.read(name) for name in source.names()}, strict=False)
    tied = {"lm_head.weight"} if source.config().tie_word_embeddings else set()
    assert set(left.missing_keys) <= tied
    assert not left.unexpected_keys
    model.tie_weights()
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    result: torch.Tensor = model(torch.randint(0, 300, (2, 24), generator=generator)).logits
    return result


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
@pytest.mark.parametrize("tied", [False, True])
def test_each_architecture_gives_the_logits_of_the_model_it_was_written_from(
    architecture: str, tied: bool, tmp_path: Path
) -> None:
    model = tiny_model(tmp_path / "hf", architecture, tie_word_embeddings=tied)
    write_gguf(tmp_path / "model.gguf", model)
    read = rebuilt(tmp_path / "model.gguf")
    torch.testing.assert_close(logits(read), logits(model), rtol=0, atol=1e-6)
    assert read.config.tie_word_embeddings is tied
    assert ("lm_head.weight" in open_source(tmp_path / "model.gguf").names()) is not tied


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_quantized_tensors_come_back_dequantized_and_in_order(kind: str, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "hf", "llama", num_key_value_heads=1)
    held = write_gguf(tmp_path / "model.gguf", model, GGMLQuantizationType[kind])
    source = open_source(tmp_path / "model.gguf")
    assert set(source.names()) == set(held)
    for name, expected in held.items():
        tensor = source.read(name)
        assert tensor.dtype == torch.float32
        assert source.shape(name) == tuple(expected.shape)
        assert torch.equal(tensor, expected)
    model.load_state_dict(held)
    torch.testing.assert_close(logits(rebuilt(tmp_path / "model.gguf")), logits(model), rtol=0, atol=1e-6)


def test_large_tensors_are_dequantized_in_pieces_with_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = write_gguf(tmp_path / "model.gguf", tiny_model(tmp_path / "hf", "llama"), GGMLQuantizationType.Q8_0)
    monkeypatch.setattr("lavintk.models.gguf_source.CHUNK_ELEMENTS", 64 * 7)
    source = open_source(tmp_path / "model.gguf")
    assert all(torch.equal(source.read(name), expected) for name, expected in held.items())


def test_the_configuration_comes_from_the_metadata(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "hf", "qwen3", rms_norm_eps=1e-5)
    write_gguf(tmp_path / "model.gguf", model)
    config, expected = open_source(tmp_path / "model.gguf").config(), model.config
    same = set(config.to_dict()) - {"dtype", "architectures", "transformers_version", "_name_or_path"}
    assert config.architectures == expected.architectures
    assert {key: getattr(config, key) for key in same} == {key: getattr(expected, key) for key in same}


def test_sizes_are_those_on_disk(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", tiny_model(tmp_path / "hf", "llama"), GGMLQuantizationType.Q4_0)
    source = open_source(tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert source.nbytes() == sum(tensor.n_bytes for tensor in reader.tensors)
    assert source.tensor_nbytes("model.embed_tokens.weight") == 300 * 64 // 32 * 18


def test_the_header_agrees_with_the_gguf_packages_reader(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", tiny_model(tmp_path / "hf", "qwen2"), GGMLQuantizationType.Q8_0)
    header, reader = read_header(tmp_path / "model.gguf"), gguf.GGUFReader(tmp_path / "model.gguf")
    ours = {(t.name, t.dtype, t.shape, t.begin, t.nbytes) for t in header.tensors.values()}
    assert ours == {
        (t.name, t.tensor_type.name, tuple(map(int, reversed(t.shape))), t.data_offset, t.n_bytes)
        for t in reader.tensors
    }
    theirs = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert header.metadata == theirs


# Rope scaling


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_rope_scaling_is_recovered_from_its_divisors(factor: float, tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    model = tiny_model(tmp_path / "hf", "llama", rope_parameters=scaling, head_dim=32)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 32, 2) / 32)
    write_with_divisors(tmp_path / "model.gguf", model, (plain / scaled).numpy())
    read = rebuilt(tmp_path / "model.gguf")
    assert read.config.rope_parameters == scaling
    torch.testing.assert_close(logits(read), logits(model), rtol=0, atol=1e-6)


def test_unknown_rope_divisors_are_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "hf", "llama")
    write_with_divisors(tmp_path / "model.gguf", model, np.linspace(1, 5, 8, dtype=np.float32))
    with pytest.raises(ModelError, match="scales its rotary frequencies"):
        open_source(tmp_path / "model.gguf").config()


def write_with_divisors(path: Path, model: Any, divisors: np.ndarray) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    add_metadata(writer, model.config)
    writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    for name, parameter in model.state_dict().items():
        projection = name.split(".")[-2]
        values = parameter.numpy()
        writer.add_tensor(written_name(name), permuted(values, heads[projection]) if projection in heads else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"ARCH__rope__scaling__type": "none"}, {"rope_type": "default"}),
        (
            {"ARCH__rope__scaling__type": "linear", "ARCH__rope__scaling__factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        ({"ARCH__rope__scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "ARCH__rope__scaling__type": "yarn",
                "ARCH__rope__scaling__factor": 4.0,
                "ARCH__rope__scaling__original_context_length": 64.0,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
    ],
)
def test_linear_and_yarn_rope_scaling_are_read(
    metadata: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    write_gguf(tmp_path / "model.gguf", tiny_model(tmp_path / "hf", "qwen2"), **metadata)
    assert open_source(tmp_path / "model.gguf").config().rope_parameters == {
        "rope_theta": 10000.0,
        **expected,
    }


def test_a_rope_scaling_that_is_not_known_is_refused(tmp_path: Path) -> None:
    scaling: dict[str, Any] = {"ARCH__rope__scaling__type": "longrope", "ARCH__rope__scaling__factor": 4.0}
    write_gguf(tmp_path / "model.gguf", tiny_model(tmp_path / "hf", "qwen2"), **scaling)
    with pytest.raises(ModelError, match="rope scaling 'longrope'"):
        open_source(tmp_path / "model.gguf").config()


# Faults


def test_a_truncated_file_lists_what_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, tiny_model(tmp_path / "hf", "llama"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"(?s)output\.weight ends beyond the file.*It is truncated"):
        open_source(path)


@pytest.mark.parametrize("length", [5, 30, 200, 900])
def test_a_file_that_ends_in_its_header_is_refused(length: int, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, tiny_model(tmp_path / "hf", "llama"))
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="header is truncated or corrupt"):
        open_source(path)


def test_absurd_lengths_in_a_corrupt_header_cost_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 2**60) + bytes(100))
    with pytest.raises(CheckpointError, match="header is truncated or corrupt"):
        open_source(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"PK\x03\x04" + bytes(60), "no GGUF file"),
        (b"", "no GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "of version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_files_that_are_something_else_are_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=reason):
        open_source(tmp_path / "model.gguf")


def write_metadata_only(path: Path, architecture: str, **values: int) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        writer.add_uint32(key.replace("__", "."), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("architecture", "values", "reason"),
    [
        (
            "gemma2",
            {},
            "holds architecture 'gemma2'; from GGUF files lavintk reads llama, qwen2, qwen3, smollm3",
        ),
        ("llama", {"llama__expert_count": 8}, "mixture of experts"),
        ("llama", {"split__count": 3}, "one of 3 parts.*--merge"),
        ("llama", {}, "does not say its llama.block_count"),
    ],
)
def test_models_that_are_not_supported_say_why(
    architecture: str, values: dict[str, int], reason: str, tmp_path: Path
) -> None:
    write_metadata_only(tmp_path / "model.gguf", architecture, **values)
    with pytest.raises(ModelError, match=reason):
        open_source(tmp_path / "model.gguf")


def test_tensors_that_do_not_belong_or_lack_are_listed(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((4, 4), dtype=np.float32))
    writer.add_tensor("blk.1.attn_q.weight", np.zeros((4, 4), dtype=np.float32))
    writer.add_tensor("mystery", np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError) as caught:
        open_source(tmp_path / "model.gguf")
    named = [fault.split()[0] for fault in caught.value.faults]
    assert named == ["blk.1.attn_q.weight", "mystery", "token_embd.weight"]


def test_the_fingerprint_covers_metadata_and_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, tiny_model(tmp_path / "hf", "llama"))
    marks = [open_source(path).fingerprint()]
    whole = bytearray(path.read_bytes())
    for place in (whole.index(b"llama.context_length") + 24, len(whole) - 1):
        spoilt = bytearray(whole)
        spoilt[place] ^= 1
        path.write_bytes(spoilt)
        marks.append(open_source(path).fingerprint())
    path.write_bytes(whole)
    assert open_source(path).fingerprint() == marks[0]
    assert len(set(marks)) == 3


# Tokenizers


def write_tokenizer_gguf(path: Path, folder: Path, pre: str | None, architecture: str = "llama") -> Any:
    """Write the byte-level tokenizer of ``folder`` as llama.cpp would; return the original."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    special = set(tokenizer.get_added_vocab())
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(CHAT_TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tokenizer


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "smollm3"])
def test_a_gguf_tokenizer_gives_the_tokens_of_the_one_it_was_written_from(architecture: str, tmp_path: Path) -> None:
    folder = write_language_model(tmp_path / "hf")
    expected = write_tokenizer_gguf(tmp_path / "model.gguf", folder, "gpt-2", architecture)
    text = "<|start|>user\nwhat color is  the shape?<|end|>\n\n  42 blue"
    for _ in ("converted", "cached"):
        tokenizer = load_tokenizer(tmp_path / "model.gguf")
        ours = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        theirs = expected(text, return_offsets_mapping=True, add_special_tokens=False)
        assert ours["input_ids"] == theirs["input_ids"]
        assert ours["offset_mapping"] == theirs["offset_mapping"]
        assert tokenizer.chat_template == CHAT_TEMPLATE
        assert tokenizer.get_vocab() == expected.get_vocab()
        assert tokenizer.pad_token_id == tokenizer.eos_token_id == expected.eos_token_id


def test_a_converted_tokenizer_is_kept_and_a_changed_file_is_converted_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tokenizer_gguf(tmp_path / "model.gguf", write_language_model(tmp_path / "hf"), "gpt-2")
    load_tokenizer(tmp_path / "model.gguf")
    (kept,) = (cache_folder() / "tokenizers").iterdir()
    assert {file.name for file in kept.iterdir()} >= {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }

    def fail(path: Path) -> None:
        raise AssertionError("converted again")

    with monkeypatch.context() as patched:
        patched.setattr("lavintk.models.tokenizer._converted", fail)
        load_tokenizer(tmp_path / "model.gguf")
        write_tokenizer_gguf(tmp_path / "model.gguf", tmp_path / "hf", "smollm")
        with pytest.raises(AssertionError, match="converted again"):
            load_tokenizer(tmp_path / "model.gguf")


def test_a_tokenizer_json_beside_the_file_does_not_take_its_place(tmp_path: Path) -> None:
    expected = write_tokenizer_gguf(tmp_path / "model.gguf", write_language_model(tmp_path / "hf"), "gpt-2")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert load_tokenizer(tmp_path / "model.gguf").get_vocab() == expected.get_vocab()


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "a\n\n1234 it's", ["a", "\n", "\n", "1234", " it", "'s"]),
        ("smollm", "a\n\n1234 it's", ["a", "\n\n", "1", "2", "3", "4", " it", "'s"]),
        ("llama-bpe", "a\n\n1234 it'S", ["a", "\n\n", "123", "4", " it", "'S"]),
        ("qwen2", "a\n\n1234 it'S", ["a", "\n\n", "1", "2", "3", "4", " it", "'S"]),
        ("tekken", "helloWorld 12", ["hello", "World", " ", "1", "2"]),
    ],
)
def test_text_is_cut_as_the_model_was_trained_to(pre: str, text: str, pieces: list[str], tmp_path: Path) -> None:
    write_tokenizer_gguf(tmp_path / "model.gguf", write_language_model(tmp_path / "hf"), pre)
    splitter = load_tokenizer(tmp_path / "model.gguf").backend_tokenizer.pre_tokenizer
    cut = [text[start:end] for _, (start, end) in splitter.pre_tokenize_str(text)]
    assert cut == pieces


def test_llama_3s_tokenizer_starts_with_bos_and_takes_whole_words_first(tmp_path: Path) -> None:
    write_tokenizer_gguf(tmp_path / "model.gguf", write_language_model(tmp_path / "hf"), "llama-bpe")
    for _ in ("converted", "cached"):
        tokenizer = load_tokenizer(tmp_path / "model.gguf")
        assert tokenizer("red")["input_ids"][0] == tokenizer.bos_token_id
        assert tokenizer.backend_tokenizer.model.ignore_merges


@pytest.mark.parametrize("pre", [None, "martian"])
def test_an_unknown_way_to_cut_text_is_refused_not_guessed(pre: str | None, tmp_path: Path) -> None:
    write_tokenizer_gguf(tmp_path / "model.gguf", write_language_model(tmp_path / "hf"), pre)
    with pytest.raises(ModelError, match=rf"named {pre!r} .*known: .*smollm"):
        load_tokenizer(tmp_path / "model.gguf")


def test_a_file_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    write_metadata_only(tmp_path / "model.gguf", "llama")
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_tokenizer(tmp_path / "model.gguf")


def test_an_unwritable_cache_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = write_tokenizer_gguf(tmp_path / "model.gguf", write_language_model(tmp_path / "hf"), "gpt-2")
    (tmp_path / "file").touch()
    monkeypatch.setenv("LAVINTK_CACHE", str(tmp_path / "file"))
    assert load_tokenizer(tmp_path / "model.gguf").get_vocab() == expected.get_vocab()
    assert "cannot be kept" in caplog.text


# The real file of the demo

REFERENCE = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
path = Path(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
torch.save(dict(model.state_dict()), sys.argv[2])
"""


@needs_real_file
def test_smollm2_has_the_weights_that_transformers_reads(tmp_path: Path) -> None:
    command = [sys.executable, "-c", REFERENCE, REAL_FILE, str(tmp_path / "weights.pt")]
    subprocess.run(command, check=True, capture_output=True)
    expected = torch.load(tmp_path / "weights.pt", weights_only=True, mmap=True)
    source = open_source(REAL_FILE)
    assert set(source.names()) | {"lm_head.weight"} == set(expected)
    for name in source.names():
        torch.testing.assert_close(source.read(name), expected[name], rtol=0, atol=1e-7)


@needs_real_file
def test_smollm2_talks_sense() -> None:
    source, tokenizer = open_source(REAL_FILE), load_tokenizer(REAL_FILE)
    check_vocabulary(tokenizer, source.config())
    prompt: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    answer = rebuilt(Path(REAL_FILE)).generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])

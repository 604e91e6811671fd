"""GGUF files as lavintk itself and transformers read them, compared with the model that was trained."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from lavintk.errors import ModelError
from lavintk.models.gguf_source import read_header
from lavintk.models.sources import open_source
from lavintk.models.tokenizer import TEXT_SPLITS, load_tokenizer
from lavintk.run import Run
from lavintk.testing.tiny import CHAT_TEMPLATE, write_language_model
from lavintk_gguf import GgufOptions, make_gguf
from tests.test_export_hf import MMA, MODALITIES, ids, own_logits, quiet_transformers, text_run, trained, vision_run
from tests.test_gguf import rebuilt

__all__ = ["quiet_transformers"]
ROUNDING = {"f32": 1e-4, "f16": 0.02, "bf16": 0.15, "q8_0": 0.2, "q4_1": 3.0, "q4_0": 3.0}
"""How far logits may move by a type; those of the tiny models are a few units large."""
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 128},  # transformers takes no other from GGUF
    "smollm3": {"num_hidden_layers": 5, "no_rope_layer_interval": 4},
}
TEXTS = ("what color is the shape? red", "<|start|>user\nIs it 12 345?<|end|>", " naïve  漢字\n\n don't")


def exported(run: Run, out: Path, **options: Any) -> Path:
    make_gguf(GgufOptions(**{"type": "f32", **options})).export(run, out)
    (file,) = out.glob("*.gguf")
    return file


@torch.no_grad()
def read_logits(file: Path, tokens: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = rebuilt(file)(tokens[None]).logits[0]
    return result


@torch.no_grad()
def transformers_logits(file: Path, tokens: torch.Tensor) -> torch.Tensor:
    loader: Any = AutoModelForCausalLM
    model = loader.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    result: torch.Tensor = model.eval()(tokens[None]).logits[0]
    return result


@pytest.mark.parametrize("architecture", list(SETTINGS))
@pytest.mark.parametrize("tied", [False, True])
def test_each_architecture_gives_the_logits_of_the_trained_model(architecture: str, tied: bool, tmp_path: Path) -> None:
    run = text_run(tmp_path, architecture, tie_word_embeddings=tied, **SETTINGS[architecture])
    file = exported(run, tmp_path / "out")
    own = own_logits(run, ids())
    torch.testing.assert_close(read_logits(file, ids()), own, rtol=0, atol=1e-4)
    if architecture != "smollm3":  # transformers does not read SmolLM3 from GGUF
        torch.testing.assert_close(transformers_logits(file, ids()), own, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", list(ROUNDING))
def test_each_type_gives_the_logits_within_its_rounding(kind: str, tmp_path: Path) -> None:
    run = text_run(tmp_path)
    file = exported(run, tmp_path / "out", type=kind)
    own = own_logits(run, ids())
    found = read_logits(file, ids())
    assert (found - own).abs().max() < ROUNDING[kind]
    torch.testing.assert_close(transformers_logits(file, ids()), found, rtol=0, atol=1e-4)
    stored = {tensor.name: tensor.dtype for tensor in read_header(file).tensors.values()}
    assert stored["blk.0.attn_q.weight"] == kind.upper()
    assert stored["token_embd.weight"] == {"q4_0": "Q8_0", "q4_1": "Q8_0"}.get(kind, kind.upper())
    assert stored["output_norm.weight"] == "F32"


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_1"])
def test_a_quantized_matrix_is_off_by_no_more_than_its_steps_allow(kind: str, tmp_path: Path) -> None:
    run = text_run(tmp_path)
    file = exported(run, tmp_path / "out", type=kind)
    name = "model.layers.0.mlp.gate_proj.weight"
    plain = exported(run, tmp_path / "plain", type="f32")
    expected, found = open_source(plain).read(name).reshape(-1, 32), open_source(file).read(name).reshape(-1, 32)
    spread = expected.amax(1) - expected.amin(1)
    step = {"q8_0": expected.abs().amax(1) / 127, "q4_0": expected.abs().amax(1) / 8, "q4_1": spread / 15}[kind]
    # q4_0 cuts the end of the range opposite to its largest value; scales are rounded to fp16
    allowed = step * {"q8_0": 0.57, "q4_0": 1.02, "q4_1": 0.52}[kind]
    assert bool(((found - expected).abs().amax(1) <= allowed).all())


@pytest.mark.parametrize("condition", ["text", "image"])
def test_lavins_biases_go_in_for_each_modality(
    condition: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = vision_run(tmp_path, "taps", {**MMA, "placement": "block"})
    file = exported(run, tmp_path / "out", condition=condition)
    own = own_logits(run, ids(), MODALITIES[condition])
    torch.testing.assert_close(read_logits(file, ids()), own, rtol=0, atol=1e-4)
    page = (file.parent / "README.md").read_text()
    assert f"Modality: {condition}" in page
    assert "vision tower is not in it" in page
    assert "left out: images" in capsys.readouterr().out


@pytest.mark.parametrize("architecture", ["mistral", "qwen2"])
def test_other_architectures_take_the_biases_that_llama_cpp_loads(architecture: str, tmp_path: Path) -> None:
    run = text_run(tmp_path, architecture, MMA, **SETTINGS[architecture])
    file = exported(run, tmp_path / "out")
    torch.testing.assert_close(read_logits(file, ids()), own_logits(run, ids()), rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ["qwen3", "smollm3"])
def test_biases_that_llama_cpp_would_not_load_are_refused(architecture: str, tmp_path: Path) -> None:
    run = text_run(tmp_path, architecture, MMA, **SETTINGS[architecture])
    with pytest.raises(ModelError, match=rf"llama.cpp's {architecture} has none there.*--adapter lora"):
        exported(run, tmp_path / "out")


ROPE = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", list(ROPE))
def test_rope_scaling_goes_in(kind: str, tmp_path: Path) -> None:
    rope = {"rope_theta": 500000.0, **ROPE[kind]}
    run = text_run(tmp_path, rope_parameters=rope, max_position_embeddings=16384)
    file = exported(run, tmp_path / "out")
    torch.testing.assert_close(read_logits(file, ids()), own_logits(run, ids()), rtol=0, atol=1e-4)


def test_rope_scaling_that_gguf_cannot_say_is_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(ModelError, match=r"rope scaling 'dynamic'.*--format hf"):
        exported(text_run(tmp_path, rope_parameters=rope), tmp_path / "out")


def test_the_context_ends_where_a_sliding_window_would_begin(tmp_path: Path) -> None:
    run = text_run(tmp_path, "mistral", sliding_window=16)
    file = exported(run, tmp_path / "out")
    assert read_header(file).metadata["llama.context_length"] == 16
    torch.testing.assert_close(read_logits(file, ids()[:16]), own_logits(run, ids()[:16]), rtol=0, atol=1e-4)
    assert "16 tokens" in (file.parent / "README.md").read_text()


def test_rows_that_fill_no_block_are_stored_as_f16(tmp_path: Path) -> None:
    run = text_run(tmp_path, intermediate_size=80)
    file = exported(run, tmp_path / "out", type="q8_0")
    stored = {tensor.name: tensor.dtype for tensor in read_header(file).tensors.values()}
    assert (stored["blk.0.ffn_down.weight"], stored["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")


# Tokenizers


def change_tokenizer(folder: Path, splitting: str, ignore_merges: bool = False) -> None:
    """Let the tokenizer in ``folder`` cut text by one of the known expressions."""
    tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
    expression = TEXT_SPLITS[splitting]
    parts: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=expression is None)]
    if expression is not None:
        parts.insert(0, pre_tokenizers.Split(Regex(expression), behavior="isolated"))
    elif splitting == "smollm":
        parts.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.model.ignore_merges = ignore_merges
    tokenizer.save(str(folder / "tokenizer.json"))


def written_run(folder: Path) -> Run:
    data = {"train": {"name": "alpaca", "path": "unused.json"}}
    return trained(folder / "run", {"model": {"language": str(folder / "llm")}, "data": data})


@pytest.mark.parametrize(
    ("splitting", "ignore_merges"),
    [
        ("gpt-2", False),
        ("smollm", False),
        ("llama-bpe", True),
        ("smaug-bpe", False),
        ("qwen2", False),
        ("tekken", True),
    ],
)
def test_byte_level_tokenizers_come_back_with_the_same_tokens(
    splitting: str, ignore_merges: bool, tmp_path: Path
) -> None:
    write_language_model(tmp_path / "llm")
    change_tokenizer(tmp_path / "llm", splitting, ignore_merges)
    run = written_run(tmp_path)
    file = exported(run, tmp_path / "out")
    assert read_header(file).metadata["tokenizer.ggml.pre"] == splitting
    before, after = AutoTokenizer.from_pretrained(tmp_path / "llm"), load_tokenizer(file)
    for text in TEXTS:
        assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after.chat_template == CHAT_TEMPLATE
    assert (after.bos_token, after.eos_token) == ("<s>", "</s>")


def test_every_row_of_the_embedding_has_a_token_and_its_kind(tmp_path: Path) -> None:
    run = text_run(tmp_path, vocab_size=310)
    reader: Any = gguf.GGUFReader(exported(run, tmp_path / "out"))
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    assert len(tokens) == len(kinds) == 310
    known = len(run.assembly.tokenizer)
    assert tokens[known:] == [f"[PAD{id}]" for id in range(known, 310)]
    assert kinds[3] == gguf.TokenType.CONTROL
    assert set(kinds[known:]) == {gguf.TokenType.UNUSED}
    assert len(set(tokens)) == 310
    assert reader.fields["tokenizer.ggml.eot_token_id"].contents() == run.assembly.template.stop_ids[1]


def test_an_unknown_way_to_cut_text_is_refused(tmp_path: Path) -> None:
    write_language_model(tmp_path / "llm")
    content = json.loads((tmp_path / "llm" / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": r"\d+"}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    (tmp_path / "llm" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"no name for.*--format hf"):
        exported(written_run(tmp_path), tmp_path / "out")


def test_a_base_out_of_gguf_hands_its_tokenizer_on_unchanged(tmp_path: Path) -> None:
    first = exported(text_run(tmp_path / "first"), tmp_path / "base")
    data = {"train": {"name": "alpaca", "path": "unused.json"}}
    run = trained(tmp_path / "run", {"model": {"language": str(first)}, "data": data})
    second = exported(run, tmp_path / "out")
    own, base = (
        {n: f.contents() for n, f in gguf.GGUFReader(file).fields.items() if n.startswith("tokenizer.")}
        for file in (second, first)
    )
    assert own == base
    torch.testing.assert_close(read_logits(second, ids()), own_logits(run, ids()), rtol=0, atol=1e-4)


def sentencepiece_model(file: Path) -> None:
    from sentencepiece import SentencePieceTrainer

    lines = file.with_suffix(".txt")
    lines.write_text("\n".join(["what color is the shape?", "is there a blue circle? yes or no", "red"] * 20))
    SentencePieceTrainer.train(
        input=str(lines), model_prefix=str(file.with_suffix("")), vocab_size=290, model_type="bpe",
        byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip


def test_sentencepiece_goes_in_with_its_scores(tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    write_language_model(tmp_path / "llm")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "llm" / name).unlink()
    sentencepiece_model(tmp_path / "llm" / "tokenizer.model")
    file = exported(written_run(tmp_path), tmp_path / "out")
    original = SentencePieceProcessor(model_file=str(tmp_path / "llm" / "tokenizer.model"))
    fields = gguf.GGUFReader(file).fields
    tokens, scores = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores"))
    size = original.get_piece_size()
    assert tokens[:size] == [original.id_to_piece(id) for id in range(size)]
    np.testing.assert_allclose(scores[:size], [original.get_score(id) for id in range(size)])
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is True
    after = load_tokenizer(file)
    assert after("what color", add_special_tokens=False)["input_ids"] == original.encode("what color")


def test_sentencepiece_without_its_model_is_refused(tmp_path: Path) -> None:
    write_language_model(tmp_path / "llm")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "llm" / name).unlink()
    sentencepiece_model(tmp_path / "llm" / "tokenizer.model")
    load_tokenizer(tmp_path / "llm").save_pretrained(tmp_path / "llm")
    (tmp_path / "llm" / "tokenizer.model").unlink()
    with pytest.raises(ModelError, match=r"tokenizer.model.*copy"):
        exported(written_run(tmp_path), tmp_path / "out")


def test_a_model_llama_cpp_computes_otherwise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'gelu', not silu"):
        exported(text_run(tmp_path, hidden_act="gelu"), tmp_path / "out")

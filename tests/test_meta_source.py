"""Meta's LLaMA folders, as files that the tests write from the golden weights."""

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lavintk.errors import CheckpointError, ModelError
from lavintk.models.sources import WeightSource, check_names, open_source
from lavintk.models.tokenizer import PROBES, load_tokenizer
from lavintk.models.torch_files import LEGACY
from lavintk.testing.golden_file import Golden, read_golden
from tests.original import Evil, language_weights, write_meta

SHARED = Path(__file__).parent / "data" / "lavin_tiny.safetensors"
TEXT = ["what color is the shape? red", "is there a blue circle? yes or no", "Image: N/A the answer is A.\nResponse:B"]


@pytest.fixture(scope="module")
def golden() -> Golden:
    return read_golden(SHARED)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    source = open_source(folder)
    return {name: source.read(name) for name in source.names()}


def llama(source: WeightSource) -> LlamaForCausalLM:
    config = source.config()
    assert isinstance(config, LlamaConfig)
    return LlamaForCausalLM(config)


def faults_of(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_source(folder)
    return str(caught.value)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_shards_are_joined_into_the_model_whose_plain_llama_gives_the_reference(
    shards: int, golden: Golden, tmp_path: Path
) -> None:
    """transformers' model on the source's weights against Meta's attention with neighbouring pairs."""
    folder = write_meta(tmp_path / "7B", golden, shards)
    source = open_source(folder)
    model = llama(source).eval()
    loaded = model.load_state_dict(weights_of(folder), strict=True)
    assert not loaded.missing_keys
    ids = golden.cases["text_only"]["input_ids"][:, :12]
    with torch.no_grad():
        found = model(ids).logits
    torch.testing.assert_close(found, meta_logits(golden, ids), atol=3e-6, rtol=0)


def meta_logits(golden: Golden, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of Meta's LLaMA (reference section 2.1) without any adapter."""
    w, heads = language_weights(golden), golden.geometry.n_heads

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w[f"{name}.weight"]

    def turn(x: torch.Tensor) -> torch.Tensor:
        width = x.shape[-1]
        angles = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    h = w["tok_embeddings.weight"][ids[0]]
    barrier = torch.full((len(h), len(h)), -torch.inf).triu(1)
    for i in range(golden.geometry.n_layers):
        n = norm(f"layers.{i}.attention_norm", h)
        q, k, v = (
            (n @ w[f"layers.{i}.attention.w{p}.weight"].T).view(len(h), heads, -1).transpose(0, 1) for p in "qkv"
        )
        scores = turn(q) @ turn(k).transpose(1, 2) / q.shape[-1] ** 0.5 + barrier
        h = h + (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ w[f"layers.{i}.attention.wo.weight"].T
        n, ffn = norm(f"layers.{i}.ffn_norm", h), f"layers.{i}.feed_forward"
        gate = torch.nn.functional.silu(n @ w[f"{ffn}.w1.weight"].T)
        h = h + (gate * (n @ w[f"{ffn}.w3.weight"].T)) @ w[f"{ffn}.w2.weight"].T
    return (norm("norm", h) @ w["output.weight"].T)[None]


def test_the_configuration_comes_from_params_and_shapes(golden: Golden, tmp_path: Path) -> None:
    params = {"rope_theta": 5e5, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5}
    config = open_source(write_meta(tmp_path / "7B", golden, 2, params)).config()
    found = (config.vocab_size, config.intermediate_size, config.rms_norm_eps, config.rope_parameters["rope_theta"])
    assert found == (101, 192, 1e-5, 5e5)
    assert config.num_key_value_heads == 4


def test_rows_of_fewer_key_heads_are_put_in_order_too(golden: Golden, tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "llama2", golden, params={"n_kv_heads": 2})
    shard = torch.load(folder / "consolidated.00.pth", weights_only=True)
    for name in [n for n in shard if n.endswith(("wk.weight", "wv.weight"))]:
        shard[name] = shard[name][:32].clone()
    torch.save(shard, folder / "consolidated.00.pth")
    source = open_source(folder)
    model = llama(source)
    check_names(source, {n: tuple(p.shape) for n, p in model.named_parameters()}, lambda name: False)
    meta, ours = shard["layers.1.attention.wk.weight"], source.read("model.layers.1.self_attn.k_proj.weight")
    for head in range(2):
        for c in range(2):
            for j in range(8):  # W_HF[h d + c d/2 + j] = W_Meta[h d + 2 j + c]
                assert torch.equal(ours[head * 16 + c * 8 + j], meta[head * 16 + 2 * j + c])


def test_an_embedding_split_by_words_is_joined_by_words(golden: Golden, tmp_path: Path) -> None:
    """As in Llama 3."""
    folder = write_meta(tmp_path / "llama3", golden, 2)
    whole = golden.weights["tok_embeddings.weight"]
    for number, half in enumerate(whole.tensor_split(2)):
        file = folder / f"consolidated.{number:02}.pth"
        torch.save(torch.load(file, weights_only=True) | {"tok_embeddings.weight": half.clone()}, file)
    assert torch.equal(open_source(folder).read("model.embed_tokens.weight"), whole)


def test_tensors_that_share_or_transpose_their_storage_are_read_right(golden: Golden, tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "7B", golden)
    file = folder / "consolidated.00.pth"
    shard = torch.load(file, weights_only=True)
    name = "layers.0.attention.wo.weight"
    shard[name] = shard[name].t().contiguous().t()
    both = torch.stack([shard["norm.weight"], shard["layers.0.ffn_norm.weight"]])
    shard["norm.weight"], shard["layers.0.ffn_norm.weight"] = both[0], both[1]
    torch.save(shard, file)
    found = weights_of(folder)
    assert torch.equal(found["model.layers.0.self_attn.o_proj.weight"], golden.weights[name])
    assert torch.equal(found["model.norm.weight"], golden.weights["norm.weight"])
    assert torch.equal(found["model.layers.0.post_attention_layernorm.weight"], both[1])


def test_the_fingerprint_tells_weights_and_parameters_apart(golden: Golden, tmp_path: Path) -> None:
    first = open_source(write_meta(tmp_path / "a", golden, 2)).fingerprint()
    assert open_source(write_meta(tmp_path / "b", golden, 2)).fingerprint() == first
    assert open_source(write_meta(tmp_path / "c", golden, 2, {"norm_eps": 1e-5})).fingerprint() != first
    file = tmp_path / "b" / "consolidated.01.pth"
    shard = torch.load(file, weights_only=True)
    shard["layers.2.feed_forward.w2.weight"][3, 4] += 1
    torch.save(shard, file)
    assert open_source(tmp_path / "b").fingerprint() != first


# What is wrong


def test_missing_shards_are_named(golden: Golden, tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "30B", golden, 4)
    (folder / "consolidated.01.pth").unlink()
    (folder / "consolidated.03.pth").unlink()
    assert "consolidated.01.pth is missing" in faults_of(folder)
    shutil.rmtree(folder)
    folder = write_meta(tmp_path / "30B", golden, 4)
    (folder / "consolidated.02.pth").unlink()
    (folder / "consolidated.03.pth").unlink()
    text = faults_of(folder)
    assert "consolidated.02.pth is missing: each shard holds 1/4" in text
    assert "consolidated.03.pth is missing" in text


def test_every_damaged_shard_is_listed(golden: Golden, tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "30B", golden, 4)
    files = sorted(folder.glob("*.pth"))
    files[0].write_bytes(files[0].read_bytes()[:-100])
    files[1].write_bytes(b"not a checkpoint")
    files[2].write_bytes(LEGACY + b"rest")
    torch.save({"x": [1, 2], "y": torch.ones(2)}, files[3])
    text = faults_of(folder)
    for expected in (
        "has 4 faults",
        "consolidated.00.pth is truncated",
        "consolidated.01.pth is no file of torch.save",
        "consolidated.02.pth is in the format that torch.save wrote before version 1.6",
        "consolidated.03.pth x is a list, not a tensor",
    ):
        assert expected in text


def test_shards_of_different_models_are_refused_tensor_by_tensor(golden: Golden, tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "13B", golden, 2)
    file = folder / "consolidated.01.pth"
    shard = torch.load(file, weights_only=True)
    shard["layers.0.attention.wv.weight"] = torch.ones(32, 60)
    del shard["output.weight"]
    torch.save(shard, file)
    text = faults_of(folder)
    assert "layers.0.attention.wv.weight cannot be joined along axis 0: the shards hold [32, 64], [32, 60]" in text
    assert "output.weight is missing in consolidated.01.pth" in text


def test_keys_of_another_model_and_other_shapes_are_listed_together(golden: Golden, tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "7B", golden, params={"n_layers": 4})
    file = folder / "consolidated.00.pth"
    shard = torch.load(file, weights_only=True)
    shard["layers.0.attention.wq.bias"] = torch.ones(64)
    shard["norm.weight"] = torch.ones(63)
    torch.save(shard, file)
    source = open_source(folder)
    model = llama(source)
    with pytest.raises(CheckpointError) as caught:
        check_names(source, {n: tuple(p.shape) for n, p in model.named_parameters()}, lambda name: False)
    text = str(caught.value)
    assert "model.layers.3.mlp.up_proj.weight is missing" in text
    assert "layers.0.attention.wq.bias is not part of the model" in text
    assert "model.norm.weight has shape [63], the model expects [64]" in text


@pytest.mark.parametrize(
    ("params", "texts"),
    [
        ({"use_scaled_rope": True, "n_kv_head": 2}, ["use_scaled_rope is not known", "Did you mean 'n_kv_heads'?"]),
        ({"dim": "64", "n_heads": 0}, ["dim must be a number, got '64'"]),
        ({"n_heads": 5, "n_kv_heads": 3}, ["dim 64 does not give each of 5 heads", "not a multiple of n_kv_heads 3"]),
    ],
)
def test_params_that_cannot_be_followed_are_refused_whole(
    params: dict[str, Any], texts: list[str], golden: Golden, tmp_path: Path
) -> None:
    with pytest.raises(ModelError) as caught:
        open_source(write_meta(tmp_path / "7B", golden, params=params))
    assert all(text in str(caught.value) for text in texts)


def test_a_folder_without_params_or_without_weights_says_what_lacks(golden: Golden, tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "7B", golden)
    content = (folder / "params.json").read_text()
    (folder / "params.json").unlink()
    with pytest.raises(ModelError, match=r"holds consolidated\.00\.pth, but no params\.json"):
        open_source(folder)
    (folder / "params.json").write_text(content)
    (folder / "consolidated.00.pth").unlink()
    with pytest.raises(ModelError, match=r"no consolidated\.NN\.pth"):
        open_source(folder)


def test_a_shard_that_would_run_code_is_refused_and_nothing_runs(golden: Golden, tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "7B", golden)
    torch.save({"norm.weight": Evil(tmp_path / "written")}, folder / "consolidated.00.pth")
    assert "is refused: it holds more than tensors, and reading that could run any code" in faults_of(folder)
    assert not (tmp_path / "written").exists()


# The tokenizer


def write_sentencepiece(path: Path) -> Any:
    """Train a small model with LLaMA's settings and return SentencePiece's own reader of it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 20), model_writer=written, vocab_size=340, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, unk_id=0, bos_id=1,
        eos_id=2, pad_id=-1, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    path.write_bytes(written.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


@pytest.mark.parametrize("place", ["7B", "."])
def test_tokenizer_model_beside_the_weights_or_one_folder_up_cuts_as_sentencepiece_does(
    place: str, golden: Golden, tmp_path: Path
) -> None:
    folder = write_meta(tmp_path / "7B", golden, tokenizer=False)
    original = write_sentencepiece(tmp_path / place / "tokenizer.model")
    for _ in range(2):  # converted, then from the cache
        tokenizer = load_tokenizer(folder)
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
        assert len(tokenizer) == original.get_piece_size()
        for text in (*PROBES, *TEXT, "", "a\tb  c", "  ", "😀 é"):
            assert tokenizer(text, add_special_tokens=False).input_ids == original.encode(text), text
            assert tokenizer.decode(original.encode(text)) == text
        assert tokenizer("red").input_ids == [1, *original.encode("red")]


def test_a_tokenizer_of_llama_3_is_led_to_tokenizer_json(golden: Golden, tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "7B", golden, tokenizer=False)
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(ModelError, match=r"no SentencePiece model.*tokenizer\.json"):
        load_tokenizer(folder)


def test_without_sentencepiece_the_command_to_install_it_is_named(
    golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_meta(tmp_path / "7B", golden, tokenizer=False)
    (folder / "tokenizer.model").write_bytes(b"\n\x0e")
    monkeypatch.setattr("lavintk.models.tokenizer.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install sentencepiece"):
        load_tokenizer(folder)


def test_a_damaged_tokenizer_model_is_an_error_of_its_own(golden: Golden, tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    folder = write_meta(tmp_path / "7B", golden, tokenizer=False)
    (folder / "tokenizer.model").write_bytes(b"\n\x0enonsense")
    with pytest.raises(ModelError, match=r"tokenizer\.model cannot be converted"):
        load_tokenizer(folder)


def test_a_folder_without_a_tokenizer_says_so(golden: Golden, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_tokenizer(write_meta(tmp_path / "models" / "7B", golden, tokenizer=False))

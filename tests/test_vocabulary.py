"""The quantized embedding and head, and the loss over blocks of the vocabulary, against torch's own operations."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from lavintk import load, train
from lavintk.contracts import Quantizer
from lavintk.data.batch import IGNORED
from lavintk.dense import DenseQuantizer
from lavintk.errors import ModelError
from lavintk.export import export_run
from lavintk.layers import FrozenLinear
from lavintk.merge import LANGUAGE, PlainModel
from lavintk.models import loss, vocabulary
from lavintk.models.build import build_outline
from lavintk.models.language import load_language_model, outline_language_model
from lavintk.models.loss import HeadBlock, cross_entropy_sum, head_blocks
from lavintk.models.multimodal import MultimodalModel
from lavintk.models.sources import open_source
from lavintk.models.vocabulary import QuantizedEmbedding, QuantizedHead, QuantizedTable, quantize_table
from lavintk.plugins import installed_plugins
from lavintk.recipe import make_recipe
from lavintk.registry import Choice
from lavintk.run import Run
from lavintk.testing.models import tiny_batch
from lavintk.testing.runs import recipe, write_everything
from lavintk.testing.tiny import VOCABULARY, write_language_model

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
needs_hqq = pytest.mark.skipif(importlib.util.find_spec("hqq") is None, reason="hqq is not installed")
QUANTIZERS = (
    "nf4", "nf4:block_size=128", "nf4:double_quant=false", "fp4", "int8", "int4", "int4:block_size=64", "none",
    *(pytest.param(choice, marks=needs_hqq) for choice in ("hqq", "hqq:bits=3", "hqq:bits=2,axis=0")),
)  # fmt: skip
WORDS, WIDTH, TOKENS = 301, 32, 23


def quantizer_of(choice: str) -> Quantizer:
    return installed_plugins().quantizers.create(Choice.parse(choice))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut tables of 300 words into several blocks, the last one shorter."""
    monkeypatch.setattr(vocabulary, "BLOCK_ROWS", 128)


# -- rows of frozen layers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [128, 192, 80])
@pytest.mark.parametrize("choice", QUANTIZERS)
def test_rows_are_those_of_the_unpacked_weight_bit_for_bit(choice: str, width: int, dtype: torch.dtype) -> None:
    layer = quantizer_of(choice).quantize(torch.randn(210, width) * torch.rand(210, 1), None)
    for index in (torch.tensor([3, 209, 0, 3, 77]), torch.randint(0, 210, (64,)), torch.zeros(0, dtype=torch.int64)):
        found = layer.rows(index, dtype)
        assert found.dtype == dtype
        assert torch.equal(found, layer.dequantize(dtype)[index])


# -- tables ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["nf4", "int8", "int4"])
def test_a_table_looks_up_and_multiplies_as_its_unpacked_weight_does(choice: str, small_blocks: None) -> None:
    weight = torch.randn(VOCABULARY, 64)
    table = quantize_table(vocabulary.pieces(weight), quantizer_of(choice))
    assert [block.out_features for block in table.blocks] == [128, 128, 44]
    assert table.shape == (VOCABULARY, 64)
    whole = table.dequantize(torch.float32)
    assert torch.equal(whole, torch.cat([block.dequantize() for block in table.blocks]))
    ids = torch.randint(0, VOCABULARY, (3, 17))
    ids[0, :4] = torch.tensor([0, 127, 128, VOCABULARY - 1])
    for dtype in DTYPES:
        found = QuantizedEmbedding(table, torch.float32).to(dtype)(ids)
        assert torch.equal(found, F.embedding(ids, table.dequantize(dtype)))
    states = torch.randn(5, 64)
    torch.testing.assert_close(QuantizedHead(table)(states), states @ whole.T)


def test_a_table_of_a_quantizer_that_takes_even_counts_only_says_what_is_wrong() -> None:
    with pytest.raises(ModelError, match=r"embedding and head cannot be stored as embed_quant says: .*odd"):
        quantize_table([torch.randn(3, 5)], quantizer_of("nf4"))


def language_model(folder: Path, choice: str | None, **settings: Any) -> Any:
    embed = None if choice is None else quantizer_of(choice)
    return load_language_model(
        open_source(str(folder)), DenseQuantizer(), device=CPU, dtype=torch.float32, embed_quantizer=embed, **settings
    )


@pytest.mark.parametrize("tied", [False, True])
def test_a_loaded_model_computes_with_the_unpacked_tables(tied: bool, tmp_path: Path, small_blocks: None) -> None:
    folder = write_language_model(tmp_path, tie_word_embeddings=tied)
    seen: list[tuple[int, int]] = []
    language = language_model(folder, "nf4", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    model = MultimodalModel(language).eval()
    assert (language.model.embed_tokens.table is language.lm_head.table) is tied
    assert set(model.tables()) == {f"language.{name}" for name in vocabulary.TABLES[: 1 if tied else 2]}
    assert not any("embed_tokens" in name or "lm_head" in name for name in model.linears() | model.frozen_parameters())
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    reference.model.embed_tokens.weight.data = language.model.embed_tokens.table.dequantize(torch.float32)
    reference.lm_head.weight.data = language.lm_head.table.dequantize(torch.float32)
    batch = tiny_batch(model, (0,))
    with torch.no_grad():
        logits = torch.cat([reference(ids[None]).logits[0] for ids in batch.input_ids.split(batch.lengths)])
        torch.testing.assert_close(model.logits(model.hidden(batch)), logits, atol=2e-5, rtol=1e-5)
        expected = F.cross_entropy(logits, batch.labels, reduction="sum", ignore_index=IGNORED)
        torch.testing.assert_close(model.loss_sum(batch), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_with_tables_reads_as_plain_tensors(tied: bool, tmp_path: Path, small_blocks: None) -> None:
    folder = write_language_model(tmp_path, tie_word_embeddings=tied)
    model = MultimodalModel(language_model(folder, "int8"))
    plain = PlainModel(model, "all")
    for name, table in model.tables().items():
        assert torch.equal(plain.read(name.removeprefix(LANGUAGE)), table.dequantize(torch.float32))
    dense = MultimodalModel(language_model(folder, None))
    assert model.frozen_shapes() == dense.frozen_shapes() == {n: tuple(p.shape) for n, p in dense._frozen.items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("choice", ["nf4", "int8", "int4", pytest.param("hqq", marks=needs_hqq)])
def test_an_outline_has_the_storage_of_the_loaded_model(
    choice: str, tied: bool, tmp_path: Path, small_blocks: None
) -> None:
    folder = write_language_model(tmp_path, tie_word_embeddings=tied)
    outline = outline_language_model(open_source(str(folder)), quantizer_of(choice))
    loaded = language_model(folder, choice)
    sizes = [
        {name: [buffer.nbytes for buffer in table.buffers()] for name, table in vocabulary.tables_of(model).items()}
        for model in (outline, loaded)
    ]
    assert sizes[0] == sizes[1]
    assert all(buffer.is_meta for table in vocabulary.tables_of(outline).values() for buffer in table.buffers())


def test_nf4_tables_take_about_four_bits_and_loading_never_holds_a_second_copy(tmp_path: Path) -> None:
    rows = 3 * vocabulary.BLOCK_ROWS + 8
    table = vocabulary.outline_table(rows, 4096, quantizer_of("nf4"))
    stored = sum(buffer.nbytes for buffer in table.buffers())
    assert 8 * stored / (rows * 4096) < 4.13
    whole, held = torch.zeros(1000, 64), []

    class Watching(DenseQuantizer):
        def quantize(self, weight: Tensor, bias: Tensor | None) -> Any:
            held.append(weight.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr())
            return super().quantize(weight, bias)

    quantize_table(vocabulary.pieces(whole), Watching())
    assert held == [True]  # rows are views of what was read


def test_a_head_that_is_stored_though_it_is_tied_is_not_looked_at(tmp_path: Path) -> None:
    folder = write_language_model(tmp_path, tie_word_embeddings=True)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": torch.zeros(VOCABULARY, 64)}, file, {"format": "pt"})
    language = language_model(folder, "int8")
    torch.testing.assert_close(
        language.lm_head.table.dequantize(torch.float32), tensors["model.embed_tokens.weight"], atol=2e-3, rtol=0
    )


def test_a_head_with_a_bias_is_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_language_model(tmp_path))
    model.lm_head = nn.Linear(64, VOCABULARY)
    with pytest.raises(ModelError, match="a head with a bias, which embed_quant cannot store"):
        vocabulary.check_plain(model)


# -- the loss ----------------------------------------------------------------------------------------------------------


def dense_head(words: int, dtype: torch.dtype, bias: bool = False) -> nn.Linear:
    head = nn.Linear(WIDTH, words, bias=bias, dtype=dtype).requires_grad_(False)
    nn.init.normal_(head.weight, std=0.5)
    return head


def table_head(words: int, dtype: torch.dtype) -> QuantizedHead:
    return QuantizedHead(quantize_table(vocabulary.pieces(torch.randn(words, WIDTH) * 0.5), quantizer_of("nf4")))


def unpacked(head: nn.Module) -> Tensor:
    return head.table.dequantize(torch.float32) if isinstance(head, QuantizedHead) else head.weight.float()


def states_and_labels(words: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, words, (TOKENS,))
    labels[[0, 5, 22]] = IGNORED
    labels[1:3] = torch.tensor([0, words - 1])
    return torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True), labels


def expected_loss(head: nn.Module, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return loss and gradient of torch's own cross entropy in fp64."""
    wide = states.detach().double().requires_grad_(True)
    bias = getattr(head, "bias", None)
    logits = F.linear(wide, unpacked(head).double(), None if bias is None else bias.double())
    total = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
    return total.detach(), torch.autograd.grad(total, wide)[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("words", [1, 97, 128, WORDS])
@pytest.mark.parametrize("make", [dense_head, table_head])
def test_loss_and_gradient_are_those_of_cross_entropy(
    make: Callable[[int, torch.dtype], nn.Module], words: int, dtype: torch.dtype, tolerance: float,
    small_blocks: None, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(loss, "DENSE_BLOCK", 128)
    head = make(words, dtype)
    states, labels = states_and_labels(words, dtype)
    blocks = head_blocks(head)
    assert blocks is not None
    assert len(blocks) == -(-words // 128)
    found = cross_entropy_sum(states, labels, blocks, 8)
    (2.5 * found).backward()
    wanted, gradient = expected_loss(head, states, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=1e-4)
    assert states.grad is not None
    assert states.grad.dtype == dtype
    error = torch.linalg.vector_norm(states.grad.double() - 2.5 * gradient)
    assert error <= 2 * tolerance * torch.linalg.vector_norm(2.5 * gradient) + 1e-12
    assert not states.grad[labels == IGNORED].any()
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy_sum(states, labels, blocks, 8), found.detach(), rtol=0, atol=0)


def test_a_bias_of_the_head_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "DENSE_BLOCK", 100)
    head = dense_head(WORDS, torch.float32, bias=True)
    states, labels = states_and_labels(WORDS, torch.float32)
    blocks = head_blocks(head)
    assert blocks is not None
    found = cross_entropy_sum(states, labels, blocks, 8)
    wanted, gradient = expected_loss(head, states, labels)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(torch.autograd.grad(found, states)[0].double(), gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("words", [97, WORDS])
@pytest.mark.parametrize("tokens", [0, 11])
def test_without_a_label_loss_and_gradient_are_zero(tokens: int, words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "DENSE_BLOCK", 128)
    states = torch.randn(tokens, WIDTH, requires_grad=True)
    blocks = head_blocks(dense_head(words, torch.float32))
    assert blocks is not None
    found = cross_entropy_sum(states, torch.full((tokens,), IGNORED), blocks, 8)
    found.backward()
    assert found.item() == 0
    assert states.grad is not None
    assert not states.grad.any()


@pytest.mark.parametrize("block", [64, WORDS])
def test_gradients_in_fp16_survive_until_the_loss_is_scaled(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probabilities of a sure model are below what fp16 holds, and only those move the second half of the states."""
    monkeypatch.setattr(loss, "DENSE_BLOCK", block)
    head = dense_head(WORDS, torch.float16)
    head.weight[:, : WIDTH // 2], head.weight[:, WIDTH // 2 :] = 0, 0.5
    head.weight[7] = torch.tensor([17 / (WIDTH // 2), 0]).repeat_interleave(WIDTH // 2)
    states = torch.tensor([1.0, 0]).repeat_interleave(WIDTH // 2).half().repeat(4, 1).requires_grad_(True)
    labels = torch.full((4,), 7)
    blocks = head_blocks(head)
    assert blocks is not None
    (65536 * cross_entropy_sum(states, labels, blocks, 2)).backward()  # as a gradient scaler does
    _, gradient = expected_loss(head, states, labels)
    assert states.grad is not None
    found, wanted = (tensor[:, WIDTH // 2 :].double() for tensor in (states.grad, gradient))
    assert wanted.abs().max() / WORDS < 2.0**-24
    torch.testing.assert_close(found / 65536, wanted, rtol=0.01, atol=0)


def test_no_more_logits_exist_than_of_a_chunk_and_a_block() -> None:
    sizes = []

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (result if isinstance(result, tuple) else (result,)) if torch.is_tensor(t))
            return result

    weight = torch.randn(WORDS, 4)
    blocks = [HeadBlock(len(part), part.to) for part in weight.split(64)]
    states = torch.randn(TOKENS, 4, requires_grad=True)
    with Watching():
        cross_entropy_sum(states, torch.randint(0, WORDS, (TOKENS,)), blocks, 8).backward()
    assert max(sizes) == 8 * 64


def test_a_head_that_is_trained_or_watched_takes_the_plain_way() -> None:
    head = dense_head(WORDS, torch.float32)
    assert head_blocks(head) is not None
    handle = head.register_forward_hook(lambda module, arguments, output: output)
    assert head_blocks(head) is None
    handle.remove()
    assert head_blocks(head.requires_grad_(True)) is None
    assert head_blocks(nn.Sequential(head)) is None


# -- from training to export -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("embed", ["nf4", "int4"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_run_with_quantized_tables_trains_answers_and_exports(
    embed: str, tied: bool, tmp_path: Path, small_blocks: None
) -> None:
    files = write_everything(tmp_path)
    write_language_model(files / "llm", tie_word_embeddings=tied)
    content = {**recipe(files, max_steps=3), "quant": embed, "embed_quant": embed}
    run = train(content, tmp_path / "run")
    answer = run.generate("what color is red?", max_new_tokens=6)
    again = load(tmp_path / "run")
    assert again.generate("what color is red?", max_new_tokens=6) == answer
    for name, options in (("fp32", {"quant": "fp32"}), ("int4", {"quant": "int4", "calibrate": 0})):
        # verified against the run: any fault raises
        export_run(Run.open(tmp_path / "run"), Choice("onnx", options), tmp_path / name)
        written = json.loads((tmp_path / name / "lavintk_export.json").read_text())
        assert written["quant"]["embed"] == ("fp32" if name == "fp32" else "int4" if embed == "int4" else "int8")
    export_run(Run.open(tmp_path / "run"), Choice("hf", {"dtype": "fp32"}), tmp_path / "hf")
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    for name, table in again.assembly.model.tables().items():
        assert torch.equal(stored[name.removeprefix(LANGUAGE)], table.dequantize(torch.float32))
    assert ("lm_head.weight" in stored) is not tied
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    batch = tiny_batch(again.assembly.model, (0,))
    with torch.no_grad():
        found = again.assembly.model.logits(again.assembly.model.hidden(batch)).split(batch.lengths)
        for ids, logits in zip(batch.input_ids.split(batch.lengths), found):
            torch.testing.assert_close(reference(ids[None]).logits[0], logits, atol=1e-4, rtol=1e-4)


def test_exporters_know_how_much_room_the_tables_take(tmp_path: Path) -> None:
    files = write_everything(tmp_path)
    outlines = [
        build_outline(make_recipe(recipe(files), {"embed_quant": embed}), installed_plugins())[0]
        for embed in ("none", "nf4")
    ]
    assert outlines[0].frozen_shapes() == outlines[1].frozen_shapes()
    assert not outlines[0].tables()
    for table in outlines[1].tables().values():
        assert isinstance(table, QuantizedTable)
        assert all(isinstance(block, FrozenLinear) for block in table.blocks)

"""The language model against transformers' own forward pass, for every supported architecture."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lavintk.data.batch import IGNORED, Batch
from lavintk.dense import DenseQuantizer
from lavintk.generate import generate_tokens
from lavintk.models.attention import KeyValueCache
from lavintk.models.language import LANGUAGE_TYPES, load_language_model
from lavintk.models.multimodal import MultimodalModel
from lavintk.models.sources import open_source
from lavintk.testing.tiny import VOCABULARY, write_language_model

LENGTHS = (9, 4, 13)


def load(folder: Path) -> MultimodalModel:
    source = open_source(str(folder))
    language = load_language_model(source, DenseQuantizer(), device=torch.device("cpu"), dtype=torch.float32)
    return MultimodalModel(language).eval()


def rows_batch(rows: list[torch.Tensor]) -> Batch:
    ids = torch.cat(rows)
    labels = torch.cat([torch.cat([row[1:], torch.tensor([IGNORED])]) for row in rows])
    return Batch(
        ids, labels, torch.cat([torch.arange(len(r)) for r in rows]), tuple(len(r) for r in rows),
        torch.zeros(len(rows), dtype=torch.int64), None, torch.zeros(0, dtype=torch.int64),
        tuple(str(i) for i in range(len(rows))),
    )  # fmt: skip


@pytest.fixture(scope="module", params=LANGUAGE_TYPES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCABULARY, (n,), generator=generator) for n in LENGTHS]


def test_rows_laid_end_to_end_give_the_logits_of_each_row_alone(folder: Path, rows: list[torch.Tensor]) -> None:
    model, reference = load(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found = model.logits(model.hidden(rows_batch(rows))).split(LENGTHS)
        for row, logits in zip(rows, found):
            torch.testing.assert_close(logits, reference(row[None]).logits[0], atol=2e-5, rtol=1e-5)


def test_the_loss_is_that_of_transformers(folder: Path, rows: list[torch.Tensor]) -> None:
    model, reference = load(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = sum(reference(row[None], labels=row[None]).loss * (len(row) - 1) for row in rows)
        torch.testing.assert_close(model.loss_sum(rows_batch(rows)), expected, atol=1e-4, rtol=1e-5)


def test_decoding_from_the_cache_gives_the_logits_of_a_full_pass(folder: Path, rows: list[torch.Tensor]) -> None:
    model = load(folder)
    prompts = [row[:-3] for row in rows]
    cache = KeyValueCache(len(rows), max(LENGTHS), torch.device("cpu"))
    with torch.no_grad():
        full = model.logits(model.hidden(rows_batch(rows))).split(LENGTHS)
        model.hidden(rows_batch(prompts), cache)
        for step in range(3):
            fed = torch.stack([row[len(prompt) + step] for row, prompt in zip(rows, prompts)])
            logits = model.logits(model.decode(fed, torch.zeros(len(rows), dtype=torch.int64), cache))
            expected = torch.stack([f[len(p) + step] for f, p in zip(full, prompts)])
            torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)


def test_greedy_generation_equals_transformers(folder: Path, rows: list[torch.Tensor]) -> None:
    model, reference = load(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    steps = list(generate_tokens(model, rows_batch(rows), max_new_tokens=8, stop=frozenset()))
    for index, row in enumerate(rows):
        mask = torch.ones_like(row)[None]
        expected = reference.generate(
            row[None], attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert [step[index] for step in steps] == expected[0, len(row) :].tolist()


def test_rows_stop_on_their_own(folder: Path, rows: list[torch.Tensor]) -> None:
    model = load(folder)
    free = list(generate_tokens(model, rows_batch(rows), max_new_tokens=6, stop=frozenset()))
    stop = free[1][0]
    assert stop is not None
    stopped = list(generate_tokens(model, rows_batch(rows), max_new_tokens=6, stop=frozenset({stop})))
    for index in range(len(rows)):
        whole = [step[index] for step in free]
        end = whole.index(stop) + 1 if stop in whole else len(whole)
        assert [s[index] for s in stopped if s[index] is not None] == whole[:end]


def test_weights_are_rounded_once_to_the_type_of_training_and_then_to_that_of_computing(tmp_path: Path) -> None:
    folder = write_language_model(tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][:3] = torch.tensor([65504.0, 1.00049, 1e-6])  # rounded twice, the first is infinite
    save_file(tensors, file, {"format": "pt"})
    model = load_language_model(
        open_source(folder), DenseQuantizer(), device=torch.device("cpu"), dtype=torch.bfloat16,
        trained_in=torch.float16,
    )  # fmt: skip
    found = model.state_dict()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.half().bfloat16()), name


@pytest.mark.parametrize("checkpointing", [True, 1])
def test_recomputed_layers_give_the_same_gradients(
    folder: Path, rows: list[torch.Tensor], checkpointing: bool | int
) -> None:
    results = []
    for setting in (False, checkpointing):
        model = load(folder).train()
        model.checkpointing = setting
        runs, real = [], model.recompute
        model.recompute = lambda run, layer, hidden: (runs.append(layer), real(run, layer, hidden))[1]  # noqa: B023
        embedding = model.language.model.embed_tokens.weight.requires_grad_(True)
        loss = model.loss_sum(rows_batch(rows))
        loss.backward()
        assert len(runs) == (len(model.layers) if setting is True else int(setting))
        results.append((loss, embedding.grad))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)

"""Exported folders without torch: prompts, logits and answers are those of the torch model, alone and in batches."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lavintk.answer import Answerer
from lavintk.answering import pieces_of
from lavintk.chat import Conversation
from lavintk.data.batches import collate
from lavintk.data.records import Message, Record
from lavintk.data.template import make_template
from lavintk.errors import DataError, LavintkError, ModelError, OutOfMemoryError
from lavintk.models.build import Assembly, build
from lavintk.plugins import installed_plugins
from lavintk.recipe import make_recipe
from lavintk.runtime import ExportedModel, is_export, load
from lavintk.runtime.decoder import padded
from lavintk.runtime.sampling import make_sampler
from lavintk.runtime.tokenizer import ExportedTokenizer
from lavintk.sampling import Sampling
from lavintk.testing import Outcome
from lavintk.testing.runs import multimodal, recipe
from lavintk.testing.tiny import CHAT_TEMPLATE, write_tokenizer
from tests.test_chat import kept_by_formula
from tests.tiny_export import Graph, copy_of, see_through_the_matrix, value, write_export

RunCli = Callable[..., Outcome]
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
QUESTIONS = ["what color is it?", "is there a blue circle?", "red?", "what is the shape of this, and what color?", "a"]


def changed(assembly: Assembly) -> Assembly:
    """Return the model with an adapter that changes what it says."""
    generator = torch.Generator().manual_seed(1)
    assert assembly.model.adapter is not None
    with torch.no_grad():
        for _, parameter in assembly.model.adapter.named_parameters():
            parameter.normal_(std=0.1, generator=generator)
    assembly.model.eval()
    return assembly


@pytest.fixture(scope="module")
def blind(tiny_folder: Path) -> Assembly:
    """A text model with LoRA, one decoder for all."""
    return changed(build(make_recipe(recipe(tiny_folder)), installed_plugins(), CPU, torch.float32))


@pytest.fixture(scope="module")
def seeing(tiny_folder: Path) -> Assembly:
    """A model with LaVIN's adapters, which are others for text than for images, and the eyes of the exported graph."""
    assembly = changed(build(make_recipe(multimodal(tiny_folder)), installed_plugins(), CPU, torch.float32))
    see_through_the_matrix(assembly)
    return assembly


@pytest.fixture(scope="module")
def text_folder(blind: Assembly, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("exports") / "text", blind)


@pytest.fixture(scope="module")
def image_folder(seeing: Assembly, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {
        "data": {"name": "jsonl", "path": str(tiny_folder / "mixed.jsonl")},
        "split": "test", "name": "exact-match", "max_new_tokens": 5,
    }  # fmt: skip
    return write_export(tmp_path_factory.mktemp("exports") / "image", seeing, settings)


@pytest.fixture(scope="module")
def text_model(text_folder: Path) -> ExportedModel:
    return load(text_folder, threads=1)


@pytest.fixture(scope="module")
def image_model(image_folder: Path) -> ExportedModel:
    return load(image_folder, threads=1)


def asked(text: str, name: str = "q", *images: Path) -> Record:
    return Record(name, (Message("user", text),), images)


def answered(text: str, answer: str, *images: Path) -> Record:
    return Record("r", (Message("user", text), Message("assistant", answer)), images)


def mixed(folder: Path) -> list[Record]:
    """Return questions of different lengths, every other one about an image, one about two."""
    records = [asked(text, str(i), *[folder / f"{i}.png"] * (i % 2)) for i, text in enumerate(QUESTIONS)]
    return [*records, asked("<image>what is<image>this?", "two", folder / "1.png", folder / "2.png")]


def torch_logits(assembly: Assembly, record: Record) -> Any:
    batch = collate([assembly.template.tokenize_record(record)], assembly.images)
    with torch.no_grad():
        return assembly.model.logits(assembly.model.hidden(batch)).numpy()


# Without torch


def test_a_folder_answers_without_torch_and_transformers(image_folder: Path, tiny_folder: Path) -> None:
    code = (
        "import sys; from lavintk.runtime import load; from lavintk.cli import main\n"
        "model = load(sys.argv[1]); said = model.generate('what color?', sys.argv[2], max_new_tokens=4)\n"
        "print(len(said), len(model.generate('what color?', max_new_tokens=4)))\n"
        "assert main(['eval', sys.argv[1], '--max-new-tokens', '2']) == 0\n"
        "assert main(['bench', sys.argv[1], '--prompt-tokens', '4', '--new-tokens', '2', '--repeats', '1']) == 0\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(image_folder), str(tiny_folder / "1.png")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


# Prompts

RECORDS = [
    answered("what color is it?", "red"),
    asked("is there\n a blue  circle? "),
    Record("s", (Message("system", "be brief"), Message("user", "red?"), Message("assistant", "no"),
                 Message("user", "naïve 漢字 🙂?"), Message("assistant", "yes"))),
]  # fmt: skip
FUSSY = (
    "{{ bos_token }}{%- for m in messages %}\n"
    "{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}\n"
    "    {% if loop.index > 6 %}{% break %}{% endif %}\n"
    "[{{ m.role | upper }}] {% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ m.content | trim }} {{ {'a': '<ü>'} | tojson }}{% endif %}\n"
    "{% endfor %}{{ strftime_now('%Y') }}{{ tools is none }}{% if add_generation_prompt %}[ASSISTANT] {% endif %}"
)


@pytest.mark.parametrize("kind", ["chat", "plain", "lavin", "file"])
@pytest.mark.parametrize("images", [0, 1, 2])
def test_prompts_and_rows_are_those_of_training(
    text_folder: Path, tiny_folder: Path, tmp_path: Path, kind: str, images: int
) -> None:
    if kind == "file":
        kind = str(tmp_path / "other.jinja")
        Path(kind).write_text(FUSSY)
    theirs, ours = (
        make_template(tokenizer, kind, visual_tokens=3)
        for tokenizer in (AutoTokenizer.from_pretrained(text_folder), ExportedTokenizer.from_folder(text_folder))
    )
    assert theirs.stop_ids == ours.stop_ids
    for record in RECORDS:
        record = replace(record, images=(tiny_folder / "1.png",) * images)
        rows: list[Any] = []
        for template in (theirs, ours):
            try:
                rows.append((template.prompt(record), template.tokenize_record(record)))
            except DataError as error:  # FUSSY takes no system message
                rows.append(str(error))
        assert rows[0] == rows[1]


@pytest.mark.parametrize("settings", [{}, {"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}])
def test_bos_and_eos_stand_where_transformers_puts_them(tmp_path: Path, settings: dict[str, bool]) -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "red": 3}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    make: Any = PreTrainedTokenizerFast
    make(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **settings).save_pretrained(
        tmp_path
    )
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), ExportedTokenizer.from_folder(tmp_path)
    for add in (True, False):
        assert ours("red red", add_special_tokens=add) == {
            "input_ids": theirs("red red", add_special_tokens=add)["input_ids"]
        }
    assert (ours.bos_token_id, ours.eos_token_id, ours.chat_template) == (1, 2, None)
    assert ours.decode([1, 3, 2], skip_special_tokens=True) == theirs.decode([1, 3, 2], skip_special_tokens=True)
    assert {id: str(token) for id, token in ours.added_tokens_decoder.items()} == {
        id: str(token) for id, token in theirs.added_tokens_decoder.items()
    }


def test_a_template_is_found_in_either_file(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    assert ExportedTokenizer.from_folder(tmp_path).chat_template == CHAT_TEMPLATE
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ 1 }}"}))
    ours = ExportedTokenizer.from_folder(tmp_path)
    assert ours.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "1"


def test_pixels_are_those_of_training(seeing: Assembly, image_model: ExportedModel, tiny_folder: Path) -> None:
    assert seeing.images is not None
    assert image_model.images == seeing.images
    path = tiny_folder / "2.png"
    np.testing.assert_array_equal(seeing.images(path).numpy(), seeing.images.pixels(path))


# Logits and answers


def test_logits_of_a_text_model_are_torchs(blind: Assembly, text_model: ExportedModel) -> None:
    records = [answered(text, "blue circle") for text in QUESTIONS]
    together = text_model.logits_batch(records)
    for record, logits in zip(records, together, strict=True):
        expected = torch_logits(blind, record)
        np.testing.assert_allclose(logits, expected, atol=5e-5)
        np.testing.assert_allclose(text_model.logits(record), expected, atol=5e-5)


def test_each_modality_has_its_own_decoder(seeing: Assembly, image_model: ExportedModel, tiny_folder: Path) -> None:
    texts = [answered(text, "blue circle") for text in QUESTIONS]
    pictures = [replace(record, images=(tiny_folder / f"{i + 1}.png",)) for i, record in enumerate(texts)]
    records = [record for pair in zip(texts, pictures, strict=True) for record in pair]
    for record, logits in zip(records, image_model.logits_batch(records), strict=True):
        np.testing.assert_allclose(logits, torch_logits(seeing, record), atol=5e-5)
    other = ExportedModel(
        replace(image_model.manifest, decoders=dict.fromkeys(["all"], image_model.manifest.decoders["image"])),
        image_model._opener,
    )
    assert np.abs(other.logits(texts[0]) - image_model.logits(texts[0])).max() > 1e-2


@pytest.mark.parametrize("batch_size", [1, 4])
def test_greedy_answers_are_torchs_one_by_one_and_in_a_batch(
    seeing: Assembly, image_folder: Path, tiny_folder: Path, batch_size: int
) -> None:
    model = load(image_folder, threads=1, batch_size=batch_size)
    records = mixed(tiny_folder)
    expected = Answerer(seeing, 1).answer_ids(records, max_new_tokens=24)
    assert model.answer_ids(records, max_new_tokens=24) == expected
    assert model.answer(records, max_new_tokens=24) == Answerer(seeing, 3).answer(records, max_new_tokens=24)


def test_the_cache_in_place_gives_the_logits_of_a_cache_that_is_copied(text_model: ExportedModel) -> None:
    rows = [text_model.template.prompt(asked(text)) for text in QUESTIONS]
    decoder = text_model.decoder_of(rows[0])
    lengths = np.array([len(row) for row in rows])
    cache = decoder.cache(len(rows), int(lengths.max()) + 6)
    ids, _ = padded([row.input_ids for row in rows])
    first = cache.prefill(ids, lengths)
    buffers = {name: buffer.__array_interface__["data"] for name, buffer in cache._buffers.items()}
    sequences = [list(row.input_ids) for row in rows]
    past = {
        name: np.zeros((len(rows), entry.shape[1], 0, entry.shape[3]), np.float32)
        for name, entry in decoder.past.items()
    }
    names = [output.name for output in decoder.session.get_outputs()]

    def copied(fed: Any, total: Any) -> Any:
        mask = (np.arange(total.max()) < total[:, None]).astype(np.int64)
        found = decoder.session.run(None, {"input_ids": fed, "attention_mask": mask, **past})
        outputs = dict(zip(names, found, strict=True))
        past.update({name: outputs[name.replace("past_key_values", "present")] for name in past})
        return outputs["logits"]

    np.testing.assert_array_equal(first, copied(ids, lengths)[np.arange(len(rows)), lengths - 1])
    for token in range(40, 46):
        for sequence in sequences:
            sequence.append(token)
        cache.tokens[:] = token
        logits = cache.step(np.ones(len(rows), np.bool_))
        expected = copied(np.full((len(rows), 1), token), np.array([len(s) for s in sequences]))
        np.testing.assert_array_equal(logits, expected[:, 0])
    assert buffers == {name: buffer.__array_interface__["data"] for name, buffer in cache._buffers.items()}


def test_a_prompt_of_one_token_is_answered_beside_longer_ones(text_model: ExportedModel) -> None:
    rows = [replace(text_model.template.prompt(asked("red?")).cut(length), id=str(length)) for length in (1, 7, 1, 3)]
    alone = [list(text_model.steps([row], 6)) for row in rows]
    together = list(text_model.steps(rows, 6))
    for place, steps in enumerate(alone):
        assert [step[0] for step in steps] == [step[place] for step in together]
    first = text_model.row_logits([rows[0]])[0]
    assert alone[0][0] == [int(first[-1].argmax())]


@pytest.mark.parametrize("most", [1, 4, 9])
def test_long_prompts_are_read_in_parts_and_short_ones_together(
    text_model: ExportedModel, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    rows = [text_model.template.prompt(asked(text)) for text in QUESTIONS]
    decoder = text_model.decoder_of(rows[0])
    ids, lengths = padded([row.input_ids for row in rows])
    whole, parts = (decoder.cache(len(rows), int(lengths.max()) + 1) for _ in range(2))
    expected = whole.prefill(ids, lengths)
    monkeypatch.setattr("lavintk.runtime.decoder.PREFILL_TOKENS", most)
    np.testing.assert_allclose(parts.prefill(ids, lengths), expected, atol=2e-5)
    for name, buffer in parts._buffers.items():
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(buffer[row, :, :length], whole._buffers[name][row, :, :length], atol=1e-5)


def test_a_row_that_has_stopped_changes_no_other(text_model: ExportedModel) -> None:
    rows = [text_model.template.prompt(asked(text)) for text in QUESTIONS]
    free = list(text_model.steps(rows, 12))
    stop = free[2][0]
    assert stop is not None
    stopped = list(text_model.steps(rows, 12, stop=frozenset({stop})))
    for row in range(len(rows)):
        without = [step[row] for step in free]
        end = without.index(stop) + 1 if stop in without else len(without)
        shown = [step[row] for step in stopped]
        assert shown[:end] == without[:end]
        assert all(token is None for token in shown[end:])


def test_an_answer_ends_where_the_model_can_read_no_further(
    text_model: ExportedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [text_model.template.prompt(asked(text)) for text in QUESTIONS]
    longest = max(map(len, rows))
    free = list(text_model.steps(rows, 12))
    monkeypatch.setattr(text_model, "manifest", replace(text_model.manifest, context_length=longest + 3))
    limited = list(text_model.steps(rows, 12))
    for place, row in enumerate(rows):
        room = longest + 3 - len(row) + 1  # the last token need not be read
        said = [step[place] for step in limited if step[place] is not None]
        assert said == [step[place] for step in free][:room]
    monkeypatch.setattr(text_model, "manifest", replace(text_model.manifest, context_length=longest - 1))
    with pytest.raises(DataError, match=rf"{longest} tokens, the model reads at most {longest - 1}"):
        text_model.answer([asked(text) for text in QUESTIONS], max_new_tokens=2)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_log_likelihoods_are_torchs(
    seeing: Assembly, image_folder: Path, tiny_folder: Path, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(image_folder, threads=1, batch_size=batch_size)
    records = mixed(tiny_folder)
    completions = [["red", "is there a blue circle?"], ["yes", "no", "what"], ["a"], ["b"], ["red", "blue"], ["no"]]
    expected = Answerer(seeing, 2).log_likelihoods(records, completions)
    monkeypatch.setattr("lavintk.runtime.model.LOGIT_BYTES", 50_000)  # a row or two at a time
    found = model.log_likelihoods(records, completions)
    for ours, theirs in zip(found, expected, strict=True):
        assert [one.tokens for one in ours] == [one.tokens for one in theirs]
        assert [one.total for one in ours] == pytest.approx([one.total for one in theirs], abs=1e-4)


def test_visual_tokens_of_an_image_are_computed_once(
    image_folder: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(image_folder)
    looked: list[tuple[int, ...]] = []
    see = model.see

    def seen(pixels: Any) -> Any:
        looked.append(pixels.shape)
        return see(pixels)

    monkeypatch.setattr(model, "see", seen)
    for _ in range(2):
        model.answer(mixed(tiny_folder), max_new_tokens=2)
    assert looked == [(1, 3, 28, 28)] * 3  # 1.png, 3.png and 2.png
    monkeypatch.setattr("lavintk.runtime.model.REMEMBERED_IMAGES", 1)
    model.answer(mixed(tiny_folder), max_new_tokens=2)
    assert len(model._seen) <= 4


# Sampling, stop texts, pieces


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 0.75), (1.3, 4, 1.0), (2.0, 6, 0.5), (1.0, 1, 0.9)]
)
def test_tokens_are_drawn_with_the_probabilities_of_the_formula(temperature: float, top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(1).normal(size=12) * 1.5
    expected = kept_by_formula(logits, temperature, top_k, top_p)
    count = 10_000
    drawn = make_sampler(Sampling(temperature, top_p, top_k, seed=3))(np.tile(logits.astype(np.float32), (count, 1)))
    shares = np.bincount(drawn, minlength=12) / count
    assert set(np.flatnonzero(shares)) <= set(np.flatnonzero(expected))
    np.testing.assert_allclose(shares, expected, atol=4 * np.sqrt(0.25 / count))


def test_a_seed_gives_the_same_answer_again_and_another_seed_another(text_model: ExportedModel) -> None:
    def say(seed: int) -> str:
        return text_model.generate("red?", max_new_tokens=20, sampling=Sampling(5.0, seed=seed))

    assert say(1) == say(1)
    assert say(1) != say(2)


def test_streamed_pieces_make_up_the_answer(text_model: ExportedModel) -> None:
    for text in QUESTIONS:
        pieces = list(text_model.stream(asked(text), max_new_tokens=16))
        assert "".join(pieces) == text_model.answer([asked(text)], max_new_tokens=16)[0]
        assert all(pieces)


def test_an_answer_ends_in_front_of_a_stop_text(text_model: ExportedModel) -> None:
    whole = text_model.generate("what color is it?", max_new_tokens=30)
    assert len(whole) > 8
    stop = whole[5:8]
    assert text_model.generate("what color is it?", max_new_tokens=30, stop=[stop, "never said"]) == (
        whole[: whole.index(stop)].strip()
    )


@pytest.mark.parametrize(
    ("texts", "stop", "pieces"),
    [
        (["a", "ab", "abc"], [], ["a", "b", "c"]),
        (["a", "ab", "abX", "abXY", "abXYc"], ["XY"], ["a", "b"]),
        (["a", "aX", "aXc"], ["XY"], ["a", "Xc"]),
        (["a", "aX"], ["XY"], ["a", "X"]),
        (["a", "a\N{REPLACEMENT CHARACTER}", "aé"], [], ["a", "é"]),
        (["a", "a\N{REPLACEMENT CHARACTER}"], [], ["a", "\N{REPLACEMENT CHARACTER}"]),
        ([" ", " a", " a ", " a b "], [], ["a", " b"]),
        (["a", "a\n", "a\n\n", "a\n\nb"], ["\n\n"], ["a"]),
        (["XY"], ["Y", "XY", ""], []),
        ([], ["X"], []),
    ],
)
def test_pieces_hold_back_what_may_become_a_stop_text(texts: list[str], stop: list[str], pieces: list[str]) -> None:
    assert list(pieces_of(texts, stop)) == pieces


def test_nothing_more_is_generated_once_a_stop_text_is_there() -> None:
    taken = []

    def texts() -> Iterator[str]:
        for text in ("a", "aX", "aXb", "never"):
            taken.append(text)
            yield text

    assert list(pieces_of(texts(), ["X"])) == ["a"]
    assert taken == ["a", "aX"]


# Conversations and commands


def test_a_conversation_says_what_torch_says(seeing: Assembly, image_model: ExportedModel, tiny_folder: Path) -> None:
    said = []
    for model in (seeing, image_model):
        conversation = Conversation(model, max_new_tokens=6)
        answers = ["".join(conversation.ask("red?"))]
        conversation.show(tiny_folder / "1.png")
        answers += ["".join(conversation.ask(text)) for text in ("what color?", "is it red?")]
        said.append(answers)
    assert said[0] == said[1]


def test_chat_talks_with_a_folder(image_folder: Path, tiny_folder: Path, run_cli: RunCli, monkeypatch: Any) -> None:
    picture = tiny_folder / "2.png"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"what color?\n/image {picture}\nred?\n"))
    settings = ["--temperature", "0", "--max-new-tokens", "5", "--threads", "1", "--device", "cpu"]
    outcome = run_cli("chat", str(image_folder), *settings)
    assert outcome.exit_code == 0, outcome.stderr
    conversation = Conversation(load(image_folder), max_new_tokens=5)
    first = "".join(conversation.ask("what color?"))
    conversation.show(picture)
    assert outcome.stdout == f"{first}\n{''.join(conversation.ask('red?'))}\n"


def test_eval_scores_a_folder_on_the_recipes_data(
    image_folder: Path, image_model: ExportedModel, tiny_folder: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    answers = tmp_path / "answers.jsonl"
    outcome = run_cli("eval", str(image_folder), "--json", "--save-predictions", str(answers), "--batch-size", "3")
    assert outcome.exit_code == 0, outcome.stderr
    assert json.loads(outcome.stdout)["questions"] == 8
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["record_id"] for row in rows] == [f"row{i}" for i in range(8)]
    pictured = asked("what color is the shape?", "x", tiny_folder / "1.png")
    assert rows[1]["answer"] == image_model.answer([pictured], max_new_tokens=5)[0]
    other = run_cli("eval", str(image_folder), "--data", f"alpaca:{tiny_folder / 'alpaca.json'}", "--json")
    assert json.loads(other.stdout)["questions"] == 8


def test_bench_measures_a_folder(image_folder: Path, run_cli: RunCli) -> None:
    settings = [
        "--prompt-tokens",
        "6",
        "--new-tokens",
        "4",
        "--batch",
        "2",
        "--repeats",
        "2",
        "--threads",
        "1",
        "--no-spinning",
    ]
    figures = json.loads(run_cli("bench", str(image_folder), *settings, "--json").stdout)
    assert (figures["modality"], figures["threads"], figures["spinning"]) == ("text", 1, False)
    assert all(figures[name] > 0 for name in figures if name.endswith(("seconds", "per_second", "bytes")))
    assert set(figures["sizes"]) == {
        f"onnx/{name}.onnx" for name in ("decoder_model_merged", "decoder_text", "embed_tokens", "vision_encoder")
    }
    outcome = run_cli("bench", str(image_folder), *settings, "--modality", "image")
    assert re.search(r"^decode +[\d,.]+ tokens/s$", outcome.stdout, re.MULTILINE)
    assert re.search(r"^peak memory +[\d,]+ MB", outcome.stdout, re.MULTILINE)
    assert re.search(r"^  onnx/embed_tokens.onnx  [\d.]+ kB$", outcome.stdout, re.MULTILINE)
    assert " 0.0 MB" not in outcome.stdout.split("folder", 1)[1]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["bench", "TEXT", "--modality", "image"], "no decoder for 'image', only for all"),
        (["bench", "TEXT", "--prompt-tokens", "300"], "prompt and answer have 428 tokens, the model reads at most 256"),
        (["bench", "RUNS"], "has no lavintk_export.json, so it is no exported folder"),
        (["bench", "RUNS/none"], "does not exist, so it is no exported folder"),
        (["eval", "TEXT"], "the exported folder names no test data"),
        (["eval", "TEXT", "--max-new-tokens", "0", "--data", "alpaca:x"], "max_new_tokens must be at least 1"),
        (["chat", "TEXT", "--device", "tpu"], "'tpu' is not a device; use auto, cpu, cuda or cuda:N"),
        (["chat", "TEXT", "--device", "cuda"], r"has no CUDAExecutionProvider; .* install lavintk\[gpu\]"),
        (["chat", "RUNS", "--threads", "2"], "--threads is for exported folders"),
        (["eval", "RUNS", "--threads", "2"], "--threads is for exported folders"),
    ],
)
def test_what_a_folder_cannot_do_is_said(
    text_folder: Path, tmp_path: Path, run_cli: RunCli, arguments: list[str], text: str
) -> None:
    places = {"TEXT": str(text_folder), "RUNS": str(tmp_path), "RUNS/none": str(tmp_path / "none")}
    outcome = run_cli(*(places.get(argument, argument) for argument in arguments))
    assert (outcome.exit_code, outcome.stdout) == (1, "")
    assert re.search(text, outcome.stderr), outcome.stderr


# Broken folders


def test_a_missing_onnxruntime_names_what_to_install(text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModelError, match=r"Install lavintk\[cpu\], or lavintk\[gpu\]"):
        load(text_folder)


def rewrite(folder: Path, **entries: Any) -> None:
    path = folder / "lavintk_export.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def break_graph(folder: Path) -> None:
    (folder / "onnx/model.onnx").write_bytes(b"no graph")


def swap_graphs(folder: Path) -> None:
    graphs = {"decoder": {"all": "onnx/embed_tokens.onnx"}, "embed_tokens": None, "vision": None}
    (folder / "onnx/model.onnx").rename(folder / "onnx/embed_tokens.onnx")
    rewrite(folder, graphs={**graphs, "decoder": {"all": "onnx/vision.onnx"}})
    graph = Graph("foreign")
    graph.inputs.append(value("input_ids", TensorProto.INT64, 1, 1))
    graph.outputs.append(value("logits", TensorProto.INT64, 1, 1))
    graph.node("Identity", ["input_ids"], "logits")
    graph.save(folder / "onnx/vision.onnx")


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda f: (f / "onnx/model.onnx").unlink(), r"graphs.decoder.all: onnx/model.onnx is missing"),
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json cannot be read"),
        (lambda f: (f / "tokenizer_config.json").unlink(), "tokenizer_config.json is missing"),
        (lambda f: (f / "tokenizer_config.json").write_text("["), "tokenizer_config.json is not valid JSON"),
        (lambda f: (f / "tokenizer_config.json").write_text("[]"), "must hold a JSON object, found list"),
        (lambda f: (f / "lavintk_export.json").write_text("{"), "is not valid JSON"),
        (lambda f: (f / "lavintk_export.json").write_text("[]"), "must hold a JSON object, found list"),
        (lambda f: rewrite(f, format=2), r"has format 2 \(written by lavintk 0\), this version reads format 1"),
        (lambda f: rewrite(f, graphs=None, prompt=3), r"(?s)graphs must be a mapping.*prompt must be a mapping"),
        (lambda f: rewrite(f, graphs={"decoder": {"text": "x"}}), "must name graphs for 'all', or for 'text' and"),
        (lambda f: rewrite(f, graphs={"decoder": {"all": "../x"}}), "../x leads out of the folder"),
        (lambda f: rewrite(f, graphs={"decoder": {"all": 1}}), "a path is needed, found 1"),
        (lambda f: rewrite(f, image={"height": 3}), "image must hold height and width"),
        (lambda f: rewrite(f, prompt={"template": "chat_templates.jinja"}), "chat_templates.jinja is missing"),
        (lambda f: rewrite(f, graphs={"decoder": {"all": "onnx/model.onnx"}, "vision": "onnx/model.onnx"}),
         "a vision graph needs graphs.embed_tokens"),
        (break_graph, "model.onnx cannot be loaded by onnxruntime"),
        (swap_graphs, "is no decoder of lavintk's: it takes input_ids and gives logits"),
    ],
)  # fmt: skip
def test_a_broken_folder_is_refused(
    text_folder: Path, tmp_path: Path, damage: Callable[[Path], Any], text: str
) -> None:
    folder = copy_of(text_folder, tmp_path / "broken")
    assert is_export(folder)
    damage(folder)
    with pytest.raises(LavintkError, match=text):
        load(folder).generate("red?", max_new_tokens=1)


def test_too_little_memory_is_an_error_that_says_what_to_lower(text_model: ExportedModel) -> None:
    with (
        pytest.raises(OutOfMemoryError, match=r"ran out of memory while answering: .* Lower it"),
        text_model.enough_memory(lambda: "Lower it."),
    ):
        text_model.decoder_of(text_model.template.prompt(asked("a"))).cache(2**20, 2**20)


def test_numbers_out_of_range_are_refused(text_folder: Path) -> None:
    with pytest.raises(ModelError, match="threads must be at least 1, got 0"):
        load(text_folder, threads=0)
    with pytest.raises(ModelError, match="has no MyProvider"):
        load(text_folder, providers=["MyProvider"])


def test_an_image_that_the_model_cannot_see_is_refused(text_model: ExportedModel, tiny_folder: Path) -> None:
    with pytest.raises(DataError, match="it has an image, but the model takes none"):
        text_model.generate("what?", tiny_folder / "1.png")
    with pytest.raises(ModelError, match="sees no images"):
        Conversation(text_model).show(tiny_folder / "1.png")

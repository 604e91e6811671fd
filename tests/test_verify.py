"""An exported folder beside its run: the figures are the formula's, faults show, and the page says what was found."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from onnx import numpy_helper

from lavintk.errors import ModelError, RunError
from lavintk.model_card import card, hub_id_of, licence_of
from lavintk.models.build import build
from lavintk.plugins import installed_plugins
from lavintk.recipe import make_recipe
from lavintk.run import Run
from lavintk.testing import Outcome
from lavintk.testing.runs import multimodal, recipe
from lavintk.verify import Bounds, Verification, continuations, divergences, record, verify
from tests.tiny_export import copy_of, see_through_the_matrix, write_export

RunCli = Callable[..., Outcome]
TOKENS = 6


def made(folder: Path, content: dict[str, Any], target: Path) -> tuple[Run, Path]:
    """Return a run in memory, with an adapter that changes what it says, and its exported folder."""
    asked = make_recipe(content)
    assembly = build(asked, installed_plugins(), torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(1)
    assert assembly.model.adapter is not None
    with torch.no_grad():
        for _, parameter in assembly.model.adapter.named_parameters():
            parameter.normal_(std=0.1, generator=generator)
    assembly.model.eval()
    if assembly.images is not None:
        see_through_the_matrix(assembly)
    run = Run(target / "run", asked, {"data": {"records": 8, "sha256": "d" * 64}, "steps": 4})
    run.use(assembly)
    write_export(target / "exported", assembly)
    describe(target / "exported", base=assembly.base, quant={"grid": "fp32", "copied": False})
    return run, target / "exported"


def describe(folder: Path, **entries: Any) -> None:
    path = folder / "lavintk_export.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.fixture(scope="module")
def blind(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """Text alone, one decoder, no data but that of the training."""
    return made(tiny_folder, recipe(tiny_folder), tmp_path_factory.mktemp("blind"))


@pytest.fixture(scope="module")
def seeing(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """Two decoders, test data with and without images."""
    content = multimodal(tiny_folder)
    content["data"]["test"] = {"name": "jsonl", "path": str(tiny_folder / "mixed.jsonl")}
    return made(tiny_folder, content, tmp_path_factory.mktemp("seeing"))


def damaged(folder: Path, target: Path, graph: str, weight: str) -> Path:
    """Return a copy in which one matrix is another one."""
    broken = copy_of(folder, target)
    model = onnx.load(broken / "onnx" / graph)
    (found,) = (entry for entry in model.graph.initializer if entry.name == weight)
    values = numpy_helper.to_array(found)
    other = np.random.default_rng(0).normal(scale=values.std(), size=values.shape).astype(values.dtype)
    found.CopyFrom(numpy_helper.from_array(other, weight))
    onnx.save(model, broken / "onnx" / graph)
    return broken


# Figures


def test_the_divergence_is_that_of_the_formula() -> None:
    chances = np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])
    others = np.array([[0.25, 0.5, 0.25], [0.1, 0.2, 0.7]])
    found = divergences(torch.from_numpy(np.log(chances) + 3), torch.from_numpy(np.log(others) - 1))
    expected = [0.5 * math.log(2) - 0.25 * math.log(2), 0.0]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def test_figures_of_known_logits_are_those_of_numpy(blind: tuple[Run, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run, folder = blind
    generator, pairs = np.random.default_rng(3), list[tuple[Any, Any, Any]]()

    def disturbed(self: Any, rows: Any) -> list[Any]:
        found = rows_of(self, rows)
        if rows[0].trained:  # a training row, not one that is answered
            theirs = found[0] + generator.normal(scale=0.5, size=found[0].shape).astype(np.float32)
            pairs.append((found[0], theirs, np.array(rows[0].labels)))
            return [theirs]
        return found

    from lavintk.runtime import ExportedModel

    rows_of = ExportedModel.row_logits
    monkeypatch.setattr(ExportedModel, "row_logits", disturbed)
    whole = verify(run, folder, records=3, tokens=2, threads=1).whole

    def log_softmax(logits: Any) -> Any:
        wide = logits.astype(np.float64)
        return wide - np.log(np.exp(wide).sum(-1, keepdims=True))

    ours, theirs, labels = (np.concatenate([pair[place] for pair in pairs]) for place in range(3))
    p, q = log_softmax(ours), log_softmax(theirs)
    divergence = (np.exp(p) * (p - q)).sum(-1)
    trained = labels >= 0
    assert (whole.rows, whole.positions, whole.labelled) == (3, len(labels), trained.sum())
    assert whole.divergence == pytest.approx(divergence.mean(), rel=1e-3)
    assert whole.largest_divergence == pytest.approx(divergence.max(), rel=1e-3)
    assert whole.agreement == pytest.approx((ours.argmax(-1) == theirs.argmax(-1)).mean())
    assert whole.difference == pytest.approx(np.abs(ours - theirs).max(), rel=1e-3)
    for scores, perplexity in ((p, whole.trained_perplexity), (q, whole.exported_perplexity)):
        assert perplexity == pytest.approx(np.exp(-scores[trained, labels[trained]].mean()), rel=1e-3)


def test_common_prefixes_are_counted_in_tokens() -> None:
    found = continuations([[1, 2, 3], [1, 2], [4]], [[1, 2, 3], [1, 5, 6], []])
    assert (found.answers, found.identical, found.common_prefix, found.tokens) == (3, 1 / 3, 4 / 3, 2.0)


@pytest.mark.parametrize(
    ("quant", "kl"),
    [
        ({"grid": "fp32", "copied": False}, 1e-4), ({"grid": "fp16"}, 1e-4), ({"grid": "int8", "copied": False}, 0.05),
        ({"grid": "int4", "copied": True}, 0.05), ({"grid": "nf4", "copied": True}, 0.05),
        ({"grid": "int4", "copied": False, "calibrated": True}, 0.1), ({"grid": "int4", "copied": False}, 0.3),
        ({"grid": "nf4", "copied": False, "trained": "nf4:block_size=64"}, 0.3),
        ({"grid": "nf4", "copied": False, "trained": "none"}, 0.5),
    ],
)  # fmt: skip
def test_bounds_follow_the_grid(quant: dict[str, Any], kl: float) -> None:
    assert Bounds.of(quant).kl == kl


# Sound and damaged folders


@pytest.fixture(scope="module")
def found(seeing: tuple[Run, Path]) -> Verification:
    return verify(*seeing, tokens=TOKENS, accuracy=4, threads=1)


def test_a_sound_folder_with_two_decoders_has_no_fault(found: Verification) -> None:
    assert found.faults() == []
    assert set(found.parts) == {"text", "image"}
    assert (found.whole.rows, found.prompts, found.answers.identical, found.cache_agreement) == (8, 1, 1, 1)
    assert found.whole.divergence < 1e-8
    assert found.scores is not None
    assert found.scores.questions == 4
    assert found.scores.trained == found.scores.exported
    assert found.exported_tokens_per_second is not None
    assert found.trained_tokens_per_second is not None
    assert sum(found.sizes.values()) < found.folder_bytes
    assert json.loads(json.dumps(found.as_json(), allow_nan=False))["whole"]["rows"] == 8


def test_free_text_goes_on_behind_end_tokens_and_answers_do_not(
    blind: tuple[Run, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = blind
    every = tuple(range(run.assembly.model.language.config.vocab_size))
    monkeypatch.setattr(type(run.assembly.template), "stop_ids", every)
    found = verify(run, folder, records=2, tokens=12, threads=1)
    assert found.answers.tokens == 1
    assert found.free_text is not None
    assert (found.free_text.tokens, found.free_text.common_prefix, found.free_text.identical) == (12, 12, 1)


def test_the_verdict_says_what_was_found_and_what_is_allowed(found: Verification) -> None:
    first, answers, free, *notes = found.verdict()
    for words in ("within bounds", "text (at most 0.0001)", "100.0% image", "(at least 99%)", "8 rows"):
        assert words in first
    assert answers.startswith("greedy answers: 100.0% of 8 identical")
    assert free.endswith(f"of {TOKENS}.0 tokens")
    assert notes == list(found.notes)
    assert replace(found, prompts=0.5).verdict()[0].startswith("out of bounds: ")


def test_without_test_data_the_last_training_records_are_compared(blind: tuple[Run, Path]) -> None:
    found = verify(*blind, records=2, tokens=2, threads=1)
    assert found.faults() == []
    assert (set(found.parts), found.whole.rows, found.scores) == ({"text"}, 2, None)
    assert "these records were trained on" in found.notes[0]


@pytest.mark.parametrize(
    ("chosen", "note"),
    [
        ("pictures", "the first 3 are read once more without"),
        ("text", "the first 3 are read once more with a random picture"),
    ],
)
def test_a_modality_that_the_data_lacks_is_compared_too(
    seeing: tuple[Run, Path], tiny_folder: Path, tmp_path: Path, chosen: str, note: str
) -> None:
    picture = {"image": str(tiny_folder / "1.png")} if chosen == "pictures" else {}
    rows = [{"id": f"r{i}", "prompt": "red?", "answer": "no", **picture} for i in range(3)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = verify(*seeing, data=f"jsonl:{tmp_path / 'data.jsonl'}", tokens=2, threads=1)
    assert {name: part.rows for name, part in found.parts.items()} == {"text": 3, "image": 3}
    assert any(note in said for said in found.notes)
    assert found.faults() == []


@pytest.mark.parametrize(("graph", "part"), [("decoder_text.onnx", "text"), ("decoder_model_merged.onnx", "image")])
def test_a_damaged_decoder_is_noticed(seeing: tuple[Run, Path], tmp_path: Path, graph: str, part: str) -> None:
    run, folder = seeing
    broken = damaged(folder, tmp_path / "broken", graph, "layers.1.mlp.down_proj.weight")
    found = verify(run, broken, tokens=2, threads=1)
    assert found.faults()
    assert all(fault.startswith(f"{part}:") for fault in found.faults())


def test_numbers_that_are_none_are_faults(found: Verification) -> None:
    nothing = replace(found.whole, divergence=math.nan, agreement=math.nan)
    broken = replace(found, parts={"text": nothing}, cache_agreement=math.nan, prompts=0.5)
    assert len(broken.faults()) == 4
    assert broken.as_json()["parts"]["text"]["divergence"] is None


def test_a_cache_at_fault_is_noticed(blind: tuple[Run, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from lavintk.runtime.decoder import Cache

    step = Cache.step
    monkeypatch.setattr(Cache, "step", lambda self, running: -step(self, running))
    assert any("token by token" in fault for fault in verify(*blind, records=2, tokens=8, threads=1).faults())


# What is refused


def test_a_folder_of_another_base_is_refused(blind: tuple[Run, Path], tmp_path: Path) -> None:
    run, folder = blind
    other = copy_of(folder, tmp_path / "other")
    describe(other, base={"language": {"source": "elsewhere", "sha256": "0" * 64}})
    with pytest.raises(RunError, match=rf"(?s)the base weights are others.*{'0' * 64} \(elsewhere\)"):
        verify(run, other)


def test_unknown_grids_and_counts_are_refused(blind: tuple[Run, Path], tmp_path: Path) -> None:
    run, folder = blind
    other = copy_of(folder, tmp_path / "other")
    describe(other, quant={"grid": "int3"})
    with pytest.raises(ModelError, match="no bounds are known for the grid 'int3'"):
        verify(run, other)
    with pytest.raises(RunError, match="records must be at least 1, got 0; tokens must be at least 1, got 0"):
        verify(run, folder, records=0, tokens=0)


# The page and the command


def test_the_figures_are_written_into_the_folder(seeing: tuple[Run, Path], found: Verification, tmp_path: Path) -> None:
    run, folder = seeing
    copied = copy_of(folder, tmp_path / "copy")
    describe(copied, report={"requantized": {"steps": 1}})
    record(copied, found, run)
    content = json.loads((copied / "lavintk_export.json").read_text())
    assert content["report"]["requantized"] == {"steps": 1}
    assert content["report"]["verification"]["whole"]["positions"] == found.whole.positions
    page = (copied / "README.md").read_text()
    assert page == card(content)
    base = run.assembly.base
    told = [base["language"]["sha256"], base["vision"]["sha256"], "d" * 64, "8 records", "fp32", "| text |", "image="]
    told += ["see where it came from", "onnxruntime_genai", "AutoModelForImageTextToText", "Two decoders"]
    assert [words for words in told if words not in page] == []


def test_a_page_needs_no_figures() -> None:
    page = card({"format": 1, "prompt": {"template": "chat", "system": "Be brief."}})
    assert "'Be brief.'" in page
    assert "How near" not in page
    assert "AutoModelForCausalLM" in page


def test_the_head_of_the_page_is_what_the_hub_reads() -> None:
    base = {
        "language": {"source": "x", "sha256": "0", "licence": "Apache-2.0", "hub_id": "org/model"},
        "vision": {"source": "y", "sha256": "1", "licence": "apache-2.0"},
    }
    graphs = {"decoder": {}, "vision": "onnx/vision.onnx"}
    assert head_of(card({"base": base, "graphs": graphs})) == {
        "library_name": "onnx", "pipeline_tag": "image-text-to-text", "license": "apache-2.0",
        "base_model": ["org/model"], "tags": ["lavintk", "onnx"],
    }  # fmt: skip
    text = {"library_name": "onnx", "pipeline_tag": "text-generation", "tags": ["lavintk", "onnx"]}
    assert head_of(card({})) == text
    assert "license" not in head_of(card({"base": {**base, "vision": {"source": "y"}}}))
    for licence in ("mit", "A LICENSE AGREEMENT (LICENSE.txt of the base)"):
        other = head_of(card({"base": {**base, "vision": {"licence": licence}}}))
        assert other["license"] == "other"


def head_of(page: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(page.split("---\n")[1])
    return found


def test_the_page_tells_rounding_tuning_and_both_speeds(found: Verification) -> None:
    requantized = {
        "rows": 32, "steps": 300,
        "rounded": {"divergence": 7e-4, "agreement": 0.991, "tokens": 1467},
        "retuned": {"divergence": 2e-4, "agreement": 0.996, "tokens": 1467},
    }  # fmt: skip
    timed = replace(found, trained_tokens_per_second=4.0, exported_tokens_per_second=80.0)
    page = card({"report": {"requantized": requantized, "verification": timed.as_json()}})
    assert "on 1,467 answer tokens" in page
    assert "| rounded with 32 training rows in mind, before tuning | 7.0e-04 | 99.1% |" in page
    assert "| after 300 steps of tuning | 2.0e-04 | 99.6% |" in page
    assert "80.0 tokens/s, 4.0 of the trained model in torch" in page
    worse = {**requantized, "retuned": {"divergence": 8e-4, "agreement": 0.9}}
    assert "| after 300 steps of tuning, undone | 8.0e-04 |" in card({"report": {"requantized": worse}})
    without = card({"report": {"requantized": {**requantized, "retuned": None}}})
    assert "| rounded with 32 training rows in mind | 7.0e-04 |" in without


@pytest.mark.parametrize(
    ("reference", "hub_id"),
    [
        ("smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"), ("easyvqa-vit", None),
        ("org/model", "org/model"), ("./some/folder", None), (__file__, None),
    ],
)  # fmt: skip
def test_places_on_the_hub_are_known_by_name(reference: str, hub_id: str | None) -> None:
    assert hub_id_of(reference) == hub_id


@pytest.mark.parametrize(
    ("name", "text", "licence"),
    [
        ("README.md", "---\ntags: [x]\nlicense: apache-2.0\n---\n# Model\n", "apache-2.0"),
        ("README.md", "---\ntags: [x]\n---\nlicense: in the text\n", None),
        ("LICENSE.txt", "\n  A LICENSE AGREEMENT\n...", "A LICENSE AGREEMENT (LICENSE.txt of the base)"),
        ("notes.txt", "MIT", None),
    ],
)  # fmt: skip
def test_licences_are_found_where_models_state_them(tmp_path: Path, name: str, text: str, licence: str | None) -> None:
    (tmp_path / name).write_text(text)
    assert licence_of(str(tmp_path)) == licence
    assert licence_of("smollm2-135m-instruct") == "Apache-2.0"
    assert licence_of("nobody/knows-this") is None


def test_the_command_prints_figures_and_fails_out_of_bounds(
    blind: tuple[Run, Path], tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = blind
    monkeypatch.setattr(Run, "open", lambda place: SimpleNamespace(load=lambda device: run))
    copied = copy_of(folder, tmp_path / "copy")
    settings = ["--records", "2", "--tokens", "2", "--threads", "1"]
    outcome = run_cli("verify", str(run.folder), str(copied), *settings)
    assert outcome.exit_code == 0, outcome.stderr
    assert "same first choice" in outcome.stdout
    assert (copied / "README.md").is_file()
    broken = damaged(folder, tmp_path / "broken", "model.onnx", "head")
    outcome = run_cli("verify", str(run.folder), str(broken), *settings, "--json", "--no-record")
    assert outcome.exit_code == 1
    assert json.loads(outcome.stdout)["faults"]
    assert "is not what was trained" in outcome.stderr
    assert not (broken / "README.md").exists()
    assert "is no exported folder" in run_cli("verify", str(run.folder), str(tmp_path)).stderr


@pytest.mark.parametrize(
    ("file", "program"),
    [("config.json", "transformers"), ("adapter_config.json", "PEFT"), ("tiny-Q8_0.gguf", "llama.cpp")],
)
def test_folders_for_other_programs_are_said_to_be_that(
    file: str, program: str, tmp_path: Path, run_cli: RunCli
) -> None:
    (tmp_path / file).touch()
    outcome = run_cli("verify", "run", str(tmp_path))
    assert outcome.exit_code == 1
    assert f"is a folder for {program}" in outcome.stderr
    assert "compares onnx folders only" in outcome.stderr


def test_a_model_folder_in_place_of_a_run_gets_the_way_to_a_comparison(
    blind: tuple[Run, Path], tiny_folder: Path, run_cli: RunCli
) -> None:
    model = tiny_folder / "llm"
    outcome = run_cli("verify", str(model), str(blind[1]))
    assert outcome.exit_code == 1
    for words in ("is a model folder", f"lavintk export {model} --data FORMAT:PATH", "import_model"):
        assert words in outcome.stderr

"""``lavintk import lavin``: original files in, the original's numbers out."""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import lavintk
from lavintk.errors import CheckpointError, LavintkError, PluginError, RunError
from lavintk.models.delta_source import with_delta
from lavintk.models.meta_source import to_halves
from lavintk.models.sources import open_source
from lavintk.run import Run
from lavintk.testing import Outcome
from lavintk.testing.golden import make_batch
from lavintk.testing.golden_file import Golden, read_golden
from lavintk.testing.runs import multimodal
from lavintk_mma.importing import import_checkpoint, read_checkpoint, read_geometry
from tests import lavin_reference as reference
from tests.original import (
    Evil,
    adapter_weights,
    clip_weights,
    language_weights,
    write_checkpoint,
    write_meta,
    write_torchscript,
)

RunCli = Callable[..., Outcome]
SHARED = Path(__file__).parent / "data" / "lavin_tiny.safetensors"
LOGITS = 3e-6


@pytest.fixture(scope="module")
def golden() -> Golden:
    return read_golden(SHARED)


@pytest.fixture(scope="module")
def models(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Meta's folder in two shards and OpenAI's archive; do not write into it."""
    return write_models(tmp_path_factory.mktemp("models"), golden)


def write_models(folder: Path, golden: Golden) -> Path:
    write_meta(folder / "llm", golden, 2)
    write_torchscript(folder / "clip.pt", clip_weights(golden))
    return folder


def imported(checkpoint: Path, models: Path, out: Path, **options: Any) -> Run:
    import_checkpoint(checkpoint, str(models / "llm"), str(models / "clip.pt"), out, **options)
    return lavintk.load(out, device="cpu")


def largest_difference(run: Run, golden: Golden, case: str) -> float:
    """Return how far the run's logits lie from the original graph's."""
    batch = make_batch(golden.geometry, golden.cases[case])
    expected = golden.cases[case]["logits"][:, 1:]
    model = run.assembly.model
    with torch.no_grad():
        found = model.logits(model.hidden(batch)).view(expected.shape)
    return float((found - expected).abs().max())


@pytest.mark.parametrize("wrapped", [True, False])
def test_an_imported_run_gives_the_logits_of_the_original_graph(
    wrapped: bool, golden: Golden, models: Path, tmp_path: Path
) -> None:
    run = imported(write_checkpoint(tmp_path / "checkpoint-19.pth", golden, wrapped=wrapped), models, tmp_path / "run")
    for case in golden.cases:
        assert largest_difference(run, golden, case) < LOGITS, case


@pytest.mark.parametrize("form", ["one shard", "state dict", "adapter alone"])
def test_other_forms_of_the_same_files_give_the_same_run(
    form: str, golden: Golden, models: Path, tmp_path: Path
) -> None:
    llm, vision, checkpoint = models / "llm", models / "clip.pt", tmp_path / "adapter.pth"
    if form == "one shard":
        llm = write_meta(tmp_path / "7B", golden, 1)
    if form == "state dict":
        vision = tmp_path / "clip.pth"
        torch.save(clip_weights(golden), vision)
    torch.save(adapter_weights(golden), checkpoint)
    import_checkpoint(checkpoint, str(llm), str(vision), tmp_path / "run", temperature=10)
    run = lavintk.load(tmp_path / "run", device="cpu")
    assert largest_difference(run, golden, "image_only") < LOGITS


@pytest.mark.parametrize(
    "change",
    [
        {"adapter_type": "block", "temperature": 5.0, "adapter_scale": 1.5},
        {"visual_adapter_type": "router_block", "adapter_dim": 4},
        {"visual_adapter_type": "normal"},
    ],
    ids=str,
)
def test_kind_and_size_of_the_adapters_come_from_the_file(change: dict[str, Any], tmp_path: Path) -> None:
    file = reference.write_golden(tmp_path / "g.safetensors", reference.CONFIG | change, {"case": [1, 0]}, seed=3)
    golden = read_golden(file)
    models = write_models(tmp_path / "models", golden)
    run = imported(write_checkpoint(tmp_path / "c.pth", golden), models, tmp_path / "run")
    options = run.recipe.adapter.options
    assert (options["dim"], options["scale"], options["temperature"]) == (
        golden.geometry.adapter_dim, golden.geometry.adapter_scale, golden.geometry.temperature
    )  # fmt: skip
    assert (options["placement"], options["visual"]) == (
        golden.geometry.adapter_type, golden.geometry.visual_adapter_type
    )  # fmt: skip
    assert largest_difference(run, golden, "case") < LOGITS


def test_the_command_writes_a_run_that_says_where_it_came_from(
    golden: Golden, models: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint-19.pth", golden)
    outcome = run_cli(
        "import", "lavin", str(checkpoint), "--llm", str(models / "llm"), "--vision", str(models / "clip.pt"),
        "--out", str(tmp_path / "run"), "--temperature", "5",
    )  # fmt: skip
    assert outcome.exit_code == 0, outcome.stderr
    assert "note: --temperature 5 overrides the checkpoint's 10" in outcome.stdout
    assert f"{len(adapter_weights(golden))} tensors" in outcome.stdout
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "imported"
    assert set(manifest["base"]) == {"language", "vision"}
    assert len(manifest["imported"]["sha256"]) == 64
    recipe = Run.open(tmp_path / "run").recipe
    assert (recipe.data.normalization, recipe.data.template, recipe.data.resize) == ("imagenet", "lavin", "squash")
    assert recipe.adapter.options["temperature"] == 5
    assert recipe.adapter.options["compat"] == "lavin"


def test_eval_takes_an_imported_run(
    golden: Golden, models: Path, tiny_folder: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    checkpoint = write_checkpoint(tmp_path / "c.pth", golden)
    import_checkpoint(checkpoint, str(models / "llm"), str(models / "clip.pt"), tmp_path / "run", quant="nf4")
    outcome = run_cli(
        "eval", str(tmp_path / "run"), "--data", f"jsonl:{tiny_folder / 'mixed.jsonl'}", "--device", "cpu",
        "--evaluation", "exact-match", "--max-new-tokens", "2", "--json",
    )  # fmt: skip
    assert outcome.exit_code == 0, outcome.stderr
    assert json.loads(outcome.stdout)["questions"] == 8


def test_images_are_normalised_with_imagenets_figures_only_where_asked(tiny_folder: Path) -> None:
    from lavintk.models.build import build
    from lavintk.plugins import installed_plugins
    from lavintk.recipe import make_recipe

    means = []
    for asked in ("model", "imagenet"):
        content = multimodal(tiny_folder)
        content["data"]["normalization"] = asked
        assembly = build(make_recipe(content), installed_plugins(), torch.device("cpu"), torch.float32)
        assert assembly.images is not None
        means.append((assembly.images.mean, assembly.images.std))
    assert means == [((0.5,) * 3, (0.5,) * 3), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]


# What is wrong with a checkpoint


def refused(checkpoint: Path, models: Path, out: Path, **options: Any) -> str:
    """Check that an import is refused and leaves nothing behind; return the message."""
    with pytest.raises(LavintkError) as caught:
        imported(checkpoint, models, out, **options)
    assert not out.exists()
    return str(caught.value)


def test_every_tensor_that_does_not_fit_is_listed(golden: Golden, models: Path, tmp_path: Path) -> None:
    content = torch.load(write_checkpoint(tmp_path / "c.pth", golden), weights_only=False)
    tensors = content["model"]
    del tensors["module.layers.1.adapter_attn.conv_D.bias"]
    tensors["module.layers.3.adapter_attn.conv_A.bias"] = torch.zeros(8)
    tensors["module.adapter_proj.conv_B.weight"] = torch.zeros(60, 16)
    tensors["module.tok_embeddings.weight"] = torch.zeros(2, 2)
    torch.save(content, tmp_path / "c.pth")
    text = refused(tmp_path / "c.pth", models, tmp_path / "run")
    for expected in (
        "4 faults",
        "language.1_attn.up_second.bias is missing",
        "module.layers.3.adapter_attn.conv_A.bias is unexpected".removeprefix("module."),
        "adapter_proj.conv_B.weight has shape (60, 16), the model needs (64, 16)",
        "tok_embeddings.weight is unexpected",
    ):
        assert expected in text


def test_an_adapter_of_another_size_of_model_is_refused(golden: Golden, models: Path, tmp_path: Path) -> None:
    other = read_golden(reference.write_golden(tmp_path / "g.safetensors", reference.CONFIG, {"case": [1]}, seed=1))
    text = refused(write_checkpoint(tmp_path / "c.pth", other), models, tmp_path / "run")
    assert "layers.0.adapter_attn.conv_A.weight has shape (8, 48, 1), the model needs (8, 64)" in text
    assert "language.2_attn.down.weight is missing" in text


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([1, 2], "holds no dict of tensors"),
        ({}, "holds no dict of tensors"),
        ({"model": {"layers.0.adapter_attn.conv_A.weight": 3}}, "is a int, not a tensor"),
        ({"model": {"weight": torch.ones(2)}}, "adapter_proj.conv_A.weight is missing"),
        ({"model": {"weight": torch.tensor([1.0, torch.nan])}}, "holds values that are not finite"),
        ({"model": {"a.x": torch.ones(1), "module.a.x": torch.ones(1)}}, "is there twice"),
    ],
    ids=range(6),
)
def test_a_file_without_an_adapter_is_refused(content: Any, text: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=text):
        read_geometry(read_checkpoint(tmp_path / "c.pth"))


def test_arguments_that_contradict_the_tensors_are_refused(golden: Golden, models: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(
        tmp_path / "c.pth", golden, adapter_type="block", hidden_proj=32, visual_adapter_type="normal"
    )
    text = refused(checkpoint, models, tmp_path / "run")
    assert "args.adapter_type is 'block', but the tensors say 'attn'" in text
    assert "args.hidden_proj is 32, but the tensors say 16" in text
    assert "args.visual_adapter_type is 'normal', but the tensors say 'router'" in text


def test_names_that_lavin_takes_for_its_default_are_no_contradiction(golden: Golden, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "c.pth", golden, adapter_type="repattn")
    assert read_geometry(read_checkpoint(checkpoint)).placement == "attn"


def test_without_a_temperature_the_choice_is_asked_for(golden: Golden, models: Path, tmp_path: Path) -> None:
    torch.save(adapter_weights(golden), tmp_path / "adapter.pth")
    text = refused(tmp_path / "adapter.pth", models, tmp_path / "run")
    assert "--temperature 10 (LaVIN-7B) or --temperature 5 (LaVIN-13B)" in text


def test_a_checkpoint_that_would_run_code_is_refused_and_nothing_runs(
    golden: Golden, models: Path, tmp_path: Path
) -> None:
    content = {"model": adapter_weights(golden), "args": Namespace(temperature=Evil(tmp_path / "written"))}
    torch.save(content, tmp_path / "evil.pth")
    assert "is refused: it holds more than tensors" in refused(tmp_path / "evil.pth", models, tmp_path / "run")
    assert not (tmp_path / "written").exists()


def test_a_truncated_checkpoint_is_refused(golden: Golden, models: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "c.pth", golden)
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    assert "is truncated" in refused(checkpoint, models, tmp_path / "run")


def test_a_folder_in_use_stays_as_it_is(golden: Golden, models: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty"):
        imported(write_checkpoint(tmp_path / "c.pth", golden), models, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_a_base_that_changed_after_the_import_is_refused(golden: Golden, models: Path, tmp_path: Path) -> None:
    write_models(tmp_path / "models", golden)
    imported(write_checkpoint(tmp_path / "c.pth", golden), tmp_path / "models", tmp_path / "run")
    file = tmp_path / "models" / "llm" / "consolidated.01.pth"
    shard = torch.load(file, weights_only=True)
    shard["layers.0.feed_forward.w2.weight"] += 1
    torch.save(shard, file)
    with pytest.raises(RunError, match="trained on other weights"):
        lavintk.load(tmp_path / "run", device="cpu")


def test_two_plugins_cannot_import_under_one_name(install_plugin: Callable[..., Path], run_cli: RunCli) -> None:
    install_plugin(
        "zzz",
        "import click\nfrom lavintk import hookimpl\n\n@click.command('lavin')\ndef command():\n    pass\n\n"
        "@hookimpl\ndef lavintk_register_commands(group):\n    group.commands['import'].add_command(command)\n",
    )
    outcome = run_cli("import", "lavin", "--help")
    assert outcome.exit_code == PluginError.exit_code
    assert "two plugins offer 'lavintk import lavin'" in outcome.stderr


# Deltas


def halves(name: str, tensor: torch.Tensor, golden: Golden) -> torch.Tensor:
    return to_halves(tensor, golden.geometry.n_heads) if ".q_proj." in name or ".k_proj." in name else tensor


def write_delta(folder: Path, base: Path, form: str = "safetensors", seed: int = 0) -> dict[str, torch.Tensor]:
    """Write a random delta in Hugging Face's layout for a base folder, and return it."""
    folder.mkdir()
    source, generator = open_source(base), torch.Generator().manual_seed(seed)
    delta = {name: torch.randn(source.shape(name), generator=generator) * 0.1 for name in source.names()}
    stored = delta | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    if form == "safetensors":
        save_file(stored, folder / "model.safetensors")
        source.config().save_pretrained(folder)
        return delta
    names = list(stored)
    for number, part in enumerate((names[:10], names[10:]), start=1):
        torch.save({name: stored[name] for name in part}, folder / f"pytorch_model-0000{number}-of-00002.bin")
    places = {n: f"pytorch_model-0000{1 if n in names[:10] else 2}-of-00002.bin" for n in names}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return delta


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_delta_is_added_tensor_by_tensor(form: str, models: Path, tmp_path: Path) -> None:
    base = open_source(models / "llm")
    delta = write_delta(tmp_path / "delta", models / "llm", form)
    both = with_delta(base, tmp_path / "delta")
    for name in base.names():
        assert torch.equal(both.read(name), base.read(name) + delta[name]), name
    assert both.fingerprint() != base.fingerprint()


def test_lavins_delta_lands_on_metas_rows(golden: Golden, models: Path, tmp_path: Path) -> None:
    """The original computes W_Meta + delta, row by row, with the delta in Hugging Face's order."""
    delta = write_delta(tmp_path / "delta", models / "llm")
    wrong = with_delta(open_source(models / "llm"), tmp_path / "delta", "lavin")
    meta = language_weights(golden)
    names = {"q_proj": "attention.wq", "k_proj": "attention.wk", "v_proj": "attention.wv", "o_proj": "attention.wo"}
    for leaf, original in names.items():
        name = f"model.layers.1.self_attn.{leaf}.weight"
        expected = halves(name, meta[f"layers.1.{original}.weight"] + delta[name], golden)
        torch.testing.assert_close(wrong.read(name), expected, atol=1e-6, rtol=0)


def test_an_adapter_trained_on_vicuna_is_imported_on_the_original_sum(
    golden: Golden, models: Path, tmp_path: Path
) -> None:
    """Meta's folder with delta against a Meta folder that holds the original's sum."""
    delta = write_delta(tmp_path / "delta", models / "llm")
    checkpoint = write_checkpoint(tmp_path / "c.pth", golden, use_vicuna=True)
    assert "give the folder of Vicuna's v1.1 delta with --delta" in refused(checkpoint, models, tmp_path / "run")
    run = imported(checkpoint, models, tmp_path / "run", delta=str(tmp_path / "delta"))
    summed = write_meta(tmp_path / "sum" / "llm", golden)
    shard = torch.load(summed / "consolidated.00.pth", weights_only=True)
    for ours, theirs in zip(open_source(summed).names(), list(language_weights(golden)), strict=True):
        shard[theirs] = shard[theirs] + delta[ours]
    torch.save(shard, summed / "consolidated.00.pth")
    import_checkpoint(
        write_checkpoint(tmp_path / "d.pth", golden), str(summed), str(models / "clip.pt"), tmp_path / "b"
    )
    batch = make_batch(golden.geometry, golden.cases["image_only"])
    with torch.no_grad():
        first, second = (r.assembly.model.hidden(batch) for r in (run, lavintk.load(tmp_path / "b", device="cpu")))
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


def test_a_delta_of_another_vocabulary_is_explained(models: Path, tmp_path: Path) -> None:
    delta = write_delta(tmp_path / "v1", models / "llm")
    folder = tmp_path / "delta"
    folder.mkdir()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        delta[name] = torch.zeros(102, 64)
    torch.save(delta, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"(?s)has 102 entries.* 101.*v0 deltas.*take the v1\.1 delta"):
        with_delta(open_source(models / "llm"), folder)


def test_a_delta_that_does_not_fit_is_listed(models: Path, tmp_path: Path) -> None:
    delta = write_delta(tmp_path / "good", models / "llm")
    folder = tmp_path / "delta"
    folder.mkdir()
    del delta["model.layers.0.mlp.up_proj.weight"]
    delta["model.norm.weight"] = torch.zeros(3)
    delta["model.layers.9.mlp.up_proj.weight"] = torch.zeros(3)
    torch.save(delta, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as caught:
        with_delta(open_source(models / "llm"), folder)
    for text in (
        "has 3 faults",
        "model.layers.0.mlp.up_proj.weight is missing in the delta",
        "model.layers.9.mlp.up_proj.weight is not part of the base",
        "model.norm.weight has shape [3], that of the base [64]",
    ):
        assert text in str(caught.value)


def test_a_delta_with_missing_or_malicious_files_is_refused(models: Path, tmp_path: Path) -> None:
    write_delta(tmp_path / "delta", models / "llm", "bin")
    (tmp_path / "delta" / "pytorch_model-00001-of-00002.bin").unlink()
    torch.save({"x": Evil(tmp_path / "written")}, tmp_path / "delta" / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(CheckpointError) as caught:
        with_delta(open_source(models / "llm"), tmp_path / "delta")
    assert "pytorch_model-00001-of-00002.bin is missing" in str(caught.value)
    assert "pytorch_model-00002-of-00002.bin is refused" in str(caught.value)
    assert not (tmp_path / "written").exists()

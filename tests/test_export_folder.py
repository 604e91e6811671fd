"""Model folders of transformers, with PEFT's LoRA or without, are exported as what transformers and PEFT compute."""

import errno
import json
import os
import shutil
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lavintk.data.records import Message, Record
from lavintk.errors import CheckpointError, LavintkError, ModelError, RecipeError, RunError
from lavintk.export import export, export_model
from lavintk.importing import find_adapter, import_model
from lavintk.models.build import build_outline
from lavintk.plugins import installed_plugins
from lavintk.registry import Choice
from lavintk.runtime import load
from lavintk.testing import Outcome
from lavintk.testing.tiny import write_language_model
from lavintk_onnx.graph import DataFile

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's
RunCli = Callable[..., Outcome]
TOLERANCE = 1e-4
RECORD = Record("r", (Message("user", "what color is the shape?"), Message("assistant", "red blue")))
ATTENTION = ["q_proj", "v_proj"]
Usage = namedtuple("Usage", ["total", "used", "free"])


def write_peft(folder: Path, base: Path, config: Any = None, **options: Any) -> Path:
    """Let PEFT write a random adapter of ``base``."""
    config = config or LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ATTENTION, **options})
    torch.manual_seed(3)
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_language_model(tmp_path_factory.mktemp("base") / "llama")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    return folder


@pytest.fixture(scope="module")
def peft(base: Path) -> Path:
    return write_peft(base.parent / "shapes-lora", base)


@pytest.fixture
def texts(tmp_path: Path) -> str:
    rows = [{"instruction": f"what color is {c}?", "output": c} for c in ("red", "blue", "green", "black")]
    (tmp_path / "texts.json").write_text(json.dumps(rows))
    return f"alpaca:{tmp_path / 'texts.json'}"


@torch.no_grad()
def expected(base: Path, peft: Path | None, ids: list[int]) -> NDArray[Any]:
    """Return the logits of transformers, under PEFT if there is an adapter."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    if peft is not None:
        model = PeftModel.from_pretrained(model, str(peft))
    found: NDArray[Any] = model.eval()(input_ids=torch.tensor([ids])).logits[0].numpy()
    return found


def distance(out: Path, base: Path, peft: Path | None) -> float:
    """Return the largest difference of a logit between the exported folder and transformers."""
    model = load(out, threads=1)
    ids = list(model.template.tokenize_record(RECORD).input_ids)
    return float(np.abs(model.logits(RECORD) - expected(base, peft, ids)).max())


def refused(error: type[LavintkError], model: Path, out: Path, *words: str, **options: Any) -> None:
    with pytest.raises(error) as found:
        export(model, Choice("onnx", {"quant": "fp32"}), out, **options)
    missing = [word for word in words if word not in str(found.value)]
    assert not missing, (missing, str(found.value))
    assert not out.exists()
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".")]


# What is exported is what transformers and PEFT compute


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("form", ["merge", "side"])
def test_onnxruntime_gives_the_logits_of_transformers_with_peft(architecture: str, form: str, tmp_path: Path) -> None:
    base = write_language_model(tmp_path / "llm", architecture)
    peft = write_peft(tmp_path / "lora", base, target_modules=[*ATTENTION, "down_proj"])
    export_model(base, Choice("onnx", {"quant": "fp32", "adapter": form}), tmp_path / "out", peft=peft)
    assert distance(tmp_path / "out", base, None) > 100 * TOLERANCE  # the adapter matters
    assert distance(tmp_path / "out", base, peft) < TOLERANCE


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_model_without_an_adapter_gives_the_logits_of_transformers(architecture: str, tmp_path: Path) -> None:
    base = write_language_model(tmp_path / "llm", architecture)
    export_model(base, Choice("onnx", {"quant": "fp32"}), tmp_path / "out")
    assert distance(tmp_path / "out", base, None) < TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"target_modules": r".*\.1\.self_attn\.(q|o)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"]},
        {"lora_alpha": 1, "r": 3, "lora_dropout": 0.5},
    ],
    ids=["rslora", "pattern", "all-linear", "some layers", "whole names", "dropout"],
)
def test_the_ways_in_which_peft_chooses_and_scales_layers_are_understood(
    options: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    peft = write_peft(tmp_path / "lora", base, **options)
    export_model(base, Choice("onnx", {"quant": "fp32"}), tmp_path / "out", peft=peft)
    assert distance(tmp_path / "out", base, peft) < TOLERANCE


@pytest.mark.parametrize("with_peft", [True, False])
def test_hf_writes_the_model_that_peft_would_merge(with_peft: bool, base: Path, peft: Path, tmp_path: Path) -> None:
    adapter = peft if with_peft else None
    export_model(base, Choice("hf"), tmp_path / "out", peft=adapter)
    ids = list(range(3, 40))
    np.testing.assert_allclose(expected(tmp_path / "out", None, ids), expected(base, adapter, ids), rtol=0, atol=1e-4)
    page = (tmp_path / "out" / "README.md").read_text()
    assert f"from the model folder `{base}`" in page
    assert "licence apache-2.0" in page
    assert (str(peft) in page, "with the adapter folded in" in page) == (with_peft, with_peft)
    assert "in training" not in page


def test_peft_comes_out_as_it_went_in(base: Path, peft: Path, tmp_path: Path) -> None:
    export_model(base, Choice("peft"), tmp_path / "out", peft=peft)
    ids = list(range(3, 40))
    np.testing.assert_array_equal(expected(base, tmp_path / "out", ids), expected(base, peft, ids))


def test_gguf_holds_the_merged_weights(base: Path, peft: Path, tmp_path: Path) -> None:
    from lavintk.models.sources import open_source

    export_model(base, Choice("gguf", {"type": "f32"}), tmp_path / "out", peft=peft)
    (file,) = (tmp_path / "out").glob("*.gguf")
    merged: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(peft)).merge_and_unload()
    stored = open_source(file)
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(stored.read(name).reshape(parameter.shape), parameter.data, rtol=0, atol=1e-5)
    assert str(peft) in (tmp_path / "out" / "README.md").read_text()


# What the folder says of itself


def test_the_folder_names_model_adapter_and_licence_and_claims_no_training(
    base: Path, peft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_model(base, Choice("onnx"), tmp_path / "out", peft=peft)
    said = json.loads((tmp_path / "out" / "lavintk_export.json").read_text())
    assert (said["run"]["steps"], said["run"]["started"], said["run"]["data"]) == (None, None, None)
    assert said["quant"]["trained"] is None
    assert said["run"]["imported"]["adapter"]["folder"] == str(peft)
    assert said["base"]["language"] | {"sha256": ""} == {"source": str(base), "sha256": "", "licence": "apache-2.0"}
    page = (tmp_path / "out" / "README.md").read_text()
    for words in (str(base), str(peft), "apache-2.0", "fine-tuned language model"):
        assert words in page
    assert "trained on" not in page
    printed = capsys.readouterr().out
    assert "not compared with the model: a model folder names no records" in printed
    assert "trained" not in printed


def test_without_an_adapter_no_adapter_and_no_fine_tuning_are_claimed(base: Path, tmp_path: Path) -> None:
    export_model(base, Choice("onnx"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "lavintk_export.json").read_text())["adapter"] is None
    page = (tmp_path / "out" / "README.md").read_text()
    assert "dapter" not in page.replace(str(tmp_path), "")
    assert "fine-tuned" not in page


def test_a_run_of_a_folder_holds_no_facts_of_a_training(base: Path, peft: Path, tmp_path: Path) -> None:
    run = import_model(base, tmp_path / "run", peft=peft)
    assert run.recipe.data.train is None
    assert set(run.manifest) == {"status", "recipe", "versions", "base", "imported"}
    assert run.recipe.adapter == Choice(
        "lora", {"r": 4, "alpha": 6, "rslora": False, "dropout": 0.0, "targets": "q_proj+v_proj"}
    )


# The command


def test_the_command_exports_and_compares_on_given_records(
    base: Path, peft: Path, texts: str, tmp_path: Path, run_cli: RunCli
) -> None:
    out = tmp_path / "out"
    outcome = run_cli(
        "export", str(base), "--peft", str(peft), "--quant", "fp32", "--data", texts, "--out", str(out)
    )  # fmt: skip
    assert outcome.exit_code == 0, outcome.stderr
    assert "linear layers: fp32 (as asked)" in outcome.stdout
    assert "not compared" not in outcome.stdout
    lines = outcome.stdout.splitlines()
    assert lines[0] == f"loading the model folder {base} to export it as onnx"
    begun = lines.index("comparing it with the model in torch on 8 records (--no-verify leaves this out)")
    assert lines[begun + 1].startswith("  within bounds: KL ")
    assert lines[begun + 2].startswith("  greedy answers: 100.0% of 4 identical")
    assert lines[begun + 3].endswith("of 64.0 tokens")
    found = json.loads((out / "lavintk_export.json").read_text())["report"]["verification"]
    assert found["whole"]["rows"] == 4
    assert found["whole"]["difference"] < TOLERANCE
    assert found["answers"]["identical"] == 1
    assert distance(out, base, peft) < TOLERANCE


@pytest.mark.parametrize("format_", ["hf", "gguf", "peft"])
def test_formats_that_are_not_compared_say_so_in_a_line(
    format_: str, base: Path, peft: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    arguments = ["export", str(base), "--peft", str(peft), "--format", format_, "--out", str(tmp_path / "out")]
    said = f"not compared with the model: lavintk runs onnx folders only, and this is {format_}"
    outcome = run_cli(*arguments)
    assert outcome.exit_code == 0, outcome.stderr
    assert said in outcome.stdout.splitlines()


def test_what_a_comparison_takes_is_asked_for_before_the_work(
    base: Path, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli
) -> None:
    monkeypatch.setattr("lavintk_onnx.export.OnnxExporter.export", lambda *_: pytest.fail("worked"))
    arguments = ["export", str(base), "--out", str(tmp_path / "out"), "--data"]
    outcome = run_cli(*arguments, "alpaca:nowhere.json")
    assert outcome.exit_code == 1
    assert "nowhere.json" in outcome.stderr
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    outcome = run_cli(*arguments, texts)
    assert outcome.exit_code == 1
    for words in ("onnxruntime, which cannot be imported", "Install lavintk[cpu]", "--no-verify"):
        assert words in outcome.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.json"]


def test_without_a_comparison_onnxruntime_is_not_needed(
    base: Path, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    export(base, Choice("onnx"), tmp_path / "out", verify=False, data=Choice.parse(texts))
    assert (tmp_path / "out" / "lavintk_export.json").is_file()


def test_the_command_names_the_folder_after_the_model(base: Path, tmp_path: Path, run_cli: RunCli) -> None:
    model = shutil.copytree(base, tmp_path / "llm")
    outcome = run_cli("export", str(model), "--quant", "int4", "--data", "jsonl:x.jsonl", "--no-verify")
    assert outcome.exit_code == 0, outcome.stderr
    assert "int4 is rounded without calibration: there is no training data" in outcome.stdout
    assert (tmp_path / "llm-onnx" / "onnx" / "model_q4.onnx").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llm", "llm-onnx"]


# Errors


def test_what_is_neither_run_nor_model_is_said_to_be_neither(base: Path, peft: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").touch()
    out = tmp_path / "out"
    refused(RunError, tmp_path / "notes", out, "todo.txt", "neither a run", "nor a model folder", "config.json")
    refused(RunError, tmp_path / "none", out, "does not exist", "neither a run")
    refused(RunError, base / "config.json", out, "is a file")
    refused(RunError, peft, out, "adapter_config.json", "--peft")
    import_model(base, tmp_path / "run")
    refused(RunError, tmp_path / "run", out, "is a run", "--peft", peft=peft)


def test_missing_files_of_the_model_are_named(base: Path, tmp_path: Path) -> None:
    model = shutil.copytree(base, tmp_path / "llm")
    (model / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (model / "tokenizer_config.json").unlink()
    refused(ModelError, model, tmp_path / "out", "no tokenizer", "tokenizer.json")
    (model / "model.safetensors").unlink()
    refused(ModelError, model, tmp_path / "out", "holds no safetensors")


def test_missing_and_damaged_files_of_the_adapter_are_named(base: Path, peft: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(RunError, base, out, "no adapter folder", "nowhere", peft=tmp_path / "nowhere")
    copy = shutil.copytree(peft, tmp_path / "lora")
    (copy / "adapter_model.safetensors").write_bytes(b"x" * 20)
    refused(CheckpointError, base, out, "adapter_model.safetensors cannot be read", peft=copy)
    (copy / "adapter_model.safetensors").rename(copy / "adapter_model.bin")
    refused(CheckpointError, base, out, "adapter_model.safetensors is missing", "save_pretrained", peft=copy)
    (copy / "adapter_config.json").unlink()
    refused(ModelError, base, out, "holds no adapter", "adapter_model.bin", "adapter_config.json", "lora", peft=copy)


def test_an_adapter_of_another_base_is_refused_with_every_shape(base: Path, tmp_path: Path) -> None:
    wide = write_language_model(tmp_path / "wide", hidden_size=128)
    deep = write_language_model(tmp_path / "deep", num_hidden_layers=3)
    for other, words in ((wide, "has shape (4, 128)"), (deep, "layers.2.self_attn.q_proj.lora_A.weight")):
        adapter = write_peft(tmp_path / f"{other.name}-lora", other)
        refused(CheckpointError, base, tmp_path / "out", words, "trained on another model", peft=adapter)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "LOHA"}, ["'LOHA'", "LoRA and rsLoRA"]),
        ({"use_dora": True}, ["use_dora=True", "without DoRA"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save"]),
        ({"bias": "all"}, ["trains biases"]),
        ({"rank_pattern": {"q_proj": 2}}, ["rank_pattern"]),
    ],
)
def test_methods_of_peft_that_are_not_read_are_named_with_those_that_are(
    changes: dict[str, Any], words: list[str], base: Path, peft: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(peft, tmp_path / "lora")
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | changes))
    refused(CheckpointError, base, tmp_path / "out", *words, "What is read", peft=copy)


def test_another_method_that_peft_wrote_is_refused(base: Path, tmp_path: Path) -> None:
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    adapter = write_peft(tmp_path / "ia3", base, config)
    refused(CheckpointError, base, tmp_path / "out", "'IA3'", "LoRA and rsLoRA", peft=adapter)


def test_layers_that_the_base_lacks_are_named(base: Path, peft: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(peft, tmp_path / "lora")
    tensors = load_file(copy / "adapter_model.safetensors")
    save_file({name.replace("v_proj", "w_pack"): t for name, t in tensors.items()}, copy / "adapter_model.safetensors")
    refused(ModelError, base, tmp_path / "out", str(copy), "'w_pack' fits no linear layer", peft=copy)


@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers.:UserWarning")
def test_an_adapter_of_the_output_head_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "lora", base, target_modules=["q_proj", "lm_head"])
    refused(CheckpointError, base, tmp_path / "out", "lm_head", "not LoRA of a linear layer", peft=adapter)


def test_what_cannot_be_trained_is_refused_as_a_recipe(base: Path, tmp_path: Path) -> None:
    recipe = import_model(base, tmp_path / "run").recipe
    with pytest.raises(RecipeError) as found:
        recipe.check(installed_plugins())
    assert [fault.partition(":")[0] for fault in found.value.faults] == ["data.train", "adapter"]


def test_tuning_needs_training_data(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="needs training data"):
        export_model(base, Choice("onnx", {"quant": "int4", "retune": 10}), tmp_path / "out")


def test_without_a_plugin_that_reads_it_no_adapter_is_found(peft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVINTK_DISABLE", "lora")
    installed_plugins.cache_clear()
    with pytest.raises(ModelError, match="none is installed"):
        find_adapter(peft)


# Room on the disk


@pytest.mark.parametrize(
    ("choice", "least"),
    [
        (Choice("onnx", {"quant": "fp32"}), 0.8), (Choice("onnx"), 0.5), (Choice("onnx", {"quant": "int4"}), 0.5),
        (Choice("hf"), 0.8), (Choice("gguf"), 0.5), (Choice("gguf", {"type": "f32"}), 0.8),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_needed_is_little_less_than_what_is_written(
    choice: Choice, least: float, base: Path, tmp_path: Path
) -> None:
    run = import_model(base, tmp_path / "run")
    outline, _ = build_outline(run.recipe, installed_plugins())
    exporter: Any = installed_plugins().exporters.create(choice)
    needed = exporter.bytes_needed(run, outline)
    export_model(base, choice, tmp_path / "out")
    weights = [p for p in (tmp_path / "out").rglob("*") if p.suffix in (".onnx_data", ".safetensors", ".gguf")]
    written = sum(path.stat().st_size for path in weights)
    assert least * written <= needed <= written


def test_too_little_room_is_refused_before_anything_is_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 10**5, 10**5))
    monkeypatch.setattr(DataFile, "write", lambda *_: pytest.fail("written"))
    refused(RunError, base, tmp_path / "out", "needs 0.4 MB", "has 0.1 MB free", "--out")


@pytest.mark.parametrize(
    ("number", "full"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False), (errno.EACCES, False)]
)
def test_only_a_full_disk_is_said_to_be_full(
    number: int, full: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(DataFile, "write", fails)
    with pytest.raises(RunError) as found:
        export_model(base, Choice("onnx"), tmp_path / "out")
    assert os.strerror(number) in str(found.value)
    assert ("Is the disk full?" in str(found.value)) == full
    assert not (tmp_path / "out").exists()

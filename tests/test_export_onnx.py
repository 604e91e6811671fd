"""Exported ONNX folders, run by lavintk.runtime and onnxruntime-genai, say what the trained torch model says."""

import errno
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from lavintk.answer import Answerer
from lavintk.checkpoints import save_model
from lavintk.data.batch import IGNORED
from lavintk.data.batches import collate
from lavintk.data.records import Message, Record
from lavintk.errors import DataError, LavintkError, ModelError, NotAffineError, OptionsError, PluginError, RunError
from lavintk.export import export_run
from lavintk.models.build import build
from lavintk.models.multimodal import MultimodalModel
from lavintk.plugins import installed_plugins
from lavintk.recipe import make_recipe
from lavintk.registry import Choice
from lavintk.run import Run
from lavintk.runtime import load
from lavintk.testing import Outcome, tiny
from lavintk.testing.tiny import write_language_model, write_vision_tower
from lavintk_lora.adapter import LoraAdapter
from lavintk_onnx.folder import PLACEHOLDER
from lavintk_onnx.graph import DataFile
from lavintk_onnx.grids import encode_table

RunCli = Callable[..., Outcome]
Array = NDArray[Any]
CPU = torch.device("cpu")
QUESTION = "what color is the shape? red, is there a blue circle? yes or no"
EXACT = {"quant": "fp32"}
PLAIN_TABLES = {"embed_quant": "fp32", "head_quant": "fp32"}
EXACT_INT4 = {"accuracy_level": 0, "adapter": "side", **PLAIN_TABLES}
TOLERANCE = 1e-4
"""Of fp32 logits, which are about 3 in size."""
ROUNDED = 0.3
"""Of logits where activations are rounded to int8 in blocks, as the fast 8-bit kernel does; seen are 0.07 to 0.18."""
ODD: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 52, "num_attention_heads": 3, "num_key_value_heads": 1,
}  # fmt: skip
"""Sizes that fill neither blocks of 64 nor of 32."""
BLOCK_MMA = {"name": "mma", "dim": 4, "placement": "block"}
THETA = {"rope_theta": 10000.0}
GROUPED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "o_proj": ("o_proj",)}
COUNT = 8


def trained(folder: Path, content: dict[str, Any], std: float = 0.1) -> Run:
    """Return a run whose adapter and connector are random instead of trained; ``std`` 0 leaves them at their start."""
    recipe = make_recipe({"name": "tiny", "train": {"device": "cpu", "precision": "fp32"}, **content})
    run = Run.create(folder, recipe)
    assembly = build(recipe, installed_plugins(), CPU, torch.float32)
    with torch.no_grad():
        for parameter in assembly.model.trainable().values() if std else ():
            parameter.normal_(std=std)
    save_model(folder, assembly.model, recipe.model.language)
    run.record(base=assembly.base)
    return Run.open(folder)


def text_run(
    folder: Path, architecture: str = "llama", adapter: Any = "lora", quant: Any = "none", std: float = 0.1, **llm: Any
) -> Run:
    write_language_model(folder / "llm", architecture, **llm)
    content = {
        "model": {"language": str(folder / "llm")},
        "adapter": adapter,
        "quant": quant,
        "data": {"train": {"name": "alpaca", "path": "unused.json"}},
    }
    return trained(folder / "run", content, std)


def seeing_run(folder: Path, adapter: Any = BLOCK_MMA, quant: Any = "none", **llm: Any) -> Run:
    write_language_model(folder / "llm", **llm)
    write_vision_tower(folder / "vit")
    content = {
        "model": {"language": str(folder / "llm"), "vision": str(folder / "vit"), "tap_every": 2, "neck": 8},
        "adapter": adapter,
        "quant": quant,
        "data": {"train": {"name": "jsonl", "path": "unused.jsonl"}},
    }
    return trained(folder / "run", content)


def export(run: Run, out: Path, **options: Any) -> Path:
    export_run(run, Choice("onnx", options), out, verify=False)
    return out


def answered(*images: Path) -> Record:
    return Record("r", (Message("user", QUESTION), Message("assistant", "red blue")), images)


def asked(*images: Path) -> Record:
    return Record("r", (Message("user", QUESTION),), images)


def torch_logits(run: Run, record: Record) -> Array:
    return _logits_of(run.folder, record.messages, tuple(path for path in record.images if isinstance(path, Path)))


@functools.cache
@torch.no_grad()
def _logits_of(folder: Path, messages: tuple[Message, ...], images: tuple[Path, ...]) -> Array:
    assembly = Run.open(folder).load("cpu").assembly
    batch = collate([assembly.template.tokenize_record(Record("r", messages, images))], assembly.images)
    found: Array = assembly.model.logits(assembly.model.hidden(batch)).numpy()
    return found


def logits(folder: Path, record: Record) -> Array:
    return load(folder, threads=1).logits(record)


def distance(run: Run, folder: Path, *images: Path) -> float:
    """Return the largest difference of logits between the folder and the trained model."""
    record = answered(*images)
    return float(np.abs(logits(folder, record) - torch_logits(run, record)).max())


def divergence(run: Run, folder: Path) -> float:
    """Return the mean Kullback-Leibler divergence from the trained model, in nats."""
    exported, own = (
        torch.from_numpy(values).double().log_softmax(-1)
        for values in (logits(folder, answered()), torch_logits(run, answered()))
    )
    return float((own.exp() * (own - exported)).sum(-1).mean())


def facts(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "lavintk_export.json").read_text())
    return found


def external(graph: Path) -> dict[str, tuple[str, int, int]]:
    """Return file, offset and length of each weight of a graph that lies in a data file."""
    found = {}
    for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            found[tensor.name] = (entries["location"], int(entries["offset"]), int(entries["length"]))
    return found


def stored_bytes(graph: Path, name: str) -> bytes:
    file, offset, length = external(graph)[name]
    return (graph.parent / file).read_bytes()[offset : offset + length]


def operators(graph: Path) -> list[str]:
    return [node.op_type for node in onnx.load(graph, load_external_data=False).graph.node]


# Architectures and adapters, fp32

ARCHITECTURES: list[tuple[str, Any, dict[str, Any]]] = [
    ("llama", "lora", {}),
    ("llama", "lora", {"tie_word_embeddings": True}),
    ("llama", {"name": "lora", "targets": "q_proj,down_proj"}, ODD),
    ("llama", {"name": "lora", "targets": "*.layers.1.*gate_proj", "rslora": True}, {"head_dim": 32}),
    ("llama", BLOCK_MMA, {"attention_bias": True, "mlp_bias": True}),
    ("llama", "lora", {"sliding_window": 5}),  # an entry that llama does not look at
    ("llama", "lora", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, **THETA}}),
    (
        "llama", "lora",
        {"rope_parameters": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 64, **THETA}},
    ),
    (
        "llama", "lora",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **THETA}},
    ),
    ("mistral", "lora", {}),
    ("mistral", {"name": "mma", "dim": 4}, {"sliding_window": None, "tie_word_embeddings": True}),
    ("qwen2", BLOCK_MMA, {}),
    (
        "qwen2", "lora",
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    ("qwen3", "lora", {}),
    ("qwen3", BLOCK_MMA, {"tie_word_embeddings": False}),
    ("smollm3", BLOCK_MMA, {}),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "adapter", "llm"), ARCHITECTURES)
def test_an_fp32_folder_has_the_logits_of_the_trained_model(
    architecture: str, adapter: Any, llm: dict[str, Any], tmp_path: Path
) -> None:
    run = text_run(tmp_path, architecture, adapter, **llm)
    for form in ("merge", "side"):
        folder = export(run, tmp_path / form, adapter=form, **EXACT)
        assert distance(run, folder) < TOLERANCE, form
        assert facts(folder)["adapter"]["form"] == form
    products = [operators(tmp_path / form / "onnx/model.onnx").count("MatMul") for form in ("merge", "side")]
    assert products[0] == 2 * 4 + (0 if run.assembly.model.language.config.tie_word_embeddings else 1)
    assert products[1] > products[0]


def test_the_norms_of_an_fp32_folder_are_as_exact_as_torchs(tmp_path: Path) -> None:
    """Seen in wide rows, in a model whose logits are values behind its last norm."""
    write_language_model(tmp_path / "llm", hidden_size=2048, intermediate_size=32, head_dim=16)
    weights = load_file(tmp_path / "llm/model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
    states = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"].copy_(torch.eye(*weights["lm_head.weight"].shape))
    save_file(weights, tmp_path / "llm/model.safetensors", metadata={"format": "pt"})
    data = {"train": {"name": "alpaca", "path": "unused.json"}}
    run = trained(tmp_path / "run", {"model": {"language": str(tmp_path / "llm")}, "data": data}, std=0)
    rows = states[run.load("cpu").assembly.template.tokenize_record(answered()).input_ids].double()
    exact = rows / (rows.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights["model.norm.weight"]
    exact = exact[:, : len(weights["lm_head.weight"])]
    folder = export(run, tmp_path / "out", **EXACT)
    for values in (torch_logits(run, answered()), logits(folder, answered())):
        assert float((torch.from_numpy(values) / exact - 1).abs().max()) < 4e-7


@pytest.mark.parametrize("architecture", ["mistral", "smollm3"])
def test_an_fp32_folder_generates_the_tokens_of_the_trained_model(architecture: str, tmp_path: Path) -> None:
    """Further than the sliding window reaches, token by token from the cache."""
    run = text_run(tmp_path, architecture)
    folder = export(run, tmp_path / "out", **EXACT)
    (own,) = Answerer(run.load("cpu").assembly).answer_ids([asked()], max_new_tokens=16)
    (found,) = load(folder, threads=1).answer_ids([asked()], max_new_tokens=16)
    assert found == own


@pytest.mark.parametrize("form", ["merge", "side"])
def test_an_untrained_adapter_leaves_the_logits_of_the_base(form: str, tmp_path: Path) -> None:
    run = text_run(tmp_path, std=0)
    folder = export(run, tmp_path / "out", adapter=form, **EXACT)
    assert distance(run, folder) < TOLERANCE
    assert facts(folder)["adapter"]["weight_error"] == 0


@pytest.mark.parametrize(
    ("quant", "adapter", "trained_on", "form", "reason"),
    [
        ("fp16", "lora", "none", "merge", "both negligible; merged is faster and smaller"),
        ("fp32", "lora", "nf4", "merge", "both negligible; merged is faster and smaller"),
        ("fp16", BLOCK_MMA, "none", "side", "both negligible; both modalities share all weights beside it"),
        ("int4", "lora", "int4", "side", "beside the base"),
        ("int8", "lora", "none", "side", "beside the base"),
    ],
)
def test_the_form_of_the_adapter_follows_errors_that_count(
    quant: str, adapter: Any, trained_on: str, form: str, reason: str, tmp_path: Path
) -> None:
    """A base in fp16 is exact beside the adapter, merged it is not: by so little that it does not show."""
    run = text_run(tmp_path, adapter=adapter, quant=trained_on)
    found = facts(export(run, tmp_path / "out", quant=quant))["adapter"]
    assert found["form"] == form
    assert found["reason"].endswith(reason)


def test_a_side_path_is_there_only_where_the_adapter_is(tmp_path: Path) -> None:
    run = text_run(tmp_path, adapter={"name": "lora", "r": 2, "targets": "*.layers.1.*down_proj"})
    graph = export(run, tmp_path / "out", adapter="side", **EXACT) / "onnx/model.onnx"
    names = [node.name for node in onnx.load(graph, load_external_data=False).graph.node]
    assert [name for name in names if name.endswith("/side")] == ["layers.1/down_proj/side"]


def test_the_rotary_tables_reach_as_far_as_asked_and_no_further_than_the_model(tmp_path: Path) -> None:
    run = text_run(tmp_path)
    for asked_for, given in ((100, 100), (4096, 256), (0, 256)):
        folder = export(run, tmp_path / str(asked_for), context_length=asked_for, **EXACT)
        assert load(folder).context_length == given


# Grids


def side_by_side(own: MultimodalModel, layer: int, group: str, value: Callable[[Any], torch.Tensor]) -> bytes:
    linears = own.linears()
    layers = [linears[f"language.model.layers.{layer}.self_attn.{leaf}"] for leaf in GROUPED[group]]
    return b"".join(value(layer).contiguous().numpy().tobytes() for layer in layers)


@pytest.mark.parametrize(
    ("quant", "llm"),
    [("int4", {}), ({"name": "int4", "block_size": 64}, {"intermediate_size": 100}), ("int4", ODD)],
)
def test_a_base_trained_on_int4_is_copied_byte_for_byte(quant: Any, llm: dict[str, Any], tmp_path: Path) -> None:
    run = text_run(tmp_path, quant=quant, **llm)
    folder = export(run, tmp_path / "out", **EXACT_INT4)
    graph, own = folder / "onnx/model_q4.onnx", run.load("cpu").assembly.model
    for group in GROUPED:
        for part in ("codes", "scales", "zero_points"):
            stored = stored_bytes(graph, f"layers.1.self_attn.{group}.{part}")
            assert stored == side_by_side(own, 1, group, attrgetter(part))
    assert facts(folder)["quant"]["copied"] is True
    assert distance(run, folder) < 1e-3
    assert divergence(run, folder) < 1e-5
    fast = export(run, tmp_path / "fast", **{**EXACT_INT4, "accuracy_level": 4})
    assert distance(run, fast) < ROUNDED


@pytest.mark.parametrize("quant", ["nf4", {"name": "nf4", "double_quant": False}])
def test_a_base_trained_on_nf4_is_copied_byte_for_byte(quant: Any, tmp_path: Path) -> None:
    run = text_run(tmp_path, quant=quant)
    folder = export(run, tmp_path / "out", quant="nf4", adapter="side", **PLAIN_TABLES)
    graph, own = folder / "onnx/model_bnb4.onnx", run.load("cpu").assembly.model
    for group in GROUPED:
        name = f"layers.1.self_attn.{group}"
        assert stored_bytes(graph, f"{name}.codes") == side_by_side(own, 1, group, lambda layer: layer.codes)
        scales = side_by_side(own, 1, group, lambda layer: layer.packed().scales)
        assert stored_bytes(graph, f"{name}.scales") == scales
    assert facts(folder)["quant"]["copied"] is True
    assert distance(run, folder) < 1e-3
    assert divergence(run, folder) < 1e-5


def test_nf4_blocks_may_straddle_rows(tmp_path: Path) -> None:
    """Rows of 48 and 52 weights in blocks of 64; q, k and v share no block, so each stays a product of its own."""
    run = text_run(tmp_path, quant="nf4", **{**ODD, "head_dim": 16})
    folder = export(run, tmp_path / "out", quant="nf4", adapter="side", **PLAIN_TABLES)
    assert distance(run, folder) < 1e-3


@pytest.mark.parametrize(
    ("quant", "options"),
    [
        ({"name": "nf4", "block_size": 512}, {"quant": "nf4"}),  # blocks that ONNX Runtime does not have
        ("int4", {"mixed": "layers.0.*>int8", "accuracy_level": 0}),
        ("int4", {"adapter": "merge"}),
        ("none", {"quant": "int4", "calibrate": 0}),
    ],
)
def test_what_was_encoded_anew_is_not_said_to_be_copied(quant: Any, options: dict[str, Any], tmp_path: Path) -> None:
    folder = export(text_run(tmp_path, quant=quant), tmp_path / "out", **{"adapter": "side", **options})
    assert facts(folder)["quant"]["copied"] is False


@pytest.mark.parametrize(
    ("quant", "llm"),
    [
        ("nf4", {}),
        ("int8", {}),
        ("fp4", {}),
        ("none", {}),
        ("int8", ODD),
        ("none", {**ODD, "tie_word_embeddings": True}),
    ],
)
def test_other_bases_become_int8_which_keeps_them(quant: str, llm: dict[str, Any], tmp_path: Path) -> None:
    run = text_run(tmp_path, quant=quant, **llm)
    folder = export(run, tmp_path / "out")
    assert facts(folder)["quant"]["grid"] == "int8"
    assert distance(run, folder) < ROUNDED
    assert divergence(run, folder) < 1e-3


@pytest.mark.parametrize(("target", "grid"), [("cpu", "int8"), ("cuda", "nf4")])
def test_what_was_trained_on_nf4_follows_the_target(target: str, grid: str, tmp_path: Path, run_cli: RunCli) -> None:
    run, out = text_run(tmp_path, quant="nf4"), tmp_path / "out"
    arguments = ["--target", target, "--adapter", "side", "--out", str(out), "--no-verify"]
    outcome = run_cli("export", str(run.folder), *arguments)
    assert outcome.exit_code == 0, outcome.stderr
    assert f"linear layers: {grid} (" in outcome.stdout
    assert target in outcome.stdout.lower()
    assert (facts(out)["quant"]["grid"], facts(out)["quant"]["copied"]) == (grid, grid == "nf4")


@pytest.mark.parametrize("tied", [False, True])
def test_fp16_moves_logits_by_its_own_rounding(tied: bool, tmp_path: Path) -> None:
    run = text_run(tmp_path, tie_word_embeddings=tied)
    folder, exact = (export(run, tmp_path / quant, quant=quant, adapter="merge") for quant in ("fp16", "fp32"))
    assert distance(run, folder) < 0.02
    assert divergence(run, folder) < 1e-5
    half, whole = (next(path.glob("onnx/*_data")).stat().st_size for path in (folder, exact))
    assert half < 0.52 * whole


def test_mixed_puts_the_layers_that_match_on_another_grid(tmp_path: Path) -> None:
    run = text_run(tmp_path, quant="int4")
    folder = export(run, tmp_path / "out", mixed="layers.0.*>int8;*.1.*down_proj>fp32", **EXACT_INT4)
    bits = {}
    for node in onnx.load(folder / "onnx/model_q4.onnx", load_external_data=False).graph.node:
        if node.op_type == "MatMulNBits":
            bits[node.name] = next(a.i for a in node.attribute if a.name == "bits")
    parts = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    expected = {f"layers.0/{part}": 8 for part in parts} | {f"layers.1/{part}": 4 for part in parts[:3]}
    assert bits == expected
    assert distance(run, folder) < ROUNDED


def test_layers_with_one_input_on_different_grids_are_products_side_by_side(tmp_path: Path) -> None:
    run = text_run(tmp_path, "qwen2", BLOCK_MMA)
    mixed = "*q_proj>fp16;layers.1.mlp.up_proj>fp16"
    assert distance(run, export(run, tmp_path / "out", mixed=mixed, **EXACT)) < 0.02


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (EXACT, 1),
        ({"quant": "fp16"}, 1),
        ({"quant": "int8"}, 3),
        ({"quant": "int8", "embed_quant": "int4"}, 3),
        ({"quant": "int8", "head_quant": "int4"}, 6),
    ],
)
def test_a_tied_table_is_stored_once(options: dict[str, Any], parts: int, tmp_path: Path) -> None:
    """Once per grid: values, or codes, scales and zero points."""
    run = text_run(tmp_path, tie_word_embeddings=True)
    folder = export(run, tmp_path / "out", **options)
    (graph,) = folder.glob("onnx/model*.onnx")
    places = {place for name, place in external(graph).items() if name.startswith(("embed_tokens", "lm_head"))}
    assert len(places) == parts
    assert divergence(run, folder) < (0.05 if "int4" in options.values() else 1e-3)


@pytest.mark.parametrize("adapter", ["lora", BLOCK_MMA])
def test_a_run_in_bf16_is_exported_with_the_weights_it_has(adapter: Any, tmp_path: Path) -> None:
    run = text_run(tmp_path, "qwen3", adapter)
    text = (run.folder / "recipe.yaml").read_text()
    assert "\n  precision: fp32" in text
    (run.folder / "recipe.yaml").write_text(text.replace("\n  precision: fp32", "\n  precision: bf16"))
    half = Run.open(run.folder)
    folder = export(half, tmp_path / "out", **EXACT)
    assert half.assembly.model.dtype == torch.bfloat16
    assembly = half.load("cpu").assembly
    assembly.model.float()  # the same weights, computed in fp32
    batch = collate([assembly.template.tokenize_record(answered())], None)
    with torch.no_grad():
        own = assembly.model.logits(assembly.model.hidden(batch)).numpy()
    np.testing.assert_allclose(logits(folder, answered()), own, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("grid", ["int8", "int4", "fp32"])
@pytest.mark.parametrize("tied", [False, True])
def test_tables_held_as_in_training_are_written_as_those_in_fp32(
    grid: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = text_run(tmp_path, tie_word_embeddings=tied)
    run.record(precision="bfloat16")
    options = {"quant": "int8", "embed_quant": grid, "head_quant": grid}
    narrow = export(Run.open(run.folder), tmp_path / "narrow", **options)
    monkeypatch.setattr("lavintk_onnx.export._narrow_tables", lambda *_: None)
    wide = export(Run.open(run.folder), tmp_path / "wide", **options)
    for path in (wide / "onnx").iterdir():
        assert (narrow / "onnx" / path.name).read_bytes() == path.read_bytes()


def test_embedding_and_head_take_half_the_room_while_they_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, held = text_run(tmp_path), list[torch.dtype]()
    run.record(precision="bfloat16")

    def seen(model: MultimodalModel, *arguments: Any) -> Any:
        held.append(model.language.lm_head.weight.dtype)
        return encode_table(model, *arguments)

    monkeypatch.setattr("lavintk_onnx.decoder.encode_table", seen)
    monkeypatch.setattr("lavintk_onnx.export.encode_table", seen)
    export(Run.open(run.folder), tmp_path / "out", quant="int8")
    assert set(held) == {torch.bfloat16}


@pytest.mark.parametrize("form", ["merge", "side"])
def test_rows_of_different_lengths_go_together(form: str, tmp_path: Path) -> None:
    run = text_run(tmp_path, "mistral", BLOCK_MMA)
    model = load(export(run, tmp_path / "out", adapter=form, **EXACT), threads=1)
    short = Record("s", (Message("user", "red?"), Message("assistant", "no")))
    for record, found in zip((short, answered()), model.logits_batch([short, answered()]), strict=True):
        np.testing.assert_allclose(found, torch_logits(run, record), rtol=0, atol=TOLERANCE)


def run_with_rows(folder: Path, quant: str = "nf4", adapter: Any = "lora", *, alike: bool = False) -> Run:
    """Return a run that has its training data.

    :param alike: all rows are the same one, that of :func:`answered`.
    """
    rows = [{"instruction": QUESTION[0 if alike else i :], "input": "", "output": "red blue"} for i in range(24)]
    data = {"train": {"name": "alpaca", "path": str(folder / "alpaca.json")}}
    (folder / "alpaca.json").write_text(json.dumps(rows))
    write_language_model(folder / "llm")
    content = {"model": {"language": str(folder / "llm")}, "quant": quant, "adapter": adapter, "data": data}
    return trained(folder / "run", content)


@pytest.mark.parametrize("retune", [0, 2])
def test_another_grid_is_rounded_with_training_rows_in_mind(retune: int, tmp_path: Path) -> None:
    """The run itself stays as it is."""
    run = run_with_rows(tmp_path)
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    folder = export(run, tmp_path / "out", quant="int4", calibrate=8, retune=retune, adapter="side", **PLAIN_TABLES)
    own = Run.open(run.folder)
    assert divergence(own, folder) < 0.05
    found = facts(folder)
    assert found["report"]["requantized"]["steps"] == retune
    assert found["quant"]["copied"] is False
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("form", ["merge", "side"])
def test_layers_that_do_not_ship_on_the_new_grid_are_never_rounded_to_it(form: str, tmp_path: Path) -> None:
    run = run_with_rows(tmp_path)
    options = {"quant": "int4", "adapter": form, "accuracy_level": 0, "calibrate": 4, **PLAIN_TABLES}
    folder = export(run, tmp_path / "out", mixed="layers.0.*>fp32;layers.1.mlp.*>fp32;*self_attn*>fp32", **EXACT)
    assert distance(run, folder) < TOLERANCE
    folder = export(run, tmp_path / "half", mixed="layers.0.*>fp32;*self_attn*>fp32", **options)
    linears, graph = run.load("cpu").assembly.model.linears(), folder / "onnx/model_q4.onnx"
    name = "language.model.layers.1.self_attn.o_proj"
    if form == "side":  # as ``MatMul`` takes it
        assert (
            stored_bytes(graph, "layers.1.self_attn.o_proj.values") == linears[name].dequantize().t().numpy().tobytes()
        )
    assert facts(folder)["report"]["requantized"]["layers"] == 3
    found = divergence(run, folder)
    assert 0 < found < divergence(run, export(run, tmp_path / "whole", **options))


def test_what_is_reported_of_folded_and_rounded_weights_is_what_the_folder_has(tmp_path: Path) -> None:
    run = run_with_rows(tmp_path, alike=True)
    options = {"quant": "int4", "adapter": "merge", "accuracy_level": 0, **PLAIN_TABLES}
    folder, plain = (export(run, tmp_path / str(n), calibrate=n, **options) for n in (8, 0))
    row = run.load("cpu").assembly.template.tokenize_record(answered())
    labelled = collate([row], None).labels != IGNORED

    def figure(folder: Path) -> float:
        goal, own = (
            torch.from_numpy(values)[labelled].double().log_softmax(-1)
            for values in (torch_logits(run, answered()), logits(folder, answered()))
        )
        return float((goal.exp() * (goal - own)).sum(-1).mean())

    reported = facts(folder)["report"]["requantized"]
    assert (reported["layers"], reported["calibrated"], reported["rows"]) == (14, 14, 8)
    assert figure(folder) == pytest.approx(reported["rounded"]["divergence"], rel=0.02)
    assert figure(folder) < 0.7 * figure(plain)
    assert facts(folder)["quant"]["calibrated"] is True
    assert facts(plain)["quant"]["calibrated"] is False


@pytest.mark.parametrize("retune", [0, 2])
def test_the_error_beside_a_rounded_base_is_measured_against_the_trained_weights(retune: int, tmp_path: Path) -> None:
    run = run_with_rows(tmp_path, adapter={"name": "lora", "r": 2, "targets": "*.layers.1.*o_proj"})
    folder = export(run, tmp_path / "out", quant="int4", calibrate=4, retune=retune, adapter="side")
    graph, name = folder / "onnx/model_q4.onnx", "layers.1.self_attn.o_proj"

    def array(part: str, kind: Any) -> torch.Tensor:
        return torch.from_numpy(np.frombuffer(stored_bytes(graph, f"{name}.{part}"), kind).copy())

    model = run.load("cpu").assembly.model
    layer, adapter = model.linears()[f"language.model.{name}"], model.adapter
    assert adapter is not None
    (update,) = adapter.affine_updates()
    codes = array("codes", np.uint8).view(layer.out_features, -1, 16)
    whole = torch.stack([codes & 15, codes >> 4], -1).flatten(2).float()
    pairs = array("zero_points", np.uint8).view(layer.out_features, -1)
    zeros = torch.stack([pairs & 15, pairs >> 4], -1).flatten(1)[:, : codes.shape[1]].float()
    base = ((whole - zeros[..., None]) * array("scales", np.float32).view(zeros.shape)[..., None]).flatten(1)
    down, up = (array(part, np.float32) for part in ("all.down", "all.up"))
    side = up.view(2, -1).t() @ down.view(-1, 2).t()
    wanted = layer.dequantize() + update.up @ update.down
    shipped = base[:, : layer.in_features] + side
    expected = float((shipped - wanted).norm() / wanted.norm())
    assert facts(folder)["adapter"]["weight_error"] == pytest.approx(expected, rel=1e-3)
    assert expected > 0.01


def test_the_choice_of_a_form_rests_on_errors_against_the_trained_weights(tmp_path: Path) -> None:
    reason = facts(export(run_with_rows(tmp_path), tmp_path / "out", quant="int4", calibrate=4))["adapter"]["reason"]
    merged, side = (float(word) for word in reason.split() if word[:1].isdigit() and "e-" in word)
    assert 0.03 < merged < 0.3
    assert 0.03 < side < 0.3


def test_what_is_tuned_stays_beside_the_base(tmp_path: Path) -> None:
    run = run_with_rows(tmp_path)
    found = facts(export(run, tmp_path / "out", quant="int4", calibrate=4, retune=1))
    assert found["adapter"]["form"] == "side"
    assert "tuned" in found["adapter"]["reason"]
    options = {"quant": "int4", "retune": 1, "adapter": "merge"}
    refused(run, tmp_path / "merged", OptionsError, "retune=1", "adapter=side", **options)


@pytest.mark.parametrize("asked_for", [{"retune": 3}, {"calibrate": 16}])
@pytest.mark.parametrize(
    ("trained_on", "options", "words"),
    [("nf4", {"quant": "int8"}, ["ship as int8", "--quant int4"]), ("int4", {"adapter": "side"}, ["keep the int4"])],
)
def test_what_takes_training_rows_is_refused_where_nothing_is_rounded_anew(
    trained_on: str, options: dict[str, Any], words: list[str], asked_for: dict[str, int], tmp_path: Path
) -> None:
    ((name, value),) = asked_for.items()
    run = text_run(tmp_path, quant=trained_on)
    refused(run, tmp_path / "out", RunError, f"{name}={value}", *words, **options, **asked_for)


def test_layers_of_an_int8_folder_may_be_rounded_with_training_rows_in_mind(tmp_path: Path) -> None:
    folder = export(run_with_rows(tmp_path), tmp_path / "out", quant="int8", mixed="*mlp*>int4", calibrate=4)
    assert facts(folder)["report"]["requantized"]["layers"] == 6


def test_a_base_trained_on_int4_is_merged_with_training_rows_in_mind_if_asked_for(tmp_path: Path) -> None:
    run = run_with_rows(tmp_path, "int4", {"name": "lora", "targets": "q_proj,down_proj"})
    options = {"adapter": "merge", "accuracy_level": 0, **PLAIN_TABLES}
    plain, calibrated = (export(run, tmp_path / str(n), calibrate=n, **options) for n in (None, 8))
    assert facts(plain)["report"] == {}
    assert facts(calibrated)["report"]["requantized"]["layers"] == 4  # the others keep their codes
    assert divergence(run, calibrated) < divergence(run, plain)


def test_a_pattern_that_matches_no_layer_is_named_with_what_names_look_like(run: Run, nothing_left: Path) -> None:
    words = ["'model.layers.0.*'", "layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"]
    refused(run, nothing_left, OptionsError, *words, mixed="layers.0.*>int8;model.layers.0.*>fp32")


# Two modalities


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    small = np.random.default_rng(0).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    Image.fromarray(small).resize((28, 28), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return seeing_run(tmp_path_factory.mktemp("seeing"))


@pytest.fixture(scope="module", params=["merge", "side"])
def seeing_folder(request: pytest.FixtureRequest, seeing: Run) -> Path:
    return export(seeing, seeing.folder.with_name(request.param), adapter=request.param, **EXACT)


def test_texts_and_images_have_the_logits_of_the_trained_model(seeing: Run, seeing_folder: Path, picture: Path) -> None:
    assert distance(seeing, seeing_folder) < TOLERANCE
    assert distance(seeing, seeing_folder, picture) < TOLERANCE
    decoders = facts(seeing_folder)["graphs"]["decoder"]
    assert decoders == {"text": "onnx/decoder_text.onnx", "image": "onnx/decoder_model_merged.onnx"}


def test_the_second_modality_costs_only_its_side_path(seeing_folder: Path) -> None:
    image, text = (
        external(seeing_folder / "onnx" / f"{name}.onnx") for name in ("decoder_model_merged", "decoder_text")
    )
    assert {file for file, _, _ in (image | text).values()} == {"decoder_model_merged.onnx_data"}
    own = {name: place for name, place in text.items() if name not in image}
    assert all(image[name] == place for name, place in text.items() if name in image)
    assert own
    if seeing_folder.name == "side":
        assert all(name.endswith((".text.down", ".text.up", ".text.bias")) for name in own)
        size = (seeing_folder / "onnx/decoder_model_merged.onnx_data").stat().st_size
        once = sum(length for _, _, length in image.values())
        added = sum(length for _, _, length in own.values())
        assert size < once + added + 64 * (len(image) + len(own))
        assert added < 0.25 * once  # of so narrow a model, whose bottleneck is not small beside it


def test_lora_needs_one_decoder_for_both_modalities(tmp_path: Path, picture: Path) -> None:
    run = seeing_run(tmp_path, "lora", tie_word_embeddings=True)
    folder = export(run, tmp_path / "out", **EXACT)
    assert facts(folder)["graphs"]["decoder"] == {"all": "onnx/decoder_model_merged.onnx"}
    assert not (folder / "onnx/decoder_text.onnx").exists()
    assert distance(run, folder) < TOLERANCE
    assert distance(run, folder, picture) < TOLERANCE


def test_a_quantized_seeing_folder_stays_near_the_trained_model(tmp_path: Path, picture: Path) -> None:
    run = seeing_run(tmp_path, quant="int4")
    folder = export(run, tmp_path / "out", adapter="side")
    assert {path.name for path in folder.glob("onnx/*.onnx")} == {
        "decoder_model_merged_q4.onnx", "decoder_text_q4.onnx", "embed_tokens_int8.onnx", "embedding_int8.onnx",
        "vision_encoder_fp16.onnx",
    }  # fmt: skip
    assert distance(run, folder) < ROUNDED
    assert distance(run, folder, picture) < ROUNDED


# onnxruntime-genai


@pytest.fixture(scope="module")
def genai() -> Any:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when the module is loaded
    return pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed; it is in the extra dev")


def genai_answer(genai: Any, folder: Path, picture: Path | None = None) -> list[int]:
    """Return the ids of the answer to :data:`QUESTION`, by the exported template and tokenizer."""
    model = genai.Model(str(folder))
    tokenizer = genai.Tokenizer(model)
    parts = [{"type": "image"}, {"type": "text", "text": QUESTION}] if picture else QUESTION
    prompt = tokenizer.apply_chat_template(json.dumps([{"role": "user", "content": parts}]), add_generation_prompt=True)
    parameters = genai.GeneratorParams(model)
    if picture is None:
        ids = tokenizer.encode(prompt)
    else:
        inputs = model.create_multimodal_processor()(prompt, images=genai.Images.open(str(picture)))
        ids = inputs["input_ids"].as_numpy()[0]
    parameters.set_search_options(max_length=len(ids) + COUNT, do_sample=False)
    generator = genai.Generator(model, parameters)
    if picture is None:
        generator.append_tokens(ids)
    else:
        generator.set_inputs(inputs)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(id) for id in generator.get_sequence(0)][len(ids) :]


def three_answers(genai: Any, run: Run, folder: Path, *images: Path) -> list[list[int]]:
    """Return the greedy ids of torch, of our runtime and of onnxruntime-genai, which leaves the stop id out."""
    assembly = run.load("cpu").assembly
    models = (Answerer(assembly), load(folder, threads=1))
    answers = [model.answer_ids([asked(*images)], max_new_tokens=COUNT)[0] for model in models]
    stop = assembly.template.stop_ids
    answers.append(genai_answer(genai, folder, *images))
    return [[id for id in answer if id not in stop] for answer in answers]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "smollm3"])
def test_torch_our_runtime_and_onnxruntime_genai_generate_the_same_text(
    genai: Any, architecture: str, tmp_path: Path
) -> None:
    run = text_run(tmp_path, architecture, quant="int4")
    folder = export(run, tmp_path / "out", **EXACT_INT4)
    own, *others = three_answers(genai, run, folder)
    assert own
    assert others == [own, own]


def test_torch_our_runtime_and_onnxruntime_genai_see_the_same(genai: Any, tmp_path: Path, picture: Path) -> None:
    """A folder has one decoder for onnxruntime-genai: LoRA's answers both, LaVIN's is for images."""
    for name, adapter in (("lora", "lora"), ("mma", BLOCK_MMA)):
        run = seeing_run(tmp_path / name, adapter)
        folder = export(run, tmp_path / name / "out", **EXACT)
        own, *others = three_answers(genai, run, folder, picture)
        assert own
        assert others == [own, own]
        if name == "lora":
            own, *others = three_answers(genai, run, folder)
            assert others == [own, own]


def test_the_image_placeholder_has_no_row_in_the_head(seeing: Run, seeing_folder: Path) -> None:
    tokens = json.loads((seeing_folder / "tokenizer.json").read_text())["added_tokens"]
    (placeholder,) = (token["id"] for token in tokens if token["content"] == PLACEHOLDER)
    assert placeholder == seeing.assembly.model.language.config.vocab_size


# Bad input


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return text_run(tmp_path)


@pytest.fixture
def nothing_left(tmp_path: Path) -> Iterator[Path]:
    """Return an output folder that must not be there afterwards, nor anything half done beside it."""
    place = tmp_path / "outputs"
    place.mkdir()
    yield place / "out"
    assert list(place.iterdir()) == []


def refused(run: Run, out: Path, error: type[LavintkError], *words: str, **options: Any) -> None:
    with pytest.raises(error) as found:
        export(run, out, **options)
    missing = [word for word in words if word not in str(found.value)]
    assert not missing, (missing, str(found.value))


def test_lavins_shifted_positions_are_refused(tmp_path: Path, nothing_left: Path) -> None:
    run = text_run(tmp_path, adapter={"name": "mma", "compat": "lavin"})
    refused(run, nothing_left, ModelError, "compat=lavin", "compat=none")


@pytest.mark.parametrize(
    ("architecture", "llm", "words"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, **THETA}}, ["dynamic", "linear"]),
        ("llama", {"hidden_act": "gelu", "head_dim": 24}, ["'gelu'", "silu", "24", "16"]),
        ("granite", {"residual_multiplier": 0.5}, ["granite", "residual_multiplier 0.5"]),
        ("olmo2", {}, ["olmo2", "post_feedforward_layernorm"]),
    ],
)
def test_a_model_that_the_graph_cannot_express_is_refused(
    architecture: str, llm: dict[str, Any], words: list[str], tmp_path: Path, nothing_left: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(tiny.EXTRA, architecture, tiny.EXTRA.get(architecture, {}))
    refused(text_run(tmp_path, architecture, **llm), nothing_left, ModelError, "ONNX", *words)


@pytest.mark.parametrize("form", ["auto", "merge", "side"])
def test_an_adapter_without_an_affine_form_is_refused(
    form: str, run: Run, nothing_left: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def affine_updates(self: LoraAdapter, prefix: str = "") -> Iterator[Any]:
        raise NotAffineError("it bends")

    monkeypatch.setattr(LoraAdapter, "affine_updates", affine_updates)
    refused(run, nothing_left, NotAffineError, "it bends", adapter=form, **EXACT)


def test_an_adapter_that_goes_through_the_layers_out_of_order_is_refused(
    run: Run, nothing_left: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_order = LoraAdapter.affine_updates

    def backwards(self: LoraAdapter, prefix: str = "") -> Iterator[Any]:
        return iter(list(in_order(self, prefix))[::-1])

    monkeypatch.setattr(LoraAdapter, "affine_updates", backwards)
    refused(run, nothing_left, ModelError, "in order", "language.model.layers.0", adapter="merge", **EXACT)


@pytest.mark.parametrize(
    ("value", "grid", "words"),
    [(float("nan"), "int8", ["NaN"]), (float("nan"), "fp32", ["NaN"]), (1e4, "fp16", ["65504"])],
)
def test_weights_that_a_grid_cannot_hold_are_refused(
    value: float, grid: str, words: list[str], run: Run, nothing_left: Path
) -> None:
    adapter = run.load("cpu").assembly.model.adapter
    assert adapter is not None
    with torch.no_grad():
        for _, parameter in adapter.named_parameters():
            parameter.fill_(value)
    adapter.save(run.folder / "model" / "adapter", "base")
    refused(run, nothing_left, ModelError, *words, quant=grid, adapter="merge")


def test_a_folder_in_use_and_a_file_are_left_alone(run: Run, tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    for path in (folder / "kept", file):
        path.write_text("kept")
    refused(run, folder, RunError, str(folder), "not empty", "--out")
    refused(run, file, RunError, str(file), "is a file", "--out")
    refused(run, file / "below", RunError, str(file), "--out")
    assert (folder / "kept").read_text() == file.read_text() == "kept"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_empty_folder_is_taken(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert distance(run, export(run, tmp_path / "out", **EXACT)) < TOLERANCE


def test_an_export_that_fails_halfway_leaves_nothing(
    run: Run, nothing_left: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lavintk_onnx.export.write_folder", lambda *_: 1 / 0)
    for out in (nothing_left, nothing_left / "further" / "below"):
        with pytest.raises(ZeroDivisionError):
            export(run, out, **EXACT)


def test_missing_training_rows_are_named_where_rounding_needs_them(run: Run, nothing_left: Path) -> None:
    refused(run, nothing_left, DataError, "unused.json", quant="int4")


def test_folders_above_the_new_one_are_made(run: Run, tmp_path: Path) -> None:
    assert distance(run, export(run, tmp_path / "new" / "folders" / "out", **EXACT)) < TOLERANCE


def test_a_full_disk_leaves_nothing_and_says_so(run: Run, nothing_left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = iter(range(100))
    write = DataFile.write

    def full(self: DataFile, name: str, values: Array) -> Any:
        if next(count) == 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, name, values)

    monkeypatch.setattr(DataFile, "write", full)
    refused(run, nothing_left, RunError, str(nothing_left), "No space left on device", "disk full", **EXACT)


def test_another_base_than_the_trained_one_is_refused(run: Run, tmp_path: Path, nothing_left: Path) -> None:
    write_language_model(tmp_path / "llm", seed=1)
    refused(run, nothing_left, RunError, "trained on other weights", "sha256", str(tmp_path / "llm"), **EXACT)


def test_missing_packages_are_named_before_a_model_is_loaded(
    run: Run, nothing_left: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    monkeypatch.setattr(Run, "load", lambda *_, **__: pytest.fail("loaded"))
    refused(run, nothing_left, PluginError, "onnx_ir", "Install what is missing", **EXACT)


def test_wrong_options_are_named_with_those_that_are_known(run: Run, nothing_left: Path, run_cli: RunCli) -> None:
    outcome = run_cli("export", str(run.folder), "--quant", "int5", "--out", str(nothing_left))
    assert outcome.exit_code != 0
    for word in ("int5", "quant", "int4", "int8", "nf4", "fp16", "fp32"):
        assert word in outcome.stderr
    refused(run, nothing_left, OptionsError, "PATTERN>GRID", "int5", mixed="layers.0.*>int5")
    refused(run, nothing_left, OptionsError, "context_length", "-1", context_length=-1)


def test_the_command_writes_the_folder(run: Run, tmp_path: Path, run_cli: RunCli) -> None:
    out = tmp_path / "out"
    outcome = run_cli("export", str(run.folder), "--quant", "fp32", "--out", str(out), "--no-verify")
    assert outcome.exit_code == 0, outcome.stderr
    assert "linear layers: fp32 (as asked; trained on dense)" in outcome.stdout
    assert distance(run, out) < TOLERANCE

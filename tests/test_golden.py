"""``lavintk.testing.golden`` on the shared file and on files that an independent graph wrote."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lavintk.data.batch import Batch
from lavintk.errors import CheckpointError
from lavintk.models.attention import KeyValueCache
from lavintk.models.multimodal import MultimodalModel
from lavintk.testing.golden import BOUNDS, build_model, compare, main, make_batch
from lavintk.testing.golden_file import Geometry, read_golden
from tests import lavin_reference as reference

SHARED = Path(__file__).parent / "data" / "lavin_tiny.safetensors"
BATCHES = {"picture": [1], "text": [0], "mixed": [1, 0, 1], "text_first": [0, 1, 1, 0]}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "deeper": {"n_layers": 4, "vision_layers": 12, "temperature": 5.0},
    "wider": {"dim": 72, "n_heads": 6, "vision_width": 128, "hidden_proj": 20, "adapter_dim": 4, "image_size": 24,
              "patch": 8},
    "scaled": {"adapter_scale": 0.4, "temperature": 2.0, "norm_eps": 1e-5, "max_seq_len": 31},
    "a tap before the last block": {"vision_layers": 6, "prefix_text": [7], "prefix_image": [5, 6, 7]},
    "block": {"adapter_type": "block", "n_layers": 3, "adapter_scale": 1.5},
    "router_block": {"visual_adapter_type": "router_block", "vision_layers": 8},
    "block and router_block": {"adapter_type": "block", "visual_adapter_type": "router_block", "temperature": 1.0},
    "normal": {"visual_adapter_type": "normal", "adapter_scale": 0.7, "vision_layers": 8},
}  # fmt: skip


def rewritten(path: Path, target: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """Copy a file with other metadata, and with some tensors replaced."""
    with safe_open(path, "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (a safe_open is no mapping)
        before = json.loads(file.metadata()["config"])
    save_file(stored | (tensors or {}), target, metadata={"config": json.dumps(before | config)})
    return target


@pytest.mark.parametrize("routing", ["shared", "carried"])
def test_the_command_passes_on_the_original_graphs_numbers(routing: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(SHARED), "--routing", routing]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"]
    assert set(report["cases"]) == {"image_only", "text_only", "mixed"}
    assert all(len(case["gradients"]) == 93 for case in report["cases"].values())


@pytest.mark.parametrize("routing", ["shared", "carried"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_other_geometries_agree_with_an_independent_graph(geometry: str, routing: str, tmp_path: Path) -> None:
    config = reference.CONFIG | GEOMETRIES[geometry]
    file = reference.write_golden(tmp_path / "golden.safetensors", config, BATCHES, seed=len(geometry))
    report = compare(file, routing=routing)
    assert report["passed"], report["largest"]
    assert set(report["cases"]) == set(BATCHES)


@pytest.mark.parametrize(
    "change",
    [{"norm_eps": 1e-5}, {"temperature": 10.1}, {"adapter_scale": 1.001}, {"prefix_text": [5, 6, 8, 7]}],
    ids=str,
)
def test_a_slightly_wrong_model_does_not_pass(
    change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(rewritten(SHARED, tmp_path / "wrong.safetensors", change))]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["passed"]
    assert not report["within"]["logits"]


def test_a_gradient_where_there_should_be_none_does_not_pass(tmp_path: Path) -> None:
    name = "mixed.grad.adapter_proj.conv_A.weight"
    file = rewritten(SHARED, tmp_path / "wrong.safetensors", {}, {name: torch.zeros(16, 64)})
    report = compare(file)
    assert [name for name, within in report["within"].items() if not within] == ["gradients"]


def test_a_file_that_cannot_be_compared_in_full_is_refused_with_every_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = rewritten(SHARED, tmp_path / "a.safetensors", {"adapter_type": "repattn", "dim": "64", "patch": -1})
    assert main([str(bad)]) == 1
    text = capsys.readouterr().err
    for fault in ("must be one of attn, block, got 'repattn'", "'dim' must be a positive whole number", "'patch'"):
        assert fault in text
    extra = {
        "mixed.grad.layers.9.adapter_attn.conv_A.bias": torch.zeros(8),
        "mixed.labels": torch.zeros(3, 40, dtype=torch.int64),
        "stray": torch.zeros(1),
    }
    with pytest.raises(CheckpointError) as caught:
        compare(rewritten(SHARED, tmp_path / "b.safetensors", {}, extra))
    faults = "\n".join(caught.value.faults)
    for fault in ("belongs to no adapter parameter", "train no token", "stray belongs neither to the model nor"):
        assert fault in faults


def test_an_adapter_tensor_that_is_not_the_models_is_refused(tmp_path: Path) -> None:
    extra = {"model.layers.7.adapter_attn.conv_A.bias": torch.zeros(8)}
    extra |= {f"{case}.grad.layers.7.adapter_attn.conv_A.bias": torch.zeros(8) for case in ("image_only", "text_only")}
    extra["mixed.grad.layers.7.adapter_attn.conv_A.bias"] = torch.zeros(8)
    with pytest.raises(CheckpointError, match=r"layers\.7\.adapter_attn\.conv_A\.bias is unexpected"):
        compare(rewritten(SHARED, tmp_path / "a.safetensors", {}, extra))


def prompts(model: MultimodalModel, config: dict[str, Any], has_image: list[int], lengths: list[int]) -> Batch:
    """Return rows cut to ``lengths`` tokens, the modality token not counted."""
    case = reference.random_case(config | {"max_seq_len": max(lengths) + 1}, has_image, 5)
    logits = torch.zeros(len(has_image), max(lengths) + 1, config["vocab"])
    geometry, _ = Geometry.read(Path("memory"), json.dumps(config))
    whole = make_batch(geometry, case | {"logits": logits})
    kept = [torch.arange(n) + row * max(lengths) for row, n in enumerate(lengths)]
    index = torch.cat(kept)
    moved = torch.full((whole.tokens,), -1)
    moved[index] = torch.arange(len(index))
    return Batch(
        whole.input_ids[index], whole.labels[index], whole.positions[index], tuple(lengths), whole.conditions,
        whole.pixel_values, moved[whole.visual_slots], whole.record_ids,
    )  # fmt: skip


@pytest.mark.parametrize("placement", ["attn", "block"])
@pytest.mark.parametrize("has_image", [[1], [0], [1, 0, 1], [0, 1]], ids=str)
def test_compat_decodes_as_the_original_generator_does(placement: str, has_image: list[int], tmp_path: Path) -> None:
    """Each decoded token lies one position too near, and ``block`` gates on the block's input."""
    config = reference.CONFIG | {"adapter_type": placement, "temperature": 2.0}
    file = reference.write_golden(tmp_path / "golden.safetensors", config, {"any": [1]})
    golden = read_golden(file)
    model = build_model(golden)
    prompt, forced = 14, torch.randint(9, config["vocab"], (len(has_image), 4))
    batch = prompts(model, config, has_image, [prompt] * len(has_image))
    found = decode(model, batch, forced)
    w = {name: tensor.double() for name, tensor in golden.weights.items()}
    case = reference.random_case(config | {"max_seq_len": prompt + 1}, has_image, 5)
    with torch.no_grad():
        features = reference.vision(w, config, case["images"].double())
        h, _ = reference.embed(w, config, case["input_ids"], case["labels"], features, case["has_image"])
        h = torch.cat([h, w["tok_embeddings.weight"][forced]], dim=1)
        positions = torch.cat([torch.arange(prompt + 1), torch.arange(prompt, prompt + 4)])
        expected = reference.language(w, config, h, positions, generating=True)[:, prompt:]
        right = reference.language(w, config, h, torch.arange(prompt + 5), generating=True)[:, prompt:]
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-5)
    assert (right - expected).abs().max() > 1e-3, "the two numberings must differ for this test to mean anything"


def decode(model: MultimodalModel, batch: Batch, forced: torch.Tensor) -> torch.Tensor:
    """Return the logits ``[B, steps + 1, vocab]`` behind the prompts and behind each forced token."""
    cache = KeyValueCache(len(batch.lengths), max(batch.lengths) + forced.shape[1], torch.device("cpu"))
    ends = torch.tensor(batch.lengths).cumsum(0) - 1
    with torch.no_grad():
        logits = [model.logits(model.hidden(batch, cache)[ends])]
        for tokens in forced.unbind(1):
            logits.append(model.logits(model.decode(tokens, batch.conditions, cache)))
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("routing", ["shared", "carried"])
@pytest.mark.parametrize("placement", ["attn", "block"])
def test_by_default_cached_decoding_gives_the_logits_of_full_recomputation(placement: str, routing: str) -> None:
    from lavintk_mma import MixtureOptions
    from tests.test_mma import make_batch as two_rows
    from tests.test_mma import make_model, randomize

    model = make_model(MixtureOptions(visual="router", placement=placement, routing=routing)).eval()  # type: ignore[arg-type]
    randomize(model)
    batch, forced = two_rows(model), torch.randint(0, 50, (2, 5))
    found = decode(model, batch, forced)
    rows = [torch.cat([ids, new]) for ids, new in zip(batch.input_ids.split(batch.lengths), forced)]
    lengths = tuple(len(row) for row in rows)
    whole = Batch(
        torch.cat(rows), torch.zeros(sum(lengths)), torch.cat([torch.arange(n) for n in lengths]), lengths,
        batch.conditions, batch.pixel_values, batch.visual_slots, batch.record_ids,
    )  # fmt: skip
    with torch.no_grad():
        logits = model.logits(model.hidden(whole)).split(lengths)
    for row, length in enumerate(batch.lengths):
        torch.testing.assert_close(found[row], logits[row][length - 1 :], atol=2e-5, rtol=1e-5)


def test_the_bounds_are_those_agreed() -> None:
    assert BOUNDS == {"features": 1e-5, "logits": 3e-6, "loss": 2e-6, "gradients": 1e-4}

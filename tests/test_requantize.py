from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import lavintk
from lavintk.contracts import CalibratedQuantizer
from lavintk.data.batch import IGNORED, Batch
from lavintk.data.batches import collate
from lavintk.data.records import Message, Record
from lavintk.errors import RunError, UnknownNameError
from lavintk.folded import FoldedDecoder, second_moment
from lavintk.layers import DenseLinear, FrozenLinear
from lavintk.models.build import Assembly
from lavintk.models.multimodal import MultimodalModel
from lavintk.registry import Choice
from lavintk.requantize import (
    Retuning,
    divergence_sum,
    requantize,
    requantize_merged,
    requantize_run,
    round_layers,
    take_over,
)
from lavintk.run import Run, load_records
from lavintk.testing.runs import multimodal, recipe, write_everything
from lavintk_int4.quantizer import Int4Linear, Int4Quantizer

RECORDS = [
    Record(
        f"r{i}", (Message("user", f"what color is number {i}?"), Message("assistant", "blue red green"[: 4 + i % 9]))
    )
    for i in range(24)
]
INT4 = Choice("int4")


def trained(folder: Path, adapter: str, **changes: Any) -> Run:
    content = (recipe if adapter == "lora" else multimodal)(folder, max_steps=3, batch_size=4)
    run: Run = lavintk.train(content | changes, folder / f"run-{adapter}-{len(changes)}")
    return run


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of runs that were trained on weights of full precision, by adapter."""
    folder = write_everything(tmp_path_factory.mktemp("requantize"))
    return {adapter: trained(folder, adapter).folder for adapter in ("lora", "mma")}


@pytest.fixture(params=["lora", "mma"])
def run(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Run:
    return lavintk.load(folders[request.param])


@pytest.fixture
def lora(folders: dict[str, Path]) -> Run:
    return lavintk.load(folders["lora"])


def records_of(run: Run) -> list[Record]:
    return load_records(run.recipe.data.train, run.recipe.data.split)


def batch_of(assembly: Assembly, records: list[Record]) -> Batch:
    return collate([assembly.template.tokenize_record(record) for record in records], assembly.images)


def language_layers(model: MultimodalModel) -> dict[str, FrozenLinear]:
    return {name: layer for name, layer in model.linears().items() if name.startswith("language.")}


@torch.no_grad()
def logits_of(model: MultimodalModel, batch: Batch) -> Tensor:
    return model.eval().logits(model.hidden(batch))


class Recorder:
    """A quantizer that changes weights a little, keeps what it was given and can be calibrated."""

    requires_cuda = False

    def __init__(self) -> None:
        self.moments: list[Tensor] = []

    def quantize(self, weight: Tensor, bias: Tensor | None) -> FrozenLinear:
        return DenseLinear((weight * 16).round() / 16, bias)

    def quantize_calibrated(self, weight: Tensor, bias: Tensor | None, second_moment: Tensor) -> FrozenLinear:
        self.moments.append(second_moment.clone())
        return self.quantize(weight, bias)

    def empty(self, out_features: int, in_features: int, bias: bool, device: torch.device) -> FrozenLinear:
        raise NotImplementedError


# --- replacing the layers


def test_a_requantized_model_is_the_one_that_would_have_been_loaded_on_that_grid(run: Run, tmp_path: Path) -> None:
    """The run's folder with another ``quant`` in its recipe, loaded anew, is the reference."""
    text = (run.folder / "recipe.yaml").read_text()
    other = tmp_path / "other"
    for path in run.folder.rglob("*"):
        if path.is_file():
            target = other / path.relative_to(run.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    (other / "recipe.yaml").write_text(text.replace("\nquant: none", "\nquant: int4"))
    expected = lavintk.load(other).assembly
    actual = run.assembly
    report = requantize(actual, INT4, records_of(run), rows=0)
    batch = batch_of(actual, records_of(run))
    torch.testing.assert_close(logits_of(actual.model, batch), logits_of(expected.model, batch), rtol=0, atol=0)
    assert actual.model.adapter is not None
    assert expected.model.adapter is not None
    pairs = zip(actual.model.adapter.affine_updates(), expected.model.adapter.affine_updates(), strict=True)
    for ours, theirs in pairs:
        assert (ours.linear, ours.condition) == (theirs.linear, theirs.condition)
        assert torch.equal(ours.up @ ours.down, theirs.up @ theirs.down)
    assert (report.layers, report.calibrated, report.rows, report.retuned) == (14, 0, 0, None)


def test_layers_keep_their_identity_and_only_the_language_stack_changes(run: Run) -> None:
    model = run.assembly.model
    before = {name: (layer, layer.dequantize()) for name, layer in model.linears().items()}
    others = {name: p.detach().clone() for name, p in model.named_parameters()}
    requantize(run.assembly, INT4, records_of(run), rows=4)
    for name, layer in model.linears().items():
        assert layer is before[name][0]
        assert isinstance(layer, Int4Linear) == name.startswith("language.")
        assert torch.equal(layer.dequantize(), before[name][1]) != name.startswith("language.")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, others[name])


def test_a_run_that_was_trained_on_a_grid_gives_the_weights_it_was_trained_on(tmp_path: Path) -> None:
    run = trained(write_everything(tmp_path), "lora", quant="int4:block_size=16,search=none")
    before = {name: layer.dequantize() for name, layer in language_layers(run.assembly.model).items()}
    requantize(run.assembly, INT4, records_of(run), rows=0)
    for name, layer in language_layers(run.assembly.model).items():
        assert isinstance(layer, Int4Linear)
        assert layer.block_size == 32
        assert torch.equal(layer.dequantize(), Int4Quantizer().quantize(before[name], None).dequantize())


def test_a_layer_that_takes_over_another_is_that_one_and_keeps_its_hooks() -> None:
    weight, bias, calls = torch.randn(8, 64), torch.randn(8), []
    layer: FrozenLinear = DenseLinear(weight, bias)
    parent = nn.Sequential(layer).eval()
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    other = Int4Quantizer().quantize(weight, bias)
    expected, x = other.state_dict(), torch.randn(3, 64)
    take_over(layer, other)
    assert parent[0] is layer
    assert isinstance(layer, Int4Linear)
    assert not layer.training
    assert torch.equal(parent(x), F.linear(x, other.dequantize(), bias))
    assert calls == [1]
    handle.remove()
    parent(x)
    assert calls == [1]
    assert parent.state_dict().keys() == {f"0.{name}" for name in expected}
    assert torch.equal(copy.deepcopy(parent)(x), parent(x))


# --- calibration


def test_second_moment_is_the_sum_of_outer_products() -> None:
    x = torch.randn(2, 5000, 6)
    expected = sum(torch.outer(row, row) for row in x.flatten(0, 1).double())
    torch.testing.assert_close(second_moment(x).double(), expected, rtol=1e-5, atol=1e-2)
    assert second_moment(x.bfloat16()).dtype == torch.float32


def test_each_layer_is_calibrated_with_what_the_layers_before_it_give_once_they_are_rounded(run: Run) -> None:
    """In the finished model each layer has the inputs it was rounded for, adapters and images included."""
    model, recorder = run.assembly.model, Recorder()
    batch = batch_of(run.assembly, records_of(run))
    assert isinstance(recorder, CalibratedQuantizer)
    assert round_layers(model.eval(), recorder, batch) == (14, 14)
    inputs: list[Tensor] = []
    for layer in language_layers(model).values():
        layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0][0]))
    logits_of(model, batch)
    assert len(inputs) == len(recorder.moments) == 14
    for x, moment in zip(inputs, recorder.moments):
        torch.testing.assert_close(moment, x.t() @ x, rtol=1e-4, atol=1e-4)


def test_calibration_brings_the_model_nearer_to_the_trained_one(folders: dict[str, Path]) -> None:
    found = [
        requantize(lavintk.load(folders["lora"]).assembly, INT4, RECORDS, rows=rows, held_out=8).rounded
        for rows in (0, 16)
    ]
    assert found[1].divergence < 0.7 * found[0].divergence


def test_a_grid_without_calibration_is_used_as_it_is(lora: Run) -> None:
    report = requantize(lora.assembly, Choice("none"), RECORDS, rows=4, held_out=4)
    assert (report.calibrated, report.rows) == (0, 0)
    assert report.rounded.divergence == pytest.approx(0, abs=1e-6)
    assert report.rounded.agreement == 1.0


# --- the figures


def test_figures_are_those_of_the_formula_on_rows_that_calibrated_nothing(lora: Run) -> None:
    model, records = lora.assembly.model, RECORDS[:6]
    batch = batch_of(lora.assembly, records)
    before = logits_of(model, batch)
    report = requantize(lora.assembly, Choice("int4", {"search": "none"}), records, rows=0, held_out=3)
    after, labelled = logits_of(model, batch), batch.labels != IGNORED
    divergence = (before.softmax(-1) * (before.log_softmax(-1) - after.log_softmax(-1))).sum(-1)
    same = (before.argmax(-1) == after.argmax(-1)).float()
    rows = torch.arange(6).repeat_interleave(torch.tensor(batch.lengths))
    sums = [(divergence[labelled & (rows == i)], same[labelled & (rows == i)]) for i in range(6)]
    chosen = [
        trio
        for trio in ((a, b, c) for a in range(6) for b in range(a) for c in range(b))
        if float(torch.cat([sums[i][0] for i in trio]).mean()) == pytest.approx(report.rounded.divergence, rel=1e-3)
    ]
    assert len(chosen) == 1, "the figure is that of one choice of three held-out rows"
    held = torch.cat([sums[i][1] for i in chosen[0]])
    assert report.rounded.agreement == pytest.approx(float(held.mean()))
    assert report.rounded.tokens == len(held)


def test_divergence_and_its_gradient_are_those_of_the_formula(lora: Run) -> None:
    model = lora.assembly.model
    hidden = torch.randn(300, model.hidden_size, requires_grad=True)
    wanted = torch.randn(300, model.hidden_size)
    total = divergence_sum(model, hidden, wanted)
    (gradient,) = torch.autograd.grad(total, hidden)
    head = model.language.lm_head.weight
    goal, own = (wanted @ head.t()).softmax(-1), hidden @ head.t()
    expected = (goal * (goal.log() - own.log_softmax(-1))).sum()
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)
    # the gradient of the divergence with respect to the logits is the difference of the probabilities
    torch.testing.assert_close(gradient, (own.softmax(-1) - goal).detach() @ head, rtol=1e-3, atol=1e-5)


# --- tuning


COARSE = Choice("int4", {"search": "none", "block_size": 64})


def test_tuning_brings_the_model_nearer_and_changes_only_what_is_trained(run: Run) -> None:
    model, output = run.assembly.model, StringIO()
    trainable = {name: p.detach().clone() for name, p in model.trainable().items()}
    console = Console(file=output, width=200)
    report = requantize(
        run.assembly, COARSE, RECORDS if run.assembly.images is None else records_of(run) * 2, rows=0, held_out=4,
        retune_steps=30, retuning=Retuning(batch_size=4, lr=2e-3), console=console,
    )  # fmt: skip
    assert report.retuned is not None
    assert report.retuned.divergence < report.rounded.divergence
    assert report.shipped == report.retuned
    assert report.steps == 30
    assert any(not torch.equal(p, trainable[name]) for name, p in model.trainable().items())
    for layer in language_layers(model).values():
        assert isinstance(layer, Int4Linear)
    text = output.getvalue()
    assert "14 layers as int4:search=none,block_size=64, without calibration" in text
    assert "step 30/30" in text
    assert f"after 30 steps of tuning: KL {report.retuned.divergence:.1e}" in text


def test_tuning_that_makes_it_worse_is_undone(lora: Run) -> None:
    model = lora.assembly.model
    before = {name: p.detach().clone() for name, p in model.trainable().items()}
    report = requantize(
        lora.assembly, INT4, RECORDS, held_out=8, retune_steps=3, retuning=Retuning(batch_size=4, lr=3.0)
    )
    assert report.retuned is not None
    assert report.retuned.divergence > report.rounded.divergence
    assert report.shipped == report.rounded
    for name, parameter in model.trainable().items():
        assert torch.equal(parameter, before[name])


def test_the_same_seed_gives_the_same_model(folders: dict[str, Path]) -> None:
    found = []
    for _ in range(2):
        assembly = lavintk.load(folders["lora"]).assembly
        requantize(assembly, INT4, RECORDS, held_out=8, retune_steps=2)
        found.append(logits_of(assembly.model, batch_of(assembly, RECORDS[:2])))
    assert torch.equal(found[0], found[1])


def test_a_run_is_requantized_with_its_own_data_and_settings_and_stays_as_it_is_on_disk(run: Run) -> None:
    def files() -> Iterator[tuple[str, bytes]]:
        yield from ((str(path), path.read_bytes()) for path in sorted(run.folder.rglob("*")) if path.is_file())

    before = dict(files())
    training = run.assembly.model.training
    report = requantize_run(run, INT4, rows=3, held_out=4, retune_steps=2)
    assert (report.rows, report.calibrated, report.steps) == (3, 14, 2)
    assert dict(files()) == before
    assert run.assembly.model.training == training


# --- an adapter that ships inside the weights


def plain_model(run: Run, weights: dict[tuple[str, str], Tensor], condition: str) -> Any:
    """Return transformers' own model with other weights and biases of linear layers, no code of ours inside."""
    from transformers import AutoModelForCausalLM

    make: Any = AutoModelForCausalLM
    model = make.from_pretrained(run.recipe.model.language, dtype=torch.float32).eval()
    for (name, wanted), weight in weights.items():
        if wanted in (condition, ""):
            model.get_submodule(name.removeprefix("language.")).weight.data = weight
    return model


def by_hand(run: Run) -> dict[tuple[str, str], Tensor]:
    """Return ``W + scale * B A`` of LoRA's layers."""
    adapter: Any = run.assembly.model.adapter
    return {
        (name, "all"): (layer.base.dequantize() + layer.scale * layer.up @ layer.down).detach()
        for name, layer in adapter.layers.items()
    }


def test_folded_layers_that_are_not_rounded_are_the_trained_model_under_every_condition(run: Run) -> None:
    records = records_of(run)
    before = {name: layer.dequantize() for name, layer in language_layers(run.assembly.model).items()}
    report, layers = requantize_merged(run.assembly, Choice("none"), records, rows=4, held_out=4)
    assert report.rounded.divergence == pytest.approx(0, abs=1e-6)
    assert report.rounded.agreement == 1.0
    assert report.layers == len(layers)
    conditions = {condition for _, condition in layers}
    assert conditions == ({"", "text", "image"} if run.assembly.images else {"all"})
    for name, layer in language_layers(run.assembly.model).items():
        assert torch.equal(layer.dequantize(), before[name]), "the model itself stays as it is"


@torch.no_grad()
def test_the_figures_of_a_folded_model_are_those_of_transformers_with_the_rounded_sums(lora: Run) -> None:
    records = RECORDS[:6]
    report, layers = requantize_merged(lora.assembly, INT4, records, rows=3, held_out=3)
    assert report.calibrated == report.layers == 14
    trained = plain_model(lora, by_hand(lora), "all")
    rounded = plain_model(lora, {key: layer.dequantize() for key, layer in layers.items()}, "all")
    sums = []
    for record in records:
        batch = batch_of(lora.assembly, [record])
        labelled = batch.labels != IGNORED
        logits = (m(batch.input_ids[None]).logits[0][labelled] for m in (trained, rounded))
        goal, own = (values.double().log_softmax(-1) for values in logits)
        sums.append((goal.exp() * (goal - own)).sum(-1))
    trios = [torch.cat([sums[a], sums[b], sums[c]]) for a in range(6) for b in range(a) for c in range(b)]
    assert report.rounded.divergence > 1e-6
    nearest = min(trios, key=lambda trio: abs(float(trio.mean()) - report.rounded.divergence))
    assert float(nearest.mean()) == pytest.approx(report.rounded.divergence, rel=1e-3)
    assert len(nearest) == report.rounded.tokens


@torch.no_grad()
def test_a_folded_layer_is_rounded_for_what_its_own_conditions_rows_bring(run: Run) -> None:
    """Rows of text in transformers' own model with the rounded weights; LaVIN's other rows have images."""
    model, recorder = run.assembly.model.eval(), Recorder()
    records = records_of(run)
    folded = FoldedDecoder(model)
    assert folded.round(recorder, language_layers(model), batch_of(run.assembly, records)) == len(folded.rounded)
    condition = "all" if run.assembly.images is None else "text"
    moments = {
        name: moment
        for (name, wanted), moment in zip(folded.rounded, recorder.moments, strict=True)
        if wanted in ((condition, "") if condition == "all" else (condition,))
    }
    plain = plain_model(run, {key: layer.dequantize() for key, layer in folded.rounded.items()}, condition)
    for (name, wanted), layer in folded.rounded.items():
        if wanted in (condition, "") and layer.bias is not None:
            plain.get_submodule(name.removeprefix("language.")).bias = nn.Parameter(layer.bias)
    expected = {name: torch.zeros_like(moment) for name, moment in moments.items()}
    for name in expected:

        def add(_: Any, arguments: tuple[Tensor, ...], name: str = name) -> None:
            x = arguments[0][0]
            expected[name] += x.t() @ x

        plain.get_submodule(name.removeprefix("language.")).register_forward_pre_hook(add)
    for record in records:
        if not record.images:
            plain(batch_of(run.assembly, [record]).input_ids[None])
    assert moments
    for name, moment in moments.items():
        torch.testing.assert_close(moment, expected[name], rtol=1e-3, atol=1e-3)


def test_layers_that_were_not_named_stay_as_they_were(lora: Run) -> None:
    linears = language_layers(lora.assembly.model)
    before = {name: layer.dequantize() for name, layer in linears.items()}
    named = [name for name in linears if ".layers.0." in name]
    assert requantize(lora.assembly, INT4, RECORDS, rows=4, layers=named).layers == len(named) == 7
    for name, layer in linears.items():
        assert torch.equal(layer.dequantize(), before[name]) == (name not in named)
    _, layers = requantize_merged(lora.assembly, INT4, RECORDS, rows=4, layers=named)
    assert {name for name, _ in layers} == set(named)


# --- what cannot be done


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"rows": -1, "held_out": 0}, "rows must be at least 0, got -1; held_out must be at least 1, got 0"),
        ({"retune_steps": -2}, "retune_steps must be at least 0, got -2"),
    ],
)
def test_numbers_out_of_range_are_all_named(lora: Run, arguments: dict[str, int], said: str) -> None:
    with pytest.raises(RunError, match=said):
        requantize(lora.assembly, INT4, RECORDS, **arguments)  # type: ignore[arg-type]


def test_one_record_is_too_few(lora: Run) -> None:
    with pytest.raises(RunError, match="at least 2 records"):
        requantize(lora.assembly, INT4, RECORDS[:1])


def test_an_unknown_grid_is_refused_with_those_that_are_known(lora: Run) -> None:
    with pytest.raises(UnknownNameError, match="int4"):
        requantize(lora.assembly, Choice("int3"), RECORDS)


def test_a_grid_that_computes_on_cuda_only_is_refused_on_a_cpu(lora: Run, install_plugin: Callable[..., Path]) -> None:
    install_plugin(
        "cudaonly",
        "from types import SimpleNamespace\nimport lavintk\n@lavintk.hookimpl\n"
        "def lavintk_register_quantizers(registry):\n"
        "    registry.add('cudaonly', lambda options: SimpleNamespace(requires_cuda=True))\n",
    )
    from lavintk.plugins import installed_plugins

    installed_plugins.cache_clear()
    with pytest.raises(RunError, match="the grid cudaonly computes on CUDA only, and the model is on cpu"):
        requantize(lora.assembly, Choice("cudaonly"), RECORDS)


def test_there_must_be_something_to_tune(lora: Run) -> None:
    lora.assembly.model.adapter = None
    with pytest.raises(RunError, match="no trainable parameters"):
        requantize(lora.assembly, INT4, RECORDS, retune_steps=1)

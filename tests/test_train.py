"""Training runs from end to end on tiny models: what they promise about sums, resuming, stopping and faults."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lavintk
from lavintk.checkpoints import checkpoints
from lavintk.engine import EagerEngine
from lavintk.errors import RunError, TrainingError
from lavintk.hookspecs import hookimpl
from lavintk.plugins import installed_plugins
from lavintk.run import Run
from lavintk.testing import Outcome
from lavintk.testing.runs import multimodal, recipe
from lavintk.training import Trainer

RunCli = Callable[..., Outcome]


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.assembly.model.trainable().items()}


@pytest.mark.parametrize("quant", ["nf4", "int8", "none"])
@pytest.mark.parametrize("optim", ["adamw", "paged", "8bit", "paged-8bit"])
def test_lora_learns_on_every_quantizer_with_every_optimizer(
    tiny_folder: Path, tmp_path: Path, quant: str, optim: str
) -> None:
    content = recipe(tiny_folder, max_steps=12, batch_size=8) | {"quant": quant, "optim": optim}
    content["adapter"]["dropout"] = 0.0
    run = lavintk.train(content, tmp_path / "run")
    losses = [json.loads(line)["loss"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.2
    assert run.manifest["status"] == "finished"


def test_a_run_in_bf16_on_a_cpu_learns_what_one_in_fp32_does(tiny_folder: Path, tmp_path: Path) -> None:
    losses = {}
    for precision in ("bf16", "fp32"):
        content = multimodal(tiny_folder, max_steps=12, batch_size=8, precision=precision) | {"quant": "nf4"}
        run = lavintk.train(content, tmp_path / precision)
        metrics = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        losses[precision] = [line["loss"] for line in metrics]
    assert losses["fp32"][-1] < losses["fp32"][0] - 0.2
    # bf16 has 8 bits of precision; 1 % of the loss is much less than what is learned
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=1e-2)


def test_a_run_recomputes_all_layers_once_what_they_keep_does_not_fit(
    tiny_folder: Path, tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = multimodal(tiny_folder) | {"adapter": {"name": "mma", "dropout": 0.0}}
    expected = weights(lavintk.train(content, tmp_path / "expected"))
    settle, backward = Trainer._choose_engine, EagerEngine.backward

    def keep_a_layer(trainer: Trainer) -> None:  # as on a CUDA device with little memory
        settle(trainer)
        trainer.assembly.model.checkpointing, trainer._may_recompute_more = 1, True

    def full_in_the_second_step(engine: EagerEngine, window: Any, labelled: int, step: int) -> Any:
        losses = backward(engine, window, labelled, step)
        if step == 1 and engine.model.checkpointing is not True:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return losses

    monkeypatch.setattr(Trainer, "_choose_engine", keep_a_layer)
    monkeypatch.setattr(EagerEngine, "backward", full_in_the_second_step)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    outcome = run_cli("train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run"))
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.stdout.count("memory does not suffice for layers that keep what they computed") == 1
    run = lavintk.load(tmp_path / "run")
    assert run.manifest["recomputed_layers"] == 2
    for name, weight in expected.items():
        torch.testing.assert_close(weights(run)[name], weight, atol=1e-6, rtol=1e-6)


def test_a_run_goes_on_in_the_type_that_it_began_with(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lavintk.devices.cpu_multiplies_bf16", lambda: True)
    content = recipe(tiny_folder, max_steps=4, save_every=2, precision="auto")
    whole = lavintk.train(content, tmp_path / "whole")
    assert whole.manifest["precision"] == "bfloat16"
    shutil.copytree(tmp_path / "whole", tmp_path / "halfway")
    shutil.rmtree(tmp_path / "halfway" / "checkpoints" / "step-000004")
    monkeypatch.setattr("lavintk.devices.cpu_multiplies_bf16", lambda: False)
    resumed = lavintk.train(content, tmp_path / "halfway", resume=True)
    assert resumed.manifest["precision"] == "bfloat16"
    for name, expected in weights(whole).items():
        assert torch.equal(weights(resumed)[name], expected), name


def test_a_multimodal_run_trains_on_mixed_rows_and_answers_after_loading(tiny_folder: Path, tmp_path: Path) -> None:
    content = multimodal(tiny_folder, max_steps=3, batch_size=4) | {"quant": "nf4", "optim": "paged"}
    content["data"]["test"] = content["data"]["train"]
    run = lavintk.train(content, tmp_path / "run")
    evaluation = run.manifest["evaluation"]
    assert evaluation["questions"] == 8
    assert evaluation["majority_accuracy"] == 0.25
    assert {"accuracy_before", "accuracy_after"} <= set(evaluation)
    loaded = lavintk.load(tmp_path / "run")
    for name, expected in weights(run).items():
        assert torch.equal(weights(loaded)[name], expected), name
    picture = tiny_folder / "1.png"
    assert loaded.generate("what color is the shape?", picture, max_new_tokens=4) == run.generate(
        "what color is the shape?", picture, max_new_tokens=4
    )
    assert loaded.evaluate().scores["accuracy"] == evaluation["accuracy_after"]


def test_the_manifest_says_what_the_result_rests_on(tiny_folder: Path, tmp_path: Path) -> None:
    manifest = lavintk.train(recipe(tiny_folder), tmp_path / "run").manifest
    assert manifest == json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["versions"]["lavintk"] == lavintk.__version__
    assert len(manifest["data"]["sha256"]) == len(manifest["base"]["language"]["sha256"]) == 64
    assert manifest["peak_memory_bytes"] > 0
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text()) == manifest["recipe"]


def gradients(folder: Path, out: Path, batch_size: int, accumulate: int) -> dict[str, torch.Tensor]:
    """Return the gradients of the first window of eight rows."""
    content = recipe(folder, batch_size=batch_size, accumulate=accumulate)
    content["adapter"]["dropout"] = 0.0
    trainer = Trainer(Run.create(out, lavintk.recipe.make_recipe(content)), installed_plugins(), quiet())
    trainer.prepare(False)
    window = next(trainer.windows())
    trainer._backward(window, sum(batch.labelled for batch in window))
    return {name: p.grad for name, p in trainer.assembly.model.trainable().items() if p.grad is not None}


def quiet() -> Any:
    from rich.console import Console

    return Console(quiet=True)


def test_accumulated_micro_batches_weigh_every_trained_token_the_same(tiny_folder: Path, tmp_path: Path) -> None:
    """Rows of different answer lengths: eight at once, or two by two, give the same gradient."""
    whole = gradients(tiny_folder, tmp_path / "whole", 8, 1)
    parts = gradients(tiny_folder, tmp_path / "parts", 2, 4)
    for name, expected in whole.items():
        torch.testing.assert_close(parts[name], expected, atol=1e-6, rtol=1e-4, msg=name)


class PressCtrlC:
    """A plugin that interrupts the run after a step."""

    def __init__(self, step: int) -> None:
        self.at = step

    @hookimpl
    def lavintk_step_finished(self, step: Any) -> None:
        if step.step == self.at:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("optim", ["adamw", "paged", "paged-8bit"])
def test_an_interrupted_run_resumes_to_exactly_the_weights_of_an_uninterrupted_one(
    tiny_folder: Path, tmp_path: Path, optim: str
) -> None:
    content = multimodal(tiny_folder, max_steps=7, batch_size=3) | {"optim": optim}  # 3 steps to an epoch
    straight = weights(lavintk.train(content, tmp_path / "straight"))
    plugin = PressCtrlC(4)
    manager = installed_plugins().manager
    manager.register(plugin, "ctrl-c")
    try:
        stopped = lavintk.train(content, tmp_path / "resumed")
    finally:
        manager.unregister(plugin)
    assert stopped.manifest["status"] == "interrupted"
    assert [path.name for path in checkpoints(stopped.folder)][-1] == "step-000004"
    resumed = lavintk.train(Run.open(tmp_path / "resumed").recipe, tmp_path / "resumed", resume=True)
    assert resumed.manifest["status"] == "finished"
    for name, expected in straight.items():
        assert torch.equal(weights(resumed)[name], expected), name


def test_a_quantized_tower_is_trained_on_and_loaded_again_as_it_was(tiny_folder: Path, tmp_path: Path) -> None:
    run = lavintk.train(multimodal(tiny_folder) | {"vision_quant": "nf4"}, tmp_path / "run")
    for model in (run.assembly.model, lavintk.load(tmp_path / "run").assembly.model):
        bits = {name: layer.bits_per_weight() for name, layer in model.linears().items() if name.startswith("vision.")}
        assert bits
        assert all(found < 8 for found in bits.values())
    scores = [loaded.evaluate("easyvqa:limit=4").scores for loaded in (run, lavintk.load(tmp_path / "run"))]
    assert scores[0] == scores[1]


def test_packed_steps_learn_what_unpacked_ones_do_with_fewer_micro_batches(tiny_folder: Path, tmp_path: Path) -> None:
    content = multimodal(tiny_folder, max_steps=4, batch_size=1, accumulate=4)
    content["adapter"] = {"name": "mma", "dropout": 0.0}
    runs = {}
    for packed in (False, True):
        given = content | {"train": content["train"] | {"pack": packed, "pack_tokens": 128}}
        run = lavintk.train(given, tmp_path / str(packed))
        metrics = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        runs[packed] = [[line[key] for line in metrics] for key in ("tokens", "loss", "gradient_norm")]
    assert runs[True][0] == runs[False][0]  # the same rows in each step
    assert runs[True][1] == pytest.approx(runs[False][1], rel=1e-4)
    assert runs[True][2] == pytest.approx(runs[False][2], rel=1e-3)


@pytest.mark.parametrize(
    ("adapter", "accumulate", "packs"),
    [
        ("mma:dropout=0.0", 4, True),
        ("mma:dropout=0.0", 1, False),
        ("mma:dropout=0.0,compat=lavin,visual=router", 4, False),
    ],
)
def test_on_a_cpu_the_micro_batches_of_a_step_are_put_together_where_there_are_several(
    tiny_folder: Path, tmp_path: Path, adapter: str, accumulate: int, packs: bool
) -> None:
    losses, packed = [], []
    for pack in ("auto", False):
        content = multimodal(tiny_folder, max_steps=3, batch_size=1, accumulate=accumulate, pack=pack)
        run = lavintk.train(content | {"adapter": adapter}, tmp_path / str(pack))
        losses.append([json.loads(line)["loss"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()])
        packed.append("pack_tokens" in run.manifest)
    assert packed == [packs, False]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_loss_that_is_not_finite_stops_with_the_records_and_keeps_the_last_good_state(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lavintk.models.multimodal import MultimodalModel

    real, calls = MultimodalModel.loss_sum, []

    def broken_later(self: MultimodalModel, batch: Any) -> torch.Tensor:
        calls.append(batch.record_ids)
        return real(self, batch) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(MultimodalModel, "loss_sum", broken_later)
    with pytest.raises(TrainingError) as caught:
        lavintk.train(recipe(tiny_folder), tmp_path / "run")
    assert all(name in str(caught.value) for name in calls[2])
    assert "step 3" in str(caught.value)
    run = Run.open(tmp_path / "run")
    assert run.manifest["status"] == "failed"
    monkeypatch.setattr(MultimodalModel, "loss_sum", real)
    resumed = lavintk.train(run.recipe, tmp_path / "run", resume=True)
    assert (resumed.manifest["status"], resumed.manifest["steps"]) == ("finished", 4)


def test_training_stops_early_and_keeps_the_best_weights(tiny_folder: Path, tmp_path: Path) -> None:
    content = recipe(tiny_folder, max_steps=40, lr=3.0, eval_every=1, patience=2, schedule="constant", warmup=0)
    content["data"]["validation"] = content["data"]["train"]
    run = lavintk.train(content, tmp_path / "run")  # a rate of 3 can only make things worse
    assert run.manifest["status"] == "stopped early"
    assert run.manifest["steps"] == run.manifest["best_step"] + 2
    best = tmp_path / "run" / "checkpoints" / f"step-{run.manifest['best_step']:06d}"
    assert (best / "adapter" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "run" / "model" / "adapter" / "adapter_model.safetensors"
    ).read_bytes()


def test_only_the_newest_checkpoints_are_kept(tiny_folder: Path, tmp_path: Path) -> None:
    run = lavintk.train(recipe(tiny_folder, save_every=1, keep=2), tmp_path / "run")
    assert [path.name for path in checkpoints(run.folder)] == ["step-000003", "step-000004"]


def test_a_folder_in_use_is_left_alone(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty"):
        lavintk.train(recipe(tiny_folder), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]

"""Training on a CUDA device: number types, agreement with the CPU, running out of memory."""

import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import lavintk
from lavintk.dense import DenseQuantizer
from lavintk.engine import EagerEngine
from lavintk.errors import OutOfMemoryError
from lavintk.kernels import using
from lavintk.models.language import load_language_model
from lavintk.models.multimodal import MultimodalModel
from lavintk.models.sources import open_source
from lavintk.plan import plan
from lavintk.plugins import installed_plugins
from lavintk.recipe import make_recipe
from lavintk.run import Run
from lavintk.spare_memory import FILLED, kept_by_layer
from lavintk.testing.runs import multimodal, recipe
from lavintk.testing.tiny import write_language_model
from lavintk.training import Trainer

pytestmark = pytest.mark.gpu


def losses(run: Run) -> list[float]:
    return [json.loads(line)["loss"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("quant", ["nf4", "int8", "none"])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_multimodal_run_learns_in_every_number_type(
    tiny_folder: Path,
    tmp_path: Path,
    precision: str,
    quant: str,
) -> None:
    content = multimodal(tiny_folder, device="cuda", precision=precision, max_steps=15, batch_size=8)
    run = lavintk.train(content | {"quant": quant, "optim": "paged"}, tmp_path / "run")
    found = losses(run)
    assert run.manifest["recomputed_layers"] == 0  # there is room
    assert found[-1] < found[0] - 0.2


def test_the_losses_in_fp32_are_those_of_a_cpu(tiny_folder: Path, tmp_path: Path) -> None:
    def run(device: str) -> list[float]:
        content = multimodal(tiny_folder, device=device, precision="fp32", lr=1e-3)
        content["adapter"] = {"name": "mma", "dropout": 0.0}
        return losses(lavintk.train(content | {"quant": "nf4"}, tmp_path / device))

    on_cuda, on_cpu = run("cuda"), run("cpu")
    assert on_cuda[0] == pytest.approx(on_cpu[0], abs=1e-4)
    assert on_cuda == pytest.approx(on_cpu, abs=2e-2)  # Adam turns rounding near a gradient of 0 into whole steps


ADAPTERS = ("lora:r=16,alpha=32,dropout=0", "mma:dropout=0")


@pytest.fixture(scope="module")
def paces(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Losses of a CPU in fp32, by adapter, over the same rows in each step."""
    folder = tmp_path_factory.mktemp("paces")
    return {adapter: losses(lavintk.train(steady(tiny_folder, adapter), folder / adapter[:4])) for adapter in ADAPTERS}


def steady(folder: Path, adapter: str, **train: Any) -> dict[str, Any]:
    """Return a recipe whose steps all have all rows."""
    content = multimodal if adapter.startswith("mma") else recipe
    settings = {"max_steps": 12, "batch_size": 8, "lr": 5e-3, "schedule": "constant", "warmup": 0, **train}
    return content(folder, **settings) | {"adapter": adapter}


@pytest.mark.parametrize("kernels", ["none", "all"])
@pytest.mark.parametrize("engine", ["eager", "graph"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_step_learns_as_much_as_on_a_cpu(
    tiny_folder: Path, tmp_path: Path, paces: dict[str, list[float]], adapter: str, engine: str, kernels: str
) -> None:
    """A step that is lost, or half of one, would show: in bf16 a CPU is within 0.3 % of these losses."""
    with using(kernels):
        run = lavintk.train(steady(tiny_folder, adapter, device="cuda", engine=engine), tmp_path / "run")
    assert losses(run) == pytest.approx(paces[adapter], rel=0.015)


def gradients(engine: str, folder: Path, **settings: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return each step's loss and the last gradients, without taking steps."""
    torch.manual_seed(0)
    content = multimodal(folder, device="cuda", batch_size=2, accumulate=3, max_steps=1)
    content["train"] |= {"engine": engine, "pack_tokens": 256, "checkpointing": settings.pop("checkpointing", True)}
    content |= settings
    run = Run.create(folder.parent / f"{engine}-{random.getrandbits(32)}", make_recipe(content))
    trainer = Trainer(run, installed_plugins(), Console(quiet=True))
    trainer.prepare(resume=False)
    assert trainer.engine.name == engine
    trainer.assembly.model.train()
    found = []
    trainable = trainer.assembly.model.trainable()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # nothing at its start value, where half of the gradients are 0
        for parameter in trainable.values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.device))
    for window in itertools.islice(trainer.windows(), 3):
        trainer.optimizer.zero_grad(set_to_none=False)
        found.append(float(sum(trainer.engine.backward(window, sum(b.labelled for b in window), 0))))
        trainer.state.step = 0
    return found, {name: p.grad.clone() for name, p in trainable.items() if p.grad is not None}


def lora_gradients(data: Path, language: Path, run: Path, **train: Any) -> dict[str, torch.Tensor]:
    """Return the gradients of one step over all rows, with A and B away from their start, in fp32 on the host."""
    content = recipe(data, batch_size=8, max_steps=1, **train) | {"adapter": ADAPTERS[0]}
    content["model"] = {"language": str(language)}
    trainer = Trainer(Run.create(run, make_recipe(content)), installed_plugins(), Console(quiet=True))
    trainer.prepare(resume=False)
    trainable, generator = trainer.assembly.model.trainable(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainable.values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.device))
    trainer.assembly.model.train()
    window = next(trainer.windows())
    trainer.engine.backward(window, sum(batch.labelled for batch in window), 0)
    return {name: p.grad.float().cpu() for name, p in trainable.items() if p.grad is not None}


@pytest.mark.parametrize("kernels", ["none", "all"])
@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_gradients_of_lora_at_the_width_of_a_real_model_are_those_of_a_cpu(
    tiny_folder: Path, tmp_path: Path, engine: str, kernels: str
) -> None:
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    language = write_language_model(tmp_path / "llm", "llama", num_hidden_layers=4, **shape)
    expected = lora_gradients(tiny_folder, language, tmp_path / "cpu", device="cpu")
    with using(kernels):
        found = lora_gradients(tiny_folder, language, tmp_path / "cuda", device="cuda", engine=engine)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 0.3 * gradient.norm(), name  # in bf16 a CPU is up to 0.16 away
    ours, theirs = (torch.cat([grads[name].flatten() for name in expected]) for grads in (found, expected))
    assert float(ours @ theirs / (theirs @ theirs)) == pytest.approx(1.0, abs=0.01)  # no part is lost


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("quant", ["nf4", "fp4", "int4", "int8:threshold=0", "none"])
@pytest.mark.parametrize("adapter", ["lora", "mma:dropout=0,visual=router", "mma:dropout=0,placement=block"])
def test_a_replayed_graph_gives_the_gradients_of_eager_steps(
    tiny_folder: Path, tmp_path: Path, adapter: str, quant: str, checkpointing: bool
) -> None:
    settings: dict[str, Any] = {"adapter": adapter, "quant": quant, "checkpointing": checkpointing}
    eager, expected = gradients("eager", tiny_folder, **settings)
    graph, found = gradients("graph", tiny_folder, **settings)
    assert graph == pytest.approx(eager, rel=5e-3)
    assert found.keys() == expected.keys()
    whole = torch.cat([g.flatten() for g in expected.values()])
    difference = torch.cat([(found[name] - g).flatten() for name, g in expected.items()])
    assert difference.norm() < 0.03 * whole.norm()


def test_dropout_in_a_graph_draws_the_same_mask_in_the_recomputation(tiny_folder: Path, tmp_path: Path) -> None:
    """With the same seeds, recomputed layers give the gradients of kept ones only if masks agree."""
    same = [gradients("graph", tiny_folder, adapter="mma:dropout=0.5", checkpointing=True) for _ in range(2)]
    assert same[0][0] == same[1][0]
    without, _ = gradients("graph", tiny_folder, adapter="mma:dropout=0", checkpointing=True)
    assert same[0][0] != without


def test_running_out_of_memory_says_what_to_lower_and_loses_nothing(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, calls = MultimodalModel.loss_sum, []

    def greedy(self: MultimodalModel, batch: Any) -> torch.Tensor:
        calls.append(batch)
        if len(calls) == 3:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")  # a petabyte
        return real(self, batch)

    monkeypatch.setattr(MultimodalModel, "loss_sum", greedy)
    with pytest.raises(OutOfMemoryError, match=r"train\.batch_size \(now 2\)"):
        lavintk.train(recipe(tiny_folder, device="cuda", engine="eager", checkpointing=True), tmp_path / "run")
    monkeypatch.setattr(MultimodalModel, "loss_sum", real)
    resumed = lavintk.train(Run.open(tmp_path / "run").recipe, tmp_path / "run", resume=True)
    assert (resumed.manifest["status"], resumed.manifest["steps"]) == ("finished", 4)


@pytest.mark.parametrize("adapter", ["lora:dropout=0", "lora:dropout=0.1", "mma", "peft:method=lora"])
def test_what_a_layer_keeps_is_what_memory_grows_by(tiny_folder: Path, tmp_path: Path, adapter: str) -> None:
    folder = write_language_model(tmp_path, "llama", hidden_size=512, intermediate_size=1536, num_hidden_layers=12)
    content = recipe(tiny_folder, device="cuda", batch_size=8) | {"adapter": adapter}
    content["model"] = {"language": str(folder)}
    trainer = Trainer(Run.create(tmp_path / "run", make_recipe(content)), installed_plugins(), Console(quiet=True))
    trainer.prepare(resume=False)
    model, window = trainer.assembly.model, next(trainer.windows())
    engine = EagerEngine(model, trainer.scaler)
    peaks = {}
    for recomputed in (12, 4, 4):  # the first one also makes workspaces
        model.checkpointing, model.offload = recomputed, None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        engine.backward(window, 1, 0)
        peaks[recomputed] = torch.cuda.max_memory_allocated()
    tokens = window[0].tokens
    kept, entering = kept_by_layer(model, tokens), 2 * tokens * 512  # the input is kept either way
    assert (peaks[4] - peaks[12]) / 8 + entering == pytest.approx(kept, rel=0.1)


def test_layers_are_recomputed_as_far_as_memory_demands_and_a_run_that_goes_on_keeps_to_that(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = multimodal(tiny_folder, device="cuda", batch_size=8, max_steps=4, save_every=2)
    content["adapter"] = {"name": "mma", "dropout": 0.0}
    plugins = installed_plugins()
    needs = [
        plan(make_recipe(content, {"train.checkpointing": setting, "train.engine": "graph"}), plugins).device
        for setting in (False, 1, True)
    ]
    expected = losses(lavintk.train(make_recipe(content, {"train.checkpointing": True}), tmp_path / "all"))
    for count, room in ((0, needs[0] * 2), (2, needs[2] // 2)):
        monkeypatch.setattr("lavintk.training.available", lambda device, room=room: room / FILLED)
        run = lavintk.train(content, tmp_path / str(count))
        assert run.manifest["recomputed_layers"] == count
        assert losses(run) == pytest.approx(expected, rel=1e-3)
    shutil.rmtree(tmp_path / "2" / "checkpoints" / "step-000004")
    monkeypatch.setattr("lavintk.training.available", lambda device: 80 << 30)
    assert lavintk.train(content, tmp_path / "2", resume=True).manifest["recomputed_layers"] == 2


def test_packs_grow_where_memory_allows_and_a_step_learns_the_same(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = multimodal(tiny_folder, device="cuda", batch_size=1, accumulate=8, max_steps=4, save_every=2)
    content["adapter"] = {"name": "mma", "dropout": 0.0}
    expected = lavintk.train(make_recipe(content, {"train.pack_tokens": 64}), tmp_path / "small")
    run = lavintk.train(content, tmp_path / "large")
    assert run.manifest["pack_tokens"] > expected.manifest["pack_tokens"] == 64
    assert losses(run) == pytest.approx(losses(expected), rel=1e-3)
    shutil.rmtree(run.folder / "checkpoints" / "step-000004")
    monkeypatch.setattr("lavintk.training.available", lambda device: 1 << 30)
    resumed = lavintk.train(content, run.folder, resume=True)
    assert resumed.manifest["pack_tokens"] == run.manifest["pack_tokens"]


def test_a_device_that_is_full_all_the_same_recomputes_all_layers(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_module = MultimodalModel._run_module

    def greedy(self: MultimodalModel, *arguments: Any) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing() and not self.checkpointing:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")  # a petabyte
        return run_module(self, *arguments)

    monkeypatch.setattr(MultimodalModel, "_run_module", greedy)
    run = lavintk.train(multimodal(tiny_folder, device="cuda", max_steps=8, batch_size=8), tmp_path / "run")
    assert run.manifest["recomputed_layers"] == 2
    assert losses(run)[-1] < losses(run)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("trained_in", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_weights_come_to_the_device_bit_by_bit_as_to_a_cpu(
    tmp_path: Path,
    stored: torch.dtype,
    trained_in: torch.dtype | None,
    dtype: torch.dtype,
) -> None:
    folder = write_language_model(tmp_path, "qwen2", hidden_size=256, intermediate_size=4096, num_hidden_layers=6)
    file = folder / "model.safetensors"
    save_file({name: tensor.to(stored) for name, tensor in load_file(file).items()}, file, {"format": "pt"})

    def load(device: str) -> dict[str, torch.Tensor]:
        model = load_language_model(
            open_source(folder), DenseQuantizer(), device=torch.device(device), dtype=dtype, trained_in=trained_in
        )
        return {name: tensor.cpu() for name, tensor in model.state_dict().items()}

    expected, found = load("cpu"), load("cuda")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name

"""Training on a CUDA device: number types, agreement with the CPU, running out of memory."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import lavintk
from lavintk.dense import DenseQuantizer
from lavintk.errors import OutOfMemoryError
from lavintk.models.language import load_language_model
from lavintk.models.sources import open_source
from lavintk.plugins import installed_plugins
from lavintk.recipe import make_recipe
from lavintk.run import Run
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
    assert run.assembly.model.checkpointing
    assert found[-1] < found[0] - 0.2


def test_the_losses_in_fp32_are_those_of_a_cpu(tiny_folder: Path, tmp_path: Path) -> None:
    def run(device: str) -> list[float]:
        content = multimodal(tiny_folder, device=device, precision="fp32", lr=1e-3)
        content["adapter"] = {"name": "mma", "dropout": 0.0}
        return losses(lavintk.train(content | {"quant": "nf4"}, tmp_path / device))

    on_cuda, on_cpu = run("cuda"), run("cpu")
    assert on_cuda[0] == pytest.approx(on_cpu[0], abs=1e-4)
    assert on_cuda == pytest.approx(on_cpu, abs=2e-2)  # Adam turns rounding near a gradient of 0 into whole steps


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
    from lavintk.models.multimodal import MultimodalModel

    real, calls = MultimodalModel.loss_sum, []

    def greedy(self: MultimodalModel, batch: Any) -> torch.Tensor:
        calls.append(batch)
        if len(calls) == 3:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")  # a petabyte
        return real(self, batch)

    monkeypatch.setattr(MultimodalModel, "loss_sum", greedy)
    with pytest.raises(OutOfMemoryError, match=r"train\.batch_size \(now 2\)"):
        lavintk.train(recipe(tiny_folder, device="cuda", engine="eager"), tmp_path / "run")
    monkeypatch.setattr(MultimodalModel, "loss_sum", real)
    resumed = lavintk.train(Run.open(tmp_path / "run").recipe, tmp_path / "run", resume=True)
    assert (resumed.manifest["status"], resumed.manifest["steps"]) == ("finished", 4)


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

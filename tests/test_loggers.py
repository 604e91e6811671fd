import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lavintk_tensorboard
import lavintk_wandb
from lavintk import builtin, hookspecs
from lavintk.contracts import RunInfo, StepInfo
from lavintk.errors import PluginError
from lavintk.plugins import CORE, Plugins


@pytest.fixture
def plugins() -> Iterator[Plugins]:
    manager = pluggy.PluginManager("lavintk")
    manager.add_hookspecs(hookspecs)
    manager.register(builtin, CORE)
    manager.register(lavintk_tensorboard, "tensorboard")
    manager.register(lavintk_wandb, "wandb")
    manager.check_pending()
    yield Plugins(manager)
    for writer in lavintk_tensorboard._writers.values():
        writer.close()
    lavintk_tensorboard._writers.clear()
    lavintk_wandb._runs.clear()


@pytest.fixture(autouse=True)
def no_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what the developer's own shell may ask of wandb."""
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.delenv("LAVINTK_WANDB", raising=False)


class FakeWandb(ModuleType):
    """Records what a plugin asks of wandb."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.opened: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.summary: dict[str, Any] = {}
        self.exit_codes: list[int] = []

    def init(self, **arguments: Any) -> "FakeWandb":
        self.opened.append(arguments)
        return self

    def log(self, figures: dict[str, float], step: int) -> None:
        self.logged.append((step, figures))

    def finish(self, exit_code: int) -> None:
        self.exit_codes.append(exit_code)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def run_info(folder: Path, name: str = "demo") -> RunInfo:
    recipe = {"optim": "paged", "data": {"path": Path("train.json")}}
    return RunInfo(folder / name, name, recipe, total_steps=2, trainable_parameters=123)


def step_info(step: int) -> StepInfo:
    return StepInfo(
        step=step,
        epoch=step / 2,
        loss=2.5 / step,
        learning_rate=1e-3 * step,
        gradient_norm=0.75,
        tokens=64,
        tokens_per_second=320.0,
        samples_per_second=4.0,
        memory_bytes=3 * 2**29,
        seconds_left=1.0,
    )


def take_two_steps(plugins: Plugins, run: RunInfo) -> None:
    plugins.call("lavintk_run_started", run=run)
    plugins.call("lavintk_evaluation_finished", run=run, step=0, name="exact-match", scores={"accuracy": 0.25})
    for step in (1, 2):
        plugins.call("lavintk_step_finished", run=run, step=step_info(step))
    plugins.call("lavintk_checkpoint_saved", run=run, step=2, folder=str(run.folder / "checkpoint-2"))
    plugins.call("lavintk_evaluation_finished", run=run, step=2, name="exact-match", scores={"accuracy": 0.5})


def events(run: RunInfo) -> EventAccumulator:
    return EventAccumulator(str(run.folder / "tensorboard")).Reload()


def scalars(run: RunInfo, tag: str) -> list[tuple[int, Any]]:
    return [(event.step, pytest.approx(event.value)) for event in events(run).Scalars(tag)]


def test_tensorboard_reads_back_each_step_and_evaluation(plugins: Plugins, tmp_path: Path) -> None:
    run = run_info(tmp_path)
    take_two_steps(plugins, run)
    plugins.call("lavintk_run_finished", run=run, status="finished")
    assert scalars(run, "train/loss") == [(1, 2.5), (2, 1.25)]
    assert scalars(run, "train/learning_rate") == [(1, 1e-3), (2, 2e-3)]
    assert scalars(run, "train/gradient_norm") == [(1, 0.75), (2, 0.75)]
    assert scalars(run, "train/tokens_per_second") == [(1, 320.0), (2, 320.0)]
    assert scalars(run, "train/memory_gib") == [(1, 1.5), (2, 1.5)]
    assert scalars(run, "evaluation/exact-match/accuracy") == [(0, 0.25), (2, 0.5)]


def test_tensorboard_shows_the_recipe_and_the_size(plugins: Plugins, tmp_path: Path) -> None:
    run = run_info(tmp_path)
    plugins.call("lavintk_run_started", run=run)
    plugins.call("lavintk_run_finished", run=run, status="failed")
    (text,) = events(run).Tensors("recipe/text_summary")
    assert b'"optim": "paged"' in text.tensor_proto.string_val[0]
    assert scalars(run, "run/trainable_parameters") == [(0, 123.0)]


def test_tensorboard_has_all_up_to_a_checkpoint_on_disk_before_the_run_ends(plugins: Plugins, tmp_path: Path) -> None:
    run = run_info(tmp_path)
    plugins.call("lavintk_run_started", run=run)
    plugins.call("lavintk_step_finished", run=run, step=step_info(1))
    plugins.call("lavintk_checkpoint_saved", run=run, step=1, folder="checkpoint-1")
    assert scalars(run, "train/loss") == [(1, 2.5)]


def test_tensorboard_keeps_runs_apart_and_forgets_those_that_ended(plugins: Plugins, tmp_path: Path) -> None:
    first, second = run_info(tmp_path, "first"), run_info(tmp_path, "second")
    for run in (first, second):
        plugins.call("lavintk_run_started", run=run)
    plugins.call("lavintk_step_finished", run=second, step=step_info(1))
    plugins.call("lavintk_run_finished", run=second, status="interrupted")
    assert set(lavintk_tensorboard._writers) == {first.folder}
    plugins.call("lavintk_run_finished", run=first, status="finished")
    assert scalars(second, "train/loss") == [(1, 2.5)]
    assert "train/loss" not in events(first).Tags()["scalars"]


def test_a_resumed_run_continues_its_curves(plugins: Plugins, tmp_path: Path) -> None:
    run = run_info(tmp_path)
    for step in (1, 2):
        plugins.call("lavintk_run_started", run=run)
        plugins.call("lavintk_step_finished", run=run, step=step_info(step))
        plugins.call("lavintk_run_finished", run=run, status="interrupted")
    assert scalars(run, "train/loss") == [(1, 2.5), (2, 1.25)]


@pytest.mark.parametrize(
    ("variable", "value", "project"),
    [("LAVINTK_WANDB", "1", "lavintk"), ("WANDB_PROJECT", "vision", "vision")],
)
def test_wandb_gets_configuration_metrics_and_summary(
    plugins: Plugins,
    wandb: FakeWandb,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    variable: str,
    value: str,
    project: str,
) -> None:
    monkeypatch.setenv(variable, value)
    run = run_info(tmp_path)
    take_two_steps(plugins, run)
    plugins.call("lavintk_run_finished", run=run, status="finished")
    (opened,) = wandb.opened
    assert (opened["project"], opened["name"], opened["dir"]) == (project, "demo", str(run.folder))
    assert opened["config"] == {**run.recipe, "total_steps": 2, "trainable_parameters": 123}
    assert [step for step, _ in wandb.logged] == [0, 1, 2, 2]
    assert wandb.logged[0][1] == {"evaluation/exact-match/accuracy": 0.25}
    assert wandb.logged[1][1] == {
        "train/loss": 2.5,
        "train/learning_rate": 1e-3,
        "train/gradient_norm": 0.75,
        "train/tokens_per_second": 320.0,
        "train/samples_per_second": 4.0,
        "train/memory_gib": 1.5,
        "train/epoch": 0.5,
    }
    assert wandb.summary == {"evaluation/exact-match/accuracy": 0.5, "status": "finished"}
    assert wandb.exit_codes == [0]


def test_wandb_is_told_that_a_run_failed(
    plugins: Plugins, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LAVINTK_WANDB", "1")
    run = run_info(tmp_path)
    plugins.call("lavintk_run_started", run=run)
    plugins.call("lavintk_run_finished", run=run, status="failed")
    assert wandb.exit_codes == [1]
    assert wandb.summary == {"status": "failed"}


@pytest.mark.parametrize("environment", [{}, {"LAVINTK_WANDB": "0", "WANDB_PROJECT": "vision"}])
def test_wandb_stays_silent_unless_the_user_asks(
    plugins: Plugins,
    wandb: FakeWandb,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    environment: dict[str, str],
) -> None:
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    run = run_info(tmp_path)
    take_two_steps(plugins, run)
    plugins.call("lavintk_run_finished", run=run, status="finished")
    assert (wandb.opened, wandb.logged, wandb.exit_codes) == ([], [], [])


@pytest.mark.parametrize("module", [None, ModuleType("wandb")], ids=["not installed", "a folder of that name"])
def test_wandb_stays_silent_where_it_is_not_installed(
    plugins: Plugins, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: ModuleType | None
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("LAVINTK_WANDB", "1")
    run = run_info(tmp_path)
    take_two_steps(plugins, run)
    plugins.call("lavintk_run_finished", run=run, status="finished")
    assert not lavintk_wandb._runs


def test_a_wandb_that_lacks_a_package_of_its_own_is_no_secret(
    plugins: Plugins, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "wandb.py").write_text("import package_that_wandb_needs")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setenv("LAVINTK_WANDB", "1")
    with pytest.raises(PluginError, match="package_that_wandb_needs"):
        plugins.call("lavintk_run_started", run=run_info(tmp_path))


def test_a_fault_of_wandb_names_the_plugin_and_the_way_out(
    plugins: Plugins, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(**arguments: Any) -> None:
        raise RuntimeError("api_key not configured")

    monkeypatch.setenv("LAVINTK_WANDB", "1")
    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(PluginError, match=r"(?s)'wandb' failed .*api_key.*LAVINTK_DISABLE=wandb"):
        plugins.call("lavintk_run_started", run=run_info(tmp_path))


def test_loading_the_plugins_imports_nothing_heavy() -> None:
    code = (
        "import sys, lavintk_lora, lavintk_tensorboard, lavintk_wandb; "
        "print([name for name in ('torch', 'tensorboard', 'wandb', 'safetensors') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

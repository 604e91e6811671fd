"""The conformance kit: lavintk's own plugins keep their promises, and a plugin that breaks one is told which."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import lavintk
from lavintk.errors import PluginError
from lavintk.plugins import installed_plugins, load_plugins
from lavintk.registry import Choice, Entry, Registry
from lavintk.run import Run
from lavintk.testing import (
    Outcome,
    TinyModel,
    check_adapter,
    check_dataset,
    check_exporter,
    check_optimizer,
    check_quantizer,
)
from lavintk.testing.managers import PluginManager

RunCli = Callable[..., Outcome]
OURS = load_plugins(builtin_only=True)
ASKED_ELSEWHERE = ("hqq", "torchao")
"""Plugins over packages that need not be installed: their own tests, test_NAME_plugin.py, ask them."""


def asked_here(registry: Registry[Any]) -> list[Entry[Any]]:
    """Return the entries that are not asked elsewhere."""
    return [entry for entry in registry if entry.owner not in ASKED_ELSEWHERE]


def without_options(registry: Registry[Any]) -> list[str]:
    """Return the names that need no options."""
    entries = asked_here(registry)
    return [entry.name for entry in entries if not any(option.required for option in entry.declared_options())]


QUANTIZERS = [*without_options(OURS.quantizers), "nf4:double_quant=false", "int8:threshold=0"]
OPTIMIZERS = without_options(OURS.optimizers)
ADAPTERS = [
    *without_options(OURS.adapters),
    "lora:r=2,targets=q_proj+vision.*,rslora=true,dropout=0.1",
    "mma:placement=block,visual=router",
    "mma:visual=router_block,routing=carried,compat=lavin",
]
EXPORTERS = {"gguf": "gguf:type=f32", "hf": "hf", "onnx": "onnx", "peft": "peft"}
"""What the name of each exporter is asked with."""


@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizers_keep_their_promises(name: str) -> None:
    report = check_quantizer(lambda: OURS.quantizers.create(Choice.parse(name)))
    assert len(report.kept) > 10


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_keep_their_promises(name: str) -> None:
    report = check_optimizer(lambda: OURS.optimizers.create(Choice.parse(name)))
    assert len(report.kept) > 6


@pytest.mark.parametrize("vision", [True, False])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_keep_their_promises(name: str, vision: bool) -> None:
    if "vision" in name and not vision:
        name = name.replace("+vision.*", "")
    report = check_adapter(lambda: OURS.adapters.create(Choice.parse(name)), vision=vision)
    assert len(report.kept) > 10


# Exporters


def peft_logits(base: Path) -> Callable[[Path, Sequence[int]], Any]:
    def read(folder: Path, tokens: Sequence[int]) -> Any:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        loader: Any = AutoModelForCausalLM
        model: Any = PeftModel.from_pretrained(loader.from_pretrained(base), str(folder)).eval()
        with torch.no_grad():
            return model(torch.tensor([list(tokens)])).logits[0].numpy()

    return read


def gguf_logits(folder: Path, tokens: Sequence[int]) -> Any:
    """Read the file with lavintk's own reader of GGUF into transformers' model."""
    import torch

    from tests.test_gguf import rebuilt

    (path,) = folder.glob("*.gguf")
    with torch.no_grad():
        return rebuilt(path)(torch.tensor([list(tokens)])).logits[0].numpy()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", EXPORTERS.values())
def test_exporters_keep_their_promises(name: str, tiny_llm: TinyModel, tiny_run: Run) -> None:
    readers: dict[str, Any] = {"peft": peft_logits(tiny_llm.language), "gguf:type=f32": gguf_logits}
    make = lambda: OURS.exporters.create(Choice.parse(name))  # noqa: E731
    report = check_exporter(make, tiny_run, logits=readers.get(name))
    assert not report.skipped
    assert any("logits" in kept or "behaves" in kept for kept in report.kept)


def test_an_exporter_is_asked_on_a_run_of_the_kits_own_with_a_vision_tower() -> None:
    report = check_exporter(lambda: OURS.exporters.create(Choice("hf")), vision=True)
    assert not report.skipped


# Datasets


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


def llava(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


def picture(path: Path) -> Path:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)
    return path


def lavin_row(name: str, image: str | None) -> dict[str, Any]:
    source = "mscoco" if image else None
    prompt = "Instruction: Which?\nResponse:"
    return {"instruction": prompt, "answer": "yes", "image": image, "image_source": source, "qid": name}


def write_rows(name: str, folder: Path) -> Path:
    """Write four rows in a format of lavintk's that reads a file, two of them with an image where it knows images."""
    rows: Any
    if name == "openai":
        parts = [{"type": "text", "text": "Which?"}, {"type": "image_url", "image_url": {"url": "a.png"}}]
        picture(folder / "a.png")
        rows = [chat("Hi?", "Hello"), chat("One?", "1", "Two?", "2"), chat("Bye?", "Bye"), chat("", "red")]
        rows[3][0]["content"] = parts
        text = "\n".join(json.dumps({"messages": row}) for row in rows)
    elif name == "llava":
        picture(folder / "a.png")
        rows = [{"id": str(n), "conversations": llava("Which?", "red", "Sure?", "yes")} for n in range(4)]
        rows[3] |= {"image": "a.png", "conversations": llava("<image>\nWhich?", "red")}
        text = json.dumps(rows)
    elif name == "lavin":
        picture(folder / "images/train2014/COCO_train2014_a.png")
        text = json.dumps({"all": [lavin_row(f"q{n}", "a.png" if n == 3 else None) for n in range(4)]})
    else:
        raise ValueError(name)
    path = folder / f"{name}.json"
    path.write_text(text, encoding="utf-8")
    return path


def mme(folder: Path, second: str = "No") -> Path:
    for name in ("1", "2"):
        picture(folder / "existence" / f"{name}.jpg")
        (folder / "existence" / f"{name}.txt").write_text(f"Is it {name}?\tYes\nIs it dark?\t{second}")
    return folder


def scienceqa(folder: Path, answer: Any = 1) -> Path:
    problem = {
        "question": "Which?", "choices": ["red", "blue"], "hint": "", "image": None, "grade": "grade3",
        "subject": "natural science", "lecture": "Look.", "solution": "See.", "split": "train",
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    problems = {"1": problem | {"answer": 0}, "2": problem | {"answer": answer}}
    (folder / "problems.json").write_text(json.dumps(problems))
    return folder


Case = tuple[str, Path | None, dict[str, Any]]


def dataset_cases(folder: Path, tiny: Path) -> Iterator[Case]:
    """Yield name, good data and what else the check is given, for each of lavintk's formats."""
    yield "alpaca", tiny / "alpaca.json", {}
    yield "jsonl", tiny / "mixed.jsonl", {}
    for name in ("openai", "llava", "lavin"):
        (folder / name).mkdir()
        yield name, write_rows(name, folder / name), {}
    bad = {"bad": mme(folder / "bad_mme", "Perhaps"), "faults": ["existence/1.txt, line 2", "existence/2.txt, line 2"]}
    yield "mme", mme(folder / "mme"), bad
    bad = {"bad": scienceqa(folder / "bad_qa", 5), "faults": ["'2': answer: expected the index of a choice"]}
    yield "scienceqa", scienceqa(folder / "qa"), bad
    yield "easyvqa", None, {}


def test_datasets_keep_their_promises(tmp_path: Path, tiny_folder: Path) -> None:
    for name, path, others in dataset_cases(tmp_path, tiny_folder):

        def make(path: Path, name: str = name) -> Any:
            return OURS.datasets.create(Choice(name, {"limit": 40} if name == "easyvqa" else {"path": path}))

        report = check_dataset(make, path, **others)
        assert bool(report.skipped) == (path is None), name


def test_everything_that_lavintk_offers_is_asked(tmp_path: Path, tiny_folder: Path) -> None:
    for asked, registry in ((QUANTIZERS, OURS.quantizers), (OPTIMIZERS, OURS.optimizers), (ADAPTERS, OURS.adapters)):
        assert sorted({Choice.parse(name).name for name in asked}) == [entry.name for entry in asked_here(registry)]
    assert sorted(EXPORTERS) == OURS.exporters.names()
    assert sorted(name for name, _, _ in dataset_cases(tmp_path, tiny_folder)) == OURS.datasets.names()


# Plugins that break a promise


def wrong(table: str) -> list[Any]:
    """Return the cases of a table in ``tests/wrong_plugins.py``, whose import takes seconds."""
    from tests import wrong_plugins

    return [pytest.param(*case, id=name) for name, case in getattr(wrong_plugins, table).items()]


def lines(folder: Path) -> Path:
    rows = [{"id": name, "ask": f"Which {name}?", "answer": f"this {name}"} for name in "abcde"]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def test_small_plugins_that_keep_their_promises_pass(tmp_path: Path, tiny_run: Run) -> None:
    from tests import wrong_plugins as plugins

    check_quantizer(plugins.row_quantizer(), max_error=0.01)
    check_optimizer(plugins.momentum(), language_lr=1.0)
    check_adapter(plugins.ShiftAdapter)
    report = check_exporter(plugins.WeightsExporter, tiny_run)
    assert [reason for reason in report.skipped if "give logits=" in reason]
    check_dataset(plugins.LinesFormat, lines(tmp_path))


@pytest.mark.parametrize(("make", "message"), wrong("QUANTIZERS"))
def test_a_quantizer_that_breaks_a_promise_is_told_which(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        check_quantizer(make)


@pytest.mark.parametrize(("make", "message"), wrong("OPTIMIZERS"))
def test_an_optimizer_that_breaks_a_promise_is_told_which(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        check_optimizer(make, language_lr=1.0)


@pytest.mark.parametrize(("make", "message"), wrong("ADAPTERS"))
def test_an_adapter_that_breaks_a_promise_is_told_which(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        check_adapter(make, vision=False)


@pytest.mark.parametrize(("make", "message"), wrong("EXPORTERS"))
def test_an_exporter_that_breaks_a_promise_is_told_which(
    make: Callable[[], Any], message: str, tiny_run: Run, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(lambda: (tiny_run.folder / "exported.txt").unlink(missing_ok=True))
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        check_exporter(make, tiny_run)


@pytest.mark.parametrize(("make", "message"), wrong("DATASETS"))
def test_a_format_that_breaks_a_promise_is_told_which(
    make: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        check_dataset(make, lines(tmp_path))


def test_logits_that_differ_from_the_runs_are_told_with_figures(tiny_run: Run) -> None:
    def shifted(folder: Path, tokens: Sequence[int]) -> Any:
        from lavintk.testing.exporters import _transformers_logits

        return _transformers_logits(folder, tokens) * 1.01

    with pytest.raises(AssertionError, match=r"logits of a text row is off by 0\.01 of its size, at most 0\.001"):
        check_exporter(lambda: OURS.exporters.create(Choice("hf")), tiny_run, logits=shifted)


def test_a_scheme_of_its_own_is_read_as_its_exporter_would() -> None:
    from tests.wrong_plugins import Inverted, row_quantizer

    make = row_quantizer(Inverted)
    with pytest.raises(AssertionError, match=r"scheme 'inverted'.*give unpack= to the check"):
        check_quantizer(make)
    report = check_quantizer(make, unpack=lambda packed: packed.extra["sign"] * packed.codes * packed.scales[:, None])
    assert any(kept.startswith("FrozenLinear.packed") for kept in report.kept)


def test_what_a_machine_cannot_show_is_skipped_with_its_reason() -> None:
    import torch

    from tests.wrong_plugins import RefusesCpu, row_quantizer

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(pytest.skip.Exception, match=r"requires CUDA, and torch .* sees no device"):
        check_quantizer(row_quantizer(requires_cuda=True))
    openly = type("Optimizer", (RefusesCpu,), {"without_cuda": "it does not work"})
    assert "Optimizer on a CPU: build() refuses it: only on CUDA" in check_optimizer(openly).skipped
    report = check_adapter(lambda: OURS.adapters.create(Choice.parse("mma:visual=router")))
    assert any("do not fold" in reason for reason in report.skipped)


@pytest.mark.gpu
def test_a_layer_that_waits_for_the_device_may_not_say_that_it_is_safe_in_a_graph() -> None:
    from tests.wrong_plugins import WaitsForDevice, row_quantizer

    with pytest.raises(AssertionError, match=r"FrozenLinear\.graph_safe breaks its promise"):
        check_quantizer(row_quantizer(WaitsForDevice))


# Fixtures


class Loud:
    """Offers a quantizer under the name it is made with."""

    def __init__(self, name: str) -> None:
        self.name = name

    @lavintk.hookimpl
    def lavintk_register_quantizers(self, registry: Any) -> None:
        from tests.wrong_plugins import RowQuantizer

        registry.add(self.name, lambda options: RowQuantizer(), summary="rows of whole numbers")


def test_a_registered_plugin_is_seen_by_commands_and_trains_for_the_length_of_a_test(
    plugin_manager: PluginManager, run_cli: RunCli, tiny_llm: TinyModel, tmp_path: Path
) -> None:
    plugin_manager.register(Loud("rows"), "loud")
    assert plugin_manager.plugins.quantizers["rows"].owner == "loud"
    assert "rows of whole numbers" in run_cli("plugins", "show", "rows").stdout
    outcome = run_cli("train", *tiny_llm.arguments(), "--quant", "rows", "--out", str(tmp_path / "run"))
    assert outcome.exit_code == 0, outcome.stderr
    assert lavintk.load(tmp_path / "run").recipe.quant.name == "rows"


def test_no_registered_plugin_outlives_its_test() -> None:
    assert "rows" not in installed_plugins().quantizers


def test_the_manager_refuses_what_installing_would_refuse(plugin_manager: PluginManager) -> None:
    with pytest.raises(PluginError, match="'nf4' is offered by plugin 'bnb' and by plugin 'loud'"):
        plugin_manager.register(Loud("nf4"), "loud")
    with pytest.raises(PluginError, match="there is a plugin 'lora' already"):
        plugin_manager.register(Loud("rows"), "lora")

    class Misspelt:
        @lavintk.hookimpl
        def lavintk_register_quantizer(self) -> None: ...

    with pytest.raises(PluginError, match=r"'odd'.*lavintk_register_quantizer"):
        plugin_manager.register(Misspelt(), "odd")
    future = Loud("rows")
    future.lavintk_api = 99  # type: ignore[attr-defined]
    with pytest.raises(PluginError, match="wants version 99 of the plugin interface"):
        plugin_manager.register(future, "future")
    assert plugin_manager.plugins.names() == OURS.names()
    plugin_manager.register(Loud("rows"), "loud")


def test_the_manager_leaves_other_installed_plugins_out(
    install_plugin: Callable[..., Path], request: pytest.FixtureRequest
) -> None:
    install_plugin("stranger", "")
    assert "stranger" in load_plugins().names()
    manager: PluginManager = request.getfixturevalue("plugin_manager")
    assert "stranger" not in manager.plugins.names()
    manager.register(Loud("rows"), "stranger")


def test_a_tiny_vision_model_trains_by_recipe_and_by_command(
    run_cli: RunCli, tiny_vlm: TinyModel, tmp_path: Path
) -> None:
    assert tiny_vlm.vision is not None
    run = lavintk.train(tiny_vlm.recipe(quant="nf4", train={"max_steps": 2}), tmp_path / "one")
    assert run.recipe.train.batch_size == 2
    assert run.recipe.train.max_steps == 2
    outcome = run_cli("train", *tiny_vlm.arguments(1), "--adapter", "mma", "--out", str(tmp_path / "two"))
    assert outcome.exit_code == 0, outcome.stderr
    assert lavintk.load(tmp_path / "two").assembly.model.vision is not None


def test_pytest_starts_without_torch() -> None:
    code = (
        "import sys, pytest, lavintk.testing, lavintk.testing.fixtures\n"
        "print([n for n in ('torch', 'numpy', 'transformers', 'pydantic', 'click') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_could_not_be_asked_is_listed_at_the_end_of_the_session(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "from lavintk.testing import fixtures\n"
        "def pytest_configure(config):\n"
        "    if not config.pluginmanager.has_plugin('lavintk'):\n"
        "        config.pluginmanager.register(fixtures, 'lavintk')\n"
    )
    (tmp_path / "test_it.py").write_text(
        "from pathlib import Path\n"
        "from lavintk.testing.promises import Promises\n"
        "def test_it():\n"
        "    promises = Promises('mine')\n"
        "    promises.skip('FrozenLinear.graph_safe', 'no CUDA device')\n"
        "    assert promises.report().skipped == ('FrozenLinear.graph_safe: no CUDA device',)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "lavintk: not asked here" in done.stdout
    assert "FrozenLinear.graph_safe: no CUDA device (mine)" in done.stdout

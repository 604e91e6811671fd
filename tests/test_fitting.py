"""Recipes made to fit into cards, and what a run says that did not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from lavintk import fitting
from lavintk.cards import CARDS
from lavintk.cli.train import as_flags
from lavintk.errors import OutOfMemoryError, RecipeError
from lavintk.fitting import advice_for, fit, largest_part, parse_size
from lavintk.models import build
from lavintk.plan import GIB, Plan, plan, plan_of
from lavintk.plugins import installed_plugins
from lavintk.recipe import Recipe, make_recipe
from lavintk.spare_memory import FILLED
from lavintk.testing import Outcome
from lavintk.testing.runs import multimodal, recipe
from tests.test_plan import LAVIN, LORA, outline, text_recipe

RunCli = Callable[..., Outcome]
LEARNED = ("model", "data", "adapter", "optim", "quant")
"""Parts of a recipe that no measure may touch."""
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 11.76 GiB of which 512.00 MiB is free."
STREAMED = {"train.stream": "cpu", "train.engine": "layerwise"}
SMALL_ENDS = {"vision_quant": "nf4", "embed_quant": "nf4"}


@pytest.fixture
def geometry(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Recipe]:
    """Return a function that gives a recipe for a geometry; plans are made of its outline."""

    def choose(name: str, adapter: str, **train: Any) -> Recipe:
        model = outline(name, adapter)
        monkeypatch.setattr(fitting, "outline_of", lambda recipe, plugins: model)
        chosen = text_recipe(adapter, "paged-8bit" if adapter == LORA else "paged", 1, 512, accumulate=32, **train)
        vision = {"model.vision": "anything"} if adapter == LAVIN else {}
        return make_recipe(chosen.dump(), vision)

    return choose


@pytest.mark.parametrize(
    ("name", "adapter", "gib", "changes"),
    [
        ("7b", LORA, 6, {}),
        ("7b", LORA, 5, {"embed_quant": "nf4"}),
        ("7b", LORA, 4, STREAMED),
        ("7b", LAVIN, 6, {}),
        ("7b", LAVIN, 8, {}),
        ("13b", LORA, 6, STREAMED),
        ("13b", LORA, 8, STREAMED),
        ("13b", LORA, 12, {}),
        ("13b", LAVIN, 6, STREAMED),
        ("13b", LAVIN, 8, SMALL_ENDS),
        ("13b", LAVIN, 12, {}),
        ("65b", LORA, 6, STREAMED),
        ("65b", LORA, 8, STREAMED),
        ("65b", LORA, 12, STREAMED),
        ("65b", LORA, 24, STREAMED),
        ("65b", LAVIN, 6, STREAMED),
        ("65b", LAVIN, 24, STREAMED),
    ],
)
def test_cards_of_every_size_get_a_recipe_and_no_more_is_changed_than_needed(
    geometry: Callable[..., Recipe], name: str, adapter: str, gib: int, changes: dict[str, Any]
) -> None:
    given = geometry(name, adapter)
    found = fit(given, installed_plugins(), gib * GIB)
    assert found.plan.device <= gib * GIB
    spent = ("train.checkpointing", "train.pack_tokens", "train.resident_layers")  # on speed
    assert {key: value for key, value in found.changes.items() if key not in spent} == changes
    for key in LEARNED:
        assert getattr(found.recipe, key) == getattr(given, key)
    kept = {"checkpointing", "offload", "stream", "engine", "pack", "pack_tokens", "resident_layers"}
    assert found.recipe.train.model_dump(exclude=kept) == given.train.model_dump(exclude=kept)


def test_a_recipe_is_changed_only_as_far_as_it_takes_to_fit(tiny_folder: Path) -> None:
    content = multimodal(tiny_folder, batch_size=256, checkpointing=False)
    content["data"] |= {"max_length": 512}
    recipe, plugins = make_recipe(content), installed_plugins()
    roomy = fit(recipe, plugins, 80 * GIB)
    assert not roomy.changes
    assert roomy.recipe == recipe
    limits = [roomy.plan.device - 1]
    for _ in range(3):
        found = fit(recipe, plugins, limits[-1])
        assert found.plan.device <= limits[-1]
        assert found.plan.device == plan(found.recipe, plugins).device
        assert found.recipe.train.batch_size * found.recipe.train.accumulate == 256  # the same rows in each step
        limits.append(found.plan.device - 1)
    assert fit(recipe, plugins, limits[0]).changes == {"train.checkpointing": 1}  # of two layers
    context = r"GiB more than 0\.10 GiB(.|\n)*Most of the device is taken by: the CUDA context, 0\.92 GiB whatever"
    with pytest.raises(RecipeError, match=context):
        fit(recipe, plugins, GIB // 10)


@pytest.mark.parametrize(("given", "levels"), [(False, (8, 16, 24, True)), (16, (24, True)), (30, (True,)), (32, ())])
def test_only_as_many_layers_are_recomputed_as_memory_demands(
    geometry: Callable[..., Recipe], given: bool | int, levels: tuple[bool | int, ...]
) -> None:
    recipe, plugins = geometry("7b", LORA, batch_size=4, checkpointing=given), installed_plugins()

    def needs(count: bool | int) -> int:
        changed = make_recipe(recipe.dump(), {"train.checkpointing": count})
        return plan_of(outline("7b", LORA), changed, plugins).device

    for before, level in pairwise((given, *levels)):
        found = fit(recipe, plugins, needs(before) - 1)  # a little less than what the one before needs
        assert found.changes == {"train.checkpointing": level}
        assert found.plan.device == needs(level)
        many = "all layers" if level is True else f"{level} of 32 layers"
        assert found.steps[0].level.cost == f"{many} are computed again in the backward pass"
        assert as_flags(found.changes) == [f"--set train.checkpointing={json.dumps(level)}"]
    last = fit(recipe, plugins, needs(True) - 1).changes
    assert last["train.pack_tokens"] == 1024  # recomputing alone does not suffice


@pytest.mark.parametrize(
    ("name", "adapter", "gib", "card"),
    [
        ("7b", LORA, 6, "rtx2060"),
        ("7b", LORA, 24, "rtx3090"),
        ("7b", LAVIN, 8, "rtx3070"),
        ("7b", LAVIN, 80, "h100"),
        ("13b", LORA, 12, "rtx3060"),
        ("13b", LORA, 9, "rtx4090"),
    ],
)
def test_memory_that_is_left_goes_where_it_saves_most_time(
    geometry: Callable[..., Recipe], name: str, adapter: str, gib: int, card: str
) -> None:
    given, plugins = geometry(name, adapter), installed_plugins()
    model, limit = fitting.outline_of(given, plugins), FILLED * gib * GIB
    layers = len(model.layers)

    def possible(tokens: int, count: int) -> Plan:
        setting = True if count == layers else count or False
        changes = {"train.checkpointing": setting, **({"train.pack_tokens": tokens} if tokens > 512 else {})}
        return plan_of(model, make_recipe(given.dump(), changes), plugins)

    plans = {(tokens, count): possible(tokens, count) for tokens in (512, 1024, 2048) for count in range(layers + 1)}
    fitting_plans = [plan for plan in plans.values() if plan.device <= limit]
    found = fit(given, plugins, gib * GIB, card=CARDS[card])
    assert found.plan.device <= limit or not found.changes
    assert found.recipe.train.checkpointing != "auto"  # a larger card would be filled
    if fitting_plans:
        fastest = min(plan.seconds(CARDS[card]) / plan.tokens for plan in fitting_plans)
        assert found.plan.seconds(CARDS[card]) / found.plan.tokens <= 1.05 * fastest
    if found.changes:
        assert found.steps[-1].level.cost.startswith("memory is left: ")
        assert found.plan.step_seconds(CARDS[card]) < found.before.step_seconds(CARDS[card])
    assert not fit(given, plugins, gib * GIB, spend=False).changes


def test_what_a_recipe_settles_stays(geometry: Callable[..., Recipe]) -> None:
    for setting in (True, 16):
        given = geometry("7b", LORA, checkpointing=setting, pack_tokens=512)
        assert not fit(given, installed_plugins(), 80 * GIB).changes
    given = geometry("7b", LORA, pack=False)
    assert fit(given, installed_plugins(), 80 * GIB).changes == {"train.checkpointing": False}


def test_a_refusal_names_the_context_only_where_nothing_else_takes_more(geometry: Callable[..., Recipe]) -> None:
    said = {}
    for name in ("7b", "65b"):
        with pytest.raises(RecipeError) as raised:
            fit(geometry(name, LORA), installed_plugins(), GIB, same_base=True)
        said[name] = str(raised.value)
    assert "by: the CUDA context, 0.92 GiB whatever the recipe says, then embedding, head, norms, 0.49" in said["7b"]
    assert "by: embedding, head, norms, 0.98 GiB" in said["65b"]


def test_measures_that_a_stronger_one_makes_needless_are_taken_back(geometry: Callable[..., Recipe]) -> None:
    given = geometry("65b", LORA, checkpointing=False, offload=False, batch_size=2)
    found = fit(given, installed_plugins(), 7 * GIB)
    assert found.changes == {"train.offload": True, **STREAMED}
    assert [step.plan.device > 7 * GIB for step in found.steps] == [True, False]
    assert found.before.device >= found.steps[0].plan.device


def test_host_memory_decides_how_a_base_is_streamed(geometry: Callable[..., Recipe]) -> None:
    given, plugins = geometry("65b", LORA), installed_plugins()

    def changes(recipe: Recipe, host: int) -> dict[str, Any]:
        found = fit(recipe, plugins, 6 * GIB, host * GIB)  # which leaves no room for layers that stay on the device
        assert found.plan.on_host <= host * GIB
        return found.changes

    assert changes(given, 64) == STREAMED
    assert changes(given, 40) == {"train.stream": "cpu", "train.engine": "eager"}
    assert changes(given, 24) == {"train.stream": "disk", "train.engine": "layerwise"}
    assert changes(given, 8) == {"train.stream": "disk", "train.engine": "eager"}
    assert changes(make_recipe(given.dump(), {"train.accumulate": 8}), 40) == STREAMED
    costs = {host: fit(given, plugins, 6 * GIB, host * GIB).steps[-1].level.cost for host in (64, 40, 24, 8)}
    assert "behind the computing" in costs[64]
    assert "twice per micro-batch" in costs[40]
    assert "no inputs of a whole step have to wait" in costs[40]
    assert all("on the disk, and host memory need not hold it" in costs[host] for host in (24, 8))
    with pytest.raises(RecipeError, match=r"GiB of host memory (.|\n)*train\.accumulate is 32"):
        fit(given, plugins, 6 * GIB, GIB // 2)


@pytest.mark.parametrize(("name", "adapter", "gib"), [("13b", LORA, 8), ("65b", LORA, 24), ("65b", LAVIN, 12)])
def test_as_many_layers_of_a_streamed_base_stay_on_the_device_as_it_has_room_for(
    geometry: Callable[..., Recipe], name: str, adapter: str, gib: int
) -> None:
    given, plugins = make_recipe(geometry(name, adapter).dump(), {"train.accumulate": 1}), installed_plugins()
    found, layers = fit(given, plugins, gib * GIB), {"13b": 40, "65b": 80}[name]
    resident = found.recipe.train.resident_layers
    assert 0 < resident < layers
    assert found.plan.device <= FILLED * gib * GIB
    one_more = make_recipe(found.recipe.dump(), {"train.resident_layers": resident + 1})
    assert plan_of(outline(name, adapter), one_more, plugins).device > FILLED * gib * GIB
    bare = fit(given, plugins, gib * GIB, spend=False)
    assert bare.plan.streaming is not None
    assert found.plan.streaming is not None
    assert (len(bare.plan.streaming.layers), len(found.plan.streaming.layers)) == (layers, layers - resident)
    assert found.plan.seconds(CARDS["h100"]) < bare.plan.seconds(
        CARDS["h100"]
    )  # on which the bus is slow beside the rest
    assert f"{resident} of {layers} layers stay on the device" in found.steps[-1].level.cost


def test_layers_that_host_memory_has_no_room_for_stay_on_the_device_before_a_disk_is_asked(
    geometry: Callable[..., Recipe],
) -> None:
    given, plugins = make_recipe(geometry("65b", LORA).dump(), {"train.accumulate": 1}), installed_plugins()
    found = fit(given, plugins, 24 * GIB, 28 * GIB, spend=False)
    resident = found.recipe.train.resident_layers
    assert found.changes == {**STREAMED, "train.resident_layers": resident}
    assert found.plan.on_host <= 28 * GIB
    one_less = make_recipe(found.recipe.dump(), {"train.resident_layers": resident - 1})
    assert plan_of(outline("65b", LORA), one_less, plugins).on_host > 28 * GIB
    assert f"all but {resident} layers, for which it has no room" in found.steps[-1].level.cost
    assert fit(given, plugins, 24 * GIB, 28 * GIB).recipe.train.resident_layers > resident  # memory is left


def test_a_base_that_may_not_change_is_streamed_rather_than_stored_in_fewer_bits(
    geometry: Callable[..., Recipe],
) -> None:
    found = fit(geometry("13b", LAVIN), installed_plugins(), 8 * GIB, same_base=True, spend=False)
    assert found.changes == STREAMED


def test_the_advice_names_the_largest_item_and_a_size_that_works(
    geometry: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    given, plugins = geometry("13b", LAVIN), installed_plugins()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=8 * GIB))
    said = advice_for(given, plugins, torch.device("cuda"))
    assert "most of it for: linear layers (nf4), 6.10 GiB." in said
    assert "With `--fit 8.0GB` it would take" in said
    assert "embed_quant=nf4" in said
    assert fit(given, plugins, 8 * GIB).changes  # what the advice says
    roomy = SimpleNamespace(total_memory=80 * GIB)  # the plan said that it fits, and was wrong
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: roomy)
    assert "vision_quant=nf4" in advice_for(given, plugins, torch.device("cuda"))


@pytest.fixture
def card_of_12_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(total_memory=12 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.mark.usefixtures("card_of_12_gib")
@pytest.mark.parametrize(
    ("fault", "lacking"),
    [
        (FULL, "2.00 GiB more were asked for, 512.00 MiB were free"),
        ("0.39 GiB of host memory could not be pinned", "0.39 GiB of host memory could not be pinned"),
    ],
)
def test_a_device_that_is_full_while_loading_says_how_much_was_lacking_and_what_takes_most(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, fault: str, lacking: str
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise torch.cuda.OutOfMemoryError(fault)

    monkeypatch.setattr(build, "load_language_model", full)
    given = make_recipe(recipe(tiny_folder))
    with pytest.raises(OutOfMemoryError) as raised:
        build.build(given, installed_plugins(), torch.device("cpu"), torch.float32)
    said = str(raised.value)
    assert "while loading the model" in said
    assert f"of 12.0 GiB; {lacking}." in said
    assert "GiB, most of it for: " in said
    assert "No --fit that leaves what is learned as it is would fit into 0." in said


def test_the_largest_part_of_a_loaded_model_is_named(tiny_folder: Path) -> None:
    found = build.build(make_recipe(recipe(tiny_folder)), installed_plugins(), torch.device("cpu"), torch.float32)
    sizes: dict[str, int] = {}
    for name, tensor in found.model.state_dict().items():
        part = "layers" if ".layers." in name else "words" if "embed" in name or "head" in name else "rest"
        sizes[part] = sizes.get(part, 0) + tensor.nbytes
    named = {"layers": "the stack of decoder layers", "words": "the embedding", "rest": "the rest"}
    assert named[max(sizes, key=lambda part: sizes[part])] in largest_part(found.model)


def test_fit_auto_takes_what_is_free_and_needs_a_cuda_device(
    tiny_folder: Path, tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = make_recipe(multimodal(tiny_folder, batch_size=64, checkpointing=False))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content.dump()))
    path = str(tmp_path / "recipe.yaml")
    refused = run_cli("train", path, "--fit", "auto", "--dry-run")
    assert refused.exit_code != 0
    assert "train.device=cpu is a CPU here" in refused.stderr
    assert "--fit 8GB" in refused.stderr
    refused = run_cli("train", path, "--fit", "8GB", "--dry-run")
    assert refused.exit_code != 0
    assert "--fit 8GB has 1 fault" in refused.stderr
    assert "train.device=cpu is a CPU here" in refused.stderr
    assert run_cli("plan", path, "--fit", "8GB").exit_code == 0  # for a card elsewhere
    needed = plan(content, installed_plugins()).device
    monkeypatch.setattr("lavintk.devices.pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (needed - 1 + fitting.SPARE, 24 * GIB))
    fitted = run_cli("train", path, "--fit", "auto", "--dry-run")
    assert fitted.exit_code == 0
    assert "fit into auto (" in fitted.stdout
    assert "--set train.checkpointing=1" in fitted.stdout
    resolved = yaml.safe_load(fitted.stdout.partition("foretold\n")[2])
    assert resolved["train"]["checkpointing"] == 1


def test_plan_prints_what_each_change_brings_and_the_flags_that_make_it(
    tiny_folder: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    content = make_recipe(multimodal(tiny_folder, batch_size=256, checkpointing=False))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content.dump()))
    path = str(tmp_path / "recipe.yaml")
    needed = plan(content, installed_plugins()).device / GIB
    size = f"{needed - 0.005:.3f}GB"
    shown = run_cli("plan", path, "--fit", size, "--gpu", "rtx3060")
    assert "--set train.checkpointing=1" in shown.stdout
    assert "s per step on rtx3060: 1 of 2 layers are computed again" in shown.stdout
    found = json.loads(run_cli("plan", path, "--fit", size, "--json").stdout)
    again = json.loads(run_cli("plan", path, *" ".join(found["flags"]).split(), "--json").stdout)
    assert again["items"] == found["items"]
    refused = run_cli("plan", path, "--host", "8GB")
    assert "it goes with --fit" in refused.stderr


@pytest.mark.parametrize(("text", "gib"), [("8GB", 8.0), ("7.5 GiB", 7.5), ("24g", 24.0)])
def test_sizes_are_read_as_on_the_box(text: str, gib: float) -> None:
    assert parse_size(text) == gib * GIB

from pathlib import Path
from typing import Any

import pytest
import yaml

from lavintk.errors import RecipeError
from lavintk.plugins import load_plugins
from lavintk.recipe import Recipe, known_keys, make_recipe, parse_assignment, read_recipe, shipped
from lavintk.registry import Choice

SMALL: dict[str, Any] = {
    "name": "small",
    "model": {"language": "some/model"},
    "data": {"train": "alpaca:a.json"},
}


def faults_of(content: dict[str, Any], overrides: dict[str, Any] | None = None) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        make_recipe(content, overrides)
    return caught.value.faults


# Shipped recipes


@pytest.mark.parametrize("name", sorted(shipped()))
def test_a_shipped_recipe_is_valid_and_its_plugins_know_every_option(name: str) -> None:
    recipe = make_recipe(read_recipe(name))
    recipe.check(load_plugins())
    assert recipe.name == name


def test_the_demo_and_the_recipes_of_lavin_are_shipped() -> None:
    assert {"demo", "lavin-7b", "lavin-13b", "lavin-7b-lite", "lavin-13b-lite", "lavin-chat"} <= set(shipped())


@pytest.mark.parametrize("name", sorted(shipped()))
def test_a_recipe_written_out_and_read_again_is_the_same(name: str, tmp_path: Path) -> None:
    recipe = make_recipe(read_recipe(name))
    file = tmp_path / "again.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    assert make_recipe(read_recipe(str(file))) == recipe


# Faults


def test_all_faults_are_reported_together() -> None:
    faults = faults_of(
        {
            "model": {"language": 3},
            "data": {"train": "alpaca:a.json", "max_length": 1},
            "optimizer": "adamw",
            "quant": "nf4:a=1,a=2",
            "train": {"batch_sise": 2, "lr": -1, "precision": "bf61"},
        }
    )
    assert len(faults) == 7, faults
    assert any(fault.startswith("model.language: ") and fault.endswith("got 3") for fault in faults)
    assert any(fault.startswith("data.max_length: ") and fault.endswith("got 1") for fault in faults)
    assert any(fault.startswith("train.lr: ") and fault.endswith("got -1") for fault in faults)
    assert any(fault.startswith("train.precision: ") and fault.endswith("got 'bf61'") for fault in faults)
    assert any(fault.startswith("quant: ") and "'a' is given twice" in fault for fault in faults)
    assert "unknown key 'train.batch_sise'. Did you mean 'train.batch_size'?" in faults
    assert "unknown key 'optimizer'. Did you mean 'optim'?" in faults


def test_the_message_counts_the_faults_and_names_the_recipe() -> None:
    with pytest.raises(RecipeError, match=r"^recipe 'small' has 2 faults:\n  - "):
        make_recipe(SMALL, {"train.lr": 0, "train.seed": "x"})


def test_a_key_of_another_section_is_suggested_with_its_section() -> None:
    assert faults_of(SMALL, {"lr": 1e-3}) == ("unknown key 'lr'. Did you mean 'train.lr'?",)


def test_what_is_missing_is_named() -> None:
    assert faults_of({"model": {}, "data": {}}) == ("model.language is required", "data.train is required")


def test_a_value_with_several_allowed_forms_is_one_fault() -> None:
    (fault,) = faults_of(SMALL, {"train.checkpointing": "sometimes"})
    assert fault.startswith("train.checkpointing: ")
    assert fault.endswith("got 'sometimes'")


def test_a_choice_that_is_neither_name_nor_mapping_says_what_it_may_be() -> None:
    (fault,) = faults_of(SMALL, {"quant": 4})
    assert fault == "quant: must be a name, 'name:option=value', or a mapping with the key 'name', got 4"


def test_faults_that_plugins_find_are_reported_together_with_their_place() -> None:
    recipe = make_recipe(SMALL, {"quant": "nf5", "adapter": "lora:r=none", "optim": "adamw:momentum=1"})
    with pytest.raises(RecipeError) as caught:
        recipe.check(load_plugins())
    quant, adapter, optim = caught.value.faults
    assert quant.startswith("quant: no quantizer named 'nf5'. Known: ")
    assert adapter.startswith("adapter: adapter 'lora' (plugin lora): option 'r': ")
    assert optim.startswith("optim: optimizer 'adamw' (plugin core): unknown option 'momentum'")


@pytest.mark.parametrize("stream", ["cpu", "disk"])
def test_a_streamed_base_and_whole_micro_batches_as_graphs_do_not_go_together(stream: str) -> None:
    recipe = make_recipe(SMALL, {"train.engine": "graph", "train.stream": stream, "quant": "nf5"})
    with pytest.raises(RecipeError) as caught:
        recipe.check(load_plugins())
    quant, engine = caught.value.faults
    assert quant.startswith("quant: ")
    assert engine.startswith(f"train.engine: 'graph' does not go with train.stream={stream}, ")
    assert engine.endswith("use --engine auto, layerwise or eager, or --stream none")
    for settings in ({"train.engine": "graph"}, {"train.stream": stream}):
        make_recipe(SMALL, settings).check(load_plugins())


def test_layers_that_stay_on_the_device_are_those_of_a_streamed_base() -> None:
    recipe = make_recipe(SMALL, {"train.resident_layers": 4})
    with pytest.raises(
        RecipeError, match=r"resident_layers: 4 is for a base that is streamed(.|\n)*--stream cpu or disk"
    ):
        recipe.check(load_plugins())
    make_recipe(SMALL, {"train.resident_layers": 4, "train.stream": "disk"}).check(load_plugins())


# Reading


def test_an_unknown_recipe_suggests_a_shipped_one() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'demo'"):
        read_recipe("deemo")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"- a\n- b\n", "a recipe is a mapping of keys, found list"),
        (b"", "a recipe is a mapping of keys, found NoneType"),
        (b"a: [1", "not valid YAML"),
        (b"name: \xff\xfe", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused_with_its_name(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(RecipeError, match=reason) as caught:
        read_recipe(str(file))
    assert str(file) in str(caught.value)


def test_a_recipe_without_a_name_is_called_like_its_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in SMALL.items() if key != "name"}))
    assert make_recipe(read_recipe(str(file))).name == "mine"


# Choices and overrides


@pytest.mark.parametrize(
    "written",
    [
        "nf4:double_quant=false",
        {"name": "nf4", "double_quant": "false"},
        Choice("nf4", {"double_quant": "false"}),
    ],
)
def test_a_choice_may_be_text_mapping_or_object(written: object) -> None:
    recipe = make_recipe({**SMALL, "quant": written})
    assert recipe.quant == Choice("nf4", {"double_quant": "false"})
    assert recipe.dump()["quant"] == {"name": "nf4", "double_quant": "false"}


def test_a_choice_without_options_is_dumped_as_its_name() -> None:
    assert make_recipe(SMALL).dump()["quant"] == "none"


def test_overrides_change_what_they_name_and_nothing_else() -> None:
    recipe = make_recipe(SMALL, {"train.lr": 1e-2, "model.vision": "tower"})
    assert recipe.train.lr == 1e-2
    assert recipe.model.vision == "tower"
    assert recipe.model.language == "some/model"
    assert SMALL["model"] == {"language": "some/model"}


@pytest.mark.parametrize("written", ["mma:dim=4", {"name": "mma", "dim": 4}])
def test_an_override_reaches_into_the_options_of_a_choice(written: object) -> None:
    recipe = make_recipe({**SMALL, "adapter": written}, {"adapter.scale": 2})
    assert recipe.adapter.name == "mma"
    assert {key: str(value) for key, value in recipe.adapter.options.items()} == {"dim": "4", "scale": "2"}


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("train.lr=1e-3", "train.lr", 1e-3),
        ("train.lr=2.5E4", "train.lr", 2.5e4),
        ("train.clip=null", "train.clip", None),
        ("train.checkpointing=true", "train.checkpointing", True),
        ("train.betas=[0.9, 0.95]", "train.betas", [0.9, 0.95]),
        ("data.system=a = b", "data.system", "a = b"),
        ("quant=nf4:double_quant=false", "quant", "nf4:double_quant=false"),
        ("name=infinity", "name", "infinity"),
        ("name=nan", "name", "nan"),
    ],
)
def test_an_assignment_is_a_key_and_a_value_in_yaml(text: str, key: str, value: object) -> None:
    assert parse_assignment(text) == (key, value)


@pytest.mark.parametrize("text", ["train.lr", "=1", "train.lr=[1"])
def test_an_assignment_that_is_none_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(RecipeError, match="--set") as caught:
        parse_assignment(text)
    assert text in str(caught.value)


def test_every_key_can_be_set() -> None:
    recipe = make_recipe(SMALL)
    dumped = recipe.dump()
    leaves = {key for key in known_keys() if key not in ("model", "data", "train", "evaluation")}
    assert {"train.lr", "data.train", "evaluation.max_new_tokens"} <= leaves
    for key in leaves:
        value: Any = dumped
        for part in key.split("."):
            value = value[part]
        assert make_recipe(SMALL, {key: value}) == recipe, key


def test_a_recipe_can_not_be_changed_by_accident() -> None:
    recipe: Recipe = make_recipe(SMALL)
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.lr = 1.0

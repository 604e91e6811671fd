from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from lavintk.errors import OptionsError, PluginError, UnknownNameError
from lavintk.registry import Choice, NoOptions, Registry


@dataclass(frozen=True)
class GridOptions:
    bits: Literal[2, 4, 8] = field(default=4, metadata={"help": "bits of a code"})
    double_quant: bool = field(default=True, metadata={"help": "quantize the scales too"})
    scale: float = 1.0
    path: Path | None = None

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise ValueError(f"scale must be above 0, got {self.scale}")


@dataclass(frozen=True)
class FileOptions:
    path: Path
    limit: int | None = None


@pytest.fixture
def registry() -> Registry[Any]:
    made: Registry[Any] = Registry("quantizer")
    made.owned_by("grids").add("grid", lambda options: options, options=GridOptions, summary="a grid")
    made.owned_by("files").add("file", lambda options: options, options=FileOptions)
    made.owned_by("files").add("plain", lambda options: options)
    return made


def test_a_name_offered_twice_names_both_owners_and_a_way_out(registry: Registry[Any]) -> None:
    with pytest.raises(PluginError) as caught:
        registry.owned_by("newcomer").add("grid", lambda options: options)
    assert "quantizer 'grid' is offered by plugin 'grids' and by plugin 'newcomer'" in str(caught.value)
    assert "LAVINTK_DISABLE=newcomer" in str(caught.value)
    assert registry["grid"].owner == "grids"


def test_an_unknown_name_lists_the_known_ones_with_owners_and_suggests_the_closest(
    registry: Registry[Any],
) -> None:
    with pytest.raises(UnknownNameError) as caught:
        registry["gird"]
    assert str(caught.value) == (
        "no quantizer named 'gird'. Known: file (files), grid (grids), plain (files). Did you mean 'grid'?"
    )


def test_an_empty_registry_says_that_no_plugin_offers_anything() -> None:
    empty: Registry[Any] = Registry("exporter")
    with pytest.raises(UnknownNameError, match=r"Known: none \(no plugin offers one\)"):
        empty["onnx"]


def test_text_from_the_command_line_becomes_the_declared_types(registry: Registry[Any]) -> None:
    made = registry.create(Choice.parse("grid:bits=8,double_quant=false,scale=2.5,path=a/b"))
    assert made == GridOptions(8, False, 2.5, Path("a/b"))


def test_values_from_yaml_are_taken_as_they_are(registry: Registry[Any]) -> None:
    assert registry["file"].create({"path": "x.json", "limit": None}) == FileOptions(Path("x.json"))


def test_all_faulty_options_are_reported_together(registry: Registry[Any]) -> None:
    with pytest.raises(OptionsError) as caught:
        registry["grid"].parse_options({"bit": 4, "bits": "5", "double_quant": "maybe"})
    unknown, bits, double_quant = caught.value.faults
    assert unknown == "unknown option 'bit'; known: bits, double_quant, scale, path. Did you mean 'bits'?"
    assert bits.startswith("option 'bits': ")
    assert bits.endswith("got '5'")
    assert double_quant.startswith("option 'double_quant': ")
    assert caught.value.subject == "quantizer 'grid' (plugin grids)"


def test_a_missing_required_option_is_named(registry: Registry[Any]) -> None:
    with pytest.raises(OptionsError, match="option 'path' is required"):
        registry["file"].parse_options({"limit": 3})


def test_what_the_dataclass_itself_refuses_is_a_fault_of_the_options(registry: Registry[Any]) -> None:
    with pytest.raises(OptionsError, match="scale must be above 0, got -1"):
        registry["grid"].parse_options({"scale": "-1"})


def test_an_entry_without_options_refuses_any(registry: Registry[Any]) -> None:
    assert registry["plain"].parse_options({}) == NoOptions()
    with pytest.raises(OptionsError, match="unknown option 'bits'; known: none"):
        registry["plain"].parse_options({"bits": "4"})


def test_options_are_checked_without_calling_the_factory() -> None:
    def explode(options: object) -> None:
        raise AssertionError("called")

    registry: Registry[Any] = Registry("adapter")
    registry.add("heavy", explode, options=FileOptions)
    assert registry["heavy"].parse_options({"path": "x"}) == FileOptions(Path("x"))


def test_a_package_that_a_factory_misses_is_reported_with_the_plugin() -> None:
    def needs_something(options: object) -> None:
        import package_that_nobody_has  # type: ignore[import-not-found]  # noqa: F401

    registry: Registry[Any] = Registry("adapter")
    registry.owned_by("heavy").add("heavy", needs_something)
    with pytest.raises(PluginError) as caught:
        registry.create(Choice("heavy"))
    assert "adapter 'heavy' (plugin heavy) cannot be used" in str(caught.value)
    assert "package_that_nobody_has" in str(caught.value)
    assert "LAVINTK_DISABLE=heavy" in str(caught.value)


@pytest.mark.parametrize("options", [dict, GridOptions()], ids=["a plain class", "an instance"])
def test_options_that_are_no_dataclass_are_refused_at_once(options: Any) -> None:
    registry: Registry[Any] = Registry("adapter")
    with pytest.raises(PluginError, match="plugin 'wrong': options of adapter 'x' must be a dataclass"):
        registry.owned_by("wrong").add("x", lambda given: given, options=options)


def test_declared_options_tell_type_default_need_and_help(registry: Registry[Any]) -> None:
    described = {option.name: option for option in registry["grid"].declared_options()}
    assert described["double_quant"].type == "bool"
    assert described["double_quant"].default is True
    assert (described["bits"].type, described["double_quant"].type) == ("one of 2, 4, 8", "bool")
    assert described["double_quant"].help == "quantize the scales too"
    assert not described["double_quant"].required
    assert registry["file"].declared_options()[0].required


def test_listing_is_alphabetical(registry: Registry[Any]) -> None:
    assert registry.names() == [entry.name for entry in registry] == ["file", "grid", "plain"]


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("nf4", "nf4", {}),
        ("nf4:double_quant=false,block=64", "nf4", {"double_quant": "false", "block": "64"}),
        ("alpaca:data/train.json", "alpaca", {"path": "data/train.json"}),
        ("alpaca:C:\\data\\train.json", "alpaca", {"path": "C:\\data\\train.json"}),
        ("alpaca:s3/run=1/train.json", "alpaca", {"path": "s3/run=1/train.json"}),
        ("lavin:all.json,images=pictures", "lavin", {"path": "all.json", "images": "pictures"}),
        (" nf4 : block = 64 ", "nf4", {"block": "64"}),
    ],
)
def test_a_choice_is_a_name_with_options_or_a_path(text: str, name: str, options: dict[str, str]) -> None:
    assert Choice.parse(text) == Choice(name, options)


@pytest.mark.parametrize("text", ["nf4", "nf4:double_quant=false,block=64", "alpaca:path=data/train.json"])
def test_a_choice_written_out_and_read_again_is_the_same(text: str) -> None:
    assert str(Choice.parse(text)) == text
    assert Choice.parse(str(Choice.parse(text))) == Choice.parse(text)


def test_an_option_given_twice_is_an_error() -> None:
    with pytest.raises(OptionsError, match="option 'block' is given twice"):
        Choice.parse("nf4:block=64,block=128")

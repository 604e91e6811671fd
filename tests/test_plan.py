"""Foretold memory against what was measured on an H100 (docs/benchmarks.md), and recipes made to fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from lavintk.errors import RecipeError
from lavintk.models.config_source import ConfigSource
from lavintk.models.connector import TapNeck
from lavintk.models.language import outline_language_model, outline_vision_model
from lavintk.models.multimodal import MultimodalModel
from lavintk.models.vision import VisionTower
from lavintk.plan import CARDS, GIB, fit, parse_size, plan, plan_of
from lavintk.plugins import installed_plugins
from lavintk.recipe import Recipe, make_recipe
from lavintk.registry import Choice
from lavintk.testing import Outcome
from lavintk.testing.runs import multimodal

RunCli = Callable[..., Outcome]
WIDTHS = {"7b": (4096, 11008, 32), "13b": (5120, 13824, 40)}
LORA, LAVIN = "lora:r=16,alpha=32", "mma:visual=router"
MEASURED = [
    ("7b", LORA, "paged-8bit", 1, 512, "graph", 4.25, 5.55, 68.0),
    ("7b", LORA, "paged-8bit", 4, 512, "graph", 4.91, 6.40, 179.2),
    ("7b", LORA, "paged-8bit", 1, 2048, "graph", 4.97, 6.52, 191.8),
    ("13b", LORA, "paged-8bit", 1, 512, "graph", 7.68, 9.30, 118.9),
    ("7b", LAVIN, "paged", 12, 170, "graph", 5.30, 6.62, None),
    ("7b", LAVIN, "paged", 1, 512, "graph", 4.66, 5.79, None),
    ("7b", LAVIN, "paged", 1, 512, "eager", 4.61, 5.62, None),
    ("13b", LAVIN, "paged", 1, 512, "eager", 7.89, 8.95, None),
]
"""Geometry, adapter, optimizer, rows, tokens per row, engine; allocated GiB, device GiB, milliseconds."""


def outline(geometry: str, adapter: str) -> MultimodalModel:
    """A model without values: linear layers that say their size, and transformers' other modules."""
    hidden, inner, layers = WIDTHS[geometry]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=hidden // 128
    )
    clip = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    )
    with torch.device("meta"):
        language: Any = outline_language_model(ConfigSource(config, "language"))
        if adapter == LORA:
            model = MultimodalModel(language)
        else:
            tower = VisionTower(outline_vision_model(ConfigSource(clip, "tower")), 4)
            model = MultimodalModel(language, tower, TapNeck(1024, 128, hidden))
    model.attach(installed_plugins().adapters.create(Choice.parse(adapter)))
    return model


def text_recipe(adapter: str, optim: str, rows: int, length: int, **train: Any) -> Recipe:
    return make_recipe(
        {
            "model": {"language": "anything"},
            "quant": "nf4",
            "adapter": adapter,
            "optim": optim,
            "data": {"train": "alpaca:rows.json", "max_length": length},
            "train": {"batch_size": rows, **train},
        }
    )


@pytest.mark.parametrize(
    ("geometry", "adapter", "optim", "rows", "length", "engine", "allocated", "device", "milliseconds"), MEASURED
)
def test_what_is_foretold_is_near_what_was_measured(
    geometry: str, adapter: str, optim: str, rows: int, length: int, engine: str,
    allocated: float, device: float, milliseconds: float | None,
) -> None:  # fmt: skip
    recipe = text_recipe(adapter, optim, rows, length)
    found = plan_of(outline(geometry, adapter), recipe, installed_plugins(), engine)
    assert found.allocated / GIB == pytest.approx(allocated, rel=0.04)
    assert found.device / GIB == pytest.approx(device, rel=0.08)
    if milliseconds is not None:
        assert 1e3 * found.seconds(CARDS["h100"]) == pytest.approx(milliseconds, rel=0.08)


def test_the_base_takes_the_bytes_that_the_formula_of_double_quantization_says() -> None:
    found = plan_of(outline("7b", LORA), text_recipe(LORA, "paged", 1, 512), installed_plugins())
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    bits = 4 + 8 / 64 + 32 / (64 * 256)  # QLoRA, section 3: codes, scales, scales of scales
    assert found.items["linear layers (nf4)"] == pytest.approx(weights * bits / 8, rel=1e-4)
    assert found.items["embedding, head, norms"] == 2 * (2 * 32000 * 4096 + 65 * 4096)
    trained = 32 * 16 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert found.items["adapter and connector"] == found.items["their gradients"] == 4 * trained
    assert found.host == {"optimizer state (paged)": 8 * trained}


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
    assert fit(recipe, plugins, limits[0]).changes == {"train.checkpointing": True}
    with pytest.raises(RecipeError, match=r"GiB more than 0\.10 GiB(.|\n)*Most of it is: "):
        fit(recipe, plugins, GIB // 10)


def test_a_configuration_alone_is_enough_for_a_plan(tiny_folder: Path, tmp_path: Path) -> None:
    content, plugins = multimodal(tiny_folder), installed_plugins()
    expected = plan(make_recipe(content), plugins)
    for part, folder in (("language", tiny_folder / "llm"), ("vision", tiny_folder / "vit")):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_bytes((folder / "config.json").read_bytes())
        content["model"] |= {part: str(tmp_path / part)}
    assert plan(make_recipe(content), plugins) == expected


@pytest.mark.parametrize(("text", "gib"), [("8GB", 8.0), ("7.5 GiB", 7.5), ("24g", 24.0)])
def test_sizes_are_read_as_on_the_box(text: str, gib: float) -> None:
    assert parse_size(text) == gib * GIB


def test_the_command_prints_the_items_and_what_to_change(tiny_folder: Path, tmp_path: Path, run_cli: RunCli) -> None:
    import yaml

    content = multimodal(tiny_folder, batch_size=64, checkpointing=False)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(make_recipe(content).dump()))
    path = str(tmp_path / "recipe.yaml")
    shown = run_cli("plan", path, "--gpu", "rtx3090", "--json")
    found = json.loads(shown.stdout)
    assert found["allocated"] == sum(found["items"].values())
    assert found["seconds"] > 0
    table = run_cli("plan", path)
    assert "linear layers" in table.stdout
    refused = run_cli("plan", path, "--gpu", "rtx9999")
    assert refused.exit_code != 0
    assert "known are t4, l4" in refused.stderr
    refused = run_cli("plan", path, "--fit", "much")
    assert "give one such as 8GB" in refused.stderr

"""What a tiny run needs, and recipes for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lavintk.testing.tiny import write_language_model, write_vision_tower

COLOURS = ("red", "blue", "green", "black")


def write_everything(folder: Path) -> Path:
    """Write a tiny language model, a vision tower, pictures and data files."""
    from PIL import Image

    write_language_model(folder / "llm")
    write_vision_tower(folder / "vit")
    text = [
        {"instruction": f"what color is {c}?", "input": "", "output": c * (i + 1)} for i, c in enumerate(COLOURS * 2)
    ]
    (folder / "alpaca.json").write_text(json.dumps(text))
    rows = []
    for i, colour in enumerate(COLOURS * 2):
        Image.new("RGB", (28, 28), colour).save(folder / f"{i}.png")
        picture = {"image": f"{i}.png"} if i % 4 else {}
        rows.append({"id": f"row{i}", "prompt": "what color is the shape?", "answer": colour, **picture})
    (folder / "mixed.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def recipe(folder: Path, **train: Any) -> dict[str, Any]:
    """Return the recipe of a text run on what :func:`write_everything` wrote; ``train`` overrides its section.

    On a CPU it computes in fp32 whatever that multiplies fastest, so that figures are the same on all machines.
    """
    precision = {"precision": "fp32"} if train.get("device", "cpu") == "cpu" else {}
    return {
        "name": "tiny",
        "model": {"language": str(folder / "llm")},
        "adapter": {"name": "lora", "r": 4, "dropout": 0.1},
        "data": {"train": {"name": "alpaca", "path": str(folder / "alpaca.json")}, "max_length": 128},
        "train": {"batch_size": 2, "lr": 1e-2, "device": "cpu", "max_steps": 4, **precision, **train},
    }


def multimodal(folder: Path, **train: Any) -> dict[str, Any]:
    """Return the recipe of a run on rows with and without a picture; ``train`` overrides its section."""
    content = recipe(folder, **train)
    content["model"] |= {"vision": str(folder / "vit"), "tap_every": 2, "neck": 8}
    content["adapter"] = "mma"
    content["data"]["train"] = {"name": "jsonl", "path": str(folder / "mixed.jsonl")}
    return content

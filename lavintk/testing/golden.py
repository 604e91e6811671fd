"""Compares lavintk with reference values written by the original LaVIN: ``python -m lavintk.testing.golden FILE``.

The file holds the original's weights under their own names (``model.…``), its geometry (metadata key ``config``) and
some batches with what its training graph made of them in fp32 and eval mode: visual features, logits, loss and the
gradients of all adapter parameters. The same batches run here through the models that ``lavintk train`` uses, with
``mma:compat=lavin``. JSON goes to the standard output; the exit code is 0 if every difference is within
:data:`BOUNDS`, else 1; a file that cannot be compared in full is an error, which says why.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

from lavintk.data.batch import IGNORED, Batch
from lavintk.dense import DenseQuantizer
from lavintk.devices import pick_device
from lavintk.errors import LavintkError
from lavintk.models.connector import TapNeck
from lavintk.models.language import load_language_model, load_vision_model
from lavintk.models.multimodal import MultimodalModel
from lavintk.models.vision import VisionTower
from lavintk.plugins import installed_plugins
from lavintk.registry import Choice
from lavintk.testing.golden_file import TAP_EVERY, Geometry, Golden, read_golden
from lavintk.testing.golden_models import language_source, vision_source

if TYPE_CHECKING:
    from lavintk.contracts import Adapter

BOUNDS = {"features": 1e-5, "logits": 3e-6, "loss": 2e-6, "gradients": 1e-4}
"""Largest difference allowed: absolute, for gradients relative to the largest value of each tensor."""
ROUNDING = 2.0**-23
"""A gradient that differs by no more than this part of the case's largest gradient differs by fp32's rounding only.

A router's bias has two gradients that are small differences of large sums; 1e-4 of them can lie below what fp32 holds.
Such tensors are named in the report.
"""


class OriginalAdapter(Protocol):
    """What the adapter must be able to do besides :class:`lavintk.contracts.Adapter`."""

    def load_original(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the original's adapter tensors into the attached adapter and the connector."""
        ...

    def pair_with_original(self, names: Mapping[str, object]) -> dict[str, str | None]:
        """Return the model's trainable name of each of the original's names."""
        ...


def build_model(golden: Golden, *, routing: str = "shared", device: str = "cpu") -> MultimodalModel:
    """Return the model of a file in fp32 and eval mode, with its weights and adapters.

    :param routing: how the modality token's path is computed, an option of ``mma``.
    :raises CheckpointError: tensors missing, unexpected or misshapen.
    """
    g, place = golden.geometry, pick_device(device)
    settings = {
        "dim": g.adapter_dim, "scale": g.adapter_scale, "temperature": g.temperature, "placement": g.adapter_type,
        "visual": g.visual_adapter_type, "routing": routing, "compat": "lavin",
    }  # fmt: skip
    adapter: Adapter = installed_plugins().adapters.create(Choice("mma", settings))
    language = load_language_model(language_source(golden), DenseQuantizer(), device=place, dtype=torch.float32)
    tower = load_vision_model(vision_source(golden), device=place, dtype=torch.float32)
    neck = TapNeck(g.vision_width, g.hidden_proj, g.dim).to(place)
    model = MultimodalModel(language, VisionTower(tower, TAP_EVERY), neck)
    model.attach(adapter)
    adapters = {name: tensor for name, tensor in golden.weights.items() if "adapter" in name}
    cast(OriginalAdapter, adapter).load_original(adapters)
    return model.eval()


def make_batch(geometry: Geometry, case: Mapping[str, Tensor]) -> Batch:
    """Return a case as a micro-batch: prefix and visual slots behind BOS, cut to the length of the stored logits.

    The modality token, position 0 of the original's rows, is not part of it. Padding is kept, since the stored logits
    hold its positions.
    """
    has_image = case["has_image"].tolist()
    length, visual = case["logits"].shape[1] - 1, geometry.vision_layers // TAP_EVERY
    ids: list[int] = []
    labels: list[int] = []
    slots: list[int] = []
    for row, image in enumerate(has_image):
        prefix = geometry.prefix_image if image else geometry.prefix_text
        inserted = [*prefix, *[0] * (visual if image else 0)]
        if image:
            first = len(ids) + 1 + len(prefix)
            slots += range(first, first + visual)
        tokens, targets = case["input_ids"][row].tolist(), case["labels"][row].tolist()
        ids += [tokens[0], *inserted, *tokens[1:]][:length]
        targets = [targets[0], *[0] * len(inserted), *targets[1:]][:length]
        labels += [target or IGNORED for target in [*targets[1:], 0]]
    pictures = case["images"][case["has_image"].bool()]
    rows = len(has_image)
    return Batch(
        torch.tensor(ids), torch.tensor(labels), torch.arange(length).repeat(rows), (length,) * rows,
        case["has_image"], pictures if len(pictures) else None, torch.tensor(slots, dtype=torch.int64),
        tuple(str(row) for row in range(rows)),
    )  # fmt: skip


def compare_case(model: MultimodalModel, geometry: Geometry, case: Mapping[str, Tensor]) -> dict[str, Any]:
    """Run one case and return its differences."""
    device, batch = model.device, make_batch(geometry, case).to(model.device)
    with torch.no_grad():
        features = model.visual_features(case["images"].to(device))
        hidden, side = model.hidden_with_side(batch)
        owners = torch.arange(len(batch.lengths), device=device) if model.manner.side_per_row else batch.conditions
        rows = torch.cat([side[owners].unsqueeze(1), hidden.unflatten(0, (len(batch.lengths), -1))], dim=1)
        logits = model.logits(rows)
    model.zero_grad(set_to_none=True)
    loss = model.loss_sum(batch) / batch.labelled
    loss.backward()
    return {
        "rows": len(batch.lengths),
        "features": _largest(features, case["visual_features"]),
        "logits": _largest(logits, case["logits"]),
        "loss": _largest(loss.detach().view(1), case["loss"].view(1)),
        "gradients": _compare_gradients(model, case),
    }


def compare(path: Path, *, routing: str = "shared", device: str = "cpu") -> dict[str, Any]:
    """Run all cases of a file and return the report that the command prints.

    :raises CheckpointError: the file cannot be compared.
    """
    golden = read_golden(path)
    model = build_model(golden, routing=routing, device=device)
    cases = {name: compare_case(model, golden.geometry, case) for name, case in golden.cases.items()}
    gradients = {f"{c}.{n}": gradient for c, case in cases.items() for n, gradient in case["gradients"].items()}
    largest = {name: _worst(case[name] for case in cases.values()) for name in ("features", "logits", "loss")}
    largest["gradients"] = _worst(gradient["relative"] for gradient in gradients.values())
    beyond = {name for name, gradient in gradients.items() if gradient["relative"] > BOUNDS["gradients"]}
    rounding = sorted(name for name in beyond if gradients[name]["absolute"] <= gradients[name]["rounding"])
    within = {name: largest[name] <= bound for name, bound in BOUNDS.items()} | {
        "gradients": len(rounding) == len(beyond)
    }
    absolute = {"gradients_absolute": _worst(gradient["absolute"] for gradient in gradients.values())}
    return {
        "file": path.name,
        "routing": routing,
        "config": asdict(golden.geometry),
        "unused_config": golden.unused,
        "cases": cases,
        "largest": largest | absolute,
        "bounds": BOUNDS,
        "within": within,
        "within_rounding_only": rounding,
        "passed": all(within.values()),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare a file and print the report; return the exit code."""
    summary = "Compare lavintk with reference values written by the original LaVIN."
    parser = argparse.ArgumentParser(prog="python -m lavintk.testing.golden", description=summary)
    parser.add_argument("file", type=Path, help="safetensors file with weights, batches and reference values")
    parser.add_argument("--routing", choices=("shared", "carried"), default="shared", help="the modality token's path")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    given = parser.parse_args(arguments)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        report = compare(given.file, routing=given.routing, device=given.device)
    except LavintkError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(_finite(report), indent=2))
    return 0 if report["passed"] else 1


def _compare_gradients(model: MultimodalModel, case: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    stored = {name.removeprefix("grad."): t for name, t in case.items() if name.startswith("grad.")}
    trainable = model.trainable()
    rounding = ROUNDING * _worst(float(tensor.abs().max()) for tensor in stored.values())
    result = {}
    for name, ours in cast(OriginalAdapter, model.adapter).pair_with_original(stored).items():
        gradient = trainable[ours or ""].grad
        expected = stored[name]
        found = torch.zeros_like(expected) if gradient is None else gradient.view(expected.shape)
        absolute, scale = _largest(found, expected), float(expected.abs().max())
        relative = absolute / scale if scale else (math.inf if absolute else 0.0)
        result[name] = {"absolute": absolute, "relative": relative, "rounding": rounding if scale else 0.0}
    return result


def _largest(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference; infinite where one of the two is not a number."""
    difference = float((found.cpu() - expected).abs().max())
    return difference if math.isfinite(difference) else math.inf


def _worst(values: Iterable[float]) -> float:
    return max(values, default=0.0)


def _finite(value: Any) -> Any:
    """Write an infinite difference as text, which JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())

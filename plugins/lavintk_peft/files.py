"""PEFT's folder: ``adapter_config.json`` and ``adapter_model.safetensors``, written and read as PEFT does it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lavintk.tensor_file import misfits

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SAYS_NOTHING = (
    *("task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "save_projection"),
)
"""Fields that leave the function alone, or that the names of the tensors tell as well."""


def save_part(model: Any, folder: Path, *, targets: list[str], task: str | None, base: str | None) -> None:
    """Write the adapter of a PEFT model into ``folder``, which is made if needed.

    :param targets: ``target_modules`` in the whole model.
    :param task: PEFT's ``task_type``. :param base: ``base_model_name_or_path``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.copy(model.peft_config["default"])
    config.target_modules, config.task_type = targets, task
    config.base_model_name_or_path, config.inference_mode = base, True
    content = json.dumps(_plain(config), indent=2, sort_keys=True)
    (folder / CONFIG).write_text(content + "\n", encoding="utf-8")
    tensors = {key: tensor.detach().contiguous().cpu() for key, tensor in _state(model).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def read_part(model: Any, folder: Path, faults: list[str]) -> dict[str, Tensor]:
    """Return the tensors that :func:`save_part` or PEFT wrote; what does not fit the model is added to ``faults``."""
    faults += _config_faults(model.peft_config["default"], folder / CONFIG)
    path, own = folder / WEIGHTS, _state(model)
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        faults.append(f"{path.name} cannot be read: {error}")
        return {}
    faults += misfits(stored, own, path.name)
    return stored


def fill_part(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Copy ``tensors`` into the adapter of a PEFT model, in place."""
    set_peft_model_state_dict(model, dict(tensors))


def _state(model: Any) -> dict[str, Tensor]:
    # without the flag PEFT would look for the base on the network
    state: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return state


def _config_faults(own: Any, path: Path) -> list[str]:
    """Return how the stored configuration differs from the model's in what the adapter computes."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"{path.name} cannot be read: {error}"]
    if not isinstance(stored, dict):
        return [f"{path.name} holds no configuration"]
    wanted, silent = _plain(own), _plain(type(own)())
    if stored.get("peft_type") != wanted["peft_type"]:
        return [f"{path.name} has peft_type={stored.get('peft_type')!r}, the model's is {wanted['peft_type']!r}"]
    faults = [
        f"{path.name} has {name}={_sorted(stored.get(name, silent[name]))!r}, the model's adapter has {value!r}"
        for name, value in wanted.items()
        if _matters(name) and _sorted(stored.get(name, silent[name])) != value
    ]
    unknown = [name for name in stored if name not in wanted and _matters(name) and stored[name]]
    return faults + [f"{path.name} has {name}={stored[name]!r}, which this version of PEFT lacks" for name in unknown]


def _matters(name: str) -> bool:
    return name not in SAYS_NOTHING and "dropout" not in name and not name.startswith("init")


def _plain(config: Any) -> dict[str, Any]:
    """Return a configuration as JSON gives it back."""
    content = {name: _sorted(value) for name, value in config.to_dict().items()}
    plain: dict[str, Any] = json.loads(json.dumps(content))
    return plain


def _sorted(value: Any) -> Any:
    """Return lists and sets of names in alphabetical order, as PEFT writes them in any."""
    named = isinstance(value, (set, frozenset, list, tuple)) and all(isinstance(item, str) for item in value)
    return sorted(value) if named else value

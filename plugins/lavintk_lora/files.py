"""PEFT's adapter format: ``adapter_config.json`` and ``adapter_model.safetensors``.

A key is ``base_model.model.``, the layer's name in transformers' causal LM, and ``.lora_A.weight``
(``[r, in]``) or ``.lora_B.weight`` (``[out, r]``). The format knows one causal LM only, so layers of
the vision tower lie in a second file under their names in lavintk, with the settings in its metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lavintk.errors import CheckpointError
from lavintk.targets import LANGUAGE
from lavintk.tensor_file import misfits

if TYPE_CHECKING:
    from lavintk_lora import LoraOptions

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
VISION_WEIGHTS = "vision_adapter.safetensors"
PICKLED = "adapter_model.bin"
"""What PEFT wrote before it wrote safetensors."""
PEFT_PREFIX = "base_model.model."
SETTINGS_KEY = "lora_settings"
"""Metadata of the vision file: rank, alpha and kind of scaling as JSON."""
PEFT_DEFAULTS = {"r": 8, "lora_alpha": 8, "use_rslora": False}
"""What PEFT assumes where its configuration is silent."""
FEATURES = (
    *("use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out"),
    *("layer_replication", "trainable_token_indices", "target_parameters", "alora_invocation_tokens"),
    *("arrow_config", "use_qalora", "use_bdlora", "kasa_config", "velora_config", "monteclora_config"),
)
"""Fields of PEFT's configuration that make the adapter another function than plain LoRA."""
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""``init_lora_weights`` that leave the base weights alone; PiSSA, OLoRA, LoftQ and CorDA change them."""


LORA_ENDS = (".lora_A.weight", ".lora_B.weight")
READ_METHODS = "LoRA and rsLoRA of linear layers with one rank, without DoRA, trained biases or whole modules"


def save_lora(
    folder: Path, parameters: Mapping[str, nn.Parameter], options: LoraOptions, targets: list[str], base: str
) -> None:
    """Write ``parameters`` into ``folder``, which is made if needed.

    :param parameters: by ``<linear>.lora_A.weight`` and ``<linear>.lora_B.weight``.
    :param targets: PEFT's ``target_modules``.
    :param base: PEFT's ``base_model_name_or_path``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    language, vision = _by_file(parameters)
    if language:
        config = json.dumps(_config(options, targets, base), indent=2)
        (folder / CONFIG).write_text(config + "\n", encoding="utf-8")
        save_file(_on_host(language), folder / WEIGHTS, metadata={"format": "pt"})
    if vision:
        metadata = {"format": "pt", SETTINGS_KEY: json.dumps(_settings(options))}
        save_file(_on_host(vision), folder / VISION_WEIGHTS, metadata=metadata)


def load_lora(folder: Path, parameters: Mapping[str, nn.Parameter], options: LoraOptions) -> None:
    """Copy the tensors in ``folder`` into ``parameters``, in place, if all of them fit.

    :raises CheckpointError: every fault found.
    """
    language, vision = _by_file(parameters)
    faults: list[str] = []
    if language:
        faults += _config_faults(folder / CONFIG, options)
    stored, _ = _read(folder / WEIGHTS, language, faults)
    stored_vision, metadata = _read(folder / VISION_WEIGHTS, vision, faults)
    if vision and stored_vision:
        faults += _setting_faults(VISION_WEIGHTS, json.loads(metadata.get(SETTINGS_KEY, "{}")), options)
    if faults:
        advice = "Was it trained on another model, or with another r, alpha, rslora or targets of 'lora'?"
        raise CheckpointError(f"LoRA adapter {folder}", faults, advice)
    with torch.no_grad():
        for key, parameter in (language | vision).items():
            parameter.copy_((stored | stored_vision)[key])


def peft_options(folder: Path) -> dict[str, Any] | None:
    """Return the options of ``lora`` with which :func:`load_lora` reads what PEFT wrote into ``folder``.

    :return: None if no configuration of PEFT's is there.
    :raises CheckpointError: see :meth:`lavintk_lora.LoraOptions.of_folder`.
    """
    if not (folder / CONFIG).is_file():
        return None
    faults: list[str] = []
    config = PEFT_DEFAULTS | _read_config(folder / CONFIG, faults)
    faults = faults or _function_faults(CONFIG, config)
    keys = [] if faults else _keys(folder, faults)
    layers = {key.rpartition(".lora_")[0].removeprefix(PEFT_PREFIX) for key in keys}
    others = [key for key in keys if not key.startswith(PEFT_PREFIX) or not key.endswith(LORA_ENDS)]
    faults += [f"{key} in {WEIGHTS} is not LoRA of a linear layer" for key in others]
    if faults:
        raise CheckpointError(f"PEFT folder {folder}", faults, f"What is read: {READ_METHODS}.")
    return {
        "r": config["r"],
        "alpha": config["lora_alpha"],
        "rslora": bool(config["use_rslora"]),
        "dropout": config.get("lora_dropout") or 0.0,
        "targets": "+".join(sorted(_targets(config, layers))),
    }


def _targets(config: Mapping[str, Any], layers: set[str]) -> set[str]:
    """Return what selects exactly the changed layers: leaf names where PEFT took all layers of such a name."""
    named = config.get("target_modules")
    whole_names = not isinstance(named, list) or any("." in name for name in named)
    if whole_names or any(config.get(name) is not None for name in ("layers_to_transform", "exclude_modules")):
        return {LANGUAGE + layer for layer in layers}
    return {layer.rpartition(".")[2] for layer in layers}


def _keys(folder: Path, faults: list[str]) -> list[str]:
    """Return the names of the tensors; that there are none is added to ``faults``."""
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (folder / PICKLED).is_file()
        convert = f": {PICKLED} could run code; save it anew with PEFT's save_pretrained, which writes safetensors"
        faults.append(f"{WEIGHTS} is missing" + convert * pickled)
        return []
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
    except (OSError, SafetensorError) as error:
        faults.append(f"{WEIGHTS} cannot be read: {error}")
        return []
    if not keys:
        faults.append(f"{WEIGHTS} holds no tensors")
    return keys


def _by_file(
    parameters: Mapping[str, nn.Parameter],
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Return what belongs to PEFT's file and what to the vision file, by the key used there."""
    language = {
        PEFT_PREFIX + name.removeprefix(LANGUAGE): parameter
        for name, parameter in parameters.items()
        if name.startswith(LANGUAGE)
    }
    vision = {name: parameter for name, parameter in parameters.items() if not name.startswith(LANGUAGE)}
    return language, vision


def _on_host(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {key: parameter.detach().contiguous().cpu() for key, parameter in parameters.items()}


def _settings(options: LoraOptions) -> dict[str, Any]:
    return {"r": options.r, "lora_alpha": options.alpha, "use_rslora": options.rslora}


def _config(options: LoraOptions, targets: list[str], base: str) -> dict[str, Any]:
    """Return the fields that PEFT, transformers and vLLM read; PEFT fills the others with plain LoRA."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        **_settings(options),
        "lora_dropout": options.dropout,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def _config_faults(path: Path, options: LoraOptions) -> list[str]:
    faults: list[str] = []
    config = _read_config(path, faults)
    if faults:
        return faults
    if config.get("peft_type") == "LORA":
        faults = _setting_faults(path.name, PEFT_DEFAULTS | config, options)
    return faults + _function_faults(path.name, config)


def _read_config(path: Path, faults: list[str]) -> dict[str, Any]:
    """Return PEFT's configuration; that it cannot be read is added to ``faults``."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        faults.append(f"{path.name} cannot be read: {error}")
        return {}
    return config if isinstance(config, dict) else {}


def _function_faults(file: str, config: Mapping[str, Any]) -> list[str]:
    """Return what makes the adapter another function than plain LoRA."""
    if config.get("peft_type") != "LORA":
        return [f"{file} does not describe a LoRA adapter: peft_type is {config.get('peft_type')!r}, not 'LORA'"]
    faults = [f"{file} uses {name}={config[name]!r}, which lavintk lacks" for name in FEATURES if config.get(name)]
    if config.get("bias") not in (None, "none"):
        faults.append(f"{file} trains biases (bias={config['bias']!r}), which lavintk's LoRA does not")
    if config.get("init_lora_weights") not in PLAIN_STARTS:
        start = config["init_lora_weights"]
        faults.append(f"{file} has init_lora_weights={start!r}, which belongs to a changed base model")
    return faults


def _setting_faults(file: str, found: Mapping[str, Any], options: LoraOptions) -> list[str]:
    return [
        f"{file} has {name}={found.get(name)!r}, the model's adapter has {wanted!r}"
        for name, wanted in _settings(options).items()
        if found.get(name) != wanted
    ]


def _read(path: Path, own: Mapping[str, nn.Parameter], faults: list[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata of a file; what does not fit ``own`` is added to ``faults``."""
    if not own and not path.exists():
        return {}, {}
    try:
        with safe_open(path, framework="pt") as file:
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        faults.append(f"{path.name} cannot be read: {error}")
        return {}, {}
    faults += misfits(stored, own, path.name)
    return stored, metadata

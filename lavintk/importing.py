"""Makes a run of a model folder, with an adapter that another program trained or without one.

Nothing was trained here, so there are no facts of a training: the recipe names no training data, nor an adapter where
there is none, and the manifest says under ``imported`` where everything came from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lavintk.contracts import AdapterReader
from lavintk.errors import LavintkError, ModelError, RunError
from lavintk.registry import Choice

if TYPE_CHECKING:
    from lavintk.models.multimodal import MultimodalModel
    from lavintk.recipe import Recipe
    from lavintk.run import Run

MODEL_CONFIG = "config.json"
"""The file that makes a folder a model of transformers'."""


def import_model(model: Path, out: Path, *, peft: Path | None = None, data: Choice | None = None) -> Run:
    """Write the run folder ``out`` of a language model and, if given, an adapter on it, and return the run.

    The model's weights are neither read nor copied, the adapter's are; names and shapes of both are checked.

    :param model: folder with ``config.json``, safetensors and a tokenizer.
    :param peft: folder of an adapter that an installed plugin can read, such as PEFT's LoRA.
    :param data: records to evaluate and compare on.
    :raises RunError: there is no such folder, or ``out`` is in use.
    :raises ModelError: the model is of an unknown kind, or no plugin reads the adapter.
    :raises CheckpointError: files are missing, damaged, or do not fit each other; all faults listed.
    """
    from lavintk.models.build import build_outline
    from lavintk.plugins import installed_plugins
    from lavintk.recipe import make_recipe

    if not (model / MODEL_CONFIG).is_file():
        found = f"has no {MODEL_CONFIG}" if model.is_dir() else "is no folder"
        raise RunError(f"{model} {found}, so it is no model folder")
    adapter = None if peft is None else find_adapter(peft)
    content = {
        "name": (peft or model).absolute().name,
        "model": {"language": str(model.absolute())},
        "adapter": adapter,
        "data": {"train": None, "test": data},
    }
    recipe = make_recipe(content)
    try:
        outline, base = build_outline(recipe, installed_plugins())
    except ModelError as error:
        raise ModelError(str(error) if peft is None else f"{peft} on {model}: {error}") from error
    if peft is not None:
        _load_adapter(outline, peft)
    run = create_with(outline, out, recipe, base)
    read = None if peft is None else {"folder": str(peft), "sha256": _sha256(peft), "read_as": str(adapter)}
    del run.manifest["started"]  # a training's
    run.record(status="imported", base=base, imported={"model": str(model), "adapter": read})
    return run


def create_with(model: MultimodalModel, out: Path, recipe: Recipe, base: Mapping[str, Mapping[str, str]]) -> Run:
    """Return the new run ``out`` with what is trained in ``model`` saved in it; without a folder if that fails.

    :param base: fingerprints of the frozen models by role.
    :raises LavintkError: ``out`` is in use, or cannot be written.
    """
    from lavintk.checkpoints import save_model
    from lavintk.run import Run

    run = Run.create(out, recipe)
    try:
        save_model(out, model, base["language"]["source"])
    except LavintkError:
        run.discard()
        raise
    return run


def find_adapter(folder: Path) -> Choice:
    """Return the adapter, with its options, that reads the files in ``folder``: what the plugins say of it.

    :raises RunError: there is no such folder.
    :raises ModelError: no plugin knows the files.
    :raises CheckpointError: a plugin knows them, but cannot use them; all faults listed.
    """
    from lavintk.plugins import installed_plugins

    if not folder.is_dir():
        raise RunError(f"there is no adapter folder {folder}")
    readers = []
    for entry in installed_plugins().adapters:
        if not isinstance(entry.options, AdapterReader):
            continue
        readers.append(entry.name)
        options = entry.options.of_folder(folder)
        if options is not None:
            return Choice(entry.name, options)
    found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise ModelError(
        f"{folder} holds no adapter that lavintk reads. Found: {found}. PEFT's save_pretrained writes "
        f"adapter_config.json and adapter_model.safetensors. Adapters that read foreign folders: "
        f"{', '.join(readers) or 'none is installed'}."
    )


def _load_adapter(outline: MultimodalModel, folder: Path) -> None:
    """Give the adapter of a model on the meta device its values, in host memory."""
    import torch

    assert outline.adapter is not None
    for _, parameter in list(outline.adapter.named_parameters()):
        torch.utils.swap_tensors(parameter, torch.nn.Parameter(torch.empty_like(parameter, device="cpu")))
    outline.adapter.load(folder)


def _sha256(folder: Path) -> str:
    """Return the SHA-256 over the weight files of a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()

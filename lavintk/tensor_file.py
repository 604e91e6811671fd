"""Parameters in safetensors files, read only where names and shapes are exactly those that are wanted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lavintk.errors import CheckpointError


def load_parameters(path: Path, parameters: Mapping[str, Tensor], advice: str = "") -> None:
    """Copy the tensors of a file into ``parameters`` of the same names; nothing is changed unless all of them fit.

    :param advice: ends the message if they do not.
    :raises CheckpointError: the file cannot be read, or tensors are missing, unexpected or misshapen; all listed.
    """
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(str(path), [f"cannot be read: {error}"]) from error
    if faults := misfits(stored, parameters):
        raise CheckpointError(str(path), faults, advice)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(stored[name])


def misfits(stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor], file: str = "") -> list[str]:
    """Return what keeps ``stored`` from being ``wanted``: names that are missing or unexpected, other shapes.

    :param file: named in each fault, where several files are looked at together.
    """
    where = f" in {file}" if file else ""
    faults = [f"{name} is missing{where}" for name in wanted if name not in stored]
    faults += [f"{name}{where} is unexpected" for name in stored if name not in wanted]
    faults += [
        f"{name} has shape {tuple(stored[name].shape)}{where}, the model needs {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in stored and stored[name].shape != tensor.shape
    ]
    return faults

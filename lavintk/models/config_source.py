"""A model of which only the configuration is known: names and shapes follow from it, weights there are none."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from lavintk.errors import ModelError
from lavintk.models.catalog import locate_config
from lavintk.models.download import holds_weights
from lavintk.models.sources import WeightSource, open_source, read_model_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def open_config(reference: str) -> WeightSource:
    """Return a source for outlines: a model on this machine, or the configuration of one on the hub.

    :param reference: as a recipe names a model; also a folder that holds ``config.json`` and nothing else.
    :raises LavintkError: it is not found, or transformers does not know it.
    """
    path = locate_config(reference)
    if path.is_dir() and (path / "config.json").is_file() and not holds_weights(path):
        return ConfigSource(read_model_config(path, str(path)), str(path))
    return open_source(path)


class ConfigSource:
    """Names and shapes of the model that transformers makes of a configuration.

    :param description: what messages call it.
    """

    def __init__(self, settings: PretrainedConfig, description: str) -> None:
        self.settings, self.description = settings, description

    def config(self) -> PretrainedConfig:
        """Return the configuration."""
        return self.settings

    def names(self) -> list[str]:
        """Return the parameter names."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter."""
        return self._shapes[name]

    def tensor_nbytes(self, name: str) -> int:
        """Return the bytes of a parameter in 16 bits."""
        return 2 * torch.Size(self._shapes[name]).numel()

    def nbytes(self) -> int:
        """Return the bytes of all parameters in 16 bits."""
        return sum(map(self.tensor_nbytes, self._shapes))

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """Refuse.

        :raises ModelError: there are no weights.
        """
        raise ModelError(f"{self.description} holds a configuration and no weights")

    def fingerprint(self) -> str:
        """Return an empty text: without weights there is nothing to tell apart."""
        return ""

    def close(self) -> None:
        """Do nothing."""

    @functools.cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        from transformers import AutoModel, AutoModelForCausalLM

        makers: tuple[Any, ...] = (AutoModelForCausalLM, AutoModel)
        for maker in makers:
            try:
                with torch.device("meta"):
                    model: torch.nn.Module = maker.from_config(self.settings)
            except ValueError:  # not a model of this kind
                continue
            return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        raise ModelError(f"transformers makes no model of the configuration of {self.description}")

"""Step engines: how the gradients of a window of micro-batches are computed.

``eager`` launches each operation when Python comes to it. ``graph`` records the operations of a micro-batch once, as a
CUDA graph, and replays them: at batch sizes of one consumer GPU launching takes several times longer than computing.
``layerwise`` takes the micro-batches of a step through the layers side by side, for a base that is streamed. All give
the same gradients up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lavintk.data.batch import Batch
from lavintk.engine.eager import EagerEngine
from lavintk.engine.graph import GraphEngine, why_not_recordable
from lavintk.engine.layer_graphs import EagerLayers, RecordedLayers
from lavintk.engine.layerwise import LayerwiseEngine
from lavintk.engine.recorder import NotRecordableError
from lavintk.errors import RecipeError
from lavintk.models.multimodal import MultimodalModel

__all__ = [
    "EagerEngine",
    "EagerLayers",
    "Engine",
    "GraphEngine",
    "LayerwiseEngine",
    "NotRecordableError",
    "RecordedLayers",
    "choose_engine",
    "without_graphs",
]


class Engine(Protocol):
    """Computes gradients."""

    name: str
    """As the recipe names it."""
    records: bool
    """Whether it records CUDA graphs, which want micro-batches of few shapes."""

    def backward(self, window: Sequence[Batch], labelled: int, step: int) -> list[Tensor]:
        """Add the gradients of the mean loss over ``labelled`` tokens to the parameters' ``grad``.

        :param window: micro-batches on the host. :param step: optimizer steps taken before; dropout follows from it.
        :returns: each micro-batch's part of the mean loss, scalars on the device; their sum is the loss.
        :raises NotRecordableError: the engine cannot compute this model after all; gradients may hold a part.
        """
        ...


def choose_engine(
    setting: str,
    model: MultimodalModel,
    scaler: torch.amp.GradScaler,
    capacity: int,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
) -> tuple[Engine, str]:
    """Return the engine for ``setting``, and why it is not a faster one.

    :param setting: ``auto``, ``eager``, ``graph`` or ``layerwise``.
    :param scaler: scales losses; disabled outside of fp16.
    :param capacity: tokens of a full micro-batch.
    :param seed: of dropout.
    :param say: takes notes on the steps, a line each; None: nobody is told.
    :raises RecipeError: ``graph`` is asked for and cannot be.
    """
    if setting == "eager":
        return EagerEngine(model, scaler), ""
    reason = why_not_recordable(model)
    if setting == "layerwise" or (setting == "auto" and model.stream is not None):
        layers = EagerLayers(model) if reason else RecordedLayers(model, capacity, say)
        return LayerwiseEngine(model, scaler, layers, seed), f"layers are not recorded: {reason}" if reason else ""
    if model.stream is not None:
        reason = "the base is streamed, and its layers take turns in the device's memory"
    if not reason:
        return GraphEngine(model, scaler, capacity, seed, say), ""
    if setting == "graph":
        raise RecipeError("train.engine", [f"'graph' was asked for, but {reason}"], "Use --engine auto or eager.")
    return EagerEngine(model, scaler), reason


def without_graphs(engine: Engine) -> Engine:
    """Return the engine that computes the same without recording anything."""
    assert isinstance(engine, GraphEngine | LayerwiseEngine)
    if engine.model.offload is not None:  # a recording that failed half-way has left tensors there
        engine.model.offload.forget()
    if isinstance(engine, LayerwiseEngine):
        return LayerwiseEngine(engine.model, engine.scaler, EagerLayers(engine.model), engine.seed)
    return EagerEngine(engine.model, engine.scaler)

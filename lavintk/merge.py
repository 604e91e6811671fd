"""Folds a trained adapter into the weights it was trained on, exactly, one tensor at a time.

The result is a plain model of transformers' own structure, under the base's own parameter names, that computes what the
trained model computes under one of the adapter's conditions. Quantized weights are folded as they were trained on:
dequantized, not read anew from the base.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lavintk.contracts import AffineUpdate
from lavintk.errors import ModelError
from lavintk.layers import FrozenLinear
from lavintk.models.multimodal import MultimodalModel

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lavintk.models.build import Assembly
    from lavintk.run import Run

ALL, TEXT, IMAGE = "all", "text", "image"
"""Conditions of adapters: the same for every input, or one for each modality."""
LANGUAGE, VISION = "language.", "vision.model."
"""What the names of a model's linear layers begin with; the rest is transformers' own name."""
BIAS_FLAGS = {"self_attn": "attention_bias", "mlp": "mlp_bias"}
"""The flag of a configuration that gives a part of a decoder layer its biases."""


@dataclass(frozen=True)
class MergedLinear:
    """One linear layer with the adapter folded in, on the CPU.

    :param name: transformers' own name, for example ``model.layers.0.self_attn.q_proj``.
    :param weight: ``[out, in]``, fp32.
    :param bias: ``[out]``, fp32, or None where neither the layer nor the adapter has one.
    """

    name: str
    weight: Tensor
    bias: Tensor | None


def merged(weight: Tensor, bias: Tensor | None, updates: Sequence[AffineUpdate]) -> tuple[Tensor, Tensor | None]:
    """Fold ``updates`` into a linear layer: ``W + sum(up @ down)`` and ``b + sum(bias)``, in fp32.

    :param weight: ``[out, in]``, any float type; not changed.
    :param bias: ``[out]`` or None.
    """
    return merged_weight(weight, updates), merged_bias(bias, updates)


class LayerUpdates:
    """The adapter's updates of the language model, taken layer by layer; only one layer's are held.

    :ivar coming: the updates of the next layer that the adapter changes; empty behind the last one.
    """

    def __init__(self, model: MultimodalModel) -> None:
        updates: Iterator[AffineUpdate] = model.adapter.affine_updates(LANGUAGE) if model.adapter else iter(())
        self._layers = groupby(updates, key=lambda update: update.linear.rsplit(".", 2)[0])
        self._read()

    def take(self, layer: str) -> dict[tuple[str, str], AffineUpdate]:
        """Return the updates of a decoder layer by linear layer and condition; layers are asked for in order.

        :param layer: for example ``language.model.layers.0``.
        """
        if layer != self._layer:
            return {}
        taken = {(update.linear, update.condition): update for update in self.coming}
        self._read()
        return taken

    def check_all_taken(self) -> None:
        """Make sure that nothing the adapter changes was left out.

        :raises ModelError: the adapter changes a layer that the graph does not have, or goes through them out of order.
        """
        if self.coming:
            raise ModelError(
                f"the adapter changes {self.coming[0].linear}, which nothing has asked for: affine_updates() "
                "must go through the decoder layers in order and may change their linear layers only"
            )

    def _read(self) -> None:
        layer, updates = next(self._layers, ("", iter(())))
        self._layer: str = layer
        self.coming: list[AffineUpdate] = list(updates)


def merged_linears(model: MultimodalModel, condition: str, part: str = LANGUAGE) -> Iterator[MergedLinear]:
    """Yield each linear layer of a part of ``model`` with the adapter folded in under ``condition``, in order.

    :param condition: one of the adapter's, see :func:`pick_condition`.
    :param part: :data:`LANGUAGE` or :data:`VISION`.
    :raises NotAffineError: the adapter has no affine form.
    """
    plain = PlainModel(model, condition, part)
    for name, layer in plain.linears.items():
        weight, bias = merged(layer.dequantize(torch.float32).cpu(), _on_host(layer.bias), plain.updates_of(name))
        yield MergedLinear(name, weight, bias)


def load_on_cpu(run: Run) -> Assembly:
    """Return the trained model of ``run`` on the CPU, or where its quantizer can work if that is nowhere else."""
    from lavintk.plugins import installed_plugins

    quantizers = [installed_plugins().quantizers.create(c) for c in (run.recipe.quant, run.recipe.embed_quant)]
    return run.load(None if any(quantizer.requires_cuda for quantizer in quantizers) else "cpu").assembly


def pick_condition(model: MultimodalModel, wanted: str) -> str:
    """Return the condition of the model's adapter that stands for the modality ``wanted``.

    :param wanted: ``"text"`` or ``"image"``; an adapter that does not distinguish them has ``"all"`` for both.
    :raises ModelError: the adapter has no such condition.
    """
    conditions = model.adapter.conditions if model.adapter is not None else (ALL,)
    if conditions == (ALL,):
        return ALL
    if wanted not in conditions:
        raise ModelError(f"the adapter has no condition {wanted!r}; it has {', '.join(conditions)}")
    return wanted


class PlainModel:
    """The tensors of a part of a model with the adapter folded in, under transformers' own names.

    :ivar linears: the frozen linear layers by name.

    :param condition: one of the adapter's.
    :param part: :data:`LANGUAGE` or :data:`VISION`.
    :raises NotAffineError: the adapter has no affine form.
    """

    def __init__(self, model: MultimodalModel, condition: str, part: str = LANGUAGE) -> None:
        self._frozen = {n.removeprefix(part): p for n, p in model.frozen_parameters().items() if n.startswith(part)}
        self._tables = {n.removeprefix(part): t for n, t in model.tables().items() if n.startswith(part)}
        self._dtype = model.dtype
        named = model.linears().items()
        self.linears: dict[str, FrozenLinear] = {n.removeprefix(part): m for n, m in named if n.startswith(part)}
        self._updates: dict[str, list[AffineUpdate]] = {}
        for update in model.adapter.affine_updates(part) if model.adapter is not None else ():
            if update.condition == condition:
                self._updates.setdefault(update.linear.removeprefix(part), []).append(update)

    def updates_of(self, linear: str) -> list[AffineUpdate]:
        """Return what the adapter adds to a linear layer."""
        return self._updates.get(linear, [])

    def biased(self) -> set[str]:
        """Return the linear layers that have a bias other than zero once the adapter is folded in."""
        found = set()
        for name, layer in self.linears.items():
            biases = [layer.bias, *(update.bias for update in self.updates_of(name))]
            if any(bias is not None and bool(bias.any()) for bias in biases):
                found.add(name)
        return found

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU: fp32 if it belongs to a linear layer, else in the type the model computes in.

        :param name: a parameter's name; ``.bias`` of a layer without one gives zeros ``[out]``.
        :raises ModelError: the model has no such tensor.
        """
        module, _, leaf = name.rpartition(".")
        layer = self.linears.get(module)
        if layer is None:
            if name in self._tables:
                return self._tables[name].dequantize(self._dtype, torch.device("cpu"))
            if name not in self._frozen:
                raise ModelError(f"the exported architecture has a tensor {name}, which the trained model lacks")
            return self._frozen[name].detach().cpu()
        if leaf == "weight":
            return merged_weight(layer.dequantize(torch.float32).cpu(), self.updates_of(module))
        bias = merged_bias(_on_host(layer.bias), self.updates_of(module))
        return torch.zeros(layer.out_features) if bias is None else bias


def with_biases(config: PretrainedConfig, biased: set[str]) -> tuple[PretrainedConfig, dict[str, tuple[int, ...]]]:
    """Return a causal LM's configuration with room for the biases of ``biased``, and its parameters' shapes by name.

    A flag gives biases to a whole part of the layer, so layers beside those in ``biased`` may get one: zeros. A tied
    ``lm_head.weight`` is left out. A Mistral without sliding window becomes the Llama that it is, if it needs biases.

    :raises ModelError: the architecture has no such biases; says which layers want them.
    """
    config = copy.deepcopy(config)
    shapes = _shapes(config)
    if (
        config.model_type == "mistral"
        and config.sliding_window is None
        and any(f"{n}.bias" not in shapes for n in biased)
    ):
        config = as_llama(config)
    for name in biased:
        flag = next((flag for part, flag in BIAS_FLAGS.items() if f".{part}." in name), "")
        if f"{name}.bias" not in shapes and hasattr(config, flag):
            setattr(config, flag, True)
    shapes = _shapes(config)
    homeless = sorted({name.rpartition(".")[2] for name in biased if f"{name}.bias" not in shapes})
    if homeless:
        raise ModelError(
            f"folding the adapter gives biases to {', '.join(homeless)}, and {config.model_type!r} models have none "
            f"there. {_without_biases(homeless)}"
        )
    return config, shapes


def as_llama(config: PretrainedConfig) -> PretrainedConfig:
    """Return the Llama configuration of a Mistral: without a sliding window the two are the same function."""
    from transformers import LlamaConfig

    known = LlamaConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    return LlamaConfig(**{key: value for key, value in config.to_dict().items() if key in known})


def _without_biases(leaves: Sequence[str]) -> str:
    """Say what to train instead."""
    feed_forward = [leaf for leaf in leaves if leaf in ("gate_proj", "up_proj", "down_proj")]
    if list(leaves) == feed_forward:
        return "Train with --adapter mma:placement=attn, which leaves the feed-forward layers alone, or with lora."
    return "Train with --adapter lora, whose fold needs no bias, or export to onnx, which holds any bias."


def _shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    from transformers import AutoModelForCausalLM

    make: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model: nn.Module = make.from_config(copy.deepcopy(config))
    tied = bool(config.tie_word_embeddings)
    named = model.named_parameters(remove_duplicate=False)
    return {name: tuple(p.shape) for name, p in named if not (tied and name == "lm_head.weight")}


def merged_weight(weight: Tensor, updates: Sequence[AffineUpdate]) -> Tensor:
    """Return ``W + sum(up @ down)`` ``[out, in]`` in fp32; ``weight`` is not changed."""
    result = weight.to(torch.float32, copy=True) if updates else weight.float()
    for update in updates:
        result.addmm_(update.up.detach().to(result), update.down.detach().to(result))
    return result


def merged_bias(bias: Tensor | None, updates: Sequence[AffineUpdate]) -> Tensor | None:
    """Return ``b + sum(bias)`` ``[out]`` in fp32 on the CPU, or None where there is no bias at all."""
    parts = [bias, *(update.bias for update in updates)]
    present = [part.detach().float().cpu() for part in parts if part is not None]
    return sum(present[1:], start=present[0].clone()) if present else None


def _on_host(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cpu()


def tensors(plain: PlainModel, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(name, tensor)`` of each parameter in ``shapes``, one in memory at a time.

    :raises ModelError: a tensor is missing or has another shape.
    """
    for name, shape in shapes.items():
        tensor = plain.read(name)
        if tuple(tensor.shape) != tuple(shape):
            raise ModelError(f"{name} has shape {list(tensor.shape)}, the exported model needs {list(shape)}")
        yield name, tensor
        del tensor

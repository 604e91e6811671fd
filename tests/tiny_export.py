"""Exported folders of tiny models, written node by node with ``onnx.helper``: what the runtime is tested on.

Weights are those of a torch model, an adapter's updates folded in per condition; everything is fp32. The vision graph
is a single matrix, and :func:`see_through_the_matrix` gives the torch model the same eyes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lavintk.models.build import Assembly

Array = NDArray[Any]
MICROSOFT = "com.microsoft"
VISIBLE = ("batch_size", "sequence_length")


class Graph:
    """Gathers nodes and weights; each call returns the name of what it made."""

    def __init__(self, name: str) -> None:
        self.name, self.nodes, self.weights = name, list[Any](), list[Any]()
        self.inputs, self.outputs = list[Any](), list[Any]()

    def weight(self, name: str, value: Array) -> str:
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(self, kind: str, inputs: list[str], *outputs: str, domain: str = "", **attributes: Any) -> str:
        outputs = outputs or (f"{kind}_{len(self.nodes)}",)
        self.nodes.append(helper.make_node(kind, inputs, list(outputs), domain=domain, **attributes))
        return outputs[0]

    def save(self, path: Path) -> None:
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, self.weights)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


def array(tensor: torch.Tensor) -> Array:
    found: Array = tensor.detach().float().cpu().numpy()
    return found


def folded(assembly: Assembly, condition: str) -> dict[str, tuple[Array, Array]]:
    """Return weight ``[in, out]`` and bias of each linear layer of the language model under ``condition``."""
    linears = {name: layer for name, layer in assembly.model.linears().items() if name.startswith("language.")}
    weights = {name: array(layer.dequantize()) for name, layer in linears.items()}
    biases = {
        name: np.zeros(len(weights[name]), np.float32) if layer.bias is None else array(layer.bias)
        for name, layer in linears.items()
    }
    assert assembly.model.adapter is not None
    for update in assembly.model.adapter.affine_updates():
        if update.condition == condition and update.linear in linears:
            weights[update.linear] = weights[update.linear] + array(update.up) @ array(update.down)
            if update.bias is not None:
                biases[update.linear] = biases[update.linear] + array(update.bias)
    return {name: (np.ascontiguousarray(weights[name].T), biases[name]) for name in linears}


def write_decoder(path: Path, assembly: Assembly, condition: str, embeds: bool) -> None:
    """Write a decoder with rotary attention over a cache, as the exporter's contract names its inputs and outputs.

    :param embeds: it takes ``inputs_embeds`` instead of ``input_ids``.
    """
    language, linears = assembly.model.language, folded(assembly, condition)
    config, graph = language.config, Graph("decoder")
    width, heads, pairs = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    size = width // heads
    positions = torch.arange(config.max_position_embeddings)[None]
    cos, sin = language.model.rotary_emb(torch.zeros(1, 1, width), position_ids=positions)
    graph.weight("cos", array(cos[0])[:, : size // 2])
    graph.weight("sin", array(sin[0])[:, : size // 2])
    declare_attention_inputs(graph, config.num_hidden_layers, pairs, size)
    if embeds:
        graph.inputs.insert(0, value("inputs_embeds", TensorProto.FLOAT, *VISIBLE, width))
        states = "inputs_embeds"
    else:
        graph.inputs.insert(0, value("input_ids", TensorProto.INT64, *VISIBLE))
        graph.weight("embedding", array(language.model.embed_tokens.weight))
        states = graph.node("Gather", ["embedding", "input_ids"])

    def norm(states: str, name: str, module: Any) -> str:
        inner = module if hasattr(module, "variance_epsilon") else module.norm
        gamma = graph.weight(f"{name}.weight", array(inner.weight))
        return graph.node("SimplifiedLayerNormalization", [states, gamma], axis=-1, epsilon=config.rms_norm_eps)

    def linear(states: str, name: str) -> str:
        weight, bias = linears[f"language.model.{name}"]
        product = graph.node("MatMul", [states, graph.weight(f"{name}.weight", weight)])
        return graph.node("Add", [product, graph.weight(f"{name}.bias", bias)])

    for index, layer in enumerate(language.model.layers):
        name = f"layers.{index}"
        normed = norm(states, f"{name}.attention_norm", layer.input_layernorm)
        query, key, val = (linear(normed, f"{name}.self_attn.{part}_proj") for part in "qkv")
        past = [f"past_key_values.{index}.key", f"past_key_values.{index}.value"]
        attended = f"{name}.attended"
        graph.node(
            "GroupQueryAttention", [query, key, val, *past, "last_place", "total", "cos", "sin"],
            attended, f"present.{index}.key", f"present.{index}.value",
            domain=MICROSOFT, num_heads=heads, kv_num_heads=pairs, do_rotary=1,
        )  # fmt: skip
        states = graph.node("Add", [states, linear(attended, f"{name}.self_attn.o_proj")])
        normed = norm(states, f"{name}.mlp_norm", layer.post_attention_layernorm)
        gate, up = linear(normed, f"{name}.mlp.gate_proj"), linear(normed, f"{name}.mlp.up_proj")
        opened = graph.node("Mul", [graph.node("Mul", [gate, graph.node("Sigmoid", [gate])]), up])
        states = graph.node("Add", [states, linear(opened, f"{name}.mlp.down_proj")])
    head = graph.weight("head", array(language.lm_head.weight).T)
    graph.node("MatMul", [norm(states, "norm", language.model.norm), head], "logits")
    graph.outputs.insert(0, value("logits", TensorProto.FLOAT, *VISIBLE, config.vocab_size))
    graph.save(path)


def declare_attention_inputs(graph: Graph, layers: int, pairs: int, size: int) -> None:
    """Declare mask and cache, and derive from the mask what attention wants to know."""
    graph.inputs.append(value("attention_mask", TensorProto.INT64, "batch_size", "total_sequence_length"))
    for index in range(layers):
        for part in ("key", "value"):
            shape = ("batch_size", pairs, "past_sequence_length", size)
            graph.inputs.append(value(f"past_key_values.{index}.{part}", TensorProto.FLOAT, *shape))
            shape = ("batch_size", pairs, "total_sequence_length", size)
            graph.outputs.append(value(f"present.{index}.{part}", TensorProto.FLOAT, *shape))
    graph.weight("one", np.array([1], np.int64))
    count = graph.node("ReduceSum", ["attention_mask", "one"], keepdims=0)
    graph.node("Cast", [graph.node("Sub", [count, "one"])], "last_place", to=TensorProto.INT32)
    length = graph.node("Shape", ["attention_mask"], start=1)
    scalar = graph.node("Squeeze", [length])
    graph.node("Cast", [scalar], "total", to=TensorProto.INT32)


def write_embedding(path: Path, assembly: Assembly) -> None:
    """Write ``input_ids -> inputs_embeds``; ids beyond the table stand for row 0."""
    table = array(assembly.model.language.model.embed_tokens.weight)
    graph = Graph("embed_tokens")
    graph.inputs.append(value("input_ids", TensorProto.INT64, *VISIBLE))
    graph.outputs.append(value("inputs_embeds", TensorProto.FLOAT, *VISIBLE, table.shape[1]))
    known = graph.node("Less", ["input_ids", graph.weight("rows", np.array(len(table), np.int64))])
    kept = graph.node("Mul", ["input_ids", graph.node("Cast", [known], to=TensorProto.INT64)])
    graph.node("Gather", [graph.weight("embedding", table), kept], "inputs_embeds")
    graph.save(path)


def matrix(assembly: Assembly) -> Array:
    """Return what stands for the tower: ``[pixel values, visual tokens * hidden]``."""
    assert assembly.images is not None
    pixels = 3 * assembly.images.height * assembly.images.width
    wide = assembly.model.visual_tokens * assembly.model.hidden_size
    return np.random.default_rng(5).normal(scale=0.01, size=(pixels, wide)).astype(np.float32)


def write_vision(path: Path, assembly: Assembly) -> None:
    eye = matrix(assembly)
    graph = Graph("vision")
    graph.inputs.append(helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, None))
    graph.outputs.append(value("image_features", TensorProto.FLOAT, "tokens", assembly.model.hidden_size))
    flat = graph.node("Reshape", ["pixel_values", graph.weight("flat", np.array([-1, len(eye)], np.int64))])
    wide = graph.node("MatMul", [flat, graph.weight("eye", eye)])
    rows = graph.weight("rows", np.array([-1, assembly.model.hidden_size], np.int64))
    graph.node("Reshape", [wide, rows], "image_features")
    graph.save(path)


def see_through_the_matrix(assembly: Assembly) -> None:
    """Let the torch model see images as the exported vision graph does."""
    eye = torch.from_numpy(matrix(assembly))

    def visual_embeddings(pixel_values: torch.Tensor, *, blank_first: bool = False) -> torch.Tensor:
        return torch.matmul(pixel_values.flatten(1), eye).reshape(len(pixel_values), -1, assembly.model.hidden_size)

    assembly.model.visual_embeddings = visual_embeddings  # type: ignore[method-assign]


def value(name: str, kind: int, *shape: str | int) -> Any:
    return helper.make_tensor_value_info(name, kind, list(shape))


def conditions(assembly: Assembly) -> Iterator[tuple[str, str]]:
    """Yield each condition of the adapter with the file of its decoder."""
    assert assembly.model.adapter is not None
    for condition in assembly.model.adapter.conditions:
        if assembly.model.vision is None:
            yield condition, "onnx/model.onnx"
        else:
            yield condition, "onnx/decoder_text.onnx" if condition == "text" else "onnx/decoder_model_merged.onnx"


def write_export(folder: Path, assembly: Assembly, evaluation: dict[str, Any] | None = None) -> Path:
    """Write what the runtime needs of an exported folder."""
    model, seeing = assembly.model, assembly.model.vision is not None
    for condition, name in conditions(assembly):
        write_decoder(folder / name, assembly, condition, embeds=seeing)
    if seeing:
        write_embedding(folder / "onnx/embed_tokens.onnx", assembly)
        write_vision(folder / "onnx/vision_encoder.onnx", assembly)
    assembly.tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(model.language.config.to_dict(), default=str))
    description = {
        "format": 1,
        "lavintk": "0",
        "graphs": {
            "decoder": dict(conditions(assembly)),
            "embed_tokens": "onnx/embed_tokens.onnx" if seeing else None,
            "vision": "onnx/vision_encoder.onnx" if seeing else None,
        },
        "prompt": {
            "template": assembly.template.kind,
            "system": assembly.template.system,
            "visual_tokens": model.visual_tokens,
        },
        "image": vars(assembly.images) if assembly.images else None,
        "quant": "fp32",
        "evaluation": evaluation,
    }
    (folder / "lavintk_export.json").write_text(json.dumps(description))
    return folder


def copy_of(folder: Path, target: Path) -> Path:
    """Return a copy to break."""
    shutil.copytree(folder, target)
    return target

"""Random graphs that keep to the contract of exported folders, so that clients can be tried without an export."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]
LAYERS, HEADS, KV_HEADS, HEAD_SIZE = 2, 4, 2, 16
HIDDEN, MIDDLE, EPSILON = HEADS * HEAD_SIZE, 96, 1e-5
MICROSOFT = "com.microsoft"
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
BATCH = ["batch_size", "sequence_length"]


class Graph:
    """A graph under construction; weights are drawn from one source."""

    def __init__(self, random: np.random.Generator) -> None:
        self.random = random
        self.nodes, self.weights = list[Any](), list[Any]()

    def add(self, kind: str, *inputs: str, outputs: Sequence[str] = (), domain: str = "", **attributes: Any) -> str:
        made = list(outputs) or [f"{kind}_{len(self.nodes)}"]
        self.nodes.append(helper.make_node(kind, list(inputs), made, domain=domain, **attributes))
        return made[0]

    def keep(self, value: Array) -> str:
        name = f"weight_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def draw(self, *shape: int, scale: float = 0.1, mean: float = 0.0) -> str:
        return self.keep((self.random.standard_normal(shape) * scale + mean).astype(np.float32))

    def integers(self, *values: int) -> str:
        return self.keep(np.array(values, np.int64))

    def save(self, path: Path, inputs: Sequence[Any], outputs: Sequence[Any], *, external: bool = False) -> None:
        graph = helper.make_graph(self.nodes, path.stem, inputs, outputs, self.weights)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Shape inference reads small tensors, which it cannot do in an external file.
        location = f"{path.name}_data" if external else None
        onnx.save(model, path, save_as_external_data=external, location=location, size_threshold=1024)


def declare(name: str, shape: Sequence[Any] | None, kind: int = FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def write_decoder(path: Path, vocabulary: int, *, embeds: bool, seed: int = 0) -> None:
    """Write a Llama-like decoder with its weights in an external file; ``embeds``: it takes embeddings, not ids."""
    graph = Graph(np.random.default_rng(seed))
    hidden = "inputs_embeds" if embeds else graph.add("Gather", graph.draw(vocabulary, HIDDEN, scale=1.0), "input_ids")
    total, lengths = _lengths(graph)
    angles = np.arange(256)[:, None] * 10000.0 ** (-np.arange(HEAD_SIZE // 2) / (HEAD_SIZE // 2))
    rotary = [graph.keep(function(angles).astype(np.float32)) for function in (np.cos, np.sin)]
    cache, presents = list[Any](), list[Any]()
    for layer in range(LAYERS):
        past, present = (
            [f"{name}.{layer}.{part}" for part in ("key", "value")] for name in ("past_key_values", "present")
        )
        cache += [declare(name, ["batch_size", KV_HEADS, "past_sequence_length", HEAD_SIZE]) for name in past]
        presents += [declare(name, ["batch_size", KV_HEADS, "total_sequence_length", HEAD_SIZE]) for name in present]
        width = (HEADS + 2 * KV_HEADS) * HEAD_SIZE
        packed = graph.add("MatMul", _normed(graph, hidden), graph.draw(HIDDEN, width))
        attended = graph.add(
            "GroupQueryAttention", packed, "", "", *past, lengths, total, *rotary,
            outputs=[f"attended_{layer}", *present], domain=MICROSOFT,
            num_heads=HEADS, kv_num_heads=KV_HEADS, do_rotary=1,
        )  # fmt: skip
        hidden = graph.add("Add", hidden, graph.add("MatMul", attended, graph.draw(HIDDEN, HIDDEN)))
        wide = graph.add("MatMul", _normed(graph, hidden), graph.draw(HIDDEN, MIDDLE))
        gated = graph.add("Mul", wide, graph.add("Sigmoid", wide))
        hidden = graph.add("Add", hidden, graph.add("MatMul", gated, graph.draw(MIDDLE, HIDDEN)))
    graph.add("MatMul", _normed(graph, hidden), graph.draw(HIDDEN, vocabulary), outputs=["logits"])
    first = declare("inputs_embeds", [*BATCH, HIDDEN]) if embeds else declare("input_ids", BATCH, INT64)
    mask = declare("attention_mask", ["batch_size", "total_sequence_length"], INT64)
    graph.save(path, [first, mask, *cache], [declare("logits", [*BATCH, vocabulary]), *presents], external=True)


def _normed(graph: Graph, hidden: str) -> str:
    return graph.add("SimplifiedLayerNormalization", hidden, graph.draw(HIDDEN, mean=1.0), axis=-1, epsilon=EPSILON)


def _lengths(graph: Graph) -> tuple[str, str]:
    """Return the names of the total length and of each row's length less one."""
    total = graph.add("Gather", graph.add("Shape", "attention_mask"), graph.keep(np.array(1, np.int64)))
    rows = graph.add("ReduceSum", "attention_mask", graph.integers(1), keepdims=0)
    less = graph.add("Sub", rows, graph.integers(1))
    return tuple(graph.add("Cast", value, to=TensorProto.INT32) for value in (total, less))  # type: ignore[return-value]


def write_embeddings(folder: Path, suffix: str, vocabulary: int, placeholder: int, seed: int = 1) -> None:
    """Write ``embed_tokens`` and ``embedding``, which also puts image features at the placeholders."""
    for name in ("embed_tokens", "embedding"):
        graph = Graph(np.random.default_rng(seed))
        known = graph.add("Less", "input_ids", graph.integers(vocabulary))
        row = graph.add("Where", known, "input_ids", graph.integers(0))
        table = graph.draw(vocabulary, HIDDEN, scale=1.0)
        inputs = [declare("input_ids", BATCH, INT64)]
        if name == "embed_tokens":
            graph.add("Gather", table, row, outputs=["inputs_embeds"])
        else:
            embedded = graph.add("Gather", table, row)
            places = graph.add("NonZero", graph.add("Equal", "input_ids", graph.integers(placeholder)))
            places = graph.add("Transpose", places)
            graph.add("ScatterND", embedded, places, "image_features", outputs=["inputs_embeds"])
            inputs.append(declare("image_features", ["image_tokens", HIDDEN]))
        graph.save(folder / f"{name}{suffix}.onnx", inputs, [declare("inputs_embeds", [*BATCH, HIDDEN])])


def write_vision(path: Path, size: int, patch: int, seed: int = 2) -> int:
    """Write a vision graph of one matrix over patches; return the visual tokens per image."""
    graph = Graph(np.random.default_rng(seed))
    images = graph.add("Reshape", "pixel_values", graph.integers(-1, 3, size, size))
    patches = graph.add("Conv", images, graph.draw(HIDDEN, 3, patch, patch), strides=[patch, patch])
    rows = graph.add("Transpose", patches, perm=[0, 2, 3, 1])
    graph.add("Reshape", rows, graph.integers(-1, HIDDEN), outputs=["image_features"])
    graph.save(path, [declare("pixel_values", None)], [declare("image_features", ["image_tokens", HIDDEN])])
    return (size // patch) ** 2


def greedy(decoder: Path, first: Array, count: int, embed: Path | None = None) -> list[int]:
    """Return ``count`` greedy tokens of plain onnxruntime, the whole sequence computed anew for each.

    :param first: ids ``[T]`` or embeddings ``[T, hidden]`` of the prompt, whichever the decoder takes.
    :param embed: ``embed_tokens``, for a decoder that takes embeddings.
    """
    session = onnxruntime.InferenceSession(decoder, providers=["CPUExecutionProvider"])
    table = onnxruntime.InferenceSession(embed, providers=["CPUExecutionProvider"]) if embed else None
    name = "inputs_embeds" if embed else "input_ids"
    empty = {
        entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
        for entry in session.get_inputs()
        if entry.name.startswith("past_key_values")
    }
    sequence, tokens = first[None], list[int]()
    for _ in range(count):
        mask = np.ones(sequence.shape[:2], np.int64)
        logits = session.run(["logits"], {name: sequence, "attention_mask": mask, **empty})[0]
        tokens.append(int(logits[0, -1].argmax()))
        further: Array = np.array([[tokens[-1]]], np.int64)
        if table is not None:
            further = table.run(None, {"input_ids": further})[0]
        sequence = np.concatenate([sequence, further], axis=1)
    return tokens


SIZE, PATCH = 28, 14


def write_client_folder(
    out: Path,
    tokenizer: Any,
    template: Any,
    *,
    images: Any = None,
    suffix: str = "_q4",
    vocabulary: int = 0,
) -> Any:
    """Write random graphs and everything beside them; return the description that the folder was written from.

    :param template: a :class:`lavintk.data.template.Template`.
    :param images: an image processor for pictures of :data:`SIZE` pixels, or None for a model without vision.
    :param vocabulary: rows of the embedding, if more than the tokenizer has.
    """
    from transformers import LlamaConfig

    from lavintk_onnx.folder import FolderDescription, write_folder

    vocabulary = vocabulary or len(tokenizer)
    names = {"decoder": "decoder_model_merged", "vision": "vision_encoder", "embed_tokens": "embed_tokens"}
    names = {**names, "embedding": "embedding"} if images else {"decoder": "model"}
    graphs = {role: f"onnx/{name}{suffix}.onnx" for role, name in names.items()}
    write_decoder(out / graphs["decoder"], vocabulary, embeds=images is not None)
    visual_tokens = 0
    if images:
        visual_tokens = write_vision(out / graphs["vision"], SIZE, PATCH)
        write_embeddings(out / "onnx", suffix, vocabulary, vocabulary)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=MIDDLE, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, rms_norm_eps=EPSILON,
        max_position_embeddings=256, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    description = FolderDescription(
        config, tokenizer, template.kind, template.stop_ids, 256, graphs, {graphs["decoder"]: 1}, template.system,
        images, visual_tokens,
    )  # fmt: skip
    write_folder(out, description)
    return description


def write_sentencepiece_like_tokenizer(folder: Path) -> Path:
    """Write a tokenizer built as LLaMA's: a space in front of every text, bytes for unknown characters, a BOS."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend: Any = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    cut = [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation(), pre_tokenizers.Split("\n", "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence(cut)  # so that no token goes across words, as in LLaMA's
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=450, special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    texts = ["Instruction: what color is the shape? Response: red", "Image: N/A is there a blue circle? yes or no"]
    backend.train_from_iterator(texts * 4, trainer)
    content = json.loads(backend.to_str())
    content["added_tokens"] = content["added_tokens"][: len(special)]
    backend = Tokenizer.from_str(json.dumps({**content, "pre_tokenizer": None}))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    make: Any = PreTrainedTokenizerFast
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    make(tokenizer_object=backend, **roles).save_pretrained(folder)
    return folder

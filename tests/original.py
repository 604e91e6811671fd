"""Writes files in the layouts of Meta, OpenAI and LaVIN at tiny size; tensors come from a golden file."""

from __future__ import annotations

import json
import warnings
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lavintk.testing.golden_file import Golden

SPLIT_ROWS = ("wq", "wk", "wv", "w1", "w3", "output")
SPLIT_COLUMNS = ("wo", "w2", "tok_embeddings")


def language_weights(golden: Golden) -> dict[str, Tensor]:
    """Return the weights of Meta's model."""
    starts = ("layers.", "tok_embeddings.", "norm.", "output.")
    return {n: t for n, t in golden.weights.items() if n.startswith(starts) and "adapter" not in n}


def write_meta(
    folder: Path, golden: Golden, shards: int = 1, params: Mapping[str, Any] | None = None, tokenizer: bool = True
) -> Path:
    """Write ``consolidated.NN.pth`` as Meta splits them, ``params.json`` and a tokenizer of plain words."""
    folder.mkdir(parents=True)
    geometry = golden.geometry
    content = {"dim": geometry.dim, "multiple_of": geometry.multiple_of, "n_heads": geometry.n_heads,
               "n_layers": geometry.n_layers, "norm_eps": geometry.norm_eps, "vocab_size": -1}  # fmt: skip
    (folder / "params.json").write_text(json.dumps(content | dict(params or {})))
    weights = language_weights(golden)
    for number in range(shards):
        shard = {name: part(name, tensor, number, shards) for name, tensor in weights.items()}
        shard["rope.freqs"] = torch.ones(geometry.dim // geometry.n_heads // 2)
        torch.save(shard, folder / f"consolidated.{number:02}.pth")
    if tokenizer:
        write_words(folder, geometry.vocab)
    return folder


def part(name: str, tensor: Tensor, number: int, shards: int) -> Tensor:
    """Return one shard's slice, with memory of its own."""
    layer = name.split(".")[-2]
    if layer in SPLIT_ROWS:
        return tensor.tensor_split(shards, 0)[number].clone()
    if layer in SPLIT_COLUMNS:
        return tensor.tensor_split(shards, 1)[number].clone()
    return tensor.clone()


def write_words(folder: Path, size: int) -> None:
    """Write a tokenizer with ``size`` entries."""
    words = ["<unk>", "<s>", "</s>", "Image", ":", "N", "/", "A", *(f"w{i}" for i in range(size - 8))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)


def clip_weights(golden: Golden) -> dict[str, Tensor]:
    """Return a whole CLIP's state dict: the golden tower, with a text tower beside it."""
    prefix = "backbone."
    weights = {
        n.removeprefix(prefix): t for n, t in golden.weights.items() if n.startswith(prefix) and "adapter" not in n
    }
    text = {
        "transformer.resblocks.0.ln_1.weight": torch.ones(8), "token_embedding.weight": torch.ones(9, 8),
        "positional_embedding": torch.ones(7, 8), "ln_final.weight": torch.ones(8), "logit_scale": torch.tensor(1.0),
        "text_projection": torch.ones(8, 8), "input_resolution": torch.tensor(golden.geometry.image_size),
    }  # fmt: skip
    return weights | text


def write_torchscript(path: Path, weights: Mapping[str, Tensor]) -> Path:
    """Write an archive of a scripted module with these parameters, as OpenAI's files are."""
    root = Bare()
    for name, tensor in weights.items():
        *modules, leaf = name.split(".")
        module: torch.nn.Module = root
        for inner in modules:
            if not hasattr(module, inner):
                module.add_module(inner, Bare())
            module = getattr(module, inner)
        if tensor.is_floating_point():
            module.register_parameter(leaf, torch.nn.Parameter(tensor.clone(), requires_grad=False))
        else:
            module.register_buffer(leaf, tensor.clone())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated
        torch.jit.save(torch.jit.script(root), str(path))
    return path


class Bare(torch.nn.Module):
    """A module that does nothing; scripted classes must be importable."""

    def forward(self) -> int:
        return 0


def adapter_weights(golden: Golden, wrapped: bool = True) -> dict[str, Tensor]:
    """Return LaVIN's adapter tensors, named as in a model wrapped for several GPUs."""
    return {f"module.{n}" if wrapped else n: t for n, t in golden.weights.items() if "adapter" in n}


def write_checkpoint(path: Path, golden: Golden, *, wrapped: bool = True, **arguments: Any) -> Path:
    """Write a LaVIN checkpoint; ``arguments`` overrides what ``args`` says."""
    geometry = golden.geometry
    said = {"temperature": geometry.temperature, "adapter_scale": geometry.adapter_scale, "llm_model": "7B",
            "adapter_dim": geometry.adapter_dim, "hidden_proj": geometry.hidden_proj, "use_vicuna": False,
            "adapter_type": geometry.adapter_type, "visual_adapter_type": geometry.visual_adapter_type}  # fmt: skip
    content = {
        "model": adapter_weights(golden, wrapped), "epoch": 19, "args": Namespace(**said | arguments),
        "optimizer": {"state": {0: {"step": 3, "state1": torch.zeros(3)}}, "param_groups": [{"params": [0]}]},
        "scaler": {"scale": 65536.0},
    }  # fmt: skip
    torch.save(content, path)
    return path


class Evil:
    """Unpickled, it would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return open, (str(self.target), "w")

"""The original LaVIN graph written from its equations in plain torch, to compare lavintk with.

No code is shared with lavintk: the modality token is carried in every row, the vision tower runs in the original's
layout (positions, batch, width), adapters are convolutions, rotary pairs are neighbours. All in float64.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]
CONFIG: dict[str, Any] = {
    "dim": 48, "n_layers": 2, "n_heads": 4, "vocab": 61, "multiple_of": 16, "hidden_proj": 12, "max_seq_len": 24,
    "adapter_type": "attn", "adapter_dim": 8, "adapter_scale": 1.0, "temperature": 10.0,
    "visual_adapter_type": "router", "image_size": 28, "patch": 14, "vision_layers": 4, "vision_width": 64,
    "prefix_image": [5, 6], "prefix_text": [5, 6, 7, 8],
}  # fmt: skip
"""A small geometry; tests change some keys."""


def random_weights(c: dict[str, Any], seed: int) -> Weights:
    """Return random weights under the original's names; norms and biases are random too."""
    generator = torch.Generator().manual_seed(seed)
    d, width, r = c["dim"], c["vision_width"], c["adapter_dim"]
    ffn = -(-int(2 * 4 * d / 3) // c["multiple_of"]) * c["multiple_of"]
    w: Weights = {}

    def draw(name: str, *shape: int, std: float | None = None, mean: float = 0.0) -> None:
        spread = std if std is not None else 0.7 * (shape[1] ** -0.5)
        w[name] = (torch.randn(shape, generator=generator) * spread + mean).float()

    def norm(name: str, size: int, bias: bool = False) -> None:
        draw(f"{name}.weight", size, std=0.2, mean=1.0)
        if bias:
            draw(f"{name}.bias", size, std=0.1)

    def linear(name: str, out: int, size: int) -> None:
        draw(f"{name}.weight", out, size)
        draw(f"{name}.bias", out, std=0.1)

    def adapter(name: str, size: int, routed: bool) -> None:
        draw(f"{name}.conv_A.weight", r, size, 1)
        draw(f"{name}.conv_A.bias", r, std=0.2)
        for part in ("conv_B", "conv_D") if routed else ("conv_B",):
            draw(f"{name}.{part}.weight", size, r // 2, 1, std=0.2)
            draw(f"{name}.{part}.bias", size, std=0.2)
        if routed:
            linear(f"{name}.expert_weights", 2, size)
            w[f"{name}.expert_weights.weight"] *= c["temperature"]

    draw("tok_embeddings.weight", c["vocab"], d, std=0.6)
    draw("output.weight", c["vocab"], d, std=0.6 * d**-0.5)
    norm("norm", d)
    for i in range(c["n_layers"]):
        for name in ("wq", "wk", "wv", "wo"):
            draw(f"layers.{i}.attention.{name}.weight", d, d)
        for name, shape in (("w1", (ffn, d)), ("w2", (d, ffn)), ("w3", (ffn, d))):
            draw(f"layers.{i}.feed_forward.{name}.weight", *shape)
        norm(f"layers.{i}.attention_norm", d)
        norm(f"layers.{i}.ffn_norm", d)
        adapter(f"layers.{i}.adapter_attn", d, True)
        if c["adapter_type"] == "block":
            adapter(f"layers.{i}.adapter_mlp", d, True)
    v = "backbone.visual"
    tokens = (c["image_size"] // c["patch"]) ** 2 + 1
    draw(f"{v}.class_embedding", width, std=0.5)
    draw(f"{v}.positional_embedding", tokens, width, std=0.5)
    draw(f"{v}.conv1.weight", width, 3, c["patch"], c["patch"], std=0.05)
    for name in ("ln_pre", "ln_post"):
        norm(f"{v}.{name}", width, bias=True)
    draw(f"{v}.proj", width, 16)
    for j in range(c["vision_layers"]):
        b = f"{v}.transformer.resblocks.{j}"
        draw(f"{b}.attn.in_proj_weight", 3 * width, width)
        draw(f"{b}.attn.in_proj_bias", 3 * width, std=0.1)
        linear(f"{b}.attn.out_proj", width, width)
        linear(f"{b}.mlp.c_fc", 4 * width, width)
        linear(f"{b}.mlp.c_proj", width, 4 * width)
        norm(f"{b}.ln_1", width, bias=True)
        norm(f"{b}.ln_2", width, bias=True)
        adapter(f"{b}.adapter_attn", width, c["visual_adapter_type"] != "normal")
        if c["visual_adapter_type"] == "router_block":
            adapter(f"{b}.adapter_mlp", width, True)
    linear("adapter_proj.conv_A", c["hidden_proj"], width)
    linear("adapter_proj.conv_B", d, c["hidden_proj"])
    draw("adapter_modality_embedding.weight", 2, d, std=1.0)
    return w


def convolve(w: Weights, name: str, x: Tensor, groups: int = 1) -> Tensor:
    """Apply a convolution of kernel size 1 to ``[A, B, channels]``."""
    weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
    return F.conv1d(x.transpose(1, 2), weight, bias, groups=groups).transpose(1, 2)


def gate(w: Weights, name: str, x: Tensor, temperature: float) -> Tensor:
    """Return the routing weights ``[A, 2]`` off index 0 of the second axis of ``[A, B, channels]``."""
    scores = F.linear(x[:, 0], w[f"{name}.expert_weights.weight"], w[f"{name}.expert_weights.bias"])
    return torch.softmax(scores / temperature, dim=-1)


def routed(w: Weights, name: str, x: Tensor, route: Tensor, scale: float) -> Tensor:
    z = convolve(w, f"{name}.conv_A", x)
    first, second = route[:, 0, None, None], route[:, 1, None, None]
    up = first * convolve(w, f"{name}.conv_B", z, 2) + second * convolve(w, f"{name}.conv_D", z, 2)
    return x + scale * up


def vision(w: Weights, c: dict[str, Any], images: Tensor) -> Tensor:
    """Return the class tokens behind every fourth block, ``[B, V, width]``."""
    v, width, taps = "backbone.visual", c["vision_width"], []
    x = F.conv2d(images, w[f"{v}.conv1.weight"], stride=c["patch"]).flatten(2).transpose(1, 2)
    x = torch.cat([w[f"{v}.class_embedding"].expand(len(x), 1, -1), x], dim=1) + w[f"{v}.positional_embedding"]

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def adapt(name: str, x: Tensor) -> Tensor:
        if c["visual_adapter_type"] == "normal":
            return convolve(w, f"{name}.conv_B", convolve(w, f"{name}.conv_A", x), 2)
        return routed(w, name, x, gate(w, name, x, c["temperature"]), c["adapter_scale"])

    x = norm(f"{v}.ln_pre", x).transpose(0, 1)  # (positions, batch, width), as in the original
    for j in range(c["vision_layers"]):
        b = f"{v}.transformer.resblocks.{j}"
        y = adapt(f"{b}.adapter_attn", norm(f"{b}.ln_1", x))
        x = x + self_attention(w, f"{b}.attn", y, width // 64)
        y = norm(f"{b}.ln_2", x)
        if c["visual_adapter_type"] == "router_block":
            y = adapt(f"{b}.adapter_mlp", y)
        y = F.linear(y, w[f"{b}.mlp.c_fc.weight"], w[f"{b}.mlp.c_fc.bias"])
        x = x + F.linear(y * torch.sigmoid(1.702 * y), w[f"{b}.mlp.c_proj.weight"], w[f"{b}.mlp.c_proj.bias"])
        if (j + 1) % 4 == 0:
            taps.append(x[0])
    return torch.stack(taps, dim=1)


def self_attention(w: Weights, name: str, x: Tensor, heads: int) -> Tensor:
    y = F.linear(x, w[f"{name}.in_proj_weight"], w[f"{name}.in_proj_bias"])
    q, k, v = (part.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for part in y.chunk(3, dim=-1))
    attended = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1) @ v
    return F.linear(attended.permute(2, 0, 1, 3).flatten(2), w[f"{name}.out_proj.weight"], w[f"{name}.out_proj.bias"])


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate neighbouring pairs of ``[B, S, H, d]``."""
    d = x.shape[-1]
    angles = positions[:, None].double() * 10000.0 ** (-torch.arange(0, d, 2).double() / d)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
        torch.ones_like(angles), angles
    ).unsqueeze(1)
    return torch.view_as_real(turned).flatten(-2)


def language(w: Weights, c: dict[str, Any], h: Tensor, positions: Tensor, *, generating: bool = False) -> Tensor:
    """Return the logits ``[B, S, vocab]``; position 0 of the rows is the modality token.

    :param generating: gate the feed-forward adapter on the block's input, as the original's generator does.
    """
    length, heads = h.shape[1], c["n_heads"]
    mask = torch.full((length, length), float("-inf"), dtype=h.dtype).triu(1)
    mask[1:, 0] = float("-inf")

    def norm(name: str, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + c.get("norm_eps", 1e-6)) * w[f"{name}.weight"]

    for i in range(c["n_layers"]):
        layer, x = f"layers.{i}", h
        y = norm(f"{layer}.attention_norm", x)
        name = f"{layer}.adapter_attn"
        y = routed(w, name, y, gate(w, name, y, c["temperature"]), c["adapter_scale"])
        q, k, v = (F.linear(y, w[f"{layer}.attention.w{n}.weight"]).unflatten(-1, (heads, -1)) for n in "qkv")
        q, k = rotate(q, positions), rotate(k, positions)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5 + mask
        attended = torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, dim=-1), v).flatten(2)
        h = x + F.linear(attended, w[f"{layer}.attention.wo.weight"])
        y = norm(f"{layer}.ffn_norm", h)
        if c["adapter_type"] == "block":
            name = f"{layer}.adapter_mlp"
            source = norm(f"{layer}.ffn_norm", x) if generating else y
            y = routed(w, name, y, gate(w, name, source, c["temperature"]), c["adapter_scale"])
        up = F.silu(F.linear(y, w[f"{layer}.feed_forward.w1.weight"])) * F.linear(
            y, w[f"{layer}.feed_forward.w3.weight"]
        )
        h = h + F.linear(up, w[f"{layer}.feed_forward.w2.weight"])
    return F.linear(norm("norm", h), w["output.weight"])


def embed(w: Weights, c: dict[str, Any], ids: Tensor, labels: Tensor, features: Tensor, has_image: Tensor) -> Any:
    """Return embeddings and labels of the final rows, each cut to the width of ``ids``."""
    neck = F.silu(F.linear(features, w["adapter_proj.conv_A.weight"], w["adapter_proj.conv_A.bias"]))
    neck = F.linear(neck, w["adapter_proj.conv_B.weight"], w["adapter_proj.conv_B.bias"])
    table, width, rows, targets = w["tok_embeddings.weight"], ids.shape[1], [], []
    for row, image in enumerate(has_image.tolist()):
        prefix = table[torch.tensor(c["prefix_image" if image else "prefix_text"])]
        inserted = torch.cat([prefix, neck[row]]) if image else prefix
        h = torch.cat([table[ids[row, :1]], inserted, table[ids[row, 1:]]])[:width]
        target = torch.cat([labels[row, :1], labels.new_zeros(len(inserted)), labels[row, 1:]])[:width]
        modality = w["adapter_modality_embedding.weight"][image]
        rows.append(torch.cat([modality[None], h])[:width])
        targets.append(torch.cat([labels.new_zeros(1), target])[:width])
    return torch.stack(rows), torch.stack(targets)


def random_case(c: dict[str, Any], has_image: list[int], seed: int) -> dict[str, Tensor]:
    """Return a batch; the last row is full, so that real tokens are cut off."""
    generator = torch.Generator().manual_seed(seed)
    rows, width, size = len(has_image), c["max_seq_len"], c["image_size"]
    ids = torch.randint(9, c["vocab"], (rows, width), generator=generator)
    ids[:, 0] = 1
    labels = ids.clone()
    for row in range(rows):
        labels[row, : 6 + row] = 0
        length = width if row == rows - 1 and rows > 1 else width - 6 - row
        ids[row, length:] = labels[row, length:] = 0
    images = torch.randn(rows, 3, size, size, generator=generator)
    images[torch.tensor(has_image) == 0] = 0
    return {"input_ids": ids, "labels": labels, "images": images, "has_image": torch.tensor(has_image)}


def write_golden(path: Path, config: dict[str, Any], batches: dict[str, list[int]], seed: int = 0) -> Path:
    """Write weights, batches and what the graph makes of them, laid out as the shared file."""
    weights = random_weights(config, seed)
    tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
    for number, (name, has_image) in enumerate(batches.items()):
        case = random_case(config, has_image, seed + number)
        w = {n: t.double().requires_grad_("adapter" in n) for n, t in weights.items()}
        features = vision(w, config, case["images"].double())
        h, targets = embed(w, config, case["input_ids"], case["labels"], features, case["has_image"])
        logits = language(w, config, h, torch.arange(h.shape[1]))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=0)
        loss.backward()
        case |= {"visual_features": features, "logits": logits, "loss": loss.view(1)}
        for n, tensor in w.items():
            if tensor.requires_grad:
                case[f"grad.{n}"] = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        for part, tensor in case.items():
            stored = tensor.detach().float() if tensor.is_floating_point() else tensor
            tensors[f"{name}.{part}"] = stored.contiguous()
    save_file(tensors, path, metadata={"config": json.dumps(config)})
    return path

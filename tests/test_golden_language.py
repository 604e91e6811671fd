"""The language side against numbers from the original LaVIN graph (tests/data/lavin_tiny.safetensors).

The file's visual features come from the original's CLIP, whose routing depends on the batch; here they are fed in as
they are, so that sequence layout, modality routing, adapters, neck, loss and all their gradients are compared.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from lavintk.data.batch import IGNORED, Batch
from lavintk.layers import DenseLinear
from lavintk.models.attention import IMPLEMENTATION
from lavintk.models.connector import TapNeck
from lavintk.models.multimodal import MultimodalModel
from lavintk_mma import MixtureOptions
from lavintk_mma.adapter import MixtureOfModalityAdapter

FILE = Path(__file__).parent / "data" / "lavin_tiny.safetensors"
CASES = ("image_only", "text_only", "mixed")


class StoredFeatures(torch.nn.Module):
    """Stands in for the vision tower."""

    device = torch.device("cpu")

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.width, self.tokens = width, tokens

    def forward(self, features: torch.Tensor, run: object = None) -> torch.Tensor:
        return features


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    with safe_open(FILE, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (a safe_open is no mapping)


@pytest.fixture(scope="module")
def geometry() -> dict:
    with safe_open(FILE, "pt") as file:
        return json.loads(file.metadata()["config"])


def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Meta's neighbouring rotary pairs to transformers' halves (rows of q and k)."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


@pytest.fixture
def model(golden: dict[str, torch.Tensor], geometry: dict) -> MultimodalModel:
    heads, width = geometry["n_heads"], geometry["dim"]
    weight = {n.removeprefix("model."): t for n, t in golden.items() if n.startswith("model.")}
    config = LlamaConfig(
        hidden_size=width, intermediate_size=192, num_hidden_layers=geometry["n_layers"], num_attention_heads=heads,
        vocab_size=geometry["vocab"], rms_norm_eps=1e-6, tie_word_embeddings=False,
        max_position_embeddings=64,
    )  # fmt: skip
    config._attn_implementation = IMPLEMENTATION
    language = LlamaForCausalLM(config)
    names = {
        "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
    }  # fmt: skip
    for i, layer in enumerate(language.model.layers):
        for ours, original in names.items():
            matrix = weight[f"layers.{i}.{original}.weight"]
            parent, leaf = ours.split(".")
            matrix = halves(matrix, heads) if leaf in ("q_proj", "k_proj") else matrix
            setattr(layer.get_submodule(parent), leaf, DenseLinear(matrix.clone()))
        layer.input_layernorm.weight.data = weight[f"layers.{i}.attention_norm.weight"]
        layer.post_attention_layernorm.weight.data = weight[f"layers.{i}.ffn_norm.weight"]
    language.model.embed_tokens.weight.data = weight["tok_embeddings.weight"]
    language.model.norm.weight.data = weight["norm.weight"]
    language.lm_head.weight.data = weight["output.weight"]
    neck = TapNeck(geometry["vision_width"], geometry["hidden_proj"], width)
    neck.down.weight.data, neck.down.bias.data = (
        weight["adapter_proj.conv_A.weight"],
        weight["adapter_proj.conv_A.bias"],
    )
    neck.up.weight.data, neck.up.bias.data = weight["adapter_proj.conv_B.weight"], weight["adapter_proj.conv_B.bias"]
    tower = StoredFeatures(geometry["vision_width"], geometry["vision_layers"] // 4)
    model = MultimodalModel(language, tower, neck)  # type: ignore[arg-type]
    adapter = MixtureOfModalityAdapter(
        MixtureOptions(temperature=geometry["temperature"], dim=geometry["adapter_dim"], visual="none")
    )
    model.attach(adapter)
    with torch.no_grad():
        for ours, original in original_names(model, geometry["n_layers"]).items():
            parameter = model.trainable()[ours]
            parameter.copy_(weight[original].view(parameter.shape))
    return model.eval()


def original_names(model: MultimodalModel, layers: int) -> dict[str, str]:
    """Our names of the trained parameters to the original's."""
    parts = {"down": "conv_A", "up_first": "conv_B", "up_second": "conv_D", "router": "expert_weights"}
    names = {
        f"adapter.language.{i}_attn.{ours}.{kind}": f"layers.{i}.adapter_attn.{original}.{kind}"
        for i in range(layers)
        for ours, original in parts.items()
        for kind in ("weight", "bias")
    }
    names |= {
        f"connector.{o}.{k}": f"adapter_proj.{c}.{k}"
        for o, c in (("down", "conv_A"), ("up", "conv_B"))
        for k in ("weight", "bias")
    }
    names["adapter.modality.weight"] = "adapter_modality_embedding.weight"
    return names


def make_batch(golden: dict[str, torch.Tensor], geometry: dict, case: str) -> Batch:
    """Insert prefix and visual slots as the original does (lavin.md 2.6), cut at 40 with MOD, drop the padding."""
    ids, labels, visual = [], [], []
    has_image = golden[f"{case}.has_image"].tolist()
    slots, lengths = geometry["vision_layers"] // 4, []
    for row, image in enumerate(has_image):
        tokens, targets = golden[f"{case}.input_ids"][row].tolist(), golden[f"{case}.labels"][row].tolist()
        prefix = geometry["prefix_image"] if image else geometry["prefix_text"]
        inserted = [*prefix, *([0] * slots if image else [])]
        tokens = [tokens[0], *inserted, *tokens[1:]][: geometry["max_seq_len"] - 1]
        targets = [targets[0], *([0] * len(inserted)), *targets[1:]][: geometry["max_seq_len"] - 1]
        start = sum(lengths)
        if image:
            visual += [start + 1 + len(prefix) + j for j in range(slots)]
        shifted = [t if t else IGNORED for t in [*targets[1:], 0]]
        ids, labels, lengths = ids + tokens, labels + shifted, [*lengths, len(tokens)]
    pixels = golden[f"{case}.visual_features"][torch.tensor(has_image, dtype=torch.bool)]
    return Batch(
        torch.tensor(ids), torch.tensor(labels), torch.cat([torch.arange(n) for n in lengths]), tuple(lengths),
        torch.tensor(has_image), pixels if len(pixels) else None, torch.tensor(visual, dtype=torch.int64),
        tuple(map(str, range(len(lengths)))),
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_original_graph(model: MultimodalModel, golden: dict, geometry: dict, case: str) -> None:
    batch = make_batch(golden, geometry, case)
    with torch.no_grad():
        logits = model.logits(model.hidden(batch)).view(len(batch.lengths), -1, geometry["vocab"])
    expected = golden[f"{case}.logits"][:, 1:]
    assert (logits - expected).abs().max() < 3e-6


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_equal_the_original_graph(
    model: MultimodalModel, golden: dict, geometry: dict, case: str, checkpointing: bool
) -> None:
    model.checkpointing = checkpointing
    batch = make_batch(golden, geometry, case)
    loss = model.loss_sum(batch) / batch.labelled
    loss.backward()
    assert abs(float(loss.detach()) - float(golden[f"{case}.loss"])) < 2e-6
    for ours, original in original_names(model, geometry["n_layers"]).items():
        expected = golden[f"{case}.grad.{original}"]
        found = model.trainable()[ours].grad
        found = torch.zeros_like(expected) if found is None else found.view(expected.shape)
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max(), original


def test_folded_into_the_linear_layers_the_model_is_a_plain_llama(
    model: MultimodalModel, golden: dict, geometry: dict
) -> None:
    updates = list(model.adapter.affine_updates())  # type: ignore[union-attr]
    batch = make_batch(golden, geometry, "text_only")
    plain = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            vocab_size=101,
            rms_norm_eps=1e-6,
            tie_word_embeddings=False,
            attention_bias=True,
        )
    ).eval()
    state = {
        n.replace(".norm.weight", ".weight"): t for n, t in model.language.state_dict().items() if ".adapter." not in n
    }
    state["model.norm.weight"] = model.language.model.norm.weight
    plain.load_state_dict(state, strict=False)
    for layer in plain.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.bias)
    for update in updates:
        if update.condition == "text":
            linear = plain.get_submodule(update.linear.removeprefix("language."))
            linear.weight.data += update.up @ update.down
            linear.bias.data = update.bias
    with torch.no_grad():
        folded = plain(batch.input_ids[None]).logits[0]
    assert (folded - golden["text_only.logits"][0, 1:]).abs().max() < 3e-6

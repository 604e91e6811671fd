import copy
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import pluggy
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

import lavintk.layers
import lavintk_lora
import lavintk_lora.fused
from lavintk import builtin, hookspecs
from lavintk.data.batch import IGNORED, Batch
from lavintk.dense import DenseQuantizer
from lavintk.errors import CheckpointError, ModelError, OptionsError
from lavintk.kernels import LowRank, choice, functions, plain, using
from lavintk.layers import DenseLinear, FrozenLinear, forward_gated, forward_group, forward_onto
from lavintk.models.connector import TapNeck
from lavintk.models.decoder_layer import replace_norms
from lavintk.models.multimodal import MultimodalModel
from lavintk.models.vision import VisionTower
from lavintk.plugins import CORE, Plugins
from lavintk.registry import Choice
from lavintk_bnb.quantizers import FourBitQuantizer, Int8Quantizer
from lavintk_int4.quantizer import Int4Quantizer
from lavintk_lora.adapter import LoraAdapter, LoraLinear

# PEFT asks transformers for an attribute that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TOKENS = torch.arange(1, 13).reshape(2, 6)
LEAVES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
Q_PROJ = "language.model.layers.0.self_attn.q_proj"


@pytest.fixture
def plugins() -> Plugins:
    manager = pluggy.PluginManager("lavintk")
    manager.add_hookspecs(hookspecs)
    manager.register(builtin, CORE)
    manager.register(lavintk_lora, "lora")
    manager.check_pending()
    plugins = Plugins(manager)
    plugins.call_one("lora", "lavintk_register_adapters", registry=plugins.adapters.owned_by("lora"))
    return plugins


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return make_llama()


def make_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return cast(LlamaForCausalLM, LlamaForCausalLM(config).train(False))


def with_frozen_linears(module: nn.Module) -> Any:
    """Return a copy whose linear layers are frozen ones with the same weights."""
    module = copy.deepcopy(module)
    linears = {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    for name, linear in linears.items():
        bias = None if linear.bias is None else linear.bias.detach()
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, DenseLinear(linear.weight.detach(), bias))
    return module


def multimodal(language: nn.Module, with_vision: bool = False) -> MultimodalModel:
    if not with_vision:
        return MultimodalModel(with_frozen_linears(language)).eval()
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    tower = VisionTower(with_frozen_linears(CLIPVisionModel(config)), 1)
    return MultimodalModel(with_frozen_linears(language), tower, TapNeck(16, 8, 32)).eval()


def attached(model: MultimodalModel, seed: int = 1, **options: Any) -> LoraAdapter:
    """Return an adapter on ``model`` as after training: neither A nor B is at its start."""
    adapter = LoraAdapter(lavintk_lora.LoraOptions(**options))
    model.attach(adapter)
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in adapter.named_parameters():
        parameter.data.normal_(0, 0.1, generator=generator)
    return adapter


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return cast(Tensor, model(input_ids=TOKENS).logits)


def test_a_fresh_adapter_changes_no_output(llama: LlamaForCausalLM) -> None:
    model = multimodal(llama)
    before = logits(model.language)
    model.attach(LoraAdapter(lavintk_lora.LoraOptions(dropout=0.5)))
    assert torch.equal(logits(model.language), before)


def test_a_seed_gives_the_same_start_as_kaiming_uniform(llama: LlamaForCausalLM) -> None:
    model = multimodal(llama)
    adapter = LoraAdapter(lavintk_lora.LoraOptions(r=4, targets="q_proj"))
    torch.manual_seed(7)
    model.attach(adapter)
    torch.manual_seed(7)
    expected = nn.Linear(32, 4, bias=False).weight  # torch initialises linear layers so, and PEFT takes that over
    assert torch.equal(adapter.layers[Q_PROJ].down, expected)
    assert not adapter.layers[Q_PROJ].up.any()


def test_all_selects_the_seven_projections_of_the_language_model_only(llama: LlamaForCausalLM) -> None:
    adapter = attached(multimodal(llama, with_vision=True))
    expected = {name for name, child in llama.named_modules() if isinstance(child, nn.Linear)} - {"lm_head"}
    assert {name.removeprefix("language.") for name in adapter.layers} == expected


@pytest.mark.parametrize(
    ("targets", "leaves", "count"),
    [
        ("q_proj, v_proj", {"q_proj", "v_proj"}, 4),
        ("q_proj+v_proj", {"q_proj", "v_proj"}, 4),
        ("*.q_proj", {"q_proj"}, 2),
        ("language.*.1.mlp.*", {"gate_proj", "up_proj", "down_proj"}, 3),
        (Q_PROJ, {"q_proj"}, 1),
        ("vision.*.fc?", {"fc1", "fc2"}, 4),
        ("all,vision.*.0.mlp.fc1", LEAVES | {"fc1"}, 15),
    ],
)
def test_targets_select_by_leaf_name_and_by_pattern(
    llama: LlamaForCausalLM, targets: str, leaves: set[str], count: int
) -> None:
    adapter = attached(multimodal(llama, with_vision=True), targets=targets)
    assert {name.rpartition(".")[2] for name in adapter.layers} == leaves
    assert len(adapter.layers) == count


def test_targets_that_fit_nothing_are_listed_with_suggestions(llama: LlamaForCausalLM) -> None:
    model = multimodal(llama, with_vision=True)
    with pytest.raises(ModelError) as caught:
        model.attach(LoraAdapter(lavintk_lora.LoraOptions(targets="q_porj,v_proj,fc1,language.*.q")))
    message = str(caught.value)
    assert "'q_porj' fits no linear layer. Did you mean 'q_proj'?" in message
    assert "'fc1' fits no linear layer. The vision tower has such layers: write 'vision.*.fc1'" in message
    assert "'language.*.q' fits no linear layer" in message
    assert "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in message
    assert model.adapter is None


def test_empty_targets_are_refused(llama: LlamaForCausalLM) -> None:
    with pytest.raises(ModelError, match="it is empty"):
        attached(multimodal(llama), targets=" , ")


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "alpha": 12},
        {"r": 4, "alpha": 12, "rslora": True},
        {"r": 3, "targets": "q_proj,down_proj,lm_head"},
        {"r": 3, "targets": "language.*.1.*,language.*.0.self_attn.v_proj"},
    ],
)
def test_peft_loads_the_adapter_and_gives_the_same_logits(
    llama: LlamaForCausalLM, tmp_path: Path, options: dict[str, Any]
) -> None:
    model = multimodal(llama)
    attached(model, **options).save(tmp_path, "some/base")
    base = logits(llama)
    loaded = PeftModel.from_pretrained(llama, tmp_path)
    torch.testing.assert_close(logits(model.language), logits(loaded), rtol=0, atol=1e-5)
    assert (logits(loaded) - base).abs().max() > 1e-2
    assert loaded.peft_config["default"].base_model_name_or_path == "some/base"


def test_transformers_loads_the_adapter_and_gives_the_same_logits(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    model = multimodal(llama)
    attached(model, r=4).save(tmp_path, "some/base")
    llama.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(model.language), logits(llama), rtol=0, atol=1e-5)


def test_the_gradients_are_those_of_peft(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    model = multimodal(llama)
    adapter = attached(model, r=4, rslora=True)
    adapter.save(tmp_path, "base")
    peft = PeftModel.from_pretrained(llama, tmp_path, is_trainable=True)
    for network in (model.language, peft):
        network(input_ids=TOKENS, labels=TOKENS).loss.backward()
    theirs = {name: p.grad for name, p in peft.named_parameters() if p.requires_grad}
    for name, parameter in adapter.named_parameters():
        key = "base_model.model." + name.removeprefix("language.").replace(".weight", ".default.weight")
        torch.testing.assert_close(parameter.grad, theirs.pop(key), rtol=1e-4, atol=1e-6)
    assert not theirs
    assert all(p.grad is None for n, p in model.named_parameters() if not p.requires_grad)


def test_the_configuration_says_what_vllm_requires(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    attached(multimodal(llama), r=4, alpha=8, rslora=True, targets="q_proj,v_proj").save(tmp_path, "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 8, True)
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert (config["bias"], config["use_dora"], config["modules_to_save"]) == ("none", False, None)
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in load_file(
        tmp_path / "adapter_model.safetensors"
    )


@pytest.fixture
def written_by_peft(llama: LlamaForCausalLM, tmp_path: Path) -> tuple[Path, Tensor]:
    """An adapter of rank 4 and alpha 8 that PEFT wrote, and the logits it gives there."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    peft = get_peft_model(copy.deepcopy(llama), config)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1)
    peft.save_pretrained(str(tmp_path / "peft"))
    return tmp_path / "peft", logits(peft)


def test_an_adapter_written_by_peft_gives_the_same_logits_here(
    llama: LlamaForCausalLM, written_by_peft: tuple[Path, Tensor]
) -> None:
    folder, expected = written_by_peft
    model = multimodal(llama)
    attached(model, r=4, alpha=8, targets="q_proj,up_proj").load(folder)
    torch.testing.assert_close(logits(model.language), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"lora_alpha": 16}, "has lora_alpha=16, the model's adapter has 8"),
        ({"use_rslora": True}, "has use_rslora=True, the model's adapter has False"),
        ({"use_dora": True}, "uses use_dora=True, which lavintk lacks"),
        ({"rank_pattern": {"q_proj": 2}}, "uses rank_pattern={'q_proj': 2}"),
        ({"bias": "all"}, "trains biases (bias='all')"),
        (
            {"init_lora_weights": "pissa"},
            "has init_lora_weights='pissa', which belongs to a changed base model",
        ),
        ({"peft_type": "LOHA"}, "does not describe a LoRA adapter"),
    ],
)
def test_settings_that_would_give_another_function_are_refused(
    llama: LlamaForCausalLM, written_by_peft: tuple[Path, Tensor], changes: dict[str, Any], fault: str
) -> None:
    path = written_by_peft[0] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError) as caught:
        attached(multimodal(llama), r=4, alpha=8, targets="q_proj,up_proj").load(path.parent)
    assert len(caught.value.faults) == 1
    assert fault in caught.value.faults[0]


def test_what_was_saved_is_loaded_bit_for_bit(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    options: dict[str, Any] = {"r": 4, "targets": "all,vision.*.fc1"}
    saved = attached(multimodal(llama, with_vision=True), seed=1, **options)
    loaded = attached(multimodal(llama, with_vision=True), seed=2, **options)
    saved.save(tmp_path / "new" / "folder", "base")
    loaded.load(tmp_path / "new" / "folder")
    expected = dict(saved.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in loaded.named_parameters())


def test_vision_layers_are_kept_out_of_pefts_file(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    model = multimodal(llama, with_vision=True)
    attached(model, r=4, targets="v_proj,vision.*.q_proj").save(tmp_path, "base")
    vision = load_file(tmp_path / "vision_adapter.safetensors")
    assert sorted(vision) == [
        f"vision.model.encoder.layers.{layer}.self_attn.q_proj.lora_{half}.weight" for layer in (0, 1) for half in "AB"
    ]
    torch.testing.assert_close(
        logits(model.language), logits(PeftModel.from_pretrained(llama, tmp_path)), rtol=0, atol=1e-5
    )


def test_an_adapter_of_the_vision_tower_alone_needs_no_peft_files(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    saved = attached(multimodal(llama, with_vision=True), r=4, targets="vision.*.q_proj")
    saved.save(tmp_path, "base")
    assert [path.name for path in tmp_path.iterdir()] == ["vision_adapter.safetensors"]
    attached(multimodal(llama, with_vision=True), r=4, targets="vision.*.q_proj").load(tmp_path)
    with pytest.raises(CheckpointError, match=r"vision_adapter\.safetensors has lora_alpha=32"):
        attached(multimodal(llama, with_vision=True), r=4, alpha=8, targets="vision.*.q_proj").load(tmp_path)


def test_all_faults_of_a_checkpoint_are_listed_and_nothing_is_changed(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    adapter = attached(multimodal(llama, with_vision=True), r=4, targets="q_proj,vision.*.q_proj")
    adapter.save(tmp_path, "base")
    (tmp_path / "vision_adapter.safetensors").write_bytes(b"cut off")
    path = tmp_path / "adapter_model.safetensors"
    prefix = "base_model.model.model.layers"
    tensors = load_file(path)
    tensors["extra"] = tensors.pop(f"{prefix}.0.self_attn.q_proj.lora_A.weight")
    tensors[f"{prefix}.1.self_attn.q_proj.lora_B.weight"] = torch.zeros(32, 2)
    save_file(tensors, path)
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    with pytest.raises(CheckpointError) as caught:
        adapter.load(tmp_path)
    message = str(caught.value)
    assert "4 faults" in message
    assert f"{prefix}.0.self_attn.q_proj.lora_A.weight is missing in adapter_model.safetensors" in message
    assert "extra in adapter_model.safetensors is unexpected" in message
    assert "q_proj.lora_B.weight has shape (32, 2) in adapter_model.safetensors, the model needs (32, 4)" in message
    assert "vision_adapter.safetensors cannot be read" in message
    assert all(torch.equal(p, before[name]) for name, p in adapter.named_parameters())


def test_an_empty_folder_and_layers_nobody_asked_for_are_faults(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    narrow = attached(multimodal(llama, with_vision=True), r=4, targets="q_proj")
    with pytest.raises(CheckpointError, match=r"(?s)adapter_config.json cannot be read.*adapter_model"):
        narrow.load(tmp_path)
    attached(multimodal(llama, with_vision=True), r=4, targets="q_proj,vision.*.fc1").save(tmp_path, "base")
    with pytest.raises(CheckpointError, match=r"fc1\.lora_A\.weight in vision_adapter\S+ is unexpected"):
        narrow.load(tmp_path)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_affine_updates_merged_into_the_weights_give_the_same_logits(llama: LlamaForCausalLM, rslora: bool) -> None:
    model = multimodal(llama)
    adapter = attached(model, r=4, alpha=5, rslora=rslora, dropout=0.3)
    with torch.no_grad():
        for update in adapter.affine_updates():
            assert update.condition == "all"
            assert update.bias is None
            name = update.linear.removeprefix("language.") + ".weight"
            llama.get_parameter(name).add_(update.up @ update.down)
    torch.testing.assert_close(logits(model.language), logits(llama), rtol=0, atol=1e-5)


def test_one_update_is_yielded_for_each_layer_and_is_fp32(llama: LlamaForCausalLM) -> None:
    adapter = attached(multimodal(llama.bfloat16()), r=4, targets="k_proj")
    updates = list(adapter.affine_updates())
    assert [u.linear for u in updates] == [f"language.model.layers.{i}.self_attn.k_proj" for i in (0, 1)]
    assert [u.linear for u in adapter.affine_updates("language.model.layers.1.")] == [updates[1].linear]
    assert {(u.down.dtype, u.up.dtype) for u in updates} == {(torch.float32, torch.float32)}
    assert (updates[0].down.shape, updates[0].up.shape) == ((4, 32), (16, 4))


def test_a_bf16_model_keeps_fp32_master_weights_and_gradients(llama: LlamaForCausalLM) -> None:
    model = multimodal(llama.bfloat16())
    adapter = attached(model, r=4)
    output = model.language(input_ids=TOKENS, labels=TOKENS)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    for _, parameter in adapter.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32


def test_dropout_acts_in_training_only_and_keeps_the_mean(llama: LlamaForCausalLM) -> None:
    model = multimodal(llama)
    layer = attached(model, r=4, dropout=0.5).layers[Q_PROJ]
    x = torch.randn(32).expand(20000, 32)
    expected = layer(x[0])
    model.train()
    torch.manual_seed(0)
    drawn = layer(x)
    assert drawn.std(dim=0).min() > 1e-2
    torch.testing.assert_close(drawn.mean(dim=0), expected, rtol=0, atol=0.05)


def test_the_name_and_its_options_are_found_as_on_the_command_line(plugins: Plugins, llama: LlamaForCausalLM) -> None:
    choice = Choice.parse("lora:r=4,alpha=8,rslora=true,targets=q_proj+v_proj")
    adapter = plugins.adapters.create(choice)
    multimodal(llama).attach(adapter)
    assert isinstance(adapter, LoraAdapter)
    assert adapter.options == lavintk_lora.LoraOptions(r=4, alpha=8, rslora=True, targets="q_proj+v_proj")
    assert adapter.options.scale == 4.0
    assert adapter.conditions == ("all",)
    assert next(record for record in plugins.records() if record.name == "lora").offers == {"adapters": ["lora"]}


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"r": 0}, "r must be at least 1"),
        ({"alpha": 0}, "alpha must be at least 1"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"init": "pissa"}, "option 'init'"),
        ({"target": "all"}, "Did you mean 'targets'?"),
    ],
)
def test_unfitting_options_are_refused_before_a_model_is_loaded(
    plugins: Plugins, options: dict[str, Any], fault: str
) -> None:
    with pytest.raises(OptionsError) as caught:
        plugins.adapters["lora"].parse_options(options)
    assert fault in str(caught.value)


# --- the products of layers with a common input


BASES: dict[str, Any] = {
    "dense": DenseQuantizer(),
    "nf4": FourBitQuantizer("nf4"),
    "int8": Int8Quantizer(),
    "int4": Int4Quantizer(),
}
WIDTHS = {"q": (24, 4), "k": (16, 2), "v": (40, 5)}
"""Outputs and rank of each layer of a group; the input is 64 wide."""
Products = Callable[[Sequence[LoraLinear], Tensor], list[Tensor]]


class Counting(DenseLinear):
    """Counts the products with its weight."""

    products = gradients = 0

    def product(self, x: Tensor, total: Tensor | None = None) -> Tensor:
        self.products += 1
        return super().product(x, total)

    def input_gradient(self, gradient: Tensor, total: Tensor | None = None) -> Tensor:
        self.gradients += 1
        return super().input_gradient(gradient, total)


def trained(base: FrozenLinear, r: int, dropout: float = 0.0) -> LoraLinear:
    layer = LoraLinear(base, lavintk_lora.LoraOptions(r=r, alpha=5, dropout=dropout))
    nn.init.normal_(layer.up, 0, 0.1)
    return layer


def group_on(quantizer: Any, bias: bool = True) -> list[LoraLinear]:
    torch.manual_seed(0)
    sizes = WIDTHS.values()
    return [trained(quantizer.quantize(torch.randn(n, 64), torch.randn(n) if bias else None), r) for n, r in sizes]


def by_the_formula(layers: Sequence[LoraLinear], x: Tensor) -> list[Tensor]:
    """``W x + b + scale B A x`` in the type of ``x``, left to torch."""
    outputs = []
    for layer in layers:
        bias = None if layer.base.bias is None else layer.base.bias.to(x.dtype)
        update = F.linear(F.linear(x, layer.down.to(x.dtype)), layer.up.to(x.dtype))
        outputs.append(F.linear(x, layer.base.dequantize(x.dtype), bias) + layer.scale * update)
    return outputs


def outputs_and_gradients(function: Products, layers: list[LoraLinear], x: Tensor) -> list[Tensor]:
    """Return the outputs, then the gradients of x (if it has one) and of all A and B, for a loss of random weights."""
    leaf = x.detach().requires_grad_(x.requires_grad)
    outputs = function(layers, leaf)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    leaves = [leaf] * x.requires_grad + [p for layer in layers for p in layer.parameters()]
    return [*outputs, *torch.autograd.grad(outputs, leaves, weights)]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    wanted = expected.detach().double()
    return float((actual.detach().double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("members", [["q", "k", "v"], ["k"]])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen_input", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_a_group_has_the_outputs_and_gradients_of_the_formula(
    base: str, frozen_input: bool, bias: bool, members: list[str]
) -> None:
    layers = [layer for name, layer in zip(WIDTHS, group_on(BASES[base], bias)) if name in members]
    x = torch.randn(2, 7, 64, requires_grad=not frozen_input)
    actual = outputs_and_gradients(forward_group, layers, x)
    expected = outputs_and_gradients(by_the_formula, layers, x)
    assert len(actual) == 3 * len(layers) + (not frozen_input)
    for ours, theirs in zip(actual, expected):
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs) < 1e-6


@pytest.mark.parametrize("base", BASES)
def test_in_bf16_a_group_is_as_near_to_the_exact_one_as_the_formula_is(base: str) -> None:
    layers = group_on(BASES[base])
    x = torch.randn(50, 64).bfloat16().requires_grad_()
    exact = outputs_and_gradients(by_the_formula, layers, x.detach().float().requires_grad_())
    formula = outputs_and_gradients(by_the_formula, layers, x)
    actual = outputs_and_gradients(forward_group, layers, x)
    assert [tensor.dtype for tensor in actual] == [torch.bfloat16] * 4 + [torch.float32] * 6
    for ours, theirs, wanted in zip(actual, formula, exact):
        assert relative_error(ours, wanted) < 1.2 * relative_error(theirs, wanted) < 0.02


def test_the_gradients_of_a_group_pass_gradcheck() -> None:
    torch.manual_seed(0)
    layers = [trained(DenseLinear(torch.randn(n, 3), torch.randn(n)), r).double() for n, r in ((4, 2), (2, 1))]
    x = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    parameters = [p for layer in layers for p in layer.parameters()]

    def outputs(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        return tuple(forward_group(layers, x))

    assert torch.autograd.gradcheck(outputs, (x, *parameters))


@pytest.mark.parametrize("shape", [(64,), (0, 64), (3, 1, 2, 64)])
def test_any_number_of_rows_goes_through_a_group(shape: tuple[int, ...]) -> None:
    layers, x = group_on(BASES["nf4"]), torch.randn(*shape, requires_grad=True)
    expected = outputs_and_gradients(by_the_formula, layers, x)
    torch.testing.assert_close(outputs_and_gradients(forward_group, layers, x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(forward_group(layers, x), by_the_formula(layers, x))


def test_outputs_that_nobody_uses_cost_no_product() -> None:
    layers, x = group_on(BASES["dense"]), torch.randn(5, 64, requires_grad=True)
    layers[1].base = Counting(layers[1].base.dequantize())
    results = []
    for function in (forward_group, by_the_formula):
        outputs = function(layers, x)
        leaves = [x, *layers[0].parameters(), *layers[2].parameters()]
        results.append(torch.autograd.grad(outputs[0].sum() + outputs[2].square().sum(), leaves))
    assert max(map(relative_error, *results)) < 1e-6
    assert (layers[1].base.products, layers[1].base.gradients) == (1, 0)


def test_an_input_without_gradient_costs_no_product_with_the_weight() -> None:
    base = Counting(torch.randn(4, 3))
    trained(base, 2)(torch.randn(5, 3)).sum().backward()
    assert (base.products, base.gradients) == (1, 0)


def test_a_group_keeps_its_input_the_inner_values_and_a_and_b_until_the_backward_pass() -> None:
    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    layers, x = group_on(BASES["nf4"]), torch.randn(7, 64, requires_grad=True)
    kept: list[Callable[[], Kept | None]] = []

    def keep(tensor: Tensor) -> Kept:
        holder = Kept(tensor)
        kept.append(weakref.ref(holder))
        return holder

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda holder: holder.tensor):
        outputs = forward_group(layers, x)
    held = [holder.tensor.shape for holder in (reference() for reference in kept) if holder]
    assert held == [(7, 64), (7, 11), (11, 64), (24, 4), (16, 2), (40, 5)]
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs], retain_graph=True)
    once = x.grad
    assert once is not None
    once, x.grad = once.clone(), None
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    torch.testing.assert_close(x.grad, once)
    assert not any(reference() for reference in kept)  # though the graph, which outputs refer to, still exists


def test_a_checkpointed_block_that_ends_in_lora_is_recomputed_up_to_its_last_product() -> None:
    torch.manual_seed(0)
    bases = [Counting(torch.randn(*shape)) for shape in ((40, 32), (40, 32), (32, 40))]
    gate, up, down = layers = [trained(base, 3) for base in bases]

    def block(x: Tensor) -> Tensor:
        opened, raised = forward_group([gate, up], x)
        return x + cast(Tensor, down(F.silu(opened) * raised))

    def recomputed(_: Sequence[LoraLinear], x: Tensor) -> list[Tensor]:
        return [cast(Tensor, checkpoint(block, x, use_reentrant=False))]

    x = torch.randn(2, 5, 32, requires_grad=True)
    actual = outputs_and_gradients(recomputed, layers, x)
    assert [base.products for base in bases] == [2, 2, 1]
    assert [base.gradients for base in bases] == [1, 1, 1]
    torch.testing.assert_close(actual, outputs_and_gradients(lambda _, x: [block(x)], layers, x))


def onto(layers: Sequence[LoraLinear], x: Tensor) -> list[Tensor]:
    """The first layer onto a residual that the second one makes: both have gradients then."""
    return [forward_onto(layers[0], x, residual_of(layers, x))]


def residual_of(layers: Sequence[LoraLinear], x: Tensor) -> Tensor:
    return cast(Tensor, layers[1](x)).sin()


def onto_by_the_formula(layers: Sequence[LoraLinear], x: Tensor) -> list[Tensor]:
    return [residual_of(layers, x) + by_the_formula(layers[:1], x)[0]]


def two_on(quantizer: Any) -> list[LoraLinear]:
    torch.manual_seed(0)
    return [trained(quantizer.quantize(torch.randn(24, 64), torch.randn(24)), r) for r in (4, 2)]


@pytest.mark.parametrize("frozen_input", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_a_layer_onto_a_residual_has_the_outputs_and_gradients_of_the_formula(base: str, frozen_input: bool) -> None:
    layers, x = two_on(BASES[base]), torch.randn(2, 7, 64, requires_grad=not frozen_input)
    actual, expected = (outputs_and_gradients(function, layers, x) for function in (onto, onto_by_the_formula))
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs) < 1e-6


@pytest.mark.parametrize("base", BASES)
def test_in_bf16_a_layer_onto_a_residual_is_as_near_to_the_exact_one_as_the_formula_is(base: str) -> None:
    layers, x = two_on(BASES[base]), torch.randn(50, 64).bfloat16().requires_grad_()
    exact = outputs_and_gradients(onto_by_the_formula, layers, x.detach().float().requires_grad_())
    formula, actual = (outputs_and_gradients(function, layers, x) for function in (onto_by_the_formula, onto))
    for ours, theirs, wanted in zip(actual, formula, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, wanted) < 1.2 * relative_error(theirs, wanted) < 0.05


def test_the_gradients_of_a_layer_onto_a_residual_pass_gradcheck() -> None:
    torch.manual_seed(0)
    layer = trained(DenseLinear(torch.randn(4, 3), torch.randn(4)), 2).double()
    x, residual = (torch.randn(2, 2, n, dtype=torch.float64, requires_grad=True) for n in (3, 4))

    def output(x: Tensor, residual: Tensor, *parameters: Tensor) -> Tensor:
        return forward_onto(layer, x, residual)

    assert torch.autograd.gradcheck(output, (x, residual, *layer.parameters()))


def test_a_residual_stays_as_it_is_and_is_not_kept_for_the_backward_pass() -> None:
    layer, kept = trained(DenseLinear(torch.randn(24, 64)), 4), []
    x, residual = torch.randn(7, 64), torch.randn(7, 24, requires_grad=True)
    before = residual.detach().clone()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda t: t):
        forward_onto(layer, x, residual)
    assert kept == [(7, 64), (7, 4), (4, 64), (24, 4)]
    assert torch.equal(residual, before)


def test_a_residual_has_its_gradient_where_nothing_else_is_trained() -> None:
    layer, residual = trained(DenseLinear(torch.randn(24, 64)), 4).requires_grad_(False), torch.randn(7, 24)
    output = forward_onto(layer, torch.randn(7, 64), residual.requires_grad_())
    weights = torch.randn(7, 24)
    assert torch.equal(torch.autograd.grad(output, residual, weights)[0], weights)


def test_with_dropout_hooks_or_another_number_type_a_residual_is_added_to_the_layers_output() -> None:
    layer, x, residual, seen = (
        trained(DenseLinear(torch.randn(24, 64)), 4, 0.5),
        torch.randn(7, 64),
        torch.randn(7, 24),
        [],
    )
    layer.train()
    torch.manual_seed(1)
    drawn = forward_onto(layer, x, residual)
    torch.manual_seed(1)
    assert torch.equal(drawn, residual + layer(x))
    layer.eval()
    assert forward_onto(layer, x.bfloat16(), residual).dtype == torch.float32
    layer.base.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(forward_onto(layer, x, residual), residual + by_the_formula([layer], x)[0])
    assert seen == [1]


def let_multiply_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU multiply 16-bit matrices to an fp32 one, as a GPU can."""
    mm = torch.mm

    def multiply(left: Tensor, right: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        return mm(left, right) if out_dtype is None else mm(left.to(out_dtype), right.to(out_dtype))

    monkeypatch.setattr(torch, "mm", multiply)
    for module in (lavintk.layers, lavintk_lora.fused):
        monkeypatch.setattr(module, "multiplies_wide", lambda x: x.dtype in (torch.float16, torch.bfloat16))


def test_where_sums_stay_in_fp32_an_update_and_a_residual_are_added_before_one_rounding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lavintk_lora.fused, "fused", lambda name, *tensors: True)
    let_multiply_wide(monkeypatch)
    layer, x = trained(DenseLinear(torch.randn(24, 64).bfloat16(), torch.randn(24)), 4), torch.randn(50, 64).bfloat16()
    for parameter in (layer.down, layer.up):
        parameter.data.copy_(parameter.detach().bfloat16())
    residual = torch.randn(50, 24).bfloat16()
    exact = [y.detach().double() for y in by_the_formula([layer], x.float())]
    for found, wanted in (
        (forward_group([layer], x)[0], exact[0]),
        (forward_onto(layer, x, residual), exact[0] + residual.double()),
    ):
        assert found.dtype == torch.bfloat16
        # the inner values are rounded too
        torch.testing.assert_close(found.double(), wanted, rtol=2**-8, atol=2**-7)


@pytest.fixture(params=["in steps", "fused"])
def updates_in_swiglu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Whether the updates of gate and up are left to SwiGLU, as on a GPU; notes the shapes of those that are."""
    noted: list[tuple[int, ...]] = []

    def note(gate: Tensor, up: Tensor, gate_update: LowRank, up_update: LowRank) -> Tensor:
        noted.append((*gate_update.up.shape, *up_update.up.shape))
        return plain.swiglu_low_rank(gate, up, gate_update, up_update)

    if request.param == "fused":
        monkeypatch.setattr(lavintk_lora.fused, "fused", lambda name, *tensors: True)
        let_multiply_wide(monkeypatch)
    monkeypatch.setattr(lavintk_lora.fused, "swiglu_low_rank", note)
    return noted


def gated(layers: Sequence[LoraLinear], x: Tensor) -> list[Tensor]:
    return [forward_gated(layers[0], layers[1], x)]


def gated_by_the_formula(layers: Sequence[LoraLinear], x: Tensor) -> list[Tensor]:
    gate, up = by_the_formula(layers, x)
    return [F.silu(gate) * up]


@pytest.mark.parametrize("frozen_input", [False, True])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.usefixtures("updates_in_swiglu")
def test_a_gated_pair_has_the_outputs_and_gradients_of_the_formula(base: str, frozen_input: bool) -> None:
    layers, x = two_on(BASES[base]), torch.randn(2, 7, 64, requires_grad=not frozen_input)
    actual, expected = (outputs_and_gradients(function, layers, x) for function in (gated, gated_by_the_formula))
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs) < 1e-6


@pytest.mark.parametrize("base", BASES)
@pytest.mark.usefixtures("updates_in_swiglu")
def test_in_bf16_a_gated_pair_is_as_near_to_the_exact_one_as_the_formula_is(base: str) -> None:
    layers, x = two_on(BASES[base]), torch.randn(50, 64).bfloat16().requires_grad_()
    exact = outputs_and_gradients(gated_by_the_formula, layers, x.detach().float().requires_grad_())
    formula, actual = (outputs_and_gradients(function, layers, x) for function in (gated_by_the_formula, gated))
    for ours, theirs, wanted in zip(actual, formula, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, wanted) < 1.3 * relative_error(theirs, wanted) < 0.05


def in_training(layers: Sequence[LoraLinear], x: Tensor) -> list[Tensor]:
    """With dropout, but so little that it draws nothing."""
    for layer in layers:
        layer.train().dropout = 1e-9
    return forward_group(layers, x)


@pytest.mark.parametrize(
    ("function", "formula"),
    [(forward_group, by_the_formula), (in_training, by_the_formula), (gated, gated_by_the_formula)],
)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.usefixtures("updates_in_swiglu")
def test_updates_as_small_as_those_of_the_first_steps_are_seen_in_bf16(
    base: str, function: Products, formula: Products
) -> None:
    """The formula adds them to products that are rounded already, as PEFT does."""
    layers, x = two_on(BASES[base]), torch.randn(20_000, 64).bfloat16()
    small = [0.005 * layer.up.detach() for layer in layers]

    def change(outputs: Products, x: Tensor) -> Tensor:
        made = []
        for updated in (True, False):
            for layer, up in zip(layers, small):
                layer.up.data.copy_(up if updated else torch.zeros_like(up))
            made.append(torch.cat([y.detach().double() for y in outputs(layers, x)]))
        return made[0] - made[1]

    def seen(outputs: Products) -> float:
        """Return how much of the exact change is in that of the outputs in bf16."""
        return float((change(outputs, x) * exact).sum() / exact.square().sum())

    exact = change(formula, x.float())
    assert seen(formula) < 0.2
    assert seen(function) == pytest.approx(1, abs=0.1)


def test_the_updates_of_a_gated_pair_are_added_by_swiglus_kernel_where_there_is_one(
    updates_in_swiglu: list[tuple[int, ...]], request: pytest.FixtureRequest
) -> None:
    layers, x = two_on(BASES["dense"]), torch.randn(7, 64)
    forward_gated(layers[0], layers[1], x)
    if request.node.callspec.params["updates_in_swiglu"] == "fused":
        assert updates_in_swiglu == [(24, 4, 24, 2)]
    else:
        assert updates_in_swiglu == []


def test_a_gated_pair_with_dropout_or_hooks_is_computed_one_by_one() -> None:
    layers, x, seen = two_on(BASES["dense"]), torch.randn(7, 64), []
    layers[1].base.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(gated(layers, x), gated_by_the_formula(layers, x))
    assert seen == [1]
    layers[0].register_forward_hook(lambda layer, arguments, output: 0 * output)
    assert not gated(layers, x)[0].any()
    layers = [trained(DenseLinear(torch.zeros(6, 64)), 4, dropout=0.5).train() for _ in range(2)]
    torch.manual_seed(1)
    drawn = gated(layers, x)[0]
    torch.manual_seed(1)
    assert torch.equal(drawn, F.silu(layers[0](x)) * layers[1](x))


def batch_of(rows: Tensor) -> Batch:
    """Return a batch of rows of text, of which every token is trained."""
    count, length = rows.shape
    labels = torch.cat([rows[:, 1:], torch.full((count, 1), IGNORED)], dim=1)
    nowhere, conditions = torch.zeros(0, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
    names = tuple(str(i) for i in range(count))
    positions = torch.arange(length).repeat(count)
    return Batch(rows.flatten(), labels.flatten(), positions, (length,) * count, conditions, None, nowhere, names)


@pytest.mark.usefixtures("updates_in_swiglu")
def test_a_decoder_layer_is_recomputed_up_to_its_last_product_and_has_the_gradients_of_the_formula(
    llama: LlamaForCausalLM,
) -> None:
    model = multimodal(llama)
    replace_norms(model.language)
    adapter = attached(model, r=3)
    bases: dict[str, Counting] = {name: Counting(layer.base.dequantize()) for name, layer in adapter.layers.items()}
    for name, layer in adapter.layers.items():
        layer.base = bases[name]
    parameters = dict(adapter.named_parameters())
    gradients = []
    for model.checkpointing in (False, True):
        loss = model.loss_sum(batch_of(TOKENS))
        gradients.append(torch.autograd.grad(loss, list(parameters.values())))
    products = {name: base.products for name, base in bases.items()}
    # once without checkpointing; with it twice, but for the last product of a layer
    assert products == {name: 2 if name.endswith("down_proj") else 3 for name in bases}
    torch.testing.assert_close(*gradients)
    theirs = model.language(input_ids=TOKENS, labels=TOKENS).loss * TOKENS[:, 1:].numel()
    for ours, expected in zip(gradients[0], torch.autograd.grad(theirs, list(parameters.values()))):
        assert relative_error(ours, expected) < 1e-4


def interpret() -> None:
    """Print how far gradients by the kernels are from those by torch, and the nodes of the kernels' graph, as JSON."""
    for module in (functions, lavintk_lora.fused):
        setattr(module, "fused", lambda name, *tensors: choice.enabled(name))  # noqa: B010
    model = multimodal(make_llama())
    replace_norms(model.language)
    parameters = list(dict(attached(model, r=3).named_parameters()).values())
    gradients, nodes = [], set[Any]()
    for kernels, model.checkpointing in (("none", False), ("all", False), ("all", True)):
        with using(kernels):
            loss = model.loss_sum(batch_of(TOKENS))
            waiting = [loss.grad_fn] if kernels == "all" else []
            while waiting:
                if (node := waiting.pop()) is not None and node not in nodes:
                    nodes.add(node)
                    waiting += [following for following, _ in node.next_functions]
            gradients.append(torch.autograd.grad(loss, parameters))
    errors = [max(map(relative_error, found, gradients[0])) for found in gradients[1:]]
    print(json.dumps({"errors": errors, "nodes": sorted({node.name() for node in nodes})}))


@pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed")
def test_decoder_layers_of_interpreted_kernels_have_the_gradients_of_torchs_operations() -> None:
    command = [sys.executable, "-c", "from tests.test_lora import interpret; interpret()"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert max(report["errors"]) < 1e-4
    assert {"_RMSNormAndPassBackward", "_SwiGLULowRankBackward", "_OuterBackward"} <= set(report["nodes"])


def test_layers_of_which_some_have_no_adapter_are_computed_one_by_one() -> None:
    adapted, plain = group_on(BASES["dense"])[0], DenseLinear(torch.randn(6, 64))
    x = torch.randn(5, 64)
    outputs = forward_group([adapted, plain, adapted], x)
    torch.testing.assert_close(outputs, [*by_the_formula([adapted], x), F.linear(x, plain.weight), outputs[0]])


def test_with_dropout_each_layer_of_a_group_draws_a_mask_of_its_own() -> None:
    layers = [trained(DenseLinear(torch.zeros(6, 64)), 4, dropout=0.5).train() for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(5, 64)
    torch.manual_seed(1)
    drawn = forward_group(layers, x)
    torch.manual_seed(1)
    expected = []
    for layer in layers:
        expected.append(layer.scale * F.dropout(x, 0.5) @ layer.down.t() @ layer.up.t())
    torch.testing.assert_close(drawn, expected)
    assert not torch.equal(*drawn)
    for layer in layers:
        layer.eval()
    torch.testing.assert_close(forward_group(layers, x), by_the_formula(layers, x))


def test_a_hook_on_a_frozen_layer_sees_its_input_and_may_change_its_output() -> None:
    layers, x, seen = group_on(BASES["dense"]), torch.randn(5, 64), []
    plain = forward_group(layers, x)

    def hook(layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(arguments[0])
        return output + 1

    handle = layers[1].base.register_forward_hook(hook)
    hooked = forward_group(layers, x)
    assert [tensor is x for tensor in seen] == [True]
    torch.testing.assert_close(hooked, [plain[0], plain[1] + 1, plain[2]])
    handle.remove()
    assert torch.equal(forward_group(layers, x)[1], plain[1])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("function", "formula", "limit"),
    [
        (forward_group, by_the_formula, 0.01),
        (onto, onto_by_the_formula, 0.05),  # in bf16 the formula itself is 0.03 away
        (gated, gated_by_the_formula, 0.05),
    ],
)
@pytest.mark.parametrize("base", ["dense", "nf4", "int4"])
# as in test_bnb_quantizers: the leaves are warmed up on a side stream
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
def test_a_cuda_graph_replays_layers_with_their_gradients(
    base: str, function: Products, formula: Products, limit: float
) -> None:
    layers = [layer.cuda() for layer in (group_on if function is forward_group else two_on)(BASES[base])]
    x = torch.randn(48, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    leaves = [x, *(p for layer in layers for p in layer.parameters())]

    def step() -> list[Tensor]:
        outputs = function(layers, x)
        return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for leaf in leaves:  # small: bf16 knows the sine of a large number badly
            leaf.copy_(torch.randn_like(leaf) / 4)
    graph.replay()
    wide = x.detach().float().requires_grad_()
    outputs = formula(layers, wide)
    gradients = torch.autograd.grad(outputs, [wide, *leaves[1:]], [torch.ones_like(y) for y in outputs])
    for ours, theirs in zip(captured, [*outputs, *gradients]):
        assert relative_error(ours, theirs) < limit

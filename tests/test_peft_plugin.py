"""PEFT's methods on frozen layers, compared with PEFT on transformers' own model."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lavintk
import lavintk_peft
from lavintk.errors import CheckpointError, ModelError, OptionsError, PluginError
from lavintk.layers import DenseLinear, FrozenLinear
from lavintk.merge import merged
from lavintk.models.multimodal import MultimodalModel
from lavintk.plugins import load_plugins
from lavintk.registry import Choice, Entry, Registry
from lavintk.testing import TinyModel, check_adapter, check_exporter
from lavintk_bnb.quantizers import FourBitQuantizer
from lavintk_peft.adapter import PeftAdapter
from lavintk_peft.methods import METHODS
from lavintk_peft.view import LinearView, OnDemandWeight

# PEFT asks transformers for an attribute that transformers has renamed
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # BOFT looks for a compiler where PEFT itself makes the layer
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1"),
    # the projection is given again by its key
    pytest.mark.filterwarnings("ignore:Specified to not save"),
]

TOKENS = torch.arange(1, 13).reshape(2, 6)
SMALL = {
    "boft": "settings=boft_block_size:8",
    "c3a": "settings=block_size:16",
    "fourierft": "settings=n_frequency:64",
    "oft": "settings=oft_block_size:8",
    "randlora": "r=4,settings=randlora_alpha:4",
    "road": "settings=group_size:8",
    "waveft": "settings=n_frequency:64",
}
"""What fits layers of 32 and 64 features, where r=4 does not say it."""
TARGETS = "q_proj+down_proj"


def registry() -> Registry[Any]:
    adapters: Registry[Any] = Registry("adapter")
    lavintk_peft.lavintk_register_adapters(adapters.owned_by("peft"))
    return adapters


def entry() -> Entry[Any]:
    return registry()["peft"]


def made(method: str, targets: str = TARGETS, more: str = "") -> PeftAdapter:
    size = SMALL.get(method, "r=4" if METHODS[method].ranked else "")
    text = ",".join(filter(None, (f"peft:method={method},targets={targets}", more or size)))
    return cast(PeftAdapter, registry().create(Choice.parse(text)))


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, attention_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):  # zero at the start
            parameter.data.normal_(0, 0.1)
    return cast(LlamaForCausalLM, model.eval())


def multimodal(language: nn.Module, quantizer: Any = None) -> MultimodalModel:
    """Return a model around a copy of ``language`` whose linear layers are frozen ones."""
    language = copy.deepcopy(language)
    for name, linear in list(language.named_modules()):
        if isinstance(linear, nn.Linear):
            bias = None if linear.bias is None else linear.bias.detach()
            weight = linear.weight.detach()
            frozen = DenseLinear(weight, bias) if quantizer is None else quantizer.quantize(weight, bias)
            parent, _, leaf = name.rpartition(".")
            setattr(language.get_submodule(parent), leaf, frozen)
    return MultimodalModel(language).eval()


def attached(model: MultimodalModel, adapter: PeftAdapter, seed: int = 1) -> PeftAdapter:
    """Attach ``adapter`` and move its parameters, as training does."""
    model.attach(adapter)
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in adapter.named_parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return adapter


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return cast(Tensor, model(input_ids=TOKENS).logits)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_keeps_the_promises_of_adapters(method: str) -> None:
    report = check_adapter(lambda: made(method, "language.*.1.mlp.down_proj+language.*.1.*.q_proj"), vision=False)
    assert len(report.kept) > 10
    assert [reason for reason in report.skipped if "DoRA" not in reason] == []


@pytest.mark.parametrize("method", ["oft", "vera"])
def test_a_method_keeps_them_on_both_towers(method: str) -> None:
    check_adapter(lambda: made(method, "q_proj+vision.*.1.*.q_proj"))


@pytest.mark.parametrize("method", METHODS)
def test_peft_reads_the_folder_and_gives_the_same_logits(
    llama: LlamaForCausalLM, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # PEFT would look for a compiler through setuptools, which fails where distutils was imported before
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)
    model = multimodal(llama)
    attached(model, made(method)).save(tmp_path, "some/base")
    before = logits(llama)
    loaded = PeftModel.from_pretrained(llama, tmp_path)
    difference, moved = (logits(loaded) - logits(model.language)).norm(), (logits(loaded) - before).norm()
    assert difference < 5e-3 * moved
    assert loaded.peft_config["default"].base_model_name_or_path == "some/base"


@pytest.mark.parametrize("method", ["dora", "oft", "vera", "lokr"])
def test_the_gradients_are_those_of_peft(llama: LlamaForCausalLM, method: str, tmp_path: Path) -> None:
    model = multimodal(llama)
    adapter = attached(model, made(method))
    adapter.save(tmp_path, "base")
    theirs = PeftModel.from_pretrained(llama, tmp_path, is_trainable=True)
    for network in (model.language, theirs):
        network(input_ids=TOKENS, labels=TOKENS).loss.backward()
    gradients = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    for name, parameter in adapter.named_parameters():
        expected = gradients.pop("base_model.model." + name.removeprefix("language."))
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-6)
    assert not gradients


def test_what_peft_wrote_gives_its_logits_here(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=16, use_dora=True, target_modules=["q_proj", "down_proj"])
    theirs = get_peft_model(copy.deepcopy(llama), config)
    for _, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    theirs.save_pretrained(str(tmp_path))
    model = multimodal(llama)
    adapter = made("dora", more="r=4,settings=lora_alpha:16")
    model.attach(adapter)
    adapter.load(tmp_path)
    torch.testing.assert_close(logits(model.language), logits(theirs), rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_on_a_4_bit_base_it_starts_and_merges_by_the_stored_weight(llama: LlamaForCausalLM, method: str) -> None:
    quantizer = FourBitQuantizer("nf4", 64, True)
    model, plain = multimodal(llama, quantizer), multimodal(llama, quantizer)
    adapter = made(method)
    model.attach(adapter)
    torch.testing.assert_close(logits(model.language), logits(plain.language), rtol=0, atol=1e-4)
    adapter = attached(model := multimodal(llama, quantizer), made(method))
    for update in adapter.affine_updates():
        base = plain.linears()[update.linear]
        plain.replace(update.linear, DenseLinear(*merged(base.dequantize(), base.bias, [update])))
    torch.testing.assert_close(logits(model.language), logits(plain.language), rtol=0, atol=2e-4)


@pytest.mark.parametrize(("method", "rank"), [("lora", 4), ("rslora", 4), ("vera", 4), ("loha", 16), ("dora", 64)])
def test_the_update_has_low_rank_where_the_method_has(llama: LlamaForCausalLM, method: str, rank: int) -> None:
    adapter = attached(multimodal(llama), made(method))
    assert {update.down.shape[0] for update in adapter.affine_updates()} == {rank}


@pytest.mark.parametrize("method", METHODS)
def test_it_can_be_outlined_without_values(llama: LlamaForCausalLM, method: str) -> None:
    model = multimodal(llama).to("meta")
    adapter = made(method)
    model.attach(adapter)
    assert {parameter.device.type for _, parameter in adapter.named_parameters()} == {"meta"}


def test_a_weight_costs_nothing_until_something_computes_with_it() -> None:
    reads = 0

    class Counted(DenseLinear):
        def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
            nonlocal reads
            reads += 1
            return super().dequantize(dtype)

    layer: FrozenLinear = Counted(torch.randn(3, 5))
    weight = LinearView(layer).weight
    assert isinstance(weight.data, OnDemandWeight)
    assert (tuple(weight.shape), weight.dtype, weight.device.type, reads) == ((3, 5), torch.float32, "cpu", 0)
    scale = torch.ones(3, 1, requires_grad=True)
    (weight * scale).sum().backward()
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad, layer.dequantize().sum(1, keepdim=True))
    assert reads == 3  # forward, backward, and the line above: no values were kept in between


def test_settings_that_give_another_function_are_refused(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    attached(multimodal(llama), made("dora")).save(tmp_path, "base")
    other = made("lora", more="r=4,settings=lora_alpha:16")
    multimodal(llama).attach(other)
    with pytest.raises(CheckpointError) as caught:
        other.load(tmp_path)
    assert "adapter_config.json has use_dora=True, the model's adapter has False" in caught.value.faults
    assert "adapter_config.json has lora_alpha=8, the model's adapter has 16" in caught.value.faults
    assert any("lora_magnitude_vector in adapter_model.safetensors is unexpected" in f for f in caught.value.faults)


def test_the_vision_towers_part_is_a_folder_of_its_own(tmp_path: Path) -> None:
    from lavintk.testing.models import tiny_model

    attached(tiny_model(True), made("oft", "v_proj+vision.*.1.*.q_proj")).save(tmp_path, "base")
    config = json.loads((tmp_path / "vision/adapter_config.json").read_text())
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("OFT", None)
    assert all("v_proj" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    assert all("q_proj" in key for key in load_file(tmp_path / "vision/adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "dor"}, "no method 'dor'.*Did you mean 'dora'"),
        ({"method": "ia3", "r": "4"}, "method 'ia3' has no rank"),
        ({"r": "0"}, "r must be at least 1"),
        ({"settings": "alpha:3"}, "unknown alpha; known: lora_alpha"),
        ({"settings": {"bias": "all"}}, "unknown bias"),
        ({"settings": "lora_alpha=3"}, "expected NAME:VALUE"),
        ({"settings": "init_lora_weights:pissa"}, "would change the base"),
        ({"method": "oft", "settings": "oft_block_size:0"}, "PEFT says: .*oft_block_size"),
    ],
)
def test_options_that_do_not_fit_are_told_before_a_model_is_loaded(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionsError, match=f"(?s){message}"):
        entry().create(options)


def test_settings_come_as_text_or_as_a_mapping() -> None:
    by_text = entry().parse_options({"settings": "lora_alpha:32+lora_dropout:0.1"})
    by_mapping = entry().parse_options({"settings": {"lora_alpha": 32, "lora_dropout": 0.1}})
    assert by_text.given() == by_mapping.given() == {"lora_alpha": 32, "lora_dropout": 0.1}


def test_a_layer_that_a_method_cannot_take_is_told(llama: LlamaForCausalLM) -> None:
    with pytest.raises(ModelError, match="PEFT cannot put method=c3a on the chosen layers"):
        multimodal(llama).attach(made("c3a", more="settings=block_size:25"))
    with pytest.raises(ModelError, match="of adapter 'peft' does not fit the model"):
        multimodal(llama).attach(made("lora", "q_porj"))


def test_without_peft_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name in ("peft", "lavintk_peft.adapter", "lavintk_peft.files")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(PluginError, match=r"adapter 'peft' \(plugin peft\) cannot be used: .*Install what is missing"):
        entry().create({})


def test_a_run_trains_goes_on_and_exports_merged(tiny_llm: TinyModel, tmp_path: Path) -> None:
    adapter = "peft:method=dora,r=4,targets=q_proj+v_proj"
    recipe = tiny_llm.recipe(quant="nf4", adapter=adapter, train={"max_steps": 2})
    run = lavintk.train(recipe, tmp_path / "run")
    saved = load_file(run.folder / "model/adapter/adapter_model.safetensors")
    assert any(bool(tensor.any()) for key, tensor in saved.items() if "lora_B" in key)
    exporters = load_plugins().exporters
    check_exporter(lambda: exporters.create(Choice("hf")), run)
    exporters.create(Choice("peft")).export(run, tmp_path / "peft")
    assert load_file(tmp_path / "peft/adapter_model.safetensors").keys() == saved.keys()
    (tmp_path / "onnx").mkdir()
    exporters.create(Choice("onnx")).export(run, tmp_path / "onnx")
    (form,) = (json.loads(path.read_text()) for path in (tmp_path / "onnx").glob("lavintk*.json"))
    assert form["adapter"]["form"] == "merge"
    assert "no less room than the weights" in form["adapter"]["reason"]


def test_the_plugin_is_imported_without_peft_and_torch() -> None:
    code = "import sys, lavintk_peft; print([name for name in ('peft', 'torch', 'yaml') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_boft_looks_for_no_compiler(llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "setuptools", None)  # whoever imports it now fails
    monkeypatch.delitem(sys.modules, "torch.utils.cpp_extension", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        multimodal(llama).attach(made("boft"))

"""Exported folders as transformers and PEFT load them, compared with the model that was trained."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from lavintk.checkpoints import save_model
from lavintk.contracts import AffineUpdate
from lavintk.data.batch import IMAGE, TEXT, Batch
from lavintk.data.records import Message, Record
from lavintk.errors import LavintkError, ModelError, NotAffineError
from lavintk.merge import merged, merged_linears
from lavintk.models.build import build
from lavintk.plugins import installed_plugins
from lavintk.recipe import make_recipe
from lavintk.registry import NoOptions
from lavintk.run import Run
from lavintk.testing.tiny import EXTRA, write_language_model, write_vision_tower
from lavintk_hf import HfOptions, make_hf, make_peft

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's
TOLERANCE: dict[str, Any] = {"rtol": 0.0, "atol": 5e-4}
"""These random models turn another order of summation (q, k and v in one product) into 3e-4 of logits up to 3."""
MODALITIES = {"text": TEXT, "image": IMAGE}
MMA = {"name": "mma", "dim": 4}


@pytest.fixture(autouse=True)
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' log to itself."""
    logger = logging.getLogger("transformers")
    before, logger.level = logger.level, logging.ERROR
    yield
    logger.level = before


def trained(folder: Path, content: dict[str, Any]) -> Run:
    """Return a run whose adapter and connector are random instead of trained."""
    recipe = make_recipe({"name": "tiny", "train": {"device": "cpu", "precision": "fp32"}, **content})
    run = Run.create(folder, recipe)
    assembly = build(recipe, installed_plugins(), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        for parameter in assembly.model.trainable().values():
            parameter.normal_(std=0.1)
    save_model(folder, assembly.model, recipe.model.language)
    run.record(base=assembly.base)
    return Run.open(folder)


def text_run(folder: Path, architecture: str = "llama", adapter: Any = "lora", **overrides: Any) -> Run:
    write_language_model(folder / "llm", architecture, **overrides)
    data = {"train": {"name": "alpaca", "path": "unused.json"}}
    return trained(folder / "run", {"model": {"language": str(folder / "llm")}, "adapter": adapter, "data": data})


def vision_run(folder: Path, connector: str, adapter: Any, tower: str = "clip", **model: Any) -> Run:
    write_language_model(folder / "llm", **model.pop("language", {}))
    write_vision_tower(folder / "vit", tower)
    section = {"language": str(folder / "llm"), "vision": str(folder / "vit"), "connector": connector, **model}
    if connector == "taps":
        section |= {"tap_every": 2, "neck": 8}
    data = {"train": {"name": "jsonl", "path": "unused.jsonl"}}
    return trained(folder / "run", {"model": section, "adapter": adapter, "data": data})


def exported(run: Run, out: Path, **options: Any) -> Path:
    make_hf(HfOptions(**{"dtype": "fp32", **options})).export(run, out)
    return out


def ids(vocabulary: int = 300) -> torch.Tensor:
    return torch.randint(5, vocabulary, (24,), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def own_logits(run: Run, tokens: torch.Tensor, condition: int = TEXT) -> torch.Tensor:
    """Return ``[tokens, vocabulary]`` of the trained model, adapter attached."""
    model = run.assembly.model
    rows = torch.tensor([condition])
    positions = torch.arange(len(tokens))
    batch = Batch(
        input_ids=tokens, labels=torch.full_like(tokens, -100), positions=positions, lengths=(len(tokens),),
        conditions=rows, visual_slots=torch.zeros(0, dtype=torch.int64), pixel_values=None, record_ids=("r",),
    )  # fmt: skip
    return model.logits(model.hidden(batch))


@torch.no_grad()
def loaded_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Return ``[tokens, vocabulary]`` of what transformers loads; all of the file is used and nothing is missing."""
    loaded: Any = AutoModelForCausalLM
    model, report = loaded.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    result: torch.Tensor = model.eval()(tokens[None]).logits[0].float()
    return result


# Folding


def test_a_folded_layer_gives_what_layer_and_updates_give() -> None:
    weight, bias, x = torch.randn(6, 5), torch.randn(6), torch.randn(3, 5)
    updates = [
        AffineUpdate("l", "all", torch.randn(2, 5), torch.randn(6, 2), torch.randn(6)),
        AffineUpdate("l", "all", torch.randn(1, 5), torch.randn(6, 1)),
    ]
    expected = x @ weight.T + bias
    for update in updates:
        expected = expected + x @ update.down.T @ update.up.T + (0 if update.bias is None else update.bias)
    before = weight.clone()
    folded, added = merged(weight, bias, updates)
    torch.testing.assert_close(torch.nn.functional.linear(x, folded, added), expected)
    assert torch.equal(weight, before)
    assert merged(weight, None, [])[1] is None


def test_merged_linears_come_by_transformers_names_and_in_order(tmp_path: Path) -> None:
    run = text_run(tmp_path, adapter={"name": "lora", "r": 2, "targets": "q_proj"})
    model = run.load("cpu").assembly.model
    layers = list(merged_linears(model, "all"))
    assert [layer.name for layer in layers[:2]] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
    ]
    assert model.adapter is not None
    update = next(iter(model.adapter.affine_updates()))
    base = model.linears()[update.linear].dequantize()
    torch.testing.assert_close(layers[0].weight, base + update.up @ update.down)
    assert torch.equal(layers[1].weight, model.linears()["language.model.layers.0.self_attn.k_proj"].dequantize())


# hf, text


@pytest.mark.parametrize("architecture", list(EXTRA))
@pytest.mark.parametrize("tied", [False, True])
def test_lora_folds_into_each_architecture(architecture: str, tied: bool, tmp_path: Path) -> None:
    run = text_run(tmp_path, architecture, {"name": "lora", "r": 4}, tie_word_embeddings=tied)
    folder = exported(run, tmp_path / "out")
    torch.testing.assert_close(loaded_logits(folder, ids()), own_logits(run, ids()), **TOLERANCE)
    assert json.loads((folder / "config.json").read_text())["architectures"][0].endswith("ForCausalLM")


@pytest.mark.parametrize("condition", ["text", "image"])
@pytest.mark.parametrize("visual", ["none", "affine"])
def test_lavin_folds_for_each_modality(condition: str, visual: str, tmp_path: Path) -> None:
    run = vision_run(tmp_path, "taps", {**MMA, "visual": visual, "placement": "block"})
    folder = exported(run, tmp_path / "out", condition=condition)
    own = own_logits(run, ids(), MODALITIES[condition])
    torch.testing.assert_close(loaded_logits(folder, ids()), own, **TOLERANCE)
    other = own_logits(run, ids(), 1 - MODALITIES[condition])
    assert (own - other).abs().max() > 0.01  # the modalities do differ
    assert f"Modality: {condition}" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("architecture", "placement", "settings"),
    [
        ("llama", "attn", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", "attn", {}),
        ("qwen3", "attn", {}),
        ("smollm3", "block", {}),
        ("mistral", "block", {"sliding_window": None}),
    ],
)
def test_biases_of_the_fold_join_those_of_the_model(
    architecture: str, placement: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    run = text_run(tmp_path, architecture, {**MMA, "placement": placement}, **settings)
    folder = exported(run, tmp_path / "out")
    torch.testing.assert_close(loaded_logits(folder, ids()), own_logits(run, ids()), **TOLERANCE)


@pytest.mark.parametrize(
    ("architecture", "advice"), [("mistral", "--adapter lora"), ("qwen2", "--adapter mma:placement=attn")]
)
def test_an_architecture_without_biases_says_what_to_train_instead(
    architecture: str, advice: str, tmp_path: Path
) -> None:
    run = text_run(tmp_path, architecture, {**MMA, "placement": "block" if architecture == "qwen2" else "attn"})
    with pytest.raises(ModelError, match=f"'{architecture}' models have none there.*{advice}"):
        exported(run, tmp_path / "out")


def test_a_text_model_comes_out_of_a_run_whose_visual_adapters_do_not_fold(tmp_path: Path) -> None:
    run = vision_run(tmp_path, "patches", {**MMA, "visual": "router"})
    folder = exported(run, tmp_path / "out", condition="text")
    torch.testing.assert_close(loaded_logits(folder, ids()), own_logits(run, ids()), **TOLERANCE)
    with pytest.raises(NotAffineError, match="visual=affine"):
        exported(run, tmp_path / "other")


def test_large_models_come_in_shards_with_an_index(tmp_path: Path) -> None:
    run = text_run(tmp_path)
    folder = exported(run, tmp_path / "out", shard_gb=1e-4)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    assert files == {path.name for path in folder.glob("*.safetensors")}
    torch.testing.assert_close(loaded_logits(folder, ids()), own_logits(run, ids()), **TOLERANCE)


@pytest.mark.parametrize(("dtype", "stored"), [("auto", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_the_type_of_the_weights_is_the_bases_or_what_is_asked_for(dtype: Any, stored: str, tmp_path: Path) -> None:
    run = text_run(tmp_path)
    folder = exported(run, tmp_path / "out", dtype=dtype)
    assert json.loads((folder / "config.json").read_text())["dtype"] == stored
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert model.model.embed_tokens.weight.dtype == getattr(torch, stored)
    torch.testing.assert_close(loaded_logits(folder, ids()), own_logits(run, ids()), rtol=0, atol=0.1)


def test_values_beyond_fp16_are_refused(tmp_path: Path) -> None:
    run = text_run(tmp_path)
    weights = run.load("cpu").assembly.model.adapter
    assert weights is not None
    with torch.no_grad():
        for _, parameter in weights.named_parameters():
            parameter.fill_(300.0)
    weights.save(run.folder / "model" / "adapter", "base")
    with pytest.raises(ModelError, match="dtype=bf16"):
        exported(run, tmp_path / "out", dtype="fp16")


@pytest.mark.parametrize("template", ["chat", "plain"])
@pytest.mark.parametrize("system", [None, 'Say "yes" or é.\nNo more.'])
def test_the_exported_chat_template_gives_the_tokens_that_were_trained_on(
    template: str, system: str | None, tmp_path: Path
) -> None:
    write_language_model(tmp_path / "llm")
    data = {"train": {"name": "alpaca", "path": "unused.json"}, "template": template, "system": system}
    run = trained(tmp_path / "run", {"model": {"language": str(tmp_path / "llm")}, "data": data})
    tokenizer: Any = AutoTokenizer.from_pretrained(exported(run, tmp_path / "out"))
    messages = [{"role": "user", "content": "what color?"}, {"role": "assistant", "content": "red"}]
    messages.append({"role": "user", "content": "is it?"})
    found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    record = Record("r", tuple(Message(m["role"], m["content"]) for m in messages))  # type: ignore[arg-type]
    assert found == run.assembly.template.prompt_ids(record)


def test_generation_stops_where_answers_ended_in_training(tmp_path: Path) -> None:
    run = text_run(tmp_path)
    folder = exported(run, tmp_path / "out")
    content = json.loads((folder / "generation_config.json").read_text())
    assert content["eos_token_id"] == list(run.assembly.template.stop_ids)
    assert loaded_stop_ids(folder) == list(run.assembly.template.stop_ids)


def loaded_stop_ids(folder: Path) -> list[int]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    found: list[int] = model.generation_config.eos_token_id
    return found


@pytest.mark.parametrize("differs", [False, True])
def test_where_lavins_prompt_differs_in_its_tokens_the_page_says_so(differs: bool, tmp_path: Path) -> None:
    write_language_model(tmp_path / "llm")
    if differs:
        join_in_tokenizer(tmp_path / "llm" / "tokenizer.json", "A", "I")
    data = {"train": {"name": "alpaca", "path": "unused.json"}, "template": "lavin"}
    run = trained(tmp_path / "run", {"model": {"language": str(tmp_path / "llm")}, "data": data})
    folder = exported(run, tmp_path / "out")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "what color?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "Image: N/AInstruction: what color?\nResponse:"
    assert ("separately" in (folder / "README.md").read_text()) is differs


def join_in_tokenizer(file: Path, first: str, second: str) -> None:
    """Add a merge of two tokens."""
    content = json.loads(file.read_text())
    content["model"]["vocab"][first + second] = len(content["model"]["vocab"])
    content["model"]["merges"].insert(0, [first, second])
    file.write_text(json.dumps(content))


# hf, vision


@torch.no_grad()
def own_image_logits(run: Run, record: Record) -> tuple[list[int], torch.Tensor]:
    """Return the prompt's ids and the logits ``[tokens, vocabulary]`` of the trained model for a record with image."""
    assembly = run.assembly
    row = assembly.template.prompt(record)
    assert assembly.images is not None
    tokens = torch.tensor(row.input_ids)
    batch = Batch(
        input_ids=tokens, labels=torch.full_like(tokens, -100), positions=torch.arange(len(tokens)),
        lengths=(len(tokens),), conditions=torch.tensor([IMAGE]), visual_slots=torch.tensor(row.visual_slots),
        pixel_values=torch.stack([assembly.images(source) for source in record.images]),
        record_ids=(record.id,),
    )  # fmt: skip
    return row.input_ids, assembly.model.logits(assembly.model.hidden(batch))


def picture(folder: Path, size: tuple[int, int] = (28, 28)) -> Path:
    image = Image.effect_noise(size, 80).convert("RGB")
    image.save(folder / "picture.png")
    return folder / "picture.png"


@pytest.mark.parametrize(
    ("adapter", "tower", "layer", "language"),
    [
        (MMA, "clip", -2, {}),
        ({"name": "lora", "r": 2, "targets": "all,vision.*.q_proj"}, "clip", -1, {"tie_word_embeddings": True}),
        ({"name": "lora", "r": 2}, "siglip", -2, {"architecture": "qwen2"}),
        ({"name": "lora", "r": 2}, "siglip", -1, {}),
    ],
)
def test_patches_become_a_llava_with_the_same_logits(
    adapter: Any, tower: str, layer: int, language: dict[str, Any], tmp_path: Path
) -> None:
    run = vision_run(tmp_path, "patches", adapter, tower, patch_layer=layer, language=language)
    folder = exported(run, tmp_path / "out")
    processor: Any = AutoProcessor.from_pretrained(folder)
    path, question = picture(tmp_path), "what color is the shape?"
    parts = [{"type": "image", "path": str(path)}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_tensors="pt",
        return_dict=True,
    )  # fmt: skip
    loader: Any = LlavaForConditionalGeneration
    model, report = loader.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        found = model.eval()(**inputs).logits[0]
    row, own = own_image_logits(run, Record("r", (Message("user", question),), (path,)))
    assert inputs["input_ids"].shape[1] == len(row)
    torch.testing.assert_close(found[:, : own.shape[1]], own, **TOLERANCE)


def test_the_image_token_is_never_sampled(tmp_path: Path) -> None:
    folder = exported(vision_run(tmp_path, "patches", MMA), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder)
    assert model.generation_config.suppress_tokens == [config["image_token_index"]]
    assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<image>") == config["image_token_index"]
    assert model.get_input_embeddings().weight.shape[0] > config["image_token_index"]


def test_lavins_tower_and_neck_lie_beside_the_text_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = vision_run(tmp_path, "taps", {**MMA, "visual": "affine"})
    folder = exported(run, tmp_path / "out", condition="image")
    assert "left out of what transformers loads: images; vision tower and neck lie beside" in capsys.readouterr().out
    loader: Any = AutoModel
    tower, report = loader.from_pretrained(folder / "vision", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    pixels = torch.randn(2, 3, 28, 28)
    vision = run.assembly.model.vision
    assert vision is not None
    with torch.no_grad():
        states = tower.eval()(pixels, output_hidden_states=True).hidden_states
        own = vision(pixels)
    found = torch.stack([states[2][:, 0], states[4][:, 0]], dim=1)
    torch.testing.assert_close(found, own, **TOLERANCE)
    assert (folder / "connector.safetensors").is_file()
    assert "has no architecture" in (folder / "README.md").read_text()
    processor: Any = AutoProcessor.from_pretrained(folder / "vision")
    path = picture(tmp_path)
    assert run.assembly.images is not None
    pixel = processor(images=Image.open(path), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(pixel, run.assembly.images(path), rtol=0, atol=1e-5)


def test_an_image_model_needs_a_tower(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no vision tower"):
        exported(text_run(tmp_path), tmp_path / "out", condition="image")


# peft


TWO_PATHS = """
import torch
from torch import nn

from lavintk import hookimpl
from lavintk.contracts import AffineUpdate


class TwoPaths(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.zeros(2, base.in_features))
        self.up = nn.Parameter(torch.zeros(2, base.out_features))

    def updates(self, name):
        for down, up in zip(self.down, self.up):
            yield AffineUpdate(name, "all", down.detach()[None], up.detach()[:, None])

    def forward(self, x):
        return self.base(x) + (x @ self.down.T) @ self.up


class Adapter:
    conditions = ("all",)

    def attach(self, model):
        self.layers = {}
        for name, linear in model.linears().items():
            if name.endswith(("q_proj", "layers.1.mlp.down_proj")):
                self.layers[name] = TwoPaths(linear)
                model.replace(name, self.layers[name])

    def named_parameters(self):
        for name, layer in self.layers.items():
            yield f"{name}.down", layer.down
            yield f"{name}.up", layer.up

    def side_tokens(self):
        return None

    def save(self, folder, base):
        folder.mkdir(parents=True)
        torch.save(dict(self.named_parameters()), folder / "adapter.pt")

    def load(self, folder):
        stored = torch.load(folder / "adapter.pt")
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(stored[name])

    def affine_updates(self, prefix=""):
        for name, layer in self.layers.items():
            updates = list(layer.updates(name)) if name.startswith(prefix) else []
            yield from updates
            if name.endswith("layers.1.self_attn.q_proj"):  # another rank, the same function
                yield AffineUpdate(name, "all", torch.zeros(1, 64), torch.zeros(64, 1))


@hookimpl
def lavintk_register_adapters(registry):
    registry.add("twice", lambda options: Adapter())
"""


def peft_logits(base: Path, folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    loader: Any = AutoModelForCausalLM
    model: Any = PeftModel.from_pretrained(loader.from_pretrained(base), str(folder))
    with torch.no_grad():
        result: torch.Tensor = model.eval()(tokens[None]).logits[0]
    return result


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_lora_with_the_same_logits(rslora: bool, tmp_path: Path) -> None:
    run = text_run(tmp_path, adapter={"name": "lora", "r": 4, "rslora": rslora})
    make_peft(NoOptions()).export(run, tmp_path / "out")
    found = peft_logits(tmp_path / "llm", tmp_path / "out", ids())
    torch.testing.assert_close(found, own_logits(run, ids()), **TOLERANCE)
    assert (tmp_path / "out" / "README.md").is_file()


def test_an_adapter_that_is_lora_in_another_form_is_written_as_lora(
    install_plugin: Callable[..., Path], tmp_path: Path
) -> None:
    install_plugin("twice", TWO_PATHS)
    installed_plugins.cache_clear()
    run = text_run(tmp_path, adapter="twice")
    make_peft(NoOptions()).export(run, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 2)
    found = peft_logits(tmp_path / "llm", tmp_path / "out", ids())
    torch.testing.assert_close(found, own_logits(run, ids()), **TOLERANCE)


def test_lavin_is_no_lora_and_the_error_says_what_to_use(tmp_path: Path) -> None:
    run = text_run(tmp_path, adapter=MMA)
    with pytest.raises(ModelError, match=r"text and image.*--format hf"):
        make_peft(NoOptions()).export(run, tmp_path / "out")


def test_lora_in_the_vision_tower_has_no_place_in_peft(tmp_path: Path) -> None:
    run = vision_run(tmp_path, "patches", {"name": "lora", "r": 2, "targets": "all,vision.*.q_proj"})
    with pytest.raises(ModelError, match=r"vision_adapter.safetensors.*--format hf"):
        make_peft(NoOptions()).export(run, tmp_path / "out")


def test_a_run_without_trained_weights_is_refused(tmp_path: Path) -> None:
    run = text_run(tmp_path)
    for file in sorted((run.folder / "model").rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    (run.folder / "model").rmdir()
    for make in (make_peft(NoOptions()), make_hf(HfOptions())):
        with pytest.raises(LavintkError, match="no trained weights"):
            make.export(run, tmp_path / "out")

"""LaVIN's adapters: size, start, routing, fold."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from lavintk.data.batch import Batch
from lavintk.data.pack import Pack, PackShape
from lavintk.dense import DenseQuantizer
from lavintk.errors import CheckpointError, NotAffineError
from lavintk.layers import DenseLinear
from lavintk.models.attention import IMPLEMENTATION
from lavintk.models.connector import TapNeck
from lavintk.models.multimodal import MultimodalModel, count_parameters
from lavintk.models.vision import VisionTower
from lavintk_mma import MixtureOptions
from lavintk_mma.adapter import MixtureOfModalityAdapter
from lavintk_mma.original import load_original


def freeze_linears(model: torch.nn.Module, stack: torch.nn.Module) -> None:
    for module in list(stack.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear):
                bias = None if child.bias is None else child.bias.data
                setattr(module, name, DenseLinear(child.weight.data, bias))


def make_model(
    options: MixtureOptions, *, width: int = 32, layers: int = 2, heads: int = 4, vision: bool = True, seed: int = 0
) -> MultimodalModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads // 2, vocab_size=50, tie_word_embeddings=False,
    )  # fmt: skip
    config._attn_implementation = IMPLEMENTATION
    language = LlamaForCausalLM(config)
    freeze_linears(language, language.model.layers)
    tower = neck = None
    if vision:
        clip = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=4,
                num_attention_heads=2,
                image_size=28,
                patch_size=14,
            )
        )
        freeze_linears(clip, clip.encoder)
        tower, neck = VisionTower(clip, 2), TapNeck(16, 8, width)
    model = MultimodalModel(language, tower, neck)
    model.attach(MixtureOfModalityAdapter(options))
    return model


def make_batch(model: MultimodalModel, seed: int = 0) -> Batch:
    """An image row of 7 tokens and a text row of 5."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (7, 5)
    ids = torch.randint(0, 50, (sum(lengths),), generator=generator)
    pixels = torch.randn(1, 3, 28, 28, generator=generator) if model.vision else None
    slots = torch.arange(1, 1 + model.visual_tokens)
    return Batch(
        ids, ids.roll(-1), torch.cat([torch.arange(n) for n in lengths]), lengths, torch.tensor([1, 0]), pixels,
        slots, ("picture", "text"),
    )  # fmt: skip


def randomize(model: MultimodalModel, seed: int = 3) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.normal_(std=0.3)


SEVEN, THIRTEEN = (4096, 32, 11008, 32), (5120, 40, 13824, 40)


@pytest.mark.parametrize(
    ("geometry", "options", "total"),
    [
        (SEVEN, MixtureOptions(visual="router"), 3_781_296),
        (THIRTEEN, MixtureOptions(visual="router"), 5_390_080),
        (SEVEN, MixtureOptions(visual="router", compat="lavin"), 3_781_296),
        (SEVEN, MixtureOptions(visual="normal", compat="lavin"), 3_609_216),
        (THIRTEEN, MixtureOptions(), 5_218_000),
        (THIRTEEN, MixtureOptions(visual="router_block"), 5_881_840),
        (SEVEN, MixtureOptions(visual="router", placement="block"), 6_403_056),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else None,
)
def test_the_trainable_parameters_are_those_published(
    geometry: tuple[int, int, int, int], options: MixtureOptions, total: int
) -> None:
    width, layers, hidden, heads = geometry
    with torch.device("meta"):
        config = LlamaConfig(
            hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=heads
        )
        clip = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
            )
        )
        model = MultimodalModel(LlamaForCausalLM(config), VisionTower(clip, 4), TapNeck(1024, 128, width))
        model.attach(MixtureOfModalityAdapter(options))
    assert model.visual_tokens == 6
    assert count_parameters(model.trainable()) == total


@pytest.mark.parametrize("visual", ["affine", "router", "router_block"])
@pytest.mark.parametrize("placement", ["attn", "block"])
def test_at_the_start_the_adapter_changes_nothing(visual: str, placement: str) -> None:
    model = make_model(MixtureOptions(visual=visual, placement=placement)).eval()  # type: ignore[arg-type]
    batch = make_batch(model)
    with torch.no_grad():
        adapted = model.hidden(batch)
        for parameter in model.adapter.parameters():  # type: ignore[union-attr]
            parameter.zero_()  # the up projections are 0 already; nothing else may matter
        assert torch.equal(adapted, model.hidden(batch))


def test_the_first_gradient_reaches_only_up_projections_and_neck() -> None:
    """LaVIN's init invariant: with B = C = 0 neither A nor the router nor the modality embedding gets a gradient."""
    model = make_model(MixtureOptions())
    model.loss_sum(make_batch(model)).backward()
    for name, parameter in model.trainable().items():
        reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert reached == (".up" in name or "connector" in name), name


def test_a_rows_output_does_not_depend_on_its_neighbours() -> None:
    model = make_model(MixtureOptions(visual="router")).eval()
    randomize(model)
    batch = make_batch(model)
    with torch.no_grad():
        together = model.hidden(batch)
        alone = model.hidden(
            Batch(
                batch.input_ids[7:],
                batch.labels[7:],
                batch.positions[7:],
                (5,),
                batch.conditions[1:],
                None,
                batch.visual_slots[:0],
                ("text",),
            )
        )
    torch.testing.assert_close(together[7:], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("placement", ["attn", "block"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pack_has_the_loss_and_the_gradients_of_its_rows(placement: str, checkpointing: bool) -> None:
    """The filling, images that are not there and the modality tokens' own segments change nothing."""
    results = []
    for packed in (False, True):
        model = make_model(MixtureOptions(visual="router", placement=placement)).eval()  # type: ignore[arg-type]
        randomize(model)
        model.checkpointing = checkpointing
        batch = make_batch(model)
        shape = PackShape.of(batch, 64, model.visual_tokens, side=2)
        assert batch.pixel_values is not None
        shape = replace(shape, images=batch.pixel_values.shape[0] + 2)
        loss = model.pack_loss_sum(Pack.of(batch, shape, side=2)) if packed else model.loss_sum(batch)
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.trainable().items()}))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("compat", ["none", "lavin"])
@pytest.mark.parametrize("placement", ["attn", "block"])
def test_a_modality_token_in_every_row_gives_the_same_numbers_as_one_for_all(placement: str, compat: str) -> None:
    """Hidden states, loss, gradients and routing tables, with recomputed layers too."""
    results = []
    for routing, checkpointing in (("shared", False), ("carried", False), ("carried", True)):
        options = MixtureOptions(visual="router", placement=placement, routing=routing, compat=compat)  # type: ignore[arg-type]
        model = make_model(options).eval()
        randomize(model)
        model.checkpointing = checkpointing
        batch = make_batch(model)
        loss = model.loss_sum(batch)
        loss.backward()
        gradients = {name: p.grad for name, p in model.trainable().items()}
        results.append((model.hidden(batch), loss, gradients, model.adapter.routing()))  # type: ignore[union-attr]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("placement", ["attn", "block"])
def test_folded_weights_give_the_same_hidden_states(seed: int, placement: str) -> None:
    """Random geometries: dropping adapter and modality token and adding the affine updates changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    heads = 2 * int(torch.randint(1, 4, (1,), generator=generator))
    dim, groups = [(8, 2), (4, 1), (6, 3), (4, 4)][seed]
    options = MixtureOptions(
        dim=dim, groups=groups, scale=0.5 + seed, temperature=1.0 + seed, placement=placement,
        routing=("shared", "carried")[seed % 2],
    )  # type: ignore[arg-type]  # fmt: skip
    geometry = {"width": 12 * heads, "layers": 1 + seed % 3, "heads": heads, "seed": seed}
    model = make_model(options, **geometry).eval()
    randomize(model, seed)
    updates = list(model.adapter.affine_updates())  # type: ignore[union-attr]
    batch = make_batch(model, seed)
    with torch.no_grad():
        expected = model.hidden(batch).split(batch.lengths)
    for index, condition in ((0, "image"), (1, "text")):
        plain = make_model(MixtureOptions(visual="none"), **geometry)
        plain.connector.load_state_dict(model.connector.state_dict())  # type: ignore[union-attr]
        for update in updates:
            if update.condition == condition or update.linear.startswith("vision."):
                linear = plain.linears()[update.linear]
                linear.weight += update.up @ update.down  # type: ignore[operator]
                linear.bias = update.bias if linear.bias is None else linear.bias + update.bias
        with torch.no_grad():
            found = plain.eval().hidden(batch).split(batch.lengths)[index]
        torch.testing.assert_close(found, expected[index], atol=1e-5, rtol=1e-5)


def test_a_visual_router_has_no_affine_form_but_leaves_the_language_model_its_own() -> None:
    adapter = make_model(MixtureOptions(visual="router_block")).adapter
    assert adapter is not None
    for prefix in ("", "vision.", "vision.model.encoder.layers.0.mlp"):
        with pytest.raises(NotAffineError, match="visual=affine"):
            list(adapter.affine_updates(prefix))
    assert {u.linear.split(".")[0] for u in adapter.affine_updates("language.")} == {"language"}


def test_updates_come_layer_by_layer_with_all_conditions_of_a_linear_layer_together() -> None:
    adapter = make_model(MixtureOptions(placement="block")).adapter
    assert adapter is not None
    fed = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    expected = [
        (f"language.model.layers.{i}.{leaf}", condition)
        for i in (0, 1)
        for leaf in fed
        for condition in adapter.conditions
    ]
    visual = [(f"vision.model.encoder.layers.{i}.{leaf}", "image") for i in range(4) for leaf in fed[:3]]
    assert [(u.linear, u.condition) for u in adapter.affine_updates()] == expected + visual
    assert [(u.linear, u.condition) for u in adapter.affine_updates("language.")] == expected
    one = [u.linear for u in adapter.affine_updates("vision.model.encoder.layers.2.")]
    assert one == [f"vision.model.encoder.layers.2.{leaf}" for leaf in fed[:3]]


def test_lavins_adapter_without_residual_is_only_for_compat_and_does_not_fold() -> None:
    with pytest.raises(ValueError, match="set compat=lavin"):
        MixtureOptions(visual="normal")
    model = make_model(MixtureOptions(visual="normal", compat="lavin"))
    with pytest.raises(NotAffineError, match="no low-rank update"):
        list(model.adapter.affine_updates())  # type: ignore[union-attr]


def test_only_compat_lets_the_first_image_of_a_batch_change_the_others() -> None:
    pictures = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(4))
    for compat, same in (("none", True), ("lavin", False)):
        model = make_model(MixtureOptions(visual="router", temperature=1.0, compat=compat)).eval()  # type: ignore[arg-type]
        randomize(model)
        with torch.no_grad():
            first, second = (model.visual_features(pictures[[i, 2]])[1] for i in (0, 1))
        assert torch.allclose(first, second, atol=1e-5) == same


def test_saved_and_loaded_the_adapter_is_the_same(tmp_path: Path) -> None:
    model, other = make_model(MixtureOptions()), make_model(MixtureOptions(), seed=9)
    randomize(model)
    model.adapter.save(tmp_path, "base")  # type: ignore[union-attr]
    other.adapter.load(tmp_path)  # type: ignore[union-attr]
    for (name, ours), theirs in zip(model.adapter.named_parameters(), other.adapter.parameters()):  # type: ignore[union-attr]
        assert torch.equal(ours, theirs), name


def test_an_adapter_of_another_geometry_is_refused_with_every_fault(tmp_path: Path) -> None:
    make_model(MixtureOptions(), layers=2).adapter.save(tmp_path, "base")  # type: ignore[union-attr]
    with pytest.raises(CheckpointError) as caught:
        make_model(MixtureOptions(dim=4), layers=3).adapter.load(tmp_path)  # type: ignore[union-attr]
    text = "\n".join(caught.value.faults)
    assert "language.2_attn.down.weight is missing" in text
    assert "has shape (8, 32), the model needs (4, 32)" in text


def test_dropout_draws_the_same_mask_in_a_recomputed_layer() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = make_model(MixtureOptions(dropout=0.5))
        randomize(model)
        model.train().checkpointing = checkpointing
        torch.manual_seed(1)
        model.loss_sum(make_batch(model)).backward()
        gradients.append({n: p.grad.clone() for n, p in model.trainable().items()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-6, rtol=1e-5, msg=name)


def test_the_quantizer_none_keeps_the_weight() -> None:
    weight = torch.randn(6, 4)
    assert torch.equal(DenseQuantizer().quantize(weight, None).dequantize(), weight)


ORIGINAL = {"down": "conv_A", "up_first": "conv_B", "up_second": "conv_D", "up": "conv_B", "router": "expert_weights"}


def original_tensors(model: MultimodalModel, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return the trained parameters as LaVIN's own code would save them."""
    tensors = {}
    for name, parameter in model.trainable().items():
        part, *rest = name.split(".")
        if part == "connector":
            theirs = f"adapter_proj.{ORIGINAL[rest[0]]}.{rest[1]}"
        elif rest[0] == "modality":
            theirs = "adapter_modality_embedding.weight"
        else:
            index, place = rest[1].split("_")
            block = "layers" if rest[0] == "language" else "backbone.visual.transformer.resblocks"
            theirs = f"{block}.{index}.adapter_{place}.{ORIGINAL[rest[2]]}.{rest[3]}"
            if rest[3] == "weight" and rest[2] != "router":
                parameter = parameter.unsqueeze(2)
        tensors[prefix + theirs] = parameter.detach().clone()
    return tensors


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    "options",
    [
        MixtureOptions(visual="router", placement="block"),
        MixtureOptions(visual="router_block"),
        MixtureOptions(visual="normal", compat="lavin"),
    ],
    ids=lambda options: options.visual,
)
def test_lavins_own_names_load(options: MixtureOptions, prefix: str) -> None:
    model, other = make_model(options), make_model(options, seed=9)
    randomize(model)
    load_original(other, original_tensors(model, prefix))
    for (name, ours), theirs in zip(model.trainable().items(), other.trainable().values()):
        assert torch.equal(ours, theirs), name


def test_of_lavins_own_names_every_fault_is_listed_and_nothing_is_changed() -> None:
    model = make_model(MixtureOptions(visual="router"))
    tensors = original_tensors(model)
    del tensors["adapter_proj.conv_B.bias"]
    tensors["module.layers.1.adapter_attn.conv_A.bias"] = torch.zeros(8)
    tensors["layers.0.adapter_mlp.conv_A.bias"] = tensors["tok_embeddings.weight"] = torch.zeros(8)
    tensors["layers.0.adapter_attn.conv_D.weight"] = torch.ones(32, 3, 1)
    before = {name: parameter.detach().clone() for name, parameter in model.trainable().items()}
    with pytest.raises(CheckpointError) as caught:
        load_original(model, tensors)
    faults = "\n".join(caught.value.faults)
    for fault in (
        "connector.up.bias is missing",
        "are the same parameter",
        "layers.0.adapter_mlp.conv_A.bias is unexpected",
        "tok_embeddings.weight is unexpected",
        "conv_D.weight has shape (32, 3, 1), the model needs (32, 4)",
    ):
        assert fault in faults
    assert all(torch.equal(before[name], parameter) for name, parameter in model.trainable().items())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_routing_tables_do_not_depend_on_the_precision_of_the_model(half: torch.dtype) -> None:
    """They are folded into weights; beside the rows, the side tokens run in the model's own type."""
    model = make_model(MixtureOptions(placement="block")).eval()
    randomize(model)
    model.language.to(half)
    adapter = model.adapter
    assert isinstance(adapter, MixtureOfModalityAdapter)
    found = adapter.routing()
    with torch.no_grad():
        model.hidden(make_batch(model))
    beside = {key: norm.table for key, norm in adapter._norms.items()}
    model.language.float()  # the same weights
    for key, table in adapter.routing().items():
        torch.testing.assert_close(found[key], table, rtol=0, atol=1e-6)
        torch.testing.assert_close(beside[key], table, rtol=0, atol=0.02)

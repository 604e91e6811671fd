"""LaVIN's adapters: size, start, routing, fold."""

from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from lavintk.data.batch import Batch
from lavintk.dense import DenseQuantizer
from lavintk.errors import CheckpointError, NotAffineError
from lavintk.layers import DenseLinear
from lavintk.models.attention import IMPLEMENTATION
from lavintk.models.connector import TapNeck
from lavintk.models.multimodal import MultimodalModel, count_parameters
from lavintk.models.vision import VisionTower
from lavintk_mma import MixtureOptions
from lavintk_mma.adapter import MixtureOfModalityAdapter


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


@pytest.mark.parametrize(
    ("geometry", "total"), [((4096, 32, 11008, 32), 3_781_296), ((5120, 40, 13824, 40), 5_390_080)]
)
def test_the_trainable_parameters_are_those_published(geometry: tuple[int, int, int, int], total: int) -> None:
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
        model.attach(MixtureOfModalityAdapter(MixtureOptions(visual="router")))
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


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("placement", ["attn", "block"])
def test_folded_weights_give_the_same_hidden_states(seed: int, placement: str) -> None:
    """Random geometries: dropping adapter and modality token and adding the affine updates changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    heads = 2 * int(torch.randint(1, 4, (1,), generator=generator))
    dim, groups = [(8, 2), (4, 1), (6, 3), (4, 4)][seed]
    options = MixtureOptions(dim=dim, groups=groups, scale=0.5 + seed, temperature=1.0 + seed, placement=placement)  # type: ignore[arg-type]
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


def test_a_visual_router_has_no_affine_form() -> None:
    model = make_model(MixtureOptions(visual="router"))
    with pytest.raises(NotAffineError, match="visual=affine"):
        list(model.adapter.affine_updates())  # type: ignore[union-attr]


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

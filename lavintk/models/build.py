"""From a recipe to a model that is ready to train or to answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from lavintk.contracts import Quantizer
from lavintk.data.batches import FindFeatures
from lavintk.data.images import IMAGENET_MEAN, IMAGENET_STD, ImageProcessor
from lavintk.data.template import Template, make_template
from lavintk.devices import enough_memory
from lavintk.models.base_cache import load_base, wanted_base
from lavintk.models.catalog import locate
from lavintk.models.connector import connect
from lavintk.models.delta_source import with_delta
from lavintk.models.language import (
    Progress,
    language_config,
    load_language_model,
    load_vision_model,
    outline_language_model,
    outline_vision_model,
    vision_config,
)
from lavintk.models.multimodal import MultimodalModel
from lavintk.models.quantized_base import QuantizedBase
from lavintk.models.sources import WeightSource, open_source
from lavintk.models.stream import LayersOutside
from lavintk.models.tokenizer import check_vocabulary, load_tokenizer
from lavintk.plugins import Plugins
from lavintk.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Assembly:
    """A model with all that turns records into its input.

    :param base: fingerprints of the frozen models by role.
    :param find_features: returns the vision tower's features of images where they are kept; see
        :mod:`lavintk.features`.
    """

    model: MultimodalModel
    tokenizer: PreTrainedTokenizerBase
    template: Template
    images: ImageProcessor | None
    base: dict[str, dict[str, str]]
    find_features: FindFeatures | None = None


def build(
    recipe: Recipe,
    plugins: Plugins,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None = None,
    check_base: Callable[[Mapping[str, Mapping[str, str]]], None] | None = None,
    trained_in: torch.dtype | None = None,
    trained_on: str | None = None,
    stream: bool = False,
    say: Callable[[str], None] | None = None,
    outside: Literal["none", "cpu", "disk"] = "none",
    resident_layers: int = 0,
) -> Assembly:
    """Load the frozen models, quantize, join them and attach the recipe's adapter, untrained.

    :param check_base: called with the fingerprints by role before any weights are read; what it raises ends the work.
    :param trained_in: the compute type of a training that took place already; see
        :func:`~lavintk.models.language.load_language_model`, as for ``stream``.
    :param trained_on: the kind of device of that training, ``"cpu"`` or ``"cuda"``: a quantized base that it kept is
        preferred to all others.
    :param say: takes a line on a base that was kept on disk, and notes; None: they go to the log.
    :param outside: where the language model's layers wait for their turn on the device; none: on it.
    :param resident_layers: how many of them stay on the device all the same.
    :raises LavintkError: weights, tokenizer or options do not fit; nothing is left on the device.
    """
    quantizer = plugins.quantizers.create(recipe.quant)
    adapter = None if recipe.adapter is None else plugins.adapters.create(recipe.adapter)
    torch.manual_seed(recipe.train.seed)  # the adapter's start must not depend on what was loaded before
    sources, tokenizer, images = _open(recipe)
    base = _fingerprints(sources)
    if check_base is not None:
        check_base(base)

    def advice() -> str:
        from lavintk.fitting import advice_for  # which makes outlines by this module

        fitting = advice_for(recipe, plugins, device)
        return f"{fitting} Quantize it to fewer bits (quant is {recipe.quant}), take a smaller one, or free the device."

    with enough_memory(device, "while loading the model", advice):

        def load(*, kept: QuantizedBase | None = None) -> nn.Module:
            return load_language_model(
                sources["language"], quantizer, device=device, dtype=dtype, progress=progress,
                trained_in=trained_in, stream=stream, embed_quantizer=_embed_quantizer(recipe, plugins), kept=kept,
                # what a failure filled is lost
                outside=None if outside == "none" else LayersOutside(device, outside, resident_layers),
            )  # fmt: skip

        wanted, trained = None, None
        if recipe.model.cache is not False:
            described = partial(
                wanted_base, sources["language"], base["language"]["sha256"], plugins, recipe.quant, recipe.embed_quant
            )
            if trained_in is not None and trained_on is not None:
                trained = described([trained_in], torch.device(trained_on))
            if not (stream and device.type != "cpu"):  # which quantizes on both
                wanted = described([trained_in or dtype, dtype], device)
        language: Any = load_base(load, wanted, recipe.model.cache, trained=trained, may_keep=not stream, say=say)
        tower, connector = None, None
        if "vision" in sources:
            vision = load_vision_model(
                sources["vision"], quantizer=plugins.quantizers.create(recipe.vision_quant),
                device=device, dtype=dtype, trained_in=trained_in,
            )  # fmt: skip
            tower, connector = connect(vision, recipe.model, language.config.hidden_size)
            connector.to(device)
        model = MultimodalModel(language, tower, connector)
        if adapter is not None:
            model.attach(adapter)
        if recipe.train.adapter_precision == "bf16":
            for parameter in model.trainable().values():
                parameter.data = parameter.data.to(torch.bfloat16)
    template = make_template(
        tokenizer, recipe.data.template, system=recipe.data.system, visual_tokens=model.visual_tokens
    )
    return Assembly(model, tokenizer, template, images, base)


def build_outline(recipe: Recipe, plugins: Plugins) -> tuple[MultimodalModel, dict[str, dict[str, str]]]:
    """Return a recipe's model on the meta device with its adapter attached, and the fingerprints of the frozen models.

    Takes no memory for weights: for turning an adapter from elsewhere into a run. What is trained has no values and no
    device yet either.

    :raises LavintkError: as :func:`build`, as far as it shows without reading weights.
    """
    sources, _, _ = _open(recipe)
    return outline(recipe, plugins, sources), _fingerprints(sources)


def outline(recipe: Recipe, plugins: Plugins, sources: Mapping[str, WeightSource]) -> MultimodalModel:
    """Return the model of a recipe on the meta device, its adapter attached: names and shapes.

    :param sources: ``"language"`` and, with a tower, ``"vision"``.
    :raises LavintkError: as :func:`build`, as far as it shows without reading weights.
    """
    language: Any = outline_language_model(sources["language"], _embed_quantizer(recipe, plugins))
    tower, connector = None, None
    if "vision" in sources:
        vision = outline_vision_model(sources["vision"])
        with torch.device("meta"):
            tower, connector = connect(vision, recipe.model, language.config.hidden_size)
    model = MultimodalModel(language, tower, connector)
    if recipe.adapter is not None:
        model.attach(plugins.adapters.create(recipe.adapter))
    return model


def _embed_quantizer(recipe: Recipe, plugins: Plugins) -> Quantizer | None:
    """Return what stores embedding and head, or None where they stay plain."""
    return None if recipe.embed_quant.name == "none" else plugins.quantizers.create(recipe.embed_quant)


def _fingerprints(sources: Mapping[str, WeightSource]) -> dict[str, dict[str, str]]:
    return {role: {"source": s.description, "sha256": s.fingerprint()} for role, s in sources.items()}


def _open(recipe: Recipe) -> tuple[dict[str, WeightSource], PreTrainedTokenizerBase, ImageProcessor | None]:
    """Open what the recipe names and find all that is wrong with it that shows without reading the weights."""
    place = locate(recipe.model.language)
    sources = {"language": open_source(place)}
    if recipe.model.delta is not None:
        sources["language"] = with_delta(sources["language"], recipe.model.delta, recipe.model.delta_compat)
    config = language_config(sources["language"])
    tokenizer = load_tokenizer(place)
    check_vocabulary(tokenizer, config)
    if recipe.model.vision is None:
        return sources, tokenizer, None
    place = locate(recipe.model.vision)
    sources["vision"] = open_source(place)
    config = vision_config(sources["vision"])
    data = recipe.data
    if place.is_dir():
        images = ImageProcessor.from_folder(place, resize=data.resize)
    else:
        images = ImageProcessor.for_clip(int(config.image_size), resize=data.resize)
    if data.normalization == "imagenet":
        images = replace(images, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    return sources, tokenizer, images

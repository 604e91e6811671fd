"""From a recipe to a model that is ready to train or to answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lavintk.data.images import ImageProcessor
from lavintk.data.template import Template, make_template
from lavintk.models.catalog import locate
from lavintk.models.connector import TapNeck
from lavintk.models.language import Progress, load_language_model, load_vision_model
from lavintk.models.multimodal import MultimodalModel
from lavintk.models.sources import open_source
from lavintk.models.tokenizer import check_vocabulary, load_tokenizer
from lavintk.models.vision import VisionTower
from lavintk.plugins import Plugins
from lavintk.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Assembly:
    """A model with all that turns records into its input.

    :param base: fingerprints of the frozen models by role.
    """

    model: MultimodalModel
    tokenizer: PreTrainedTokenizerBase
    template: Template
    images: ImageProcessor | None
    base: dict[str, dict[str, str]]


def build(
    recipe: Recipe,
    plugins: Plugins,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None = None,
) -> Assembly:
    """Load the frozen models, quantize, join them and attach the recipe's adapter, untrained.

    :raises LavintkError: weights, tokenizer or options do not fit; nothing is left on the device.
    """
    quantizer = plugins.quantizers.create(recipe.quant)
    adapter = plugins.adapters.create(recipe.adapter)
    torch.manual_seed(recipe.train.seed)  # the adapter's start must not depend on what was loaded before
    place = locate(recipe.model.language)
    source = open_source(place)
    tokenizer = load_tokenizer(place)
    check_vocabulary(tokenizer, source.config())
    base = {"language": {"source": source.description, "sha256": source.fingerprint()}}
    language: Any = load_language_model(source, quantizer, device=device, dtype=dtype, progress=progress)
    tower, images = None, None
    if recipe.model.vision is not None:
        vision_place = locate(recipe.model.vision)
        vision_source = open_source(vision_place)
        base["vision"] = {"source": vision_source.description, "sha256": vision_source.fingerprint()}
        vision = load_vision_model(vision_source, device=device, dtype=dtype)
        tower = VisionTower(vision, recipe.model.tap_every)
        images = ImageProcessor.from_folder(vision_place, resize=recipe.data.resize)
    connector = None
    if tower is not None:
        connector = TapNeck(tower.width, recipe.model.neck, language.config.hidden_size).to(device)
    model = MultimodalModel(language, tower, connector)
    model.attach(adapter)
    template = make_template(
        tokenizer, recipe.data.template, system=recipe.data.system, visual_tokens=model.visual_tokens
    )
    return Assembly(model, tokenizer, template, images, base)

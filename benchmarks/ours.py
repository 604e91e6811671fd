"""lavintk's side of benchmarks: a recipe's model with random weights, its batches, its step, its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    import torch

    from lavintk.data.batch import Batch
    from lavintk.models.multimodal import MultimodalModel
    from lavintk.plugins import Plugins
    from lavintk.recipe import Recipe

GIB = 2**30
GEOMETRIES = ("1b", "7b", "llama-3.1-8b", "13b", "33b", "65b", "tiny")
"""Those of geometries.py; ``tiny`` is for trying a command without a GPU."""
ADAPTERS = {"lora": "lora:r=16,alpha=32", "mma": "mma:visual=router"}
LEARNING_RATE = 1e-4


def geometry(name: str) -> tuple[Any, Any]:
    """Return the configurations of the language model and of the vision tower."""
    from geometries import CLIP_LARGE, LANGUAGE
    from transformers import CLIPVisionConfig

    if name != "tiny":
        return LANGUAGE[name], CLIP_LARGE
    return LANGUAGE[name], CLIPVisionConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4, image_size=224,
        patch_size=56,
    )  # fmt: skip


def make_recipe_of(name: str, adapter: str, changes: dict[str, Any]) -> Recipe:
    """Return the recipe of a geometry with an adapter; LaVIN's has a tower. ``changes`` go by the recipe's keys."""
    from lavintk.recipe import make_recipe

    model = {"language": name, "vision": "clip" if adapter == "mma" else None}
    content = {"model": model, "adapter": ADAPTERS[adapter], "data": {"train": "alpaca:random"}}
    return make_recipe(content, changes)


def random_model(recipe: Recipe, plugins: Plugins, device: torch.device, dtype: torch.dtype) -> MultimodalModel:
    """Return the recipe's model with random weights made on ``device`` and quantized tensor by tensor.

    :param recipe: of :func:`make_recipe_of`.
    """
    import torch
    from geometries import RandomSource

    from lavintk.models.connector import connect
    from lavintk.models.host_memory import HostTensors
    from lavintk.models.language import load_language_model, load_vision_model
    from lavintk.models.multimodal import MultimodalModel
    from lavintk.models.stream import LayersOutside

    config, vision = geometry(recipe.model.language)
    embed = None if recipe.embed_quant.name == "none" else plugins.quantizers.create(recipe.embed_quant)
    where, resident = recipe.train.stream, recipe.train.resident_layers
    language: Any = load_language_model(
        RandomSource(config, device), plugins.quantizers.create(recipe.quant), device=device, dtype=dtype,
        embed_quantizer=embed, outside=None if where == "none" else LayersOutside(device, where, resident),
    )  # fmt: skip
    tower, connector = None, None
    if recipe.model.vision is not None:
        quantizer = plugins.quantizers.create(recipe.vision_quant)
        clip = load_vision_model(RandomSource(vision, device), quantizer=quantizer, device=device, dtype=dtype)
        tower, connector = connect(clip, recipe.model, config.hidden_size)
        connector.to(device)
    model = MultimodalModel(language, tower, connector)
    if recipe.adapter is not None:
        model.attach(plugins.adapters.create(recipe.adapter))
    if recipe.train.adapter_precision == "bf16":
        for parameter in model.trainable().values():
            parameter.data = parameter.data.to(torch.bfloat16)
    setting, on_cuda = recipe.train.checkpointing, device.type == "cuda"
    model.checkpointing = on_cuda if setting == "auto" else setting
    if on_cuda if recipe.train.offload == "auto" else recipe.train.offload:
        model.offload = HostTensors(device)
    return model.train()


def outline_of(recipe: Recipe, plugins: Plugins) -> MultimodalModel:
    """Return the recipe's model without values, for its plan.

    :param recipe: of :func:`make_recipe_of`.
    """
    from lavintk.models.build import outline
    from lavintk.models.config_source import ConfigSource

    config, vision = geometry(recipe.model.language)
    sources: Any = {"language": ConfigSource(config, "language")}
    if recipe.model.vision is not None:
        sources["vision"] = ConfigSource(vision, "vision")
    return outline(recipe, plugins, sources)


def make_optimizer(recipe: Recipe, plugins: Plugins, model: MultimodalModel) -> torch.optim.Optimizer:
    """Return the recipe's optimizer over what is trained."""
    from lavintk.schedule import build_optimizer

    optimizer = plugins.optimizers.create(recipe.optim)
    return build_optimizer(
        optimizer, model.trainable(), lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.02
    )


def lavintk_step(
    model: MultimodalModel, optimizer: torch.optim.Optimizer, engine: str, capacity: int
) -> Callable[..., torch.Tensor]:
    """Return the trainer's step, from the batches of a window on the host to changed weights.

    :param engine: as a recipe names it. :param capacity: tokens of a batch.
    """
    import torch

    from lavintk.engine import choose_engine

    chosen, _ = choose_engine(engine, model, torch.amp.GradScaler(enabled=False), capacity)

    def step(*window: Batch) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=False)
        losses = chosen.backward(window, sum(batch.labelled for batch in window), 0)
        optimizer.step()
        return torch.stack(losses).sum()

    return step


def random_batch(model: MultimodalModel, rows: int, length: int) -> Batch:
    """Return random rows on the host; with a tower each has an image, whose slots are not trained."""
    import torch

    from lavintk.data.batch import IGNORED, IMAGE, TEXT, Batch

    visual = model.visual_tokens
    ids = torch.randint(3, 31000, (rows, length))
    labels = ids.roll(-1, dims=1)
    labels[:, -1] = IGNORED
    slots = torch.arange(4, 4 + visual)
    labels[:, slots - 1] = IGNORED
    return Batch(
        ids.flatten(), labels.flatten(), torch.arange(length).repeat(rows), (length,) * rows,
        torch.full((rows,), IMAGE if visual else TEXT), torch.randn(rows, 3, 224, 224) if visual else None,
        (torch.arange(rows)[:, None] * length + slots).flatten(), tuple(map(str, range(rows))),
    )  # fmt: skip


def finish(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clean(device: torch.device) -> None:
    """Give back what nobody holds and let peaks begin anew."""
    import gc

    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def memory(device: torch.device) -> dict[str, Any]:
    """Return peaks in GiB; on a CPU only the process's resident peak, as ``allocated_gib``."""
    import torch

    from lavintk.devices import peak_memory

    figures = {"allocated_gib": round(peak_memory(device) / GIB, 2), "reserved_gib": None, "device_gib": None}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        figures["reserved_gib"] = round(torch.cuda.max_memory_reserved(device) / GIB, 2)
        figures["device_gib"] = round((total - free) / GIB, 2)
    return figures


def host_memory() -> float:
    """Return GiB of host memory that this process holds now, pinned memory included."""
    return round(psutil.Process().memory_info().rss / GIB, 2)

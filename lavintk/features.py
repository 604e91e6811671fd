"""Takes a model's images through its vision tower once, and lets batches carry what came out of it.

Only where the tower gives the same features for an image in each step: nothing in it is trained, and nothing was put
into it. That is asked of the model, so it holds for adapters of any kind.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from lavintk.data.batches import default_workers
from lavintk.data.features import (
    FeatureStore,
    KeptFeatures,
    bytes_kept,
    compute_features,
    digest_images,
    features_folder,
    missing_images,
)
from lavintk.data.records import ImageSource
from lavintk.devices import enough_memory
from lavintk.errors import RecipeError, RunError
from lavintk.layers import FrozenLinear
from lavintk.models.build import Assembly
from lavintk.models.multimodal import MultimodalModel
from lavintk.report import counting_bar, duration

LARGEST = 20 * 2**30
"""Bytes that ``auto`` adds to the disk for one run, at most."""
FREE = 0.5
"""Share of the disk's free bytes that may be used."""
KEY, PACKAGES = "data.cache_features", ("transformers", "pillow")
Setting = Literal["auto", True, False]


def keep_features(
    assembly: Assembly,
    find_images: Callable[[], Mapping[ImageSource, str]],
    setting: Setting,
    console: Console,
    *,
    workers: int | None = None,
) -> None:
    """Give ``assembly`` the features of ``images``, from disk or computed and put there, if ``setting`` allows it.

    The tower is then set aside, on the host; images that are not among these bring it back.

    :param find_images: returns images, each with the id of a record that has it; called where there is a tower.
    :param setting: ``auto`` leaves pixels in place where features cannot be kept; True makes that an error.
    :raises RecipeError: True, and the tower is not the same in each step.
    :raises RunError: True, and the disk cannot hold the features.
    :raises DataError: an image cannot be read.
    """
    model = assembly.model
    if setting is False or model.vision is None or assembly.images is None or not (images := find_images()):
        return
    if reason := why_not_the_same(model):
        if setting is True:
            raise RecipeError(KEY, [f"true was asked for, but {reason}"], "Use auto or false.")
        return
    workers, began = default_workers() if workers is None else workers, time.monotonic()
    store = FeatureStore(_origin(assembly), (model.vision.tokens, model.vision.width), model.dtype)
    digests = digest_images(images, workers)
    missing = missing_images(store, digests, workers)
    try:
        _check_room(store, len(missing), setting)
        _compute(assembly, store, {source: (digests[source], images[source]) for source in missing}, workers, console)
    except OSError as error:
        if setting is True:
            raise RunError(f"the features of {len(missing)} images cannot be kept: {error}. {_advice()}") from error
        console.print(f"note: features of images are not kept on disk: {error}", soft_wrap=True)
        return
    assembly.find_features = KeptFeatures(store, digests)
    model.set_vision_aside()
    found = len(set(digests.values())) - len(missing)
    console.print(
        f"features of images: {found:,} from disk, {len(missing):,} computed ({duration(time.monotonic() - began)}); "
        f"{bytes_kept() / 2**20:,.1f} MiB in {features_folder()}, which may be deleted",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def why_not_the_same(model: MultimodalModel) -> str:
    """Return what makes the tower's features differ from step to step, or an empty text if nothing does."""
    if changed := model.changed_in_vision():
        others = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        return f"the adapter changes the vision tower ({changed[0]}{others})"
    assert model.vision is not None
    drops = [key for key, value in _plain(model.vision.model.config).items() if "dropout" in key and value]
    return f"the vision tower's {drops[0]} is not 0" if drops else ""


def _origin(assembly: Assembly) -> dict[str, Any]:
    """Return all that features depend on besides the image."""
    tower, images = assembly.model.vision, assembly.images
    assert tower is not None
    assert images is not None
    return {
        "layout": 1,
        "weights": assembly.base["vision"]["sha256"],
        "config": _plain(tower.model.config),
        "tower": [type(tower).__name__, *tower.taps],
        "layers": sorted(
            {f"{type(x).__name__}: {x.extra_repr()}" for x in tower.modules() if isinstance(x, FrozenLinear)}
        ),
        "images": {name: value for name, value in asdict(images).items() if name != "max_pixels"},
        "device": assembly.model.device.type,
        "packages": {package: version(package) for package in PACKAGES},
    }


def _plain(config: Any) -> dict[str, Any]:
    """Return the numbers and texts of transformers' configuration that say how the tower computes."""
    plain = {key: value for key, value in config.to_dict().items() if isinstance(value, str | int | float)}
    return {key: value for key, value in plain.items() if not key.startswith("_") and key != "transformers_version"}


def _check_room(store: FeatureStore, images: int, setting: Setting) -> None:
    """Refuse what would fill the disk.

    :raises OSError: with both figures.
    """
    needed = images * store.bytes_per_image
    there = next(folder for folder in store.folder.absolute().parents if folder.is_dir())
    room = int(shutil.disk_usage(there).free * FREE)
    room = room if setting is True else min(room, LARGEST)
    if needed > room:
        raise OSError(f"{images} images need {needed / 2**30:.1f} GiB, {room / 2**30:.1f} GiB may be used in {there}")


def _compute(
    assembly: Assembly,
    store: FeatureStore,
    missing: Mapping[ImageSource, tuple[str, str]],
    workers: int,
    console: Console,
) -> None:
    """Compute and write what is missing. :param missing: the digest and a record's id for each image.

    :raises OSError: the disk does not take it.
    """
    if not missing:
        return
    model, read_image = assembly.model, assembly.images
    assert read_image is not None

    @torch.no_grad()
    def compute(pixels: Tensor) -> Tensor:
        advice = "Free the device, or use data.cache_features=false with a smaller train.batch_size."
        with enough_memory(model.device, "while computing the features of images", lambda: advice):
            return model.visual_features(pixels.to(model.device))

    store.describe()
    was_training = model.training
    model.eval()
    try:
        owners = {source: record_id for source, (_, record_id) in missing.items()}
        computed = compute_features(list(missing), owners, read_image, compute, workers)
        with counting_bar(console, "features of images", len(missing)) as advance:
            for source, features in computed:
                store.write(missing[source][0], features)
                advance()
    finally:
        model.train(was_training)


def _advice() -> str:
    return f"Make room, delete {features_folder()}, name another LAVINTK_CACHE, or set {KEY}=false."

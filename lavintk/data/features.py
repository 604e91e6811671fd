"""What a vision tower made of images, kept on disk: a tower that nothing changes need see each image only once.

One small safetensors file for each image, named by the SHA-256 of the encoded image, in a folder for all that the
features depend on besides. So runs share them, images may move or have several names, and a file that is damaged or
of another origin is as good as none.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lavintk.cache import cache_folder
from lavintk.data.batches import ReadImage, read_ahead
from lavintk.data.records import ImageSource
from lavintk.errors import DataError

FEATURES, CHECK, ORIGIN = "features", "check", "origin.json"
IMAGES_AT_A_TIME = 16
"""Images that go through the tower together."""
HEADER_BYTES = 256
"""What a file holds besides the features, about."""


def features_folder() -> Path:
    """Return the folder of all features in lavintk's cache; whoever wants the room back may delete it."""
    return cache_folder() / "features"


class FeatureStore:
    """The features of one tower, for images prepared in one way.

    :param origin: all that the features depend on besides the image: plain values.
    :param shape: ``(V, width)`` of an image's features.
    :param dtype: their type, which is that of the tower.
    """

    def __init__(self, origin: Mapping[str, Any], shape: Sequence[int], dtype: torch.dtype) -> None:
        self.origin = {**origin, "shape": list(shape), "type": str(dtype).removeprefix("torch.")}
        self.shape, self.dtype = torch.Size(shape), dtype
        self.key = hashlib.sha256(json.dumps(self.origin, sort_keys=True).encode()).hexdigest()[:32]
        self.folder = features_folder() / self.key

    @property
    def bytes_per_image(self) -> int:
        """Bytes on disk of an image's features."""
        return self.shape.numel() * self.dtype.itemsize + HEADER_BYTES

    def path(self, image: str) -> Path:
        """Return where the features of an image lie. :param image: SHA-256 of the encoded image."""
        return self.folder / image[:2] / f"{image}.safetensors"

    def read(self, image: str) -> Tensor | None:
        """Return ``[V, width]``, or None where there is no file that this store wrote for this image, unharmed."""
        try:
            stored = load(self.path(image).read_bytes())
            features, check = stored[FEATURES], int(stored[CHECK])
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError):
            return None
        if features.shape != self.shape or features.dtype != self.dtype or check != self._check(image, features):
            return None
        return features

    def write(self, image: str, features: Tensor) -> None:
        """Keep ``features`` ``[V, width]``, on the host; what was there is replaced in one step.

        :raises OSError: the disk does not take it.
        :raises ValueError: features of another shape or type, which could not be read again.
        """
        if features.shape != self.shape or features.dtype != self.dtype:
            raise ValueError(f"features {list(features.shape)} in {features.dtype}, expected {self.origin}")
        path = self.path(image)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = save({FEATURES: features.contiguous(), CHECK: torch.tensor(self._check(image, features))})
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            partial.write_bytes(content)
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    def describe(self) -> None:
        """Write down, for who looks into the folder, what the features depend on.

        :raises OSError: the disk does not take it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / ORIGIN).write_text(json.dumps(self.origin, indent=2) + "\n", encoding="utf-8")

    def _check(self, image: str, features: Tensor) -> int:
        """Return a CRC-32 over the store, the image and its features."""
        content = features.contiguous().flatten().view(torch.uint8).numpy().data
        return zlib.crc32(content, zlib.crc32(f"{self.key}/{image}".encode()))


class KeptFeatures:
    """Finds the features of the images of a run: a :data:`~lavintk.data.batches.FindFeatures`. Safe in threads.

    :param digests: SHA-256 of the encoded image for each image that is known.
    """

    def __init__(self, store: FeatureStore, digests: Mapping[ImageSource, str]) -> None:
        self.store, self.digests = store, digests

    def __call__(self, source: ImageSource) -> Tensor | None:
        """Return ``[V, width]``, or None for an image that is not known, or whose file is gone or damaged."""
        digest = self.digests.get(source)
        return None if digest is None else self.store.read(digest)


def digest_images(images: Mapping[ImageSource, str], workers: int) -> dict[ImageSource, str]:
    """Return the SHA-256 of each encoded image.

    :param images: images, each with the id of a record that has it.
    :raises DataError: all images that cannot be read.
    """

    def digest(item: tuple[ImageSource, str]) -> str | DataError:
        source, record_id = item
        if isinstance(source, bytes):
            return hashlib.sha256(source).hexdigest()
        try:
            with source.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return DataError("the image data", [f"record {record_id!r}: image {source}: {error.strerror}"])

    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="lavintk-digests") as pool:
        found = dict(zip(images, pool.map(digest, images.items())))
    faults = [fault for result in found.values() if isinstance(result, DataError) for fault in result.faults]
    if faults:
        raise DataError("the image data", faults)
    return {source: str(result) for source, result in found.items()}


def missing_images(store: FeatureStore, digests: Mapping[ImageSource, str], workers: int) -> list[ImageSource]:
    """Return one source of each image whose features are not in ``store``, or not unharmed."""
    sources = {digest: source for source, digest in digests.items()}
    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="lavintk-features") as pool:
        there = list(pool.map(lambda digest: store.read(digest) is not None, sources))
    return [source for source, found in zip(sources.values(), there) if not found]


def compute_features(
    sources: Sequence[ImageSource],
    images: Mapping[ImageSource, str],
    read_image: ReadImage,
    compute: Callable[[Tensor], Tensor],
    workers: int,
) -> Iterator[tuple[ImageSource, Tensor]]:
    """Yield each image with its features ``[V, width]``, on the host.

    :param images: as for :func:`digest_images`.
    :param compute: maps pixels ``[I, 3, height, width]``, on the host, to features ``[I, V, width]``.
    :raises DataError: an image cannot be read.
    """

    def read(chunk: Sequence[ImageSource]) -> tuple[Sequence[ImageSource], Tensor]:
        return chunk, torch.stack([read_image(source, images[source]) for source in chunk])

    chunks = [sources[start : start + IMAGES_AT_A_TIME] for start in range(0, len(sources), IMAGES_AT_A_TIME)]
    for chunk, pixels in read_ahead(read, chunks, workers=workers):
        yield from zip(chunk, compute(pixels).cpu())


def bytes_kept() -> int:
    """Return the bytes of all features on disk, of any tower."""
    total = 0
    for folder, _, files in os.walk(features_folder()):
        for name in files:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except OSError:  # another run has just replaced it
                continue
    return total

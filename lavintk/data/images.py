"""Image files to the pixels that a vision tower takes: Pillow and NumPy, as CLIP, SigLIP or LaVIN do it."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lavintk.data.records import ImageSource, Record
from lavintk.errors import DataError, ModelError

if TYPE_CHECKING:
    from numpy import float32
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor

MAX_PIXELS = 100_000_000
"""Larger images are refused unless asked otherwise: decoded, one takes 3 bytes per pixel."""
BICUBIC = 3
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""What LaVIN normalises with."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""What OpenAI's CLIP normalises with."""
ADVICE = "Replace these images, or leave their records out."
Resize = Literal["squash", "crop"]
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class ImageProcessor:
    """Decodes, resizes and normalises images.

    :param height: of the result, in pixels.
    :param width: of the result, in pixels.
    :param mean: per channel, of values between 0 and 1.
    :param std: per channel.
    :param resize: ``"squash"``: directly to the size, losing the aspect ratio (LaVIN, SigLIP); ``"crop"``:
        the shortest edge to ``shortest_edge``, then the centre (CLIP).
    :param shortest_edge: for ``"crop"``; 0 stands for the smaller of height and width.
    :param resample: Pillow's number of the filter; 3 is bicubic.
    :param rescale: factor in front of the normalisation.
    :param max_pixels: larger images are refused before they are decoded.
    :param transparency: ``"drop"`` ignores it, as CLIP and LaVIN do; ``"white"`` puts white behind it.
    """

    height: int
    width: int
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    resize: Resize = "squash"
    shortest_edge: int = 0
    resample: int = BICUBIC
    rescale: float = 1 / 255
    max_pixels: int = MAX_PIXELS
    transparency: Literal["drop", "white"] = "drop"

    @classmethod
    def from_folder(cls, folder: Path, resize: Resize | None = None, max_pixels: int = MAX_PIXELS) -> ImageProcessor:
        """Read ``preprocessor_config.json`` of a Hugging Face folder.

        :param resize: overrules what the file says.
        :raises ModelError: the file is missing or says something that this class cannot do; all of it listed.
        """
        path = folder / "preprocessor_config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ModelError(
                f"{folder} has no preprocessor_config.json, which says how to scale images: copy the one that came "
                "with the weights into it"
            ) from error
        except ValueError as error:
            raise ModelError(f"{path} is not valid JSON: {error}") from error
        return cls(**_read_config(path, config, resize), max_pixels=max_pixels)

    @classmethod
    def for_clip(cls, size: int, resize: Resize | None = None) -> ImageProcessor:
        """Return OpenAI's own preparation for a tower of ``size`` pixels: its files say nothing about it."""
        return cls(size, size, CLIP_MEAN, CLIP_STD, resize or "crop")

    def __call__(self, source: ImageSource, record_id: str = "") -> Tensor:
        """Return :meth:`pixels` as a torch tensor, which shares their memory.

        :raises DataError: the image cannot be read or is too large.
        """
        import torch

        return torch.from_numpy(self.pixels(source, record_id))

    def pixels(self, source: ImageSource, record_id: str = "") -> NDArray[float32]:
        """Return ``[3, height, width]``; needs no torch.

        :param record_id: for messages.
        :raises DataError: the image cannot be read or is too large.
        """
        import numpy as np

        image = decode(source, record_id, max_pixels=self.max_pixels, transparency=self.transparency)
        scaled = np.asarray(self._resized(image), dtype=np.float32) * np.float32(self.rescale)
        pixels = (scaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _resized(self, image: Image) -> Image:
        """Return ``image`` in the size of the result."""
        from PIL.Image import Resampling

        filter = Resampling(self.resample)
        if self.resize == "squash":
            return image.resize((self.width, self.height), filter)
        edge, short, long = self.shortest_edge or min(self.height, self.width), *sorted(image.size)
        longer = int(edge * long / short)
        size = (edge, longer) if image.width <= image.height else (longer, edge)
        scaled = image.resize(size, filter)
        left, top = (scaled.width - self.width) // 2, (scaled.height - self.height) // 2
        return scaled.crop((left, top, left + self.width, top + self.height))  # outside the image it is black


def decode(
    source: ImageSource,
    record_id: str = "",
    *,
    max_pixels: int = MAX_PIXELS,
    transparency: Literal["drop", "white"] = "drop",
) -> Image:
    """Return the image upright (EXIF orientation applied), in RGB.

    :raises DataError: it cannot be read or is too large.
    """
    from PIL import ImageOps

    try:
        with _open(source, max_pixels) as image:
            ImageOps.exif_transpose(image, in_place=True)  # else it copies what is upright already
            return _rgb(image, transparency)
    except Exception as error:  # Pillow's readers raise almost anything on a damaged file
        raise DataError("the image data", [_fault(source, record_id, error)], ADVICE) from error


def image_size(source: ImageSource, record_id: str = "", *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return width and height as stored, from the header alone.

    :raises DataError: the header cannot be read or the image is too large.
    """
    try:
        with _open(source, max_pixels) as image:
            return image.size
    except Exception as error:  # as in decode
        raise DataError("the image data", [_fault(source, record_id, error)], ADVICE) from error


def check_images(records: Iterable[Record], max_pixels: int = MAX_PIXELS) -> int:
    """Open the header of every image once; return how many images there are.

    :raises DataError: every unreadable, missing or too large image, with the first record that has it.
    """
    owners: dict[ImageSource, str] = {}
    for record in records:
        for source in record.images:
            owners.setdefault(source, record.id)

    def check(item: tuple[ImageSource, str]) -> tuple[str, ...]:
        try:
            image_size(*item, max_pixels=max_pixels)
        except DataError as error:
            return error.faults
        return ()

    with ThreadPoolExecutor(8) as pool:  # headers of cold files wait for the disk
        faults = [fault for found in pool.map(check, owners.items()) for fault in found]
    if faults:
        raise DataError("the image data", faults, ADVICE)
    return len(owners)


def _open(source: ImageSource, max_pixels: int) -> Image:
    """Open an image without decoding it; raise ValueError if it is too large."""
    import PIL.Image

    # Pillow warns of large images by a limit of its own; ours is checked here, before anything is decoded.
    PIL.Image.MAX_IMAGE_PIXELS = max(PIL.Image.MAX_IMAGE_PIXELS or 0, max_pixels)
    try:
        image = PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except PIL.Image.DecompressionBombError as error:  # from twice Pillow's limit on it refuses by itself
        found = re.search(r"\d{7,}", str(error))
        size = f"{int(found[0]) / 1e6:,.0f} million pixels" if found else "its pixels"
        raise ValueError(f"{size} are more than the {max_pixels / 1e6:g} million allowed; scale it down") from error
    if image.width * image.height > max_pixels:
        image.close()
        size = f"{image.width} x {image.height} pixels"
        raise ValueError(f"{size} are more than the {max_pixels / 1e6:g} million allowed; scale it down")
    return image


def _rgb(image: Image, transparency: Literal["drop", "white"]) -> Image:
    """Return ``image`` in RGB; 16-bit grey is scaled to 8 bits instead of being clipped."""
    import numpy as np
    import PIL.Image

    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.float64) / 257
        image = PIL.Image.fromarray(np.clip(levels.round(), 0, 255).astype(np.uint8))
    has_alpha = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    if has_alpha and transparency == "white":
        layer = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", layer.size, "white"), layer)
    elif image.mode == "P" and has_alpha:
        image = image.convert("RGBA")  # the direct way to RGB warns
    return image.convert("RGB")


def _fault(source: ImageSource, record_id: str, error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, FileNotFoundError):
        reason = "no such file"
    elif isinstance(error, UnidentifiedImageError):
        reason = "not an image that Pillow can read"
    else:
        reason = str(error) or type(error).__name__
    name = f"{len(source)} bytes in the record" if isinstance(source, bytes) else str(source)
    return f"record {record_id!r}: image {name}: {reason}"


def _read_config(path: Path, config: Mapping[str, Any], resize: Resize | None) -> dict[str, Any]:
    """Return the arguments of :class:`ImageProcessor` that ``config`` stands for."""
    faults = []
    size = config.get("size")
    crop = config.get("crop_size", size) if config.get("do_center_crop") else None
    edge = size if isinstance(size, int) and crop else _shortest_edge(size)
    target = _height_width(crop if crop is not None else size) or _height_width(edge)
    if target is None:
        faults.append(f"size {size!r}: expected a number, height and width, or shortest_edge")
    if config.get("do_resize") is False:
        faults.append("do_resize is false: towers of a fixed size need it")
    if edge is None and crop is not None and _height_width(size) != target:
        faults.append(f"size {size!r} and crop_size {crop!r}: squashing and cropping together is not supported")
    mean, std = (_triple(config, name) for name in ("image_mean", "image_std"))
    if mean is None or std is None:
        faults.append("image_mean and image_std: expected three numbers each")
    if faults or target is None:
        raise ModelError(f"{path} cannot be followed:\n" + "\n".join(f"  - {fault}" for fault in faults))
    return {
        "height": target[0],
        "width": target[1],
        "mean": mean,
        "std": std,
        "resize": resize or ("crop" if edge is not None else "squash"),
        "shortest_edge": edge or 0,
        "resample": config.get("resample", BICUBIC),
        "rescale": config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0,
    }


def _shortest_edge(size: Any) -> int | None:
    return size.get("shortest_edge") if isinstance(size, dict) else None


def _height_width(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict) and {"height", "width"} <= size.keys():
        return int(size["height"]), int(size["width"])
    return None


def _triple(config: Mapping[str, Any], name: str) -> Triple | None:
    if not config.get("do_normalize", True):
        return (0.0, 0.0, 0.0) if name == "image_mean" else (1.0, 1.0, 1.0)
    values = config.get(name)
    if isinstance(values, list) and len(values) == 3 and all(math.isfinite(value) for value in values):
        return (float(values[0]), float(values[1]), float(values[2]))
    return None

"""Images: the same pixels as transformers' processors and LaVIN, any kind of file, and clear faults."""

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from lavintk.data.images import (
    BICUBIC,
    ImageProcessor,
    check_images,
    decode,
    image_size,
)
from lavintk.data.records import Message, Record
from lavintk.errors import DataError, ModelError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


CHANNELS = {"RGB": 3, "RGBA": 4, "L": 1, "LA": 2, "CMYK": 4}


def noise(width: int, height: int, mode: str = "RGB") -> PIL.Image.Image:
    generator = np.random.default_rng(width * 1000 + height)
    planes = [generator.integers(0, 256, (height, width), np.uint8) for _ in range(CHANNELS[mode])]
    bands = [PIL.Image.fromarray(plane) for plane in planes]
    return PIL.Image.merge(mode, bands)


def saved(path: Path, image: PIL.Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def with_images(*sources: Any, name: str = "r") -> Record:
    return Record(name, (Message("user", "q"),), tuple(sources))


def config_folder(path: Path, **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "preprocessor_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("size", [(100, 60), (60, 100), (37, 37), (20, 90), (33, 32)])
@pytest.mark.parametrize("crop", [32, 24, 40])
def test_cropping_equals_transformers_clip_processor(tmp_path: Path, size: tuple[int, int], crop: int) -> None:
    pil = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    theirs = pil.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": crop, "width": crop})
    theirs.save_pretrained(tmp_path)
    ours = ImageProcessor.from_folder(tmp_path)
    assert ours.resize == "crop"
    image = noise(*size)
    expected = theirs(image, return_tensors="pt")["pixel_values"][0]
    actual = ours(saved(tmp_path / "a.png", image))
    assert actual.dtype == torch.float32
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_squashing_equals_transformers_siglip_processor(tmp_path: Path) -> None:
    pil = pytest.importorskip("transformers.models.siglip.image_processing_pil_siglip")
    theirs = pil.SiglipImageProcessorPil(size={"height": 32, "width": 24})
    theirs.save_pretrained(tmp_path)
    ours = ImageProcessor.from_folder(tmp_path)
    assert (ours.resize, ours.height, ours.width) == ("squash", 32, 24)
    image = noise(50, 41)
    expected = theirs(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(ours(saved(tmp_path / "a.png", image)), expected, atol=1e-5, rtol=0)


def test_the_default_is_lavins_formula(tmp_path: Path) -> None:
    image = noise(50, 30)
    small = np.asarray(image.resize((28, 28), PIL.Image.Resampling.BICUBIC), np.float64) / 255
    expected = (small - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    actual = ImageProcessor(28, 28)(saved(tmp_path / "a.png", image))
    assert actual.shape == (3, 28, 28)
    np.testing.assert_allclose(actual.numpy(), expected.transpose(2, 0, 1), atol=1e-5)


def test_old_configurations_with_plain_numbers_are_read(tmp_path: Path) -> None:
    old = {"size": 32, "crop_size": 28, "do_center_crop": True, "resample": 2, "image_mean": [0.5] * 3}
    clip = ImageProcessor.from_folder(config_folder(tmp_path, **old, image_std=[0.25] * 3))
    assert clip == ImageProcessor(28, 28, (0.5,) * 3, (0.25,) * 3, "crop", 32, resample=2)
    squashed = ImageProcessor.from_folder(tmp_path, "squash")
    assert (squashed.height, squashed.resize) == (28, "squash")
    bare = {"size": {"height": 16, "width": 8}, "do_normalize": False, "do_rescale": False}
    raw = ImageProcessor.from_folder(config_folder(tmp_path, **bare))
    assert raw == ImageProcessor(16, 8, (0.0,) * 3, (1.0,) * 3, "squash", 0, BICUBIC, 1.0)


def test_configurations_that_cannot_be_followed_are_refused_with_all_reasons(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no preprocessor_config\.json"):
        ImageProcessor.from_folder(tmp_path)
    with pytest.raises(ModelError) as caught:
        ImageProcessor.from_folder(config_folder(tmp_path, size={"longest_edge": 3}, do_resize=False, image_mean=[1]))
    assert "size {'longest_edge': 3}: expected a number" in str(caught.value)
    assert "do_resize is false" in str(caught.value)
    assert "image_mean and image_std: expected three numbers" in str(caught.value)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ModelError, match="is not valid JSON"):
        ImageProcessor.from_folder(tmp_path)


def test_bytes_give_the_same_pixels_as_a_file(tmp_path: Path) -> None:
    path, processor = saved(tmp_path / "a.png", noise(20, 10)), ImageProcessor(8, 8)
    assert torch.equal(processor(path), processor(path.read_bytes()))


def test_transparency_is_dropped_as_clip_does_or_put_on_white(tmp_path: Path) -> None:
    image = noise(9, 7, "RGBA")
    path = saved(tmp_path / "a.png", image)
    values = np.asarray(image, np.float64)
    np.testing.assert_array_equal(np.asarray(decode(path)), values[..., :3])
    alpha = values[..., 3:] / 255
    expected = values[..., :3] * alpha + 255 * (1 - alpha)
    np.testing.assert_allclose(np.asarray(decode(path, transparency="white")), expected, atol=1)


@pytest.mark.parametrize("transparent", [False, True])
def test_palettes_become_their_colours(tmp_path: Path, transparent: bool) -> None:
    image = PIL.Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    options = {"transparency": b"\x00\xff"} if transparent else {}
    path = saved(tmp_path / "a.png", image, **options)
    assert np.asarray(decode(path)).tolist() == [[[255, 0, 0], [0, 0, 255]]]
    first = [255, 255, 255] if transparent else [255, 0, 0]
    assert np.asarray(decode(path, transparency="white")).tolist() == [[first, [0, 0, 255]]]


def test_grey_and_sixteen_bit_grey_become_rgb(tmp_path: Path) -> None:
    grey = noise(5, 4, "L")
    expected = np.repeat(np.asarray(grey)[..., None], 3, axis=2)
    np.testing.assert_array_equal(np.asarray(decode(saved(tmp_path / "a.png", grey))), expected)
    seen_through = noise(5, 4, "LA")
    levels = np.asarray(decode(saved(tmp_path / "b.png", seen_through)))
    np.testing.assert_array_equal(levels[..., 1], np.asarray(seen_through)[..., 0])
    deep = PIL.Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    np.testing.assert_array_equal(np.asarray(decode(saved(tmp_path / "c.png", deep))), expected)


def test_cmyk_photographs_become_rgb(tmp_path: Path) -> None:
    assert decode(saved(tmp_path / "a.jpg", noise(8, 8, "CMYK"))).mode == "RGB"


def test_the_orientation_in_exif_is_applied(tmp_path: Path) -> None:
    image = noise(6, 4)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it turned by 90 degrees clockwise
    turned = decode(saved(tmp_path / "a.png", image, exif=exif))
    np.testing.assert_array_equal(np.asarray(turned), np.rot90(np.asarray(image), -1))


def forged_png(width: int, height: int) -> bytes:
    """Return a small file whose header promises a huge image."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_absurdly_large_images_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(forged_png(60_000, 60_000))
    with pytest.raises(DataError, match=r"record 'x': image .*bomb.png: ") as caught:
        ImageProcessor(8, 8)(bomb, "x")
    assert "pixels" in caught.value.faults[0]
    small = saved(tmp_path / "a.png", noise(30, 40))
    with pytest.raises(DataError, match=r"30 x 40 pixels are more than the 0\.001 million allowed; scale it down"):
        ImageProcessor(8, 8, max_pixels=1000)(small)
    assert ImageProcessor(8, 8, max_pixels=1200)(small).shape == (3, 8, 8)


def test_the_limit_can_be_raised_above_pillows_own() -> None:
    with pytest.raises(DataError):
        image_size(forged_png(20_000, 20_000))
    assert image_size(forged_png(20_000, 20_000), max_pixels=400_000_000) == (20_000, 20_000)


def test_unreadable_images_name_record_and_file(tmp_path: Path) -> None:
    processor = ImageProcessor(8, 8)
    text, cut = tmp_path / "text.png", tmp_path / "cut.png"
    text.write_text("no image")
    whole = io.BytesIO()
    noise(40, 40).save(whole, "PNG")
    cut.write_bytes(whole.getvalue()[:-2000])
    for path, reason in ((text, "not an image"), (cut, "truncated"), (tmp_path / "none.png", "no such file")):
        with pytest.raises(DataError) as caught:
            processor(path, "r7")
        assert caught.value.faults[0].startswith(f"record 'r7': image {path}: ")
        assert reason in caught.value.faults[0]
    with pytest.raises(DataError, match="record 'r8': image 3 bytes in the record: not an image"):
        processor(b"abc", "r8")


def test_all_faulty_images_are_listed_before_training_from_headers_alone(tmp_path: Path) -> None:
    good = saved(tmp_path / "good.png", noise(40, 40))
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"bad")
    headers = good.read_bytes()[:100]  # the rest is missing, which only decoding would see
    assert check_images([with_images(good, headers), with_images(good), with_images()]) == 2
    records = [
        with_images(good, bad, name="a"),
        with_images(bad, name="b"),
        with_images(tmp_path / "none.png", name="c"),
        with_images(forged_png(60_000, 60_000), name="d"),
    ]
    with pytest.raises(DataError) as caught:
        check_images(records)
    starts = [fault.split(": ")[0] for fault in caught.value.faults]
    assert starts == ["record 'a'", "record 'c'", "record 'd'"], "each image once, with its first record"

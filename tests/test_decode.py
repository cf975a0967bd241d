"""Every kind of image file becomes RGB by the rule that `decode_image` states, or is refused by name."""

from io import BytesIO

import cv2
import numpy as np
import pytest
from PIL import Image

from clear.errors import ClearError
from clear.records import decode_image, encode_image

HEIGHT, WIDTH = 24, 40


def picture() -> np.ndarray:
    """Four flat quarters, so that nothing but the stated rule can move or recolour them."""
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[:12, :20], image[:12, 20:], image[12:, :20], image[12:, 20:] = (250, 20, 30), (20, 200, 40), 90, (9, 8, 220)
    return image


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def coded(array: np.ndarray, kind: str) -> bytes:
    return cv2.imencode(f".{kind}", array)[1].tobytes()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_plain_files_are_decoded_exactly(kind):
    assert (decode_image(saved(Image.fromarray(picture()), kind)) == picture()).all()


def test_what_the_project_writes_comes_back():
    assert (decode_image(encode_image(picture())) == picture()).all()
    assert np.abs(decode_image(encode_image(picture(), "jpeg")).astype(int)[2:10, 2:18] - (250, 20, 30)).max() <= 3


@pytest.mark.parametrize(("mode", "kind"), [("L", "PNG"), ("L", "TIFF"), ("1", "PNG"), ("L", "BMP")])
def test_grey_is_repeated_in_three_channels(mode, kind):
    grey = Image.fromarray(picture()).convert(mode)
    expected = np.repeat(np.asarray(grey.convert("L"))[:, :, None], 3, axis=2)
    assert (decode_image(saved(grey, kind)) == expected).all()


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF"])
def test_palettes_are_looked_up(kind):
    palette = Image.fromarray(picture()).quantize(8)
    assert (decode_image(saved(palette, kind)) == picture()).all()


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bits_are_scaled_and_rounded(kind):
    levels = np.linspace(0, 65535, HEIGHT * WIDTH * 3).astype(np.uint16).reshape(HEIGHT, WIDTH, 3)
    expected = np.rint(levels / 257).astype(np.uint8)
    assert (decode_image(coded(levels[:, :, ::-1].copy(), kind)) == expected).all()
    grey = decode_image(coded(levels[:, :, 0].copy(), kind))
    assert (grey == expected[:, :, :1]).all()


@pytest.mark.parametrize(("kind", "deep"), [("PNG", False), ("TIFF", False), ("WEBP", False), ("PNG", True)])
def test_transparency_is_laid_over_white(kind, deep):
    opacity = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
    opacity[:, 10:30], opacity[:, 30:] = 128, 0
    rgba = np.concatenate([picture(), opacity], axis=2)
    part = opacity / 255
    expected = np.rint(picture() * part + 255 * (1 - part))
    if deep:
        data = coded(cv2.cvtColor(rgba, cv2.COLOR_RGBA2BGRA).astype(np.uint16) * 257, "png")
    else:
        data = saved(Image.fromarray(rgba), kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    assert np.abs(decode_image(data) - expected).max() <= 1


def test_grey_with_alpha_and_a_transparent_palette_colour():
    both = np.dstack([np.full((HEIGHT, WIDTH), 40, np.uint8), np.full((HEIGHT, WIDTH), 0, np.uint8)])
    both[:, :20, 1] = 255
    found = decode_image(saved(Image.fromarray(both, "LA"), "PNG"))
    assert (found[:, :20] == 40).all() and (found[:, 20:] == 255).all()
    palette = Image.fromarray(picture()).quantize(8)
    red = palette.getpixel((0, 0))
    for kind in ("PNG", "GIF"):
        found = decode_image(saved(palette, kind, transparency=red))
        assert (found[:12, :20] == 255).all() and (found[12:] == picture()[12:]).all()


def test_cmyk_becomes_the_colour_it_prints():
    found = decode_image(saved(Image.fromarray(picture()).convert("CMYK"), "JPEG", quality=95, subsampling=0))
    assert np.abs(found.astype(int) - picture())[2:10, 2:18].max() <= 6
    assert np.abs(found.astype(int) - picture())[14:22, 22:38].max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("case", ["JPEG", "PNG", "TIFF", "RGBA", "TIFF 16", "PNG 16"])
def test_the_orientation_in_exif_is_applied(case, orientation):
    turns = [None, None, 0, 3, 1, 5, 4, 6, 2]  # Pillow's transpositions that undo the orientation
    image = Image.fromarray(picture())
    if case.endswith("16"):
        image = Image.fromarray(picture()[:, :, 1].astype(np.uint16) * 257)
    upright = image if orientation == 1 else image.transpose(turns[orientation])
    expected = np.asarray(upright).astype(int)
    if case.endswith("16"):
        expected = np.repeat(expected[:, :, None] // 257, 3, axis=2)
    if case == "RGBA":
        image = image.convert("RGBA")
    exif = Image.Exif()
    exif[0x0112] = orientation
    kind = "PNG" if case == "RGBA" else case.removesuffix(" 16")
    found = decode_image(saved(image, kind, exif=exif, **({"quality": 100} if case == "JPEG" else {})))
    assert found.shape == expected.shape
    for y, x in ((4, 4), (4, -5), (-5, 4), (-5, -5)):
        assert np.abs(found[y, x] - expected[y, x]).max() <= 6


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_counts(kind):
    first = Image.fromarray(picture())
    others = [Image.new("RGB", first.size, colour) for colour in ("black", "white")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(first, kind, save_all=True, append_images=others, **options)
    with Image.open(BytesIO(data)) as file:
        assert file.n_frames == 3
    assert (decode_image(data) == picture()).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9])
def test_truncated_files_are_refused_by_name(kind, part):
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    data = saved(Image.fromarray(noise), kind)
    assert decode_image(data).shape == noise.shape
    with pytest.raises(ClearError, match=r"scene-17: .* bytes are not a complete image; replace or remove"):
        decode_image(data[: int(len(data) * part)], "scene-17")


def test_other_files_and_other_depths_are_refused_by_name():
    with pytest.raises(ClearError, match=r"row 3: 12 bytes are not a complete image"):
        decode_image(b"not an image", "row 3")
    with pytest.raises(ClearError, match="row 3: pixels are float32, expected 8 or 16 bits; convert it"):
        decode_image(coded(np.ones((4, 4), np.float32), "tiff"), "row 3")

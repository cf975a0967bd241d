"""Every kind of image file becomes RGB by the rule that `decode_image` states, or is refused by name."""

import os
import zlib
from io import BytesIO

import cv2
import numpy as np
import pytest
from PIL import Image, TiffImagePlugin
from PIL.PngImagePlugin import PngInfo

from clear.config import compose, from_dict
from clear.data.images import decode_image, encode_image
from clear.errors import ClearError
from clear.reasoning.ask import ask

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


@pytest.mark.parametrize("most", [1, 15, 100, 255, 4095, 65535])
@pytest.mark.parametrize("kind", ["P5", "P6"])
def test_white_of_a_pixmap_is_what_its_header_says(kind, most):
    bytes_of, channels = (1 if most < 256 else 2), (1 if kind == "P5" else 3)
    values = b"".join(value.to_bytes(bytes_of, "big") * channels for value in (most, 0, most // 3 * 2, most))
    found = decode_image(f"{kind}\n2 2\n{most}\n".encode() + values)
    expected = [255, 0, round(255 * (most // 3 * 2) / most), 255]
    assert (found == np.array(expected, np.uint8).reshape(2, 2, 1)).all()


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


def photo(mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A smooth picture with noise, 160 x 96 px: long enough data for damage in its middle."""
    random = np.random.default_rng(seed)
    smooth = cv2.resize(random.integers(0, 256, (4, 6, 3)).astype(np.float32), (160, 96), interpolation=cv2.INTER_CUBIC)
    return Image.fromarray(np.clip(smooth + random.normal(0, 9, smooth.shape), 0, 255).astype(np.uint8)).convert(mode)


JPEGS = {
    "plain": {},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 5},
    "best": {"quality": 100, "subsampling": 0, "optimize": True},
    "profile": {"icc_profile": b"x" * 3000, "comment": b"note"},
}
DAMAGE = {
    "a hole": lambda d, at: d[:at] + d[at + 300 :],
    "zeros": lambda d, at: d[:at] + bytes(700) + d[at + 700 :],
    "zeros to the end": lambda d, at: d[:at] + bytes(len(d) - at),
    "the end mark inside": lambda d, at: d[:at] + b"\xff\xd9" + d[at + 2 :],
    "the end mark, and no more": lambda d, at: d[:at] + b"\xff\xd9",
    "other bytes": lambda d, at: d[:at] + np.random.default_rng(5).bytes(700) + d[at + 700 :],
}


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("kind", JPEGS)
def test_damage_inside_a_jpeg_is_found_and_a_whole_one_is_never_refused(kind, mode):
    whole = saved(photo(mode), "JPEG", **JPEGS[kind])
    expected = cv2.imdecode(np.frombuffer(whole, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert (decode_image(whole) == expected).all()
    start = whole.index(b"\xff\xda")
    for damage in DAMAGE.values():
        with pytest.raises(ClearError, match=r"row 7: .* not a complete image"):
            decode_image(damage(whole, start + (len(whole) - start) // 2), "row 7")


def test_oddities_of_a_whole_jpeg_are_no_damage():
    plain, profile = saved(photo(), "JPEG"), saved(photo(), "JPEG", icc_profile=bytes(150_000))
    end = plain.rindex(b"\xff\xd9")
    odd = {
        "bytes before the end mark": plain[:end] + b"\0\0" + plain[end:],
        "filling": plain[:end] + b"\xff\xff\xff" + plain[end:],
        "a revision of JFIF": plain.replace(b"JFIF\0\x01", b"JFIF\0\x03", 1),
        "a profile in pieces": profile.replace(b"ICC_PROFILE\0\x02", b"ICC_PROFILE\0\x07"),
        "RGB": saved(photo(), "JPEG", keep_rgb=True),
        "4:1:1": saved(photo(), "JPEG", subsampling="4:1:1"),
        "4:4:0": cv2.imencode(".jpg", np.asarray(photo()), [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x121111])[1].tobytes(),
    }
    for name, data in odd.items():
        expected = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        assert (decode_image(data, name) == expected).all(), name


def test_a_progressive_jpeg_that_ends_between_two_scans_is_found():
    whole = saved(photo(), "JPEG", progressive=True)
    scans = [place for place in range(len(whole)) if whole[place : place + 2] == b"\xff\xda"]
    assert len(scans) > 5
    for scan in scans[1:]:
        before = whole.rindex(b"\xff\xc4", 0, scan)  # the Huffman table of the scan
        with pytest.raises(ClearError, match="not a complete image"):
            decode_image(whole[:before] + b"\xff\xd9")


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_what_stands_behind_a_whole_picture_is_ignored(kind):
    for whole in (saved(photo(), kind), *([saved(photo(), "JPEG", progressive=True)] if kind == "JPEG" else [])):
        film = b"\0\0\0\x18ftypmp42" + np.random.default_rng(1).bytes(9000)
        for behind in (bytes(2000), film, whole, b"\n"):
            assert (decode_image(whole + behind) == decode_image(whole)).all()
    pair = saved(photo(), "MPO", save_all=True, append_images=[photo(seed=1)])
    assert (decode_image(pair) == decode_image(saved(photo(), "JPEG"))).all()


def test_a_png_is_whole_whatever_texts_it_carries_and_damaged_where_a_checksum_says_so():
    texts = PngInfo()
    texts.add_text("prompt", "lorem ipsum " * 200_000, zip=True)
    texts.add_itxt("XML:com.adobe.xmp", "y" * 3_000_000, zip=True)
    for mode in ("RGB", "RGBA"):
        plain = saved(photo(mode), "PNG")
        data = saved(photo(mode), "PNG", pnginfo=texts, icc_profile=bytes(3_000_000))
        assert (decode_image(data) == decode_image(plain)).all()
        place = plain.index(b"IDAT") + len(plain) // 2
        for bad in (plain[:place] + bytes(40) + plain[place + 40 :], plain[:place] + plain[place + 9 :]):
            with pytest.raises(ClearError, match="not a complete image"):
                decode_image(bad)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_transparent_grey_of_a_png_is_white_in_every_depth(depth):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    row = int("".join(f"{value:0{depth}b}" for value in [1] * 8 + [0] * 8), 2).to_bytes(2 * depth, "big")
    header = (16).to_bytes(4, "big") + (2).to_bytes(4, "big") + bytes([depth, 0, 0, 0, 0])
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + row) * 2))
    whole = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"tRNS", b"\0\1") + pixels + chunk(b"IEND", b"")
    assert decode_image(whole)[1, ::8].tolist() == [[255] * 3, [0] * 3]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["film WEBP", "WEBP", "AVIF", "RGBA WEBP", "RGBA TIFF", "RGBA AVIF"])
def test_the_orientation_of_other_formats_is_applied(kind, orientation):
    turns = [None, None, 0, 3, 1, 5, 4, 6, 2]
    image = Image.fromarray(picture())
    expected = np.asarray(image if orientation == 1 else image.transpose(turns[orientation])).astype(int)
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = image.convert("RGBA") if kind.startswith("RGBA") else image
    more = {"save_all": True, "append_images": [Image.new("RGB", image.size)]} if "film" in kind else {}
    more |= {} if "TIFF" in kind else {"quality": 100}
    found = decode_image(saved(source, kind.split()[-1], exif=exif, **more))
    assert found.shape == expected.shape
    for y, x in ((4, 4), (4, -5), (-5, 4), (-5, -5)):
        assert np.abs(found[y, x] - expected[y, x]).max() <= 12


FOREIGN = {
    "a HEIC picture": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(900),
    "a camera's raw file": b"\0\0\0\x18ftypcrx \0\0\0\x01crx isom" + bytes(900),
    "a film": b"\0\0\0\x18ftypisom\0\0\0\0isomiso2" + bytes(900),
    "a JPEG XL picture": b"\xff\x0a" + bytes(900),
    "a PDF document": b"%PDF-1.7\n" + bytes(900),
    "an SVG drawing": b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
    "a web page": b"<!DOCTYPE html><html><body>404</body></html>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "a picture in the format ICO": saved(Image.fromarray(picture()), "ICO"),
    "a picture in the format TGA": saved(Image.fromarray(picture()), "TGA"),
    "a picture in the format EPS": saved(Image.fromarray(picture()), "EPS"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_format_that_is_not_read_is_named_with_the_remedy(kind):
    with pytest.raises(ClearError, match=f"row 3: {kind}.*, which cannot be read; convert it to PNG or JPEG"):
        decode_image(FOREIGN[kind], "row 3")


def test_the_preview_in_a_raw_file_is_not_taken_for_the_picture():
    for tags in ({50706: b"\x01\x04\0\0"}, {254: 1, 330: 8}):
        info = TiffImagePlugin.ImageFileDirectory_v2()
        for tag, value in tags.items():
            info[tag] = value
        with pytest.raises(ClearError, match="a camera's raw file, which cannot be read"):
            decode_image(saved(Image.fromarray(picture()), "TIFF", tiffinfo=info))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF"])
def test_too_many_pixels_are_refused_from_the_header(kind):
    data = bytearray(saved(Image.fromarray(picture()).convert("P" if kind == "GIF" else "RGB"), kind))
    side = 65_000
    if kind == "PNG":
        data[16:24] = side.to_bytes(4, "big") * 2
        data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    elif kind == "BMP":
        data[18:26] = side.to_bytes(4, "little") * 2
    elif kind == "GIF":
        data[6:10] = side.to_bytes(2, "little") * 2
    else:
        place = data.index(b"\xff\xc0") + 5
        data[place : place + 4] = side.to_bytes(2, "big") * 2
    with pytest.raises(ClearError, match=r"row 1: .*4225000000 pixels.*make it smaller"):
        decode_image(bytes(data), "row 1")


def test_ask_refuses_a_picture_that_cannot_be_read_before_it_loads_a_model(tmp_path):
    for name, data, said in (
        ("a.heic", FOREIGN["a HEIC picture"], "a HEIC picture, which cannot be read; convert it"),
        ("a.jpg", saved(photo(), "JPEG")[:-300], "not a complete image"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ClearError, match=rf"{name}: .*{said}"):
            ask(tmp_path / name, "what ?", tmp_path / "no model", "auto", from_dict(compose([])))
    with pytest.raises(ClearError, match=r"caf\\xe9.png is not a file"):
        ask(tmp_path / os.fsdecode(b"caf\xe9.png"), "what ?", tmp_path / "no model", "auto", from_dict(compose([])))

"""What is measured of a picture alone, without a label and without its clean version.

Luminance, contrast, sharpness and entropy are those of the stage `validate`; they say little of what kind of damage a
picture has, so further ones look at noise, blocks, lines, colour and local differences. A picture is measured as the
model's training pictures were stored:

- one that is larger than they are is reduced to their size, so that pixels alone are no drift; a smaller one stays;
- one of a lossless format is coded as JPEG of quality 95, as `degrade` stores its copies, so that a file's format is no
  drift either.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from clear.data.images import decode_image, encode_image, pixel_sha256
from clear.errors import ClearError
from clear.validation.accept import contrast
from clear.validation.metrics import entropy, sharpness

METRICS = {
    "luminance": "mean grey level (0 to 255)",
    "contrast": "standard deviation of a thumbnail (grey levels)",
    "sharpness": "variance of the Laplacian (decades)",
    "entropy": "of the grey histogram (bits)",
    "dark": "share of pixels below grey 24",
    "bright": "share of pixels above grey 231",
    "glow": "brightest spot after a wide blur (grey levels)",
    "saturation": "mean saturation (0 to 255)",
    "colours": "spread of the colour differences (grey levels)",
    "chroma_detail": "Laplacian of the colours (decades)",
    "noise": "median residual of flat and edged places alike (grey levels, decades)",
    "flat": "share of pixels like all their neighbours",
    "fine_detail": "Laplacian at full size over that at half size (decades)",
    "peaks": "kurtosis of the Laplacian (decades)",
    "direction": "how far edges agree in one direction (0 to 1)",
    "rows": "vertical over horizontal differences (decades)",
    "lines": "ripple of the row means over that of the column means (decades)",
    "blocks": "steps at every eighth pixel over steps elsewhere (decades)",
    "unevenness": "spread of the sharpness over 4x4 parts (decades)",
    "unlit": "spread of the brightness over 4x4 parts (grey levels)",
}
"""Metric → what it is, with its unit; those of many decades are taken as logarithms."""

SMALLEST = 32
"""px; a picture with a shorter side has too few places to measure."""

TILES = 4


@dataclass(frozen=True)
class Picture:
    """One measured file. `values` has a number for each of METRICS, `pixels` is the digest of its decoded pixels.

    Where `problem` says why it cannot be read, nothing else is there.
    """

    name: str
    values: tuple[float, ...] = ()
    pixels: str = ""
    width: int = 0
    height: int = 0
    problem: str = ""


def measure(job: tuple[str, bytes, int]) -> Picture:
    """Measure one encoded picture, given with its name and the longest side in px of the training pictures.

    A file that is no whole picture, or too small a one, is returned with its problem, never raised.
    """
    name, data, side = job
    try:
        image = decode_image(data, name)
    except ClearError as error:
        return Picture(name, problem=str(error).removeprefix(f"{name}: "))
    height, width = image.shape[:2]
    if min(height, width) < SMALLEST:
        return Picture(name, problem=f"{width}x{height} px; the shorter side must have {SMALLEST} px.")
    return Picture(name, describe(as_stored(image, data, side)), pixel_sha256(image), width, height)


def as_stored(image: np.ndarray, data: bytes, side: int) -> np.ndarray:
    """uint8 RGB (H, W, 3) no larger than `side` px, through JPEG once; `data` are the bytes it was decoded from."""
    scale = side / max(image.shape[:2])
    if scale < 1:
        size = [max(SMALLEST, round(length * scale)) for length in image.shape[1::-1]]
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    elif data.startswith(b"\xff\xd8"):
        return image
    return decode_image(encode_image(image, "jpeg"))


def describe(image: np.ndarray) -> tuple[float, ...]:
    """The METRICS of uint8 RGB (H, W, 3), in their order; all finite, also for a picture of one colour."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    whole = grey.astype(np.float32)
    laplacian = cv2.Laplacian(whole, cv2.CV_32F)
    half = cv2.resize(whole, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    across, down = np.diff(whole, axis=1), np.diff(whole, axis=0)
    red_cyan, yellow_blue = image[..., 0] - whole, 0.5 * (image[..., 0] + whole) - image[..., 2]
    chroma = sum(float(cv2.Laplacian(c, cv2.CV_32F).var()) for c in (red_cyan, yellow_blue))
    light = cv2.GaussianBlur(whole, (0, 0), max(image.shape[:2]) / 16)
    spread = float(laplacian.var())
    tiles = [tile for band in np.array_split(whole, TILES) for tile in np.array_split(band, TILES, axis=1)]
    details = [tile for band in np.array_split(laplacian, TILES) for tile in np.array_split(band, TILES, axis=1)]
    return (
        float(whole.mean()),
        contrast(image),
        _decades(sharpness(grey)),
        entropy(grey),
        float((grey < 24).mean()),
        float((grey > 231).mean()),
        float(light.max()),
        float(cv2.cvtColor(image, cv2.COLOR_RGB2HSV)[..., 1].mean()),
        float(np.hypot(red_cyan.std(), yellow_blue.std())),
        _decades(chroma),
        _decades(_noise(whole)),
        float((cv2.dilate(grey, np.ones((3, 3))) - cv2.erode(grey, np.ones((3, 3))) <= 1).mean()),
        _ratio(spread, float(cv2.Laplacian(half, cv2.CV_32F).var())),
        _decades(float(((laplacian - laplacian.mean()) ** 4).mean()) / max(spread, 1.0) ** 2),
        _direction(whole),
        _ratio(float((down**2).mean()), float((across**2).mean())),
        _ratio(_ripple(whole.mean(axis=1)), _ripple(whole.mean(axis=0)), 0.01),
        _blocks(across, down.T),
        float(np.std([_decades(float(tile.var())) for tile in details])),
        float(np.std([tile.mean() for tile in tiles])),
    )


def _decades(value: float) -> float:
    return float(np.log10(1 + value))


def _ratio(one: float, two: float, least: float = 0.1) -> float:
    return float(np.log10((one + least) / (two + least)))


def _noise(grey: np.ndarray) -> float:
    """The median answer to the mask that cancels planes and straight edges (Immerkær's), as a standard deviation."""
    mask = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    return float(np.median(np.abs(cv2.filter2D(grey, cv2.CV_32F, mask)))) / (6 * 0.6745)


def _direction(grey: np.ndarray) -> float:
    """Coherence of the structure tensor of the whole picture."""
    x, y = (cv2.Sobel(grey, cv2.CV_32F, *order, ksize=3) for order in ((1, 0), (0, 1)))
    xx, yy, xy = float((x * x).mean()), float((y * y).mean()), float((x * y).mean())
    return float(np.hypot(xx - yy, 2 * xy) / (xx + yy + 1.0))


def _ripple(means: np.ndarray) -> float:
    return float(np.diff(means, 2).var())


def _blocks(*differences: np.ndarray) -> float:
    """Mean step between columns 7 and 8, 15 and 16, … over the mean of the others, of differences along rows."""
    steps = [np.abs(d).mean(axis=0) for d in differences]
    at = np.concatenate([s[7::8] for s in steps])
    elsewhere = np.concatenate([np.delete(s, np.s_[7::8]) for s in steps])
    return _ratio(float(at.mean()), float(elsewhere.mean()))

"""Degradations of some fields of use: no part of MMD-Bench's sixteen, off unless `degrade.presets` names them.

driving: rain, fog, night, compression, motion. medical: low_dose, low_contrast. surveillance: low_resolution.
archives: scratches, fading, stains. The form is that of `clear.degradation.corruptions`; lengths are for pictures of
about 640 px and follow `scale`. The severities are set so that PSNR falls strictly from low to high, on rendered scenes
and on photographs (clear/validation/presets.json, measured by clear/validation/bands.py).
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np

from clear.degradation.plugin import Degradation, degradation, marked
from clear.errors import ClearError

LEVELS = {"low": 0.25, "mid": 0.5, "high": 0.9}


def _px(length: float, scale: float, least: int = 1) -> int:
    return max(least, math.floor(length * scale + 0.5))


def _saturate(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _soft(rng: np.random.Generator, shape: tuple[int, ...], size: float) -> np.ndarray:
    """A smooth random field in [0, 1], float32 (H, W), with bumps of about `size` px."""
    height, width = shape[:2]
    cells = max(2, math.ceil(height / size)) + 1, max(2, math.ceil(width / size)) + 1
    coarse = rng.random(cells, dtype=np.float32)
    return np.clip(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)


def _jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    _, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)


@degradation("rain", LEVELS)
def rain(image: np.ndarray, intensity: float, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """Bright streaks of one slant over a dimmed, hazy picture."""
    height, width = image.shape[:2]
    streaks = np.zeros((height, width), np.uint8)
    slant = rng.uniform(-0.3, 0.3)
    count = int(intensity * 2.5e-3 * height * width / scale**2) + 1
    length = _px(20 + 40 * intensity, scale, least=3)
    starts = rng.integers([-length, -length], [width + length, height], (count, 2))
    for (x, y), grey in zip(starts.tolist(), rng.integers(120, 256, count).tolist(), strict=True):
        end = round(x + slant * length), y + length
        cv2.line(streaks, (x, y), end, grey, _px(1.5, scale), cv2.LINE_AA)
    haze = image.astype(np.float32) * (1 - 0.35 * intensity) + 60 * intensity
    share = streaks[..., None].astype(np.float32) / 255 * (0.4 + 0.4 * intensity)
    return _saturate(haze * (1 - share) + 230 * share)


@degradation("fog", LEVELS)
def fog(image: np.ndarray, intensity: float, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """A grey veil, thicker towards the top of the picture (the distance) and in random banks."""
    height = image.shape[0]
    distance = np.linspace(1, 0.5, height, dtype=np.float32)[:, None]
    veil = intensity * distance * (0.75 + 0.25 * _soft(rng, image.shape, 200 * scale))
    return _saturate(image * (1 - veil[..., None]) + 215 * veil[..., None])


@degradation("night", LEVELS)
def night(image: np.ndarray, intensity: float, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """Low light: few photons, so shot noise, and read noise of the sensor; slightly blue."""
    light = (image.astype(np.float32) / 255) ** (1 + intensity) * (1 - 0.85 * intensity)
    light *= np.array([1 - 0.15 * intensity, 1 - 0.05 * intensity, 1], np.float32)
    photons = 400 * (1 - intensity) + 40
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    deviation = np.sqrt(light / photons + (0.02 * intensity) ** 2)
    return _saturate(255 * (light + deviation * noise))


@degradation("compression", LEVELS)
def compression(image: np.ndarray, intensity: float, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """A camera's video link: fewer pixels, then strong block compression. Deterministic."""
    height, width = image.shape[:2]
    share = 1 - 0.5 * intensity
    size = max(8, round(width * share)), max(8, round(height * share))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    # Below quality 6 the chroma tables leave a few garish colours: another damage than a weak link's.
    small = _jpeg(small, max(6, round(26 * (1 - intensity))))
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)


@degradation("motion", LEVELS)
def motion(image: np.ndarray, intensity: float, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """The camera pans during the exposure: a horizontal blur, tilted by at most 10 degrees."""
    size = _px(60 * intensity, scale, least=3) | 1
    kernel = np.zeros((size, size), np.float32)
    reach, slope = size // 2, math.tan(math.radians(rng.uniform(-10, 10)))
    cv2.line(kernel, (0, round(reach - slope * reach)), (size - 1, round(reach + slope * reach)), 1.0, 1, cv2.LINE_AA)
    return cv2.filter2D(image, -1, kernel / kernel.sum())


@degradation("low_dose", LEVELS)
def low_dose(image: np.ndarray, intensity: float, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """Few quanta: Poisson noise of the brightness, the same in all channels, with the grain of the detector."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    quanta = 300 * (1 - intensity) ** 2 + 4
    counted = rng.poisson((grey + 8) / 255 * quanta).astype(np.float32) / quanta * 255 - 8
    grain = cv2.GaussianBlur(counted - grey, (0, 0), max(0.3, 0.8 * scale))
    return _saturate(image + (0.5 * (counted - grey) + 0.5 * grain)[..., None])


@degradation("low_contrast", LEVELS)
def low_contrast(image: np.ndarray, intensity: float, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """Contrast lost towards a middle grey. Deterministic."""
    return _saturate(image * (1 - 0.9 * intensity) + 128 * 0.9 * intensity)


@degradation("low_resolution", LEVELS)
def low_resolution(image: np.ndarray, intensity: float, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """A distant, cheap camera: a fraction of the pixels, compressed, shown large again. Deterministic."""
    height, width = image.shape[:2]
    factor = 1 + 15 * intensity * scale
    size = max(8, round(width / factor)), max(8, round(height / factor))
    small = _jpeg(cv2.resize(image, size, interpolation=cv2.INTER_AREA), round(60 - 40 * intensity))
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


@degradation("scratches", LEVELS)
def scratches(image: np.ndarray, intensity: float, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """Long, nearly vertical lines and dust on old film, bright or dark."""
    out, (height, width) = image.copy(), image.shape[:2]
    for _ in range(2 + int(40 * intensity)):
        x, slope = rng.uniform(0, width), rng.uniform(-0.06, 0.06)
        top, bottom = np.sort(rng.uniform(-0.3, 1.3, 2)) * height
        grey = 235 if rng.random() < 0.7 else 25
        ends = (round(x), round(top)), (round(x + slope * (bottom - top)), round(bottom))
        cv2.line(out, *ends, (grey,) * 3, _px(1 + 2 * intensity, scale), cv2.LINE_AA)
    for x, y, radius in rng.uniform(0, 1, (int(300 * intensity), 3)).tolist():
        center = round(x * width), round(y * height)
        cv2.circle(out, center, _px(1 + 3 * radius, scale), (235, 230, 220), -1, cv2.LINE_AA)
    return out


@degradation("fading", LEVELS)
def fading(image: np.ndarray, intensity: float, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """Dyes that faded: less colour and contrast, towards a yellowish paper. Deterministic."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None].astype(np.float32)
    pale = image + (grey - image) * intensity
    paper = np.array([236, 220, 180], np.float32)
    return _saturate(pale * (1 - 0.7 * intensity) + paper * 0.7 * intensity)


@degradation("stains", LEVELS)
def stains(image: np.ndarray, intensity: float, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """Brown blotches of damp with a darker rim."""
    field = _soft(rng, image.shape, 110 * scale)
    level = np.quantile(field, 1 - 0.75 * intensity)
    inside = np.clip((field - level) * 12, 0, 1)
    rim = np.exp(-(((field - level) * 30) ** 2))
    damp = (inside * (0.25 + 0.4 * intensity))[..., None]
    edge = (0.25 + 0.15 * intensity) * rim[..., None]
    stained = image * (1 - damp) + np.array([120, 85, 45], np.float32) * damp
    return _saturate(stained * (1 - edge) + np.array([60, 38, 18], np.float32) * edge)


FIELDS = {
    "driving": ("rain", "fog", "night", "compression", "motion"),
    "medical": ("low_dose", "low_contrast"),
    "surveillance": ("low_resolution",),
    "archives": ("scratches", "fading", "stains"),
}
"""Presets by field of use; params may name a field or a preset."""

PRESETS = {entry.name: replace(entry, origin=f"preset {entry.name}", trusted=True) for entry in marked(dict(globals()))}
"""All presets by name."""


def select(names: Sequence[str]) -> list[Degradation]:
    """The presets that `names` (fields or presets) stand for, each once. Raises ClearError for an unknown name."""
    found: dict[str, Degradation] = {}
    for name in names:
        if name not in FIELDS and name not in PRESETS:
            known = ", ".join([*FIELDS, *PRESETS])
            raise ClearError(f"degrade.presets: '{name}' is not a preset; choose one of {known}.")
        found |= {one: PRESETS[one] for one in FIELDS.get(name, (name,))}
    return list(found.values())

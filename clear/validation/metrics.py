"""Image metrics of a sample, as plain numbers that the expectations of a dataset are checked on (DESIGN, validation).

Departures: SSIM is measured on the grey image halved in both directions (a quarter of the cost, the same verdicts);
an unreadable image is described in its row (`decodable`, `problem`) instead of stopping the run, so that one
validation lists all bad samples.
"""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from clear.data.images import decode_image, encode_image, pixel_sha256
from clear.data.records import CLEAN, INCOMING, Sample, sha256
from clear.errors import ClearError

COLOUR = "hsv_saturation"
"""Of the sixteen corruptions the one that leaves a picture without colour as it is: such a copy is not compared."""

IDENTICAL_PSNR = 99.0
"""dB reported for two equal images."""


@dataclass(frozen=True)
class Measured:
    """One row of a validation frame. Without a degraded copy the comparison fields are None.

    The single-image metrics (width to dhash) are those of the image a model is shown.
    """

    key: str
    id: str
    corruption: str
    severity: str
    intensity: float
    seed: int
    questions: int
    answers: tuple[tuple[str, str], ...]  # (task, answer) of each question
    decodable: bool
    split: str = ""
    paired: bool = True  # there is a clean image to compare with
    problem: str = ""
    width: int | None = None
    height: int | None = None
    luminance: float | None = None  # mean grey level
    sharpness: float | None = None  # variance of the Laplacian
    entropy: float | None = None  # bits per pixel of the grey histogram
    dhash: str | None = None  # 64-bit difference hash of the clean image, hexadecimal
    pixels: str | None = None  # digest of the clean image's pixels, whatever their encoding
    shown: str | None = None  # digest of the pixels a model is shown
    hash_true: bool | None = None  # image_sha256 is the digest of the stored bytes
    same_size: bool | None = None
    difference: float | None = None  # grey levels, see `difference`
    psnr: float | None = None  # dB
    ssim: float | None = None
    likeness: float | None = None  # of a naturally degraded image to its clean version, see `likeness`


def told(sample: Sample) -> dict[str, Any]:
    """What of a Measured a sample says without being decoded."""
    return {
        "key": sample.key,
        "id": sample.id,
        "corruption": sample.corruption,
        "severity": sample.severity,
        "intensity": sample.intensity,
        "seed": sample.seed,
        "questions": len(sample.questions),
        "answers": tuple((q.task, q.answer) for q in sample.questions),
        "split": sample.split,
        "paired": sample.paired,
        "hash_true": sha256(sample.image or b"") == sample.image_sha256,
    }


def measure(sample: Sample) -> Measured:
    """Decode one sample and measure it; broken images are reported in the result, never raised."""
    base = told(sample)
    try:
        clean = decode_image(sample.image, "clean image")
        seen = clean if sample.degraded is None else decode_image(sample.degraded, "degraded image")
        if sample.degraded is None and sample.corruption != CLEAN:
            raise ClearError(f"degraded image: missing, although the corruption is {sample.corruption}.")
    except ClearError as error:
        return Measured(**base, decodable=False, problem=str(error))
    grey = cv2.cvtColor(seen, cv2.COLOR_RGB2GRAY)
    values = base | {
        "height": seen.shape[0],
        "width": seen.shape[1],
        "luminance": float(grey.mean()),
        "sharpness": sharpness(grey),
        "entropy": entropy(grey),
        "dhash": dhash(clean),
        "pixels": pixel_sha256(clean),
        "shown": pixel_sha256(seen),
    }
    if sample.degraded is not None and base["paired"]:
        values["same_size"] = seen.shape == clean.shape
        if values["same_size"] and not (sample.corruption == COLOUR and colourless(clean)):
            values |= {"psnr": psnr(clean, seen), "ssim": ssim(clean, seen)}
            values["difference"] = difference(clean, seen)
            values["likeness"] = likeness(clean, seen) if sample.severity == INCOMING else None
    return Measured(**values, decodable=True)


def colourless(image: np.ndarray) -> bool:
    """Whether every pixel of uint8 RGB (H, W, 3) is grey: a scan, an X-ray."""
    return bool((image.max(axis=2) == image.min(axis=2)).all())


def difference(clean: np.ndarray, seen: np.ndarray) -> float:
    """Mean absolute difference in grey levels from the clean image or from its stored form, whichever is nearer.

    The stored form is the clean image as a JPEG of quality 95. 0 means that nothing but the encoding was changed, which
    PSNR cannot tell from a slight corruption: on saturated edges the encoding alone costs as much.
    """
    stored = decode_image(encode_image(clean, "jpeg"))
    return min(float(cv2.norm(seen, other, cv2.NORM_L1)) / seen.size for other in (clean, stored))


def likeness(one: np.ndarray, two: np.ndarray) -> float | None:
    """Correlation in [-1, 1] of two uint8 RGB images as grey thumbnails of 32x32 px; None if one is of one grey."""
    small = [
        cv2.resize(cv2.cvtColor(x, cv2.COLOR_RGB2GRAY), (32, 32), interpolation=cv2.INTER_AREA).ravel()
        for x in (one, two)
    ]
    if any(x.std() == 0 for x in small):
        return None
    return float(np.corrcoef(*small)[0, 1])


def sharpness(grey: np.ndarray) -> float:
    """Variance of the Laplacian of a uint8 grey image (H, W)."""
    return float(cv2.meanStdDev(cv2.Laplacian(grey, cv2.CV_16S))[1][0, 0] ** 2)


def entropy(grey: np.ndarray) -> float:
    """Shannon entropy of the histogram of a uint8 grey image (H, W), in bits per pixel."""
    share = np.bincount(grey.ravel(), minlength=256) / grey.size
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def dhash(image: np.ndarray) -> str:
    """64-bit difference hash of uint8 RGB (H, W, 3): near-equal images have near-equal hashes."""
    small = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (9, 8), interpolation=cv2.INTER_AREA)
    return np.packbits(small[:, 1:] > small[:, :-1]).tobytes().hex()


def psnr(one: np.ndarray, two: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 images of one shape in dB; IDENTICAL_PSNR if they are equal."""
    error = cv2.norm(one, two, cv2.NORM_L2SQR) / one.size
    return IDENTICAL_PSNR if error == 0 else float(10 * np.log10(255.0**2 / error))


def ssim(one: np.ndarray, two: np.ndarray) -> float:
    """Mean structural similarity (Gaussian window of 11 px, sigma 1.5) of two uint8 RGB images at half their size."""
    a, b = (_half_grey(x) for x in (one, two))

    def blur(x: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(x, (11, 11), 1.5)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    score = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float((score / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())


def _half_grey(image: np.ndarray) -> np.ndarray:
    size = max(1, image.shape[1] // 2), max(1, image.shape[0] // 2)
    return cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), size, interpolation=cv2.INTER_AREA).astype(np.float32)

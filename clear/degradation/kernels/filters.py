"""Fast forms of what the corruptions of METHOD §6 state as dense kernels and as one normal number per value.

The filters keep within one grey level of the stated kernel; borders are mirrored without repeating the edge, OpenCV's
default. All work in bands of rows: buffers of a few hundred kilobytes stay in the cache, and the memory of larger ones
is asked for page by page anew on every call, which takes longer than the filters themselves.

Departures:
- A Gaussian is cut at 3.5 standard deviations where the stated kernel is wider: less than 0.05 % of its weight.
- A wide Gaussian (4.5 px and more) is computed on an image reduced two or four times: a slight blur against
  aliasing, means of the pixels of each small square, the rest of the blur there, and linear interpolation back. The
  extra steps blur too, so their variance is taken off.
- Normal noise that is added to whole grey levels and rounded is drawn as whole numbers, with the same probabilities.
"""

import math
from collections.abc import Iterator

import cv2
import numpy as np

REACH = 3.5  # standard deviations of a Gaussian that are computed
REDUCED = ((9.0, 4), (4.5, 2))  # px: from this standard deviation on, the image is reduced by this factor
SHARP = 0.0019  # a kernel that ends with a larger weight than this, times the factor, is not reduced: its end blurs
DIRECT = 10  # px, OpenCV visits the non-zero weights alone up to here and takes a Fourier transform from 11 px on
POINT = 1e-3  # px: the weight beside the middle is 0 in any floating-point type, and 1 / sigma may overflow
BAND = 2**14  # pixels that are worked on at once
DRAWN = 2**16  # values of noise that are drawn at once
GREY = 256  # more than any grey level: noise of this size saturates, whatever it is added to
_OPEN = np.int16(-(2**15))  # in a table of noise: sixteen bits do not decide


def bands(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """(first, end) of successive groups of rows."""
    step = max(16, BAND // width)
    return ((first, min(first + step, rows)) for first in range(0, rows, step))


def gaussian_blur(image: np.ndarray, size: int, sigma: float, gain: float = 1.0) -> np.ndarray:
    """`gain` times uint8 (H, W) or (H, W, 3) blurred with a Gaussian kernel of `size` (odd) px; uint8, rounded.

    With sigma 0 the standard deviation follows from `size`, as OpenCV defines it; one below POINT blurs nothing.
    """
    radius, factor = size // 2, 1
    if 0 < sigma < POINT:
        return cv2.convertScaleAbs(image, alpha=gain)
    if sigma > 0:
        radius = min(radius, math.ceil(REACH * sigma))
        last = math.exp(-0.5 * (radius / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
        factor = next((f for least, f in REDUCED if sigma >= least and f * last <= SHARP), 1)
    if factor > 1:
        return _reduced_blur(image, radius, sigma, gain, factor)
    kernel = cv2.getGaussianKernel(2 * radius + 1, sigma, cv2.CV_32F) * np.float32(math.sqrt(gain))
    return cv2.sepFilter2D(image, cv2.CV_8U, kernel, kernel)


def _reduced_blur(image: np.ndarray, radius: int, sigma: float, gain: float, factor: int) -> np.ndarray:
    height, width = image.shape[:2]
    reach = -(-radius // factor)
    pad = (reach + 1) * factor  # one more small pixel on either side, for the interpolation
    down, right = pad + -height % factor, pad + -width % factor
    padded = cv2.copyMakeBorder(image, pad, down, pad, right, cv2.BORDER_REFLECT_101)
    rows, columns = padded.shape[0] // factor, padded.shape[1] // factor
    small = np.empty((rows, columns, *image.shape[2:]), np.float32)
    mean = np.full(factor, 1 / factor, np.float32)
    tent = np.convolve(mean, mean)  # silences, as the mean does, the stripes that the small image would show as others
    for first, end in bands(rows, columns * factor * factor):
        top, bottom = max(0, (first - 1) * factor), (end + 1) * factor  # more rows than the tent needs
        band = cv2.sepFilter2D(padded[top:bottom], cv2.CV_32F, tent, tent)
        band = band[first * factor - top : end * factor - top]
        small[first:end] = cv2.resize(band, (columns, end - first), interpolation=cv2.INTER_AREA)
    # Variances, px²: of three means over `factor` pixels, and of linear interpolation, averaged over its phases.
    extra = 3 * (factor**2 - 1) / 12 + (2 * factor**2 + 1) / 12
    kernel = cv2.getGaussianKernel(2 * reach + 1, math.sqrt(sigma**2 - extra) / factor, cv2.CV_32F)
    kernel *= np.float32(math.sqrt(gain))
    small = cv2.sepFilter2D(small, -1, kernel, kernel)[reach:-reach, reach:-reach]
    out = np.empty_like(image)
    for first, end in bands(len(small) - 2, columns * factor * factor):
        band = cv2.resize(small[first : end + 2], None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR)
        wanted = out[first * factor : end * factor]  # the last band may be longer than the image
        wanted[:] = cv2.convertScaleAbs(band[factor : factor + len(wanted), factor : factor + width])
    return out


def sparse_filter(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Correlate uint8 (H, W, 3) with a square float32 `kernel` of few non-zero weights, centred; uint8, rounded.

    A large kernel is taken apart into tiles, and the empty ones cost nothing.
    """
    size = len(kernel)
    if size <= DIRECT:
        return cv2.filter2D(image, -1, kernel)
    height, width = image.shape[:2]
    before, after = size // 2, size - 1 - size // 2
    padded = cv2.copyMakeBorder(image, before, after, before, after, cv2.BORDER_REFLECT_101)
    tile = -(-size // -(-size // DIRECT))
    corners = [(y, x) for y in range(0, size, tile) for x in range(0, size, tile)]
    parts = [(y, x, part) for y, x in corners if (part := kernel[y : y + tile, x : x + tile]).any()]
    out = np.empty_like(image)
    for first, end in bands(height, width):
        band = padded[first : end + size - 1].astype(np.float32)
        total = np.zeros((end - first, width, 3), np.float32)
        for y, x, part in parts:
            # Only what this tile touches; anchored at the tile's first weight, so nothing is mirrored.
            seen = band[y : y + end - first + part.shape[0] - 1, x : x + width + part.shape[1] - 1]
            total += cv2.filter2D(seen, -1, part, anchor=(0, 0))[: end - first, :width]
        out[first:end] = cv2.convertScaleAbs(total)
    return out


def add_noise(image: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    """uint8 `image` plus normal noise of `deviation` grey levels, rounded and saturated; uint8 of the same shape.

    The noise is drawn as round(N(0, deviation²)), by inverting its distribution function at a uniform number: the
    first 16 bits decide nearly always, through a table; where they leave several results open, the remaining bits are
    drawn too, so the distribution is exact.
    """
    if deviation <= 0:
        return image.copy()
    # below[i] is the probability of a result of at most i - GREY; GREY itself takes the rest.
    root = deviation * math.sqrt(2)
    below = np.array([0.5 * math.erfc(-(k + 0.5) / root) for k in range(-GREY, GREY)])
    edges = below * 2**16
    table = np.repeat(
        np.arange(-GREY, GREY + 1, dtype=np.int16), np.diff(np.ceil(edges).astype(int), prepend=0, append=2**16)
    )
    table[np.minimum(edges.astype(int), 2**16 - 1)] = _OPEN  # one result ends and another begins within this number
    clean, out = image.reshape(-1), np.empty(image.size, np.uint8)
    for first in range(0, image.size, DRAWN):
        # Four numbers of 16 bits from each raw one of 64; in little-endian order on any machine.
        raw = rng.bit_generator.random_raw(DRAWN // 4).astype("<u8", copy=False)
        bits = raw.view("<u2")[: image.size - first]
        noise = np.take(table, bits)
        undecided = np.flatnonzero(noise == _OPEN)
        exact = (bits[undecided] + rng.random(undecided.size)) / 2**16
        noise[undecided] = np.searchsorted(below, exact, side="right") - GREY
        part = slice(first, first + DRAWN)
        out[part] = np.clip(clean[part] + noise, 0, 255)
    return out.reshape(image.shape)

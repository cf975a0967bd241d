"""The sixteen corruptions written down as METHOD §6 states them: the baseline of bench_corruptions.py.

One formula after the other, on uint8 BGR at the published pixel sizes: Gaussian blurs are full two-dimensional kernels
through `filter2D`, regions, rows and blocks are visited in Python loops, sums are taken in floating point and rounded
once. This is the plain way of doing it, not the authors' code, and it is nowhere used but as a yardstick. The library's
calls are used where the formula is itself one (mean shift, inpainting, JPEG, remap, Canny, drawing).
"""

from collections.abc import Callable

import cv2
import numpy as np

RED, FLARE = (0, 0, 255), (255, 255, 235)  # BGR
WORDS = ("X", "FAKE", "COPY", "VOID", "COPYRIGHT")

Formula = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]


def saturate(values: np.ndarray) -> np.ndarray:
    """Clip and round to uint8."""
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


def blend(a: float, x: np.ndarray, b: float, y: np.ndarray) -> np.ndarray:
    """sat(a·x + b·y)."""
    return saturate(a * x.astype(np.float32) + b * y.astype(np.float32))


def gaussian(image: np.ndarray, size: int, sigma: float, weight: float = 1.0) -> np.ndarray:
    """Blur with the full size x size kernel, times `weight`."""
    line = np.arange(size) - size // 2
    kernel = np.exp(-(line[:, None] ** 2 + line[None, :] ** 2) / (2 * sigma**2))
    return cv2.filter2D(image, -1, kernel / kernel.sum() * weight)


def point(image: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """A random pixel (x, y)."""
    return int(rng.integers(image.shape[1])), int(rng.integers(image.shape[0]))


def motion_blur(image: np.ndarray, intensity: float, rng: np.random.Generator) -> np.ndarray:
    """Item 1."""
    d = max(5, int(30 * intensity))
    turn = cv2.getRotationMatrix2D((d / 2, d / 2), rng.uniform(0, 360), 1)
    kernel = cv2.warpAffine(np.diag(np.ones(d)), turn, (d, d))
    return cv2.filter2D(image, -1, kernel / kernel.sum())


def lens_blur(image: np.ndarray, intensity: float, rng: np.random.Generator) -> np.ndarray:
    """Item 2."""
    k = min(101, int(3 + 300 * intensity)) | 1
    return blend(1 - 0.7 * intensity, image, 0.9 * intensity, gaussian(image, k, 20 * intensity))


def gaussian_noise(image: np.ndarray, intensity: float, rng: np.random.Generator) -> np.ndarray:
    """Item 3."""
    return saturate(image + rng.normal(0, 75 * intensity, image.shape))


def block_exchange(image: np.ndarray, intensity: float, rng: np.random.Generator) -> np.ndarray:
    """Item 4, with two different blocks."""
    out, b = image.copy(), min(32, int(5 + 30 * intensity))
    rows, columns = image.shape[0] // b, image.shape[1] // b
    for _ in range(int(35 * intensity)):
        first, second = divmod(int(rng.integers(rows * columns * (rows * columns - 1))), rows * columns - 1)
        (r, c), (s, d) = (divmod(i, columns) for i in (first, second + (second >= first)))
        one = out[r * b : (r + 1) * b, c * b : (c + 1) * b].copy()
        out[r * b : (r + 1) * b, c * b : (c + 1) * b] = out[s * b : (s + 1) * b, d * b : (d + 1) * b]
        out[s * b : (s + 1) * b, d * b : (d + 1) * b] = one
    return out


def jpeg(image: np.ndarray, intensity: float, rng: np.random.Generator) -> np.ndarray:
    """Item 5."""
    quality = int(np.clip(int(100 - 95 * intensity), 5, 100))
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR)


def mean_shift(image: np.ndarray, intensity: float, rng: np.random.Generator) -> np.ndarray:
    """Item 6."""
    radius = int(40 * intensity)
    return cv2.pyrMeanShiftFiltering(image, radius, radius)


def color_diffusion(image: np.ndarray, intensity: float, rng: np.random.Generator) -> np.ndarray:
    """Item 7; no severity reaches the discs above intensity 0.9."""
    blurred = gaussian(image, 3 + 2 * int(20 * intensity), 50 * intensity, intensity**2)
    return blend(max(0.1, 1 - 0.9 * intensity), image, min(0.9, 0.9 * intensity), blurred)


def sharpness(image: np.ndarray, intensity: float, rng: np.random.Generator) -> np.ndarray:
    """Item 8."""
    kernel = 80 * intensity * np.array([[0, -1, 0], [-1, 5, -1], [0, -1, 0]])
    return blend(0.7, image, 0.3, cv2.filter2D(image, -1, kernel))


def dark(image: np.ndarray, intensity: float, rng: np.random.Generator) -> np.ndarray:
    """Item 9."""
    return saturate(image.astype(np.float32) * (1 - intensity**2))


def hsv_saturation(image: np.ndarray, intensity: float, rng: np.random.Generator) -> np.ndarray:
    """Item 10."""
    hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV).astype(np.float32)
    hsv[..., 1] *= 1 - intensity
    return cv2.cvtColor(saturate(hsv), cv2.COLOR_HSV2BGR)


def turbulence(image: np.ndarray, intensity: float, rng: np.random.Generator) -> np.ndarray:
    """Item 11, row by row."""
    height, width = image.shape[:2]
    across, down = (np.empty((height, width), np.float32) for _ in range(2))
    for y in range(height):
        shift = 40 * intensity * np.sin(y / 30 + 5 * intensity)
        across[y] = np.clip(np.arange(width) + shift, 0, width - 1)
        down[y] = np.clip(y + 0.7 * shift, 0, height - 1)
    return cv2.remap(image, across, down, cv2.INTER_LINEAR)


def dirty_lens(image: np.ndarray, intensity: float, rng: np.random.Generator) -> np.ndarray:
    """Item 12, on one grey layer; the kernel reaches three standard deviations, as OpenCV's does."""
    dirt = np.zeros(image.shape[:2], np.uint8)
    if intensity > 0.1:
        for _ in range(int(10 * intensity)):
            axes = int(rng.integers(150, 301)), int(rng.integers(100, 201))
            cv2.ellipse(dirt, point(image, rng), axes, rng.uniform(0, 360), 0, 360, 50, -1)
    for _ in range(int(300 * intensity)):
        grey = int(rng.integers(50, 101))
        cv2.circle(dirt, point(image, rng), int(rng.integers(4, 21)), grey, -1)
    if intensity > 0.5:
        for _ in range(int(5 * intensity)):
            centre = point(image, rng)
            cv2.circle(dirt, centre, int(rng.integers(20, 51)), 80, -1)
            cv2.circle(dirt, centre, int(rng.integers(10, 31)), 120, -1)
    dirt = gaussian(dirt, 181, 30)
    return blend(1 - 0.7 * intensity, image, 0.8 * intensity, dirt[:, :, None])


def scan_lines(image: np.ndarray, intensity: float, rng: np.random.Generator) -> np.ndarray:
    """Item 13."""
    out, thickness = image.copy(), max(5, int(7 * intensity))
    for y in range(0, image.shape[0], max(3, int(20 / (intensity + 0.1)))):
        out[y : y + thickness] = saturate(image[y : y + thickness] * 0.01)
    return out


def graffiti(image: np.ndarray, intensity: float, rng: np.random.Generator) -> np.ndarray:
    """Item 14; the word keeps 10 px from the borders above, below and, if it is not too long, on the right."""
    out, (h, w) = image.copy(), image.shape[:2]

    def below(end: int) -> int:
        """A random whole number from 0 to `end` - 1."""
        return int(rng.random() * end)

    for _ in range(int(10 * intensity)):
        red, green, blue = below(256), below(256), below(256)
        ends = (below(w), below(h)), (below(w), below(h))
        cv2.line(out, *ends, (blue, green, red), 1 + below(max(1, int(5 * intensity))))
    if intensity > 0.55:
        words = [*WORDS, str(1 + below(100))]
        word, size, thickness = words[below(6)], max(0.5, 5 * intensity), max(1, int(5 * intensity))
        width, height = cv2.getTextSize(word, cv2.FONT_HERSHEY_SIMPLEX, size, thickness)[0]
        if h - 10 > height + 10:
            x, y = below(max(1, w - width - 10) + 1), height + 10 + below(h - height - 20 + 1)
            cv2.putText(out, word, (x, y), cv2.FONT_HERSHEY_SIMPLEX, size, RED, thickness)
    return out


def watermark_damage(image: np.ndarray, intensity: float, rng: np.random.Generator) -> np.ndarray:
    """Item 15; the corner keeps 50 px from the lower and right border."""
    mask = np.zeros(image.shape[:2], np.uint8)
    for _ in range(int(1 + 15 * intensity)):
        x, y = int(rng.integers(image.shape[1] - 50 + 1)), int(rng.integers(image.shape[0] - 50 + 1))
        w, h = int(rng.integers(50, 201)), int(rng.integers(20, 81))
        cv2.rectangle(mask, (x, y), (x + w, y + h), 255, -1)
    out = blend(1 - intensity, image, intensity, cv2.inpaint(image, mask, 3, cv2.INPAINT_TELEA))
    if intensity > 0.5:
        edges = cv2.Canny(mask, 50, 150) > 0
        out[edges] = saturate(out[edges] * 0.8)
    return out


def lens_flare(image: np.ndarray, intensity: float, rng: np.random.Generator) -> np.ndarray:
    """Item 16."""
    flare = np.zeros_like(image)
    for _ in range(3 + int(30 * intensity)):
        x, y = point(image, rng)
        cv2.circle(flare, (x, y), int(rng.integers(10, 51)), FLARE, -1)
        angle, length = rng.uniform(0, 2 * np.pi), int(rng.integers(30, 151))
        end = round(x + length * np.cos(angle)), round(y + length * np.sin(angle))
        cv2.line(flare, (x, y), end, FLARE, 2)
    return blend(1, image, 0.9 * intensity, gaussian(flare, 3, 20 * intensity))


FORMULAS: dict[str, Formula] = {
    formula.__name__: formula
    for formula in (
        motion_blur,
        lens_blur,
        gaussian_noise,
        block_exchange,
        jpeg,
        mean_shift,
        color_diffusion,
        sharpness,
        dark,
        hsv_saturation,
        turbulence,
        dirty_lens,
        scan_lines,
        graffiti,
        watermark_damage,
        lens_flare,
    )
}
"""All formulas by name, in the order of METHOD §6."""

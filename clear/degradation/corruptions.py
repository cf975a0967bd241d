"""The sixteen image corruptions of CLEAR as pure functions (METHOD §6).

Every function has the form `f(image, intensity, rng, scale=1.0)`: uint8 RGB (H, W, 3) in and out, `intensity` in
[0, 1], all randomness from `rng`. The published formulas are stated for BGR; colours are converted here once.

Departures:
- `scale` multiplies every absolute pixel length (kernel sizes, sigmas, radii, block size, line spacing, wave length),
  so that severity can follow the image size; 1 is exactly the published formula. Grey levels, counts, JPEG's 8-pixel
  blocks and the colour radius of the mean shift are not pixel lengths. Scaled kernels stay at 3 pixels or more.
- The mean shift and the filling of regions are this project's own kernels, with the pixels of OpenCV's.
- Wide kernels are computed by `clear.degradation.kernels.filters`, within one grey level of the dense ones.
- Noise is drawn as the whole numbers that the rounding would leave: other draws of the same distribution.
- Too small images are refused (`watermark_damage`, `block_exchange`), where the published generator silently kept
  them clean; swaps of two blocks that cancel are completed by one more, and rectangles that leave no known pixel free
  the border, for the same reason. The two blocks of a swap are always different ones.
- The words of graffiti are OpenCV's; from version 5 on it draws a heavier font than version 4's single strokes (3.7
  times as many pixels, PSNR at high 3.3 dB lower).
- Where METHOD §6 states no number (disc radii of colour diffusion above 0.9, rays per flare) the choice is a named
  constant below.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import cv2
import numpy as np

from clear.degradation.kernels.filters import add_noise, bands, gaussian_blur, sparse_filter
from clear.degradation.kernels.mean_shift import mean_shift_filter
from clear.errors import ClearError

DIFFUSION_DISCS = (5, 15)  # px, radius of the discs drawn above intensity 0.9
GRAFFITI_WORDS = ("X", "FAKE", "COPY", "VOID", "COPYRIGHT")  # and, as likely as each of them, a number from 1 to 100
GRAFFITI_MARGIN = 10  # px between the word and the picture's right, upper and lower border
RED = (255, 0, 0)  # RGB
FLARE = (235, 255, 255)  # RGB of the published BGR (255, 255, 235)
SMALLEST_DAMAGE = 50  # px, the narrowest rectangle of watermark_damage; corners keep as far from the far borders


def _px(length: float, scale: float, least: int = 1) -> int:
    """A published length in whole pixels of this image."""
    return max(least, math.floor(length * scale + 0.5))


def _between(rng: np.random.Generator, low: float, high: float, scale: float) -> int:
    """A random length from the published range [low, high], in pixels of this image."""
    first = _px(low, scale)
    return int(rng.integers(first, max(first, _px(high, scale)) + 1))


def _point(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[int, int]:
    """A random pixel (x, y)."""
    return int(rng.integers(shape[1])), int(rng.integers(shape[0]))


def below(end: int, count: int, rng: np.random.Generator) -> Iterator[int]:
    """Endless random whole numbers from 0 to `end` - 1 (end ≤ 2⁶⁴), of which about `count` are wanted.

    They are those of `rng.integers(end, size=...)` on a fresh generator: by the same method (Lemire 2019) from the same
    raw words, without NumPy's checks, which take longer than eight swaps of blocks. `rng` is left after the last word
    that was read.
    """
    bits = 32 if end <= 2**32 else 64  # a raw word of 64 bits is two small numbers, the lower half first
    mask, uneven = 2**bits - 1, 2**bits % end
    while True:
        for word in rng.bit_generator.random_raw(count * bits // 64 + 1).tolist():
            for part in (word & mask, word >> 32) if bits == 32 else (word,):
                product = part * end
                if product & mask >= uneven:  # the others would make some numbers more likely
                    yield product >> bits


def _saturate(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def motion_blur(image: np.ndarray, intensity: float, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """Blur along a line of random direction: a rotated diagonal kernel of sum 1."""
    size = _px(max(5, int(30 * intensity)), scale, least=3)
    turn = cv2.getRotationMatrix2D((size / 2, size / 2), rng.uniform(0, 360), 1.0)
    kernel = cv2.warpAffine(np.eye(size), turn, (size, size))
    return sparse_filter(image, (kernel / kernel.sum()).astype(np.float32))


def lens_blur(image: np.ndarray, intensity: float, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """Out of focus: the image blended with a strong Gaussian blur of itself. Deterministic."""
    size = _px(min(101, int(3 + 300 * intensity)) | 1, scale, least=3) | 1
    blurred = gaussian_blur(image, size, 20 * intensity * scale)
    return cv2.addWeighted(image, 1 - 0.7 * intensity, blurred, 0.9 * intensity, 0)


def gaussian_noise(image: np.ndarray, intensity: float, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """Additive noise of standard deviation 75·intensity grey levels in every channel."""
    return add_noise(image, 75 * intensity, rng)


def block_exchange(image: np.ndarray, intensity: float, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """Exchange random pairs of grid blocks. Raises ClearError if fewer than two blocks fit."""
    side = _px(min(32, int(5 + 30 * intensity)), scale)
    rows, columns = image.shape[0] // side, image.shape[1] // side
    if rows * columns < 2:
        raise ClearError(
            f"block_exchange needs two blocks of {side} px, at least {side}x{2 * side} px; "
            f"the image has {image.shape[1]}x{image.shape[0]} px. Remove it or choose another corruption."
        )
    # Only the numbers of the blocks are swapped; each block that moves is then copied once.
    count, origins, swaps = rows * columns, {}, int(35 * intensity)
    pairs = below(count * (count - 1), swaps, rng)
    while swaps:
        for pair in itertools.islice(pairs, swaps):
            first, second = divmod(pair, count - 1)
            second += second >= first  # all pairs of two different blocks are equally likely
            origins[first], origins[second] = origins.get(second, second), origins.get(first, first)
        swaps = int(all(block == origin for block, origin in origins.items()))  # all are back: one more swap
    out = image.copy()
    source, target = (_blocks(pixels, side, rows, columns) for pixels in (image, out))
    for block, origin in origins.items():
        target[divmod(block, columns)] = source[divmod(origin, columns)]
    return out


def _blocks(image: np.ndarray, side: int, rows: int, columns: int) -> np.ndarray:
    """A view of (H, W, 3) as blocks from the upper left corner: (rows, columns, side, side, 3)."""
    whole = image[: rows * side, : columns * side]
    return whole.reshape(rows, side, columns, side, 3).swapaxes(1, 2)


def jpeg(image: np.ndarray, intensity: float, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """JPEG compression and back, at a quality between 100 and 5. Deterministic; blocks stay 8 px at any scale."""
    quality = min(100, max(5, int(100 - 95 * intensity)))
    _, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)


def mean_shift(image: np.ndarray, intensity: float, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """Pyramid mean-shift filter: flat colour regions without texture. Deterministic."""
    radius = int(40 * intensity)
    return mean_shift_filter(image, _px(radius, scale), radius)


def color_diffusion(image: np.ndarray, intensity: float, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """Colours bleed into a darkened blur; above intensity 0.9 also random discs. Deterministic up to 0.9."""
    size = _px(3 + 2 * int(20 * intensity), scale, least=3) | 1
    blurred = gaussian_blur(image, size, max(50 * intensity * scale, 1e-6), gain=intensity**2)
    out = cv2.addWeighted(image, max(0.1, 1 - 0.9 * intensity), blurred, min(0.9, 0.9 * intensity), 0)
    if intensity > 0.9:
        for _ in range(int(100 * intensity)):
            color = rng.integers(0, 256, 3).tolist()
            cv2.circle(out, _point(rng, out.shape), _between(rng, *DIFFUSION_DISCS, scale), color, -1)
    return out


def sharpness(image: np.ndarray, intensity: float, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """Over-sharpening that saturates; as published, it hardly depends on the intensity. Deterministic."""
    kernel = np.array([[0, -1, 0], [-1, 5, -1], [0, -1, 0]], np.float32) * (80 * intensity)
    return cv2.addWeighted(image, 0.7, cv2.filter2D(image, -1, kernel), 0.3, 0)


def dark(image: np.ndarray, intensity: float, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """Under-exposure: every value times 1 − intensity². Deterministic."""
    return cv2.convertScaleAbs(image, alpha=1 - intensity**2)


def hsv_saturation(image: np.ndarray, intensity: float, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """Faded colours: HSV saturation times 1 − intensity. Deterministic."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    faded = cv2.convertScaleAbs(cv2.extractChannel(hsv, 1), alpha=1 - intensity)
    return cv2.cvtColor(cv2.insertChannel(faded, hsv, 1), cv2.COLOR_HSV2RGB)


def turbulence(image: np.ndarray, intensity: float, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """Rows displaced by a sine wave, as through hot air. Deterministic."""
    height, width = image.shape[:2]
    rows = np.arange(height)
    shift = 40 * intensity * scale * np.sin(rows / (30 * scale) + 5 * intensity)
    columns, out = np.arange(width), np.empty_like(image)
    down = np.clip(rows + 0.7 * shift, 0, height - 1).astype(np.float32)
    for first, end in bands(height, width):
        # Added in float64 and rounded once to float32: a position that is off in its last digit can show at an edge.
        across = np.clip(columns + shift[first:end, None], 0, width - 1).astype(np.float32)
        lines = np.repeat(down[first:end, None], width, axis=1)
        out[first:end] = cv2.remap(image, across, lines, cv2.INTER_LINEAR)
    return out


def dirty_lens(image: np.ndarray, intensity: float, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """Smears, spots and drops on the lens, far out of focus, over a dimmed image."""
    dirt = np.zeros(image.shape[:2], np.uint8)
    if intensity > 0.1:
        for _ in range(int(10 * intensity)):
            axes = _between(rng, 150, 300, scale), _between(rng, 100, 200, scale)
            cv2.ellipse(dirt, _point(rng, dirt.shape), axes, rng.uniform(0, 360), 0, 360, 50, -1)
    smallest, largest = _px(4, scale), _px(20, scale)
    # Grey, x, y and radius of all discs in one call: 1,080 single draws take longer than the drawing.
    count, (height, width) = int(300 * intensity), dirt.shape
    for grey, x, y, radius in rng.integers(
        [50, 0, 0, smallest], [101, width, height, largest + 1], (count, 4)
    ).tolist():
        cv2.circle(dirt, (x, y), radius, grey, -1)
    if intensity > 0.5:
        for _ in range(int(5 * intensity)):
            center = _point(rng, dirt.shape)
            cv2.circle(dirt, center, _between(rng, 20, 50, scale), 80, -1)
            cv2.circle(dirt, center, _between(rng, 10, 30, scale), 120, -1)
    layer = gaussian_blur(dirt, round(180 * scale + 1) | 1, 30 * scale)
    layer = cv2.cvtColor(layer, cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(image, 1 - 0.7 * intensity, layer, 0.8 * intensity, 0)


def scan_lines(image: np.ndarray, intensity: float, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """Nearly black horizontal lines at a regular distance. Deterministic."""
    thickness = _px(max(5, int(7 * intensity)), scale)
    # A scaled distance that does not exceed the thickness would blacken the whole image.
    spacing = _px(max(3, int(20 / (intensity + 0.1))), scale, least=thickness + 1)
    out = image.copy()
    for top in range(0, image.shape[0], spacing):
        out[top : top + thickness] = cv2.convertScaleAbs(image[top : top + thickness], alpha=0.01)
    return out


def graffiti(image: np.ndarray, intensity: float, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """Random lines; above intensity 0.55 also one red word, if it fits vertically. Nothing below intensity 0.1."""
    out, (height, width) = image.copy(), image.shape[:2]
    largest = max(1, int(5 * intensity))  # px, thickness
    # All draws of the lines in one call, as shares of their ranges: single draws take longer than the drawing.
    shares = rng.random(8 * int(10 * intensity)).tolist()
    for k in range(0, len(shares), 8):
        red, green, blue, x, y, u, v, more = shares[k : k + 8]
        start, end = (int(x * width), int(y * height)), (int(u * width), int(v * height))
        color = int(red * 256), int(green * 256), int(blue * 256)
        cv2.line(out, start, end, color, _px(1 + int(more * largest), scale))
    if intensity > 0.55:
        number, choice, right, down = rng.random(4).tolist()
        word = (*GRAFFITI_WORDS, str(1 + int(100 * number)))[int((len(GRAFFITI_WORDS) + 1) * choice)]
        size, thickness, margin = max(0.5, 5 * intensity) * scale, _px(largest, scale), _px(GRAFFITI_MARGIN, scale)
        across, up = cv2.getTextSize(word, cv2.FONT_HERSHEY_SIMPLEX, size, thickness)[0]
        room = height - up - 2 * margin
        if room > 0:
            x, y = int((max(1, width - across - margin) + 1) * right), int((room + 1) * down)
            cv2.putText(out, word, (x, up + margin + y), cv2.FONT_HERSHEY_SIMPLEX, size, RED, thickness)
    return out


def watermark_damage(image: np.ndarray, intensity: float, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """Random rectangles filled in from their surroundings, as after a removed watermark.

    Raises ClearError if a side is shorter than the narrowest rectangle.
    """
    height, width = image.shape[:2]
    smallest = _px(SMALLEST_DAMAGE, scale)
    if min(height, width) < smallest:
        raise ClearError(
            f"watermark_damage needs at least {smallest}x{smallest} px; the image has {width}x{height} px. "
            "Remove it or choose another corruption."
        )
    mask = np.zeros((height, width), np.uint8)
    for _ in range(int(1 + 15 * intensity)):
        x, y = int(rng.integers(width - smallest + 1)), int(rng.integers(height - smallest + 1))
        w, h = _between(rng, SMALLEST_DAMAGE, 200, scale), _between(rng, 20, 80, scale)
        mask[y : y + h + 1, x : x + w + 1] = 255  # both corners belong to it; what lies outside is cut off
    if mask.all():  # no pixel left to fill from: inpainting would return the clean image
        mask[[0, -1]] = mask[:, [0, -1]] = 0
    from clear.degradation.kernels.inpaint import inpaint  # here, for it imports numba

    filled = inpaint(image, mask, max(1.0, 3 * scale))
    out = cv2.addWeighted(image, 1 - intensity, filled, intensity, 0)
    if intensity > 0.5:
        edges = cv2.Canny(mask, 50, 150) > 0
        out[edges] = _saturate(out[edges] * 0.8)
    return out


def lens_flare(image: np.ndarray, intensity: float, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """Bright bluish-white discs, each with one ray."""
    flare = np.zeros_like(image)
    for _ in range(3 + int(30 * intensity)):
        x, y = _point(rng, flare.shape)
        cv2.circle(flare, (x, y), _between(rng, 10, 50, scale), FLARE, -1)
        angle, length = rng.uniform(0, 2 * math.pi), _between(rng, 30, 150, scale)
        end = round(x + length * math.cos(angle)), round(y + length * math.sin(angle))
        cv2.line(flare, (x, y), end, FLARE, _px(2, scale))
    flare = cv2.GaussianBlur(flare, (3, 3), max(20 * intensity * scale, 1e-3))
    return cv2.addWeighted(image, 1.0, flare, 0.9 * intensity, 0)


Corruption = Callable[[np.ndarray, float, np.random.Generator, float], np.ndarray]

CORRUPTIONS: dict[str, Corruption] = {
    function.__name__: function
    for function in (
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
"""All corruptions by name, in the order of METHOD §6."""


def corrupt(name: str, image: np.ndarray, intensity: float, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """Apply the corruption `name` to uint8 RGB (H, W, 3).

    Raises ClearError for an unknown name, an image of another type or too small, and numbers out of range.
    """
    if name not in CORRUPTIONS:
        raise ClearError(f"'{name}' is not a corruption; choose one of {', '.join(CORRUPTIONS)}.")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ClearError(f"{name}: expected uint8 RGB (H, W, 3), got {image.dtype} {image.shape}; decode it first.")
    if not 0 <= intensity <= 1 or not 0 < scale < math.inf:
        raise ClearError(f"{name}: intensity {intensity} must lie in [0, 1] and scale {scale} must be positive.")
    return CORRUPTIONS[name](np.ascontiguousarray(image), float(intensity), rng, float(scale))

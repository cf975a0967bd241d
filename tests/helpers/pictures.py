"""Pictures on which approximations show."""

import cv2
import numpy as np
from hypothesis import strategies as st

KINDS = st.sampled_from(["noise", "black and white", "stripes", "flat", "smooth"])


def picture(height: int = 96, width: int = 120, seed: int = 0) -> np.ndarray:
    """A smooth colourful picture with some edges."""
    y, x = np.mgrid[:height, :width]
    rng = np.random.default_rng(seed)
    a, b, c = rng.uniform(20, 60, 3)
    waves = np.stack([np.sin(x / a), np.cos(y / b), np.sin((x + y) / c)], -1)
    image = (127 + 90 * waves).astype(np.uint8)
    cv2.rectangle(image, (width // 5, height // 4), (width // 2, height // 2), (220, 30, 40), -1)
    return image


def hard_picture(kind: str, height: int, width: int, seed: int) -> np.ndarray:
    """Contents on which an approximate filter would show: noise, stripes near the finest, edges, one flat colour."""
    rng = np.random.default_rng(seed)
    if kind == "noise":
        return rng.integers(0, 256, (height, width, 3), np.uint8)
    if kind == "black and white":
        return (rng.integers(0, 2, (height, width, 3)) * 255).astype(np.uint8)
    if kind == "stripes":
        row = (np.sin(np.pi * np.arange(width) * rng.uniform(0.3, 1)) > 0) * 255
        return np.broadcast_to(row[None, :, None], (height, width, 3)).astype(np.uint8)
    if kind == "flat":
        return np.full((height, width, 3), rng.integers(0, 256, 3), np.uint8)
    return picture(height, width, seed)

"""The two cheapest random corruptions against plain loops: `python -m tests.bench.cheap_corruptions [calls]`.

Block exchange and graffiti take microseconds, so here it counts how numbers are drawn and blocks addressed. The loops
below are the formulas of METHOD §6, items 4 and 14, drawn as the published functions draw: one whole number at a time
from Python's `random`, which is faster than single draws from NumPy. Printed are medians over calls that alternate in
random order in one process on one thread, for four sizes and the three severities; exit status 1 if ours is slower
anywhere.
"""

import random
import sys
import time

import cv2
import numpy as np

from clear.data.pool import one_thread
from clear.degradation.corruptions import CORRUPTIONS, GRAFFITI_WORDS, RED
from clear.degradation.protocol import SEVERITIES

SIZES = (96, 128, 256, 512)  # px, square
CALLS = 400


def exchanged(image: np.ndarray, intensity: float) -> np.ndarray:
    """Item 4, both blocks drawn by row and column."""
    out, side = image.copy(), min(32, int(5 + 30 * intensity))
    rows, columns = image.shape[0] // side, image.shape[1] // side
    for _ in range(int(35 * intensity)):
        top, left = random.randint(0, rows - 1) * side, random.randint(0, columns - 1) * side
        low, right = random.randint(0, rows - 1) * side, random.randint(0, columns - 1) * side
        kept = out[top : top + side, left : left + side].copy()
        out[top : top + side, left : left + side] = out[low : low + side, right : right + side]
        out[low : low + side, right : right + side] = kept
    return out


def scrawled(image: np.ndarray, intensity: float) -> np.ndarray:
    """Item 14."""
    out, (height, width) = image.copy(), image.shape[:2]
    for _ in range(int(10 * intensity)):
        color = tuple(random.randint(0, 255) for _ in range(3))
        start = random.randint(0, width - 1), random.randint(0, height - 1)
        end = random.randint(0, width - 1), random.randint(0, height - 1)
        cv2.line(out, start, end, color, random.randint(1, max(1, int(5 * intensity))))
    if intensity > 0.55:
        word, size = random.choice([*GRAFFITI_WORDS, str(random.randint(1, 100))]), max(0.5, 5 * intensity)
        across, up = cv2.getTextSize(word, cv2.FONT_HERSHEY_SIMPLEX, size, int(size))[0]
        if height - 10 > up + 10:
            place = random.randint(0, max(1, width - across - 10)), random.randint(up + 10, height - 10)
            cv2.putText(out, word, place, cv2.FONT_HERSHEY_SIMPLEX, size, RED, int(size))
    return out


LOOPS = {"block_exchange": exchanged, "graffiti": scrawled}


def microseconds(name: str, image: np.ndarray, intensity: float, calls: int) -> tuple[float, float]:
    """Median µs per image of (ours, the plain loop)."""
    order, times = random.Random(0), ([], [])
    for seed in range(calls):
        for loop in order.sample((0, 1), 2):
            rng = np.random.default_rng(seed)
            random.seed(seed)
            start = time.perf_counter()
            if loop:
                LOOPS[name](image, intensity)
            else:
                CORRUPTIONS[name](image, intensity, rng, 1.0)
            times[loop].append(time.perf_counter() - start)
    ours, plain = (1e6 * float(np.median(t)) for t in times)
    return ours, plain


def main(calls: int = CALLS) -> bool:
    """Print the table; returns whether ours is at least as fast in every cell."""
    print(f"{'µs, ours / plain loop':<24}" + "".join(f"{level:>16}" for level in SEVERITIES))
    level = True
    for name in LOOPS:
        for size in SIZES:
            image = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8), (0, 0), 3)
            with one_thread():
                cells = [microseconds(name, image, intensity, calls) for intensity in SEVERITIES.values()]
            level &= all(ours <= plain for ours, plain in cells)
            shown = (f"{ours:.0f} / {plain:.0f}" for ours, plain in cells)
            print(f"{name} {size} px".ljust(24) + "".join(f"{cell:>16}" for cell in shown), flush=True)
    return level


if __name__ == "__main__":
    sys.exit(not main(*map(int, sys.argv[1:])))

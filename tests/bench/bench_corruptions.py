"""How fast the corruptions are, against the formulas of METHOD §6 written down one by one (transcription.py).

Sixteen corruptions at three severities on one 512x512 picture, on one thread and at the published pixel sizes. The
draws of all random corruptions but the noise come in the same order on both sides, so both draw the same discs, lines
and blocks, and their results are compared before anything is timed. And how many times as fast a process per core is
as one process.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np

from clear.data.images import decode_image
from clear.data.pool import one_thread
from clear.degradation.build import degraded_samples
from clear.degradation.corruptions import CORRUPTIONS
from clear.degradation.protocol import CELLS, SEVERITIES
from clear.errors import ClearError
from clear.sources.scenes.render import couple
from tests.bench.transcription import FORMULAS

SIZE, REPEATS, SLOW_REPEATS = 512, 7, 3
COPIES = 12  # of every cell, for the pool
SLOW = 0.1  # s, from here on a cell is timed SLOW_REPEATS times
OTHER_DRAWS = ("gaussian_noise",)  # the same distribution, so means and deviations are compared


def timed(work: Callable[[], np.ndarray]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def cell_seconds(name: str, intensity: float, image: np.ndarray) -> tuple[float, float]:
    """Median seconds per image of (ours, transcription), alternating. Raises ClearError if they differ in outcome."""
    bgr = np.ascontiguousarray(image[:, :, ::-1])

    def ours() -> np.ndarray:
        return CORRUPTIONS[name](image, intensity, np.random.default_rng(1), 1.0)

    def plain() -> np.ndarray:
        return FORMULAS[name](bgr, intensity, np.random.default_rng(1))

    start = time.perf_counter()
    one, other = ours().astype(float), plain()[:, :, ::-1].astype(float)
    seconds = time.perf_counter() - start
    if name in OTHER_DRAWS:
        off = max(abs(one.mean() - other.mean()), abs(one.std() - other.std()))
    else:
        off = np.abs(one - other).mean()
    if off > 1:
        raise ClearError(f"{name} at {intensity}: the transcription differs by {off:.2f} grey levels; mend it.")
    pairs = [(timed(ours), timed(plain)) for _ in range(SLOW_REPEATS if seconds > SLOW else REPEATS)]
    return statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs)


def cells() -> dict[str, list[tuple[float, float]]]:
    """Seconds of (ours, transcription) per corruption, one pair per severity."""
    image = decode_image(couple("bench", 0, 0, SIZE, 4)[0].image)
    with one_thread():
        return {name: [cell_seconds(name, level, image) for level in SEVERITIES.values()] for name in CORRUPTIONS}


def _row(found: list[tuple[float, float]]) -> dict:
    ours, plain = (len(found) / sum(pair[side] for pair in found) for side in (0, 1))
    return {"value": ours, "unit": "images/s", "baseline": plain, "ratio": ours / plain}


def bench_corruptions() -> dict[str, dict]:
    """All corruptions, and all but the mean shift: both sides spend nearly all their time in its one library call."""
    found = cells()
    return {
        "corruptions_all": _row([pair for pairs in found.values() for pair in pairs]),
        "corruptions_without_mean_shift": _row(
            [p for name, pairs in found.items() if name != "mean_shift" for p in pairs]
        ),
    }


def bench_degrade_workers() -> dict[str, dict]:
    """The stage's loop over all cells, from encoded picture to encoded picture: a process per core against one.

    From the first picture on: the start of the processes (about 2 s) is not counted.
    """
    sample = couple("bench", 0, 0, SIZE, 4)[0]
    variants = [(sample, *cell) for cell in CELLS] * COPIES

    def speed(workers: int) -> float:
        images = degraded_samples(variants, 1.0, workers)
        next(images)
        start = time.perf_counter()
        count = sum(1 for _ in images)
        return count / (time.perf_counter() - start)

    speed(1)  # kernels are compiled and cached by now
    one, all_cores = speed(1), speed(0)
    return {"degrade_workers": {"value": all_cores, "unit": "images/s", "baseline": one, "ratio": all_cores / one}}

"""A small project to watch pictures with: training pictures and copies of four kinds of damage, no pipeline."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from clear.data.images import encode_image
from clear.data.records import Sample, sha256, write_samples
from clear.degradation.build import degraded_samples
from clear.degradation.registry import Chosen
from clear.project.scratch import write_params

CELLS = tuple((kind, level) for kind in ("gaussian_noise", "lens_blur", "jpeg") for level in ("mid", "high"))
SIDE = 64


def picture(seed: int, side: int = SIDE) -> np.ndarray:
    """Shapes on a gradient, uint8 RGB (side, side, 3): no two seeds alike, all of one world."""
    rng = np.random.default_rng(seed)
    ends = rng.integers(60, 200, (2, 3))
    image = np.linspace(*ends, side)[:, None].repeat(side, axis=1).astype(np.uint8)
    for _ in range(5):
        middle, reach = rng.integers(0, side, 2).tolist(), int(rng.integers(side // 12, side // 5))
        cv2.circle(image, middle, reach, rng.integers(0, 256, 3).tolist(), -1, cv2.LINE_AA)
    return image


def samples(first: int, count: int) -> Iterator[Sample]:
    for seed in range(first, first + count):
        data = encode_image(picture(seed))
        yield Sample(id=f"s{seed}", source="test", split="sft", image=data, image_sha256=sha256(data))


def world(folder: Path, pictures: int = 240) -> Path:
    """Parameters and training data in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_params(folder / "params.yaml", ["degrade.workers=1"])
    clean = list(samples(0, pictures))
    for split, some in (("sft", clean[::2]), ("rl", clean[1::2])):
        write_samples(folder / "data/samples" / split, (replace(sample, split=split) for sample in some))
        variants = [(sample, *CELLS[n % len(CELLS)]) for n, sample in enumerate(some)]
        write_samples(folder / "data/degraded" / split, degraded_samples(variants, 0.4, 1))
    write_samples(folder / "data/samples/validation", samples(5000, 10))
    return folder


def night(folder: Path, count: int = 120, damage: tuple[str, str] | None = None, share: float = 0.0) -> Path:
    """A folder of new pictures, of which the last `share` are damaged; named by number."""
    folder.mkdir(parents=True, exist_ok=True)
    new = list(samples(9000, count))
    whole = count - round(share * count)
    files = [sample.image for sample in new[:whole]]
    if damage:
        names = Chosen(presets=(damage[0].removeprefix("+"),)) if damage[0].startswith("+") else Chosen()
        files += [s.degraded for s in degraded_samples([(s, *damage) for s in new[whole:]], 0.4, 1, names=names)]
    for number, data in enumerate(files):
        suffix = "jpg" if data.startswith(b"\xff\xd8") else "png"
        (folder / f"{number:04d}.{suffix}").write_bytes(data)
    return folder


def larger(folder: Path, count: int) -> Path:
    """Pictures of the same world at twice the size."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        big = cv2.resize(picture(9000 + seed), None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
        (folder / f"{seed}.png").write_bytes(encode_image(big))
    return folder

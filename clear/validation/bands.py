"""Measure the PSNR bands of `bands.json` and `presets.json`: `python -m clear.validation.bands` (2 min on one core).

Both files name the protocol version they were measured with: a new version needs new bands. Three kinds of images with
sizes scaled by 0.4: rendered scenes at the 128 px of the default profile and at 256 px, and at 256 px the photographs
that come with scikit-image. A sample's band spans all kinds with a wide margin, a cell's mean has to lie near one of
their means or between them. Bands are per cell
because severity means different things: sharpness ignores it, colour diffusion is not monotone in it, and some
corruptions hardly show at low.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from clear.data.images import encode_image
from clear.data.pool import parallel
from clear.data.records import EXTRA, Sample, sha256
from clear.degradation.build import degraded_samples
from clear.degradation.corruptions import CORRUPTIONS
from clear.degradation.presets import PRESETS
from clear.degradation.protocol import CELLS, PROTOCOL_VERSION, SEVERITIES
from clear.degradation.registry import Chosen
from clear.validation.frames import BANDS, PRESET_BANDS
from clear.validation.metrics import measure

SIZE, SMALL, SCALE, SCENES, SEED = 256, 128, 0.4, 96, 7
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "retina", "hubble_deep_field", "immunohistochemistry")


PRESET_CELLS = tuple((EXTRA + name, severity) for name in PRESETS for severity in SEVERITIES)


def psnr_by_cell(samples: list[Sample], cells: tuple = CELLS) -> dict[tuple[str, str], np.ndarray]:
    """PSNR of every sample in each of the 48 cells, or in those of `cells`."""
    return {cell: values[:, 0] for cell, values in quality_by_cell(samples, cells).items()}


def quality_by_cell(samples: list[Sample], cells: tuple) -> dict[tuple[str, str], np.ndarray]:
    """PSNR and SSIM (n, 2) of every sample in each cell."""
    variants = [(sample, *cell) for sample in samples for cell in cells]
    found: dict[tuple[str, str], list[tuple[float, float]]] = {cell: [] for cell in cells}
    further = Chosen(presets=tuple(PRESETS))
    for row in parallel(measure, degraded_samples(variants, SCALE, workers=1, names=further), workers=1):
        found[row.corruption, row.severity].append((row.psnr, row.ssim))
    return {cell: np.array(values) for cell, values in found.items()}


def bands_of(kinds: Iterable[dict[tuple[str, str], np.ndarray]], names: Iterable[str] = tuple(CORRUPTIONS)) -> dict:
    """Bands from the PSNR per cell of several kinds of pictures: see the module's first lines."""
    kinds = list(kinds)

    def band(cell: tuple[str, str]) -> dict[str, float]:
        values = [kind[cell] for kind in kinds]
        means, sds = [v.mean() for v in values], [v.std(ddof=1) for v in values]
        found = {
            # Few photographs stand for many, so their extremes get a margin too.
            "low": min(min(v.min() - 3, m - 5 * min(s, 1.5)) for v, m, s in zip(values, means, sds, strict=True)),
            "high": max(max(v.max() + 3, m + 5 * min(s, 1.5)) for v, m, s in zip(values, means, sds, strict=True)),
            "mean_low": min(means) - 1,
            "mean_high": max(means) + 1,
            "sd": max(sds),
        }
        return {name: round(float(value), 1) for name, value in found.items()}

    return {name.removeprefix(EXTRA): {severity: band((name, severity)) for severity in SEVERITIES} for name in names}


def photographs() -> list[Sample]:
    """The colour photographs of scikit-image, central square."""
    import cv2
    from skimage import data

    samples = []
    for name in PHOTOS:
        image = getattr(data, name)()
        side = min(image.shape[:2])
        top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
        square = np.ascontiguousarray(image[top : top + side, left : left + side])
        encoded = encode_image(cv2.resize(square, (SIZE, SIZE), interpolation=cv2.INTER_AREA))
        samples.append(Sample(id=name, source="scikit-image", split="", image=encoded, image_sha256=sha256(encoded)))
    return samples


def main() -> None:
    """Measure and write `bands.json` and `presets.json` beside this file."""
    from clear.sources.scenes.render import scenes

    kinds = {f"scenes of {size} px": list(scenes("sft", SCENES, SEED, size, 4)) for size in (SMALL, SIZE)}
    kinds["photographs"] = photographs()
    labels = [EXTRA + name for name in PRESETS]
    for file, cells, names in ((BANDS, CELLS, list(CORRUPTIONS)), (PRESET_BANDS, PRESET_CELLS, labels)):
        write_bands(file, bands_of((psnr_by_cell(samples, cells) for samples in kinds.values()), names), kinds)


def write_bands(file: Path, cells: dict, kinds: dict[str, list[Sample]]) -> None:
    """Write bands with the setting they were measured in."""
    images = {name: len(samples) for name, samples in kinds.items()}
    setting = {
        "command": "python -m clear.validation.bands",
        "protocol_version": PROTOCOL_VERSION,
        "sizes": [SMALL, SIZE],
        "scale": SCALE,
        "images": images,
    }
    lines = [
        f'  "{c}": {{\n' + ",\n".join(f'   "{s}": {json.dumps(band)}' for s, band in row.items()) + "\n  }"
        for c, row in cells.items()
    ]
    file.write_text(f'{{\n "measured": {json.dumps(setting)},\n "cells": {{\n' + ",\n".join(lines) + "\n }\n}\n")


if __name__ == "__main__":
    main()

"""Pandas frames of measured samples, with the columns that the expectations check.

Judgements about a whole dataset (does the histogram of severities match the protocol?) become columns too, with one
value repeated in all rows concerned: checking a column is fast, and the offending rows are known by name.
"""

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from math import nan, sqrt
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from clear.degradation.plugin import Degradation
from clear.degradation.protocol import SEVERITIES, seed_of
from clear.validation.metrics import Measured

BANDS = Path(__file__).with_name("bands.json")
"""PSNR bands per corruption and severity; measured by clear/validation/bands.py."""

PRESET_BANDS = BANDS.with_name("presets.json")
"""The same for the presets of clear/degradation/presets.py, by name."""


def load_bands(path: Path = BANDS) -> dict[str, dict[str, dict[str, float]]]:
    """bands[corruption][severity] = {low, high, mean_low, mean_high, sd} in dB."""
    return json.loads(path.read_text())["cells"]


_NUMBERS = (
    *("width", "height", "luminance", "sharpness", "entropy", "difference", "psnr", "ssim", "likeness"),
    "contrast",
)
_REPEATED = ("corruption", "severity", "answers", "split", "problem")


def build_frame(measured: Iterable[Measured]) -> pd.DataFrame:
    """One row per sample, one column per metric, plus `copies`: how many rows share the sample id.

    `contrast` is there for all and has a value for naturally degraded images (clear/validation/accept.py). The rows may
    be a stream: metrics are kept as numbers, and equal answers or labels once.
    """
    columns: dict[str, Any] = {name: [] for name in Measured.__dataclass_fields__}
    columns |= {name: array("d") for name in _NUMBERS}
    same: dict[Any, Any] = {}
    for row in measured:
        for name, column in columns.items():
            value = getattr(row, name, None)
            if name in _REPEATED:
                value = same.setdefault(value, value)
            column.append(nan if value is None and name in _NUMBERS else value)
    columns |= {name: np.array(columns[name]) for name in _NUMBERS}
    kind = None if columns["key"] else object  # whatever there is nothing of is text
    frame = pd.DataFrame(columns, dtype=kind).astype(dict.fromkeys(_NUMBERS, float))
    frame["copies"] = frame.groupby("id")["id"].transform("size").astype(int)
    return frame


def add_answer_share(frame: pd.DataFrame) -> None:
    """Column `answer_share`: how common the commonest of the row's answers is within its task.

    It is the share of equal answers among all questions of the task, less three standard errors, so that a handful of
    questions is never called unbalanced.
    """
    answers = Counter(pair for row in frame["answers"] for pair in row)
    tasks = Counter()
    for (task, _), number in answers.items():
        tasks[task] += number
    share = {pair: n / tasks[pair[0]] - 1.5 / sqrt(tasks[pair[0]]) for pair, n in answers.items()}
    frame["answer_share"] = [max((share[pair] for pair in row), default=0.0) for row in frame["answers"]]


ENOUGH = 30
"""Images of a corruption from which on its mean quality must fall, however little."""

NOT_MONOTONE = ("sharpness", "color_diffusion")
"""Those of the sixteen whose damage does not grow with severity (METHOD §6, items 7 and 8)."""


def further_bands(further: Mapping[str, Degradation]) -> dict[str, dict]:
    """Bands in the form of `load_bands` for degradations beyond the sixteen: measured ones of the presets, and what a
    plugin states; a level without either is not judged."""
    measured, found = load_bands(PRESET_BANDS), {}
    for label, entry in further.items():
        stated = {
            level: {"low": low, "high": high, "mean_low": low, "mean_high": high, "sd": 0.0}
            for level, (low, high) in entry.psnr.items()
        }
        found[label] = (measured.get(entry.name, {}) if entry.trusted else {}) | stated
    return found


def add_monotone(frame: pd.DataFrame, falling: Iterable[str]) -> None:
    """Column `monotone`: whether mean PSNR and mean SSIM of the row's corruption fall strictly over the severities; for
    the corruptions of `falling` only.

    Copies of one image are compared. Fewer than ENOUGH images fail only if a rise exceeds two standard errors; a
    corruption without all levels is not judged.
    """
    frame["monotone"] = pd.Series(None, index=frame.index, dtype=object)
    for corruption, rows in frame.groupby("corruption"):
        if corruption in falling and set(SEVERITIES) <= set(rows["severity"]):
            by_level = (rows[rows["severity"] == level].groupby("id")[["psnr", "ssim"]].mean() for level in SEVERITIES)
            frame.loc[rows.index, "monotone"] = all(_falls(two - one) for one, two in pairwise(by_level))


def _falls(steps: pd.DataFrame) -> bool:
    steps = steps.dropna()
    if steps.empty:
        return True  # nothing was measured; `decodable` says why
    error = 2 * steps.std().fillna(0) / sqrt(len(steps)) if len(steps) < ENOUGH else 0.0
    return bool(((steps.mean() < 0) | (steps.mean() < error)).all())


def add_protocol(frame: pd.DataFrame, further: Mapping[str, Degradation] = MappingProxyType({})) -> None:
    """Column `as_labelled`: intensity and seed are those of the row's id, corruption and severity."""
    frame["as_labelled"] = [
        row.intensity == _levels(row.corruption, further).get(row.severity)
        and row.seed == seed_of(row.id, row.corruption, row.severity)
        for row in frame.itertuples()
    ]


def _levels(corruption: str, further: Mapping[str, Degradation]) -> Mapping[str, float]:
    return further[corruption].severities if corruption in further else SEVERITIES


def add_psnr_bands(frame: pd.DataFrame, bands: Mapping) -> None:
    """Columns `psnr_outside` and `mean_psnr_outside`: dB by which a row, or its cell's mean, misses its band.

    A mean may miss its band by four standard errors more, so a cell of few images is judged mildly. Rows without PSNR
    or of an unknown cell get no value: other checks name them.
    """
    frame["psnr_outside"] = np.nan
    frame["mean_psnr_outside"] = np.nan
    for (corruption, severity), rows in frame.dropna(subset="psnr").groupby(["corruption", "severity"]):
        band = bands.get(corruption, {}).get(severity)
        if band is None:
            continue
        psnr, margin = rows["psnr"], 4 * band["sd"] / sqrt(len(rows))
        frame.loc[rows.index, "psnr_outside"] = _outside(psnr, band["low"], band["high"])
        mean = _outside(psnr.mean(), band["mean_low"] - margin, band["mean_high"] + margin)
        frame.loc[rows.index, "mean_psnr_outside"] = mean


def _outside(value, low: float, high: float):
    return np.maximum(np.maximum(low - value, value - high), 0.0)


def add_histograms(frame: pd.DataFrame, corruptions: Mapping[str, float], severities: Mapping[str, float]) -> None:
    """Columns `corruption_p` and `severity_p`: chi-square p-values of the two histograms against their weights."""
    frame["corruption_p"] = chi_square_p(Counter(frame["corruption"]), corruptions)
    frame["severity_p"] = chi_square_p(Counter(frame["severity"]), severities)


def chi_square_p(observed: Mapping[str, int], weights: Mapping[str, float]) -> float:
    """p-value of counts against relative weights; 0 if anything was seen that has no weight."""
    from scipy.stats import chisquare

    expected = {name: weight for name, weight in weights.items() if weight > 0}
    if set(observed) - set(expected):
        return 0.0
    total = sum(observed.values())
    if len(expected) < 2 or not total:
        return 1.0
    share = np.array(list(expected.values())) / sum(expected.values())
    return float(chisquare([observed.get(name, 0) for name in expected], share * total).pvalue)


def add_shared_images(frame: pd.DataFrame, training: Iterable[pd.DataFrame]) -> None:
    """Column `shared_images`: for a row whose clean image is also a training image, how many images are so shared.

    Column `looks_shared`: a training image has the same 64-bit difference hash. It is reported, not judged: pictures
    of one layout may share a hash.
    """
    training = list(training)

    def known(column: str) -> pd.Series:
        return frame[column].isin(set().union(*(set(other[column].dropna()) for other in training)))

    shared = known("pixels")
    frame["looks_shared"] = known("dhash")
    frame["shared_images"] = np.where(shared, frame.loc[shared, "pixels"].nunique(), 0)


def add_shared_pictures(frame: pd.DataFrame, taught: Sequence[pd.DataFrame], asked: Sequence[pd.DataFrame]) -> None:
    """Columns `shared_images` and `looks_shared`, as `add_shared_images`, for naturally degraded images.

    A row of the benchmark slice is compared with the frames `taught`, any other row with the frames `asked`; the
    picture that is shown counts, and so does its clean partner.
    """
    in_bench = frame["split"].eq("bench")

    def known(*columns: str) -> pd.Series:
        found = pd.Series(False, index=frame.index)
        for side, others in ((in_bench, taught), (~in_bench, asked)):
            there = set().union(*(set(other[column].dropna()) for other in others for column in columns))
            for column in columns:
                found |= side & frame[column].isin(there)
        return found

    shared = known("pixels", "shown")
    frame["looks_shared"] = known("dhash")
    frame["shared_images"] = np.where(shared, frame.loc[shared, "pixels"].nunique(), 0)


def cell_means(frame: pd.DataFrame, column: str) -> dict[str, dict[str, float]]:
    """Mean of a column per corruption and severity; cells without a value are left out."""
    means: dict[str, dict[str, float]] = {}
    for (corruption, severity), value in frame.groupby(["corruption", "severity"])[column].mean().dropna().items():
        means.setdefault(corruption, {})[severity] = float(value)
    return means

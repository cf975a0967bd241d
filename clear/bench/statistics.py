"""Statistics of the comparison: cluster bootstrap by image, smallest detectable effect, exact test by image.

Questions about one image are not independent, and neither are the two images of a minimal pair, so whole clusters are
resampled: an image with all its questions, copies and its pair partner. A resample needs the sum and the count
of every cluster only, and how often it drew it, which makes the bootstrap a product of two matrices. Intervals are
percentile intervals; the seed is fixed, so equal predictions give equal intervals. The published evaluation reports no
uncertainty (METHOD §7); everything here is an addition.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from clear.data.groups import connected
from clear.errors import ClearError

if TYPE_CHECKING:
    import pandas as pd

POWER = 0.8
"""Probability with which an effect of size `Interval.detectable` would be detected."""

_BLOCK = 2**22  # cluster draws made at once
_KEPT = 2**25  # most cluster draws, a byte each, that are kept for the next interval


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval.

    `n` rows in `clusters` independent clusters. `detectable` is the smallest true effect that a sample like this one
    detects with 80 % power at the same confidence: (z_{1-α/2} + z_{0.8}) · bootstrap standard error.
    """

    estimate: float
    low: float
    high: float
    n: int
    clusters: int
    detectable: float


@dataclass(frozen=True)
class SignFlip:
    """Questions that only one of two models answers right, and the exact two-sided p-value of their difference."""

    only_a: int
    only_b: int
    p: float


def clusters(frame: "pd.DataFrame") -> np.ndarray:
    """Cluster number of every row (int64, 0…): rows of one sample, and of samples linked by a pair id, share it.

    Clusters are in the order of their samples' names; of linked samples the one counts that comes first in the frame,
    in their first pair by id. Bootstrap draws go by these numbers, so intervals depend on them in their last digits.
    """
    import pandas as pd

    codes, names = pd.factorize(frame["sample"], sort=True)
    pair = frame["pair"].to_numpy(dtype=object)
    has_pair = pd.notna(pair) & (pair != "")
    linked, (pairs, pair_names) = codes[has_pair], pd.factorize(pair[has_pair], sort=True)
    links = np.stack([linked, len(names) + pairs], axis=1)
    cluster = connected(len(names) + len(pair_names), links)[: len(names)]
    leader = np.empty(len(names) + len(pair_names), dtype=np.int64)
    leader[cluster] = np.arange(len(names))
    backwards = linked[np.argsort(pairs, kind="stable")][::-1]
    leader[cluster[backwards]] = backwards  # the last one written stays, hence the first
    return np.unique(leader[cluster[codes]], return_inverse=True)[1].astype(np.int64)


def mean_interval(
    a: np.ndarray, clusters: np.ndarray, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Mean of `a` (n,) with its cluster-bootstrap interval; `clusters` (n,) are integers.

    Raises ClearError for no rows, unequal lengths, a value that is not finite, or fewer than two clusters.
    """
    return combined_interval([(a, clusters)], lambda means: means[0], confidence, resamples, seed)


def paired_difference(
    a: np.ndarray,
    b: np.ndarray,
    clusters: np.ndarray,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean of a − b, where a (n,) and b (n,) score the same rows. Arguments and errors as in mean_interval."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape:
        raise ClearError(f"A paired comparison needs the same rows on both sides, found {len(a)} and {len(b)}.")
    return mean_interval(a - b, clusters, confidence, resamples, seed)


def mean_contrast(
    a: np.ndarray,
    clusters_a: np.ndarray,
    b: np.ndarray,
    clusters_b: np.ndarray,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean of a (n,) minus mean of b (m,): other rows of the same clusters, such as two levels of the same images."""
    parts = [(a, clusters_a), (b, clusters_b)]
    return combined_interval(parts, lambda means: means[0] - means[1], confidence, resamples, seed)


def paired_ratio_difference(
    a: tuple[np.ndarray, np.ndarray],
    b: tuple[np.ndarray, np.ndarray],
    clusters: tuple[np.ndarray, np.ndarray],
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """mean(a[0]) / mean(a[1]) − mean(b[0]) / mean(b[1]): relative robustness of two models on the same rows.

    First the hard scores (n,), then the clean ones (m,), each with the clusters of its rows. Errors as in
    mean_interval; also where a resample has no right answer to a clean question.
    """
    parts = [(one[part], clusters[part]) for one in (a, b) for part in (0, 1)]
    return combined_interval(
        parts, lambda means: means[0] / means[1] - means[2] / means[3], confidence, resamples, seed
    )


def odds_ratio(
    exposed: np.ndarray,
    outcome: np.ndarray,
    strata: np.ndarray,
    clusters: np.ndarray,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval | None:
    """Odds of `outcome` (bool, n) where `exposed` (bool, n) against where not, within `strata` (n,), 1 for no relation.

    The Mantel-Haenszel ratio: what only the strata have in common adds nothing to it, and a stratum without contrast
    has no weight. The interval resamples `clusters` (int, n); a resample without any contrast counts as unbounded on
    either side. `detectable` is the smallest ratio above 1 that would be detected. None where no stratum has a
    contrast; errors as in mean_interval.
    """
    exposed, outcome, groups = np.asarray(exposed, bool), np.asarray(outcome, bool), np.asarray(clusters)
    if len(exposed) == 0 or not exposed.shape == outcome.shape == groups.shape == np.shape(strata):
        raise ClearError(f"{len(exposed)} rows for {len(groups)} cluster numbers: both must be equal and above 0.")
    _, group = np.unique(groups, return_inverse=True)
    _, stratum = np.unique(strata, return_inverse=True)
    count, cells = int(group.max()) + 1, 4 * (int(stratum.max()) + 1)
    if count < 2:
        raise ClearError("All rows belong to one image: the bootstrap needs at least two; evaluate more images.")
    tables = np.zeros((cells, count))
    np.add.at(tables, (4 * stratum + 2 * exposed + outcome, group), 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        estimate = _mantel_haenszel(tables.sum(axis=1)[:, None])[0]
        if np.isnan(estimate):
            return None
        drawn = np.log(_mantel_haenszel(_resampled_tables(tables, resamples, seed)))
    tail = (1 - confidence) / 2
    ends = [
        float(
            np.exp(np.quantile(np.nan_to_num(drawn, nan=end, posinf=np.inf, neginf=-np.inf), q, method="inverted_cdf"))
        )
        for q, end in ((tail, -np.inf), (1 - tail, np.inf))
    ]
    power = NormalDist().inv_cdf(1 - tail) + NormalDist().inv_cdf(POWER)
    spread = float(drawn.std(ddof=1)) if np.isfinite(drawn).all() else math.inf
    return Interval(float(estimate), *ends, len(exposed), count, math.exp(power * spread))


def _resampled_tables(tables: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Counts (K, C) per cluster → counts of `resamples` draws of C clusters with replacement (K, resamples)."""
    return _summed(tables, _multinomial, resamples, seed)


def _multinomial(generator: np.random.Generator, count: int, size: int) -> np.ndarray:
    return generator.multinomial(count, np.full(count, 1 / count), size)


def _mantel_haenszel(tables: np.ndarray) -> np.ndarray:
    """Counts (4 · S, R), per stratum neither, outcome, exposed, both → ratios (R,); NaN where nothing contrasts."""
    neither, outcome, exposed, both = (tables[part::4] for part in range(4))
    total = neither + outcome + exposed + both
    return np.nansum(both * neither / total, axis=0) / np.nansum(outcome * exposed / total, axis=0)


def combined_interval(
    parts: Sequence[tuple[np.ndarray, np.ndarray]],
    statistic: Callable[[np.ndarray], np.ndarray],
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Interval of a function of K means, such as a ratio of two levels; arguments as of `resampled`, `interval_of`."""
    means = resampled(parts, resamples, seed)
    return interval_of(means, statistic, range(len(parts)), confidence)


@dataclass(frozen=True)
class Resampled:
    """K means, as they are (K,) and in every resample (K, R); rows of each (K,), clusters of all and of each.

    The draws are the same for all, so every figure made of these means is paired with every other. NaN where a resample
    has no row of a part.
    """

    means: np.ndarray
    drawn: np.ndarray
    rows: np.ndarray
    clusters: list[np.ndarray]


def resampled(parts: Sequence[tuple[np.ndarray, np.ndarray]], resamples: int = 2000, seed: int = 0) -> Resampled:
    """The means of `parts`, each (values (n,), their clusters (n,)), over draws of whole clusters.

    A cluster number means the same cluster in every part: it is drawn with all its rows, or with none. Raises
    ClearError for an empty part, unequal lengths, or a value that is not finite.
    """
    parts = [(np.asarray(values, float), np.asarray(groups)) for values, groups in parts]
    for values, groups in parts:
        if len(values) == 0 or values.shape != groups.shape:
            raise ClearError(f"{len(values)} scores for {len(groups)} cluster numbers: both must be equal and above 0.")
        if not np.isfinite(values).all():
            raise ClearError(
                f"Score {int(np.flatnonzero(~np.isfinite(values))[0])} is not finite; evaluate this model again."
            )
    names, codes = np.unique(np.concatenate([groups for _, groups in parts]), return_inverse=True)
    count = len(names)
    sums, own, start = [], [], 0
    for values, groups in parts:
        cluster, start = codes[start : start + len(groups)], start + len(groups)
        own.append(np.unique(cluster))
        sums += [np.bincount(cluster, values, count), np.bincount(cluster, minlength=count).astype(float)]
    with np.errstate(invalid="ignore", divide="ignore"):  # `interval_of` names what is empty
        means = _means(np.stack([column.sum() for column in sums]))
        drawn = _means(_resample(np.stack(sums), resamples, seed))
    return Resampled(means, drawn, np.array([len(values) for values, _ in parts]), own)


def interval_of(
    means: Resampled,
    statistic: Callable[[np.ndarray], np.ndarray],
    used: Sequence[int],
    confidence: float = 0.95,
) -> Interval:
    """Interval of `statistic`, which maps the means (K, …) to figures (…) and reads those numbered `used`.

    Raises ClearError for a single cluster, and where a resample has no row of a part that is used or the figure is not
    finite.
    """
    count = len(np.unique(np.concatenate([means.clusters[number] for number in used])))
    if count < 2:
        raise ClearError("All scores belong to one image: the bootstrap needs at least two; evaluate more images.")
    with np.errstate(invalid="ignore", divide="ignore"):
        estimate, drawn = statistic(means.means), statistic(means.drawn)
    if not np.isfinite(drawn).all():
        raise ClearError(
            f"Only {count} images, and not all have every level: too few for an interval; evaluate more images."
        )
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    power = NormalDist().inv_cdf(1 - tail) + NormalDist().inv_cdf(POWER)
    rows = int(sum(means.rows[number] for number in used))
    return Interval(float(estimate), float(low), float(high), rows, count, float(power * drawn.std(ddof=1)))


def _resample(sums: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Cluster sums (K, C) → sums of `resamples` draws of C clusters with replacement (K, resamples)."""
    return _summed(sums, _picked, resamples, seed)


def _picked(generator: np.random.Generator, count: int, size: int) -> np.ndarray:
    picks = generator.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
    return np.bincount(picks.ravel(), minlength=size * count).reshape(size, count)


_Draw = Callable[[np.random.Generator, int, int], np.ndarray]
"""(generator, C, R) → how often each of C clusters is in each of R draws of C clusters, whole numbers (R, C)."""


def _summed(sums: np.ndarray, draw: _Draw, resamples: int, seed: int) -> np.ndarray:
    """Cluster sums (K, C) → their sums in every draw (K, resamples); of whole numbers exact, in any order."""
    count, result, start = sums.shape[1], np.empty((len(sums), resamples)), 0
    kept = count * resamples <= _KEPT
    for times in (_kept_draws if kept else _draws)(draw, count, resamples, seed):
        result[:, start : start + len(times)] = sums @ times.T.astype(float)
        start += len(times)
    return result


def _draws(draw: _Draw, count: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """The draws, in blocks (R, C) of the smallest type that holds them."""
    generator, block = np.random.default_rng(seed), max(1, _BLOCK // count)
    for start in range(0, resamples, block):
        times = draw(generator, count, min(block, resamples - start))
        yield times.astype(np.min_scalar_type(times.max()))


@functools.lru_cache(maxsize=16)
def _kept_draws(draw: _Draw, count: int, resamples: int, seed: int) -> list[np.ndarray]:
    """`_draws` that are there for the next interval: a comparison makes hundreds over equally many clusters."""
    return list(_draws(draw, count, resamples, seed))


def _means(totals: np.ndarray) -> np.ndarray:
    """(2 · K, …) alternating sums and counts → K means; NaN where a count is 0."""
    return totals[::2] / totals[1::2]


def sign_flip(a: np.ndarray, b: np.ndarray, clusters: np.ndarray) -> SignFlip:
    """Exact test of two models' right answers (bool, n) on the same questions, by cluster (int, n).

    Under the null the two models are exchangeable within a cluster, so the difference of its right answers is as likely
    with the other sign; p is the share of all sign patterns whose sum is at least as far from 0 as the observed one.
    With one question per cluster this is McNemar's exact test, which on correlated questions rejects far too often.
    No disagreement gives p = 1. Raises ClearError for unequal lengths.
    """
    a, b, groups = np.asarray(a, bool), np.asarray(b, bool), np.asarray(clusters)
    if not a.shape == b.shape == groups.shape:
        raise ClearError(
            f"A paired comparison needs the same rows on both sides, found {len(a)}, {len(b)} and {len(groups)} "
            "cluster numbers."
        )
    _, codes = np.unique(groups, return_inverse=True)
    sums = np.bincount(codes, a.astype(float) - b).astype(int)
    sizes = np.abs(sums[sums != 0])
    total = int(sizes.sum())
    chance = np.ones(1)  # of every sum −total … total in steps of 2
    for size in sizes:
        other = np.zeros(len(chance) + size)
        other[: len(chance)] += chance / 2
        other[size:] += chance / 2
        chance = other
    beyond = np.abs(np.arange(-total, total + 1, 2)) >= abs(int(sums.sum()))
    return SignFlip(int((a & ~b).sum()), int((b & ~a).sum()), min(1.0, float(chance[beyond].sum())))

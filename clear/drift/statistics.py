"""Have the pictures changed? One decision over many columns, at a false-alarm rate that holds whatever they are.

Night and reference are tables with a row for each picture and the same columns (metrics, and likeness to each kind of
damage). The distance of a column is Wasserstein's first, the area between the two distribution functions in units of
the column: it sees a few pictures that have moved far, where Kolmogorov and Smirnov's sees only how many have moved
(docs/LOG.md has both). The decision takes the column that stands out most. What it must exceed comes from
permutations: if nothing has changed, every choice of as many rows from night and reference together is as good as the
night. Each distance is taken in standard deviations over the permutations, and the largest of each permutation makes
the scale. So the rate is right for columns that go together, of any form, at any number of pictures; nothing is
divided by the number of columns. It holds for pictures that are independent: repeated frames must be left out.

Needs numpy and numba alone.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

PERMUTATIONS = 999
RESAMPLES = 300
TOGETHER = 128
"""Permutations computed at a time, so that their weights stay in the processor's cache."""


@dataclass(frozen=True)
class Column:
    """What was found of one column. `low` and `high` bound the distance; `p` is adjusted for the number of columns."""

    name: str
    distance: float
    low: float
    high: float
    p: float
    night: float  # medians
    reference: float


@dataclass(frozen=True)
class Decision:
    """`drifted` where `p` is at most `alpha`: in at most a share `alpha` of all nights without any change."""

    drifted: bool
    p: float
    alpha: float
    night: int
    reference: int
    columns: tuple[Column, ...]


def decide(
    night: np.ndarray, reference: np.ndarray, names: tuple[str, ...], alpha: float, confidence: float, seed: int = 0
) -> Decision:
    """Compare two tables of finite numbers (n, C) and (N, C) whose columns are called `names`.

    The intervals are for each column alone, at `confidence`, from resampled rows of both tables. They are the basic
    kind, mirrored at the estimate, because resampling adds to a distance as much as sampling did.
    """
    rng = np.random.default_rng(seed)
    pooled = _Pooled(np.vstack([night, reference]))
    found = pooled.distances(permuted(len(night), len(reference), PERMUTATIONS, rng))
    p, adjusted = _p_values(found)
    resampled = pooled.distances(_resampled(len(night), len(reference), RESAMPLES, rng))
    tail = (1 - confidence) / 2
    upper, lower = np.quantile(resampled, [1 - tail, tail], axis=0)
    columns = tuple(
        Column(
            name,
            float(found[0, c]),
            max(0.0, float(2 * found[0, c] - upper[c])),
            max(0.0, float(2 * found[0, c] - lower[c])),
            float(adjusted[c]),
            float(np.median(night[:, c])),
            float(np.median(reference[:, c])),
        )
        for c, name in enumerate(names)
    )
    return Decision(p <= alpha, p, alpha, len(night), len(reference), columns)


def p_value(night: np.ndarray, reference: np.ndarray, permutations: int, rng: np.random.Generator) -> float:
    """The p of `decide` alone."""
    pooled = _Pooled(np.vstack([night, reference]))
    return _p_values(pooled.distances(permuted(len(night), len(reference), permutations, rng)))[0]


def permuted(night: int, reference: int, permutations: int, rng: np.random.Generator) -> np.ndarray:
    """Signed weights (night + reference, 1 + permutations) of the rows: first as they are, then of random choices."""
    weights = np.full((night + reference, 1 + permutations), -1 / reference, np.float32)
    weights[:night, 0] = 1 / night
    for column in range(1, 1 + permutations):
        weights[rng.permutation(night + reference)[:night], column] = 1 / night
    return weights


def _resampled(night: int, reference: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Signed weights (night + reference, resamples): rows of each table drawn with replacement."""
    counts = [rng.multinomial(rows, np.full(rows, 1 / rows), resamples).T / rows for rows in (night, reference)]
    return np.vstack([counts[0], -counts[1]]).astype(np.float32)


class _Pooled:
    """The rows of night and reference together, with their order in each column."""

    def __init__(self, rows: np.ndarray) -> None:
        self.orders = np.argsort(rows.T, axis=1)  # equal values in any order: there is no area between them
        self.gaps = np.diff(np.take_along_axis(rows.T, self.orders, axis=1), axis=1).astype(np.float32)

    def distances(self, weights: np.ndarray) -> np.ndarray:
        """Wasserstein distances (B, C) for signed weights (rows, B), which sum to 1 over one table and -1 over the
        other."""
        found = np.empty((weights.shape[1], len(self.orders)), np.float32)
        for first in range(0, len(found), TOGETHER):
            some = np.ascontiguousarray(weights[:, first : first + TOGETHER])
            found[first : first + TOGETHER] = _compiled()(some, self.orders, self.gaps)
        return found.astype(float)


@functools.cache
def _compiled() -> Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """`_areas`, compiled when it is first needed."""
    import numba

    return numba.njit(cache=True)(_areas)


def _areas(weights: np.ndarray, orders: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """Areas (B, C) below the absolute running sums of float32 weights (rows, B), in each of the orders (C, rows), with
    gaps (C, rows - 1) between the rows. The innermost loops run over B, which the processor does eight at a time."""
    together = weights.shape[1]
    found = np.zeros((together, len(orders)), np.float32)
    running = np.empty(together, np.float32)
    area = np.empty(together, np.float32)
    for column in range(len(orders)):
        for b in range(together):
            running[b] = 0
            area[b] = 0
        for place in range(gaps.shape[1]):
            row, gap = orders[column, place], gaps[column, place]
            for b in range(together):
                running[b] += weights[row, b]
                area[b] += abs(running[b]) * gap
        for b in range(together):
            found[b, column] = area[b]
    return found


def _p_values(found: np.ndarray) -> tuple[float, np.ndarray]:
    """The p of the largest standardised distance, and of each column (C,), from distances (B, C) with the observed ones
    in row 0. A column that is the same everywhere says nothing and has p 1."""
    spread = found.std(axis=0)
    scaled = np.where(spread > 1e-12, (found - found.mean(axis=0)) / np.where(spread > 1e-12, spread, 1), -np.inf)
    largest = scaled.max(axis=1)
    adjusted = (largest[:, None] >= scaled[0]).mean(axis=0)
    return float((largest >= largest[0]).mean()), adjusted

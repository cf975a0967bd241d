"""Which damage pictures look like: a small calibrated classifier on the metrics of clear/drift/measures.py.

Multinomial logistic regression with squares and products, fitted on pictures whose damage is known: every kind and
level of the training data, the presets that could be added to it, and clean ones. Its probabilities are made true by
one temperature, fitted on pictures that it has not seen. How often a kind occurs in new pictures is then found by
adjusting the classes' frequencies until they agree with the mean of the probabilities (Saerens' EM): counting the
likeliest classes would give a rare kind the errors of all common ones.

What resembles nothing is told from that by its distance to the nearest class (Mahalanobis', one covariance for all).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clear.data.records import CLEAN

Cell = tuple[str, str]
"""A kind of damage and its level, as in Sample; (CLEAN, CLEAN) without damage."""

UNDAMAGED: Cell = (CLEAN, CLEAN)
DAMAGED = "any damage"
"""Name of the score that is the probability of all kinds together."""

FEWEST = 5
"""Pictures of a class from which on it is learned."""

RIDGE = 1.0
ROUNDS = 150
FAR = 6.0
"""Standard deviations at which a metric is cut off, so that a picture from elsewhere gives no absurd products."""

STRANGE = 0.99
"""Share of the known pictures that lie within the limit of distance."""


@dataclass(frozen=True)
class Resemblance:
    """A fitted classifier: C classes, M metrics, F features. `prior` is the classes' frequency where it was fitted."""

    cells: tuple[Cell, ...]
    centre: np.ndarray  # (M,)
    scale: np.ndarray  # (M,)
    weights: np.ndarray  # (F, C)
    temperature: float
    prior: np.ndarray  # (C,)
    means: np.ndarray  # (C, M), whitened
    whitening: np.ndarray  # (M, M)
    limit: float

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of damage, without their levels."""
        return tuple(dict.fromkeys(kind for kind, _ in self.cells if kind != CLEAN))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the scores."""
        return (*self.kinds, DAMAGED)

    def probabilities(self, values: np.ndarray) -> np.ndarray:
        """Of each class, (n, C), for metrics (n, M)."""
        return _softmax(self._features(values) @ self.weights / self.temperature)

    def scores(self, probabilities: np.ndarray) -> np.ndarray:
        """Probability of each kind at any level, and of any damage: (n, kinds + 1), from those of the classes."""
        of = np.array([[kind == k for k in self.kinds] for kind, _ in self.cells], float).reshape(len(self.cells), -1)
        return np.column_stack([probabilities @ of, 1 - probabilities[:, self.cells.index(UNDAMAGED)]])

    def strange(self, values: np.ndarray) -> np.ndarray:
        """Distance (n,) to the nearest class over the limit; above 1 a picture is like none that is known."""
        return self._distance(values) / self.limit

    def _distance(self, values: np.ndarray) -> np.ndarray:
        white = self._standard(values) @ self.whitening
        # |a - b|^2 as a sum of products: differences of all rows and classes would fill the memory.
        squares = (white**2).sum(axis=1)[:, None] + (self.means**2).sum(axis=1) - 2 * white @ self.means.T
        return np.sqrt(np.maximum(squares.min(axis=1), 0))

    def _standard(self, values: np.ndarray) -> np.ndarray:
        return np.clip((values - self.centre) / self.scale, -FAR, FAR)

    def _features(self, values: np.ndarray) -> np.ndarray:
        standard = self._standard(values)
        one, two = np.triu_indices(standard.shape[1])
        return np.column_stack([np.ones(len(standard)), standard, standard[:, one] * standard[:, two] / 3])


def fit(values: np.ndarray, cells: Sequence[Cell], held: np.ndarray, held_cells: Sequence[Cell]) -> Resemblance:
    """Fit on metrics (n, M) of known cells; temperature and limit come from `held` (m, M), which is not fitted on.

    A class of fewer than FEWEST pictures is left out, and so are its pictures.
    """
    from scipy.optimize import minimize, minimize_scalar

    counts = {cell: sum(c == cell for c in cells) for cell in sorted(set(cells))}
    known = tuple(cell for cell, count in counts.items() if count >= FEWEST)
    rows = np.array([cell in known for cell in cells], bool)
    values, target = values[rows], np.array([known.index(cell) for cell in cells if cell in known])
    centre, scale = values.mean(axis=0), np.maximum(values.std(axis=0), 1e-6)
    means, whitening = _whitened(np.clip((values - centre) / scale, -FAR, FAR), target, len(known))
    prior = np.bincount(target, minlength=len(known)) / len(target)
    start = Resemblance(known, centre, scale, np.zeros(()), 1.0, prior, means, whitening, 1.0)
    features, truth = start._features(values), np.eye(len(known))[target]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(-1, len(known))
        probability = _softmax(features @ weights)
        said = np.log(np.maximum(probability[np.arange(len(target)), target], 1e-300))
        slope = features.T @ (probability - truth) + RIDGE * weights
        return float(RIDGE / 2 * (weights**2).sum() - said.sum()), slope.ravel()

    found = minimize(
        loss, np.zeros(features.shape[1] * len(known)), jac=True, method="L-BFGS-B", options={"maxiter": ROUNDS}
    )
    weights = found.x.reshape(-1, len(known))
    rows = np.array([cell in known for cell in held_cells], bool)
    target = np.array([known.index(cell) for cell in held_cells if cell in known], int)
    scores = start._features(held[rows]) @ weights

    def surprise(log_temperature: float) -> float:
        probability = _softmax(scores / np.exp(log_temperature))
        return float(-np.log(np.maximum(probability[np.arange(len(target)), target], 1e-300)).mean())

    temperature = float(np.exp(minimize_scalar(surprise, bounds=(-2, 2), method="bounded").x)) if len(target) else 1.0
    limit = float(np.quantile(start._distance(held[rows] if len(target) else values), STRANGE))
    return Resemblance(known, centre, scale, weights, temperature, prior, means, whitening, max(limit, 1e-6))


def _softmax(scores: np.ndarray) -> np.ndarray:
    raised = np.exp(scores - scores.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def _whitened(standard: np.ndarray, target: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Class means and the map to coordinates in which the classes' common covariance is the unit."""
    means = np.stack([standard[target == c].mean(axis=0) for c in range(classes)])
    covariance = np.cov((standard - means[target]).T) + 0.01 * np.eye(standard.shape[1])
    whitening = np.linalg.cholesky(np.linalg.inv(covariance))
    return means @ whitening, whitening


@dataclass(frozen=True)
class Share:
    """How many of the pictures have a kind of damage at a level, and how many of the undamaged reference seem to.

    `trained` is the number of such copies in the training data, 0 for a preset that is not part of it.
    """

    kind: str
    level: str
    share: float
    low: float
    high: float
    reference: float
    trained: int


def shares(probabilities: np.ndarray, prior: np.ndarray, rounds: int = 100) -> np.ndarray:
    """How frequent each class is among pictures (C,), from its probabilities (n, C) where the frequencies were
    `prior`."""
    found = prior.copy()
    for _ in range(rounds):
        joint = probabilities * (found / prior)
        found = (joint / joint.sum(axis=1, keepdims=True)).mean(axis=0)
    return found


def share_intervals(
    probabilities: np.ndarray, prior: np.ndarray, confidence: float, resamples: int = 100, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds (C,) and (C,) of `shares`, from resampled pictures."""
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(probabilities), size=(resamples, len(probabilities)))
    found = np.stack([shares(probabilities[draw], prior, 50) for draw in draws])
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return low, high


def confusion(model: Resemblance, values: np.ndarray, cells: Sequence[Cell]) -> np.ndarray:
    """Counts (C, C) of true class (row) against the likeliest one (column), for pictures not fitted on."""
    table = np.zeros((len(model.cells),) * 2, int)
    rows = np.array([cell in model.cells for cell in cells], bool)
    if rows.any():
        true = [model.cells.index(cell) for cell in cells if cell in model.cells]
        np.add.at(table, (true, model.probabilities(values[rows]).argmax(axis=1)), 1)
    return table


def calibration_error(model: Resemblance, values: np.ndarray, cells: Sequence[Cell]) -> float:
    """Mean gap between how sure the classifier is of its likeliest class and how often it is right, in ten bins."""
    rows = np.array([cell in model.cells for cell in cells], bool)
    if not rows.any():
        return 0.0
    true = np.array([model.cells.index(cell) for cell in cells if cell in model.cells])
    probabilities = model.probabilities(values[rows])
    sure, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == true
    bins = np.minimum((sure * 10).astype(int), 9)
    gaps = [abs(sure[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    return float(sum(gaps))

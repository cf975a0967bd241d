"""The numbers of a comparison: both sides on the same questions, with paired differences and their uncertainty.

METHOD §7 for the quantities; the published evaluation reports no uncertainty, everything of that kind is an addition.
Intervals are the cluster bootstrap of clear.bench.statistics (an image with all its questions, and its partner of a
minimal pair, is one cluster; the seed is fixed). Beside them stands an exact test that flips the signs of whole
clusters; its p-values are corrected by Holm's method over the comparisons of one table. A difference is called
certain if it passes both.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from clear.bench import scoring, statistics
from clear.bench.models import MODELS
from clear.bench.predictions import KEY
from clear.bench.scoring import HARD, SEVERITIES
from clear.bench.statistics import Interval
from clear.data.records import CLEAN
from clear.errors import ClearError
from clear.project.compare.load import BENCH, Side
from clear.report.claims import LEVELS, NAMES, Bootstrap

if TYPE_CHECKING:
    import pandas as pd

TITLES = NAMES | {"base": "base model"}
"""What a report calls each model here, where `base` is a side of the comparison."""

PSNR_SLACK, SSIM_SLACK = 1e-3, 1e-5
"""Largest difference in the measured damage (dB; SSIM) between two machines that have the same picture."""


@dataclass(frozen=True)
class Difference:
    """Head minus base on the same rows: a share in [0, 1] per side, their difference and its interval.

    `what` is `correct` (accuracy) or `restored` (call rate); `task` and `corruption` are empty where all are meant.
    Interval and `detectable` (smallest true effect found with 80 % power) are None if fewer than two clusters have
    rows. `base_interval` and `head_interval` are those of each side alone. `p` is of the exact test by cluster and
    `holm` the corrected one.
    """

    model: str
    what: str
    severity: str
    task: str
    corruption: str
    base: float
    head: float
    estimate: float
    low: float | None
    high: float | None
    detectable: float | None
    n: int
    clusters: int
    only_base: int
    only_head: int
    p: float
    holm: float
    confidence: float
    base_interval: tuple[float, float] | None = None
    head_interval: tuple[float, float] | None = None

    @property
    def sign(self) -> int:
        """+1 or −1 if head is certainly above or below base: interval and corrected p-value agree; else 0."""
        if self.low is None or self.holm > 1 - self.confidence:
            return 0
        return int(self.low > 0) - int(self.high < 0)


@dataclass(frozen=True)
class Joined:
    """The rows that both sides of one model share, one line per question, with columns *_base and *_head.

    `cluster` is the bootstrap cluster. `base_rows` and `head_rows` count the rows of each side alone.
    """

    rows: "pd.DataFrame"
    base_rows: int
    head_rows: int

    @property
    def restricted(self) -> bool:
        """Whether a row of either side had to be left out."""
        return not len(self.rows) == self.base_rows == self.head_rows


@dataclass(frozen=True)
class Comparison:
    """Everything that was found. `obstacles` say why the sides cannot be compared, `notes` what a reader must know.

    `levels` holds accuracy per model and severity, `tasks` and `corruptions` the same per task and corruption,
    `calls` the restoration call rates, `relative` the difference in relative robustness (hard / clean) per model where
    it has an interval. All are empty if the profiles differ.
    """

    base: Side
    head: Side
    settings: Bootstrap
    obstacles: list[str]
    notes: list[str]
    joined: dict[str, Joined] = field(default_factory=dict)
    levels: list[Difference] = field(default_factory=list)
    tasks: list[Difference] = field(default_factory=list)
    corruptions: list[Difference] = field(default_factory=list)
    calls: list[Difference] = field(default_factory=list)
    relative: dict[str, Interval] = field(default_factory=dict)

    def level(self, model: str, severity: str) -> Difference | None:
        """The difference in accuracy of a model at a severity, if it was measured."""
        return next((d for d in self.levels if (d.model, d.severity) == (model, severity)), None)

    def robustness(self, model: str) -> dict[str, dict[str, float | None]]:
        """Absolute and relative robustness (METHOD §7) of each side on the shared rows."""
        by_level = {d.severity: d for d in self.levels if d.model == model}
        return {
            "base": scoring.robustness({severity: d.base for severity, d in by_level.items()}),
            "head": scoring.robustness({severity: d.head for severity, d in by_level.items()}),
        }


def compare(base: Side, head: Side, model: str, settings: Bootstrap, detail: bool = True) -> Comparison:
    """Compare all models that both sides have; `model` is the one that must not be missing.

    Without `detail` only the accuracy per level is computed, which is all that the gate needs.
    """
    obstacles = _profile_obstacles(base, head)
    if obstacles:
        return Comparison(base, head, settings, obstacles, [])
    obstacles, notes = _missing(base, head, model)
    joined, lost = {}, []
    for name in (name for name in MODELS if name in base.frames and name in head.frames):
        found = join(base, head, name)
        if found.rows.cluster.nunique() < 2:
            lost.append(name)
        else:
            joined[name] = found
    if lost:
        whose = "" if len(lost) > 1 and not joined else f" for {_names(lost)}"
        changed = [path for path in BENCH if base.hash_of(path) != head.hash_of(path)]
        why = f"; dvc.lock has another version of {' and '.join(changed)}" if changed else ""
        obstacles.append(f"base and head share no benchmark images{whose}{why}")
    notes += _benchmark_notes(base, head, joined)
    levels = holm([d for name, found in joined.items() for d in per_level(found.rows, name, "correct", settings)])
    obstacles += _level_obstacles(levels, model) if model in joined else []
    result = Comparison(base, head, settings, obstacles, notes, joined, levels)
    return _with_detail(result) if detail else result


def _profile_obstacles(base: Side, head: Side) -> list[str]:
    for label, side in (("base", base), ("head", head)):
        if not side.profile:
            return [f"{label} ({side.origin}) has no params.yaml that names a profile"]
    if base.profile != head.profile:
        return [f"the profiles differ: base has {base.profile}, head has {head.profile}"]
    return []


def _missing(base: Side, head: Side, model: str) -> tuple[list[str], list[str]]:
    obstacles = []
    for label, side, other in (("base", base, head), ("head", head, base)):
        lost = [name for name in MODELS if name not in side.frames and (name in other.frames or name == model)]
        if lost:
            reasons = sorted({side.missing.get(name, "no such file") for name in lost})
            obstacles.append(f"{label} has no predictions of {_names(lost)} ({'; '.join(reasons)})")
    neither = [name for name in MODELS if name not in base.frames and name not in head.frames and name != model]
    return obstacles, [f"Neither side has predictions of {_names(neither)}."] if neither else []


def _level_obstacles(levels: list[Difference], model: str) -> list[str]:
    """Clean and hard decide: without an interval for both there is no verdict."""
    measured = {d.severity for d in levels if d.model == model and d.low is not None}
    lost = [LEVELS[severity] for severity in (CLEAN, HARD) if severity not in measured]
    return [f"{TITLES[model]} shares fewer than two images at {' and '.join(lost)}"] if lost else []


def _names(models: Iterable[str]) -> str:
    return ", ".join(f"“{TITLES[name]}”" for name in models)


def join(base: Side, head: Side, model: str) -> Joined:
    """The questions of one model that both sides asked about the same picture.

    Where dvc.lock gives both sides the same benchmark, that is every common key with the same text and gold answer.
    Otherwise sample ids prove nothing, since another seed reuses them: all common questions of the sample must agree
    in text and gold answer, and the damage measured on the degraded picture (PSNR and SSIM against the clean one, to
    rounding) must be equal; a clean picture counts as the same if one of its degraded copies does.
    """
    same_clean, same_degraded = ("" != base.hash_of(path) == head.hash_of(path) for path in BENCH)
    left, right = base.frames[model], head.frames[model]
    rows = left.merge(right, on=KEY, suffixes=("_base", "_head"), validate="one_to_one")
    agree = (rows.text_base == rows.text_head) & (rows.answer_base == rows.answer_head)
    keep = agree.groupby(rows["sample"]).transform("all").astype(bool)
    degraded = rows.severity != CLEAN
    sure = np.isclose(rows.psnr_degraded_base, rows.psnr_degraded_head, rtol=0, atol=PSNR_SLACK)
    sure &= np.isclose(rows.ssim_degraded_base, rows.ssim_degraded_head, rtol=0, atol=SSIM_SLACK)
    same = degraded & (same_degraded | sure)
    copies = same.groupby([rows["sample"], rows.corruption, rows.severity]).transform("all").astype(bool)
    pictured = (copies & degraded).groupby(rows["sample"]).transform("any").astype(bool)
    keep &= (degraded & copies) | (~degraded & (same_clean | pictured))
    rows = rows[keep].sort_values(KEY).reset_index(drop=True)
    rows["pair"], rows["task"] = rows.pair_base, rows.task_base
    rows["cluster"] = statistics.clusters(rows) if len(rows) else np.zeros(0, np.int64)
    return Joined(rows, len(left), len(right))


def _benchmark_notes(base: Side, head: Side, joined: dict[str, Joined]) -> list[str]:
    restricted = {name: shared for name, shared in joined.items() if shared.restricted}
    hashes = [(path, base.hash_of(path), head.hash_of(path)) for path in BENCH]
    changed = [path for path, old, new in hashes if old and new and old != new]
    unknown = [path for path, old, new in hashes if not (old and new)]
    notes = []
    if restricted:
        name, shared = min(restricted.items(), key=lambda item: len(item[1].rows))
        why = (
            f"The benchmark changed (dvc.lock: {', '.join(changed)})" if changed else "The sides asked other questions"
        )
        notes.append(
            f"{why}: everything below is restricted to the questions that both sides asked about the same pictures, "
            f"{len(shared.rows):,} of {shared.base_rows:,} (base) and {shared.head_rows:,} (head), about "
            f"{shared.rows['sample'].nunique():,} images (fewest: {TITLES[name]})."
        )
    elif changed and joined:
        notes.append(
            f"dvc.lock has another benchmark at head ({', '.join(changed)}), but every question, gold answer and "
            "measured damage agrees: nothing was left out."
        )
    if unknown and joined:
        notes.append(
            f"dvc.lock does not say on both sides which benchmark was used ({', '.join(unknown)}); questions were "
            "matched by text, gold answer and measured damage."
        )
    return notes


def difference(
    rows: "pd.DataFrame",
    what: str,
    settings: Bootstrap,
    model: str,
    severity: str,
    task: str = "",
    corruption: str = "",
) -> Difference:
    """Head minus base over joined `rows` (at least one). `holm` is p until `holm` corrects it."""
    a, b = rows[f"{what}_head"].to_numpy(), rows[f"{what}_base"].to_numpy()
    groups = rows.cluster.to_numpy()
    clusters = len(np.unique(groups))
    interval = statistics.paired_difference(a, b, groups, **vars(settings)) if clusters > 1 else None
    test = statistics.sign_flip(a, b, groups)
    return Difference(
        model=model,
        what=what,
        severity=severity,
        task=task,
        corruption=corruption,
        base=float(b.mean()),
        head=float(a.mean()),
        # One subtraction of sums, so that equal sides give exactly 0.
        estimate=(int(a.sum()) - int(b.sum())) / len(a),
        low=interval and interval.low,
        high=interval and interval.high,
        detectable=interval and interval.detectable,
        n=len(rows),
        clusters=clusters,
        only_base=test.only_b,
        only_head=test.only_a,
        p=test.p,
        holm=test.p,
        confidence=settings.confidence,
    )


def holm(differences: list[Difference]) -> list[Difference]:
    """The same differences with p-values corrected by Holm's method over this list (Holm 1979, step-down)."""
    order = sorted(range(len(differences)), key=lambda index: differences[index].p)
    corrected, largest = [1.0] * len(differences), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(differences) - rank) * differences[index].p))
        corrected[index] = largest
    return [replace(difference, holm=p) for difference, p in zip(differences, corrected, strict=True)]


def per_level(rows: "pd.DataFrame", model: str, what: str, settings: Bootstrap) -> list[Difference]:
    """The difference of one model at every severity that its joined rows have, not yet corrected."""
    rows = rows[["severity", "cluster", f"{what}_base", f"{what}_head"]]  # a selection copies all that it has
    return [
        difference(rows[rows.severity == severity], what, settings, model, severity)
        for severity in scoring.present(rows.severity)
    ]


def _per_cell(rows: "pd.DataFrame", model: str, column: str, settings: Bootstrap) -> list[Difference]:
    """Accuracy per value of `column` and severity, corrected together; a clean image has no corruption to show."""
    if column == "corruption":
        rows = rows[rows.severity != CLEAN]
    rows = rows[[column, "severity", "cluster", "correct_base", "correct_head"]]  # a cell copies all that it has
    cells = rows.groupby([column, "severity"], sort=True)
    order = sorted(cells.groups, key=lambda cell: (cell[0], SEVERITIES.index(cell[1])))
    made = [difference(cells.get_group(c), "correct", settings, model, c[1], **{column: c[0]}) for c in order]
    return holm(made)


def _with_detail(result: Comparison) -> Comparison:
    settings, tasks, corruptions, calls = result.settings, [], [], []
    for name, found in result.joined.items():
        tasks += _per_cell(found.rows, name, "task", settings)
        corruptions += _per_cell(found.rows, name, "corruption", settings)
        calls += per_level(found.rows, name, "restored", settings)
    levels = [_with_own_intervals(one, result.joined[one.model].rows, settings) for one in result.levels]
    relative = {name: found for name, one in result.joined.items() if (found := _relative(one.rows, settings))}
    return replace(result, levels=levels, tasks=tasks, corruptions=corruptions, calls=holm(calls), relative=relative)


def _relative(rows: "pd.DataFrame", settings: Bootstrap) -> Interval | None:
    """Head minus base of hard / clean accuracy; None where either level has fewer than two clusters, or too few right
    answers: a resample without one to a clean question has no ratio."""
    parts = [rows[rows.severity == severity] for severity in (HARD, CLEAN)]
    if any(part.cluster.nunique() < 2 or not (part.correct_base.any() and part.correct_head.any()) for part in parts):
        return None
    head, base, groups = (
        [part[name].to_numpy() for part in parts] for name in ("correct_head", "correct_base", "cluster")
    )
    with contextlib.suppress(ClearError):  # nothing else is wrong with these scores
        return statistics.paired_ratio_difference(head, base, groups, **vars(settings))
    return None


def _with_own_intervals(difference: Difference, rows: "pd.DataFrame", settings: Bootstrap) -> Difference:
    if difference.low is None:
        return difference
    rows = rows[rows.severity == difference.severity]
    groups, own = rows.cluster.to_numpy(), []
    for side in ("base", "head"):
        interval = statistics.mean_interval(rows[f"correct_{side}"].to_numpy(), groups, **vars(settings))
        own.append((interval.low, interval.high))
    return replace(difference, base_interval=own[0], head_interval=own[1])


def changed_answers(joined: Joined) -> "pd.DataFrame":
    """The joined rows whose extracted answer differs between the sides."""
    return joined.rows[joined.rows.prediction_base != joined.rows.prediction_head]


def identical(joined: Joined) -> bool:
    """Whether both sides gave every shared question the same output."""
    return not joined.restricted and bool((joined.rows.output_base == joined.rows.output_head).all())

"""The leaderboard of MMD-Bench: many models on the same questions, with intervals and a paired comparison (METHOD §7).

All figures are over the questions that the models share (clear.bench.vlmeval.collect), so a difference of two figures
is the paired one. A benchmark's figure is that of clear.bench.vlmeval.scores. The average of a level is over the
benchmarks that the tables have there: R-Bench-Dis, which is damaged as published, counts as hard and nowhere else, so
the hard average may be over seven benchmarks and those of other levels over six. Robustness is over the benchmarks that
have both clean and hard, and relative robustness over the questions that they have at both
(clear.bench.vlmeval.scores_levels). Intervals are those of clear.bench.statistics. A cluster is a question with its
rotations or its pair partner, and with all questions about its picture where a manifest names the picture, at all
levels.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from clear.bench import statistics
from clear.bench.scoring import HARD, present
from clear.bench.vlmeval import names, scores
from clear.bench.vlmeval.collect import groups_of, shared
from clear.bench.vlmeval.published import BENCHMARKS, canonical, mean_restored
from clear.bench.vlmeval.scores_levels import Apart, apart
from clear.data.records import CLEAN
from clear.errors import ClearError

if TYPE_CHECKING:
    import pandas as pd

CONFIDENCE, RESAMPLES, SEED = 0.95, 2000, 0


def leaderboard(frame: "pd.DataFrame", reference: str = "", judge: str = "") -> dict:
    """Every figure as plain values; shares in [0, 1]. `frame` is collect.read's, scored; `judge` is named in the rows.

    `models[name]["levels"][level]["benchmarks"][bench]` and `["average"]` are cells: estimate, low, high (None for too
    few questions), n, clusters, and with a `reference` minus_reference: estimate, low, high. `robustness` has the cells
    absolute and relative. A model without one of the benchmarks has no average. Raises ClearError as collect.shared and
    for a reference that is none of the models.
    """
    models = sorted(set(frame["model"]), key=str.casefold)
    if reference and reference not in models:
        raise ClearError(f"--reference {reference}: no table is of this model; name one of {', '.join(models)}.")
    frame = frame.assign(group=groups_of(frame))
    frame, notes = shared(frame)
    frame = frame.assign(cluster=_clusters(frame))
    circular = {bench: _circular(bench, rows) for bench, rows in frame.groupby("bench")}
    benches = sorted(circular, key=_place)
    levels = present(frame["severity"])
    unequal = {bench: apart(frame[frame["bench"] == bench], circular[bench] is True) for bench in benches}
    unequal = {bench: found for bench, found in unequal.items() if found is not None}
    compared = {
        bench: _units(found.within(frame[frame["bench"] == bench]), circular)
        for bench, found in unequal.items()
        if found.shared is not None
    }
    board = _Board(_units(frame, circular), benches, levels, reference, compared)
    return {
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        "seed": SEED,
        "reference": reference or None,
        "levels": levels,
        "benchmarks": {bench: _about(frame[frame["bench"] == bench], circular[bench]) for bench in benches},
        "averaged": board.averaged,
        "robust": board.robust,
        "models": {
            model: board.model(model) | _made(frame[frame["model"] == model], judge, board.averaged) for model in models
        },
        "notes": notes + _notes(frame, circular, unequal, board),
    }


def _place(bench: str) -> tuple:
    known = [canonical(name) for name in BENCHMARKS]
    name = canonical(bench)
    return (known.index(name) if name in known else len(known), bench)


def _clusters(frame: "pd.DataFrame") -> np.ndarray:
    bench = frame["bench"] + "/"
    return statistics.clusters(frame.assign(sample=bench + frame["picture"], pair=bench + frame["group"]))


def _circular(bench: str, rows: "pd.DataFrame") -> bool | None:
    """Whether MMBench is scored by rotations: only where the tables of every model have them. None for others."""
    if names.family(bench) != "mmbench":
        return None
    return all((scores.grouping(bench, part) or ("",))[0] == "circular" for _, part in rows.groupby("model"))


def _units(frame: "pd.DataFrame", circular: dict[str, bool | None]) -> "pd.DataFrame":
    """What a figure is the mean of: a row each, or a group of rotations; model, bench, severity, corruption, unit,
    cluster, value."""
    import pandas as pd

    columns = ["model", "bench", "severity", "corruption"]
    grouped = frame["bench"].map(circular).eq(True)
    plain = frame.loc[~grouped, [*columns, "index", "cluster", "score"]]  # first: an input column may be called `value`
    plain = plain.rename(columns={"index": "unit", "score": "value"})
    rows = frame[grouped]
    if rows.empty:
        return plain
    rows = rows.assign(
        right=rows["score"] == 1, first=[names.number(index) < scores.CIRCULAR for index in rows["index"]]
    )
    groups = rows.groupby([*columns, "group"], sort=True).agg(
        value=("right", "all"), first=("first", "any"), cluster=("cluster", "first")
    )
    groups = groups[groups["first"]].reset_index().rename(columns={"group": "unit"})
    return pd.concat([plain, groups[[*columns, "unit", "cluster", "value"]].astype({"value": float})])


def _about(rows: "pd.DataFrame", circular: bool | None) -> dict:
    """Questions and corruptions of a benchmark per level, which all its models share."""
    levels = {}
    for level in present(rows["severity"]):
        part = rows[rows["severity"] == level]
        levels[level] = {
            "rows": len(part) // part["model"].nunique(),
            "corruptions": sorted(set(part["corruption"])),
        }
    return {"circular": circular, "levels": levels}


def _made(rows: "pd.DataFrame", judge: str, averaged: dict[str, list[str]]) -> dict:
    """How the figures of one model came about, and how often it restored, if a record beside its tables says so."""
    restored: dict[str, dict] = {}
    for level, benches in averaged.items():
        shares = {}
        for bench in benches:
            said = rows[(rows["severity"] == level) & (rows["bench"] == bench)]["restored"]
            shares[bench] = float(said.astype(float).mean()) if len(said) and said.notna().all() else None
        restored[level] = {"benchmarks": shares, "average": mean_restored(shares)}
    kinds = set(rows["corruption"]) - {CLEAN, scores.OWN}
    return {
        "source": "measured",
        "judge": judge or "none: letters, texts and exact match",
        "protocol": "–" if not kinds else "one type per picture" if kinds == {names.MIXED} else f"{len(kinds)} types",
        "unmatched": int((rows["how"] == "unmatched").sum()),
        "restored": restored,
    }


def _notes(
    frame: "pd.DataFrame", circular: dict[str, bool | None], unequal: dict[str, Apart], board: "_Board"
) -> list[str]:
    notes = [
        f"{bench}: a table has no rotations; every row counts." for bench, kind in circular.items() if kind is False
    ]
    notes += [f"{found.note(bench, 'relative robustness')}." for bench, found in unequal.items()]
    notes += [f"{note}." for note in [names.further(frame["corruption"])] if note]
    for level, benches in board.averaged.items():
        for model in board.models:
            lacking = [bench for bench in benches if not board.has(model, bench, level)]
            if lacking:
                notes.append(f"{model} has no average at {level}: no table of {', '.join(lacking)}.")
    return notes


class _Board:
    """Cells of the leaderboard: figures of the means of all models, benchmarks and levels, over the same draws."""

    def __init__(
        self,
        units: "pd.DataFrame",
        benches: list[str],
        levels: list[str],
        reference: str,
        compared: "dict[str, pd.DataFrame]",
    ) -> None:
        """`compared` are the units of relative robustness, of the benchmarks whose levels have other ones."""
        self.reference = reference
        self.models = list(dict.fromkeys(units["model"]))
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        self._parts = _numbered(units, parts)
        self._compared = {key: found for key, found in self._parts.items() if key[1] not in compared}
        for part in compared.values():
            self._compared |= _numbered(part, parts)
        there = {(bench, level) for _, bench, level in self._parts}
        self.averaged = {level: [bench for bench in benches if (bench, level) in there] for level in levels}
        self.robust = [b for b in benches if (b, CLEAN) in there and (b, HARD) in there]
        self._means = statistics.resampled(parts, RESAMPLES, SEED)

    def has(self, model: str, bench: str, level: str) -> bool:
        """Whether a model has a figure there."""
        return (model, bench, level) in self._parts

    def model(self, model: str) -> dict:
        """levels and robustness of one model."""
        levels = {}
        for level, benches in self.averaged.items():
            cells = {bench: self._cell([(model, [bench], level)]) for bench in benches}
            levels[level] = {"benchmarks": cells, "average": self._cell([(model, benches, level)])}
        hard, clean = ((model, self.robust, level) for level in (HARD, CLEAN))
        relative = self._cell([hard, clean], self._compared)
        robustness = {"absolute": self._cell([hard]), "relative": relative}
        return {"levels": levels, "robustness": robustness}

    def _cell(self, of: list[tuple[str, list[str], str]], parts: "_Numbers | None" = None) -> dict | None:
        """The figure of (model, benchmarks, level), or of the ratio of two, and its difference to the reference's."""
        parts = self._parts if parts is None else parts
        own = [_weights(parts, *terms) for terms in of]
        if not all(own):
            return None
        cell = self._interval(lambda means: _ratio(means, own), own)
        if self.reference and self.reference != of[0][0]:
            other = [_weights(parts, self.reference, *rest) for _, *rest in of]
            cell["minus_reference"] = None
            if all(other):
                cell["minus_reference"] = self._interval(
                    lambda means: _ratio(means, own) - _ratio(means, other), [*own, *other]
                )
        return cell

    def _interval(self, statistic: Callable[[np.ndarray], Any], terms: list[tuple[list[int], np.ndarray]]) -> dict:
        used = [part for parts, _ in terms for part in parts]
        try:
            found = statistics.interval_of(self._means, statistic, used, CONFIDENCE)
        except ClearError:  # too few questions: a figure without ends
            with np.errstate(invalid="ignore", divide="ignore"):
                estimate = float(statistic(self._means.means))
            return {
                "estimate": estimate if np.isfinite(estimate) else None,
                "low": None,
                "high": None,
                "n": int(self._means.rows[used].sum()),
                "clusters": len(np.unique(np.concatenate([self._means.clusters[part] for part in used]))),
            }
        return {name: getattr(found, name) for name in ("estimate", "low", "high", "n", "clusters")}


_Numbers = dict[tuple[str, str, str], list[int]]
"""Numbers of the means of each model, benchmark and level, one for each corruption."""


def _numbered(units: "pd.DataFrame", parts: list[tuple[np.ndarray, np.ndarray]]) -> _Numbers:
    """The numbers that the values of `units` have in `parts`, to which they are added."""
    numbers = {}
    for key, rows in units.groupby(["model", "bench", "severity"]):
        own = _parts(rows)
        numbers[key] = [*range(len(parts), len(parts) + len(own))]
        parts += own
    return numbers


def _weights(numbers: _Numbers, model: str, benches: list[str], level: str) -> tuple[list[int], np.ndarray] | None:
    """(means, weights) whose sum is the mean over corruptions and then benchmarks; None if one is lacking."""
    found = [numbers.get((model, bench, level)) for bench in benches]
    if not found or None in found:
        return None
    weights = [1 / (len(found) * len(parts)) for parts in found for _ in parts]
    return [part for parts in found for part in parts], np.array(weights)


def _ratio(means: np.ndarray, terms: list[tuple[list[int], np.ndarray]]) -> np.ndarray:
    """The first weighted sum of means (K, …), over the second one if there is one."""
    sums = [weights @ means[parts] for parts, weights in terms]
    return sums[0] if len(sums) == 1 else sums[0] / sums[1]


def _parts(rows: "pd.DataFrame") -> list[tuple[np.ndarray, np.ndarray]]:
    """(values, clusters) of each corruption; of all at once where they have the same clusters, and so equal weight."""
    values, clusters = rows["value"].to_numpy(float), rows["cluster"].to_numpy()
    kinds = rows["corruption"].to_numpy()
    parts = [(values[kinds == kind], clusters[kinds == kind]) for kind in sorted(set(kinds))]
    first = np.sort(parts[0][1])
    if all(np.array_equal(np.sort(part[1]), first) for part in parts[1:]):
        return [(values, clusters)]
    return parts

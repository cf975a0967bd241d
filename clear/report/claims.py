"""The claims of the project, each decided from paired predictions: held, does not hold, or not measured.

A claim is a rule on an estimate (METHOD §7 for the quantities); `certain` says whether the whole confidence interval
keeps the rule, so that a result within the noise is never told as a finding. Models are compared on exactly the same
rows; a difference in rows stops the report.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from clear.bench import statistics
from clear.bench.models import MODELS
from clear.bench.predictions import KEY
from clear.bench.scoring import HARD, SEVERITIES, present
from clear.data.records import CLEAN
from clear.errors import ClearError

if TYPE_CHECKING:
    import pandas as pd

NAMES = {
    "base": "base",
    "sft_direct": "direct fine-tuning",
    "sft": "SFT, restoring",
    "reencode": "SFT + bridge, re-encoded",
    "bridge": "SFT + bridge",
    "grpo": "CLEAR",
}
"""What the report calls each model."""

LEVELS = {"clean": "clean", "low": "low", "mid": "mid", "high": "hard"}
"""What the report calls each severity."""

MARGIN = 0.01
"""Loss of accuracy that still counts as none (one point)."""

CLEAN_TARGET = 0.85


@dataclass(frozen=True)
class Bootstrap:
    """Settings of every interval in the report."""

    confidence: float = 0.95
    resamples: int = 2000
    seed: int = 0


@dataclass(frozen=True)
class Claim:
    """One claim. Numbers are shares in [0, 1], or with `unit` odds ratios above 0; None where nothing was measured, and
    for an end of an interval that is not bounded.

    `held` follows the stated rule; `certain` is true if the whole interval keeps it too.
    """

    id: str
    text: str
    rule: str
    measured: bool
    held: bool
    certain: bool
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    detectable: float | None = None
    n: int = 0
    clusters: int = 0
    note: str = ""
    unit: str = "share"

    @property
    def verdict(self) -> str:
        """`held`, `held, not certain`, `does not hold` or `not measured`."""
        if not self.measured:
            return "not measured"
        if not self.held:
            return "does not hold"
        return "held" if self.certain else "held, not certain"


@dataclass(frozen=True)
class _Comparison:
    """Model `a` against `b` on the same rows: a above b with the whole interval, or a − b not below a margin."""

    id: str
    a: str
    b: str
    severity: str
    text: str
    margin: float = 0.0

    @property
    def rule(self) -> str:
        """The rule in words."""
        names = f"{NAMES[self.a]} minus {NAMES[self.b]}, {LEVELS[self.severity]}"
        if self.margin == 0:
            return f"{names}: above 0 with its whole interval"
        return f"{names}: not below −{-self.margin * 100:.0f} point"


_HARD_GAIN = _Comparison(
    "hard_gain", "grpo", "base", HARD, "CLEAR answers more questions about hard-degraded images than the base model."
)
_CLEAN_KEPT = _Comparison(
    "clean_kept",
    "grpo",
    "base",
    CLEAN,
    "CLEAR loses at most one point on clean images against the base model.",
    -MARGIN,
)
_BEATS_DIRECT = _Comparison(
    "beats_direct", "grpo", "sft_direct", HARD, "CLEAR answers more questions at hard than direct fine-tuning does."
)
_BRIDGE_KEPT = _Comparison(
    "bridge_kept",
    "bridge",
    "reencode",
    HARD,
    "Answering through the bridge loses at most one point at hard against decoding and re-encoding the image.",
    -MARGIN,
)

COMPARISONS = (_HARD_GAIN, _CLEAN_KEPT, _BEATS_DIRECT, _BRIDGE_KEPT)


def paired(
    frames: dict[str, "pd.DataFrame"],
    a: str,
    b: str,
    severity: str | None = None,
    file: str = "data/predictions/{}.parquet",
    remedy: str = "run `dvc repro evaluate@{}`",
) -> tuple:
    """Scores of models `a` and `b` on the same rows and their clusters: (bool (n,), bool (n,), int64 (n,)).

    Raises ClearError naming a row that one of them lacks or whose question differs; `file` and `remedy` say of a name
    in `frames` where its rows are kept and how they are made again.
    """
    left, right = (frames[name].set_index(KEY).sort_index() for name in (a, b))
    odd = left.index.symmetric_difference(right.index)
    if len(odd):
        lacking = a if odd[0] in right.index else b
        raise ClearError(
            f"{file.format(lacking)} lacks {len(odd)} rows of the comparison of {a} and {b}, the first is "
            f"{'/'.join(map(str, odd[0]))}: both must answer the same benchmark; {remedy.format(lacking)}."
        )
    changed = (left[["text", "answer"]] != right[["text", "answer"]]).any(axis=1).to_numpy()
    if changed.any():
        raise ClearError(
            f"{file.format(a)} and {file.format(b)} hold another question or gold answer for row "
            f"{'/'.join(map(str, left.index[changed][0]))}: they come from two benchmarks; {remedy.format(a)}, and for "
            f"{b} likewise."
        )
    if severity is not None:
        keep = left.index.get_level_values("severity") == severity
        left, right = left[keep], right[keep]
    return left.correct.to_numpy(), right.correct.to_numpy(), statistics.clusters(left.reset_index())


def evaluate(frames: dict[str, "pd.DataFrame"], bootstrap: Bootstrap) -> list[Claim]:
    """All claims, in the order of the report, for the models in `frames` (subset of MODELS)."""
    return [
        _base_clean(frames, bootstrap),
        _base_drops(frames, bootstrap),
        _compare(frames, bootstrap, _HARD_GAIN),
        _compare(frames, bootstrap, _CLEAN_KEPT),
        _calls_needed(frames, bootstrap),
        _compare(frames, bootstrap, _BEATS_DIRECT),
        _compare(frames, bootstrap, _BRIDGE_KEPT),
    ]


def to_json(claims: list[Claim], frames: dict, bootstrap: Bootstrap) -> dict:
    """The tracked form of the claims table, keyed by claim, without anything that depends on clock or machine."""
    return {
        "claims": {
            claim.id: {key: value for key, value in asdict(claim).items() if key != "id"} | {"verdict": claim.verdict}
            for claim in claims
        },
        "held": sum(claim.held for claim in claims),
        "not_measured": sum(not claim.measured for claim in claims),
        "missing_models": [name for name in MODELS if name not in frames],
        "confidence": bootstrap.confidence,
        "resamples": bootstrap.resamples,
    }


def _missing(frames: dict, models: tuple[str, ...], claim_id: str, text: str, rule: str) -> Claim | None:
    absent = [name for name in models if name not in frames]
    if not absent:
        return None
    files = " and ".join(f"data/predictions/{name}.parquet" for name in absent)
    return Claim(claim_id, text, rule, False, False, False, note=f"{files} is missing.")


def _claim(
    claim_id: str, text: str, rule: str, found: statistics.Interval, passes: Callable[[float], bool], **rest
) -> Claim:
    return Claim(
        claim_id,
        text,
        rule,
        True,
        rest.pop("held", passes(found.estimate)),
        rest.pop("certain", passes(found.low)),
        *(
            value if math.isfinite(value) else None
            for value in (found.estimate, found.low, found.high, found.detectable)
        ),
        found.n,
        found.clusters,
        **rest,
    )


def _scores(frame: "pd.DataFrame", column: str, groups: np.ndarray, severity: str) -> tuple[np.ndarray, np.ndarray]:
    rows = (frame.severity == severity).to_numpy()
    if not rows.any():
        raise _no_level(severity)
    return frame[column].to_numpy()[rows], groups[rows]


def _asked_everywhere(frame: "pd.DataFrame") -> "pd.DataFrame":
    """Rows whose question was asked at every severity: clean images have more questions than degraded ones, and
    another mix of tasks, so levels are compared on the common ones only. Raises ClearError if there is none."""
    for severity in SEVERITIES:
        if not (frame.severity == severity).any():
            raise _no_level(severity)
    levels = frame.groupby(["sample", "question"]).severity.transform("nunique")
    common = frame[levels == len(SEVERITIES)].reset_index(drop=True)
    if common.empty:
        raise ClearError(
            "No question was asked at every severity, so levels cannot be compared; check params: "
            "mmd_bench.clean_questions and mmd_bench.degraded_questions, then run `dvc repro mmd_bench`."
        )
    return common


def guessing(frame: "pd.DataFrame", severity: str) -> float:
    """Share of right answers at a severity of always giving each task's most frequent answer, without the image."""
    rows = frame[frame.severity == severity]
    return float(sum(answers.value_counts().iloc[0] for _, answers in rows.groupby("task").answer) / max(1, len(rows)))


def _no_level(severity: str) -> ClearError:
    return ClearError(f"There is no prediction at severity {severity}; run `dvc repro mmd_bench` and evaluate again.")


def _base_clean(frames: dict, settings: Bootstrap) -> Claim:
    text = "The base model answers clean images well, so that there is something to lose."
    rule = f"accuracy of the base model on clean images: at least {CLEAN_TARGET * 100:.0f} %"
    if missing := _missing(frames, ("base",), "base_clean", text, rule):
        return missing
    scores = _scores(frames["base"], "correct", statistics.clusters(frames["base"]), CLEAN)
    found = statistics.mean_interval(*scores, **vars(settings))
    return _claim("base_clean", text, rule, found, lambda value: value >= CLEAN_TARGET)


def _base_drops(frames: dict, settings: Bootstrap) -> Claim:
    text = "Degradation really hurts: the base model loses accuracy from clean to hard."
    rule = "base model, clean minus hard, same questions: above 0 with its whole interval"
    if missing := _missing(frames, ("base",), "base_drops", text, rule):
        return missing
    frame = _asked_everywhere(frames["base"])
    groups = statistics.clusters(frame)
    parts = _scores(frame, "correct", groups, CLEAN) + _scores(frame, "correct", groups, HARD)
    found = statistics.mean_contrast(*parts, **vars(settings))
    return _claim("base_drops", text, rule, found, lambda value: value > 0, held=found.low > 0)


def _compare(frames: dict, settings: Bootstrap, spec: _Comparison) -> Claim:
    if missing := _missing(frames, (spec.a, spec.b), spec.id, spec.text, spec.rule):
        return missing
    a, b, groups = paired(frames, spec.a, spec.b, spec.severity)
    if not len(a):
        raise _no_level(spec.severity)
    found = statistics.paired_difference(a, b, groups, **vars(settings))
    rest = {"note": f"Only {NAMES[spec.a]} right: {(a & ~b).sum()}; only {NAMES[spec.b]} right: {(b & ~a).sum()}."}
    # A gain needs one side that can answer; that nothing was lost needs something to lose.
    sides = (b,) if spec.margin else (a, b)
    guess = guessing(frames[spec.b], spec.severity)
    if not any(statistics.mean_interval(side, groups, **vars(settings)).low > guess for side in sides):
        who = NAMES[spec.b] if spec.margin else f"neither {NAMES[spec.a]} nor {NAMES[spec.b]}"
        verb = "answers no more than" if spec.margin else "answers more than"
        rest["note"] += f" Shows nothing: {who} {verb} a guesser who does not see the image ({points(guess)} %)."
        return _claim(spec.id, spec.text, spec.rule, found, lambda _: False, **rest)
    if spec.margin == 0:
        return _claim(spec.id, spec.text, spec.rule, found, lambda v: v > 0, held=found.low > 0, **rest)
    if found.low < spec.margin <= found.estimate:
        rest["note"] += f" A loss of up to {-found.low * 100:.1f} points is not excluded."
    return _claim(spec.id, spec.text, spec.rule, found, lambda v: v >= spec.margin - 1e-9, **rest)


STRATIFIED = {
    "within": "within one kind and level of damage",
    "within_hard": "within one kind of damage, hard only",
    "crude": "kinds and levels mixed",
}
"""How the odds of a restoration are counted. The claim rests on the first; the last mixes in that some kinds of damage
are restored more often than others, whatever the question."""


def outcomes(frames: dict[str, "pd.DataFrame"]) -> "pd.DataFrame":
    """The rows of CLEAR with their `cluster` and, where those models are here, `base` and `direct` (right or wrong)."""
    rows = frames["grpo"].set_index(KEY).sort_index().reset_index()
    for column, model in {"base": "base", "direct": "sft_direct"}.items():
        if model in frames:
            rows[column] = paired(frames, "grpo", model)[1]
    return rows.assign(cluster=statistics.clusters(rows))


def need(rows: "pd.DataFrame", settings: Bootstrap) -> dict[str, statistics.Interval | None]:
    """Odds of a restoration where the base fails against where it does not, by STRATIFIED, over `outcomes`.

    Clean images have no kind of damage and are left out. None where nothing contrasts, or for one image.
    """
    rows = rows[rows.severity != CLEAN]
    hard = rows[rows.severity == HARD]
    parts = {
        "within": (rows, rows.corruption + "/" + rows.severity),
        "within_hard": (hard, hard.corruption),
        "crude": (rows, rows.corruption.map(lambda _: "")),
    }
    found = {}
    for name, (part, strata) in parts.items():
        given = ~part.base.to_numpy(), part.restored.to_numpy(), strata.to_numpy(), part.cluster.to_numpy()
        found[name] = statistics.odds_ratio(*given, **vars(settings)) if part.cluster.nunique() > 1 else None
    return found


def _calls_needed(frames: dict, settings: Bootstrap) -> Claim:
    text = "CLEAR restores when it needs to: on equally damaged images more often where the base model fails."
    rule = (
        "odds of a restoration where the base is wrong, against where it is right, within one kind and level of "
        "damage: above 1 with its whole interval"
    )
    if missing := _missing(frames, ("base", "grpo"), "calls_needed", text, rule):
        return missing
    rows = outcomes(frames)
    rates = [f"{100 * rows.restored[rows.severity == s].mean():.1f} %" for s in present(rows.severity)]
    found, note = need(rows, settings), f"Restored answers, {' → '.join(LEVELS[s] for s in present(rows.severity))}: "
    note += f"{' → '.join(rates)}, which by itself shows no need."
    if not found["within"]:
        reason = "No kind and level of damage has both answers with and without restoration, and right and wrong ones."
        return Claim("calls_needed", text, rule, False, False, False, note=f"{reason} {note}")
    if found["crude"]:
        note += f" With kinds and levels mixed the odds would be {found['crude'].estimate:.2f}."
    return _claim(
        "calls_needed",
        text,
        rule,
        found["within"],
        lambda v: v > 1,
        held=found["within"].low > 1,
        note=note,
        unit="odds",
    )


def points(value: float | None, sign: bool = False) -> str:
    """A share as percentage points with one decimal, `–` where there is none."""
    if value is None or math.isnan(value):
        return "–"
    # Adding 0 turns a rounded −0.0 into 0.0.
    return f"{round(100 * value, 1) + 0.0:{'+' if sign else ''}.1f}"

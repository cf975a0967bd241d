"""One night: new pictures judged against a reference, as plain figures that the report, the flow and night.json show.

The decision is one word. Drifted: the pictures have changed (clear/drift/statistics.py). NoDrift: nothing shows.
TooFew: with so few pictures nothing could show.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clear.data.io import whole
from clear.drift import power
from clear.drift.measures import METRICS, Picture
from clear.drift.place import came
from clear.drift.proposal import Proposal
from clear.drift.reference import Reference, kind_of
from clear.drift.resemblance import STRANGE, UNDAMAGED, Share, share_intervals, shares
from clear.drift.statistics import Column, Decision, decide
from clear.errors import ClearError, one_line, shown

DRIFTED, SAME, TOO_FEW = "Drifted", "NoDrift", "TooFew"

FEWEST_PICTURES = 20
"""A night of fewer has no decision: even if every tenth picture had changed, two or three could not tell."""

MOST_PICTURES = 2000
"""So many pictures of a night are measured, drawn by the hashes of their names."""

CONFIDENCE = 0.95
SHOWN = 8


@dataclass(frozen=True)
class Restored:
    """The model's own share of answers before which it restored the picture, with its interval."""

    answers: int
    restored: int
    share: float
    low: float
    high: float


@dataclass(frozen=True)
class Night:
    """All figures of a night. `files` counts what is at the place, `new` what is recent enough, `looked_at` what was
    opened; `pictures` of them were compared. `unread` are (name, why) of files that are no usable pictures, `repeated`
    counts pictures with the pixels of another one, `larger` and `smaller` those of another size than in training.

    `strange` is the share of pictures unlike any that is known, of which a share `strange_expected` is expected by
    definition; `strangest` names the pictures to look at first. `begun` is the first of the nights that have changed
    in this way without a night of no change between them, or "".
    """

    night: str
    place: str
    reference: str
    verdict: str
    message: str
    files: int
    new: int
    looked_at: int
    pictures: int
    unread: tuple[tuple[str, str], ...] = ()
    repeated: int = 0
    larger: int = 0
    smaller: int = 0
    side: int = 0
    decision: Decision | None = None
    damage: tuple[Share, ...] = ()
    strange: float = 0.0
    strange_expected: float = 1 - STRANGE
    strangest: tuple[str, ...] = ()
    restored: Restored | None = None
    proposal: Proposal | None = None
    begun: str = ""

    def as_json(self) -> dict[str, Any]:
        """What night.json has."""
        return asdict(self)


@dataclass(frozen=True)
class Arrived:
    """Measured files of a night and how they came: counts as in Night."""

    night: str
    place: str
    files: int
    new: int
    measured: tuple[Picture, ...]


def judge(
    arrived: Arrived, reference: Reference, alpha: float, damaged: float, figures: dict[str, Any]
) -> tuple[Night, list[Picture], np.ndarray]:
    """Everything about a night but its restorations and its proposal; the pictures that count, and their metrics
    (n, M).

    `figures` are those of power.json, for nights with too few pictures.
    """
    pictures, unread, repeated = _apart(arrived.measured)
    sides = [max(picture.width, picture.height) for picture in pictures]
    counts = {
        "night": arrived.night,
        "place": arrived.place,
        "reference": reference.origin,
        "files": arrived.files,
        "new": arrived.new,
        "looked_at": len(arrived.measured),
        "pictures": len(pictures),
        "unread": tuple(unread),
        "repeated": repeated,
        "larger": sum(side > reference.side for side in sides),
        "smaller": sum(side < reference.side for side in sides),
        "side": reference.side,
    }
    values = np.array([picture.values for picture in pictures]).reshape(-1, len(METRICS))
    if len(pictures) < FEWEST_PICTURES:
        return Night(verdict=TOO_FEW, message=_too_few(counts, figures), **counts), pictures, values
    baseline = reference.baseline(damaged)
    decision = decide(reference.columns(values), reference.columns(baseline), reference.column_names, alpha, CONFIDENCE)
    strangeness = reference.model.strange(values)
    verdict = DRIFTED if decision.drifted else SAME
    night = Night(
        verdict=verdict,
        message=_said(verdict, decision, counts),
        decision=decision,
        damage=_damage(values, baseline, reference),
        strange=float((strangeness > 1).mean()),
        strangest=tuple(pictures[n].name for n in _strangest(values, strangeness, reference)),
        **counts,
    )
    return night, pictures, values


def _apart(measured: Sequence[Picture]) -> tuple[list[Picture], list[tuple[str, str]], int]:
    """Pictures that count once each, (name, problem) of the others, and how many were repetitions."""
    whole = [picture for picture in measured if not picture.problem]
    once: dict[str, Picture] = {}
    for picture in whole:
        once.setdefault(picture.pixels, picture)
    unread = [(shown(picture.name), picture.problem) for picture in measured if picture.problem]
    return list(once.values()), unread, len(whole) - len(once)


def _too_few(counts: dict[str, Any], figures: dict[str, Any]) -> str:
    files, new = counts["files"], counts["new"]
    # Else nobody could tell an empty place from one whose files are all of before.
    left = f"{files} files are there, {new or 'none'} of them changed in the hours of --since (0 takes all); "
    return (
        f"{counts['pictures']} usable pictures of {counts['looked_at']} files, too few for a decision, which takes "
        f"{FEWEST_PICTURES}; {left if new < files else ''}{power.enough(figures)}"
    )


def _said(verdict: str, decision: Decision, counts: dict[str, Any]) -> str:
    rate = f"p = {decision.p:.3g}, false alarms in at most {decision.alpha:.1%} of nights"
    if verdict == SAME:
        return f"{counts['pictures']} pictures show no change ({rate})"
    first = ", ".join(column.name for column in standing_out(decision)[:3])
    return f"{counts['pictures']} pictures have changed ({rate}); first of all {first}"


def lines(night: Night) -> list[str]:
    """What a person reads in a terminal."""
    said = [f"{night.verdict}: {night.message}."]
    if night.unread:
        name, why = night.unread[0]
        said.append(f"{len(night.unread)} files are no usable pictures, the first: {name}: {why}")
    if night.verdict == DRIFTED:
        for share in night.damage[:3]:
            bounds = f"{share.share:.1%} [{share.low:.1%}, {share.high:.1%}]"
            said.append(f"{bounds} look like {kind_of(share.kind)}/{share.level} ({share.reference:.1%} before)")
        said.append(f"{night.strange:.1%} are unlike everything known ({night.strange_expected:.0%} expected)")
    if night.restored:
        given = night.restored
        said.append(
            f"{given.share:.1%} [{given.low:.1%}, {given.high:.1%}] of {given.answers} answers had a restoration"
        )
    if night.proposal:
        said += [f"{night.proposal.because}:", *(f"    {command}" for command in night.proposal.commands)]
    return said


def standing_out(decision: Decision) -> list[Column]:
    """The columns, those first that stand out most."""
    return sorted(decision.columns, key=lambda column: (column.p, -column.distance))


def _damage(values: np.ndarray, baseline: np.ndarray, reference: Reference) -> tuple[Share, ...]:
    """Every kind and level, the most frequent first, less what the reference seems to have of it."""
    model = reference.model
    seen = model.probabilities(values)
    found, there = shares(seen, model.prior), shares(model.probabilities(baseline), model.prior)
    low, high = share_intervals(seen, model.prior, CONFIDENCE)
    rows = [
        Share(*cell, *(float(x) for x in (found[c], low[c], high[c], there[c])), reference.trained.get(cell, 0))
        for c, cell in enumerate(model.cells)
        if cell != UNDAMAGED
    ]
    return tuple(sorted(rows, key=lambda row: row.reference - row.share))


def _strangest(values: np.ndarray, strangeness: np.ndarray, reference: Reference) -> list[int]:
    """Pictures to look at first: unlike everything, then surely damaged."""
    damaged = reference.model.scores(reference.model.probabilities(values))[:, -1]
    return np.argsort(-(np.maximum(strangeness, 1) + damaged), kind="stable")[:SHOWN].tolist()


def restorations(path: Path, since: float = 0.0) -> Restored:
    """Count restorations in the tables of `clear answer`: a Parquet file, or a folder with any below it that were
    written or put there at `since` (seconds of the epoch) or later.

    Answers count as independent in the interval (Wilson's). Raises ClearError where no such table, or no answer, is
    there.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from scipy.stats import binomtest

    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    answers = restored = 0
    for file in files:
        if path.is_dir() and came(file) < since:
            continue
        try:
            table = pq.ParquetFile(file)
            if "restored" not in table.schema_arrow.names and path.is_dir():
                continue  # rejects lie beside the answers
            said = whole(file, table, ["restored"])["restored"]
            restored += sum(value is True for value in said.to_pylist())
        except (pa.ArrowException, OSError, KeyError) as error:
            raise ClearError(
                f"{shown(file)}: no table of answers with a column `restored` ({one_line(error)}); name the "
                "Parquet that `clear answer` writes beside its predictions."
            ) from error
        answers += len(said)
    if not answers:
        raise ClearError(f"{shown(path)}: no answers here; name a Parquet of `clear answer`, or a folder with some.")
    bounds = binomtest(restored, answers).proportion_ci(CONFIDENCE, method="wilson")
    return Restored(answers, restored, restored / answers, float(bounds.low), float(bounds.high))


HISTORY = (
    "night",
    "verdict",
    "pictures",
    "p",
    "damaged",
    "strange",
    "most_like",
    "answers",
    "restored",
    "restored_low",
    "restored_high",
    "reference",
)
"""Columns of history.csv."""


def history_row(night: Night) -> dict[str, str]:
    """A night as a line of history.csv; empty cells for what was not measured."""
    row = dict.fromkeys(HISTORY, "")
    row |= {
        "night": night.night,
        "verdict": night.verdict,
        "pictures": str(night.pictures),
        "reference": night.reference,
    }
    if night.decision:
        row |= {"p": f"{night.decision.p:.4g}", "strange": f"{night.strange:.4f}"}
        row["damaged"] = f"{sum(share.share for share in night.damage):.4f}"
        first = night.damage[0]
        row["most_like"] = f"{kind_of(first.kind)}/{first.level}" if night.verdict == DRIFTED else ""
    if given := night.restored:
        row |= {"answers": str(given.answers), "restored": f"{given.share:.4f}"}
        row |= {"restored_low": f"{given.low:.4f}", "restored_high": f"{given.high:.4f}"}
    return row


def with_night(rows: Iterable[dict[str, str]], night: Night) -> list[dict[str, str]]:
    """The history with this night in it, in the order of names (`_order`); a night that is judged again takes the place
    of its former row."""
    kept = {row["night"]: row for row in rows} | {night.night: history_row(night)}
    return [kept[name] for name in sorted(kept, key=_order)]


def _order(name: str) -> list[str | int]:
    """What names of nights are sorted by: numbers in them as numbers, so that week-9 comes before week-10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def begun(rows: Sequence[dict[str, str]], night: Night) -> str:
    """The first night of a change that lasts until `night`, by a history with it; "" where it has not changed.

    Another reference or another damage is another change. A night with too few pictures neither begins nor ends one.
    """
    first = ""
    mine = history_row(night)
    until = [row for row in rows if _order(row["night"]) <= _order(night.night)]
    for row in reversed([row for row in until if row["verdict"] != TOO_FEW]):
        if any(row[name] != mine[name] for name in ("verdict", "reference", "most_like")) or row["verdict"] != DRIFTED:
            break
        first = row["night"]
    return first

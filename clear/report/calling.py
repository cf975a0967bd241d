"""When does CLEAR restore, and does it pay? Figures per corruption and level, and the odds of restoring where needed.

That restorations rise with the damage says little: it can come from a few kinds of damage alone, whatever the question.
Whether a model restores *when it needs to* is judged within one kind and level of damage, by the odds of a restoration
where the base model fails against where it does not (Mantel-Haenszel; an addition to the published evaluation).
"""

from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from clear.bench import statistics
from clear.bench.scoring import HARD, SEVERITIES
from clear.bench.statistics import Interval
from clear.data.records import CLEAN
from clear.report.claims import Bootstrap, need, outcomes

if TYPE_CHECKING:
    import pandas as pd


def figures(frames: dict[str, "pd.DataFrame"], settings: Bootstrap) -> dict:
    """The tracked form of everything here; empty without CLEAR, None for what was not measured. Shares in [0, 1].

    `odds` (ratios), `call_rate` per level, `levels`: CLEAR minus direct fine-tuning per level, `corruptions`
    {level, hardest first: {corruption, most restored first: cell}}, `restored_hard`: what each model answers where
    CLEAR restored, `most_called`: the kind with most restorations at hard, and CLEAR minus direct on it and elsewhere.
    """
    if "grpo" not in frames:
        return {}
    rows = outcomes(frames)
    hard = rows[rows.severity == HARD]
    levels = [level for level in reversed(SEVERITIES) if (rows.severity == level).any()]
    return {
        "odds": {name: finite(v) for name, v in need(rows, settings).items()} if "base" in frames else None,
        "call_rate": {level: float(rows.restored[rows.severity == level].mean()) for level in levels},
        "levels": {level: _lead(rows[rows.severity == level], settings) for level in levels},
        "corruptions": {level: _cells(rows[rows.severity == level], settings) for level in levels if level != CLEAN},
        "restored_hard": _shares(hard[hard.restored]),
        "most_called": _most_called(hard, settings),
    }


def finite(found: Interval | None) -> dict | None:
    """An interval as JSON: an end that is not bounded is None."""
    return found and {key: value if np.isfinite(value) else None for key, value in asdict(found).items()}


def _cells(rows: "pd.DataFrame", settings: Bootstrap) -> dict[str, dict]:
    found = {str(name): _cell(part, settings) for name, part in rows.groupby("corruption", sort=True)}
    return dict(sorted(found.items(), key=lambda item: -item[1]["call_rate"]))


def _cell(rows: "pd.DataFrame", settings: Bootstrap) -> dict:
    return {
        "questions": len(rows),
        "images": int(rows["sample"].nunique()),
        "call_rate": float(rows.restored.mean()),
        "restored": _shares(rows[rows.restored]),
        "not_restored": _shares(rows[~rows.restored]),
        "all": _shares(rows),
        "minus_direct": _lead(rows, settings),
    }


def _shares(rows: "pd.DataFrame") -> dict:
    """Right answers of each model on some rows; None where there is no row or no such model."""
    columns = {"clear": "correct", "base": "base", "direct": "direct"}
    there = {name: column for name, column in columns.items() if column in rows and len(rows)}
    return {"questions": len(rows)} | {n: float(rows[there[n]].mean()) if n in there else None for n in columns}


def _lead(rows: "pd.DataFrame", settings: Bootstrap) -> dict | None:
    """CLEAR minus direct fine-tuning with its interval; None without direct fine-tuning or for one image."""
    if "direct" not in rows or rows.cluster.nunique() < 2:
        return None
    given = rows.correct.to_numpy(), rows.direct.to_numpy(), rows.cluster.to_numpy()
    return finite(statistics.paired_difference(*given, **vars(settings)))


def _most_called(hard: "pd.DataFrame", settings: Bootstrap) -> dict | None:
    if not hard.restored.any():
        return None
    calls = hard[hard.restored].groupby("corruption", sort=True).size()
    name, own = str(calls.idxmax()), hard.corruption == calls.idxmax()
    share = float(calls.max() / calls.sum())
    return {
        "corruption": name,
        "share_of_calls": share,
        "minus_direct": _lead(hard[own], settings),
        "elsewhere": _lead(hard[~own], settings),
    }

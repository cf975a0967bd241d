"""Scoring of MMD-Bench predictions: exact match, and the accuracies, call rates and robustness made from it.

METHOD §7. Departures from the published evaluation: no judge model and no random option for an unmatched
multiple-choice answer (an unmatched or missing answer is wrong and is counted), pairs are scored as pairs beside the
plain accuracy, and every average is computed from rows.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from clear.data.records import CLEAN, Question
from clear.errors import ClearError

if TYPE_CHECKING:
    import pandas as pd

SEVERITIES = (CLEAN, "low", "mid", "high")
"""Levels of damage in rising order; the intensities are METHOD §6. `high` is the published "hard"."""

HARD = SEVERITIES[-1]


def is_correct(prediction: str, question: Question) -> bool:
    """Whether an extracted answer is right: exact match after clear.sources.scenes.words.normalise.

    Multiple choice: the prediction must name one option, by its letter, by its text if no other option has the
    same text, or by the letter followed by that text; the gold answer may be given in either form. An empty
    prediction is wrong. Raises ClearError if the gold answer names no option.
    """
    from clear.sources.scenes.words import normalise, option_named

    if not question.options:
        return normalise(prediction) == normalise(question.answer) != ""
    gold = option_named(question.answer, question.options)
    if gold is None:
        raise ClearError(
            f"Question {question.id}: the answer {question.answer!r} names none of the options "
            f"{list(question.options)}; correct the data."
        )
    return option_named(prediction, question.options) == gold


def spelled_out(answer: str, question: Question) -> str:
    """An answer as a judge can compare it: "B. blue" where it names one of the question's options, else as it is."""
    from clear.sources.scenes.words import LABELS, option_named

    found = option_named(answer, question.options)
    return answer if found is None else f"{LABELS[found]}. {question.options[found]}"


def present(values: Iterable[str]) -> list[str]:
    """The severities that occur in `values`, in rising order; a column of a hundred thousand rows takes no time."""
    found = set(values.unique() if hasattr(values, "unique") else values)
    return [severity for severity in SEVERITIES if severity in found]


def accuracy(frame: "pd.DataFrame") -> dict:
    """Shares of right answers: `total`, `severity`, `task` × severity, `corruption` × severity, and the counts.

    `frame` has the columns of clear.bench.predictions. Rows without a prediction are wrong; `no_answer` says how many.
    """
    return {
        "total": float(frame.correct.mean()),
        "severity": _by_severity(frame, "correct"),
        "task": {task: _by_severity(rows, "correct") for task, rows in frame.groupby("task", sort=True)},
        "corruption": {name: _by_severity(rows, "correct") for name, rows in frame.groupby("corruption", sort=True)},
        "no_answer": int((frame.prediction == "").sum()),
        "questions": {severity: int((frame.severity == severity).sum()) for severity in present(frame.severity)},
    }


def _by_severity(frame: "pd.DataFrame", column: str) -> dict[str, float]:
    means = frame.groupby("severity")[column].mean()
    return {severity: float(means[severity]) for severity in present(means.index)}


def call_rate(frame: "pd.DataFrame") -> dict[str, float]:
    """Share of answers for which the model restored the image first, per severity."""
    return _by_severity(frame, "restored")


def robustness(by_severity: dict[str, float]) -> dict[str, float | None]:
    """`absolute`: accuracy at the hardest level; `relative`: its share of the clean one. None where not measured."""
    hard, clean = by_severity.get(HARD), by_severity.get(CLEAN)
    return {"absolute": hard, "relative": hard / clean if hard is not None and clean else None}


def pair_accuracy(frame: "pd.DataFrame") -> "pd.DataFrame":
    """Minimal pairs per corruption and severity: one row per cell with `accuracy`, `pairs`, `incomplete`.

    A pair counts as right if both halves are. A pair of which only one half was asked in a cell is not scored there;
    it is counted as `incomplete`. `accuracy` is NaN in a cell with incomplete pairs only.
    """
    halves = frame[frame["pair"] != ""].groupby(["corruption", "severity", "pair"], sort=True).correct
    pairs = halves.agg(["size", "all"]).reset_index()
    if (pairs["size"] > 2).any():
        row = pairs[pairs["size"] > 2].iloc[0]
        raise ClearError(
            f"Pair {row['pair']} has {row['size']} halves at {row.corruption}/{row.severity}; a pair has two."
        )
    pairs["whole"] = pairs["size"] == 2
    pairs["right"] = pairs["whole"] & pairs["all"]
    cells = pairs.groupby(["corruption", "severity"], sort=True).agg(
        right=("right", "sum"), pairs=("whole", "sum"), all_pairs=("whole", "size")
    )
    cells["accuracy"] = (cells.right / cells.pairs).where(cells.pairs > 0)
    cells["incomplete"] = cells.all_pairs - cells.pairs
    return cells.reset_index()[["corruption", "severity", "accuracy", "pairs", "incomplete"]]


def pair_summary(frame: "pd.DataFrame") -> dict[str, dict]:
    """`pair_accuracy` over all corruptions: {severity: {accuracy (None without whole pairs), pairs, incomplete}}."""
    cells, result = pair_accuracy(frame), {}
    for severity in present(cells.severity):
        rows = cells[cells.severity == severity]
        whole = int(rows.pairs.sum())
        right = float((rows.accuracy.fillna(0) * rows.pairs).sum())
        result[severity] = {
            "accuracy": right / whole if whole else None,
            "pairs": whole,
            "incomplete": int(rows.incomplete.sum()),
        }
    return result

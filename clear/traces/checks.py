"""The suite of named checks for demonstrations: grammar, answers, pathways, and the questions they belong to.

The table is checked as it was written, against the samples it was made from, so that a fault of any writer (oracle,
teacher, a later edit) is caught and named. Answers count as right by exact match; with `traces.judge` an answer
that does not match was accepted by the judge when it was written, and is not judged again.
"""

from collections.abc import Iterable
from typing import Any

import pandas as pd

from clear.bench.scoring import is_correct
from clear.data.records import CLEAN, Question, Sample
from clear.reasoning.grammar import asks_restoration, extract_answer, well_formed
from clear.traces.table import TraceRow
from clear.validation.expectations import Check

TRACE_CHECKS = [
    Check("unique", "key", "no question is demonstrated twice about one image"),
    Check("known", "known", "the trace is about a question of a degraded training sample", allowed=(True,)),
    Check("grammar", "grammar", "every reply obeys the trace grammar", allowed=(True,)),
    Check("both_replies", "both_replies", "who asks for a restoration has a second reply", allowed=(True,)),
    Check("answer", "answer", "every reply that answers gives the right answer", allowed=(True,)),
    Check("restorable", "restorable", "only a degraded image with a clean partner is restored", allowed=(True,)),
]
"""Rules for a table of traces; all are judged per row."""


def trace_frame(rows: Iterable[TraceRow], samples: Iterable[Sample], judged: bool = False) -> pd.DataFrame:
    """One row per trace with the columns that TRACE_CHECKS read; `key` is <sample>/<corruption>/<severity>/<question>.

    `samples` are those the traces were made from; they and the rows may be streams. Of a question only its answer and
    options stay in memory, equal ones once. With `judged`, an answer that does not match exactly gets no value. Raises
    ClearError for a question whose own answer names none of its options.
    """
    known: dict[tuple[str, str], Question] = {}
    paired: dict[str, bool] = {}
    same: dict[Any, Any] = {}
    for sample in samples:
        paired[sample.id] = sample.paired
        for question in sample.questions:
            name = same.setdefault(question.id, question.id)
            # `is_correct` asks for no more, and names the question in its error.
            bare = Question(name if question.options else "", "", "", question.answer, question.options)
            known[sample.id, name] = same.setdefault(bare, bare)
    columns: dict[str, list] = {name: [] for name in _COLUMNS}
    for row in rows:
        judgement = _judged(row, known.get((row.sample, row.question)), paired.get(row.sample, False), judged)
        for name, value in judgement.items():
            columns[name].append(same.setdefault(value, value) if name == "severity" else value)
    return pd.DataFrame(columns).astype({"answer": object, "restorable": object})


_COLUMNS = ("key", "severity", "known", "grammar", "both_replies", "answer", "restorable")


def _judged(row: TraceRow, question: Question | None, paired: bool, judged: bool) -> dict:
    replies, known = list(row.trace.replies), question is not None
    found = {
        "key": f"{row.sample}/{row.corruption}/{row.severity}/{row.question}",
        "severity": row.severity,
        "known": known,
        # `direct` and `restored` are taught too, whichever of them the trace takes.
        "grammar": all(well_formed(one) for one in (replies, [row.direct], [row.restored])),
        "both_replies": asks_restoration(row.reply_1) == bool(row.reply_2),
        "answer": None,
        "restorable": (paired and row.severity != CLEAN) if known and row.reply_2 else None,
    }
    if known:
        right = all(is_correct(extract_answer(text), question) for text in (replies[-1], row.direct, row.restored))
        found["answer"] = right or (None if judged else False)
    return found

"""Traces that come with the data: the replies of the published training set, word for word (METHOD §3 "Record").

A reply thinks and answers, or thinks, asks for a restoration, thinks again and answers; only the first trigger counts.
What does not follow the grammar is rejected. Such data tell one path per question: the reply that answers stands for
both (`direct`, `restored`), and nobody asks the base, whose verdict is therefore False everywhere.
"""

import json

from clear.data.records import Question, Sample
from clear.data.rejects import Reject
from clear.reasoning.grammar import TRIGGER, well_formed
from clear.reasoning.prompts import question_text
from clear.traces.table import TraceRow

REPLY = "reply"
"""Key of the annotation that holds the reply (clear/sources/clear_train.py)."""


def given(sample: Sample, question: Question) -> TraceRow | Reject:
    """The trace that the annotation of a sample holds, or why there is none."""

    def reject(reason: str, detail: str) -> Reject:
        where = f"{sample.corruption}/{sample.severity}"
        return Reject(f"{sample.id}/{where}/{question.id}", where, reason, detail)

    reply = json.loads(sample.annotation or "{}").get(REPLY)
    if not isinstance(reply, str):
        return reject("conversation", f"the sample comes from {sample.source} and brings no reply (traces.kind)")
    before, trigger, after = (part.strip() for part in reply.partition(TRIGGER))
    replies = [f"{before} {TRIGGER}", after] if trigger else [before]
    if not well_formed(replies):
        return reject("grammar", f"the reply does not think and then answer, or ask and then answer: {reply[:200]!r}")
    return TraceRow(
        sample=sample.id,
        question=question.id,
        text=question_text(question),
        corruption=sample.corruption,
        severity=sample.severity,
        reply_1=replies[0],
        reply_2=replies[1] if trigger else "",
        direct=replies[-1],
        restored=replies[-1],
        base_correct=False,
    )

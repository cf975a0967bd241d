"""Generate-then-answer traces from a source that knows the evidence (scenes), by the paper's rule (METHOD §6).

Rule `base_wrong` (the paper's): a degraded image on which the base model fails is restored before the answer; one on
which it succeeds is answered directly, and so are clean images. Rule `degradation` adds that the base must answer the
clean image: a question that the base cannot answer at all says nothing about the image, and teaches the model to
restore hard questions instead of bad pictures (docs/LOG.md).
"""

from clear.data.records import CLEAN, Question, Sample
from clear.reasoning import grammar
from clear.reasoning.prompts import question_text
from clear.traces.table import TraceRow


def demonstrations(question: Question) -> tuple[grammar.Trace, grammar.Trace]:
    """The direct and the restoring demonstration of a question.

    Without evidence, as for most naturally degraded images, only the answer is noted.
    """
    evidence = question.evidence or question.answer
    direct = grammar.direct_trace(evidence, question.answer)
    return direct, grammar.restore_trace(question_text(question), evidence, question.answer)


def trace_row(sample: Sample, question: Question, restore: bool, base_correct: bool, clean: bool = False) -> TraceRow:
    """The demonstration for one question; `clean` shows the clean image of the sample."""
    direct, restored = demonstrations(question)
    chosen = restored if restore else direct
    return TraceRow(
        sample=sample.id,
        question=question.id,
        text=question_text(question),
        corruption=CLEAN if clean else sample.corruption,
        severity=CLEAN if clean else sample.severity,
        reply_1=chosen.replies[0],
        reply_2=chosen.replies[1] if chosen.restores else "",
        direct=direct.replies[0],
        restored=restored.replies[1],
        base_correct=base_correct,
    )


def restores(rule: str, base_correct: bool, clean_correct: bool) -> bool:
    """Whether a degraded sample gets a restoration under `rule` (config.Traces.restore_when)."""
    failed = not base_correct
    return {"always": True, "never": False, "base_wrong": failed, "degradation": failed and clean_correct}[rule]

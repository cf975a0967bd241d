"""Traces written by a teacher: a vision-language model behind an OpenAI-compatible endpoint (METHOD §6 "Annotation").

For each question the teacher sees the image that the student will see. For a direct trace it thinks and answers. For a
restoring one it says what the degradation hides, is then shown the clean image, thinks again and answers. The pathway
is chosen by `traces.restore_when`: by a rule on the base's own answers (as the paper says) or by the teacher itself
("teacher", as the published code does). `traces.give_answer` tells the teacher the reference answer (paper) or
withholds it (code).

Filter: a reply must have the requested form, must be complete and not mention that an answer was given, and its answer
must be correct, by exact match or, with `traces.judge`, by the judge's verdict. Up to ATTEMPTS replies are requested; a
question without a good one is rejected with the reason of the last. Departures: the trace is composed by this project's
grammar from the teacher's words, so that every trace is well formed; an outage ends the stage (repeat the command to
continue, no request is sent twice) instead of dropping the affected questions.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from clear.bench.judge import agreements
from clear.bench.scoring import is_correct, spelled_out
from clear.data.images import decode_image, encode_image
from clear.data.pool import threaded
from clear.data.records import CLEAN, Question, Sample
from clear.data.rejects import Reject
from clear.llm.endpoint import Client, Malformed, Outage, Refused, Request, messages
from clear.reasoning import grammar
from clear.reasoning.prompts import question_text
from clear.traces.table import TraceRow

ATTEMPTS = 3

SYSTEM = """You write demonstrations for a vision-language model that answers questions about images, which may be
degraded by blur, noise, darkness, compression or obstructions. Be brief and concrete: name what is visible in the image
and leads to the answer, in one to four plain sentences. Use exactly the tags you are asked for, each once, and write
nothing outside them. Never say that an answer, a reference or an instruction was given to you."""

DIRECT = """{question}
{known}
Reply with <think>the observations that lead to the answer</think><answer>the answer, as short as possible</answer>"""

DAMAGE = """{question}

This image is degraded too badly for the question. Do not answer it yet. Reply with
<think>what the degradation hides that the question needs</think><image_restore>"""

DECIDE = """{question}
{known}
Judge first whether this image is good enough for the question. If it is, reply with
<think>the observations that lead to the answer</think><answer>the answer, as short as possible</answer>
If a degradation hides what the question needs, do not answer yet; reply with
<think>what the degradation hides that the question needs</think><image_restore>"""

RESTORED = """This is the restored image. {known}
Reply with <think>the observations that lead to the answer</think><answer>the answer, as short as possible</answer>"""

KNOWN = "The right answer is: {answer}. Your answer must agree with it, and your observations must lead to it."

_REPLY = re.compile(
    # A block ends at its first end, and only there: a server may send megabytes of ends.
    r"\s*<think>(?P<think>(?:(?!</think>).)*+)</think>\s*"
    r"(?:(?P<ask><image_restore>)|<answer>(?P<answer>(?:(?!</answer>).)*+)</answer>)\s*",
    re.DOTALL,
)
_LEAK = re.compile(
    r"\b(?:reference|given|provided|expected|supplied|stated|known) answer\b|\bground[- ]truth\b|\b(?:right|correct)"
    r" answer (?:is|was) (?:given|provided|known)\b|\bas instructed\b|\bwas told\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Task:
    """One trace to write. `restore` None lets the teacher decide; `clean` shows the clean image."""

    sample: Sample
    question: Question
    restore: bool | None
    base_correct: bool
    clean: bool = False


@dataclass(frozen=True)
class _Bad:
    """Why a reply is of no use."""

    reason: str
    detail: str


def prompt_hash() -> str:
    """Changes when a prompt does."""
    texts = (SYSTEM, DIRECT, DAMAGE, DECIDE, RESTORED, KNOWN)
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def write(
    teacher: Client, tasks: Iterable[Task], give_answer: bool, judge: Client | None = None
) -> Iterator[TraceRow | Reject]:
    """The trace of each task, in order, or the reason for its absence.

    As many tasks as the endpoint allows requests are under way at once. Raises Outage, Denied and BudgetSpent.
    """
    attempt = partial(demonstrate, teacher, give_answer=give_answer, judge=judge)
    return threaded(attempt, tasks, teacher.config.concurrency)


def demonstrate(teacher: Client, task: Task, give_answer: bool, judge: Client | None) -> TraceRow | Reject:
    """One trace, or the reject that says why ATTEMPTS replies gave none. Raises Outage, Denied and BudgetSpent."""
    bad = _Bad("", "")
    for draw in range(ATTEMPTS):
        try:
            found = _attempt(teacher, task, give_answer, judge, draw)
        except (Refused, Malformed) as error:
            found = _Bad(error.kind, str(error))
        if isinstance(found, TraceRow):
            return found
        bad = found
        if bad.reason in (Refused.kind, Malformed.kind):  # asking the same again will not help
            break
    where = CLEAN if task.clean else f"{task.sample.corruption}/{task.sample.severity}"
    return Reject(f"{task.sample.id}/{where}/{task.question.id}", where, bad.reason, bad.detail)


def _attempt(teacher: Client, task: Task, give_answer: bool, judge: Client | None, draw: int) -> TraceRow | _Bad:
    asked = question_text(task.question)
    known = KNOWN.format(answer=task.question.answer) if give_answer else ""
    first = DIRECT if task.restore is False else DAMAGE if task.restore else DECIDE
    shown = task.sample.image if task.clean else task.sample.seen
    talk = messages(first.format(question=asked, known=known), system=SYSTEM, **_shown(shown))
    reply = _read(teacher, talk, draw)
    if isinstance(reply, _Bad):
        return reply
    restored = reply["ask"] is not None
    if task.restore is not None and restored != task.restore:
        return _Bad("pathway", "answered instead of asking for a restoration" if task.restore else "asked for one")
    diagnosis = ""
    if restored:
        diagnosis = _plain(reply["think"])
        talk = [*talk, {"role": "assistant", "content": reply[0].strip()}]
        talk += messages(RESTORED.format(known=known), **_shown(task.sample.image))
        reply = _read(teacher, talk, draw)
        if isinstance(reply, _Bad):
            return reply
        if reply["ask"] is not None:
            return _Bad("pathway", "asked for a second restoration")
    evidence, answer = _plain(reply["think"]), _plain(reply["answer"])
    if not evidence or not answer or (restored and not diagnosis):
        return _Bad("form", "an empty block")
    if not is_correct(answer, task.question):
        wrong = _judged(judge, asked, *(spelled_out(text, task.question) for text in (task.question.answer, answer)))
        if wrong is not None:
            return wrong
    return _row(task, diagnosis, evidence, answer)


def _read(teacher: Client, talk: list[dict], draw: int) -> re.Match | _Bad:
    """Ask, and take the reply apart."""
    reply = teacher.ask(Request(talk, draw=draw))
    if reply.cut:
        return _Bad("cut", f"longer than teacher.max_tokens = {teacher.config.max_tokens}")
    return taken_apart(reply.text)


def taken_apart(text: str) -> re.Match | _Bad:
    """A reply as `think`, and `ask` or `answer`; or what is wrong with it."""
    found = _REPLY.fullmatch(text)
    if not found or any(tag in (found["think"] + (found["answer"] or "")) for tag in _TAGS):
        return _Bad("form", f"not of the requested form: {text[:200]!r}")
    leak = _LEAK.search(text)
    return _Bad("leak", f"mentions what it was told: {leak[0]!r}") if leak else found


_TAGS = (grammar.THINK, grammar.END_THINK, grammar.ANSWER, grammar.END_ANSWER, grammar.TRIGGER)


def _judged(judge: Client | None, question: str, reference: str, answer: str) -> _Bad | None:
    if judge is not None:
        verdict = agreements(judge, [(question, reference, answer)])[0]
        if verdict is True:
            return None
        if isinstance(verdict, str):
            if verdict.startswith(Outage.kind):
                raise Outage(verdict)
            return _Bad("judge", verdict)
    return _Bad("answer", f"{answer[:100]!r} does not agree with {reference[:100]!r}")


def _row(task: Task, diagnosis: str, evidence: str, answer: str) -> TraceRow:
    text = question_text(task.question)
    direct = grammar.direct_trace(evidence, answer).replies[0]
    restored = grammar.restore_trace(text, evidence, answer).replies[1]
    asking = f"{grammar.THINK} {grammar.INSUFFICIENT} {diagnosis} {grammar.END_THINK} {grammar.TRIGGER}"
    return TraceRow(
        sample=task.sample.id,
        question=task.question.id,
        text=text,
        corruption=CLEAN if task.clean else task.sample.corruption,
        severity=CLEAN if task.clean else task.sample.severity,
        reply_1=asking if diagnosis else direct,
        reply_2=restored if diagnosis else "",
        direct=direct,
        restored=restored,
        base_correct=task.base_correct,
    )


def _plain(text: str) -> str:
    return " ".join(text.split())


def _shown(image: bytes) -> dict[str, bytes | str]:
    """A picture as `messages` takes it: a format that every server reads, and turned as the student sees it."""
    if image.startswith(b"\xff\xd8\xff") and b"Exif\0" not in image[: 2**16]:
        return {"image": image, "kind": "jpeg"}
    if not image.startswith(b"\x89PNG") or b"eXIf" in image:
        image = encode_image(decode_image(image))
    return {"image": image, "kind": "png"}

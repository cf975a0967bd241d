"""Accuracy by a judge model over HTTP, for answers that exact match cannot score (METHOD §4 "accuracy").

Departures from the published code: if the judge cannot be reached or its reply is unusable, the sample is rejected
(there its answer counts as wrong or half right); the same pair of answers is judged once (clear/llm/endpoint.py); for a
multiple-choice question the judge sees the options, and the option's text instead of its letter.
"""

import re
from collections.abc import Sequence

from clear.bench.scoring import spelled_out
from clear.data.records import Question
from clear.errors import ClearError
from clear.llm.endpoint import Client, EndpointError, Reply, Request, messages
from clear.reasoning.prompts import question_text

PROMPT = (
    "Compare an answer with the correct one and say how right it is, as a number from 0.0 (wrong) to 1.0 (right). "
    "Wording does not matter, meaning does. Reply with the number alone.\n"
    "Question: {question}\nCorrect answer: {gold}\nAnswer: {found}\nScore:"
)

_NUMBER = re.compile(r"\s*([01](?:\.\d+)?|\.\d+)\s*\.?\s*")


def score_of(text: str) -> float | None:
    """The score in a judge's reply, or None if it is anything but one number in [0, 1]."""
    found = _NUMBER.fullmatch(text)
    return float(found[1]) if found and float(found[1]) <= 1 else None


def _prompt(question: Question, answer: str) -> str:
    gold, found = (spelled_out(text, question) for text in (question.answer, answer))
    return PROMPT.format(question=question_text(question), gold=gold, found=found)


def judged(client: Client, questions: Sequence[Question], answers: Sequence[str]) -> list[float | None]:
    """Scores in [0, 1] of extracted answers; None where the judge could not be asked or understood.

    An empty answer is wrong without asking. Raises ClearError if not one of the asked could be scored (an outage, not
    a sample's fault), and an EndpointError that concerns every request.
    """
    asked = [n for n, answer in enumerate(answers) if answer.strip()]
    requests = (Request(messages(_prompt(questions[n], answers[n]))) for n in asked)
    found: list[float | None] = [0.0] * len(answers)
    last: EndpointError | None = None
    for n, reply in zip(asked, client.ask_all(requests), strict=True):
        found[n] = score_of(reply.text) if isinstance(reply, Reply) else None
        last = last if isinstance(reply, Reply) else reply
    if asked and all(found[n] is None for n in asked):
        raise ClearError(
            f"The judge scored none of {len(asked)} answers ({last or 'no reply was a number in [0, 1]'}). Mend it and "
            "repeat the command, which resumes from the last checkpoint; or set grpo.accuracy to exact."
        )
    return found

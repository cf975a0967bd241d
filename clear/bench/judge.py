"""A language model as judge: scores of free answers (MM-Vet), the option that a text means, agreement of two answers.

METHOD §6 (annotation), §7. Every function asks for all items together and returns, for each, its verdict or a text that
explains its absence: an outage, a refusal or an unusable reply rejects that item only. Departures: a
failure is never a zero, a half or a random option; the prompts are this project's own, their hash is in the results.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from clear.bench.vlmeval.options import chosen, letters
from clear.llm.endpoint import Client, EndpointError, Request, messages

SCORE = """You grade an answer to a question about an image that you cannot see, by comparing it with a reference.
The grade is one of 0.0, 0.1, 0.2, ..., 1.0: 0.0 if nothing of the reference is met, 1.0 if all of it is.
In the reference, <AND> joins parts that are all needed, each with an equal share of the grade; <OR> joins alternatives
of which one is enough. An answer that names several values where one is asked earns a part of the grade only.
For a reference that explains something, grade how much of its meaning the answer conveys, whatever its wording.

Examples
Question: What are the two prices? Reference: 3 <AND> 5. Answer: 5. Grade: 0.5
Question: What are the two prices? Reference: 3 <AND> 5. Answer: 3 and 5. Grade: 1.0
Question: Which animal is it? Reference: puma <OR> cougar. Answer: a cougar. Grade: 1.0
Question: Which animal is it? Reference: puma <OR> cougar. Answer: a cat. Grade: 0.0
Question: Why is the sign funny? Reference: It forbids what it does itself. Answer: It is a sign. Grade: 0.1

Reply with the grade alone.

Question: {question}
Reference: {reference}
Answer: {answer}
Grade:"""

OPTION = """Someone answered a multiple-choice question in their own words. Which option do they mean?
Reply with its letter alone, or with Z if the text means none of them or says that it cannot tell.

Question: {question}
{options}
Text: {answer}
Letter:"""

AGREE = """Does the answer to a question about an image agree with the reference? Wording, units written out, and
additional correct detail do not matter; another value, object or meaning does.
Reply with JSON: {{"consistent": true}} or {{"consistent": false}}.

Question: {question}
Reference: {reference}
Answer: {answer}"""

TEMPERATURES = (0.0, 0.5, 1.0, 1.5, 2.0)
"""Of the attempts at one verdict; the later ones only follow an unusable reply, as published."""

Verdict = TypeVar("Verdict")


def prompt_hash() -> str:
    """Changes when a prompt does; belongs beside every judged figure."""
    return hashlib.sha256("\0".join((SCORE, OPTION, AGREE)).encode()).hexdigest()[:12]


def scores(client: Client, items: Sequence[tuple[str, str, str]], progress=None) -> list[float | str]:
    """Grades in [0, 1] of (question, reference, answer) triples; a text instead where there is no grade."""
    prompts = [SCORE.format(question=q, reference=r, answer=a) for q, r, a in items]
    return _verdicts(client, prompts, grade, progress=progress)


def options_meant(client: Client, items: Sequence[tuple[str, Sequence[str], str]], progress=None) -> list[list | str]:
    """The letter in a list of one for each (question, options, answer), REFUSED for none; a text on failure."""
    prompts = []
    for question, options, answer in items:
        listed = "\n".join(f"{k}. {v}" for k, v in zip(letters(len(options)), options, strict=True))
        prompts.append(OPTION.format(question=question, options=listed, answer=answer))
    read = [partial(letter, options=item[1]) for item in items]
    return _verdicts(client, prompts, read, progress=progress)


def agreements(client: Client, items: Sequence[tuple[str, str, str]], progress=None) -> list[bool | str]:
    """Whether each (question, reference, answer) agrees; a text where the judge gave no verdict."""
    prompts = [AGREE.format(question=q, reference=r, answer=a) for q, r, a in items]
    return _verdicts(client, prompts, consistent, as_json=True, progress=progress)


def _verdicts(
    client: Client,
    prompts: Sequence[str],
    read: Callable[[str], Any] | Sequence[Callable[[str], Any]],
    as_json: bool = False,
    progress: Callable[[int], Any] | None = None,
) -> list:
    """Ask all prompts, then those again, warmer, whose reply `read` cannot use (it returns None)."""
    readers = list(read) if isinstance(read, Sequence) else [read] * len(prompts)
    found: list = [None] * len(prompts)
    last = [""] * len(prompts)
    todo = list(range(len(prompts)))
    for draw, temperature in enumerate(TEMPERATURES):
        requests = (Request(messages(prompts[n]), temperature, as_json=as_json, draw=draw) for n in todo)
        for n, reply in zip(todo, client.ask_all(requests, progress if not draw else None), strict=True):
            if isinstance(reply, EndpointError):
                found[n] = f"{reply.kind}: {reply}"
            else:
                found[n], last[n] = readers[n](reply.text), reply.text
        todo = [n for n in todo if found[n] is None]
        if not todo:
            break
    for n in todo:
        found[n] = f"malformed: the judge gave no verdict in {len(TEMPERATURES)} replies, the last one {last[n][:80]!r}"
    return found


def grade(text: str) -> float | None:
    """The number in [0, 1] of a reply to SCORE; None for anything else."""
    match = re.fullmatch(r"(?:Grade:\s*)?([01](?:\.\d+)?)\.?", text.strip())
    return float(match[1]) if match and float(match[1]) <= 1 else None


def letter(text: str, options: Sequence[str]) -> list[str] | None:
    """The option that a reply to OPTION means, in a list of one; None for none."""
    meant = chosen(text, options)
    return [meant] if meant else None


def consistent(text: str) -> bool | None:
    """What a reply to AGREE says: its first object, whatever stands around it; None for anything else."""
    begin = text.find("{")
    end = text.find("}", begin) + 1
    try:
        value = json.loads(text[begin:end] if begin >= 0 and end else text)
    except (ValueError, RecursionError):
        return None
    found = value.get("consistent") if isinstance(value, dict) else None
    return found if isinstance(found, bool) else None

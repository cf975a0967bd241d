"""The trace grammar: how a reply thinks, asks for a restoration, and answers (METHOD §3 "Record").

A reply is `<think> … </think>` followed by either the trigger `<image_restore>` or `<answer> … </answer>`. The tags
are ordinary text, not added tokens, so any BAGEL tokenizer can write them. A trace is direct (one reply) or
restoring (a reply that ends with the trigger, the picture, a second reply). The second think restates the question:
text that has read the degraded image otherwise keeps its first answer.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

THINK, END_THINK, ANSWER, END_ANSWER, TRIGGER = "<think>", "</think>", "<answer>", "</answer>", "<image_restore>"
SUFFICIENT, INSUFFICIENT = "sufficient :", "insufficient :"

WORDS = (THINK, END_THINK, ANSWER, END_ANSWER, TRIGGER, ":", "sufficient", "insufficient", "restore", "asked")
"""Words of the grammar itself, for a closed vocabulary."""

_WELL_FORMED = re.compile(
    # A block ends at its first end, and only there: to try others would take sixty bytes for each character of it.
    rf"\s*{THINK}(?:(?!{END_THINK}).)*+{END_THINK}\s*(?:{TRIGGER}|{ANSWER}(?:(?!{END_ANSWER}).)*+{END_ANSWER})\s*",
    re.DOTALL,
)


@dataclass(frozen=True)
class Trace:
    """One demonstration: the texts of its replies; two replies mean that the image is restored between them."""

    replies: tuple[str, ...]

    @property
    def restores(self) -> bool:
        """Whether the first reply asks for a restoration."""
        return len(self.replies) > 1


def plain_reply(evidence: str, answer: str) -> str:
    """Think, then answer, with no judgement of the image: what the base model is taught."""
    return f"{THINK} {evidence} {END_THINK} {ANSWER} {answer} {END_ANSWER}"


def restore_reply() -> str:
    """Diagnose and ask for a restoration."""
    return f"{THINK} {INSUFFICIENT} restore {END_THINK} {TRIGGER}"


def direct_prefix() -> str:
    """How a direct reply begins; forcing it forbids the restoration."""
    return f"{THINK} {SUFFICIENT}"


def direct_trace(evidence: str, answer: str) -> Trace:
    """Judge the image sufficient and answer."""
    return Trace((plain_reply(f"{SUFFICIENT} {evidence}", answer),))


def restore_trace(question: str, evidence: str, answer: str) -> Trace:
    """Ask for a restoration, restate the question, answer."""
    return Trace((restore_reply(), plain_reply(f"asked {question} : {evidence}", answer)))


def answers(text: str) -> list[str]:
    """The contents of all complete answer blocks; one begins at the first tag that is not in a block before it.

    In time linear in the text: a pattern would look for the end of each of a thousand tags that are never closed.
    """
    found, place = [], 0
    while (start := text.find(ANSWER, place)) >= 0:
        start += len(ANSWER)
        end = text.find(END_ANSWER, start)
        if end < 0:
            break
        found.append(text[start:end].strip())
        place = end + len(END_ANSWER)
    return found


def extract_answer(text: str) -> str:
    """The content of the last answer block, or "" where there is none."""
    found = answers(text)
    return found[-1] if found else ""


def fork(one: Sequence[int], other: Sequence[int]) -> int:
    """The first place where two replies (token ids) differ: a direct one and one that asks decide there."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def asks_restoration(reply: str) -> bool:
    """Whether a reply asks for a restoration: the trigger anywhere, and no complete answer block (METHOD §4).

    A complete answer ends the conversation wherever the trigger stands; one that was begun and not closed answers
    nothing, and does not keep the trigger from being honoured.
    """
    return TRIGGER in reply and not answers(reply)


def well_formed(replies: list[str]) -> bool:
    """Every reply follows the grammar, only the last answers, all others ask for a restoration."""
    if not replies or not all(_WELL_FORMED.fullmatch(reply) for reply in replies):
        return False
    return all(asks_restoration(r) for r in replies[:-1]) and not asks_restoration(replies[-1])

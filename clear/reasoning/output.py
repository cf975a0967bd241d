"""What an output says: the thinking and the answer, also while it is still being written.

An output is the texts of a row's replies. Most follow the grammar (clear/reasoning/grammar.py); a reply that was cut
short, or one of a model that never learned the grammar, has to be read as well.
"""

import re
from collections.abc import Sequence

from clear.reasoning import grammar

_TAGS = re.compile(
    "|".join(map(re.escape, (grammar.THINK, grammar.END_THINK, grammar.ANSWER, grammar.END_ANSWER, grammar.TRIGGER)))
)


def thinking(replies: Sequence[str], growing: bool = False, stop: Sequence[str] = ()) -> str:
    """The thoughts of all replies, a line each. While the last one is `growing`, only what cannot change any more.

    What may be the beginning of a `stop` text can change as well.
    """
    thoughts = []
    for number, text in enumerate(replies):
        _, opened, rest = text.partition(grammar.THINK)
        if not opened:
            continue
        thought, closed, _ = rest.partition(grammar.END_THINK)
        if not closed:
            thought = thought.partition(grammar.ANSWER)[0]
            if growing and number == len(replies) - 1:
                thought = _settled(thought, (grammar.END_THINK, grammar.ANSWER, *stop))
        thoughts.append(thought.strip())
    return "\n".join(filter(None, thoughts))


def _settled(text: str, ends: Sequence[str]) -> str:
    """`text` without what may be the beginning of one of the `ends`, of a space that is stripped, or of a character."""
    text = text.rstrip("\ufffd")
    sizes = (next((n for n in range(min(len(end), len(text)), 0, -1) if text.endswith(end[:n])), 0) for end in ends)
    return text[: len(text) - max(sizes)].rstrip()


def answer(replies: Sequence[str]) -> str:
    """What the last reply answers: its last answer block as in `clear ask`, else its text beside the thought."""
    text = replies[-1]
    if found := grammar.extract_answer(text):
        return found
    before, opened, rest = text.partition(grammar.THINK)
    if opened:
        _, closed, rest = rest.partition(grammar.END_THINK)
        if not closed and grammar.ANSWER in text:
            rest = text.partition(grammar.ANSWER)[2]
        text = f"{before} {rest}"
    return _TAGS.sub("", text).strip()

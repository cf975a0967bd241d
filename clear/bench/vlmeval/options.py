"""Which option a free text chooses: the rules of VLMEvalKit, without its random last resort (METHOD §7).

The rules are those of `vlmeval/utils/matching_util.py` as it was at commit d21c5e9 (2026); CLEAR's fork has an older
version, without the position of the letter, the limit on texts and the third rule.

1. A known refusal chooses nothing (REFUSED).
2. Letter: of the text's words, punctuation aside, exactly one letter is one of the options', and it first stands among
   the last four words.
3. Phrase: the first "answer is X", in any case, X perhaps in bold.
4. Content: exactly one option's text occurs in a text that is at most twice as long as all options together.

Departures. If there is an `<answer>`, only its content counts, even if the tag is never closed. What no rule decides
stays undecided ("") for a judge or the count of unmatched answers, and is never chosen at random. In rule 3 X is any
of the options' letters, not only A to D; it may follow a colon or be in brackets, and must be a separate word and the
only letter: "the answer is blue" is not B, "the answer is a dog" not A, "the answer is A or B" neither. An option
whose text is lost (VLMEvalKit reads "None" as an empty cell and drops the option) keeps its letter and is never chosen
by its text. As in VLMEvalKit, the word "A" counts as the letter in rule 2 even where it is an article.
"""

import re
from collections.abc import Sequence

REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
REFUSED = "Z"
"""What VLMEvalKit lets a judge answer where no option is meant; it is never right."""

FAILED = "Failed to obtain answer via API"
"""What VLMEvalKit writes in place of a prediction; it chooses nothing by letter or phrase."""

LAST = 4
"""The letter must be among so many words at the end."""

_PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_PHRASE = re.compile(r"answer\s+is[:\s]\s*[*(]*(?:(?-i:a)(?=\s+\w)|([A-Z])(?!\w|['-]\w))", re.IGNORECASE)
_ANOTHER = re.compile(r"(?:\W*(?:or|and)\b|[^\w/,]*[/,])\W*([A-Z])\b")


def letters(count: int) -> list[str]:
    """The labels of so many options."""
    return [chr(ord("A") + i) for i in range(count)]


def answer_in(reply: str) -> str:
    """The part of a model's reply that answers: the last `<answer>` block, open or closed, else all of it."""
    from clear.reasoning.grammar import ANSWER, END_ANSWER, extract_answer

    last = reply.rpartition(ANSWER)[2]
    return extract_answer(reply) if END_ANSWER in last else last.strip() if ANSWER in reply else reply


def chosen(text: str, options: Sequence[str]) -> str:
    """The letter of the option that `text` chooses, REFUSED for a refusal, "" where the rules do not decide."""
    if any(refusal in text for refusal in REFUSALS):
        return REFUSED
    named = "" if FAILED in text else _by_letter(text, len(options)) or _by_phrase(text, len(options))
    return named or _by_content(text, options)


def _by_letter(text: str, count: int) -> str:
    words = text.translate(_PUNCTUATION).split()
    found = [letter for letter in letters(count) if letter in words]
    if len(found) == 1:
        return found[0] if words.index(found[0]) >= len(words) - LAST else ""
    return REFUSED if not found and REFUSED in words else ""


def _by_phrase(text: str, count: int) -> str:
    match = next((match for match in _PHRASE.finditer(text) if match[1]), None)
    if match is None or match[1].upper() not in letters(count):
        return ""
    another = _ANOTHER.match(text, match.end())
    return "" if another and another[1] in letters(count) else match[1].upper()


def _by_content(text: str, options: Sequence[str]) -> str:
    if len(text) > 2 * sum(map(len, options)):
        return ""
    low = text.lower()
    pairs = zip(letters(len(options)), options, strict=True)
    found = [letter for letter, option in pairs if option.strip() and option.lower() in low]
    return found[0] if len(found) == 1 else ""

"""Which option a free text chooses: the rules of VLMEvalKit, without its random last resort (METHOD §7).

First by letter: the text's words (punctuation aside) hold exactly one of the letters. Then by content: exactly one
option's text occurs in a text that is not much longer than all options together. A refusal chooses nothing. Departure:
what the rules do not decide stays undecided ("") for a judge or for the count of unmatched answers; it is never drawn
by chance. As in VLMEvalKit, the word "A" counts as the letter even where it is an article.
"""

from collections.abc import Sequence

REFUSALS = (
    "sorry, i can't help with images of people",
    "i can't process this file",
    "i'm sorry, but without the image",
    "cannot determine the answer",
)
REFUSED = "Z"
"""What VLMEvalKit lets a judge answer where no option is meant; it is never right."""

_PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


def letters(count: int) -> list[str]:
    """The labels of so many options."""
    return [chr(ord("A") + i) for i in range(count)]


def chosen(text: str, options: Sequence[str]) -> str:
    """The letter of the option that `text` chooses, REFUSED for a refusal, "" where the rules do not decide."""
    if any(refusal in text.lower() for refusal in REFUSALS):
        return REFUSED
    return _by_letter(text, len(options)) or _by_content(text, options)


def _by_letter(text: str, count: int) -> str:
    words = set(text.translate(_PUNCTUATION).split())
    found = [letter for letter in letters(count) if letter in words]
    if len(found) == 1:
        return found[0]
    return REFUSED if not found and REFUSED in words else ""


def _by_content(text: str, options: Sequence[str]) -> str:
    if len(text) > 2 * sum(map(len, options)):
        return ""
    low = text.lower()
    found = [letter for letter, option in zip(letters(len(options)), options, strict=True) if option.lower() in low]
    return found[0] if len(found) == 1 else ""

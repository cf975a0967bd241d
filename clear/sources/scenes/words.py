"""The closed vocabulary of the rendered scenes, and the form in which answers are compared.

Every question, answer and piece of evidence of `clear.sources.scenes.questions` is a sequence of these words separated
by single spaces, so that a word-level tokenizer of about seventy entries covers the source. Letters on signs are
lower-case words; capital A to D are the labels of multiple-choice options and nothing else.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
LETTERS = ("a", "c", "h", "k", "l", "t", "x", "z")
OPTION_LETTERS = ("A", "B", "C", "D")
RELATIONS = {"above": (-1, 0), "below": (1, 0), "left": (0, -1), "right": (0, 1)}
"""Relation word to the (row, column) step from the anchor to the cell it names."""
SIGN = "sign"
CELLS = tuple(f"{column}{row}" for row in "123" for column in "abc")
"""Names of the nine cells in raster order, as on a chess board: one word says both coordinates."""

Cell = tuple[str, str] | None
"""What a cell holds: None, (SIGN, letter) or (shape, colour)."""
Cells = tuple[Cell, ...]
"""Nine cells of a 3x3 grid in raster order."""

VOCABULARY: tuple[str, ...] = (
    *("?", ":", "0", "1", "2", "3"),
    *OPTION_LETTERS,
    *LETTERS,
    *SHAPES,
    *COLOURS,
    *RELATIONS,
    *("yes", "no", "none"),
    *("which", "how", "many", "is", "there", "an", "the", "on", "of", "or", "says"),
    *("colour", "letter", "sign", "shape", "shapes", "at"),
    *CELLS,
)
"""Every word that can occur in a question, an answer or evidence, each once; the order is part of a trained model."""

_PLACEHOLDERS = (
    dict.fromkeys(SHAPES, "<shape>")
    | dict.fromkeys(COLOURS, "<colour>")
    | dict.fromkeys(RELATIONS, "<relation>")
    | {"an": "a"}
)


_VARIANTS = str.maketrans({"−": "-", "﹣": "-", "－": "-", "–": "-", "⁄": "/", "＜": "<", "＞": ">", "＝": "="})
_COMPARISONS = {"<=": "≤", ">=": "≥", "!=": "≠"}
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
_KEPT = re.compile(
    r"""(?<=\d)[-+./:^*×](?=[-+]?\.?\d)       # inside a number: 3.5, 2/3, 10:30, 3-4
    | (?<![^\W_])[-+](?=\.?\d)               # its sign: -5; not x-5
    | (?<!\w)\.(?=\d)                        # .5
    | (?:(?<=[^\W_])|(?<=[^\W_][+\#]))[+\#](?![^\W_])  # A+, 18+, C++, C#
    | (?<=(?<!\w)[^\W\d_])-(?=[\W_]*$)       # the grade A-
    """,
    re.VERBOSE,
)
"""Characters, beside letters, digits and combining marks, that are part of what an answer says."""
_MARKS = re.compile(r"[^\w\s\x00-\x7f]{31,}")
"""What may be more than thirty combining marks in a row: no word has so many, and NFC sorts them in quadratic time."""


def composed(text: str) -> str:
    """`text` in the Unicode form NFC; of successive combining marks the first thirty are kept."""
    return unicodedata.normalize("NFC", _MARKS.sub(_few_marks, text))


def _few_marks(found: re.Match) -> str:
    kept, marks = [], 0
    for character in found[0]:
        marks = marks + 1 if unicodedata.combining(character) else 0
        kept += [character] if marks <= 30 else []
    return "".join(kept)


@lru_cache(4096)  # the options of a question come again with every answer to it
def normalise(text: str) -> str:
    """`text` as it is compared: lower-case words and numbers with single spaces between, without punctuation.

    Signs, decimal points, fractions, other marks between two digits, and < > = ≤ ≥ ≠ ≈ count ("-5" is not "5", "2/3"
    not "2 3", "1.0" not "1"); thousands separators do not ("1,000" is "1000"), nor do units that are one character
    ("5%" is "5"). A text of nothing but punctuation stays as it is. A, B, C or D alone stays capital: an option label
    and the letter on a sign are different, "A." gives "A", "(k)" and "K" give "k".
    """
    made = composed(text).translate(_VARIANTS)
    made = re.sub("[<>!]=", lambda found: _COMPARISONS[found[0]], made)
    made = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), made)
    made = re.sub(r"(?<=[-+])[$€£¥](?=\.?\d)", "", made)  # -$5
    made = re.sub(r"(?<=\d)\s*/\s*(?=\d)", "/", made)
    made = " ".join(re.sub(r"[^\w\s]|_", _counted, made).split())
    if made in OPTION_LETTERS:
        return made
    return composed((made or " ".join(text.split())).casefold())


def _counted(found: re.Match) -> str:
    """What stands for one character that is neither letter nor digit."""
    if found[0] in "<>=≤≥≠≈":
        return f" {found[0]} "
    if unicodedata.category(found[0])[0] == "M" or _KEPT.match(found.string, found.start()):
        return found[0]
    return " "


LABELS = "ABCDEFGHIJ"
"""The letters that name the options of a multiple-choice question, in order; no question has more options."""


def option_named(answer: str, options: Sequence[str]) -> int | None:
    """Index of the one option that an answer names, or None: by capital letter, by text if no other has the same one,
    by small letter, or by a letter and that option's text ("B. blue"); all of them as `normalise` compares them."""
    said, texts, letters = normalise(answer), [normalise(option) for option in options], LABELS[: len(options)]
    if len(said) == 1 and said in letters:
        return letters.index(said)
    if said and texts.count(said) == 1:
        return texts.index(said)
    letter, _, text = said.partition(" ")
    if len(letter) == 1 and letter.upper() in letters and text in ("", texts[letters.index(letter.upper())]):
        return letters.index(letter.upper())
    return None


def lists_options(text: str, options: Sequence[str]) -> bool:
    """Whether `text` itself lists all `options` in order, each behind its letter, with nothing but separators between.

    Usual labels: "A. red", "(A) red", "A) red", "A: red", and "A red" as in the scenes. That an option's words occur
    somewhere in the text ("no" in "not") is not enough; a list that is doubted is listed again, which harms nothing.
    An option without text has a letter and is not listed.
    """
    named = [(label, option) for label, option in zip(LABELS, options, strict=False) if option.strip()]
    if not named or len(options) > len(LABELS):
        return False
    words = [(label, " ".join(option.split())) for label, option in named]
    lines = re.sub(r"\s+", lambda found: "\n" if "\n" in found[0] else " ", text)
    flat = lines.replace("\n", " ")
    begun = (found.end() for found in re.finditer(_LABELLED.format(words[0][0]), flat))
    return any(_listed(lines, flat, place, words) for place in begun)


_LABELLED = r"(?<!\w)(?:\({0}\)\s*|{0}[.):]\s*|{0}\s+)"
_SEPARATED = r"(?![^\w\s]*\w)[\s.,;|/]*(?:(?:and|or)\s+)?"
_LISTED = re.compile(r"(?![^\w\s]*\w) ?(?:$|[\n.,;!?)\]])")


def _listed(lines: str, flat: str, place: int, words: Sequence[tuple[str, str]]) -> bool:
    """Whether the options stand from `place` on, behind the first one's label; each run of spaces is one character."""
    for n, (label, option) in enumerate(words):
        if n:
            between = re.compile(_SEPARATED + _LABELLED.format(label)).match(flat, place)
            if between is None:
                return False
            place = between.end()
        if not flat.startswith(option, place):  # a pattern of it takes time and memory to make, and is kept
            return False
        place += len(option)
    return _LISTED.match(lines, place) is not None


def template(text: str) -> str:
    """A question's text with every shape, colour and relation replaced by a placeholder."""
    return " ".join(_PLACEHOLDERS.get(word, word) for word in text.split())

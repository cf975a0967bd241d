"""The closed vocabulary of the rendered scenes, and the form in which answers are compared.

Every question, answer and piece of evidence of `clear.sources.questions` is a sequence of these words separated by
single spaces, so that a word-level tokenizer of about seventy entries covers the source. Letters on signs are
lower-case words; capital A to D are the labels of multiple-choice options and nothing else.
"""

import re

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


def normalise(text: str) -> str:
    """`text` as it is compared: lower-case words, single spaces, no punctuation; the words A, B, C, D stay capital.

    An option label and the letter on a sign therefore stay different: "A." gives "A", "(k)" and "K" give "k".
    """
    words = re.findall(r"[^\W_]+", text)
    return " ".join(word if word in OPTION_LETTERS else word.lower() for word in words)


def template(text: str) -> str:
    """A question's text with every shape, colour and relation replaced by a placeholder."""
    return " ".join(_PLACEHOLDERS.get(word, word) for word in text.split())

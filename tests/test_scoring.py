"""What is right: choices by letter or text, free answers by exact match, pairs by both halves."""

import math
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clear.bench import scoring
from clear.data.records import Question
from clear.errors import ClearError
from clear.sources import rows
from tests.helpers.predictions import frame_of

COLOURS = ("red", "blue", "dark green", "blue sky")


RIGHT = ("b", "B", "B.", "(b)", "Blue!", "b blue", "B: blue")
WRONG = ("a", "red", "", "b red", "blue sky", "a b", "the blue one", "e", "B blue sky")


@pytest.mark.parametrize("answer", ["b", "B", "blue"])
def test_a_choice_is_right_by_letter_or_by_text(answer):
    question = Question("q", "attribute", "?", answer, COLOURS)
    assert [said for said in RIGHT if not scoring.is_correct(said, question)] == []
    assert [said for said in WRONG if scoring.is_correct(said, question)] == []


def test_options_that_are_letters_are_told_from_labels_by_their_case():
    question = Question("q", "attribute", "?", "B", ("b", "k"))
    assert scoring.is_correct("B", question) and scoring.is_correct("k", question)
    assert not scoring.is_correct("b", question)


def test_a_free_answer_is_right_by_exact_match():
    question = Question("q", "reading", "?", "K")
    assert scoring.is_correct(" k. ", question)
    assert not scoring.is_correct("", question) and not scoring.is_correct("k j", question)
    assert not scoring.is_correct("", Question("q", "reading", "?", "."))


ALIKE = (
    ("-5", "−5", "–5", " -5. "),
    ("5", "5.", "$5", "5%", "5 %", "(5)"),
    ("2/3", "2 / 3", "2⁄3"),
    ("1000", "1,000", "1,000."),
    ("-1234.5", "−1,234.5"),
    ("1.0", "1.0."),
    ("<5", "< 5"),
    (">=5", "≥ 5"),
    ("%", " % "),
    ("<", "<"),
    ("A+", "a+"),
    ("3-4", "3–4"),
    ("10:30", "10:30."),
    ("x-ray", "x ray", "X-Ray"),
    ("top-left", "top left"),
    ("e.g.", "e.g", "E.g."),
    ("A dog", "a dog", "a dog."),
    ("café", "cafe\u0301", "Café"),
    ("की", "की।"),
    ("none", "None", "NONE."),
    ("is not", "Is not!"),
)
"""Texts of one line are one answer, those of two lines are two."""


@pytest.mark.parametrize("said", [one for group in ALIKE for one in group])
def test_signs_decide_between_free_answers_and_separators_do_not(said):
    for group in ALIKE:
        for gold in group:
            assert scoring.is_correct(said, Question("q", "reading", "?", gold)) == (said in group), gold


UNLIKE = (
    "5 -5|+5 -5|2_3 2/3|23 2/3|A A+|A- A+|C C#|1 1.0|1_0 1.0|.5 5|34 3-4|1030 10:30|> <|= ≠|का की|? !|18 18+|12 1,2"
)


@pytest.mark.parametrize("case", UNLIKE.split("|"))
def test_other_signs_that_decide(case):
    said, gold = (text.replace("_", " ") for text in case.split(" "))
    assert not scoring.is_correct(said, Question("q", "reading", "?", gold))


@given(st.integers() | st.decimals(allow_nan=False, allow_infinity=False, places=2))
def test_numbers_are_told_apart_and_thousands_separators_are_not(value):
    question = Question("q", "counting", "?", f"{value:f}" if isinstance(value, Decimal) else str(value))
    assert scoring.is_correct(f" {value:,}. ", question)
    for other in (-value or 1, value + 1, value * 10 or 10):
        assert not scoring.is_correct(f"{other:,}", question)


def test_options_may_be_signs():
    question = Question("q", "comparison", "?", "<", ("<", ">", "="))
    assert (
        scoring.is_correct("<", question) and scoring.is_correct("A", question) and scoring.is_correct("a: <", question)
    )
    assert not scoring.is_correct(">", question) and not scoring.is_correct("B", question)


def test_an_option_text_that_occurs_twice_decides_nothing():
    question = Question("q", "attribute", "?", "a", ("red", "red", "blue"))
    assert scoring.is_correct("a", question) and not scoring.is_correct("red", question)
    with pytest.raises(ClearError, match="Question q: the answer 'pink' names none of the options"):
        scoring.is_correct("red", Question("q", "attribute", "?", "pink", ("red", "blue")))


texts = st.sampled_from(
    ["5", "5%", "$5", "50", "90°", "red", "Red", "a cup", "B", "b", "C. red", "(B) red", "D.", "x_1"]
)


@given(st.lists(texts, min_size=2, max_size=5), texts)
def test_an_answer_that_a_source_takes_is_right(options, answer):
    """Scoring would refuse it, after every question has been answered."""
    made = rows.question("q", "t", "which ?", answer, options)
    assert isinstance(made, str) or scoring.is_correct(made.answer, made)
    assert options.count(answer) != 1 or not isinstance(made, str), "the text of one option names it"


def test_an_answer_may_be_the_letter_and_the_text_of_its_option():
    for answer in ("B. blue", "(B) blue", "b", "blue"):
        made = rows.question("q", "t", "Which?\nA. red\nB. blue", answer, rows.options_in("Which?\nA. red\nB. blue"))
        assert made.options == ("red", "blue") and scoring.is_correct("B", made) and not scoring.is_correct("A", made)


def test_both_halves_of_a_pair_must_be_right():
    halves = [("p", "jpeg", True), ("p", "jpeg", True), ("r", "jpeg", True), ("r", "jpeg", False), ("t", "dark", True)]
    frame = frame_of(*({"pair": pair, "corruption": name, "correct": right} for pair, name, right in halves))
    cells = scoring.pair_accuracy(frame).set_index("corruption")
    assert cells.loc["jpeg", ["accuracy", "pairs", "incomplete"]].tolist() == [0.5, 2, 0]
    assert math.isnan(cells.loc["dark", "accuracy"]) and cells.loc["dark", "incomplete"] == 1
    assert scoring.pair_summary(frame) == {"high": {"accuracy": 0.5, "pairs": 2, "incomplete": 1}}
    with pytest.raises(ClearError, match="Pair p has 3 halves"):
        scoring.pair_accuracy(frame_of(*[{"pair": "p"}] * 3))
    assert scoring.pair_summary(frame_of({})) == {}

"""The trace grammar: what is written can be read back, and only well-formed traces count as such."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clear.reasoning import grammar
from clear.reasoning.grammar import (
    ANSWER,
    END_ANSWER,
    END_THINK,
    THINK,
    TRIGGER,
    asks_restoration,
    direct_prefix,
    direct_trace,
    extract_answer,
    plain_reply,
    restore_reply,
    restore_trace,
    well_formed,
)

# Any text over one or more lines that holds no tag; an answer is compared without its outer white space.
TEXT = st.text(st.characters(exclude_characters="<>", exclude_categories=("Cs",)), max_size=40)


@given(evidence=TEXT, answer=TEXT)
def test_a_plain_reply_gives_its_answer_back(evidence, answer):
    reply = plain_reply(evidence, answer)
    assert extract_answer(reply) == answer.strip()
    assert well_formed([reply]) and not asks_restoration(reply)


@given(st.lists(st.sampled_from([ANSWER, END_ANSWER, " ", "a", "\n", "\x1c", "\u2003", "<"]), max_size=12).map("".join))
def test_answer_blocks_are_those_of_the_pattern(text):
    assert grammar.answers(text) == re.findall(rf"{ANSWER}\s*(.*?)\s*{END_ANSWER}", text, re.DOTALL)


@given(evidence=TEXT, answer=TEXT)
def test_a_direct_trace_is_one_reply_that_begins_with_the_forced_prefix(evidence, answer):
    trace = direct_trace(evidence, answer)
    assert not trace.restores and len(trace.replies) == 1
    assert trace.replies[0].startswith(direct_prefix())
    assert extract_answer(trace.replies[-1]) == answer.strip()
    assert well_formed(list(trace.replies))


@given(question=TEXT, evidence=TEXT, answer=TEXT)
def test_a_restoring_trace_asks_first_and_answers_then(question, evidence, answer):
    trace = restore_trace(question, evidence, answer)
    assert trace.restores and [asks_restoration(reply) for reply in trace.replies] == [True, False]
    assert extract_answer(trace.replies[0]) == ""
    assert extract_answer(trace.replies[1]) == answer.strip()
    assert well_formed(list(trace.replies))
    assert question in trace.replies[1], "the second think restates the question"
    assert not trace.replies[0].startswith(direct_prefix()), "the forced prefix forbids this reply"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{ANSWER}red{END_ANSWER}", "red"),
        (f"{ANSWER}\n  two\nlines \n{END_ANSWER}", "two\nlines"),
        (f"{THINK} a\nb {END_THINK}\n{ANSWER}\nC\n{END_ANSWER}\n", "C"),
        (f"{ANSWER} one {END_ANSWER} {ANSWER} two {END_ANSWER}", "two"),
        (f"{ANSWER} {END_ANSWER}", ""),
        (f"{ANSWER} never closed", ""),
        (f"never opened {END_ANSWER}", ""),
        ("no block", ""),
        ("", ""),
    ],
)
def test_extract_answer(text, expected):
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (restore_reply(), True),
        (TRIGGER, True),
        (f"{THINK} x {END_THINK}\n{TRIGGER}\n", True),
        (f"{THINK} no need for {TRIGGER} {END_THINK} {ANSWER} red {END_ANSWER}", False),  # a finished answer wins
        (f"{TRIGGER} {ANSWER} late {END_ANSWER}", False),
        (f"{THINK} only {TRIGGER} helps {END_THINK}", True),
        (f"{ANSWER} never closed {TRIGGER}", True),
        (f"{END_ANSWER} {TRIGGER} {ANSWER}", True),  # no block
        (f"{ANSWER} a {END_ANSWER} {TRIGGER}", False),
        (plain_reply("x", "a"), False),
        ("", False),
    ],
)
def test_asks_restoration(reply, expected):
    assert asks_restoration(reply) is expected


GOOD, ASK = plain_reply("x", "a"), restore_reply()


@pytest.mark.parametrize(
    ("replies", "expected"),
    [
        ([GOOD], True),
        ([ASK, GOOD], True),
        ([ASK, ASK, GOOD], True),
        (["  \n" + GOOD + "\n"], True),
        ([f"{THINK}\nx\n{END_THINK}\n{ANSWER}\na\n{END_ANSWER}"], True),
        ([], False),
        ([""], False),
        ([ASK], False),  # nobody answers
        ([GOOD, GOOD], False),  # the first reply has answered already
        ([GOOD, ASK], False),
        ([f"{ANSWER} a {END_ANSWER}"], False),  # no think
        ([f"{THINK} x {END_THINK}"], False),  # neither answer nor trigger
        ([f"{THINK} x {ANSWER} a {END_ANSWER}"], False),  # the think is never closed
        ([f"{THINK} x {END_THINK} {ANSWER} a"], False),
        ([GOOD + " more"], False),
        ([f"words {GOOD}"], False),
        ([f"{GOOD} {TRIGGER}"], False),
        ([f"{THINK} x {END_THINK} {THINK} y {END_THINK} {ANSWER} a {END_ANSWER}"], False),
    ],
)
def test_well_formed(replies, expected):
    assert well_formed(replies) is expected


def test_every_word_of_the_grammar_is_in_its_vocabulary():
    written = [plain_reply("", ""), restore_reply(), direct_prefix(), *restore_trace("", "", "").replies]
    assert {word for reply in written for word in reply.split()} <= set(grammar.WORDS)

"""A refusal whatever names from outside are in it: one line, which rewrites no terminal and no log."""

import pytest

from clear.errors import ClearError


@pytest.mark.parametrize("name", ["one\ntwo", "one\r\n  two", "one\u2028two", "\none\x0btwo"])
def test_a_name_with_line_breaks_leaves_a_refusal_on_one_line(name):
    assert str(ClearError(f"no column {name}; rename it.")) == "no column one two; rename it."


def test_a_name_with_control_characters_is_escaped():
    assert str(ClearError("file \x1b[2J\x07 is missing.")) == r"file \x1b[2J\x07 is missing."

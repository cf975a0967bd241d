"""Demonstrations: the rule that chooses them, their table, and tables that are not whole."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clear.errors import ClearError
from clear.reasoning.grammar import asks_restoration, extract_answer, well_formed
from clear.records import CLEAN, Question, Sample
from clear.traces.oracle import restores, trace_row
from clear.traces.records import FILE, TraceRow, read_traces, write_traces

QUESTION = Question("q1", "colour", "what colour is the cup ?", "red", evidence="cup is red")
SAMPLE = Sample("s1", "scenes", "sft", b"", "", (QUESTION,), degraded=b"x", corruption="dark", severity="high")


@pytest.mark.parametrize(
    ("rule", "base_correct", "clean_correct", "expected"),
    [
        ("base_wrong", False, True, True),
        ("base_wrong", False, False, True),
        ("base_wrong", True, True, False),
        ("degradation", False, True, True),
        ("degradation", False, False, False),
        ("degradation", True, True, False),
        ("always", True, True, True),
        ("never", False, True, False),
    ],
)
def test_the_rule_decides_the_pathway(rule, base_correct, clean_correct, expected):
    assert restores(rule, base_correct, clean_correct) is expected


def test_a_restoring_trace_asks_and_then_restates_the_question():
    row = trace_row(SAMPLE, QUESTION, restore=True, base_correct=False)
    assert (row.sample, row.question, row.corruption, row.severity) == ("s1", "q1", "dark", "high")
    assert asks_restoration(row.reply_1) and QUESTION.text in row.reply_2 and QUESTION.evidence in row.reply_2
    assert extract_answer(row.reply_2) == extract_answer(row.direct) == "red"
    assert row.trace.restores and well_formed(list(row.trace.replies)) and not row.base_correct


def test_a_direct_trace_is_the_reply_of_the_baseline():
    row = trace_row(SAMPLE, QUESTION, restore=False, base_correct=True)
    assert row.reply_1 == row.direct and row.reply_2 == "" and row.base_correct
    assert not row.trace.restores and row.trace.replies == (row.direct,) and well_formed([row.direct])


def test_a_clean_trace_says_so():
    row = trace_row(SAMPLE, QUESTION, restore=False, base_correct=True, clean=True)
    assert (row.corruption, row.severity) == (CLEAN, CLEAN) and not row.trace.restores


@pytest.fixture
def rows() -> list[TraceRow]:
    """One trace of each kind; the question spans lines and leaves ASCII."""
    odd = Question("q2", "count", "wie viele Tassen,\nöfter ?", "", evidence="")
    return [
        trace_row(SAMPLE, QUESTION, True, False),
        trace_row(SAMPLE, odd, False, True),
        trace_row(SAMPLE, odd, False, True, clean=True),
    ]


def test_written_traces_are_read_back_in_order(tmp_path, rows):
    write_traces(tmp_path / "new" / "folder", rows)
    assert read_traces(tmp_path / "new" / "folder") == rows


def test_equal_traces_give_equal_bytes(tmp_path, rows):
    write_traces(tmp_path / "a", rows)
    write_traces(tmp_path / "b", rows)
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ClearError, match=FILE):
        read_traces(tmp_path)


@pytest.mark.parametrize("column", list(TraceRow.__dataclass_fields__))
def test_a_missing_column_is_named(tmp_path, rows, column):
    write_traces(tmp_path, rows)
    table: pa.Table = pq.read_table(tmp_path / FILE)
    pq.write_table(table.drop_columns([column]), tmp_path / FILE)
    with pytest.raises(ClearError, match=rf"{FILE}.*'{column}'"):
        read_traces(tmp_path)

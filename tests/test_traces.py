"""Demonstrations: the rule that chooses them, their table, and tables that are not whole."""

import json
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clear.config import compose, from_dict
from clear.data.records import CLEAN, Question, Sample, drawn, write_samples
from clear.degradation.build import degraded_samples
from clear.errors import ClearError
from clear.reasoning.grammar import asks_restoration, direct_trace, extract_answer, well_formed
from clear.sources.scenes.render import scenes
from clear.stages import traces
from clear.traces import table
from clear.traces.checks import TRACE_CHECKS, trace_frame
from clear.traces.oracle import restores, trace_row
from clear.traces.table import FILE, TraceRow, read_traces, write_traces
from clear.validation.expectations import listed, run_checks
from tests.tiny import trace_workspace

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
    assert list(read_traces(tmp_path / "new" / "folder")) == rows


def test_equal_traces_give_equal_bytes(tmp_path, rows):
    write_traces(tmp_path / "a", rows)
    write_traces(tmp_path / "b", rows)
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()


def test_a_long_table_has_several_row_groups_and_the_same_rows(tmp_path, rows, monkeypatch):
    write_traces(tmp_path / "one", rows * 5)
    monkeypatch.setattr(table, "GROUP", 4)
    assert write_traces(tmp_path / "four", iter(rows * 5)) == 15
    with pq.ParquetFile(tmp_path / "four" / FILE) as file:
        assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)] == [4, 4, 4, 3]
    assert list(read_traces(tmp_path / "four")) == rows * 5
    assert pq.ParquetFile(tmp_path / "one" / FILE).num_row_groups == 1


def test_traces_pass_through_the_stage_and_do_not_gather(tmp_path, rows, monkeypatch):
    """How many are alive at once while sixty are written, counted and read again."""
    alive, most = weakref.WeakSet(), 0

    def passing(*_) -> Iterator[TraceRow]:
        nonlocal most
        for n in range(60):
            row = replace(rows[0], sample=f"s{n}")
            alive.add(row)
            most = max(most, len(alive))
            yield row

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(traces, "_demonstrated", passing)
    monkeypatch.setattr(traces, "_failures", lambda *_: [])
    monkeypatch.setattr(table, "_BATCH", 4, raising=False)
    traces.run(from_dict(compose(["profile=smoke"])))
    assert json.loads(traces.METRICS.read_text())["traces"] == len(list(read_traces(traces.OUT))) == 60
    assert most <= 12  # three batches


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ClearError, match=FILE):
        list(read_traces(tmp_path))


@pytest.mark.parametrize("column", list(TraceRow.__dataclass_fields__))
def test_a_missing_column_is_named(tmp_path, rows, column):
    write_traces(tmp_path, rows)
    whole: pa.Table = pq.read_table(tmp_path / FILE)
    pq.write_table(whole.drop_columns([column]), tmp_path / FILE)
    with pytest.raises(ClearError, match=rf"{FILE}.*'{column}'"):
        list(read_traces(tmp_path))


# --- the expectations ------------------------------------------------------------------------------------------------

CHOICE = Question("q3", "colour", "is the cup red or blue ?", "B", options=("red", "blue"), evidence="cup is blue")
ALONE = replace(SAMPLE, id="s2", image=b"x", degraded=b"x", corruption="set", severity="incoming", paired=False)
ASKED = replace(SAMPLE, questions=(QUESTION, CHOICE))
GOOD = [
    trace_row(ASKED, QUESTION, restore=True, base_correct=False),
    trace_row(ASKED, CHOICE, restore=False, base_correct=True),
    trace_row(ASKED, CHOICE, restore=False, base_correct=True, clean=True),
    trace_row(ALONE, QUESTION, restore=False, base_correct=False),
]


def violated(tmp_path, rows: list[TraceRow], judged: bool = False) -> dict[str, list[str]]:
    """{failed check: its rows} of a written table, without Great Expectations, which takes a second per table."""
    write_traces(tmp_path / "traces", rows)
    frame = trace_frame(read_traces(tmp_path / "traces"), iter([ASKED, ALONE]), judged)
    broken = {check.name: frame["key"][check.failing(frame)].tolist() for check in TRACE_CHECKS}
    return {name: keys for name, keys in broken.items() if keys}


def test_no_question_outlives_its_sample_when_traces_are_checked():
    alive = weakref.WeakSet()

    def samples() -> Iterator[Sample]:
        for n in range(40):
            question = Question(f"q{n}", "colour", f"what colour is cup {n} ?", "red", evidence=f"cup {n} is red")
            alive.add(question)
            yield replace(SAMPLE, id=f"s{n}", questions=(question,))

    def rows() -> Iterator[TraceRow]:
        assert len(alive) <= 1  # asked once all samples were read
        for sample in list(samples()):
            yield trace_row(sample, sample.questions[0], restore=True, base_correct=False)

    frame = trace_frame(rows(), samples())
    assert len(frame) == 40 and frame["known"].all() and frame["answer"].all()


def swapped(row: TraceRow, old: str, new: str) -> TraceRow:
    """The trace with another answer in every reply."""
    parts = {name: getattr(row, name).replace(f"> {old} <", f"> {new} <") for name in ("reply_1", "direct", "restored")}
    return replace(row, **parts)


FAULTS = {
    "a tag that is never closed": (
        1,
        lambda row: replace(row, reply_1=row.reply_1.replace("</think>", "")),
        {"grammar"},
    ),
    "a reply of the baseline with two answers": (
        0,
        lambda row: replace(row, direct=row.direct + row.direct),
        {"grammar"},
    ),
    "an asked restoration that never comes": (
        0,
        lambda row: replace(row, reply_2=""),
        {"grammar", "both_replies", "answer"},
    ),
    "a second reply nobody asked for": (
        1,
        lambda row: replace(row, reply_2=row.restored),
        {"grammar", "both_replies"},
    ),
    "the other option's letter": (1, lambda row: swapped(row, "B", "A"), {"answer"}),
    "the answer of another question": (3, lambda row: swapped(row, "red", "blue"), {"answer"}),
    "a restored clean image": (
        2,
        lambda row: replace(trace_row(ASKED, CHOICE, True, True), corruption=CLEAN, severity=CLEAN),
        {"restorable"},
    ),
    "a restoration without a clean partner": (3, lambda row: trace_row(ALONE, QUESTION, True, False), {"restorable"}),
    "a question that was never asked": (1, lambda row: replace(row, question="q9"), {"known"}),
}


def test_good_traces_violate_nothing(tmp_path):
    assert violated(tmp_path, GOOD) == {}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_injected_fault_is_caught_by_name_and_row(tmp_path, fault):
    place, spoil, checks = FAULTS[fault]
    rows = [*GOOD]
    rows[place] = spoil(rows[place])
    row = rows[place]
    key = f"{row.sample}/{row.corruption}/{row.severity}/{row.question}"
    assert violated(tmp_path, rows) == {check: [key] for check in checks}


def test_a_trace_written_twice_is_caught(tmp_path):
    assert violated(tmp_path, [*GOOD, GOOD[1]]) == {"unique": ["s1/dark/high/q3"] * 2}


def test_what_a_judge_accepted_is_not_compared_again(tmp_path):
    crimson = swapped(GOOD[3], "red", "crimson")
    assert violated(tmp_path, [crimson]).keys() == {"answer"}
    assert violated(tmp_path, [crimson], judged=True) == {}


def test_great_expectations_gives_the_verdict_and_the_data_docs(tmp_path):
    faults = [replace(GOOD[0], reply_1="restore it <image_restore>"), swapped(GOOD[1], "B", "A"), *GOOD[2:]]
    frames = {name: trace_frame(rows, [ASKED, ALONE]) for name, rows in (("good", GOOD), ("bad", faults))}
    found = run_checks(frames, dict.fromkeys(frames, TRACE_CHECKS), tmp_path / "docs")
    assert found["good"] == [] and (tmp_path / "docs" / "index.html").is_file()
    assert {f.check.name: f.keys for f in found["bad"]} == {
        "grammar": ("s1/dark/high/q1",),
        "answer": ("s1/dark/high/q3",),
    }
    assert "bad fails 'grammar' (every reply obeys the trace grammar) for 1 traces: s1/dark/high/q1" in listed(
        found, "traces"
    )


def test_a_trace_that_breaks_the_grammar_stops_the_stage_and_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, *others = degraded_samples([(sample, "dark", "low") for sample in scenes("sft", 4, 1, 64, 2)], 0.1, 1)
    bad = replace(one.questions[0], evidence="</think> the sign says a")
    one = replace(one, questions=(bad, *one.questions[1:]))
    config = trace_workspace(tmp_path, ["traces.restore_when=never"], [one, *others])
    key = f"{one.key}/{bad.id}"
    with pytest.raises(ClearError, match=rf"^traces: .* fails 'grammar' .* {key}.*See {traces.REJECTS}"):
        traces.run(config)
    verdict = json.loads(traces.METRICS.read_text())["validation"]
    failed = {found["expectation"]: found for found in verdict["failed"]}
    assert not verdict["success"] and key in failed["grammar"]["ids"]
    rejects = pq.read_table(traces.REJECTS).to_pylist()
    assert {"id": key, "subset": "low", "reason": "grammar"}.items() <= rejects[0].items()
    write_samples("data/degraded/sft", others)
    traces.run(config)
    assert pq.read_table(traces.REJECTS).num_rows == 0
    verdict = json.loads(traces.METRICS.read_text())["validation"]
    assert verdict == {"success": True, "expectations": len(TRACE_CHECKS), "failed": []}


def test_where_a_question_brings_no_evidence_its_answer_is_all_that_is_noted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    one, *others = degraded_samples([(sample, "dark", "low") for sample in scenes("sft", 4, 1, 64, 1)], 0.1, 1)
    bare = replace(one, questions=(replace(one.questions[0], evidence=""),))
    config = trace_workspace(tmp_path, ["traces.restore_when=always"], [bare, *others])
    traces.run(config)
    assert "1 of 4 questions bring no evidence" in capsys.readouterr().out
    row, other = islice(read_traces(traces.OUT), 2)
    answer = bare.questions[0].answer
    assert row.direct == direct_trace(answer, answer).replies[0] and f": {answer} </think>" in row.reply_2
    assert others[0].questions[0].evidence in other.reply_2
    write_samples("data/degraded/sft", [bare])
    with pytest.raises(
        ClearError, match=rf"none of 1 questions brings evidence \(the last is {bare.questions[0].id}\)"
    ):
        traces.run(config)


def test_the_blocks_that_bound_the_memory_change_no_byte(tmp_path, monkeypatch):
    """Three questions about one image fall into three blocks of four, and some images into two blocks."""
    monkeypatch.chdir(tmp_path)
    samples = list(degraded_samples([(sample, "dark", "low") for sample in scenes("sft", 4, 1, 64, 4)], 0.1, 1))
    made = []
    for batch in (4, 64):
        settings = ["traces.questions=3", "traces.clean_share=0.5", f"sampling.batch={batch}"]
        traces.run(trace_workspace(tmp_path, settings, samples))
        made.append([file.read_bytes() for file in (traces.OUT / FILE, traces.METRICS)])
    assert made[0] == made[1]
    rows = list(read_traces(traces.OUT))
    asked = [q.id for sample in samples for q in sample.questions[:3]]
    clean = sorted(drawn([f"{sample.id}/{q.id}" for sample in samples for q in sample.questions[:3]], 6))
    assert [row.question for row in rows] == [*asked, *(asked[n] for n in clean)]
    assert [row.severity for row in rows] == ["low"] * 12 + [CLEAN] * 6


def test_pictures_are_read_twice(tmp_path, monkeypatch):
    """To ask the base about the degraded and about the clean ones; the rule, the rows and the checks need the text."""
    monkeypatch.chdir(tmp_path)
    samples = list(degraded_samples([(sample, "dark", "low") for sample in scenes("sft", 6, 1, 64, 2)], 0.1, 1))
    config = trace_workspace(tmp_path, ["traces.clean_share=0.5", "traces.questions=2", "sampling.batch=4"], samples)
    read, pictures = traces.read_samples, Counter()

    def counted(folder, columns=None):
        for sample in read(folder, columns):
            pictures[sample.id] += bool(sample.image or sample.degraded)
            yield sample

    monkeypatch.setattr(traces, "read_samples", counted)
    traces.run(config)
    assert pictures == {sample.id: 2 for sample in samples}


def test_the_share_of_clean_traces_is_the_one_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    samples = list(degraded_samples([(sample, "dark", "low") for sample in scenes("sft", 10, 1, 64, 1)], 0.1, 1))
    traces.run(trace_workspace(tmp_path, ["traces.clean_share=0.7"], samples))
    rows = list(read_traces(traces.OUT))
    assert [row.severity for row in rows] == ["low"] * 10 + [CLEAN] * 7


def test_a_share_drawn_by_hash_knows_neither_order_nor_subset():
    names = [f"{subset}-{n}" for subset in "abcde" for n in range(200)]
    chosen = {names[n] for n in drawn(names, 200)}
    assert len(chosen) == 200 and {names[::-1][n] for n in drawn(names[::-1], 200)} == chosen
    assert all(25 <= sum(name[0] == subset for name in chosen) <= 55 for subset in "abcde")
    assert drawn(names[:3], 5) == {0, 1, 2} and drawn(names, 0) == set()


def test_no_clean_trace_where_none_is_wanted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    samples = degraded_samples([(sample, "dark", "low") for sample in scenes("sft", 2, 1, 64, 1)], 0.1, 1)
    traces.run(trace_workspace(tmp_path, ["traces.clean_share=0"], samples))
    assert {row.severity for row in read_traces(traces.OUT)} == {"low"}

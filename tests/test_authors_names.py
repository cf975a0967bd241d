"""Tables under the names that MMD-Bench's authors give them are answered and scored as what they are."""

import pytest

from clear.bench.vlmeval import names, scores
from clear.bench.vlmeval.answering import answer_table
from tests.helpers.respondents import Says
from tests.helpers.tables import b64, png, write_tsv

AUTHORS = {
    "MMBench_DEV_EN_V11": {"question": "Which?", "A": "red", "B": "blue", "answer": "A"},
    "MMVP": {"question": "Which?", "A": "red", "B": "blue", "answer": "A"},
    "CV-Bench-2D": {"prompt": "Which?\n(A) red\n(B) blue", "A": "red", "B": "blue", "answer": "A", "source": "ADE20K"},
    "MMStar": {"question": "Which?", "A": "red", "B": "blue", "answer": "A"},
    "RealWorldQA": {"question": "Which?", "A": "red", "B": "blue", "answer": "A"},
    "R-Bench-Dis": {"question": "Which?", "A": "red", "B": "blue", "answer": "A"},
    "MMVet": {"question": "What?", "answer": "red"},
}
"""A row of each benchmark of MMD-Bench, and of the seventh column of its table."""


RIGHT = Says(lambda index: "<think> hm </think> <answer>A</answer>")


@pytest.mark.parametrize("bench", AUTHORS)
def test_tables_under_the_authors_names_are_answered_and_scored_under_them(tmp_path, bench):
    """Clean, three mixed levels, and sixteen of one corruption each: every file is in the table as what it is."""
    ends = ["", *(f"_LOW_LEVEL_{level}" for level in names.LEVELS.values()), *(f"_{n}" for n in names.AUTHORS.values())]
    assert len(ends) == 20
    rows = [{"index": n, "image": b64(png(n)), "category": "c", "l2-category": "d"} | AUTHORS[bench] for n in (0, 1)]
    files = [write_tsv(tmp_path / f"{bench}{end}.tsv", rows) for end in ends]
    tables = [answer_table(file, tmp_path / "out", "CLEAR-RL", RIGHT).table for file in files]
    assert [table.name for table in tables] == [f"CLEAR-RL_{file.name}" for file in files]
    frame = scores.read_predictions(tables)
    found = {(row.corruption, row.severity) for row in frame.itertuples()}
    ours = {(corruption, names.AUTHORS_LEVEL) for corruption in names.AUTHORS}
    assert found == {("clean", "clean")} | {(names.MIXED, level) for level in names.LEVELS} | ours
    assert set(frame["bench"]) == {f"CLEAR-RL_{bench}"} and len(frame) == 2 * len(ends)
    if bench == "MMVet":  # a judge grades it
        return
    summed = scores.summary(scores.score(frame))["benchmarks"][f"CLEAR-RL_{bench}"]["levels"]
    assert summed.keys() >= {"clean", "low", "mid", "high"}
    assert all(summed[level]["score"] == 1.0 for level in ("clean", "low", "mid", "high"))

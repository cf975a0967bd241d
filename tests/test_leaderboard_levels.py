"""Relative robustness in the leaderboard is over the questions that the models have at clean and at hard."""

import pytest

from clear.report import leaderboard as shown
from tests.helpers.boards import cell, made, mcq, put, rows


def robust(board: dict, model: str) -> dict:
    return board["models"][model]["robustness"]


def test_a_ratio_and_its_interval_are_over_the_questions_of_both_levels(tmp_path):
    """The tables that end early gave 200 % with an interval well above 1; now they give what the whole ones would."""
    right = {"base": (lambda n: n < 30, lambda n: n % 2), "new": (lambda n: n % 3, lambda n: n % 3 == 1)}
    early, whole = [], []
    for model, (clean, hard) in right.items():
        early += put(tmp_path / "early", model, MMStar=rows(40, clean), MMStar_LOW_LEVEL_HIGH=rows(20, hard))
        whole += put(tmp_path / "whole", model, MMStar=rows(20, clean), MMStar_LOW_LEVEL_HIGH=rows(20, hard))
    board, wanted = made(early, "base"), made(whole, "base")
    for model in right:
        found, same = (robust(one, model)["relative"] for one in (board, wanted))
        assert found["estimate"] == pytest.approx(same["estimate"]) and found["n"] == same["n"]
        assert found["low"] == pytest.approx(same["low"], rel=0.2) and found["low"] < found["estimate"] < found["high"]
    difference, same = (robust(one, "new")["relative"]["minus_reference"] for one in (board, wanted))
    assert difference["estimate"] == pytest.approx(same["estimate"]) and difference["n"] == same["n"]
    assert cell(board, "base", "clean")["n"] == 40 and robust(board, "base")["absolute"]["n"] == 20
    note = "MMStar: of 40 questions high lacks 20; relative robustness is over the 20 that clean and high share."
    assert board["notes"] == [note] and note in shown.text(board) and wanted["notes"] == []


def test_several_benchmarks_corruptions_and_rotations(tmp_path):
    """One benchmark has the same questions at both levels, one lost a rotation at hard, one ends early there."""
    turned = [mcq(n + turn, n != 1 or turn == 0) for n in range(4) for turn in (0, 1_000_000)]
    tables = {
        "MMBench_DEV_EN_V11": turned,
        "MMBench_DEV_EN_V11_LOW_LEVEL_HIGH": [row for row in turned if row["index"] != 1_000_001],
        "MMStar": rows(8, lambda n: n < 4),
        "MMStar_dark_HIGH": rows(4, lambda n: n < 2),
        "MMStar_jpeg_HIGH": rows(4, lambda n: n < 4),
        "RealWorldQA": rows(8, lambda n: n < 6),
        "RealWorldQA_LOW_LEVEL_HIGH": rows(8, lambda n: n < 3),
    }
    board = made(put(tmp_path, "m", **tables))
    assert robust(board, "m")["relative"]["estimate"] == pytest.approx((1 + 0.75 + 3 / 8) / (1 + 1 + 6 / 8))
    assert robust(board, "m")["absolute"]["estimate"] == pytest.approx((1 + 0.75 + 3 / 8) / 3)
    said = [note.split(";")[0] for note in board["notes"]]
    assert said == ["MMBench_DEV_EN_V11: of 8 questions high lacks 1", "MMStar: of 8 questions high lacks 4"]


def test_levels_without_a_common_question_have_no_ratio(tmp_path):
    tables = {"MMStar": rows(8, bool)[4:], "MMStar_LOW_LEVEL_HIGH": rows(4, bool)}
    board = made(put(tmp_path, "a", **tables) + put(tmp_path, "b", **tables), "a")
    assert robust(board, "b")["relative"] is None and robust(board, "b")["absolute"]["estimate"] == 0.75
    assert board["notes"][0].endswith("clean and high share none, so there is no relative robustness.")
    assert shown.text(board) and shown.markdown(board)

"""`clear decision`: what restoring gains, question by question, and whether the model knows it."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clear.bench import decision
from clear.bench.models import UnderTest
from clear.config import compose, from_dict
from clear.data.io import write_json
from clear.data.records import write_samples
from clear.degradation.build import degraded_samples
from clear.errors import ClearError
from clear.report import budget
from clear.sources.scenes.render import scenes
from tests.tiny import save_random_model

ROW = st.tuples(st.booleans(), st.booleans(), st.floats(0, 1))


def frame(rows, severity="high", corruption="dark"):
    found = pd.DataFrame(rows, columns=["direct", "restored", "probability"])
    found["sample"] = [f"s{n // 2}" for n in range(len(found))]
    found["question"] = [f"q{n}" for n in range(len(found))]
    found["severity"], found["corruption"], found["pair"] = severity, corruption, ""
    return found


@settings(deadline=None)
@given(st.lists(ROW, min_size=1, max_size=40))
def test_a_budget_runs_from_never_to_always_one_question_at_a_time(rows):
    found = frame(rows)
    calls, accuracy = decision.curve(found)
    assert calls[0] == 0 and calls[-1] == 1 and len(calls) == len(rows) + 1
    assert accuracy[0] == pytest.approx(found["direct"].mean()) and accuracy[-1] == pytest.approx(
        found["restored"].mean()
    )
    assert (np.abs(np.diff(accuracy)) <= 1 / len(rows) + 1e-9).all()
    assert accuracy.max() <= (found["direct"] | found["restored"]).mean() + 1e-9
    cut = sorted(found["probability"], reverse=True)
    called = found["probability"] > decision.DECIDES
    own = np.where(called, found["restored"], found["direct"]).mean()
    assert accuracy[int(called.sum())] == pytest.approx(own), cut


def test_a_model_that_knows_gains_what_there_is_and_one_that_does_not_gains_nothing():
    rng = np.random.default_rng(0)
    direct, restored = rng.random(4000) < 0.6, rng.random(4000) < 0.6
    knows = frame(list(zip(direct, restored, (restored & ~direct).astype(float), strict=True)))
    found = decision.figures(knows, resamples=200)
    high = found["severity"]["high"]
    assert high["own"] == high["either"] == high["best"]
    assert high["own_over_random"]["low"] > 0.1 and high["calls"] == pytest.approx((restored & ~direct).mean())
    assert found["corruption"]["dark"]["own"] == high["own"]
    guesses = decision.figures(frame(list(zip(direct, restored, rng.random(4000), strict=True))), resamples=200)
    random = guesses["severity"]["high"]["own_over_random"]
    assert random["low"] < 0 < random["high"]
    odds = guesses["odds_of_a_call_where_it_helps"]
    assert odds["low"] < 1 < odds["high"]
    assert set(found["severity"]) == {"high"}


def test_the_probability_is_that_of_the_model_s_own_choice(tmp_path, monkeypatch):
    """End to end on an untrained model: the columns, the file names and a model that never restores."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLEAR_HOME", str(tmp_path / "home"))
    config = from_dict(compose(["profile=smoke", "runtime.threads=1", "sampling.max_think_tokens=4"]))
    save_random_model(tmp_path / "data/models/grpo", config)
    clean = list(scenes("development", 4, 3, 128, 2))
    write_samples("data/development/clean", clean)
    cells = ("dark", "low"), ("dark", "high"), ("motion_blur", "high")
    variants = ((sample, *cells[n % 3]) for n, sample in enumerate(clean))
    write_samples("data/development/degraded", degraded_samples(variants, 0.4, workers=1))
    file = budget.run(config, "grpo")
    rows = pd.read_parquet(file.with_suffix(".parquet"))
    assert len(rows) == 16 and rows["probability"].between(0, 1).all() and rows["probability"].nunique() > 1
    assert file.with_suffix(".png").stat().st_size > 1000
    text = budget.table(json.loads(file.read_text()))
    assert "never" in text and "motion_blur" in text
    with pytest.raises(ClearError, match="never restores"):
        decision.outcomes(UnderTest(tmp_path / "data/models/grpo", "plain", "bridge", config), clean)


def test_odds_without_a_bound_are_json_and_a_dash(tmp_path):
    """Of few questions, all of which it decides rightly, nothing bounds the odds from above."""
    found = decision.figures(frame([(False, True, 0.9), (True, False, 0.1)] * 6), resamples=50)
    write_json(tmp_path / "found.json", found)

    def fail(constant: str) -> None:
        raise AssertionError(constant)

    text = (tmp_path / "found.json").read_text()
    for figures in (found, json.loads(text, parse_constant=fail)):
        assert "odds of a call where it helps, within kind and level: – times" in budget.table(figures)

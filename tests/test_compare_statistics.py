"""The statistics and the policy of a comparison: false alarms and power as calculated, Holm, whose gate applies."""

import math
import re
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clear.errors import ClearError
from clear.project.compare import differences
from clear.project.compare import verdict as verdicts
from clear.project.compare.differences import Joined, compare, holm, per_level
from clear.project.compare.load import Side
from clear.schema import Gate
from tests.revisions import GATE, lock_of


def side_of(correct: dict[str, np.ndarray], model: str = "grpo") -> Side:
    """A side in memory with one question per image and level."""
    frames = []
    for severity, right in correct.items():
        count = len(right)
        frames.append(
            pd.DataFrame(
                {
                    "sample": [f"s{n:04d}" for n in range(count)],
                    "corruption": "clean" if severity == "clean" else "jpeg",
                    "severity": severity,
                    "question": "q",
                    "task": "reading",
                    "pair": "",
                    "text": "which letter ?",
                    "answer": "k",
                    "prediction": np.where(right, "k", "c"),
                    "output": "",
                    "restored": False,
                    "correct": right,
                    "tokens": 3,
                    "psnr_degraded": math.nan if severity == "clean" else 20.0,
                    "ssim_degraded": math.nan if severity == "clean" else 0.5,
                }
            )
        )
    metrics = {"validate": {"success": True, "rejected": 0}}
    lock = lock_of()["stages"]
    return Side("x", "folder x", "", "tiny", {"profile": "tiny"}, lock, "", metrics, {model: pd.concat(frames)})


QUESTIONS, BOTH = 200, 0.6
POLICY = Gate("grpo", 0.01, 0.0, 0.95, 300, 2)


def gate_runs(runs: int, lost: float, won: float, seed: int) -> list[verdicts.Verdict]:
    """Verdicts on independent pairs whose head loses and wins single questions with the given probabilities at hard
    (and a tenth each way on clean images). The sides are joined once; every run answers the same questions anew."""
    generator, found = np.random.default_rng(seed), []
    side = side_of({severity: np.ones(QUESTIONS, bool) for severity in ("clean", "high")})
    joined = compare(side, side, "grpo", verdicts.settings_of(POLICY), detail=False)
    rows = joined.joined["grpo"].rows
    odds = {"clean": (0.1, 0.1), "high": (lost, won)}
    down, up = (rows.severity.map({key: value[index] for key, value in odds.items()}).to_numpy() for index in (0, 1))
    for _ in range(runs):
        drawn = generator.random(len(rows))
        base = drawn < BOTH + down
        head = (drawn < BOTH) | ((drawn >= BOTH + down) & (drawn < BOTH + down + up))
        answered = rows.assign(correct_base=base, correct_head=head)
        levels = holm(per_level(answered, "grpo", "correct", joined.settings))
        compared = replace(joined, joined={"grpo": Joined(answered, len(rows), len(rows))}, levels=levels)
        found.append(verdicts.judge(compared, POLICY, []))
    return found


def binomial_interval(runs: int, probability: float, level: float = 0.999) -> tuple[int, int]:
    from scipy.stats import binom

    low, high = binom.interval(level, runs, probability)
    return int(low), int(high)


def power_of(loss: float, discordant: float, margin: float) -> float:
    """Chance that a 95 % interval of a paired difference lies below −margin, by the normal approximation."""
    error = math.sqrt((discordant - loss**2) / QUESTIONS)
    return NormalDist().cdf((loss - margin) / error - NormalDist().inv_cdf(0.975))


def test_the_gate_stops_as_many_equal_changes_as_it_should():
    runs = 300
    found = gate_runs(runs, 0.1, 0.1, seed=0)
    by_rule = {name: sum(not one.rules[index].kept for one in found) for name, index in (("clean", 3), ("hard", 4))}
    nominal = {"clean": power_of(0.0, 0.2, POLICY.clean_margin), "hard": 0.025}
    assert nominal["hard"] == pytest.approx(power_of(0.0, 0.2, POLICY.hard_margin))
    for name, stopped in by_rule.items():
        low, high = binomial_interval(runs, nominal[name])
        assert low <= stopped <= high, (name, stopped)
    either = 1 - (1 - nominal["clean"]) * (1 - nominal["hard"])
    low, high = binomial_interval(runs, either)
    assert low <= sum(one.status == 1 for one in found) <= high
    assert {one.status for one in found} <= {0, 1}


def test_a_planted_loss_is_found_as_often_as_an_independent_calculation_says():
    runs, lost, won = 300, 0.12, 0.04
    found = gate_runs(runs, lost, won, seed=12)
    expected = power_of(lost - won, lost + won, POLICY.hard_margin)
    assert 0.7 < expected < 0.9
    low, high = binomial_interval(runs, expected)
    stopped = sum(not one.rules[4].kept for one in found)
    assert low <= stopped <= high
    assert all(one.kind == "worse" for one in found if not one.rules[4].kept)


def test_holm_matches_the_step_down_by_hand():
    shape = differences.Difference(
        *("grpo", "correct", "high", "", "", 0.5, 0.5, 0.0, None, None, None, 1, 1, 0, 0, 1.0, 1.0, 0.95)
    )
    corrected = holm([replace(shape, p=p) for p in (0.01, 0.04, 0.03, 0.5)])
    assert [one.holm for one in corrected] == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([]) == []
    assert holm([replace(shape, p=0.9), replace(shape, p=0.8)])[0].holm == 1.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.randoms())
@settings(max_examples=60, deadline=None)
def test_holm_keeps_order_and_lies_between_raw_and_bonferroni(values, random):
    shape = differences.Difference(
        *("grpo", "correct", "high", "", "", 0.5, 0.5, 0.0, None, None, None, 1, 1, 0, 0, 1.0, 1.0, 0.95)
    )
    found = holm([replace(shape, p=p) for p in values])
    for one in found:
        assert one.p <= one.holm <= min(1, len(values) * one.p) + 1e-12
    in_order = sorted(found, key=lambda one: one.p)
    assert [one.holm for one in in_order] == sorted(one.holm for one in found)


@pytest.mark.parametrize(
    ("gate", "named"),
    [
        (GATE | {"clean_margin": 3.0}, "gate.clean_margin = 3.0"),
        (GATE | {"model": "gpt"}, "gate.model = 'gpt'"),
        (GATE | {"bootstrap": "many"}, "gate.bootstrap = 'many' is not of type int"),
        ([1], "not a section of parameters"),
    ],
)
def test_an_impossible_policy_is_refused_by_name(gate, named):
    side = replace(side_of({"high": np.ones(4, bool)}), params={"profile": "tiny", "gate": gate})
    with pytest.raises(ClearError, match=re.escape(named)):
        verdicts.policy_of(side, side)


def test_a_policy_comes_from_the_base_then_the_head_then_the_default():
    bare = side_of({"high": np.ones(4, bool)})
    strict = replace(bare, params={"profile": "tiny", "gate": GATE | {"clean_margin": 0.5}})
    assert verdicts.policy_of(strict, bare)[0].clean_margin == 0.5
    policy, notes = verdicts.policy_of(bare, strict)
    assert policy.clean_margin == 0.5 and "head's own applies" in notes[0]
    policy, notes = verdicts.policy_of(bare, bare)
    assert policy.model == "grpo" and "default of clear/conf" in notes[0]
    older = replace(bare, params={"profile": "tiny", "gate": {"clean_margin": 0.2, "gone": 1}})
    assert verdicts.policy_of(older, older)[0] == replace(policy, clean_margin=0.2)

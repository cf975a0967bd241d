"""Statistics: cluster bootstrap, paired differences, the exact test by image, odds within kinds of damage."""

import math
import time
from itertools import product
from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clear.bench import statistics
from clear.errors import ClearError

scores = st.integers(2, 40).flatmap(
    lambda n: st.tuples(
        st.lists(st.booleans(), min_size=n, max_size=n),
        st.lists(st.booleans(), min_size=n, max_size=n),
        st.lists(st.integers(0, 8), min_size=n, max_size=n).filter(lambda groups: len(set(groups)) > 1),
    )
)


@given(scores, st.integers(0, 10))
@settings(max_examples=40, deadline=None)
def test_a_paired_difference_changes_sign_with_its_sides(given_scores, seed):
    a, b, groups = map(np.array, given_scores)
    ours = statistics.paired_difference(a, b, groups, resamples=99, seed=seed)
    theirs = statistics.paired_difference(b, a, groups, resamples=99, seed=seed)
    assert (ours.estimate, ours.low, ours.high) == pytest.approx((-theirs.estimate, -theirs.high, -theirs.low))
    assert ours.detectable == pytest.approx(theirs.detectable)
    assert ours.estimate == pytest.approx(a.mean() - b.mean())
    assert (ours.n, ours.clusters) == (len(a), len(set(groups.tolist())))


@given(scores)
@settings(max_examples=40, deadline=None)
def test_identical_models_have_no_difference_and_no_width(given_scores):
    a, _, groups = map(np.array, given_scores)
    found = statistics.paired_difference(a, a, groups, resamples=50)
    assert (found.estimate, found.low, found.high, found.detectable) == (0, 0, 0, 0)
    assert statistics.sign_flip(a, a, groups) == statistics.SignFlip(0, 0, 1.0)


@given(scores)
@settings(max_examples=40, deadline=None)
def test_row_order_and_cluster_numbers_do_not_matter(given_scores):
    a, b, groups = map(np.array, given_scores)
    order = np.random.default_rng(1).permutation(len(a))
    found = statistics.paired_difference(a, b, groups, resamples=60, seed=3)
    moved = statistics.paired_difference(a[order], b[order], 5 * groups[order] + 2, resamples=60, seed=3)
    assert (found.low, found.high, found.detectable) == pytest.approx((moved.low, moved.high, moved.detectable))


def simulate(effect: float, runs: int, images: int = 120, each: int = 4) -> np.ndarray:
    """Intervals (runs, 3: low, high, detectable) of paired samples whose questions share their image's difficulty."""
    generator, groups, result = np.random.default_rng(7), np.repeat(np.arange(images), each), []
    for _ in range(runs):
        level = np.repeat(generator.beta(2, 1, images), each)
        shift = np.repeat(generator.normal(0, 0.15, images), each)  # an image that suits one of the models
        a = generator.random(images * each) < np.clip(level + shift + effect, 0, 1)
        b = generator.random(images * each) < np.clip(level - shift, 0, 1)
        found = statistics.paired_difference(a, b, groups, resamples=300, seed=0)
        result.append((found.low, found.high, found.detectable))
    return np.array(result)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    # No effect on average, yet correlated within images: 95 % ± 4 binomial standard errors of 400 simulations.
    found = simulate(0.0, 400)
    covered = np.mean((found[:, 0] <= 0) & (found[:, 1] >= 0))
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 400)


def test_ignoring_the_clusters_would_be_too_sure():
    generator = np.random.default_rng(0)
    values = np.repeat(generator.random(100) < 0.5, 6)
    by_image = statistics.mean_interval(values, np.repeat(np.arange(100), 6))
    by_row = statistics.mean_interval(values, np.arange(600))
    assert (by_image.high - by_image.low) / (by_row.high - by_row.low) == pytest.approx(math.sqrt(6), rel=0.15)


def test_an_effect_of_the_detectable_size_is_found_four_times_in_five():
    generator, groups, effect = np.random.default_rng(5), np.arange(400), 0.1
    found = []
    for _ in range(300):
        b = generator.random(400) < 0.5
        a = np.where(generator.random(400) < 0.2, ~b, b)  # noise: one in five flips
        lift = generator.random(400) < effect / 0.5
        found.append(statistics.paired_difference(a | (lift & ~b), b, groups, resamples=300))
    # The planted effect differs a little from sample to sample; compare with what the standard error implies.
    mean = np.mean([item.estimate for item in found])
    deviation = np.mean([item.detectable for item in found]) / (1.959964 + 0.841621)
    expected = 0.5 * math.erfc((1.959964 - mean / deviation) / math.sqrt(2))
    assert np.mean([item.low > 0 for item in found]) == pytest.approx(expected, abs=0.08)
    assert np.std([item.estimate for item in found]) == pytest.approx(deviation, rel=0.15)


def test_a_contrast_pairs_two_levels_of_the_same_images():
    generator = np.random.default_rng(2)
    easy = np.repeat(generator.random(200) < 0.6, 2)
    groups = np.repeat(np.arange(200), 2)
    same = statistics.mean_contrast(easy, groups, easy, groups)
    assert (same.estimate, same.low, same.high) == (0, 0, 0)
    other = statistics.mean_contrast(easy, groups, easy, groups + 200)
    assert other.clusters == 400 and other.low < -0.05 < 0.05 < other.high


def test_a_ratio_difference_covers_the_truth_as_often_as_it_says():
    """Relative robustness .8 / .9 against .6 / .9, questions of an image sharing its difficulty."""
    rng, inside, runs, images = np.random.default_rng(3), 0, 200, 60
    groups = np.repeat(np.arange(images), 4)
    for seed in range(runs):
        luck = np.repeat(rng.normal(size=images), 4)
        draw = [luck * 0.6 + 0.8 * rng.normal(size=4 * images) for _ in range(3)]
        hard_a, hard_b, clean = (one < NormalDist().inv_cdf(p) for one, p in zip(draw, (0.8, 0.6, 0.9), strict=True))
        found = statistics.paired_ratio_difference(
            (hard_a, clean), (hard_b, clean), (groups, groups), resamples=300, seed=seed
        )
        inside += found.low <= (0.8 - 0.6) / 0.9 <= found.high
    assert 0.9 <= inside / runs <= 0.99


def test_six_thousand_rows_take_less_than_a_second():
    generator = np.random.default_rng(0)
    a, b = generator.random((2, 6000)) < 0.7
    start = time.process_time()
    statistics.paired_difference(a, b, np.arange(6000) // 4, resamples=2000)
    assert time.process_time() - start < 1


def test_intervals_over_equally_many_clusters_share_their_draws_and_nothing_changes(monkeypatch):
    generator = np.random.default_rng(2)
    groups, scores = np.arange(3000) // 3, generator.random((2, 3000))  # sums that are not whole: their order counts
    exposed, outcome = generator.random((2, 3000)) < 0.4

    def intervals(seed: int) -> list:
        return [
            *(statistics.mean_interval(values, groups, resamples=300, seed=seed) for values in scores),
            *(
                statistics.odds_ratio(exposed, outcome, kind, groups, 0.95, 300, seed)
                for kind in (groups % 3, groups % 4)
            ),
        ]

    made = []
    new = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: made.append(seed) or new(seed))
    shared = intervals(11)
    assert made == [11, 11]  # one kind of draw for means, one for odds
    monkeypatch.setattr(statistics, "_KEPT", 0)
    assert intervals(11) == shared and len(made) == 6


@pytest.mark.parametrize(
    ("values", "groups", "message"),
    [
        ([], [], "0 scores for 0 cluster numbers"),
        ([1.0, 0.0], [0], "2 scores for 1 cluster numbers"),
        ([1.0, 0.0], [3, 3], "All scores belong to one image"),
        ([1.0, math.nan], [0, 1], "Score 1 is not finite"),
    ],
)
def test_what_gives_no_interval_is_refused(values, groups, message):
    with pytest.raises(ClearError, match=message):
        statistics.mean_interval(np.array(values), np.array(groups))


def test_unequal_sides_are_refused():
    with pytest.raises(ClearError, match="found 2 and 1"):
        statistics.paired_difference([1, 0], [1], [0, 1])
    with pytest.raises(ClearError, match="found 2, 1 and 2 cluster numbers"):
        statistics.sign_flip([True, False], [True], [0, 1])


@given(st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=30, deadline=None)
def test_with_one_question_per_image_the_exact_test_is_mcnemars(only_a, only_b):
    from scipy.stats import binomtest

    a = np.array([True] * only_a + [False] * only_b + [True, False])
    b = np.array([False] * only_a + [True] * only_b + [True, False])
    found = statistics.sign_flip(a, b, np.arange(len(a)))
    expected = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert (found.only_a, found.only_b) == (only_a, only_b)
    assert found.p == pytest.approx(expected)


def test_the_exact_test_is_the_share_of_sign_patterns_that_go_as_far():
    generator = np.random.default_rng(0)
    for _ in range(20):
        groups = generator.integers(0, 6, 24)
        a, b = generator.random((2, 24)) < 0.6
        sums = [int(a[groups == g].sum()) - int(b[groups == g].sum()) for g in range(6)]
        flipped = [sum(s * one for s, one in zip(signs, sums, strict=True)) for signs in product((-1, 1), repeat=6)]
        expected = np.mean([abs(one) >= abs(sum(sums)) for one in flipped])
        assert statistics.sign_flip(a, b, groups).p == pytest.approx(expected)


def test_many_disagreements_do_not_underflow():
    rows = np.arange(4000)
    assert statistics.sign_flip(rows < 2000, rows >= 2000, rows).p == 1.0
    rows = np.arange(1500)
    assert 0 < statistics.sign_flip(rows < 900, rows >= 900, rows).p < 1e-12


def calls_by_kind(odds: float, seed: int, images: int = 160, each: int = 4) -> tuple:
    """Eight kinds of damage: what hurts more is restored more, whatever the question. `odds` holds within each kind."""
    generator = np.random.default_rng(seed)
    kind = np.repeat(np.arange(images) % 8, each)
    image = np.repeat(generator.normal(0, 0.8, (2, images)), each, axis=1)  # what an image has in common
    failed = generator.random(len(kind)) < 1 / (1 + np.exp(2.5 - 0.6 * kind - image[0]))
    called = generator.random(len(kind)) < 1 / (1 + np.exp(3.0 - 0.8 * kind - image[1] - np.log(odds) * failed))
    return failed, called, kind, np.repeat(np.arange(images), each)


def test_kinds_of_damage_alone_give_no_odds_within_them():
    inside, alarms, runs = 0, 0, 200
    for seed in range(runs):
        failed, called, kind, image = calls_by_kind(1.0, seed)
        found = statistics.odds_ratio(failed, called, kind, image, resamples=300)
        inside += found.low <= 1 <= found.high
        alarms += statistics.odds_ratio(failed, called, np.zeros(len(kind)), image, resamples=300).low > 1
    assert abs(inside / runs - 0.95) < 3 * math.sqrt(0.05 * 0.95 / runs)
    assert alarms == runs, "with the kinds mixed the same data always seem to show need"


def test_a_planted_need_is_found_within_the_kinds():
    found = [statistics.odds_ratio(*calls_by_kind(4.0, seed), resamples=300) for seed in range(40)]
    assert 3 < np.exp(np.mean([np.log(one.estimate) for one in found])) < 4.5
    assert np.mean([one.low > 1 for one in found]) > 0.9 and all(one.detectable > 1 for one in found)


def test_the_odds_ratio_by_hand_and_where_there_is_none():
    rows = [(1, 1, "a")] * 6 + [(1, 0, "a")] * 2 + [(0, 1, "a")] * 3 + [(0, 0, "a")] * 4
    rows += [(1, 1, "b")] * 1 + [(1, 0, "b")] * 5 + [(0, 1, "b")] * 1 + [(0, 0, "b")] * 9
    failed, called, kind = (np.array(column) for column in zip(*rows, strict=True))
    found = statistics.odds_ratio(failed, called, kind, np.arange(len(rows)), resamples=200)
    assert found.estimate == pytest.approx((6 * 4 / 15 + 1 * 9 / 16) / (2 * 3 / 15 + 5 * 1 / 16))
    assert found.low < found.estimate < found.high and (found.n, found.clusters) == (31, 31)
    assert statistics.odds_ratio(failed, called * 0, kind, np.arange(31)) is None
    always = statistics.odds_ratio(failed, failed, kind, np.arange(31), resamples=200)
    assert always.estimate == always.high == math.inf
    with pytest.raises(ClearError, match="All rows belong to one image"):
        statistics.odds_ratio(failed, called, kind, np.zeros(31))


def test_everything_that_is_shown_alarms_in_one_null_case_of_twenty():
    """Six questions about an image stand or fall together, and the models are equally good: interval and p alike."""
    generator, groups, runs = np.random.default_rng(3), np.repeat(np.arange(150), 6), 600
    alarms = np.zeros(2)
    for _ in range(runs):
        favoured = np.repeat(generator.choice([-1, 0, 0, 1], 150), 6)  # an image may suit one of the models
        draw = generator.random(len(groups))
        a, b = draw < 0.6 + 0.25 * favoured, draw < 0.6 - 0.25 * favoured
        interval = statistics.paired_difference(a, b, groups, resamples=300)
        alarms += [not interval.low <= 0 <= interval.high, statistics.sign_flip(a, b, groups).p < 0.05]
    assert (np.abs(alarms / runs - 0.05) < 3 * math.sqrt(0.05 * 0.95 / runs)).all(), alarms / runs


def test_clusters_join_pairs_transitively():
    rows = [("a", ""), ("b", "p"), ("c", "p"), ("c", "r"), ("d", "r"), ("e", ""), ("a", "")]
    frame = pd.DataFrame(rows, columns=["sample", "pair"])
    found = statistics.clusters(frame).tolist()
    assert found[0] == found[6] and len({found[1], found[2], found[3], found[4]}) == 1
    assert len(set(found)) == 3

"""Claims and the first sentence of the report on planted effects: what holds, what does not, what cannot be said."""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clear.errors import ClearError
from clear.report import calling
from clear.report import claims as claim_rules
from clear.report import verdict as verdicts
from clear.report.claims import Bootstrap
from tests.helpers.planted import CALLS, RIGHT, SHARED, decide, frames_of, nested


def test_planted_effects_are_found():
    found = decide(frames_of())
    assert all(claim.held and claim.measured for claim in found.values())
    assert found["hard_gain"].low > 0
    assert found["hard_gain"].estimate == pytest.approx(0.25, abs=0.06)
    assert found["bridge_kept"].estimate == pytest.approx(0, abs=0.05)
    assert "→" in found["calls_needed"].note and found["calls_needed"].unit == "odds"


@pytest.mark.parametrize(
    ("claim", "right", "calls"),
    [
        ("base_clean", {"base": (0.7, 0.7, 0.6, 0.5)}, {}),
        ("base_drops", {"base": (0.93, 0.93, 0.93, 0.93)}, {}),
        ("hard_gain", {"grpo": RIGHT["base"]}, {}),
        ("clean_kept", {"grpo": (0.88, 0.9, 0.87, 0.8)}, {}),
        ("beats_direct", {"grpo": RIGHT["sft_direct"]}, {}),
        ("bridge_kept", {"bridge": (0.93, 0.88, 0.8, 0.55)}, {}),
    ],
)
def test_a_claim_falls_with_its_effect(claim, right, calls):
    found = decide(frames_of(right=RIGHT | right, calls=CALLS | calls))
    assert found[claim].measured and not found[claim].held
    assert found[claim].verdict == "does not hold"


def test_a_gain_within_the_noise_does_not_hold():
    frames = frames_of(images=16, right=RIGHT | {"grpo": (0.93, 0.9, 0.87, 0.62)})
    claim = decide(frames)["hard_gain"]
    assert not claim.held or claim.low > 0
    assert claim.detectable > 0.1


def test_models_asked_other_questions_are_not_compared():
    frames = frames_of(images=20)
    with pytest.raises(ClearError, match=r"grpo\.parquet lacks 1 rows .* s0000/clean/clean/q0000-0"):
        decide(frames | {"grpo": frames["grpo"].iloc[1:]})
    with pytest.raises(ClearError, match="another question or gold answer"):
        decide(frames | {"grpo": frames["grpo"].assign(answer="green")})


def test_levels_are_compared_on_the_questions_that_all_of_them_share():
    frames = frames_of()
    extra = (frames["base"].severity == "clean") & ~frames["base"].question.str.endswith("-0")
    wrong = frames["base"].assign(correct=frames["base"].correct & ~extra)
    found, other = decide(frames)["base_drops"], decide({"base": wrong})["base_drops"]
    assert found.n == 600 and (other.estimate, other.low) == (found.estimate, found.low)
    only_extra = frames["base"][(frames["base"].severity != "clean") | extra]
    with pytest.raises(ClearError, match=r"No question was asked at every severity.*mmd_bench\.clean_questions"):
        decide({"base": only_extra})


def test_calls_that_follow_the_damage_and_not_the_need_show_no_need():
    """The rise alone, which the report used to take for restoring when needed."""
    found = decide(frames_of(tied=0.0))["calls_needed"]
    assert found.measured and not found.held and found.verdict == "does not hold" and found.low < 1 < found.high
    rates = [float(rate) for rate in re.findall(r"(\d+\.\d) %", found.note)]
    assert len(rates) == 4 and rates == sorted(rates), "although they rise"


def said_of(frames: dict) -> str:
    return verdicts.verdict(list(decide(frames).values()), frames, SHARED)


share = st.sampled_from([0.0, 0.05, 0.2, 0.5, 0.6, 0.9, 1.0])


@given(st.fixed_dictionaries({model: st.tuples(share, share) for model in ("base", "sft_direct", "grpo")}))
@example({"base": (0.9, 0.9), "sft_direct": (0.9, 0.9), "grpo": (0.9, 0.2)})  # worse
@example({"base": (0.9, 0.5), "sft_direct": (0.9, 0.9), "grpo": (0.5, 0.5)})  # behind, and loses on clean images
@example({"base": (0.9, 0.9), "sft_direct": (0.9, 0.9), "grpo": (0.9, 0.9)})  # uncertain
@example({"base": (0.9, 0.5), "sft_direct": (0.9, 0.5), "grpo": (0.9, 0.9)})  # helps
@example({"base": (0.9, 0.5), "sft_direct": (0.9, 0.9), "grpo": (0.9, 0.9)})  # no more than direct fine-tuning
@example({"base": (0.0, 0.0), "sft_direct": (0.2, 0.2), "grpo": (0.05, 0.2)})  # answers nothing
@settings(max_examples=20, deadline=None)
def test_the_first_sentence_has_the_direction_of_its_intervals(rates):
    frames = nested(rates)
    claims = claim_rules.evaluate(frames, Bootstrap(resamples=100))
    by_id = {claim.id: claim for claim in claims}
    gain, direct, kept = by_id["hard_gain"], by_id["beats_direct"], by_id["clean_kept"]
    said = verdicts.verdict(claims, frames, Bootstrap(resamples=100))
    plumbing, _, rest = said.rpartition(verdicts.PLUMBING)
    assert bool(_) == (rates["base"][0] <= 0.3 + 1e-9 and rates["base"][0] < 0.5), "said first, or not at all"
    assert plumbing == ""
    kind = next(k for k in KINDS if (said if not _ else rest.partition("%. ")[2]).startswith(f"{k}:"))
    assert (kind == verdicts.WORSE) == (gain.high < 0)
    assert (kind == verdicts.BEHIND) == (gain.high >= 0 and direct.high < 0)
    assert kind != verdicts.HELPS or (gain.low > 0 and direct.low > 0)
    assert kind != verdicts.MORE or (gain.low > 0 and direct.low <= 0 <= direct.high)
    assert (direct.high < 0) == ("direct fine-tuning" in said and ", more (difference" in said)
    assert ("loses accuracy" in said) == (kept.high < -claim_rules.MARGIN)
    level = {"hard_gain": 1, "beats_direct": 1, "clean_kept": 0}
    for name, other in {"hard_gain": "base", "beats_direct": "sft_direct", "clean_kept": "base"}.items():
        claim, at = by_id[name], level[name]
        if max(rates["grpo"][at], rates[other][at]) <= 0.2:
            assert not claim.held and "guesser" in claim.note, "two models that answer nothing show nothing"
    assert not kept.held or rates["base"][0] > 0.25


KINDS = (verdicts.WORSE, verdicts.BEHIND, verdicts.UNCERTAIN, verdicts.HELPS, verdicts.MORE)


def test_a_run_that_answers_nothing_is_a_check_of_the_plumbing_and_a_certain_loss_is_one():
    frames = nested({"base": (0.0, 0.0), "sft_direct": (0.25, 0.2), "grpo": (0.04, 0.05)})
    frames["grpo"]["restored"] = True
    claims = claim_rules.evaluate(frames, SHARED)
    said = verdicts.verdict(claims, frames, SHARED)
    assert said.startswith(
        "This run checks the plumbing and nothing else: on clean images the base model answers 0.0 %"
    )
    assert "CLEAR is worse than direct fine-tuning" in said and "helps" not in said
    remarks = " ".join(verdicts.remarks(claims, calling.figures(frames, SHARED)))
    assert "Clean pictures, which need nothing, are restored as often as the worst ones" in remarks
    assert not any(claim.held for claim in claims if claim.id in ("hard_gain", "clean_kept", "beats_direct"))


def test_verdict_is_plain_about_failure():
    frames = frames_of(right=RIGHT | {"grpo": RIGHT["base"], "sft_direct": RIGHT["base"]})
    assert said_of(frames).startswith("CLEAR does not demonstrably help")
    frames = frames_of(right=RIGHT | {"grpo": (0.9, 0.8, 0.6, 0.2)})
    assert said_of(frames).startswith("CLEAR makes the answers worse")

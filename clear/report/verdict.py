"""The head of the report: one sentence whose direction is that of the intervals, and what the figures would hide.

The strongest comparison comes first: direct fine-tuning has seen the same data for as many steps. A certain loss is
called a loss, and if the base model cannot answer, the run is called a check of the plumbing.
"""

from typing import TYPE_CHECKING

from clear.bench import statistics
from clear.bench.scoring import HARD
from clear.data.records import CLEAN
from clear.report.claims import LEVELS, MARGIN, Bootstrap, Claim, guessing, points

if TYPE_CHECKING:
    import pandas as pd

HELPS, MORE, UNCERTAIN = "CLEAR helps", "CLEAR answers more than the base model", "CLEAR does not demonstrably help"
WORSE, BEHIND = "CLEAR makes the answers worse", "CLEAR is worse than direct fine-tuning"
CONCENTRATED = 0.25
"""Share of the restorations at hard from which on one kind of damage is named; the sixteen have a sixteenth each."""
PLUMBING = "This run checks the plumbing and nothing else"


def verdict(claims: list[Claim], frames: dict[str, "pd.DataFrame"], settings: Bootstrap) -> str:
    """The report in one plain sentence; before it another one where the run says nothing about the method."""
    by_id = {claim.id: claim for claim in claims}
    return f"{_plumbing(frames, settings)}{_headline(by_id, frames)}"


def _plumbing(frames: dict[str, "pd.DataFrame"], settings: Bootstrap) -> str:
    rows = frames["base"][frames["base"].severity == CLEAN] if "base" in frames else ()
    if not len(rows):
        return ""
    guess = guessing(rows, CLEAN)
    found = statistics.mean_interval(rows.correct.to_numpy(), statistics.clusters(rows), **vars(settings))
    if found.low > guess:
        return ""
    return (
        f"{PLUMBING}: on clean images the base model answers {points(found.estimate)} % of the questions correctly, a "
        f"guesser who does not see them {points(guess)} %. "
    )


def _headline(claims: dict[str, Claim], frames: dict[str, "pd.DataFrame"]) -> str:
    gain, direct, kept = claims["hard_gain"], claims["beats_direct"], claims["clean_kept"]
    if not gain.measured:
        return "Whether CLEAR helps cannot be said from this run: the base model or CLEAR was not evaluated."
    over_base, over_direct = sign(gain), sign(direct)
    if over_base < 0:
        kind = WORSE
    elif over_direct < 0:
        kind = BEHIND
    elif over_base == 0:
        kind = UNCERTAIN
    else:
        kind = HELPS if over_direct > 0 else MORE
    hard = {name: f"{points(frame.correct[frame.severity == HARD].mean())} %" for name, frame in frames.items()}
    parts = [
        f"on hard-degraded images it answers {hard['grpo']} of the questions correctly, the base model {hard['base']} "
        f"({_difference(gain)})"
    ]
    if direct.measured:
        words = {1: "fewer", 0: "not demonstrably fewer or more", -1: "more"}[over_direct]
        parts.append(f"direct fine-tuning {hard['sft_direct']}, {words} ({_difference(direct)})")
    else:
        parts.append("it was not compared with direct fine-tuning")
    if kept.measured:
        parts.append(f"on clean images it {_clean(kept)} against the base model ({_difference(kept)})")
    return f"{kind}: {'; '.join(parts)}."


def sign(claim: Claim) -> int:
    """+1 or −1 if the whole interval of a difference is above or below 0, else 0."""
    if not claim.measured:
        return 0
    return int(claim.low > 0) - int(claim.high < 0)


def _clean(kept: Claim) -> str:
    if kept.high < 0:
        return "loses accuracy" if kept.high < -MARGIN else "loses a little accuracy"
    if kept.low > 0:
        return "gains accuracy"
    return "loses at most a point" if kept.low >= -MARGIN else "may lose more than a point"


def _difference(claim: Claim) -> str:
    return f"difference {_interval(vars(claim))}"


def _interval(found: dict) -> str:
    estimate, low, high = (points(found[name], True) for name in ("estimate", "low", "high"))
    return f"{estimate} points, interval {low} to {high}"


def remarks(claims: list[Claim], calling: dict) -> list[str]:
    """What the sentence above leaves out: when CLEAR restores, where its lead comes from, where it is behind."""
    if not calling:
        return []
    told = []
    if behind := [level for level, found in calling["levels"].items() if found and found["high"] < 0 and level != HARD]:
        listed = " and ".join(f"{LEVELS[level]} ({_interval(calling['levels'][level])})" for level in behind)
        told.append(f"CLEAR is certainly behind direct fine-tuning at {listed}.")
    rates = calling["call_rate"]
    shown = [f"{points(rates[level])} % ({LEVELS[level]})" for level in (CLEAN, HARD) if level in rates]
    calls = f"It restores before {' and '.join(shown)} of its answers."
    if rates.get(CLEAN, 0.0) > 0 and rates.get(CLEAN, 0.0) >= rates.get(HARD, 0.0):
        calls += " Clean pictures, which need nothing, are restored as often as the worst ones."
    needed = next(claim for claim in claims if claim.id == "calls_needed")
    if needed.measured:
        said = "more often" if needed.held else "not demonstrably more often"
        calls += (
            f" Within one kind and level of damage it restores {said} where the base model fails ({_odds(needed)})."
        )
    most = calling["most_called"]
    if most and most["share_of_calls"] >= CONCENTRATED:
        name = most["corruption"].replace("_", " ")
        calls += f" {100 * most['share_of_calls']:.0f} % of the restorations at hard fall on one kind of damage, {name}"
        if most["minus_direct"] and most["elsewhere"]:
            there, elsewhere = _interval(most["minus_direct"]), _interval(most["elsewhere"])
            calls += f"; CLEAR minus direct fine-tuning is {there} there and {elsewhere} on all others"
        calls += "."
    return [*told, calls]


def _odds(claim: Claim) -> str:
    estimate, low, high = (
        "unbounded" if value is None else f"{value:.2f}" for value in (claim.estimate, claim.low, claim.high)
    )
    return f"odds ratio {estimate}, interval {low} to {high}"

"""What a comparison means: the verdict in one sentence, and the gate, which is the policy of `params.yaml` (`gate`).

The verdict is about one model (`gate.model`). Its accuracy at hard is the one comparison fixed in advance, so its
interval alone decides there; at the other levels a difference must be certain, that is pass the interval and the
exact test by image, corrected over all models and levels shown. `worse` outweighs `better`: a gain does not offset a
loss.
A change is judged by the policy of its base, so that no change can loosen the rule it is judged by.
"""

from dataclasses import asdict, dataclass, fields
from typing import Literal

from clear.bench.scoring import HARD, SEVERITIES
from clear.config import check, compose
from clear.data.records import CLEAN
from clear.errors import UNDECIDED, ClearError
from clear.project.compare.differences import TITLES, Comparison, Difference, compare, identical
from clear.project.compare.load import Side
from clear.report.claims import LEVELS, Bootstrap, points
from clear.schema import Gate

Kind = Literal["better", "worse", "not distinguishable", "not comparable"]

PASSED, FAILED, NOT_COMPARABLE = 0, 1, UNDECIDED
"""Exit statuses of `clear gate`."""

SEED = 0
"""Seed of every bootstrap here: equal predictions give equal intervals."""


@dataclass(frozen=True)
class Rule:
    """One rule of the gate. `kept` is None where it could not be decided; `reason` says what decided it."""

    name: str
    kept: bool | None
    reason: str


@dataclass(frozen=True)
class Verdict:
    """The verdict, its sentence, the rules behind the gate, its exit status, and further lines a reader must see."""

    kind: Kind
    sentence: str
    rules: list[Rule]
    status: int
    policy: Gate
    notes: list[str]


def policy_of(base: Side, head: Side) -> tuple[Gate, list[str]]:
    """The gate that the base's params.yaml states, else the head's, else the default; and notes about its origin."""
    given = {label: side.params.get("gate") for label, side in (("base", base), ("head", head))}
    notes = []
    if given["base"] is None and given["head"] is None:
        notes.append("Neither side states a gate in params.yaml, so the default of clear/conf applies.")
        raw, origin = compose()["gate"], "clear/conf"
    elif given["base"] is None:
        notes.append("The base states no gate in params.yaml, so the head's own applies.")
        raw, origin = given["head"], f"params.yaml of head ({head.origin})"
    else:
        raw, origin = given["base"], f"params.yaml of base ({base.origin})"
        if given["head"] != raw:
            notes.append(
                "This change alters the gate itself (params.yaml: gate); it is judged by the gate of the base."
            )
    return _parse(raw, origin), notes


def _parse(raw: object, origin: str) -> Gate:
    """A gate of another version: a key that is new since then gets its default, a key that was removed is ignored."""
    if not isinstance(raw, dict):
        raise ClearError(f"{origin}: gate = {raw!r} is not a section of parameters; `make params` composes it.")
    known = [item.name for item in fields(Gate)]
    values = {name: raw[name] for name in known if name in raw}
    if len(values) < len(known):
        values = compose()["gate"] | values
    for item in fields(Gate):
        wanted = (int, float) if item.type is float else item.type
        if not isinstance(values[item.name], wanted) or isinstance(values[item.name], bool):
            raise ClearError(f"{origin}: gate.{item.name} = {values[item.name]!r} is not of type {item.type.__name__}.")
    gate = Gate(**values)
    check(gate, "gate")
    return gate


def settings_of(policy: Gate) -> Bootstrap:
    """The bootstrap that a policy asks for."""
    return Bootstrap(policy.confidence, policy.bootstrap, SEED)


def decide(base: Side, head: Side, detail: bool = True) -> tuple[Comparison, Verdict]:
    """Compare two sides under the policy that applies to them. Without `detail` only what the gate needs."""
    policy, notes = policy_of(base, head)
    comparison = compare(base, head, policy.model, settings_of(policy), detail)
    return comparison, judge(comparison, policy, notes)


def decide_under(policy: Gate, base: Side, head: Side) -> Verdict:
    """The verdict under a given policy, as the gate reaches it."""
    return judge(compare(base, head, policy.model, settings_of(policy), False), policy, [])


def judge(comparison: Comparison, policy: Gate, notes: list[str]) -> Verdict:
    """The verdict and the gate on a comparison."""
    rules = _rules(comparison, policy)
    if comparison.obstacles:
        sentence = f"{'; '.join(comparison.obstacles)}."
        return Verdict("not comparable", sentence, rules, NOT_COMPARABLE, policy, notes)
    status = PASSED if all(rule.kept for rule in rules) else FAILED
    levels = [d for severity in SEVERITIES if (d := comparison.level(policy.model, severity)) is not None]
    worse = [d for d in levels if _direction(d) < 0]
    clean, hard = (comparison.level(policy.model, severity) for severity in (CLEAN, HARD))
    for guarded, margin in ((clean, policy.clean_margin), (hard, policy.hard_margin)):
        if guarded.high < -margin and guarded not in worse:
            worse.append(guarded)
    better = [d for d in levels if _direction(d) > 0]
    kind: Kind = "worse" if worse else "better" if better else "not distinguishable"
    return Verdict(kind, _sentence(comparison, policy, kind, worse, better), rules, status, policy, notes)


def _direction(difference: Difference) -> int:
    """+1 or −1 where head is above or below base by the rule of this module's first lines."""
    if difference.severity == HARD:
        return int(difference.low > 0) - int(difference.high < 0)
    return difference.sign


def _sentence(
    comparison: Comparison, policy: Gate, kind: Kind, worse: list[Difference], better: list[Difference]
) -> str:
    clean, hard = (comparison.level(policy.model, severity) for severity in (CLEAN, HARD))
    name = TITLES[policy.model]
    if kind == "not distinguishable":
        parts = [f"{name} at hard: {change(hard)}", f"on clean images: {change(clean)}"]
        if identical(comparison.joined[policy.model]):
            parts.append("both sides gave every question the same output")
        elif hard.detectable:
            parts.append(f"a true difference below {points(hard.detectable)} points at hard would have stayed hidden")
    else:
        # Hard first: it is the comparison fixed in advance.
        shown = sorted(worse or better, key=lambda d: -SEVERITIES.index(d.severity))
        parts = [f"{name} at {LEVELS[d.severity]}: {change(d)}" for d in shown]
        parts += [f"on clean images: {change(clean)}"] if clean not in shown else []
        if worse and better:
            parts.append("better at " + ", ".join(f"{LEVELS[d.severity]} ({change(d)})" for d in better))
    size = f"{100 * policy.confidence:g} % intervals; {hard.n:,} questions about {hard.clusters:,} image groups at hard"
    return f"{'; '.join(parts)} ({size})."


def change(difference: Difference) -> str:
    """`77.5 → 78.1 %, +0.6 points [−0.9, +2.1]`."""
    return f"{points(difference.base)} → {points(difference.head)} %, {gap(difference)}"


def gap(difference: Difference, unit: str = " points") -> str:
    """`+0.6 points [−0.9, +2.1]`, or `no change` if no question changed sides; no interval where there is none."""
    if difference.only_base == difference.only_head == 0:
        return "no change"
    interval = "" if difference.low is None else f" [{points(difference.low, True)}, {points(difference.high, True)}]"
    return f"{points(difference.estimate, True)}{unit}{interval}"


def _rules(comparison: Comparison, policy: Gate) -> list[Rule]:
    base, head, name = comparison.base, comparison.head, TITLES[policy.model]
    same = bool(base.profile) and base.profile == head.profile
    profile = f"both are {base.profile}" if same else f"base: {base.profile or 'none'}, head: {head.profile or 'none'}"
    missing = [text for text in comparison.obstacles if "no predictions" in text]
    lost = f"{'; '.join(missing)}" or "every model that one side has, the other has too"
    if not same:
        lost = "not looked at, since the profiles differ"
    return [
        Rule("same profile", same, profile),
        Rule("predictions present", not missing if same else None, lost),
        _validation(head),
        _accuracy(comparison, policy, CLEAN, f"clean accuracy of {name}", policy.clean_margin),
        _accuracy(comparison, policy, HARD, f"hard accuracy of {name}", policy.hard_margin),
    ]


def _validation(head: Side) -> Rule:
    checks = head.metrics.get("validate")
    if checks is None:
        return Rule("validation passed", False, "head has no data/metrics/validate.json: its data is unchecked")
    if checks.get("success") is True:
        return Rule("validation passed", True, f"every check passed; rejected rows: {checks.get('rejected', '?')}")
    failed = [
        f"{dataset}: {item.get('expectation')}"
        for dataset, checked in checks.get("datasets", {}).items()
        for item in checked.get("failed", [])
    ]
    return Rule("validation passed", False, "; ".join(failed) or "validate.json does not say that it succeeded")


def _accuracy(comparison: Comparison, policy: Gate, severity: str, name: str, margin: float) -> Rule:
    difference = None if comparison.obstacles else comparison.level(policy.model, severity)
    allowed = f"may fall by {points(margin)} points" if margin else "may not fall"
    if difference is None:
        return Rule(name, None, f"{allowed}; not comparable")
    # A fall counts only when the whole interval lies below the margin: noise alone does not stop a change.
    kept = difference.high >= -margin
    outcome = "kept" if difference.low >= -margin else "not shown to be broken" if kept else "broken with confidence"
    return Rule(name, kept, f"{allowed}; {change(difference)}: {outcome}")


def report_lines(verdict: Verdict) -> list[str]:
    """What `clear gate` prints: one line per rule, then the outcome."""
    words = {True: "pass", False: "FAIL", None: "skip"}
    lines = [f"{words[rule.kept]}  {rule.name}: {rule.reason}" for rule in verdict.rules]
    outcome = {PASSED: "gate passed", FAILED: "gate FAILED", NOT_COMPARABLE: "gate cannot decide"}[verdict.status]
    return [*lines, f"{outcome}: {verdict.kind} – {verdict.sentence}", *verdict.notes]


def to_json(verdict: Verdict) -> dict:
    """The verdict as plain values."""
    return {
        "verdict": verdict.kind,
        "sentence": verdict.sentence,
        "gate": {"status": verdict.status, "rules": [asdict(rule) for rule in verdict.rules]},
        "policy": asdict(verdict.policy),
    }

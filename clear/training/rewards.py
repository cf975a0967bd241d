"""Rewards of interleaved GRPO (METHOD §4 "Rewards"), as pure functions of what a trajectory wrote.

Accuracy is exact match. Each reward is logged apart, and the true metric (held-out accuracy) beside them.
"""

from collections.abc import Sequence

from clear.bench.scoring import is_correct
from clear.config import Grpo
from clear.reasoning import grammar
from clear.records import Question

DECISION = {
    # (restored, correct) → reward
    "code": {(True, True): 1.0, (False, True): 0.6, (True, False): 0.4, (False, False): -0.2},
    "paper": {(True, True): 1.0, (False, True): 0.0, (True, False): 0.0, (False, False): -1.0},
}


def format_reward(replies: Sequence[str]) -> float:
    """0.35 for a think block + 0.35 for an answer block + 0.3 if the think ends before the answer begins."""
    text = "\n".join(replies)
    think = grammar.THINK in text and grammar.END_THINK in text.split(grammar.THINK, 1)[1]
    answer = grammar.ANSWER in text and grammar.END_ANSWER in text.split(grammar.ANSWER, 1)[1]
    ordered = think and answer and text.index(grammar.END_THINK) < text.index(grammar.ANSWER)
    return 0.35 * think + 0.35 * answer + 0.3 * ordered


def rewards(replies: Sequence[str], restored: bool, question: Question, config: Grpo) -> dict[str, float]:
    """Each reward and their weighted sum under "reward"."""
    correct = is_correct(grammar.extract_answer(replies[-1]), question)
    parts = {
        "reward_accuracy": float(correct),
        "reward_format": format_reward(replies),
        "reward_decision": DECISION[config.decision_table][restored, correct],
    }
    total = sum(getattr(config, name) * value for name, value in parts.items())
    return {"reward": total, **parts}


def advantages(values: Sequence[float], group: int, scale: str) -> list[float]:
    """Reward minus the group's mean; with scale "group" divided by the group's standard deviation."""
    found: list[float] = []
    for start in range(0, len(values), group):
        part = values[start : start + group]
        mean = sum(part) / len(part)
        spread = (sum((v - mean) ** 2 for v in part) / max(1, len(part) - 1)) ** 0.5
        divisor = spread + 1e-4 if scale == "group" else 1.0
        found += [(v - mean) / divisor if spread > 1e-8 else 0.0 for v in part]
    return found

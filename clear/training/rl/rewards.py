"""Rewards of interleaved GRPO (METHOD §4 "Rewards") for the text of a trajectory.

Accuracy is exact match, or a judge's score. Each reward is logged separately, together with the true metric (held-out
accuracy). Additions: the right answer's probability as a reward, which differs within a group even if exact match does
not; and a small one for a direct answer, without which a restoration that changes nothing costs nothing and calls drift
upwards. The reward of the restored latent itself is in latent_quality.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from clear.bench.scoring import is_correct
from clear.data.records import Question
from clear.model.bagel import Bagel
from clear.model.tokenizer import decode, encode
from clear.reasoning import grammar
from clear.reasoning.engine import Reply, Trajectory
from clear.reasoning.prompts import Prompt
from clear.schema import Grpo
from clear.traces.oracle import demonstrations
from clear.training.rl import scoring

LIMIT = 5.0
"""Nats below which an answer counts as hopeless: a reward must not be ruled by what cannot be restored."""

IMAGE_REWARDS = ("reward_answer", "reward_latent_quality")
"""The rewards of the restored image, whose advantage may be the image term's alone (METHOD §4)."""

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


def rewards(
    replies: Sequence[str],
    restored: bool,
    question: Question,
    config: Grpo,
    more: Mapping[str, float] | None = None,
    accuracy: float | None = None,
) -> dict[str, float]:
    """Each reward and their weighted sum under "reward". `more` are rewards that need the model, by name; one that a
    trajectory cannot have (the latent quality of no restoration) is left out, which counts as 0.

    accuracy: a judge's score in place of exact match; above 0.5 the answer counts as right.
    """
    if accuracy is None:
        accuracy = float(is_correct(grammar.extract_answer(replies[-1]), question))
    correct = accuracy > 0.5
    parts = {
        "reward_accuracy": accuracy,
        "reward_format": format_reward(replies),
        "reward_decision": DECISION[config.decision_table][restored, correct],
        "reward_direct": float(not restored),
        **(more or {}),
    }
    return {"reward": weighted(parts, config, tuple(parts)), **parts}


def weighted(parts: Mapping[str, float], config: Grpo, names: Sequence[str]) -> float:
    """Weighted sum of the named rewards, as far as they were given."""
    return sum(getattr(config, name) * parts[name] for name in names if name in parts)


@torch.no_grad()
def answer_rewards(
    model: Bagel,
    tokenizer,
    prompts: Sequence[Prompt],
    trajectories: Sequence[Trajectory],
    questions: Sequence[Question],
    scored: str,
    batch: int,
) -> list[float]:
    """How probable the right answer was to the model that rolled out: 1 + max(log p, −LIMIT) / LIMIT, in [0, 1].

    Exact match says the same for most members of a group; this says how near each came. scored: "answer" for the
    answer block after the trajectory's own thought, "reply" for the whole last reply of a demonstration by the
    oracle. Prompts and questions are the trajectories' own; `batch` rows at a time.
    """
    told = [_told(tokenizer, t, q, scored) for t, q in zip(trajectories, questions, strict=True)]
    found: list[float] = []
    for start in range(0, len(told), batch):
        part = told[start : start + batch]
        steps = [[]] * len(part)
        scores = scoring.score(model, prompts[start : start + batch], part, steps, (), 1.0, 1.0)
        total = scores.text.new_zeros(len(part)).index_add(0, scores.text_row, scores.text)
        found += (1 + total.clamp(min=-LIMIT) / LIMIT).tolist()
    return found


def _told(tokenizer, trajectory: Trajectory, question: Question, scored: str) -> Trajectory:
    """The trajectory with the right answer as its last reply; only that is to be scored."""
    *before, last = trajectory.replies
    if scored == "reply":
        direct, restored = demonstrations(question)
        forced, ids = 0, encode(tokenizer, (restored if trajectory.restorations else direct).replies[-1])
    else:
        thought = decode(tokenizer, last.ids).split(grammar.ANSWER)[0].rstrip()
        opened = encode(tokenizer, f"{thought} {grammar.ANSWER}")
        forced, ids = len(opened), opened + encode(tokenizer, f" {question.answer} {grammar.END_ANSWER}")
    fixed = [Reply(r.ids, r.log_probs, len(r.ids)) for r in before]
    replies = [*fixed, Reply(ids, [0.0] * len(ids), forced)]
    return replace(trajectory, replies=replies)

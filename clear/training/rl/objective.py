"""The arithmetic of the GRPO objective (METHOD §4 "Text loss", "Image loss", "Advantage"), as pure functions.

Names and formulas of the text loss are trl's. Departures: rows without an advantage are not counted by any of them
(their group teaches nothing), and `dr_grpo` divides by the longest possible trajectory, not by 16384.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clear.schema import Grpo
from clear.training.rl.scoring import Scores

SAPO_TEMPERATURES = 1.0, 1.05
"""trl's defaults for positive and negative advantages."""


@dataclass(frozen=True)
class Counts:
    """What the loss of a step is divided by, so that its slices add up to one mean.

    tokens, rows, images: scored tokens, rows and image steps with an advantage in the whole step (with several
    processes their mean over these); parts: slices of the step; longest: most tokens that a row can have.
    """

    tokens: float
    rows: float
    images: float
    parts: int
    longest: int


def grpo_loss(
    scores: Scores,
    reference: Scores | None,
    recorded: tuple[Tensor, Tensor],
    advantages: tuple[Tensor, Tensor],
    counts: Counts,
    settings: Grpo,
) -> tuple[Tensor, dict[str, float]]:
    """Loss (scalar) of one slice of a step, and its figures.

    Clipped text and image terms, the KL to the reference (k3, on the text) and the velocity anchor, each with its
    weight in `settings`. recorded: log-probabilities of the rollout, of text (T,) and image steps (M,). advantages: of
    text and image by row, (R,) each. reference may be None where neither `beta` nor `velocity_weight` asks for it.
    """
    log: dict[str, float] = {}
    bounds = settings.clip, settings.clip_high or settings.clip
    text_advantage, image_advantage = advantages[0][scores.text_row], advantages[1][scores.image_row]
    weight = log_weights(scores.text, recorded[0], scores.text_row, settings.ratio_level)
    terms = policy_terms(settings.loss_type, weight, scores.text, text_advantage, *bounds)
    if reference is not None:
        gap = reference.text - scores.text
        kl = torch.exp(gap) - gap - 1
        if settings.beta:
            terms = terms + settings.beta * kl
    share = counts.tokens, counts.rows, counts.parts, counts.longest
    loss = settings.text_weight * aggregate(settings.loss_type, terms, scores.text_row, *share)
    text_error = image_error = 0.0
    if len(scores.image):
        image_weight = scores.image - recorded[1]
        if settings.image_weight:
            image_terms = policy_terms("clip", image_weight, scores.image, image_advantage, *bounds)
            loss = loss + settings.image_weight * (image_terms.sum() / counts.images)
        if reference is not None:
            anchor = ((scores.velocity - reference.velocity) ** 2).mean() * len(scores.image) / counts.images
            if settings.velocity_weight:
                loss = loss + settings.velocity_weight * anchor
            log["velocity_distance"] = anchor.item()
        image_error = (torch.exp(image_weight) - 1).abs().max().item()
        log["image_clipped"] = clipped("clip", image_weight, image_advantage, *bounds).float().mean().item()
    if len(scores.text):
        text_error = (torch.exp(weight) - 1).abs().max().item()
        log["entropy"] = scores.entropy.mean().item()
        log["clipped"] = clipped(settings.loss_type, weight, text_advantage, *bounds).float().mean().item()
        if reference is not None:
            log["kl"] = kl.mean().item()
    log["ratio_error"] = max(text_error, image_error)
    return loss, log


def log_weights(new: Tensor, old: Tensor, row: Tensor, level: str) -> Tensor:
    """Log importance weights (T,): of each token, or the mean over its row ("sequence", GSPO). row (T,) long."""
    gap = new - old
    if level == "token" or not len(gap):
        return gap
    rows = int(row.max()) + 1
    sums = gap.new_zeros(rows).index_add(0, row, gap)
    counts = gap.new_zeros(rows).index_add(0, row, torch.ones_like(gap)).clamp(min=1)
    return (sums / counts)[row]


def policy_terms(kind: str, log_weight: Tensor, log_prob: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """The policy loss of every element (T,); log_weight, log_prob, advantage (T,).

    −min(ρA, clip(ρ, 1−low, 1+high)·A); "cispo": −min(ρ, 1+high)·A·log p with the weight held constant; "sapo": a
    sigmoid gate around ρ = 1 in place of the clip.
    """
    ratio = torch.exp(log_weight)
    if kind == "cispo":
        return -ratio.clamp(max=1 + high).detach() * advantage * log_prob
    if kind == "sapo":
        positive, negative = SAPO_TEMPERATURES
        temperature = torch.where(advantage > 0, positive, negative)
        return -torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantage
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def clipped(kind: str, log_weight: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """Which elements (T,) of `policy_terms` are clipped, bool: the weight is beyond the bound that its side has.

    That is the upper one for a positive advantage and the lower one for a negative: on the other side the unclipped
    branch is the smaller one and counts. "cispo" has the upper bound only, for either sign; "sapo" clips nothing.
    """
    ratio = torch.exp(log_weight)
    above, below = ratio > 1 + high, ratio < 1 - low
    if kind == "sapo":
        return torch.zeros_like(above)
    if kind == "cispo":
        return above & (advantage != 0)
    return (above & (advantage > 0)) | (below & (advantage < 0))


def aggregate(kind: str, terms: Tensor, row: Tensor, tokens: float, rows: float, parts: int, longest: int) -> Tensor:
    """Terms (T,) of one of the `parts` slices of a step to their share of the step's loss.

    tokens, rows: scored tokens and rows with an advantage of the whole step; longest: most tokens that a row can have.
    "dapo", "cispo": mean over the step's tokens. "grpo", "sapo": mean over its rows of the row's mean. "luspo": mean
    over its rows of the row's sum. "dr_grpo": the same, divided by `longest`. "bnpo": mean over the slice's tokens.
    """
    if kind in ("dapo", "cispo"):
        return terms.sum() / tokens
    if kind == "bnpo":
        return terms.sum() / max(1, len(terms)) / parts
    if kind in ("grpo", "sapo"):
        lengths = torch.bincount(row) if len(row) else row.new_ones(1)
        return (terms / lengths[row]).sum() / rows
    return terms.sum() / rows / (longest if kind == "dr_grpo" else 1)


def advantages(values: Sequence[float | None], group: int, scale: str) -> list[float]:
    """Reward minus the group's mean, divided by a standard deviation: the group's, the whole list's ("batch") or none.

    None is a rejected sample: it counts in no mean and gets 0, as does every member of a group of equal rewards.
    """
    found: list[float] = []
    whole = _spread([v for v in values if v is not None]) if scale == "batch" else 0.0
    for start in range(0, len(values), group):
        known = [v for v in values[start : start + group] if v is not None]
        mean, spread = sum(known) / max(1, len(known)), _spread(known)
        divisor = {"none": 1.0, "group": spread + 1e-4, "batch": whole + 1e-4}[scale]
        part = values[start : start + group]
        found += [(v - mean) / divisor if v is not None and spread > 1e-8 else 0.0 for v in part]
    return found


def _spread(values: list[float]) -> float:
    mean = sum(values) / max(1, len(values))
    return (sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)) ** 0.5

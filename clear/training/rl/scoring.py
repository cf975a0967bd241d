"""Scoring trajectories for GRPO: one forward per trajectory gives all text log-probabilities and K velocities.

Layout: prompt | reply 1 | K noise segments (the states of K chosen SDE steps, each visible only to itself, same rope
position) | feedback of the rollout's own x̂0 | reply 2 | … The segments are those of the engine, and the SDE mean
comes from the same `flow.sde_mean`, so a fresh policy scores exactly what it sampled (contract: ratio 1).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clear.model import flow
from clear.model.bagel import Bagel, Contents
from clear.model.sequence import BRIDGE, IGNORE, LATENT, Image, Segment, layout, length, pack
from clear.reasoning.engine import Trajectory, text_segment
from clear.reasoning.prompts import Prompt


@dataclass
class Scores:
    """Log-probabilities under a policy. T scored tokens and M image steps over the whole batch, in row order.

    text (T,), entropy (T,), text_row (T,): trajectory of each token; image (M,), image_row (M,); velocity (M·N, C).
    real: share of the forward's tokens that are not padding.
    """

    text: Tensor
    entropy: Tensor
    text_row: Tensor
    image: Tensor
    image_row: Tensor
    velocity: Tensor
    real: float = 1.0


def recorded(trajectories: Sequence[Trajectory], steps: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """The rollout's own log-probabilities: of all sampled tokens (T,) and of the chosen steps (M,)."""
    text = [lp for t in trajectories for reply in t.replies for lp in reply.log_probs[reply.forced :]]
    image = [
        r.log_probs[k] for t, chosen in zip(trajectories, steps, strict=True) for r in t.restorations for k in chosen
    ]
    steps_taken = torch.stack(image) if image else torch.zeros(0)
    return torch.tensor(text, device=steps_taken.device), steps_taken


def score(
    model: Bagel,
    prompts: Sequence[Prompt],
    trajectories: Sequence[Trajectory],
    steps: Sequence[Sequence[int]],
    times: Sequence[float],
    sigma: float,
    temperature: float,
    budget: int = 0,
) -> Scores:
    """Log-probabilities of trajectories (with their prompts) under `model`.

    `steps[i]` are the SDE steps scored in every restoration of trajectory i; `times` is the rollout's grid. Logits
    are cut to the ids the trajectories were sampled from; all must come from one tokenizer. With a `budget`
    trajectories share rows of at most so many tokens; the result is the same, in the order of the trajectories.
    """
    samples = [_sample(model, *one, times) for one in zip(prompts, trajectories, steps, strict=True)]
    rows = pack([length(segments) for segments, _, _ in samples], budget) if budget else None
    order = [n for row in rows for n in row] if rows else list(range(len(samples)))
    contents = Contents(vit=[], latent=[], time=[], bridge=[])
    states: list[tuple[int, Tensor, Tensor, int]] = []
    for n in order:
        _, own, taken = samples[n]
        for name in ("vit", "latent", "time", "bridge"):
            getattr(contents, name).extend(getattr(own, name))
        states += [(n, *state) for state in taken]
    built, _ = layout([segments for segments, _, _ in samples], model.config.special, packed=rows)
    hidden = model(built, contents)
    logits, target = model.scored_logits(hidden, built)
    known = trajectories[0].vocabulary or None
    log_probs = torch.log_softmax(logits[:, :known] / temperature, dim=-1)
    text = log_probs.gather(1, target[:, None]).squeeze(1)
    entropy = -(log_probs.exp() * log_probs).sum(-1).detach()
    own = [[n] for n in range(len(samples))] if rows is None else rows
    owner = torch.stack([torch.tensor(row)[at] for row, at in zip(own, built.sample.clamp(min=0), strict=True)])
    text_row = owner[built.target != IGNORE].to(target.device)
    velocity = model.velocities(hidden, built)
    image = _image_log_probs(velocity, states, times, sigma)
    image_row = torch.tensor([s[0] for s in states], dtype=torch.long, device=target.device)
    real = int(built.valid.sum()) / built.ids.numel()
    if rows is None:
        return Scores(text, entropy, text_row, image, image_row, velocity, real)
    by_text, by_image = text_row.argsort(stable=True), image_row.argsort(stable=True)
    sizes = torch.tensor([len(s[1]) for s in states], dtype=torch.long, device=target.device)
    by_token = image_row.repeat_interleave(sizes).argsort(stable=True)
    text, entropy, text_row = text[by_text], entropy[by_text], text_row[by_text]
    return Scores(text, entropy, text_row, image[by_image], image_row[by_image], velocity[by_token], real)


def _sample(
    model: Bagel, prompt: Prompt, trajectory: Trajectory, steps: Sequence[int], times: Sequence[float]
) -> tuple[list[Segment], Contents, list[tuple[Tensor, Tensor, int]]]:
    """Segments and contents of one trajectory, and its scored transitions (state, next state, step)."""
    contents = Contents(vit=[prompt.patches], latent=[prompt.latent], time=[0.0], bridge=[])
    row, states = prompt.segments(), []
    for reply, restoration in zip(trajectory.replies, [*trajectory.restorations, None], strict=False):
        row.append(text_segment(reply, scored=True))
        if restoration is None:
            continue
        for k in steps:
            contents.latent.append(restoration.states[k])
            contents.time.append(times[k])
            row.append(Image(LATENT, restoration.grid, noise=True))
            states.append((restoration.states[k], restoration.states[k + 1], k))
        if model.config.bridge == "mlp":
            contents.bridge.append(restoration.x0)
            row.append(Image(BRIDGE, restoration.grid))
        else:
            contents.latent.append(restoration.x0)
            contents.time.append(0.0)
            row.append(Image(LATENT, restoration.grid))
    return row, contents, states


def _image_log_probs(velocity: Tensor, states, times: Sequence[float], sigma: float) -> Tensor:
    """Log-probabilities (M,) of the recorded transitions under the predicted velocities."""
    found, start = [], 0
    for _, x, x_next, k in states:
        v = velocity[start : start + len(x)]
        start += len(x)
        x, x_next = x.to(v.device), x_next.to(v.device)
        mean = flow.sde_mean(x, v, times[k], times[k + 1], sigma)
        found.append(flow.sde_log_prob(x_next, mean, sigma, times[k] - times[k + 1]))
    return torch.stack(found) if found else velocity.new_zeros(0)

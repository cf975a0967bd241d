"""Rectified flow as small pure functions (METHOD §1 "Flow matching" and "CFG", §4 "SDE step").

x_t = (1−t)·x0 + t·ε, t ∈ [0, 1], t = 1 is noise; the network predicts the velocity v = ε − x0. There is one sampler,
`sample`: what velocity it follows (guided, or computed once for equal rows) and how it steps (ODE, SDE, or the SDE in
a window) are functions. Rollout and scoring of GRPO share `sde_mean`, so that a fresh policy has ratio 1 by
construction.

Guidance pushes the velocity away from the prediction of contexts with a part left out. It is used for the ODE only: the
published log-probabilities are those of the plain velocity.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SCORE_LIMIT = 100.0
RENORMS = ("global", "channel", "text_channel")

Velocity = Callable[[Tensor, float], Tensor]
"""The velocity (B, N, C) of states (B, N, C) at a time."""
Step = Callable[[Tensor, Tensor, float, float], tuple[Tensor, Tensor]]
"""From states and velocities (B, N, C) at t to the states at t_next, and their log-probabilities (B,)."""


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: scales (1 = off), the interval (low, high] of shifted times, and the renorm.

    The image scale acts on top of the text scale and does nothing where that is off, as in the reference. renorm: over
    which part of the velocity its norm is held at most at the plain one's, see `guide`; `renorm_min` bounds the factor.
    """

    text: float = 1.0
    image: float = 1.0
    low: float = 0.4
    high: float = 1.0
    renorm: str = "global"
    renorm_min: float = 0.0

    @property
    def on(self) -> bool:
        """Whether any time is guided."""
        return self.text > 1

    @property
    def contexts(self) -> int:
        """How many contexts the velocity is predicted in: 1 unguided, 2 with text, 3 with image guidance too."""
        return 1 if not self.on else 2 if self.image <= 1 else 3

    def active(self, t: float) -> bool:
        """Whether the shifted time t lies in the guided interval, open below and closed above."""
        # In float32, the type of the grid: a bound written as 0.4 is the grid's 0.4.
        t, low, high = torch.tensor([t, self.low, self.high], dtype=torch.float32).tolist()
        return self.on and low < t <= high


def guide(v: Tensor, without_text: Tensor, without_image: Tensor | None, guidance: Guidance) -> Tensor:
    """The guided velocity from those of the full context and of the two with something left out, all (B, N, C).

    v₁ = v_text + s_text·(v − v_text), v₂ = v_image + s_image·(v₁ − v_image); without image guidance v₂ = v₁ and
    `without_image` is not read. Renorm: the result is scaled by ‖v‖/‖·‖ clamped to [renorm_min, 1], with the norm of
    v₂ over the row ("global") or per token ("channel"), or of v₁ per token before image guidance ("text_channel").
    """

    def renormed(x: Tensor, over: tuple[int, ...]) -> Tensor:
        factor = v.norm(dim=over, keepdim=True) / (x.norm(dim=over, keepdim=True) + 1e-8)
        return x * factor.clamp(guidance.renorm_min, 1.0)

    found = without_text + guidance.text * (v - without_text)
    if guidance.renorm == "text_channel":
        found = renormed(found, (-1,))
    if guidance.image > 1:
        found = without_image + guidance.image * (found - without_image)
    if guidance.renorm == "text_channel":
        return found
    return renormed(found, (-1,) if guidance.renorm == "channel" else (-2, -1))


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t' = s·t / (1 + (s−1)·t): s > 1 spends more of the grid near the noise."""
    return shift * t / (1 + (shift - 1) * t)


def training_times(normal: Tensor, shift: float = 1.0) -> Tensor:
    """Standard normal draws to training times: sigmoid, then shifted. −∞ stands for a clean latent and gives 0."""
    return shift_time(torch.sigmoid(normal), shift)


def draw_times(n: int, shift: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """n training times (n,) float32, one per image."""
    return training_times(torch.randn(n, generator=generator), shift)


def time_grid(steps: int, shift: float) -> Tensor:
    """The `steps + 1` shifted times from 1 to 0, float32. (The reference calls this num_timesteps = steps + 1.)"""
    return shift_time(torch.linspace(1, 0, steps + 1), shift)


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t between data and noise. t is (B,) or broadcastable; the others (B, N, C)."""
    t = t.reshape(-1, *([1] * (x0.ndim - 1)))
    return (1 - t) * x0 + t * noise


def euler_step(x: Tensor, v: Tensor, t: float, t_next: float) -> Tensor:
    """One deterministic step of the sampler."""
    return x - v * (t - t_next)


def sde_mean(x: Tensor, v: Tensor, t: Tensor | float, t_next: Tensor | float, sigma: float) -> Tensor:
    """Mean of the stochastic step: x − (v + ½σ²·s⁻)·Δt with s⁻ = (x + (1−t)·v)/t, the negative score, clipped."""
    score_neg = ((x + (1 - t) * v) / t).clamp(-SCORE_LIMIT, SCORE_LIMIT)
    return x - (v + 0.5 * sigma**2 * score_neg) * (t - t_next)


def sde_log_prob(x_next: Tensor, mean: Tensor, sigma: float, dt: Tensor | float) -> Tensor:
    """−½·mean[(x' − μ)² / (σ²Δt)] over the last two dimensions (tokens, channels): (B,)."""
    return -0.5 * ((x_next - mean) ** 2 / (sigma**2 * dt)).mean(dim=(-2, -1))


def sde_step(x: Tensor, v: Tensor, noise: Tensor, t: float, t_next: float, sigma: float) -> tuple[Tensor, Tensor]:
    """One stochastic step with constant σ. All (B, N, C). Returns (x', log-probability (B,))."""
    mean = sde_mean(x, v, t, t_next, sigma)
    x_next = mean + sigma * math.sqrt(t - t_next) * noise
    return x_next, sde_log_prob(x_next, mean, sigma, t - t_next)


def sample(velocity: Velocity, x: Tensor, times: Sequence[float], step: Step) -> Iterator[tuple[Tensor, Tensor]]:
    """Integrate x (B, N, C) along falling `times`: the states after each step, and their log-probabilities (B,)."""
    for t, t_next in itertools.pairwise(times):
        x, log_prob = step(x, velocity(x, t), t, t_next)
        yield x, log_prob


def stepping(sigma: float, first: float, last: float, generator: torch.Generator | None = None) -> Step:
    """The SDE's step at the times first ≥ t > last and the ODE's elsewhere, which has no probability: NaN. σ = 0: ODE.

    Noise is drawn on the host, from `generator`.
    """

    def step(x: Tensor, v: Tensor, t: float, t_next: float) -> tuple[Tensor, Tensor]:
        if sigma > 0 and first >= t > last:
            noise = torch.randn(x.shape, generator=generator).to(x.device)
            return sde_step(x, v, noise, t, t_next, sigma)
        return euler_step(x, v, t, t_next), x.new_full((len(x),), math.nan)

    return step


def guided(plain: Velocity, every: Velocity, guidance: Guidance) -> Velocity:
    """`plain`, guided inside the interval: there `every` gets the states once per context, and `guide` joins them."""

    def velocity(x: Tensor, t: float) -> Tensor:
        if not guidance.active(t):
            return plain(x, t)
        v, without_text, *rest = every(x.repeat(guidance.contexts, 1, 1), t).chunk(guidance.contexts)
        return guide(v, without_text, rest[0] if rest else None, guidance)

    return velocity


def shared(plain: Velocity, trunk: Velocity, one: Tensor, again: Sequence[int], until: float) -> Velocity:
    """`plain`, with equal rows computed once at times t > until: `trunk` gets the rows `one`, which `again` spreads."""
    return lambda x, t: trunk(x[one], t)[again] if t > until else plain(x, t)

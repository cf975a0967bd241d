"""Rectified flow as small pure functions (METHOD §1 "Flow matching", §4 "SDE step").

x_t = (1−t)·x0 + t·ε, t ∈ [0, 1], t = 1 is noise; the network predicts the velocity v = ε − x0. Rollout and scoring
of GRPO share `sde_step`, so that a fresh policy has ratio 1 by construction.
"""

import math

import torch
from torch import Tensor

SCORE_LIMIT = 100.0


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t' = s·t / (1 + (s−1)·t): s > 1 spends more of the grid near the noise."""
    return shift * t / (1 + (shift - 1) * t)


def draw_times(n: int, shift: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """n training times (n,) float32: sigmoid of a standard normal, then shifted. One per image."""
    return shift_time(torch.sigmoid(torch.randn(n, generator=generator)), shift)


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

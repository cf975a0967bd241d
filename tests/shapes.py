"""Batches as the training code lays them out, without pictures or a model: grids of zeros, and a forward that stops."""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from clear.model.sequence import Layout, SpecialTokens
from clear.schema import Config
from clear.training import sft
from clear.training.loop import parallel
from clear.training.loop.parallel import Pass, one_pass
from clear.training.loop.trainer import Loss


class Shapes:
    """An image bank that knows grids alone: every token has one channel, which is 0."""

    def __init__(self, latent: Sequence[tuple[int, int]], vit: Sequence[tuple[int, int]]) -> None:
        self._latent, self._vit = latent, vit
        self.latents = [torch.zeros(rows * columns, 1) for rows, columns in latent]

    def latent_grid(self, i: int) -> tuple[int, int]:
        return self._latent[i]

    def vit_grid(self, i: int) -> tuple[int, int]:
        return self._vit[i]

    def patches(self, i: int) -> Tensor:
        return torch.zeros(self._vit[i][0] * self._vit[i][1], 1)

    def paired_patches(self, i: int) -> Tensor:
        return torch.zeros_like(self.latents[i])


class Planned(Exception):
    """Carries the layout (its argument) that a model would have computed."""


class Planner:
    """In place of a model: raises Planned where the forward would begin."""

    def __init__(self, bridge: str = "direct") -> None:
        self.config = SimpleNamespace(special=SpecialTokens(0, 1, 2, 3), llm=SimpleNamespace(layers=2), bridge=bridge)

    def __call__(self, built: Layout, contents, **_) -> None:
        raise Planned(built)


def stage_loss(config: Config, stage: str, data: sft.TraceData) -> Loss:
    """The last objective of stage `sft` or `bridge` over a `Planner`."""
    return sft.trace_loss(Planner(), data, sft.trace_weights(config, stage == "bridge"))


def passes(loss: Loss, index: list[int], now: Pass, monkeypatch, world: int = 1, rank: int = 0) -> Iterator[Layout]:
    """The layouts that process `rank` of `world` computes of one batch, pass by pass; `now` counts as in training."""
    monkeypatch.setattr(parallel, "world", lambda: world)
    monkeypatch.setattr(parallel, "rank", lambda: rank)
    now.number, now.passes, state = 0, 1, torch.get_rng_state()
    while now.number < now.passes:
        torch.set_rng_state(state)
        try:
            with one_pass(now):
                loss(index)
        except Planned as planned:
            yield planned.args[0]
        now.number += 1

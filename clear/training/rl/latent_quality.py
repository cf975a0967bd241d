"""How close a restored latent is to the clean image's (METHOD §4 "latent_quality"): a reward that needs no answer.

Off by default, as published: with it on, restoration is again supervised by clean pictures.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clear.model.bagel import Bagel
from clear.model.images import ImageBank
from clear.reasoning.engine import Trajectory

WEIGHTS = {
    # weights of mse, cos, local, vit
    "vae": (0.3, 0.3, 0.4, 0.0),
    "vit": (0.0, 0.0, 0.0, 1.0),
    "both": (0.2, 0.2, 0.3, 0.3),
}


@dataclass(frozen=True)
class LatentQuality:
    """Scores last restorations against clean pictures.

    kind: a key of WEIGHTS. bank: the clean pictures, encoded; clean: per prompt its picture there, None without one.
    reencode: latents (B, N, C) and their grid → ViT patches (B, M, F) and theirs (`Answerer.reencode`).
    """

    kind: str
    bank: ImageBank
    clean: Sequence[int | None]
    reencode: Callable[[Tensor, tuple[int, int]], tuple[Tensor, tuple[int, int]]]

    @torch.no_grad()
    def __call__(self, model: Bagel, prompts: Sequence[int], trajectories: Sequence[Trajectory]) -> list[float | None]:
        """A score in [0, 1] for each trajectory, which belongs to the prompt of that number.

        None where nothing was restored, and where there is no clean picture, or only one of another shape.
        """
        return [self._score(model, self.clean[i], t) for i, t in zip(prompts, trajectories, strict=True)]

    def _score(self, model: Bagel, picture: int | None, trajectory: Trajectory) -> float | None:
        if not trajectory.restorations or picture is None:
            return None
        last = trajectory.restorations[-1]
        if last.grid != self.bank.latent_grid(picture):
            return None
        weights = WEIGHTS[self.kind]
        clean = self.bank.latents[picture].to(last.x0)
        parts = [*latent_similarities(last.x0, clean), self._vit(model, picture, last) if weights[-1] else 0.0]
        return sum(weight * part for weight, part in zip(weights, parts, strict=True))

    def _vit(self, model: Bagel, picture: int, restoration) -> float:
        patches, grid = self.reencode(restoration.x0[None], restoration.grid)
        restored = pooled(model, patches[0], grid)
        clean = pooled(model, self.bank.patches(picture).to(patches), self.bank.vit_grid(picture))
        return F.cosine_similarity(restored, clean, dim=0).clamp(min=0).item()


def latent_similarities(restored: Tensor, clean: Tensor) -> tuple[float, float, float]:
    """Of latents (N, C): exp(−MSE/2), the cosine of the whole, and the mean of the tokens' cosines, none below 0."""
    restored, clean = restored.float(), clean.float()
    close = torch.exp(-0.5 * F.mse_loss(restored, clean))
    whole = F.cosine_similarity(restored.flatten(), clean.flatten(), dim=0)
    local = F.cosine_similarity(restored, clean, dim=-1).clamp(min=0).mean()
    return close.item(), max(whole.item(), 0.0), local.item()


def pooled(model: Bagel, patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean (D,) of the ViT's features of one picture: patches (M, F) on `grid`."""
    rows, columns = (torch.arange(n, device=patches.device) for n in grid)
    positions = (rows[:, None] * model.config.vit.side + columns).flatten()
    return model.vit_model(patches[None], positions[None])[0].float().mean(0)

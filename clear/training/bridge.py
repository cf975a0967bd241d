"""Training the latent representation bridge (METHOD §2).

The `mlp` bridge first imitates the clean image's ViT tokens from latents (no text involved), then the understanding
expert and the bridge learn the answers through it. Part of the rows read the model's *own* denoised latents, so that
training sees what inference will see. The generation expert stays frozen, so those latents stay its own.
The `direct` bridge has no parameters; its distillation runs inside the trace loss.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clear.model.bagel import Bagel
from clear.reasoning.engine import Options, denoise, prefill, text_reply
from clear.training.sft import TraceData
from clear.training.trainer import Loss


@torch.no_grad()
def own_latents(model: Bagel, data: TraceData, chosen: Sequence[int], options: Options, seed: int) -> dict[int, Tensor]:
    """The model's denoised latent (N, C) for each chosen trace, as inference would make it after the trigger."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[int, Tensor] = {}
    for start in range(0, len(chosen), options.batch):
        part = list(chosen[start : start + options.batch])
        prompts = [data.prompt(n) for n in part]
        grid = prompts[0].latent_grid
        rows = prefill(model, prompts)
        text_reply(model, rows, data.trigger)
        noise = torch.randn(len(part), grid[0] * grid[1], model.config.latent_channels, generator=generator)
        latents = denoise(model, rows.cache, rows.rope, grid, noise, options).x0
        found |= {n: latents[k].clone() for k, n in enumerate(part)}
    return found


def imitation_loss(model: Bagel, data: TraceData, pairs: Sequence[tuple[int, Tensor | None]]) -> Loss:
    """Squared distance (relative to the targets' variance) and cosine to the clean image's ViT tokens.

    `pairs` lists image numbers of `data.clean` with the latent to read, or None for the clean latent itself.
    """

    def loss(index: list[int]) -> tuple[Tensor, dict[str, float]]:
        images = [pairs[n][0] for n in index]
        latents = [
            data.clean.latents[i] if pairs[n][1] is None else pairs[n][1] for n, i in zip(index, images, strict=True)
        ]
        place = _places(data.clean.vit_grid(images[0])).repeat(len(index), 1)
        with torch.no_grad():
            target = model.vit_tokens(torch.stack([data.clean.patches(i) for i in images]), place).float()
        found = model.bridge_tokens(torch.stack(latents), place).float()
        mse = F.mse_loss(found, target) / target.var()
        cosine = F.cosine_similarity(found, target, dim=-1).mean()
        return mse + 1 - cosine, {"cosine": cosine.item(), "relative_mse": mse.item()}

    return loss


def _places(grid: tuple[int, int]) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return torch.stack([rows.flatten(), columns.flatten()], dim=1)

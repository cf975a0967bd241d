"""Training the latent representation bridge (METHOD §2).

The `mlp` bridge first imitates the clean image's ViT tokens from latents (no text involved), then the understanding
expert and the bridge learn the answers through it. Part of the rows read the model's *own* denoised latents, so that
training sees what inference will see. The generation expert stays frozen, so those latents stay its own.

The `direct` bridge has no parameters: the generation expert that draws the picture is what reads it and what the
distillation moves (METHOD §2). So the trace loss keeps the velocity loss of SFT on the same rows, as published, where
both are one stage. Without it nothing keeps the drawing as it is, and the own latents, made before, no longer match
those at inference. Freezing the drawing weights would freeze the bridge itself, and distilling the incoming velocity
would need a second forward of a second model.
"""

from collections.abc import Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clear.model.bagel import Bagel
from clear.reasoning.engine import Options, denoise, dropped_contexts, prefill, text_reply
from clear.training.loop.trainer import Loss
from clear.training.sft import TraceData


@torch.no_grad()
def own_latents(model: Bagel, data: TraceData, chosen: Sequence[int], options: Options, seed: int) -> dict[int, Tensor]:
    """The model's denoised latent (N, C) for each chosen trace, as inference would make it after the trigger."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[int, Tensor] = {}
    for start in range(0, len(chosen), options.batch):
        part = list(chosen[start : start + options.batch])
        for grid, members in grouped([data.prompt(n).latent_grid for n in part]).items():
            prompts = [data.prompt(part[k]) for k in members]
            rows = prefill(model, prompts)
            text_reply(model, rows, data.trigger)
            noise = torch.randn(len(members), grid[0] * grid[1], model.config.latent_channels, generator=generator)
            dropped = dropped_contexts(model, rows, prompts, options.guidance)
            latents = denoise(model, rows.cache, rows.rope, grid, noise.to(rows.rope.device), options, None, dropped).x0
            found |= {part[k]: latents[j].clone() for j, k in enumerate(members)}
    return {n: found[n] for n in chosen}


def imitation_loss(model: Bagel, data: TraceData, pairs: Sequence[tuple[int, Tensor | None]]) -> Loss:
    """Squared distance (relative to the targets' variance) and cosine to the clean image's ViT tokens.

    `pairs` lists image numbers of `data.clean` with the latent to read, or None for the clean latent itself. The
    targets are those of the image on its latent grid, so that each token of the bridge has its own.
    """

    def loss(index: list[int]) -> tuple[Tensor, dict[str, float]]:
        found, target, device = [], [], model.vae2llm.weight.device
        for grid, members in grouped([data.clean.latent_grid(pairs[n][0]) for n in index]).items():
            chosen = [pairs[index[k]] for k in members]
            place = _places(grid).repeat(len(chosen), 1).to(device)
            patches = torch.stack([data.clean.paired_patches(i) for i, _ in chosen]).to(device)
            latents = torch.stack([data.clean.latents[i] if own is None else own.cpu() for i, own in chosen]).to(device)
            with torch.no_grad():
                target.append(model.vit_tokens(patches, place).float())
            found.append(model.bridge_tokens(latents, place).float())
        found, target = torch.cat(found), torch.cat(target)
        mse = F.mse_loss(found, target) / target.var()
        cosine = F.cosine_similarity(found, target, dim=-1).mean()
        return mse + 1 - cosine, {"cosine": cosine.item(), "relative_mse": mse.item()}

    return loss


def grouped(keys: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    """Places of equal keys together, keys in order of first occurrence."""
    found: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        found.setdefault(key, []).append(place)
    return found


def _places(grid: tuple[int, int]) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return torch.stack([rows.flatten(), columns.flatten()], dim=1)

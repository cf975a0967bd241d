"""Training the latent representation bridge (METHOD §2).

The `mlp` bridge first imitates the clean image's ViT tokens from latents (no text involved), then the understanding
expert and the bridge learn the answers through it. Part of the rows read the model's *own* denoised latents, so that
training sees what inference will see. The generation expert stays frozen, so those latents stay its own.

The `direct` bridge has no parameters: the generation expert that draws the picture is what reads it and what the
distillation moves (METHOD §2). So the trace loss keeps the velocity loss of SFT on the same rows, as published, where
both are one stage. Without it nothing keeps the drawing as it is, and the own latents, made before, no longer match
those at inference. Freezing the drawing weights would freeze the bridge itself, and distilling the incoming velocity
would need a second forward of a second model.

The decision to restore comes last. Whether a restoration helps is a property of the model and not of the picture, so
it is measured: the stage lets the model answer questions that it was not trained on along both of its paths, and it
learns the deciding token from what each path is worth (`decision_loss`), in turn with the traces, which keep the
replies. Only the output head learns it: all weights together learn the questions by heart, not what the model sees in
them (docs/LOG.md has the figures). Adapters do not reach the head, so a model with adapters learns it in these.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clear.model.bagel import Bagel, Contents
from clear.model.sequence import IGNORE, Text
from clear.reasoning.engine import Options, deciding, denoise, dropped_contexts, prefill, text_reply
from clear.reasoning.prompts import Prompt
from clear.training.loop.parallel import share_batch
from clear.training.loop.trainer import Loss
from clear.training.sft import TraceData, likeness

DECIDING = ("lm_head",)
"""What learns the decision, in a model without adapters."""


@torch.no_grad()
def own_latents(
    model: Bagel,
    data: TraceData,
    chosen: Sequence[int],
    options: Options,
    seed: int,
    progress: Callable[[int], object] = lambda count: None,
) -> dict[int, Tensor]:
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
        progress(len(part))
    return {n: found[n] for n in chosen}


@dataclass(frozen=True)
class Decision:
    """A prompt by its number, whether restoring its picture is better, and how much depends on it (> 0)."""

    number: int
    restore: bool
    weight: float


def decisions(direct: Sequence[float], restored: Sequence[float], price: float) -> list[Decision]:
    """What both paths say about each prompt: `direct` and `restored` are the probability of a right reply, in [0, 1].

    A restoration is right where it gains more than `price`, and the weight is how much more, or less. A model that fits
    them restores where the expected gain is above the price: the accuracy that a restoration must bring to be worth its
    time. A prompt that gains exactly the price says nothing and is left out.
    """
    gains = [b - a - price for a, b in zip(direct, restored, strict=True)]
    return [Decision(number, gain > 0, abs(gain)) for number, gain in enumerate(gains) if gain]


def decision_loss(
    model: Bagel, tokenizer, prompts: Sequence[Prompt], chosen: Sequence[Decision], traces: Loss, share: float
) -> Loss:
    """Batches of two kinds at random: with probability `share` the deciding tokens of `chosen`, else the trace loss.

    The deciding token is the first one in which a direct reply and the trigger reply differ; nothing else of a
    decision carries a loss. The numbers of a batch count traces; decisions on `prompts` are drawn by their weights.
    """
    weights = torch.tensor([decision.weight for decision in chosen], dtype=torch.float64)
    begun, direct, trigger = deciding(tokenizer)
    scored = [False] * len(begun) + [True]

    def loss(index: list[int]) -> tuple[Tensor, dict[str, float]]:
        if torch.rand(()) >= share:
            return traces(index)
        drawn = [chosen[k] for k in torch.multinomial(weights, len(index), replacement=True).tolist()]
        asked = [prompts[decision.number] for decision in drawn]
        said = [Text([*begun, trigger if d.restore else direct], scored, eos=False) for d in drawn]
        rows = [[*prompt.segments(), text] for prompt, text in zip(asked, said, strict=True)]
        contents = Contents([p.patches for p in asked], [p.latent for p in asked], [0.0] * len(asked))
        built, contents, part = share_batch(rows, contents, model.config.special)
        logits, target = model.scored_logits(model(built, contents), built)
        right = (logits.argmax(-1) == target).float().mean().item()
        total = F.cross_entropy(logits, target)
        return total * part.weight(lambda b: b.target != IGNORE), {"decision": total.item(), "decision_accuracy": right}

    return loss


def imitation_loss(model: Bagel, data: TraceData, pairs: Sequence[tuple[int, Tensor | None]]) -> Loss:
    """Distance (`likeness`) to the clean image's ViT tokens.

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
        return likeness(torch.cat(found), torch.cat(target))

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

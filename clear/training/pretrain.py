"""Training a BAGEL model from scratch on annotated scenes: ViT, autoencoder, then both experts together.

Stands in for the published pretraining. The ViT learns dense labels (SigLIP's role), the autoencoder learns clean and
unlabelled degraded images (FLUX's role), and the joint phase teaches captions and question answering on clean images
only (as branches of one row) beside an identity/edit task for the generation expert. No degraded question is seen.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clear.data.records import Sample
from clear.model import flow
from clear.model.bagel import Bagel, Contents
from clear.model.images import ImageBank
from clear.model.sequence import LATENT, VIT, Gap, Image, Segment, Text, layout
from clear.model.tokenizer import encode
from clear.model.vae import AutoEncoder
from clear.reasoning import grammar
from clear.schema import Base
from clear.sources.scenes.render import captions
from clear.training.loop.trainer import Loss

EDITS = ("copy", "paint")
"""Words of the identity/edit task: "copy", or "paint" and what is true of the minimal-pair partner."""
DESCRIBE = ("describe shapes", "describe colour")
"""Instructions of the captioning task: shape by shape, or colour by colour."""


class DenseProbe(nn.Module):
    """The ViT with a throw-away linear head that tells every token what its cell holds, factor by factor.

    Separate factors (shape, colour, letter, place) and not one joint class: with joint classes the language model
    must learn each of the 36 pairs apart before it can ask for "the circle" (docs/LOG.md).
    """

    def __init__(self, tower: nn.Module, sizes: Sequence[int]) -> None:
        super().__init__()
        self.tower, self.sizes = tower, list(sizes)
        self.head = nn.Linear(tower.config.hidden, sum(sizes))

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        """Patches (B, N, F) of one grid → logits (B·N, size) per factor."""
        rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
        features = self.tower(patches, (rows * self.tower.config.side + columns).flatten().to(patches.device))
        return list(self.head(features).float().flatten(0, 1).split(self.sizes, dim=-1))


def dense_label_loss(probe: DenseProbe, bank: ImageBank, labels: Tensor) -> Loss:
    """Cross-entropy of the labels (images, rows, columns, factors) of a coarse grid, spread over the tokens."""

    def loss(index: list[int]) -> tuple[Tensor, dict[str, float]]:
        grid = bank.vit_grid(index[0])
        row = torch.arange(grid[0]) * labels.shape[1] // grid[0]
        column = torch.arange(grid[1]) * labels.shape[2] // grid[1]
        device = probe.head.weight.device
        target = labels[index][:, row][:, :, column].flatten(0, 2).to(device)
        logits = probe(torch.stack([bank.patches(i) for i in index]).to(device), grid)
        total = sum(F.cross_entropy(found, target[:, k]) for k, found in enumerate(logits))
        right = torch.stack([found.argmax(-1) == target[:, k] for k, found in enumerate(logits)]).all(0)
        return total, {"accuracy": right.float().mean().item()}

    return loss


def reconstruction_loss(vae: AutoEncoder, bank: ImageBank) -> Loss:
    """L1 + squared error of the reconstruction, and a light KL that keeps the posterior near a unit normal."""

    def loss(index: list[int]) -> tuple[Tensor, dict[str, float]]:
        image = torch.stack([bank.pixels(i) for i in index]).to(next(vae.parameters()).device)
        mean, log_var = vae.encoder(image).float().chunk(2, dim=1)
        log_var = log_var.clamp(-20, 10)
        z = mean + torch.exp(0.5 * log_var) * torch.randn_like(mean)
        found = vae.decoder(z).float()
        mse = F.mse_loss(found, image)
        kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).mean()
        psnr = -10 * torch.log10(mse.detach() / 4).item()
        return F.l1_loss(found, image) + 2 * mse + 1e-4 * kl, {"psnr": psnr}

    return loss


@torch.no_grad()
def normalise_latents(vae: AutoEncoder, bank: ImageBank, count: int = 512) -> AutoEncoder:
    """The same autoencoder with shift and scale set so that latents have mean 0 and deviation 1 over the bank."""
    step = max(1, len(bank) // count)
    chosen = range(0, len(bank), step)
    batches = [torch.stack([bank.pixels(i) for i in list(chosen)[s : s + 64]]) for s in range(0, len(chosen), 64)]
    device = next(vae.parameters()).device
    mean = torch.cat([vae.encoder(batch.to(device)).chunk(2, dim=1)[0] for batch in batches])
    fields = {"shift_factor": round(mean.mean().item(), 6), "scale_factor": round(1 / mean.std().item(), 6)}
    vae.config = type(vae.config)(**{**vae.config.__dict__, **fields})
    return vae


class JointData:
    """Tokenised captions, questions, replies and edits of the clean pretraining samples, by sample number.

    The captions are more (instruction, reply) pairs of an image: they name the place and the colour of every object
    and so teach in a few hundred steps what two-step questions alone did not in thousands (docs/LOG.md).
    An edit is (instruction, number of the sample it leads to): a copy of itself, or the minimal-pair partner, which
    differs in one object's colour.
    """

    def __init__(self, tokenizer, samples: Sequence[Sample]) -> None:
        self.pairs: list[list[tuple[list[int], list[int]]]] = []
        self.captions: list[list[tuple[list[int], list[int]]]] = []
        partners: dict[str, list[tuple[int, str]]] = {}
        for i, sample in enumerate(samples):
            replies = [(q.text, grammar.plain_reply(q.evidence, q.answer)) for q in sample.questions]
            told = zip(DESCRIBE, captions(sample.annotation), strict=True)
            for found, texts in ((self.pairs, replies), (self.captions, told)):
                found.append([(encode(tokenizer, text), encode(tokenizer, reply)) for text, reply in texts])
            for question in sample.questions:
                if question.pair:
                    partners.setdefault(question.pair, []).append((i, question.evidence))
        self.copy = encode(tokenizer, EDITS[0])
        self.paint: dict[int, tuple[list[int], int]] = {}
        for (i, fact_i), (j, fact_j) in (halves for halves in partners.values() if len(halves) == 2):
            self.paint[i] = (encode(tokenizer, f"{EDITS[1]} {fact_j}"), j)
            self.paint[j] = (encode(tokenizer, f"{EDITS[1]} {fact_i}"), i)

    def edit(self, i: int, paint: bool) -> tuple[list[int], int]:
        """Instruction and target sample for sample i."""
        return self.paint[i] if paint and i in self.paint else (self.copy, i)


def joint_loss(model: Bagel, bank: ImageBank, data: JointData, base: Base) -> Loss:
    """Two kinds of batches at random: question answering, and the identity/edit flow task.

    Kinds, dropped context and the caption are drawn per batch and not per row, because a row costs as much as its
    longest neighbour.
    """

    def loss(index: list[int]) -> tuple[Tensor, dict[str, float]]:
        flow_batch, no_vit, no_vae = (
            torch.rand(3) < torch.tensor([base.flow_share, base.drop_vit, base.drop_vae])
        ).tolist()
        if flow_batch:
            return _flow_step(model, bank, data, index, no_vit)
        return _answer_step(model, bank, data, index, no_vit, no_vae and not no_vit, base.questions)

    return loss


def _context(bank: ImageBank, i: int, contents: Contents, no_vit: bool, no_vae: bool) -> list[Segment]:
    if not no_vae:
        contents.latent.append(bank.latents[i])
        contents.time.append(0.0)
    if not no_vit:
        contents.vit.append(bank.patches(i))
    latent = Gap() if no_vae else Image(LATENT, bank.latent_grid(i))
    return [latent, Gap() if no_vit else Image(VIT, bank.vit_grid(i))]


def _answer_step(model, bank, data, index, no_vit: bool, no_vae: bool, questions: int):
    rows, contents = [], Contents(vit=[], latent=[], time=[])
    which = int(torch.randint(len(DESCRIBE), ()))
    for i in index:
        row = _context(bank, i, contents, no_vit, no_vae)
        for b, (question, reply) in enumerate([data.captions[i][which], *data.pairs[i][:questions]], start=1):
            row += [Text(question, branch=b), Text(reply, scored=True, branch=b)]
        rows.append(row)
    built, _ = layout(rows, model.config.special)
    logits, target = model.scored_logits(model(built, contents), built)
    ce = F.cross_entropy(logits, target)
    hit = (logits.argmax(-1) == target).float().mean().item()
    return ce, {"ce": ce.item(), "token_accuracy": hit}


def _flow_step(model, bank, data, index, no_vit: bool):
    rows, contents = [], Contents(vit=[], latent=[], time=[])
    edits = [data.edit(i, paint) for i, paint in zip(index, (torch.rand(len(index)) < 0.3).tolist(), strict=True)]
    targets = torch.stack([bank.latents[target] for _, target in edits])
    times, noise = flow.draw_times(len(index)), torch.randn_like(targets)
    noised = flow.interpolate(targets, noise, times)
    for n, i in enumerate(index):
        row = _context(bank, i, contents, no_vit, no_vae=False)
        rows.append([*row, Text(edits[n][0]), Image(LATENT, bank.latent_grid(i), noise=True)])
        contents.latent.append(noised[n])
        contents.time.append(times[n].item())
    built, _ = layout(rows, model.config.special)
    found = model.velocities(model(built, contents), built)
    mse = F.mse_loss(found, (noise - targets).flatten(0, 1).to(found.device))
    return mse, {"mse": mse.item()}

"""Supervised fine-tuning: restoration warm-up and generate-then-answer traces (METHOD §3).

Sequence of a restoring trace: degraded latent | degraded ViT | question | reply 1 (CE) | clean latent, noisy (MSE) |
feedback | reply 2 (CE). The feedback is what the bridge will put there: for the `direct` bridge the clean latent at
t = 0 with, behind it, a ViT copy that only serves as teacher of the distillation (per-layer KL) and is visible to
no other segment (the reference's next text reads it, although it is absent at inference); its grid is the latent's, so
that tokens pair; for the `mlp` bridge the clean ViT tokens, which that bridge is later trained to imitate.

Departures: reply segments are never dropped; the text loss is the mean over the scored tokens of the batch; the
restoration warm-up on unlabelled pairs is an option whose neutral value (0 steps) is the published recipe.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clear.data.records import CLEAN, Sample
from clear.model import flow
from clear.model.bagel import FROZEN, Bagel, Contents
from clear.model.bridge import distilled_layers, layer_weights, token_distillation
from clear.model.images import ImageBank
from clear.model.mot import Hidden
from clear.model.sequence import BRIDGE, IGNORE, LATENT, VIT, Image, Layout, Segment, Text
from clear.model.tokenizer import encode
from clear.reasoning import grammar
from clear.reasoning.prompts import Prompt, outlined, pictured
from clear.schema import Config
from clear.traces.table import TraceRow
from clear.training.loop.parallel import share_batch
from clear.training.loop.trainer import Loss


def set_trainable(model: nn.Module, only: Sequence[str] = (), never: Sequence[str] = FROZEN) -> None:
    """Train the parameters whose name has a part of `only` (empty: all), except those with a part of `never`."""
    for name, value in model.named_parameters():
        wanted = not only or any(part in name for part in only)
        value.requires_grad_(wanted and not any(part in name for part in never))


class TraceData:
    """Tokenised traces over two banks: what is shown, and the clean image each restoration should reach."""

    def __init__(
        self,
        tokenizer,
        rows: Sequence[TraceRow],
        samples: Sequence[Sample],
        shown: ImageBank,
        clean: ImageBank,
        system: str = "",
        labelled: Collection[int] | None = None,
    ) -> None:
        """`shown` and `clean` hold the degraded and the clean image of `samples`, in their order.

        `labelled` are the numbers of the samples whose answers may be learned (None: all); the others are pictures to
        restore, with a question.
        """
        self.shown, self.clean = shown, clean
        self.system = tuple(encode(tokenizer, system)) if system else ()
        number = {sample.id: i for i, sample in enumerate(samples)}
        self.rows = list(rows)
        self.image = [number[row.sample] for row in rows]
        self.paired = [n for n, i in enumerate(self.image) if samples[i].paired]
        self.learned = [n for n, i in enumerate(self.image) if labelled is None or i in labelled]
        self.question = [encode(tokenizer, row.text) for row in rows]
        self.reply_1 = [encode(tokenizer, row.reply_1) for row in rows]
        self.reply_2 = [encode(tokenizer, row.reply_2) if row.reply_2 else None for row in rows]
        self.direct = [encode(tokenizer, row.direct) for row in rows]
        self.restored = [encode(tokenizer, row.restored) for row in rows]
        self.trigger = encode(tokenizer, grammar.restore_reply())

    def __len__(self) -> int:
        return len(self.rows)

    def _asked(self, n: int) -> tuple[ImageBank, int, Sequence[int], Sequence[int]]:
        """Trace n as `pictured` and `outlined` take it."""
        bank = self.clean if self.rows[n].severity == CLEAN else self.shown
        return bank, self.image[n], self.system, self.question[n]

    def prompt(self, n: int) -> Prompt:
        """The prompt of trace n, as inference would make it."""
        return pictured(*self._asked(n))

    def positions(self, n: int) -> int:
        """Rope positions of trace n with its replies and, where it restores, its restoration."""
        prompt, second = outlined(*self._asked(n)), self.reply_2[n]
        return prompt.positions + len(self.reply_1[n]) + 2 + (0 if second is None else 1 + len(second) + 2)

    def open_row(self, n: int, contents: Contents, drop_vit: bool = False, *drop_texts: bool) -> list[Segment]:
        """Segments of trace n's prompt; its pictures are appended to `contents`."""
        prompt = self.prompt(n)
        contents.latent.append(prompt.latent)
        contents.time.append(0.0)
        if not drop_vit:
            contents.vit.append(prompt.patches)
        return prompt.segments(drop_vit, *drop_texts)


def restoration_loss(model: Bagel, data: TraceData, replies: bool = False) -> Loss:
    """Velocity loss on degraded → clean pairs. No reply is learned, or with `replies` those of both paths (`_both`).

    The sample numbers count `data.paired`: a picture without a clean partner is not among them.
    """

    def loss(index: list[int]) -> tuple[Tensor, dict[str, float]]:
        index = [data.paired[k] for k in index]
        latents = [data.clean.latents[data.image[n]] for n in index]
        sizes, clean = [len(z) for z in latents], torch.cat(latents)
        times = flow.draw_times(len(index))
        noise = torch.randn_like(clean)
        noised = flow.interpolate(clean, noise, times.repeat_interleave(torch.tensor(sizes))).split(sizes)
        rows, contents = [], Contents(vit=[], latent=[], time=[])
        for k, n in enumerate(index):
            prompt = data.open_row(n, contents)
            asks = replies and data.reply_2[n] is not None
            path = [
                Text(data.trigger, scored=asks or None),
                Image(LATENT, data.clean.latent_grid(data.image[n]), noise=True),
            ]
            contents.latent.append(noised[k])
            contents.time.append(times[k].item())
            rows.append(_both(prompt, path, _direct(data, n, not asks)) if replies else [*prompt, *path])
        built, contents, share = share_batch(rows, contents, model.config.special)
        hidden = model(built, contents)
        mse = _velocity_loss(model, hidden, built, share.targets((noise - clean).split(sizes)))
        total, figures = mse * share.weight(lambda b: b.noisy), {"mse": mse.item()}
        if replies:
            ce, found = _reply_loss(model, hidden, built)
            total, figures = total + ce * share.weight(lambda b: b.target != IGNORE), figures | found
        return total, figures

    return loss


def _both(prompt: Sequence[Segment], path: Sequence[Segment], direct: Text, apart: bool = False) -> list[Segment]:
    """A prompt with branches none of which sees another: a path with a restoration, and the direct reply; of the path,
    what only the velocity needs is `apart` if wished."""
    path = _velocity_apart(path) if apart else [replace(part, branch=1) for part in path]
    return [*prompt, *path, replace(direct, branch=path[-1].branch + 1)]


def _direct(data: TraceData, n: int, decided: bool) -> Text:
    """The direct reply of trace n, learned as a whole, or behind its deciding token where the trace decides otherwise.

    So a question whose trace restores teaches the direct path its answer all the same.
    """
    reply = data.direct[n]
    if decided:
        return Text(reply, scored=True)
    deciding = grammar.fork(reply, data.trigger)
    return Text(reply, scored=[place > deciding for place in range(len(reply) + 1)])


def _velocity_apart(path: Sequence[Segment]) -> list[Segment]:
    """The path with what only the velocity needs in a branch of its own, right behind the prompt."""
    apart = [part for part in path if isinstance(part, Image) and part.kind == LATENT and part.noise]
    rest = [part for part in path if part not in apart]
    return [*(replace(part, branch=1) for part in apart), *(replace(part, branch=2) for part in rest)]


def direct_loss(model: Bagel, data: TraceData) -> Loss:
    """The baseline: answer loss of the direct reply to every trace, no restoration. Numbers count `data.learned`."""

    def loss(index: list[int]) -> tuple[Tensor, dict[str, float]]:
        index = [data.learned[k] for k in index]
        contents = Contents(vit=[], latent=[], time=[])
        rows = [[*data.open_row(n, contents), Text(data.direct[n], scored=True)] for n in index]
        built, contents, share = share_batch(rows, contents, model.config.special)
        ce, figures = _reply_loss(model, model(built, contents), built)
        return ce * share.weight(lambda b: b.target != IGNORE), figures

    return loss


def likeness(found: Tensor, target: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Squared distance of features (N, D), relative to the targets' variance, and 1 − their cosine, with figures."""
    mse = F.mse_loss(found, target) / target.var()
    cosine = F.cosine_similarity(found, target, dim=-1).mean()
    return mse + 1 - cosine, {"cosine": cosine.item(), "relative_mse": mse.item()}


def _reply_loss(model: Bagel, hidden: Hidden, built: Layout) -> tuple[Tensor, dict[str, float]]:
    logits, target = model.scored_logits(hidden, built)
    ce = F.cross_entropy(logits, target)
    return ce, {"ce": ce.item(), "token_accuracy": (logits.argmax(-1) == target).float().mean().item()}


def _velocity_loss(model: Bagel, hidden: Hidden, built: Layout, targets: Sequence[Tensor]) -> Tensor:
    found = model.velocities(hidden, built)
    return F.mse_loss(found, torch.cat(list(targets)).to(found.device))


@dataclass(frozen=True)
class TraceWeights:
    """Weights of the trace loss. `feedback` is the kind of segment between the replies: VIT, LATENT or BRIDGE."""

    feedback: int
    ce: float = 1.0
    mse: float = 1.0
    distill: float = 0.0
    stride: int = 1
    drop_vit: float = 0.0
    own: float = 0.0
    other_path: float = 0.0
    both_paths: bool = False
    drop_text: float = 0.0
    decide: bool = True


def trace_weights(config: Config, bridge: bool = False) -> TraceWeights:
    """The weights of stage `sft`, or of the answers through the bridge in stage `bridge`.

    There the mlp bridge leaves the generation expert frozen: no velocity is learned. The direct one trains it, and so
    keeps the velocity loss (clear/training/bridge.py says why).
    """
    s, mlp = config.sft, config.bridge.kind == "mlp"
    return TraceWeights(
        feedback=LATENT if not mlp else BRIDGE if bridge else VIT,
        ce=s.ce_weight,
        mse=0.0 if bridge and mlp else s.mse_weight,
        distill=0.0 if mlp else s.distill_weight,
        stride=s.distill_stride,
        drop_vit=0.0 if bridge else s.drop_vit,
        own=config.bridge.own_latents if bridge else 0.0,
        other_path=s.other_path,
        both_paths=s.both_paths,
        drop_text=0.0 if bridge else s.drop_text,
    )


def trace_loss(model: Bagel, data: TraceData, weights: TraceWeights, own: dict[int, Tensor] | None = None) -> Loss:
    """CE of the replies + MSE of the velocity + distillation (direct bridge only). Sample numbers count `data.learned`.

    `own` maps trace numbers to the model's own denoised latents; with probability `weights.own` a restoring row
    reads it instead of the clean latent. With probability `weights.other_path` a direct trace of a degraded image
    shows the restoring path instead, its first reply unscored: the model learns to answer after any restoration,
    while the decision to restore is learned from the rule's own traces only. With `weights.both_paths` such a row, and
    as often one whose trace restores, learns the replies of both paths, each in a branch of its own; the trace's own
    decision alone is learned, and without `weights.decide` none where there are two paths.

    With probability `weights.drop_text` each, the system prompt and the question are dropped, and the reply before a
    restoration is hidden from the velocity: the context that guidance compares with (`dropped_contexts`). The reply
    itself stays and is learned, where the published code drops it with its loss (METHOD §8 item 9).
    """
    teach = weights.distill > 0 and weights.feedback == LATENT
    layers = model.config.llm.layers
    paired = frozenset(data.paired)
    collect = distilled_layers(layers, weights.stride) if teach and weights.stride else [layers - 1] * teach

    def loss(index: list[int]) -> tuple[Tensor, dict[str, float]]:
        index = [data.learned[k] for k in index]
        rows, contents = [], Contents(vit=[], latent=[], time=[], bridge=[])
        targets = []
        draws = torch.rand(len(index), 3).tolist()
        # Without dropout nothing is drawn, and a run is the one of an earlier version.
        texts = torch.rand(len(index), 3) < weights.drop_text if weights.drop_text else torch.zeros(len(index), 3)
        for n, (drop, use_own, other), dropped in zip(index, draws, texts.bool().tolist(), strict=True):
            degraded, direct = data.rows[n].severity != CLEAN, data.reply_2[n] is None
            other_too = degraded and n in paired and other < weights.other_path
            shown_only, both = direct and other_too, other_too and weights.both_paths
            asks = not shown_only and (weights.decide or not both)
            first = Text(data.trigger if shown_only else data.reply_1[n], scored=asks or None)
            prompt, path = data.open_row(n, contents, drop < weights.drop_vit, *dropped[:2]), [first]
            if shown_only or not direct:
                i = data.image[n]
                grid, clean = data.clean.latent_grid(i), data.clean.latents[i]
                if weights.mse > 0:
                    t, noise = flow.draw_times(1), torch.randn_like(clean)
                    contents.latent.append(flow.interpolate(clean[None], noise[None], t)[0])
                    contents.time.append(t.item())
                    targets.append(noise - clean)
                    path.append(Image(LATENT, grid, noise=True))
                fed = own[n] if own and n in own and use_own < weights.own else clean
                path += _feedback(weights.feedback, contents, data, i, grid, fed, teach)
                path.append(Text(data.restored[n], scored=True))
            if both:
                rows.append(_both(prompt, path, _direct(data, n, weights.decide and direct), dropped[2]))
            elif dropped[2]:
                rows.append([*prompt, *_velocity_apart(path)])
            else:
                rows.append([*prompt, *path])
        built, contents, share = share_batch(rows, contents, model.config.special)
        hidden = model(built, contents, collect=collect)
        ce, figures = _reply_loss(model, hidden, built)
        total = weights.ce * ce * share.weight(lambda b: b.target != IGNORE)
        if share.noise:
            mse = _velocity_loss(model, hidden, built, share.targets(targets))
            total, figures["mse"] = total + weights.mse * mse * share.weight(lambda b: b.noisy), mse.item()
        if teach and taught_pairs(built):
            distilled = distillation(hidden, built, collect, weights.stride)
            total = total + weights.distill * distilled * share.weight(_first_taught)
            figures["distill"] = distilled.item()
        return total, figures

    return loss


def _feedback(kind: int, contents: Contents, data: TraceData, i: int, grid, fed: Tensor, teach: bool) -> list[Image]:
    if kind == VIT:
        contents.vit.append(data.clean.patches(i))
        return [Image(VIT, data.clean.vit_grid(i))]
    if kind == BRIDGE:
        contents.bridge.append(fed)
        return [Image(BRIDGE, grid)]
    contents.latent.append(fed)
    contents.time.append(0.0)
    if not teach:
        return [Image(LATENT, grid)]
    contents.vit.append(data.clean.paired_patches(i))
    return [Image(LATENT, grid), Image(VIT, grid, noise=True)]


def distillation(
    hidden: Hidden,
    built: Layout,
    layers: Sequence[int],
    stride: int,
    pairs: Sequence[tuple[int, int, int]] | None = None,
) -> Tensor:
    """Distillation of fed-back latents from their ViT teachers (METHOD §2), a mean over the pairs.

    `pairs` are (row, image segment of the latent, image segment of the ViT), image segments counted from 1 in each
    row; by default those of `taught_pairs`. Both must have one grid, so that token n pairs with token n.

    stride ≥ 1: weighted per-layer KL of the raw outputs of `layers`, which `hidden` must hold; stride 0: squared
    distance of the pooled last hidden states after the final norm (`final_mse`), averaged over channels.
    """
    found = []
    normed = hidden.routing.merge(hidden.und, hidden.gen).float() if stride == 0 else None
    share = layer_weights(list(layers))
    for row, latent, vit in taught_pairs(built) if pairs is None else pairs:
        block, kind = built.block[row], built.kind[row]
        student, teacher = (block == latent) & (kind == LATENT), (block == vit) & (kind == VIT)
        if not torch.equal(built.place[row][student], built.place[row][teacher]):
            raise ValueError(f"distillation: image segments {latent} and {vit} of row {row} have different grids")
        if stride == 0:
            found.append(F.mse_loss(normed[row, student].mean(0), normed[row, teacher].detach().mean(0)))
        else:
            found.append(
                sum(
                    share[n] * token_distillation(hidden.layers[n][row, student], hidden.layers[n][row, teacher])
                    for n in layers
                )
            )
    return torch.stack(found).mean()


def _first_taught(built: Layout) -> Tensor:
    """(B, L) mask with one token of every teacher segment, so that tokens are counted as pairs."""
    return (built.kind == VIT) & (built.noise > 0) & (built.place == 0).all(-1)


def taught_pairs(built: Layout) -> list[tuple[int, int, int]]:
    """(row, latent segment, teacher segment) of every ViT segment no other segment sees and the latent before it."""
    teacher = (built.kind == VIT) & (built.noise > 0)
    rows = (built.block[row][teacher[row]].unique().tolist() for row in range(len(teacher)))
    return [(row, block - 1, block) for row, blocks in enumerate(rows) for block in blocks]

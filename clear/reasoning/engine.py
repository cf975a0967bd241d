"""The interleaved generation engine: batched think → restore → think → answer (METHOD §4 "Rollout", §5).

A prompt is prefilled once and its cache is copied to the `group` rows sampled from it. Rows decode together, rows
that emit the trigger denoise together, the bridge feeds the latent back, and rows that have answered leave. The same
engine serves evaluation (greedy, ODE) and GRPO rollouts (sampling, SDE, everything recorded).

Guidance (METHOD §1 "CFG") denoises in up to three contexts at once: the conditional one, one without the reply that
asked for the restoration, and one without any image. The second reads the entries of the first, fewer of them, and the
third has its own cache; inside the guided interval they are one batch, outside it and without guidance only the
conditional one runs.

Sampling is over the tokenizer's ids: a model's vocabulary may be padded beyond them, and padding ids are never sampled.

Departures from the published loop: batch 1 there, batched here; the picture is decoded to pixels only on request; on
a second restoration the image-free context is still free of images (the reference's is then a copy of the whole one).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from clear.errors import ClearError
from clear.model import flow
from clear.model.bagel import Bagel, Contents
from clear.model.cache import CacheView, KVCache
from clear.model.sequence import BRIDGE, LATENT, VIT, Image, Layout, Text, layout
from clear.model.tokenizer import decode, encode
from clear.reasoning import grammar
from clear.reasoning.prompts import Prompt
from clear.reasoning.trajectory import Options, Reply, Restoration, Trajectory


@dataclass
class Rows:
    """B rows that are still generating: their cache, next rope position (B,) and trajectory."""

    cache: KVCache
    rope: Tensor
    trajectories: list[Trajectory]

    def select(self, rows: Sequence[int]) -> "Rows":
        """Copies of these rows; the trajectories are the same objects."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.rope.device)
        return Rows(self.cache.select(index), self.rope[index], [self.trajectories[i] for i in rows])

    def drop(self, gone: Sequence[int]) -> Tensor:
        """Let these rows leave; the last rows move to their places. Returns the former numbers of those that stay."""
        count = len(self.trajectories) - len(gone)
        last = (i for i in range(count, len(self.trajectories)) if i not in gone)
        stay = [next(last) if i in gone else i for i in range(count)]
        index = torch.tensor(stay, dtype=torch.long, device=self.rope.device)
        self.cache.keep(index)
        self.rope, self.trajectories = self.rope[index], [self.trajectories[i] for i in stay]
        return index

    @staticmethod
    def join(parts: "list[Rows]") -> "Rows":
        """One batch with the rows of all parts, in order."""
        cache = KVCache.concatenate([part.cache for part in parts])
        return Rows(cache, torch.cat([p.rope for p in parts]), [t for p in parts for t in p.trajectories])


@torch.inference_mode()
def generate(
    model: Bagel,
    tokenizer,
    prompts: Sequence[Prompt],
    options: Options,
    group: int = 1,
    generator: torch.Generator | None = None,
    reencode: Callable[[Tensor, tuple[int, int]], tuple[Tensor, tuple[int, int]]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Trajectory]:
    """`group` trajectories per prompt, in prompt order.

    reencode: for feedback "reencode", maps latents (B, N, C) and their grid to ViT patches (B, M, F) and their grid.
    `progress` is called with the number of finished prompts.
    """
    per_chunk = max(1, options.batch // group)
    known = vocabulary(tokenizer)
    done: list[Trajectory] = []
    for start in range(0, len(prompts), per_chunk):
        chunk = prompts[start : start + per_chunk]
        rows = prefill(model, chunk, group)
        for trajectory in rows.trajectories:
            trajectory.prompt += start
            trajectory.vocabulary = known
        done += rows.trajectories
        handed = [rows]
        del rows  # a cache is as large as a card has room for: nobody keeps one whose rows have moved on
        _run(model, tokenizer, handed, chunk, options, generator, reencode)
        if progress:
            progress(len(chunk))
    return done


def deciding(tokenizer) -> tuple[list[int], int, int]:
    """What both kinds of first reply begin with, and the next token: of a direct one, of one that asks to restore."""
    direct, trigger = (encode(tokenizer, text) for text in (grammar.direct_prefix(), grammar.restore_reply()))
    place = grammar.fork(direct, trigger)
    return direct[:place], direct[place], trigger[place]


def vocabulary(tokenizer) -> int:
    """How many ids a tokenizer can decode: its highest id + 1. Logits beyond are cut off in sampling and scoring."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def prefill(model: Bagel, prompts: Sequence[Prompt], group: int = 1) -> Rows:
    """Write the prompts to a fresh cache, once each, and expand every row to its group."""
    device = model.vae2llm.weight.device
    built, ends = layout([p.segments() for p in prompts], model.config.special)
    built = built.to(device)
    pictured = [p for p in prompts if p.latent is not None]
    contents = Contents(
        vit=[p.patches.to(device) for p in pictured],
        latent=[p.latent.to(device) for p in pictured],
        time=[0.0] * len(pictured),
    )
    cache = model.new_cache(len(prompts), built.ids.shape[1] + 128)
    model(built, contents, cache, write=True)
    index = torch.arange(len(prompts), device=device).repeat_interleave(group)
    rope = torch.tensor(ends, device=device)[index]
    cache = cache if group == 1 else cache.select(index)
    return Rows(cache, rope, [Trajectory(int(i)) for i in index])


def _run(model, tokenizer, handed: list[Rows], prompts, options, generator, reencode) -> None:
    rows = handed.pop()
    trigger_reply = encode(tokenizer, grammar.restore_reply()) if options.restore == "always" else []
    first = rows.trajectories[0].prompt
    for turn in range(options.max_restorations + 1):
        prefix, whole = [], False
        if turn == 0 and options.restore == "always":
            prefix, whole = [*trigger_reply, model.config.special.eos], True
        elif turn == 0 and options.restore == "never":
            prefix = encode(tokenizer, grammar.direct_prefix())
        last = turn == options.max_restorations or options.restore in ("never", "plain")
        rows = _reply(model, tokenizer, rows, prefix, whole, last, options, generator)
        if last or not rows.trajectories:
            return
        groups: dict[tuple[int, int], list[int]] = {}
        for i, trajectory in enumerate(rows.trajectories):
            groups.setdefault(prompts[trajectory.prompt - first].latent_grid, []).append(i)
        parts = [rows] if len(groups) == 1 else [rows.select(members) for members in groups.values()]
        rows = None  # of several grids the parts are copies
        for grid, part in zip(groups, parts, strict=True):
            owners = [prompts[t.prompt - first] for t in part.trajectories]
            restore(model, part, owners, grid, options, generator, reencode)
        rows = parts[0] if len(parts) == 1 else Rows.join(parts)
        del parts, part


def _reply(model, tokenizer, rows: Rows, prefix, whole: bool, last: bool, options: Options, generator) -> Rows:
    """Sample one reply for every row; returns the rows that asked for a restoration, their eos in the cache.

    No row asks where the reply is the `last` one; where it is `whole` in its prefix, all do.
    """
    special, device = model.config.special, rows.rope.device
    for trajectory in rows.trajectories:
        trajectory.replies.append(Reply(list(prefix), [0.0] * len(prefix), len(prefix)))
    fed = torch.tensor([[special.bos, *prefix]] * len(rows.trajectories), device=device)
    if whole:
        feed(model, rows, fed)
        return rows
    known = rows.trajectories[0].vocabulary or None
    asking: list[Rows] = []
    for _ in range(options.max_tokens):
        token, log_prob = _sample(feed(model, rows, fed)[:, :known], options.temperature, generator)
        replies = [trajectory.replies[-1] for trajectory in rows.trajectories]
        for reply, t, lp in zip(replies, token.tolist(), log_prob.tolist(), strict=True):
            reply.ids.append(t)
            reply.log_probs.append(lp)
        ended = [i for i, reply in enumerate(replies) if reply.ids[-1] == special.eos]
        if ended:
            asks = [i for i in ended if not last and grammar.asks_restoration(decode(tokenizer, replies[i].ids))]
            if asks:
                asking.append(rows.select(asks))
            token = token[rows.drop(ended)]
            if not len(token):
                break
        fed = token[:, None]
    if not asking:
        return Rows(rows.cache, rows.rope, [])
    rows = Rows.join(asking)
    feed(model, rows, torch.full((len(rows.trajectories), 1), special.eos, device=device))
    return rows


def feed(model: Bagel, rows: Rows, ids: Tensor) -> Tensor:
    """Append text tokens (B, n) to the rows and return the last logits (B, V)."""
    built = Layout.tokens(ids, rows.rope)
    hidden = model(built, Contents(), rows.cache, write=True)
    rows.rope = rows.rope + ids.shape[1]
    last = hidden.und.reshape(*ids.shape, -1)[:, -1]
    return model.language_model.lm_head(last).float()


def _sample(logits: Tensor, temperature: float, generator) -> tuple[Tensor, Tensor]:
    """Next tokens (B,) and their log-probabilities (B,) under the sampling distribution."""
    log_probs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        token = torch.multinomial(log_probs.exp().cpu(), 1, generator=generator).squeeze(1).to(logits.device)
    return token, log_probs.gather(1, token[:, None]).squeeze(1)


def restore(
    model: Bagel,
    rows: Rows,
    prompts: Sequence[Prompt],
    grid: tuple[int, int],
    options: Options,
    generator: torch.Generator | None = None,
    reencode: Callable[[Tensor, tuple[int, int]], tuple[Tensor, tuple[int, int]]] | None = None,
) -> None:
    """Denoise a latent on `grid` for every row and feed it back; the rows advance by one rope position.

    `prompts` are the rows' own, one each, all with a picture. With `options.noise_seed`, the starting noise of a row is
    that of the seed + its trajectory's `prompt` (of several seeds, of this prompt's), whatever rows are beside it.
    """
    shape = (len(rows.trajectories), grid[0] * grid[1], model.config.latent_channels)
    if options.noise_seed is None and options.shared_noise:
        owners = [t.prompt for t in rows.trajectories]
        drawn = {n: torch.randn(shape[1:], generator=generator) for n in dict.fromkeys(owners)}
        noise = torch.stack([drawn[n] for n in owners])
    elif options.noise_seed is None:
        noise = torch.randn(shape, generator=generator)
    else:
        seed = options.noise_seed
        seeds = [seed + t.prompt if isinstance(seed, int) else seed[t.prompt] for t in rows.trajectories]
        drawn = zip(seeds, rows.trajectories, strict=True)
        noise = torch.stack([_row_noise(own, len(t.restorations), shape[1:]) for own, t in drawn])
    noise = noise.to(rows.rope.device)
    dropped = dropped_contexts(model, rows, prompts, options.guidance)
    same = options.shared_noise and options.restore == "always" and not rows.trajectories[0].restorations
    twins = [t.prompt for t in rows.trajectories] if same else None
    found = denoise(model, rows.cache, rows.rope, grid, noise, options, generator, dropped, twins)
    # In host memory: they wait for the update, on a device that has rollouts to make.
    recorded = None if found.states is None else found.states.cpu()
    for i, trajectory in enumerate(rows.trajectories):
        states = None if recorded is None else recorded[:, i]
        log_probs = None if found.log_probs is None else found.log_probs[:, i]
        trajectory.restorations.append(Restoration(found.x0[i], grid, states, log_probs))
    feed_back(model, rows, found.x0, grid, options.feedback, reencode)


def _row_noise(seed: int, number: int, shape: Sequence[int]) -> Tensor:
    """Starting noise of a row's restoration of this number, from 0: the next draw of the row's own stream each time."""
    stream = torch.Generator().manual_seed(seed)
    for _ in range(number):
        torch.randn(shape, generator=stream)
    return torch.randn(shape, generator=stream)


def feed_back(model: Bagel, rows: Rows, latents: Tensor, grid, feedback: str = "bridge", reencode=None) -> None:
    """Write restored latents (B, N, C) into the rows' context, as `Options.feedback` says; rope advances by one."""
    if feedback == "reencode":
        patches, grid = reencode(latents, grid)
        kind, contents = VIT, Contents(vit=patches)
    elif model.config.bridge == "mlp":
        kind, contents = BRIDGE, Contents(bridge=latents)
    else:
        kind, contents = LATENT, Contents(latent=latents, time=[0.0] * len(latents))
    one, _ = layout([[Image(kind, grid)]], model.config.special)
    model(one.to(rows.rope.device).repeat(rows.rope), contents, rows.cache, write=True)
    rows.rope = rows.rope + 1


@dataclass
class Context:
    """What a velocity is predicted in: B cached rows and the rope position (B,) at which each continues."""

    cache: KVCache | CacheView
    rope: Tensor


def dropped_contexts(model: Bagel, rows: Rows, prompts: Sequence[Prompt], guidance: flow.Guidance) -> list[Context]:
    """The contexts `guidance` needs in addition to the rows' own: none, without the last reply, and without images.

    `prompts` are the rows' own, one each. The last reply of every row must be in its cache as a whole (bos … eos).
    """
    found = []
    if guidance.contexts > 1:
        # The cache only ever grows, so the context before the last reply is the same entries, fewer of them counted.
        said = [1 + len(t.replies[-1].ids) for t in rows.trajectories]
        said = torch.tensor(said, device=rows.rope.device)
        found.append(Context(CacheView(rows.cache, lengths=rows.cache.lengths - said), rows.rope - said))
    if guidance.contexts > 2:
        talks = []
        for prompt, trajectory in zip(prompts, rows.trajectories, strict=True):
            texts = [*([prompt.system] if prompt.system else []), prompt.question]
            replies = [Text(reply.ids, eos=False) for reply in trajectory.replies]
            talks.append([*(Text(ids) for ids in texts), *replies])
        built, ends = layout(talks, model.config.special)
        cache = model.new_cache(len(talks), built.ids.shape[1])
        model(built, Contents(), cache, write=True)
        found.append(Context(cache, torch.tensor(ends, device=rows.rope.device)))
    return found


def join_contexts(contexts: Sequence[Context]) -> Context:
    """Several contexts of the same rows as one batch, context after context."""
    if len(contexts) == 1:
        return contexts[0]
    return Context(CacheView.beside_each_other([c.cache for c in contexts]), torch.cat([c.rope for c in contexts]))


def velocities(model: Bagel, context: Context, grid: tuple[int, int], x: Tensor, t: float) -> Tensor:
    """Predicted velocities (B, N, C) of the states x (B, N, C) at time t; the context is read and not written."""
    one, _ = layout([[Image(LATENT, grid, noise=True)]], model.config.special)
    built = one.to(x.device).repeat(context.rope)
    hidden = model(built, Contents(latent=x, time=[t] * len(x)), context.cache)
    return model.velocities(hidden, built).reshape(x.shape)


@dataclass
class Denoised:
    """Final latents (B, N, C); with SDE, states (S+1, B, N, C) and log-probabilities (S, B), NaN outside its window."""

    x0: Tensor
    states: Tensor | None
    log_probs: Tensor | None


def denoise(
    model: Bagel,
    cache: KVCache,
    rope: Tensor,
    grid: tuple[int, int],
    x: Tensor,
    options: Options,
    generator: torch.Generator | None = None,
    dropped: Sequence[Context] = (),
    twins: Sequence[int] | None = None,
) -> Denoised:
    """Integrate the flow from noise x (B, N, C) at the rows' next position, reading but not writing the cache.

    `dropped` are the contexts of `dropped_contexts` for `options.guidance`. Raises ClearError if one is missing.
    Rows of the same number in `twins` have equal contexts and noise: up to the SDE's window they are computed once.
    """
    own, guidance = Context(cache, rope), options.guidance
    if len(dropped) + 1 < guidance.contexts:
        raise ClearError(
            f"denoise: guidance needs {guidance.contexts - 1} more contexts and got {len(dropped)}; pass those of "
            "dropped_contexts, or an Options without guidance."
        )
    velocity = partial(velocities, model, own, grid)
    if guidance.on:
        joint = join_contexts([own, *dropped][: guidance.contexts])
        velocity = flow.guided(velocity, partial(velocities, model, joint, grid), guidance)
    times = flow.time_grid(options.flow_steps, options.shift).tolist()
    first, last = options.window or (0, options.flow_steps)
    if twins is not None and options.sigma > 0 and first:
        kept = list(dict.fromkeys(twins))
        one = torch.tensor([twins.index(twin) for twin in kept], device=x.device)
        trunk = partial(velocities, model, Context(CacheView(cache, one), rope[one]), grid)
        velocity = flow.shared(velocity, trunk, one, [kept.index(twin) for twin in twins], times[first])
    steps = flow.sample(velocity, x, times, flow.stepping(options.sigma, times[first], times[last], generator))
    if not options.sigma > 0:
        for state, _ in steps:
            x = state
        return Denoised(x, None, None)
    states, log_probs = zip(*steps, strict=True)
    return Denoised(states[-1], torch.stack([x, *states]), torch.stack(log_probs))


def text_reply(model: Bagel, rows: Rows, ids: Sequence[int]) -> None:
    """Append the same complete reply (bos, ids, eos) to every row, as if it had been generated."""
    body = [*ids, model.config.special.eos]
    for trajectory in rows.trajectories:
        trajectory.replies.append(Reply(list(body), [0.0] * len(body), len(body)))
    whole = [model.config.special.bos, *body]
    feed(model, rows, torch.tensor([whole] * len(rows.trajectories), device=rows.rope.device))


def text_segment(reply: Reply, scored: bool) -> Text:
    """A reply as a training segment: only sampled tokens carry a loss, and eos only where it was sampled."""
    body = reply.ids
    flags = [i >= reply.forced for i in range(len(body))] if scored else None
    return Text(body, scored=None if flags is None else [*flags, False], eos=False)

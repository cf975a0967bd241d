"""How much accelerator memory each stage needs, from the parameters alone: what `clear memory` prints.

clear/training/footprint.py counts tensors; this module says which of them a stage has at once. Exact: the number of
parameters and of trained ones, hence weights, gradients and optimiser. Estimates: the tokens of a row (`prompt_tokens`
says what is assumed), activations and temporaries. Not counted: the CUDA context and kernels (about 1 GiB) and the
allocator's fragmentation. All quantities are bytes unless said otherwise.
"""

import math
from dataclasses import dataclass, fields

import torch

from clear.data.io import aligned
from clear.model import flex
from clear.model.bagel import GENERATION, BagelConfig, frozen
from clear.model.flow import Guidance
from clear.model.images import autoencoder_batch
from clear.model.mot import LlmConfig, one_kernel
from clear.model.offload import AHEAD
from clear.model.quantised import PIECE
from clear.model.runtime import precision
from clear.model.sequence import SpecialTokens
from clear.model.vae import VaeConfig
from clear.model.vit import VitConfig
from clear.schema import QUANTISED, Config, Lora
from clear.training.footprint import (
    Batch,
    Training,
    activations,
    coded,
    count,
    kv_bytes,
    kv_capacity,
    layer_activations,
    layer_numbers,
    piece_activations,
    training_workspace,
)

STAGES = ("sft", "bridge", "grpo", "evaluate")
BAGEL_VOCABULARY = 152064
"""Rows of BAGEL's token embedding."""
SYSTEM_TOKENS, QUESTION_TOKENS, REPLY_TOKENS = 160, 64, 300
"""Assumed text lengths under Qwen2's vocabulary; replies are shorter where `sampling.max_think_tokens` is."""
LIMIT = 80e9
"""The memory of one large accelerator; more than that is worth a note."""


@dataclass(frozen=True)
class Estimate:
    """One stage: numbers of parameters, then bytes per device."""

    stage: str
    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimiser: int
    activations: int
    kv_cache: int
    temporary: int
    peak: int


def shapes(config: Config, vocab: int = BAGEL_VOCABULARY) -> BagelConfig:
    """The shapes of `config.model`, with the bridge of `config.bridge`, for counting only.

    `vocab`: rows of the embedding; the default is BAGEL's.
    """
    m = config.model
    return BagelConfig(
        llm=LlmConfig(vocab, m.hidden, m.layers, m.heads, m.kv_heads, m.mlp),
        vit=VitConfig(m.vit_hidden, m.vit_layers, m.vit_heads, m.vit_mlp, m.vit_patch, m.vit_side),
        vae=VaeConfig(m.vae_channels, tuple(m.vae_mult), m.vae_blocks, m.vae_z, m.vae_groups),
        special=SpecialTokens(0, 1, 2, 3),
        latent_patch=m.latent_patch,
        max_latent_size=m.max_latent_size,
        bridge=config.bridge.kind,
    )


def grids(config: Config) -> tuple[int, int]:
    """Latent and ViT tokens of one image at the largest size of the profile."""
    m = config.model
    stride = 2 ** (len(m.vae_mult) - 1) * m.latent_patch
    return (m.vae_size // stride) ** 2, (m.vit_size // m.vit_patch) ** 2


def prompt_tokens(config: Config) -> int:
    """Tokens of a prompt: system text, latent and ViT of the largest image, question; two markers each."""
    latent, vit = grids(config)
    system = SYSTEM_TOKENS + 2 if config.sampling.system_prompt else 0
    return system + latent + 2 + vit + 2 + _question(config) + 2


def _question(config: Config) -> int:
    return min(QUESTION_TOKENS, max(1, config.sampling.max_think_tokens // 4))


def _reply(config: Config) -> int:
    return min(REPLY_TOKENS, config.sampling.max_think_tokens)


def scored_steps(config: Config) -> int:
    """SDE steps of a restoration that GRPO scores, each with a noisy split of its own."""
    steps = config.grpo.flow_steps or config.sampling.flow_steps
    return steps if config.grpo.sde_choice == "all" else min(config.grpo.sde_steps, steps)


def stage_batch(config: Config, stage: str, gpus: int = 1) -> Batch:
    """The micro-batch of a training stage on one of `gpus` devices, every row a restoring trace of full size.

    Rows have the layout of the stage's loss: prompt, reply, the noisy latents (sft: one, grpo: `scored_steps`, bridge:
    one if direct, else none), the feedback (clean ViT tokens in sft with the mlp bridge, else the latent; with
    distillation its ViT teacher on the same grid), reply; grpo repeats this for every allowed restoration. With a token
    budget a row is as long as traces no larger than these can make it, and its tokens are of the kinds that a trace
    has, in proportion.
    """
    latent, vit = grids(config)
    mlp, reply = config.bridge.kind == "mlp", _reply(config)
    noised = int(config.sft.mse_weight > 0)
    noisy = {"sft": noised, "bridge": 0 if mlp else noised, "grpo": scored_steps(config)}[stage]
    rounds = max(1, config.sampling.max_restorations) if stage == "grpo" else 1
    teacher = latent + 2 if not mlp and config.sft.distill_weight and stage != "grpo" else 0
    by_vit = mlp and stage == "sft"
    feedback = (vit if by_vit else latent) + 2 + teacher
    length = prompt_tokens(config) + reply + 2 + rounds * (noisy * (latent + 2) + feedback + reply + 2)
    if stage != "grpo" and config.sft.both_paths and config.sft.other_path:
        length += reply + 2  # the direct reply, beside a path whose first reply may be as long
    if stage == "grpo":
        completions = config.grpo.prompts * config.grpo.group_size
        traces = max(n for n in range(1, min(config.grpo.rows_per_pass, completions) + 1) if completions % n == 0)
        limit = traces  # a slice is computed at once, in whatever rows it is packed
    else:
        traces = -(-(config.sft.traces if stage == "sft" else config.bridge.answer).batch // gpus)
        limit = config.runtime.rows_per_pass or traces
    rows, longest = packed_rows(traces, length, config.runtime.token_budget, limit)

    def tokens(of_a_trace: int) -> int:
        return rows * -(-of_a_trace * longest // length)

    return Batch(
        rows=rows,
        length=longest,
        gen=tokens(latent * (1 + rounds * (noisy + (not mlp)))),
        scored=tokens((rounds + 1) * (reply + 1)),
        noisy=tokens(rounds * noisy * latent),
        pairs=tokens(max(0, teacher - 2)),
        vit=tokens(vit + (vit if by_vit else 0) + max(0, teacher - 2)),
    )


def packed_rows(traces: int, length: int, budget: int, limit: int) -> tuple[int, int]:
    """The largest pass that `traces` of at most `length` tokens can make: its rows, `limit` at most, and their length.

    A row is as long as its traces and the `budget` (0: one trace per row) allow; a trace beyond the budget is alone in
    its row. Best fit leaves only one row with fewer traces than fit at full size; smaller ones may crowd into another.
    """
    full = max(1, budget // length)

    def longest(rows: int) -> int:
        elsewhere = (rows - 2) * full + 1 if rows > 1 else 0
        return min((traces - elsewhere) * length, max(budget, length))

    rows = max(range(1, min(-(-traces // full), limit) + 1), key=lambda n: n * longest(n))
    return rows, longest(rows)


def encode_workspace(config: Config) -> int:
    """Encoding images with the autoencoder: three full-resolution feature maps of its first width, float32."""
    m = config.model
    return 3 * 4 * autoencoder_batch(m.vae_size, m.vae_size) * m.vae_channels * m.vae_size**2


def estimate(config: Config, stage: str, vocab: int = BAGEL_VOCABULARY, gpus: int = 1) -> Estimate:
    """Memory of one stage on one of `gpus` devices.

    Quantised layers are exact too, and the largest of them is decoded beside them in the type it computes in. Trained
    parameters, gradients and moments have the type of the weights; adapters and the bridge beside them are
    float32, the autoencoder always is. AdamW keeps two moments per trained parameter and `sft.ema` adds an average
    in float32. GRPO keeps the incoming policy: a copy of the model in full training, of adapter and bridge else.
    Over several devices (FSDP) weights, gradients and optimiser are divided; the micro-batch is divided too.

    With `runtime.offload` two decoder layers at a time are on the device, and the others in host memory.

    peak = weights + the largest of: encoding the images; training (gradients, optimiser, activations, temporary);
    generation (optimiser, cache, temporary, and for GRPO on sharded weights a whole copy of them). The stage bridge
    generates before its weights are sharded, on the first device, which then holds all of them and nothing else.
    """
    model, lora, runtime = shapes(config, vocab), config.lora, config.runtime
    mlp = config.bridge.kind == "mlp"
    never = (*frozen(config.sft.train_vit), *(GENERATION if stage == "bridge" and mlp else ()))
    counts = count(model, lora, never, bridge=stage != "sft")
    trains, cuda = stage != "evaluate", runtime.device == "cuda"
    narrow = "bfloat16" if cuda and runtime.precision == "auto" else precision(config)
    kind = runtime.weights if runtime.weights in QUANTISED else ""
    number = 2 if (narrow if kind else runtime.weights) == "bfloat16" else 4
    quantised, piece = coded(model, kind), PIECE if kind else 0
    beside = 4 * (counts.adapter + counts.bridge) if lora.rank else number * counts.bridge
    policy = (counts.base - quantised.numbers) * number + quantised.bytes + beside
    if runtime.offload and (lora.rank or not trains):
        layers = (layer_numbers(model) - quantised.numbers) * number + quantised.bytes
        policy -= layers - AHEAD * layers // model.llm.layers
    weights = policy + 4 * counts.vae
    if stage == "grpo" and config.grpo.compared:
        weights += beside if lora.rank else policy
    trained = (4 if lora.rank else number) * counts.trained if trains else 0
    optimiser = 2 * trained + (4 * counts.trained if stage == "sft" and config.sft.ema else 0)
    shares = [-(-part // gpus) for part in (weights, trained, optimiser)]
    weights, gradients, optimiser = shares

    compute = 2 if narrow == "bfloat16" and (stage != "grpo" or number == 2) else 4
    kept = stepping = cache = prefill = 0
    if trains:
        blocks = flex.wanted(runtime.attention, torch.device("cuda" if cuda else "cpu"))
        train = Training(compute, number, lora, runtime.gradient_checkpointing, cuda, blocks, piece)
        batch = stage_batch(config, stage, gpus)
        stride = config.sft.distill_stride
        kept = activations(model, batch, train, stride)
        stepping = training_workspace(model, batch, train, counts.cast) + quantised.largest * compute
    if stage != "sft":
        cache, prefill = _generation(config, stage, model, number, cuda, piece)
        prefill += quantised.largest * number
    encoding = encode_workspace(config)
    whole = policy if stage == "grpo" and gpus > 1 and not lora.rank else 0  # gathered for the rollouts
    peak = weights + max(encoding, gradients + optimiser + kept + stepping, whole + optimiser + cache + prefill)
    if stage == "bridge" and gpus > 1:
        peak = max(peak, policy + 4 * counts.vae + cache + prefill)
    temporary = max(encoding, stepping, prefill)
    parameters = counts.base + counts.bridge + counts.adapter + counts.vae
    return Estimate(
        stage,
        parameters,
        counts.trained if trains else 0,
        weights,
        gradients,
        optimiser,
        kept,
        cache,
        temporary,
        peak,
    )


def _generation(config: Config, stage: str, model: BagelConfig, number: int, cuda: bool, piece: int) -> tuple[int, int]:
    """Cache and prefill workspace of `sampling.batch` rows, of GRPO whole groups.

    Replies may reach `sampling.max_think_tokens`. The stage `bridge` only denoises, behind the prompt and the reply
    that asks for it. Prefill works through one layer at a time; GRPO prefills each prompt once for its group. A step of
    a restoration has one layer's keys and values of all its contexts side by side, and again for each head. Guidance,
    which GRPO has none of, compares up to three; only that of the texts alone is kept beside the rows.
    """
    s, prompt = config.sampling, prompt_tokens(config)
    latent, _ = grids(config)
    group = config.grpo.group_size if stage == "grpo" else 1
    rows = max(1, s.batch // group) * group  # as clear.reasoning.engine.generate makes them
    replies, pictures = (1, 1) if stage == "bridge" else (s.max_restorations + 1, s.max_restorations)
    longest = _reply(config) if stage == "bridge" else s.max_think_tokens
    capacity = kv_capacity(prompt, prompt + replies * (longest + 1) + pictures * (latent + 2))
    prefilled = rows // group
    batch = Batch(prefilled, prompt, prefilled * latent, prefilled, 0)
    frozen = Lora(1, 1.0, 0.0, [], "both")  # no layer keeps what only a gradient needs
    compute = 2 if number == 2 else 4
    train = Training(compute, number, frozen, cuda=cuda, piece=piece)
    work = layer_activations(model.llm, batch, train) + piece_activations(model.llm, batch, train)
    cache = kv_bytes(model.llm, rows, capacity, number)
    contexts = 1 if stage == "grpo" else Guidance(s.text_guidance, s.image_guidance).contexts
    if contexts > 2:
        texts = prompt - sum(grids(config)) + replies * (longest + 1)
        cache += kv_bytes(model.llm, rows, texts, number)
    llm, seen = model.llm, capacity + latent + 2
    read = 2 * contexts * rows * seen * llm.head_dim * number * ((contexts > 1) * llm.kv_heads + llm.heads)
    plain = not one_kernel(cuda, llm.heads, latent + 2, seen)
    scores = 4 * contexts * rows * llm.heads * (latent + 2) * seen * plain
    return cache, max(work + 7 * prefilled * prompt**2, read + scores)


def report(found: list[Estimate], profile: str, gpus: int) -> str:
    """The estimates as a table in GiB (parameters in millions), with a note on what exceeds one device."""
    names = [field.name for field in fields(Estimate)]
    lines = [[name.replace("_", " ") for name in names]]
    for one in found:
        values = [getattr(one, name) for name in names[1:]]
        millions = [f"{value / 1e6:.2f} M" for value in values[:2]]
        lines.append([one.stage, *millions, *(f"{value / 2**30:.3f}" for value in values[2:])])
    text = aligned(lines, gap="  ", left=0)
    text.append(f"GiB per device, profile {profile}, {gpus} device{'s' if gpus > 1 else ''}.")
    text.append(
        "Exact: parameters, weights, gradients, optimiser. Estimated: the rest, for images of the largest size.\n"
        "sft_direct needs no more than sft, and traces no more than evaluate."
    )
    over = [one for one in found if one.peak > LIMIT]
    if over:
        worst = max(over, key=lambda one: one.peak)
        text.append(
            f"note: {', '.join(one.stage for one in over)} exceed{'s' if len(over) == 1 else ''} 80 GB on one device "
            f"({worst.stage}: {math.ceil(worst.peak / 1e9)} GB). {_advice(worst)}"
        )
    return "\n".join(text)


def _advice(one: Estimate) -> str:
    """What to change, after the largest part of the peak."""
    parts = {
        "the weights and their optimiser": one.weights + one.gradients + one.optimiser,
        "activations": one.activations,
        "the cache": one.kv_cache,
        "temporary memory": one.temporary,
    }
    remedies = {
        "the weights and their optimiser": "shard over more devices (--gpus) or train adapters (lora.rank)",
        "activations": "set runtime.gradient_checkpointing, smaller batches or smaller images (model.vae_size)",
        "the cache": "lower sampling.batch or sampling.max_think_tokens",
        "temporary memory": "use smaller batches or smaller images (model.vae_size)",
    }
    largest = max(parts, key=parts.get)
    return f"Most is for {largest}: {remedies[largest]}."

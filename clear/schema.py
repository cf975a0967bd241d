"""The parameters: one dataclass per section of `params.yaml`, with the type and the bounds of every value.

The values are in the YAML files under `clear/conf`; clear/config.py reads and checks them.
"""

from dataclasses import dataclass, field
from typing import Any

PROFILES = ("smoke", "tiny", "bagel_7b_lora", "bagel_7b_qlora", "bagel_7b")
QUANTISED = ("nf4", "int8")
"""Types of `runtime.weights` that quantise the decoder's linear layers."""


def between(low: float, high: float) -> Any:
    """A required number in [low, high]."""
    return field(metadata={"low": low, "high": high})


def one_of(*values: str) -> Any:
    """A required string among `values`."""
    return field(metadata={"values": values})


def count() -> Any:
    """A required whole number ≥ 1."""
    return between(1, 10**9)


@dataclass
class Runtime:
    """How every stage uses the machine. `precision` and `weights` change results; `threads` last digits of training."""

    threads: int = between(0, 1024)  # 0 = all cores
    precision: str = one_of("auto", "float32", "bfloat16")  # autocast of supervised training; auto: what computes fast
    # The type in which a model folder is loaded; bfloat16 runs under autocast. nf4 and int8 are those of the decoder's
    # linear layers, and the other weights have the type of `precision`.
    weights: str = one_of("float32", "bfloat16", *QUANTISED)
    rows_per_pass: int = between(0, 10**6)  # rows of a batch that a process computes at a time; 0 = all
    token_budget: int = between(
        0, 10**7
    )  # tokens of a row that several samples are packed into; 0 = one sample per row
    attention: str = one_of("auto", "dense", "flex")  # training without a cache; auto: flex on CUDA, dense elsewhere
    offload: bool = field()  # frozen decoder layers wait in host memory; in training with adapters and recomputing only
    gradient_checkpointing: bool = field()  # recompute each decoder layer in the backward pass instead of keeping it
    checkpoint_every: int = count()  # optimiser steps between checkpoints; of GRPO's, which are longer, a tenth
    log_every: int = count()
    trackers: list[str] = field(metadata={"values": ("dvclive", "tensorboard", "mlflow", "wandb")})
    panel_every: int = between(0, 10**9)  # steps between panels of held-out pictures in the trackers; 0 = none
    device: str = one_of("auto", "cpu", "cuda")


@dataclass
class Source:
    """Clean samples. `scenes` are rendered here; the counts are images per split.

    The other kinds read `path` (docs/DATA.md): `shares` of the images go to the splits by the hash of their pixels.
    """

    kind: str = one_of("scenes", "llava_onevision", "lmudata", "folder", "clear_train")
    path: str = field()  # below data/raw, where DVC sees changes; not for scenes
    bench_path: str = field()  # a folder or file of VLMEvalKit TSVs that becomes the split bench; empty = split it off
    shares: list[float] = field(metadata={"low": 0, "high": 1})  # pretrain, sft, rl, validation, bench[, development]
    min_side: int = between(0, 10**5)  # px; smaller images are rejected
    max_aspect: float = between(0, 10**5)  # long side over short side; 0 = no limit
    skip_cjk: bool = field()  # reject rows with Chinese, Japanese or Korean characters
    image_size: int = between(96, 2048)  # px, native, of scenes
    questions_per_image: int = between(1, 12)  # the first ones of an image
    pretrain: int = count()
    sft: int = count()
    rl: int = count()
    validation: int = count()
    bench: int = count()
    development: int = count()  # for comparing recipes; the benchmark stays unseen


@dataclass
class Degrade:
    """The training mix. `size_scale` multiplies every published absolute pixel size (1 = as published)."""

    size_scale: float = between(0.05, 8)
    severity_weights: list[float] = field(metadata={"low": 0, "high": 1})  # low, mid, high
    held_out: list[str] = field()  # corruptions that training never meets; they are evaluated all the same
    validation_copies: int = between(1, 48)
    plugins: list[str] = field()  # files below plugins/ with your own degradations
    presets: list[str] = field()  # fields or presets of clear/degradation/presets.py
    workers: int = between(0, 256)  # 0 = one per core
    cluster: str = field()  # address of a Dask scheduler that computes in place of `workers`; "" = this machine


@dataclass
class Limits:
    """What a set of naturally degraded images may be like before it is refused (clear/validation/accept.py)."""

    rejected: float = between(0, 1)  # share of the rows that cannot be used
    blank: float = between(0, 1)  # share of the pictures whose contrast is too low
    contrast: float = between(0, 127)  # grey levels; a picture below shows next to nothing
    answer: float = between(0, 1)  # share of the questions, of a task or of all, that one answer may have; 1 = any
    alpha: float = between(0, 0.5)  # significance at which a larger share is refused
    bench: int = between(0, 10**9)  # pictures in the benchmark slice


@dataclass
class Incoming:
    """Naturally degraded images (data/incoming): the slices to which a hash of their pixels assigns them."""

    bench_share: float = between(0, 1)  # of all pictures, to the benchmark
    rl_share: float = between(0, 1)  # of the others, to reinforcement learning; the rest to fine-tuning
    limits: Limits


@dataclass
class MmdBench:
    """The benchmark: `row` gives each image one corruption at three levels, `full` all 48 variants."""

    protocol: str = one_of("row", "full")
    clean_questions: int = between(1, 12)  # questions per clean image
    degraded_questions: int = between(1, 12)  # questions per degraded image


@dataclass
class Validate:
    """Thresholds of the data checks; the PSNR bands are wide at first and per (corruption, severity)."""

    alpha: float = between(0, 0.5)  # significance of the chi-square tests
    psnr_slack: float = between(0, 60)  # dB outside the committed band that still pass
    duplicate_limit: int = between(0, 10**9)  # images shared by training and benchmark


@dataclass
class ModelSize:
    """Shapes of a BAGEL model (METHOD §1). `checkpoint` names a folder with weights; empty trains from scratch."""

    checkpoint: str
    base: str  # folder with the configs, autoencoder and tokenizer, where `checkpoint` has weights alone
    hidden: int = count()
    layers: int = count()
    heads: int = count()
    kv_heads: int = count()
    mlp: int = count()
    vit_hidden: int = count()
    vit_layers: int = count()
    vit_heads: int = count()
    vit_mlp: int = count()
    vit_patch: int = count()
    vit_side: int = count()  # patches per side of the position table
    vit_size: int = count()  # px, longest side of the ViT input
    vit_min: int = count()  # px, shortest side
    vae_channels: int = count()
    vae_mult: list[int] = field(metadata={"low": 1, "high": 64})
    vae_blocks: int = count()
    vae_groups: int = count()
    vae_z: int = count()
    vae_size: int = count()  # px, longest side of the VAE input
    vae_min: int = count()
    latent_patch: int = count()
    max_latent_size: int = count()
    posterior: str = one_of("mean", "sample")  # latents of images (clear/model/vae.py)
    resize: str = one_of("direct", "reference")  # way to the ViT's input (clear/model/images.py)


@dataclass
class Optimiser:
    """AdamW and the end of its schedule: linear warm-up, then cosine decay to `lr_floor` times the learning rate."""

    beta1: float = between(0, 0.999999)
    beta2: float = between(0, 0.999999)
    eps: float = between(1e-15, 1)  # weights without a gradient would be divided by 0
    weight_decay: float = between(0, 10)
    clip: float = between(0, 10**6)  # largest norm of the gradient; 0 = not clipped
    lr_floor: float = between(0, 1)


@dataclass
class Phase:
    """One optimisation: its length, and the learning rate from which the optimiser's schedule starts."""

    steps: int = between(0, 10**7)
    batch: int = count()
    lr: float = between(0, 1)
    warmup: int = between(0, 10**6)


@dataclass
class Base:
    """Training from scratch: ViT on dense labels, autoencoder, then both experts together."""

    vit: Phase
    vae: Phase
    joint: Phase
    vae_degraded: float = between(0, 1)  # share of unlabelled degraded images shown to the autoencoder
    flow_share: float = between(0, 1)  # batches of the identity/edit task; the others answer questions
    drop_vit: float = between(0, 1)  # chance that a batch loses its ViT context
    drop_vae: float = between(0, 1)
    questions: int = between(1, 12)  # packed per image


@dataclass
class Traces:
    """Demonstrations. `restore_when`: the paper's rule is "base_wrong" (see clear/traces/oracle.py).

    `teacher` writes them through the endpoint of that name (clear/traces/teacher.py); give_answer and judge are for it.
    `given` takes those that come with the data (clear/traces/given.py) and needs no other key.
    """

    kind: str = one_of("oracle", "teacher", "given")
    restore_when: str = one_of("base_wrong", "degradation", "always", "never", "teacher")  # the last: it decides itself
    give_answer: bool = field()  # tell the teacher the reference answer
    judge: bool = field()  # let the endpoint `judge` compare free answers that do not match exactly
    questions: int = between(1, 12)  # per degraded image
    clean_share: float = between(0, 1)  # clean traces per degraded one


@dataclass
class Endpoint:
    """An OpenAI-compatible server (clear/llm/endpoint.py). `$NAME` in url, model or key is an environment variable."""

    url: str  # base URL, such as https://host/v1; empty = none
    model: str
    key: str  # always as $NAME: a key itself must not lie in a tracked file; empty = the server wants none
    temperature: float = between(0, 2)
    max_tokens: int = between(1, 10**6)  # per reply
    timeout: float = between(0.01, 3600)  # seconds for one attempt
    retries: int = between(0, 20)  # further attempts after a temporary failure
    concurrency: int = between(1, 256)  # requests under way at once
    budget: float = between(0, 10**6)  # USD that all runs together may spend
    price_input: float = between(0, 10**4)  # USD per million tokens
    price_output: float = between(0, 10**4)


@dataclass
class Lora:
    """Low-rank adapters on the decoder's projections; `rank` 0 fine-tunes the weights themselves."""

    rank: int = between(0, 1024)
    alpha: float = between(0.001, 10**4)  # the update is scaled by alpha / rank
    dropout: float = between(0, 0.99)  # off in GRPO, whose rollouts and scoring must agree
    targets: list[str] = field()  # linear layers: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj
    experts: str = one_of("both", "und", "gen")


@dataclass
class Sft:
    """Supervised fine-tuning (METHOD §3). `restoration` warms up on unlabelled pairs (0 steps = as published).

    Before it `robust_vit` teaches the vision tower to see a clean picture in a damaged one (0 steps = as published).
    """

    robust_vit: Phase
    train_vit: bool  # the vision tower learns with the rest, here and later; false = as published
    restoration: Phase
    traces: Phase
    ce_weight: float = between(0, 100)
    mse_weight: float = between(0, 100)
    distill_weight: float = between(0, 100)
    distill_stride: int = between(0, 1000)  # layers between distilled ones; 0 = final_mse
    drop_vit: float = between(0, 1)
    drop_text: float = between(0, 1)  # system prompt, question; the first reply, where the velocity is learned
    other_path: float = between(0, 1)  # share of degraded traces that show the path their rule did not choose
    labelled: float = between(0, 1)  # share of the pictures whose answers are learned, here and later; all are restored
    both_paths: bool  # beside their own, so that both replies are learned; else a direct trace shows it instead
    ema: float = between(0, 0.999999)  # decay of the averaged weights the stage ends with; 0 = the last weights


@dataclass
class Bridge:
    """The latent representation bridge (METHOD §2). `direct` has no parameters and is the published one."""

    kind: str = one_of("mlp", "direct")
    distill: Phase
    answer: Phase
    own_latents: float = between(0, 1)  # share of restored rows that read the model's own denoised latent
    decide: Phase  # learns when to restore from what the model's two paths are worth; 0 steps = the traces' rule stays
    decision_share: float = between(0, 1)  # of the batches of `decide`; the others are traces, which keep the replies
    price: float = between(0, 1)  # accuracy that a restoration must bring to be worth its time


@dataclass
class Grpo:
    """Interleaved GRPO (METHOD §4)."""

    steps: int = count()
    prompts: int = count()  # per optimiser step
    group_size: int = between(2, 1024)
    lr: float = between(0, 1)
    warmup: int = between(0, 10**6)
    optimiser: Optimiser
    flow_steps: int = between(0, 1000)  # of a rollout; 0 = sampling.flow_steps
    clean_share: float = between(0, 1)
    temperature: float = between(0.01, 10)
    restore: str = one_of("auto", "always")  # whether rollouts decide to restore, or every one is made to
    experts: str = one_of("both", "und", "gen")  # what is trained
    loss_type: str = one_of("dapo", "grpo", "dr_grpo", "bnpo", "luspo", "cispo", "sapo")  # text loss, trl's names
    ratio_level: str = one_of("token", "sequence")  # importance weights of the text
    clip: float = between(0, 1)
    clip_high: float = between(0, 10)  # upper bound of the clip; 0 = the same as `clip`
    text_weight: float = between(0, 100)
    beta: float = between(0, 10)  # KL (k3) to the incoming policy
    image_weight: float = between(0, 100)
    velocity_weight: float = between(0, 100)  # velocity MSE to the reference's target; 0 = no pixel supervision
    rows_per_pass: int = count()  # trajectories scored at a time
    sde_choice: str = one_of("random", "window", "all")  # scored: K of all, K in a row with noise in no other, all
    sde_steps: int = between(1, 1000)  # noisy splits scored per restoration (K)
    sde_range: list[float] = field(metadata={"low": 0, "high": 1})  # where a window may lie: 0 = first steps, 1 = last
    shared_noise: bool = field()  # a group starts its restorations from the same noise
    sigma: float = between(0, 10)
    scale_advantages: str = one_of("none", "group", "batch")
    separate_advantages: bool = field()  # image term: reward_answer and reward_latent_quality; text term: the others
    accuracy: str = one_of("exact", "judge")  # who says whether an answer is right; `judge` names the endpoint
    reward_accuracy: float = between(0, 1)
    reward_format: float = between(0, 1)
    reward_decision: float = between(0, 1)
    reward_direct: float = between(0, 1)  # for no restoration: what one must bring to be worth its time
    reward_answer: float = between(0, 1)  # how probable the right answer was
    reward_latent_quality: float = between(0, 1)  # how close the restored picture is to the clean one
    latent_quality: str = one_of("vae", "vit", "both")  # close as latents, as the ViT sees it, or a mean of both
    answer_scored: str = one_of("answer", "reply")  # of the right answer: its block, or the demonstration's whole reply
    decision_table: str = one_of("paper", "code")
    holdout_every: int = between(0, 10**6)  # steps between measurements of true accuracy; 0 = never
    stop_after: int = between(0, 1000)  # measurements in a row below the best at a higher reward; 0 = never stop
    stop_margin: float = between(0, 1)  # how much below

    @property
    def compared(self) -> bool:
        """Whether a term of the loss reads the incoming policy: only then it is kept beside the trained one."""
        return bool((self.text_weight and self.beta) or self.velocity_weight)


@dataclass
class Sampling:
    """The inference engine: published defaults are 30 points, shift 3."""

    flow_steps: int = between(1, 1000)  # Euler steps
    shift: float = between(0.01, 100)
    max_think_tokens: int = count()  # per text segment
    max_restorations: int = between(0, 16)
    batch: int = count()  # rows generated together
    system_prompt: bool = field()  # a closed vocabulary has no words for it
    text_guidance: float = between(1, 100)  # 1 = off; scales of classifier-free guidance when answering
    image_guidance: float = between(1, 100)  # 1 = off; acts on top of text_guidance
    guidance_from: float = between(0, 1)  # guided where guidance_from < shifted t <= guidance_to
    guidance_to: float = between(0, 1)
    guidance_renorm: str = one_of("global", "channel", "text_channel")
    guidance_renorm_min: float = between(0, 1)


@dataclass
class Evaluate:
    """Scoring and the paired comparison."""

    bootstrap: int = between(10, 10**6)
    confidence: float = between(0.5, 0.999)
    cluster: str = field()  # address of a Dask scheduler whose workers answer; "" = this process
    votes: int = between(1, 1000)  # restorations, each with its reply, behind an answer that restores


@dataclass
class Report:
    """The rendered report."""

    pictures: int = between(1, 64)


@dataclass
class Gate:
    """What a change may cost: the policy of `clear gate` (clear/project/compare). Margins are shares of answers."""

    model: str = one_of("base", "sft_direct", "sft", "reencode", "bridge", "grpo")  # the model the rules are about
    clean_margin: float = between(0, 1)  # fall of the accuracy on clean images that is accepted
    hard_margin: float = between(0, 1)  # the same at hard
    confidence: float = between(0.5, 0.999)  # of every interval; a fall counts when the whole interval is below
    bootstrap: int = between(10, 10**6)  # resamples per interval
    pictures: int = between(0, 16)  # samples with a changed answer that are shown


@dataclass
class Config:
    """Everything in `params.yaml`."""

    profile: str = one_of(*PROFILES)
    seed: int = between(0, 2**31 - 1)
    runtime: Runtime
    source: Source
    degrade: Degrade
    incoming: Incoming
    mmd_bench: MmdBench
    validate: Validate
    model: ModelSize
    base: Base
    traces: Traces
    teacher: Endpoint
    judge: Endpoint
    lora: Lora
    optimiser: Optimiser  # of all supervised training; reinforcement learning has its own
    sft: Sft
    bridge: Bridge
    grpo: Grpo
    sampling: Sampling
    evaluate: Evaluate
    report: Report
    gate: Gate

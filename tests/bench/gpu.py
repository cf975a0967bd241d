"""BAGEL-7B's shapes with random weights on one GPU: `make gpu` (needs torch, peft, safetensors).

Measures, for every type of weights that the card's libraries can compute, with a LoRA adapter on both experts and
gradient checkpointing: an SFT step and a GRPO scoring step (tokens/s, model FLOPs utilisation, peak memory, and for
SFT the share of it that `clear memory` estimates), the seconds per restored image in batches of 1 and 8 at every size,
and a whole GRPO step of one group (rollout, policy and reference scored row by row, AdamW). What does not fit the card
is said and left out. Prints a row of a Markdown table for each type of weights, and writes JSON to --out after each,
so that a time limit costs the rest only. `--small` runs the same program on a tiny model, without a GPU.

Model FLOPs of a step: every token costs 2 FLOPs per weight of the linear layers of the one expert it uses, and each
visible pair of query and key 4 · hidden per layer; the head costs 2 · hidden · vocabulary per scored token. The
backward pass of frozen weights needs the gradients of the inputs only, as much again as the forward's products, plus
twice the forward's attention. So F = 2 · products + 3 · attention + 3 · the adapter's own products (+ the vision tower
once, which is frozen and in front of every adapter). What gradient checkpointing computes again is not counted.
Utilisation = F / (seconds · peak), with 989 TFLOP/s dense bfloat16 of an H100 or H200 unless --peak says otherwise.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from clear.errors import ClearError
from clear.model import flex, flow, lora, quantised
from clear.model.bagel import Bagel, BagelConfig, Contents
from clear.model.mot import LlmConfig
from clear.model.offload import AHEAD, frozen, wait_in_host_memory
from clear.model.runtime import autocast, without_weights
from clear.model.sequence import LATENT, VIT, Image, Layout, SpecialTokens, Text, layout
from clear.model.tokenizer import word_tokenizer
from clear.model.vae import VaeConfig
from clear.model.vit import VitConfig
from clear.reasoning import grammar
from clear.reasoning.engine import Options, Reply, Restoration, Trajectory, denoise, generate, prefill
from clear.reasoning.prompts import Prompt
from clear.schema import QUANTISED, Lora
from clear.training.footprint import Batch, Training, activations, coded, count, training_workspace
from clear.training.rl import scoring

FORMULA = (
    "model FLOPs utilisation = (2 * products + 3 * attention + 6 * tokens * layers * adapter weights per layer + "
    "vision tower) / (seconds * peak); products: 2 * weights of the expert used, per token, and the head; "
    "recomputation excluded"
)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QUESTION, REPLY = 64, 300  # tokens
WEIGHTS = ["bfloat16", *QUANTISED]


def random_model(
    small: bool, device: str, rank: int, attention: str = "auto", weights: str = "bfloat16", offload: bool = False
) -> Bagel:
    """A Bagel of the published shapes (or a tiny one) with random weights and a fresh adapter.

    `attention`: that of training forwards, as `runtime.attention` (restorations read a cache, which is dense).
    `weights`: those of the decoder's linear layers, as `runtime.weights`; all others are bfloat16. `offload`: as
    `runtime.offload`.
    """
    llm = LlmConfig(600, 64, 2, 4, 2, 128) if small else LlmConfig()
    vit = VitConfig(48, 1, 2, 96, 14, 70) if small else VitConfig()
    config = BagelConfig(llm, vit, VaeConfig(), SpecialTokens(0, 1, 2, 3))
    with without_weights():
        model = Bagel(config).to(torch.bfloat16)
        if weights in QUANTISED:
            quantised.quantise(model, weights)
    generator = torch.Generator(device).manual_seed(0)
    for part in model.modules():  # one by one: quantised layers are made where the exact ones would not fit together
        _fill(part, device, generator)
        if offload:
            part._apply(Tensor.cpu, recurse=False)
    model.requires_grad_(False)
    lora.attach(model, Lora(rank, 2.0 * rank, 0.0, TARGETS, "both"))
    if offload:
        wait_in_host_memory(model, device)
    model.language_model.gradient_checkpointing = True
    model.language_model.attention = attention
    return model.train()


def _fill(part: nn.Module, device: str, generator: torch.Generator) -> None:
    """Give a module's own tensors, which are on the meta device, random values."""
    if isinstance(part, quantised.QuantisedLinear):
        weight = torch.empty(part.out_features, part.in_features, device=device).normal_(std=0.02, generator=generator)
        for name, value in quantised.encode(part.kind, weight).items():
            part.register_buffer(name, value)
    for name, value in part.named_parameters(recurse=False):
        made = torch.empty_like(value, device=device)
        if value.ndim > 1:
            made.normal_(std=0.02, generator=generator)
        else:
            made.fill_(1.0 if "norm" in type(part).__name__.lower() and name == "weight" else 0.0)
        part.register_parameter(name, nn.Parameter(made))
    for name, value in part.named_buffers(recurse=False):
        if value.is_meta:
            part.register_buffer(name, torch.zeros_like(value, device=device))


def prompt(model: Bagel, pixels: int) -> Prompt:
    """One question about a random square image of so many pixels a side."""
    vit, side = model.config.vit, pixels // model.config.latent_stride
    grid = (min(518, pixels) // vit.patch,) * 2
    ids = tuple((torch.arange(QUESTION) % 500 + 10).tolist())
    latent, patches = torch.randn(side**2, model.config.latent_channels), torch.rand(grid[0] ** 2, 3 * vit.patch**2)
    return Prompt((), ids, latent, (side, side), patches, grid)


def sft_batch(model: Bagel, rows: int, pixels: int) -> tuple[Layout, Contents, torch.Tensor]:
    """Restoring traces with the direct bridge: prompt, reply, noisy latent, clean latent, reply; velocity targets."""
    contents, built, targets = Contents(vit=[], latent=[], time=[]), [], []
    reply = Text(list(range(10, 10 + REPLY)), scored=True)
    for _ in range(rows):
        one = prompt(model, pixels)
        noise, t = torch.randn_like(one.latent), torch.rand(1)
        contents.vit.append(one.patches)
        contents.latent += [one.latent, flow.interpolate(one.latent[None], noise[None], t)[0], one.latent]
        contents.time += [0.0, t.item(), 0.0]
        targets.append(noise - one.latent)
        built.append(
            [*one.segments(), reply, Image(LATENT, one.latent_grid, noise=True), Image(LATENT, one.latent_grid), reply]
        )
    return layout(built, model.config.special)[0], contents, torch.cat(targets)


def model_flops(model: Bagel, built: Layout) -> float:
    """FLOPs of one training step over a layout by the formula above."""
    llm, kv = model.config.llm, model.config.llm.kv_heads * model.config.llm.head_dim
    expert = 2 * llm.hidden**2 + 2 * llm.hidden * kv + 3 * llm.hidden * llm.mlp
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad) / 2 / llm.layers
    tokens = int(built.valid.sum())
    pairs = int(built.allowed().sum())
    head = 2 * llm.hidden * llm.vocab * int((built.target >= 0).sum())
    vit = model.config.vit
    patches = int((built.kind == VIT).sum())
    tower = 2 * patches * vit.layers * (4 * vit.hidden**2 + 2 * vit.hidden * vit.mlp)  # frozen, before any adapter
    products = 2 * tokens * llm.layers * expert
    attention = 4 * pairs * llm.layers * llm.hidden
    return tower + 2 * (products + head) + 3 * attention + 3 * 2 * tokens * llm.layers * adapter


def timed(work: Callable[[], None], repeats: int, device: str) -> tuple[float, float]:
    """Median seconds of `work` after one unmeasured call, and the peak memory in GiB (0 on the CPU)."""
    cuda = device == "cuda"
    work()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0


def sft_estimate(model: Bagel, built: Layout, noisy: int, given: argparse.Namespace, weights: str) -> float:
    """GiB of an SFT step over a layout with `noisy` latents by the formulas of `clear memory`, without autoencoder."""
    device = model.vae2llm.weight.device
    cuda = device.type == "cuda"
    kind = weights if weights in QUANTISED else ""
    adapter = Lora(given.rank, 2.0 * given.rank, 0.0, TARGETS, "both")
    blocks = flex.wanted(given.attention, device)
    train = Training(2, 2, adapter, True, cuda, blocks, quantised.PIECE if kind else 0)
    gen, vit, scored = (int(part.sum()) for part in (built.is_gen, built.kind == VIT, built.target >= 0))
    batch = Batch(*built.valid.shape, gen, scored, noisy, vit=vit)
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    if given.offload:
        layers = model.language_model.model.layers
        waiting = sum(t.nbytes for layer in layers for t in frozen(layer).values())
        held -= waiting - AHEAD * waiting // len(layers)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    counts = count(model.config, adapter)
    step = activations(model.config, batch, train) + training_workspace(model.config, batch, train, counts.cast)
    return (held + 3 * trained + step + 2 * coded(model.config, kind).largest) / 2**30


def measure_sft(model: Bagel, given: argparse.Namespace, weights: str) -> dict:
    """An SFT step: forward, backward, AdamW on the adapter; the memory it takes and the estimate of it."""
    built, contents, targets = sft_batch(model, given.rows, given.pixels[0])
    targets = targets.to(given.device)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        with autocast(model):
            hidden = model(built, contents)
            logits, target = model.scored_logits(hidden, built)
            loss = F.cross_entropy(logits, target) + F.mse_loss(model.velocities(hidden, built), targets)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    found = _figures(model, built, timed(step, given.repeats, given.device), given.peak)
    return found | {"estimated_gib": sft_estimate(model, built, len(targets), given, weights)}


def measure_grpo(model: Bagel, pixels: int, sde_steps: int, repeats: int, device: str, peak: float) -> dict:
    """Scoring one trajectory with K noisy splits, and the backward pass of all its log-probabilities."""
    one, times = prompt(model, pixels), flow.time_grid(19, 3.0).tolist()
    states = torch.randn(20, *one.latent.shape)
    restoration = Restoration(states[-1], one.latent_grid, states, torch.zeros(19))
    replies = [Reply(list(range(10, 10 + REPLY)), [0.0] * REPLY) for _ in range(2)]
    trajectory = Trajectory(0, replies=replies, restorations=[restoration])
    steps = [list(range(sde_steps))]

    def step() -> None:
        with autocast(model):
            found = scoring.score(model, [one], [trajectory], steps, times, 0.3, 1.0)
        (found.text.sum() + found.image.sum()).backward()
        model.zero_grad()

    latent, text = Image(LATENT, one.latent_grid), Text(list(range(10, 10 + REPLY)), scored=True)
    noisy = [Image(LATENT, one.latent_grid, noise=True)] * sde_steps
    built, _ = layout([[*one.segments(), text, *noisy, latent, text]], model.config.special)
    return _figures(model, built, timed(step, repeats, device), peak)


def _figures(model: Bagel, built: Layout, measured: tuple[float, float], peak: float) -> dict:
    seconds, memory = measured
    tokens = int(built.valid.sum())
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "model_flops_utilisation": model_flops(model, built) / seconds / peak,
        "peak_gib": memory,
    }


def measure_restoration(model: Bagel, batch: int, pixels: int, flow_steps: int, repeats: int, device: str) -> dict:
    """Seconds per image of a denoising of `flow_steps` steps, the prompt's cache at hand."""
    prompts = [prompt(model, pixels) for _ in range(batch)]
    options = Options(flow_steps=flow_steps, shift=3.0)
    model.eval()
    with torch.inference_mode(), autocast(model):
        rows = prefill(model, prompts)
        noise = torch.randn(batch, *prompts[0].latent.shape, device=device)
        grid = prompts[0].latent_grid
        work = lambda: denoise(model, rows.cache, rows.rope, grid, noise, options)  # noqa: E731
        seconds, memory = timed(work, repeats, device)
    model.train()
    return {"seconds_per_image": seconds / batch, "peak_gib": memory}


def measure_grpo_step(model: Bagel, group: int, pixels: int, flow_steps: int, repeats: int, device: str) -> dict:
    """A GRPO step of one group: `group` rollouts that restore once, then the update they give, a row at a time."""
    tokenizer, one = word_tokenizer(grammar.WORDS), prompt(model, pixels)
    times, chosen = flow.time_grid(flow_steps, 3.0).tolist(), [[0, flow_steps // 2]]
    options = Options(
        restore="always", flow_steps=flow_steps, sigma=0.3, temperature=1.0, max_tokens=REPLY, batch=group
    )
    lora.add_reference(model)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    found: list[Trajectory] = []

    def rollout() -> None:
        model.eval()
        with autocast(model):
            found[:] = generate(model, tokenizer, [one], options, group, torch.Generator().manual_seed(0))
        model.train()

    def update() -> None:
        for trajectory in found:
            request = model, [one], [trajectory], chosen, times, options.sigma, options.temperature
            with autocast(model):
                new = scoring.score(*request)
                with torch.no_grad(), lora.reference(model):
                    old = scoring.score(*request)
            gap = old.text - new.text
            (gap.exp() - gap - 1 - new.text).sum().sub(new.image.sum()).backward()
        optimiser.step()
        optimiser.zero_grad()

    (rolling, first), (updating, second) = timed(rollout, repeats, device), timed(update, repeats, device)
    tokens = sum(len(reply.ids) for trajectory in found for reply in trajectory.replies)
    return {
        "rollouts": len(found),
        "reply_tokens": tokens,
        "rollout_seconds": rolling,
        "update_seconds": updating,
        "peak_gib": max(first, second),
    }


def measure(given: argparse.Namespace, weights: str) -> dict:
    """All figures under one type of weights; what the card has no memory for is None."""
    device, repeats = given.device, given.repeats
    model = random_model(given.small, device, given.rank, given.attention, weights, given.offload)
    side = given.pixels[0]
    tasks = {
        "sft_step": lambda: measure_sft(model, given, weights),
        "grpo_scoring": lambda: measure_grpo(model, side, 2, repeats, device, given.peak),
    }
    for pixels in given.pixels:
        for batch in (1, 8):
            tasks[f"restoration_{pixels}px_batch_{batch}"] = partial(
                measure_restoration, model, batch, pixels, given.flow_steps, repeats, device
            )
    tasks["grpo_step"] = lambda: measure_grpo_step(model, given.group, side, given.flow_steps, repeats, device)
    found = {"parameters": sum(p.numel() for p in model.parameters())}
    for name, task in tasks.items():
        try:
            found[name] = task()
        except torch.OutOfMemoryError as error:
            print(f"{weights}, {name}: does not fit ({str(error).splitlines()[0]})", file=sys.stderr)
            found[name] = None
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
    return found


def heading(pixels: Sequence[int]) -> str:
    """The head of the Markdown table."""
    restored = [f"s per image of {side} px, 1 / 8 at a time" for side in pixels]
    columns = ["device", "weights", "attention", "SFT tokens/s", "MFU", "peak GiB", "of the estimate", *restored]
    columns += ["GRPO step, s"]
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def row(found: dict, weights: str, pixels: Sequence[int]) -> str:
    """A row of the Markdown table; a dash for what was not measured."""
    one = found["runs"][weights]

    def cell(name: str, show: Callable[[dict], str]) -> str:
        return show(one[name]) if one[name] else "–"

    step = one["sft_step"]
    cells = [found["device"], weights + ", offload" * found["offload"], found["attention"]]
    cells += [cell("sft_step", lambda f: f"{f['tokens_per_second']:,.0f}")]
    cells += [cell("sft_step", lambda f: f"{100 * f['model_flops_utilisation']:.0f} %")]
    cells += [f"{step['peak_gib']:.1f}", f"{step['peak_gib'] / step['estimated_gib']:.2f}"] if step else ["–", "–"]
    for side in pixels:
        names = [f"restoration_{side}px_batch_{batch}" for batch in (1, 8)]
        cells += [" / ".join(cell(name, lambda f: f"{f['seconds_per_image']:.2f}") for name in names)]
    cells += [cell("grpo_step", lambda f: f"{f['rollout_seconds'] + f['update_seconds']:.1f}")]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run everything that was asked for, print the table, and write the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the program without a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--weights", nargs="+", default=WEIGHTS, choices=WEIGHTS, help="runtime.weights; default all")
    parser.add_argument("--offload", action="store_true", help="runtime.offload")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--attention", default="auto", choices=("auto", "dense", "flex"), help="runtime.attention")
    parser.add_argument("--rows", type=int, default=4, help="rows of an SFT step")
    parser.add_argument("--group", type=int, default=8, help="rollouts of a GRPO step")
    parser.add_argument("--pixels", type=int, nargs="+", default=[512, 1024], help="sides of the images; steps: first")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--flow-steps", type=int, default=30)
    parser.add_argument("--peak", type=float, default=989e12, help="FLOP/s")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.device == "cpu" and given.attention == "flex":
        parser.error("--attention flex has a backward pass on CUDA only.")
    if given.device == "cpu" and not given.small:
        parser.error("no GPU is here; the 7B shapes need one. `--small` tries the program on the CPU.")
    torch.manual_seed(0)
    found = {
        "device": torch.cuda.get_device_name() if given.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "attention": "flex" if flex.wanted(given.attention, torch.device(given.device)) else "dense",
        "offload": given.offload,
        "formula": FORMULA,
        "settings": {k: str(v) for k, v in sorted(vars(given).items()) if k not in ("out", "device")},
        "runs": {},
    }
    print(heading(given.pixels), flush=True)
    for weights in given.weights:
        try:
            quantised.require(weights, given.device)
        except ClearError as error:
            print(f"{weights}: left out. {error}", file=sys.stderr)
            continue
        found["runs"][weights] = measure(given, weights)
        print(row(found, weights, given.pixels), flush=True)
        if given.out:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()

"""Does the image term of GRPO earn its place? `python tests/bench/image_term.py SETTING …` (`--table` prints all).

Each setting trains data/models/bridge further with the image term alone (the generation expert moves, text is
frozen), on the questions about hard-degraded images of the rl split that the forced restoration leaves undecided.
Measured is what that can change: answers that were made to restore, on the questions about hard-degraded development
images (data/development; the benchmark is not for choosing), each paired with itself before training, with a
bootstrap interval by image. Beside exact match: the probability reward of clear.training.rl.rewards, in which small
changes show. Runs are appended to --out, one JSON line each.

The settings named `latent quality…` reward how close the restored latent is to the clean picture's, which brings clean
pictures back as supervision. Those that end in `every picture` train on all questions about hard-degraded images.

The settings named `pathwise…` are not a policy gradient. They differentiate the same reward through the last Euler
steps and the bridge into the velocity, without sampling noise: the most the image term could reach with this reward.
What was measured before training is kept beside --out; delete it when data/models/bridge has changed.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from clear.bench.scoring import is_correct
from clear.bench.statistics import paired_difference
from clear.config import compose, from_dict
from clear.data.records import read_samples
from clear.model import flow
from clear.model.bagel import GENERATION, Contents
from clear.model.runtime import apply_runtime
from clear.model.sequence import BRIDGE, LATENT, Image, Text, layout
from clear.model.tokenizer import encode
from clear.reasoning import grammar
from clear.reasoning.answering import Answerer
from clear.reasoning.engine import denoise, generate, prefill, text_reply
from clear.reasoning.prompts import question_text
from clear.schema import Config
from clear.training.load import incoming, trainable
from clear.training.loop.run import StageRun
from clear.training.rl.grpo import train
from clear.training.rl.latent_quality import LatentQuality
from clear.training.rl.policy import Task
from clear.training.rl.rewards import LIMIT, answer_rewards

OUT = Path(".clear/image_term.jsonl")
DEVELOPMENT = "data/development/degraded"
ALONE = (
    "grpo.restore=always",
    "grpo.experts=gen",
    "grpo.text_weight=0",
    "grpo.beta=0",
    "grpo.velocity_weight=0",
    "grpo.image_weight=1",
    "grpo.separate_advantages=true",
    "grpo.reward_answer=1",
    "grpo.answer_scored=reply",
    "grpo.holdout_every=0",
    "grpo.warmup=3",
)
WINDOW = "grpo.sde_choice=window grpo.shared_noise=true"
QUALITY = "grpo.reward_answer=0 grpo.reward_latent_quality=1"
SETTINGS = {
    "published: 2 random of 8 steps": "grpo.lr=1e-4 grpo.steps=60 grpo.prompts=8 grpo.group_size=8",
    "window 2": f"{WINDOW} grpo.sde_steps=2 grpo.lr=1e-4 grpo.steps=60 grpo.prompts=8 grpo.group_size=8",
    "window 1": f"{WINDOW} grpo.sde_steps=1 grpo.lr=1e-4 grpo.steps=60 grpo.prompts=8 grpo.group_size=8",
    "window 1, late": f"{WINDOW} grpo.sde_steps=1 grpo.sde_range=[0.7,1] grpo.lr=1e-4 grpo.steps=80 grpo.prompts=4 "
    "grpo.group_size=16",
    "latent quality, 2 random of 8 steps": f"{QUALITY} grpo.lr=1e-4 grpo.steps=60 grpo.prompts=8 grpo.group_size=8",
    "latent quality, window 2": f"{WINDOW} {QUALITY} grpo.sde_steps=2 grpo.lr=1e-4 grpo.steps=60 grpo.prompts=8 "
    "grpo.group_size=8",
    "latent quality, window 2, every picture": f"{WINDOW} {QUALITY} grpo.sde_steps=2 grpo.lr=3e-4 grpo.steps=120 "
    "grpo.prompts=16 grpo.group_size=8",
    "pathwise, last 1": "grpo.lr=1e-4 grpo.steps=40 grpo.prompts=16",
    "pathwise, last 1, lr 1e-3": "grpo.lr=1e-3 grpo.steps=80 grpo.prompts=32",
    "window 1, any, lr 3e-4": f"{WINDOW} grpo.sde_steps=1 grpo.lr=3e-4 grpo.steps=60 grpo.prompts=8 grpo.group_size=16",
}
"""Overrides of each setting, beside ALONE."""


class Asked:
    """Questions about the hard-degraded images of a folder, ready to be asked."""

    def __init__(self, answerer: Answerer, folder: str, count: int) -> None:
        self.samples = samples = [s for s in read_samples(folder) if s.severity == "high"]
        bank = answerer.bank([s.seen for s in samples], [s.key for s in samples])
        asked = [(i, q) for i, s in enumerate(samples) for q in s.questions[:count]]
        self.questions, self.number = [q for _, q in asked], [i for i, _ in asked]
        self.prompts = answerer.prompts(bank, asked)
        number = {name: n for n, name in enumerate(sorted({s.id for s in samples}))}
        self.image = np.array([number[samples[i].id] for i, _ in asked])

    def measure(self, answerer: Answerer, match: bool = True) -> dict[str, np.ndarray]:
        """Per question, restoring always: right or wrong (with `match`), and the probability reward."""
        options = replace(answerer.options, restore="always", noise_seed=answerer.config.seed)
        options = options if match else replace(options, max_tokens=1)
        done = generate(answerer.model, answerer.tokenizer, self.prompts, options)
        said = [grammar.extract_answer(t.texts(answerer.tokenizer)[-1]) for t in done]
        given = answerer.model, answerer.tokenizer, self.prompts, done, self.questions, "reply", options.batch
        return {
            "right": np.array([is_correct(x, q) for x, q in zip(said, self.questions, strict=True)], float),
            "probability": np.array(answer_rewards(*given)),
        }

    def part(self, chosen: np.ndarray) -> tuple[list, list, list[int]]:
        """Prompts, questions and numbers of their samples, where `chosen` (bool)."""
        lists = self.prompts, self.questions, self.number
        return tuple([one for one, c in zip(found, chosen, strict=True) if c] for found in lists)


def pathwise(model, tokenizer, prompts, questions, config: Config) -> list[dict]:
    """Raise the reward by its gradient through the last Euler step, the bridge and the reply; returns a curve."""
    g, s = config.grpo, config.sampling
    options = Answerer(model, None, tokenizer, config).options
    times = flow.time_grid(s.flow_steps, s.shift).tolist()
    generator = torch.Generator().manual_seed(config.seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, g.lr, betas=(0.9, 0.95), weight_decay=0.01)
    trigger, curve = encode(tokenizer, grammar.restore_reply()), []
    for step in range(g.steps):
        part = torch.randperm(len(prompts), generator=generator)[: g.prompts].tolist()
        chosen = [prompts[i] for i in part]
        grid = chosen[0].latent_grid
        noise = torch.randn(len(part), *chosen[0].latent.shape, generator=generator)
        with torch.inference_mode():
            rows = prefill(model, chosen)
            text_reply(model, rows, trigger)
            recorded = replace(options, sigma=1e-6, window=(s.flow_steps - 1, s.flow_steps))
            states = denoise(model, rows.cache, rows.rope, grid, noise, recorded).states
        x = states[-2].clone()
        contents = Contents(vit=[], latent=[], time=[], bridge=[])
        first, second, contexts = [], [], [[] for _ in part]
        for n, prompt in enumerate(chosen):
            contents.latent += [prompt.latent, x[n]]
            contents.time += [0.0, times[-2]]
            contents.vit.append(prompt.patches)
            contexts[n] = [*prompt.segments(), Text([*trigger, model.config.special.eos], eos=False)]
            first.append([*contexts[n], Image(LATENT, grid, noise=True)])
        built, _ = layout(first, model.config.special)
        v = model.velocities(model(built, contents), built).reshape(x.shape)
        restored = flow.euler_step(x, v, times[-2], times[-1])
        read = Contents(vit=contents.vit, latent=[p.latent for p in chosen], time=[0.0] * len(part), bridge=restored)
        for n, i in enumerate(part):
            q = questions[i]
            reply = grammar.restore_trace(question_text(q), q.evidence, q.answer).replies[-1]
            second.append([*contexts[n], Image(BRIDGE, grid), Text(encode(tokenizer, reply), scored=True)])
        built, _ = layout(second, model.config.special)
        logits, target = model.scored_logits(model(built, read), built)
        picked = torch.log_softmax(logits, -1).gather(1, target[:, None]).squeeze(1)
        owner = torch.arange(len(part))[:, None].expand_as(built.target)[built.target != -100]
        total = picked.new_zeros(len(part)).index_add(0, owner, picked)
        reward = (1 + total.clamp(min=-LIMIT) / LIMIT).mean()
        for group in optimiser.param_groups:
            group["lr"] = g.lr * min(1.0, (step + 1) / max(1, g.warmup))
        optimiser.zero_grad()
        (-reward).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        curve.append({"reward_answer": reward.item()})
    model.eval()
    return curve


def study(names: list[str], count: int, out: Path) -> None:
    """Train and measure each setting from the same weights, and append a line for each."""
    base = from_dict(compose([f"runtime.threads={os.environ.get('OMP_NUM_THREADS', 1)}", *ALONE]))
    apply_runtime(base)
    start = incoming(Path("data/models/bridge"), base)
    model, tokenizer = start.model, start.tokenizer
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    trainable(model, GENERATION)
    answerer = Answerer(model, start.vae, tokenizer, base)
    held, rl = Asked(answerer, DEVELOPMENT, count), Asked(answerer, "data/degraded/rl", 2)
    measured = out.with_name(f"image_term_{DEVELOPMENT.replace('/', '_')}_{count}.npz")
    if not measured.exists():
        measured.parent.mkdir(parents=True, exist_ok=True)
        np.savez(measured, **held.measure(answerer))
    before = dict(np.load(measured))
    known = out.with_name("image_term_undecided.npy")
    if not known.exists():
        np.save(known, rl.measure(answerer, match=False)["probability"])
    likely = np.load(known)
    undecided = (likely > 0) & (likely < 0.99)
    print(f"{undecided.sum()} of {len(likely)} questions are undecided", flush=True)
    for name in names:
        config = from_dict(compose([f"runtime.threads={base.runtime.threads}", *ALONE, *SETTINGS[name].split()]))
        model.load_state_dict(weights)
        torch.manual_seed(config.seed)
        begun = time.perf_counter()
        *given, numbers = rl.part(undecided | name.endswith("every picture"))
        if name.startswith("pathwise"):
            curve = pathwise(model, tokenizer, *given, config)
        else:
            quality = None
            if config.grpo.reward_latent_quality:
                clean = answerer.bank([s.image for s in rl.samples], [s.key for s in rl.samples])
                quality = LatentQuality(config.grpo.latent_quality, clean, numbers, answerer.reencode)
            curve = sampled(model, tokenizer, *given, config, quality)
        line = {"name": name, "folder": DEVELOPMENT, "seconds": round(time.perf_counter() - begun), "curve": curve}
        after = held.measure(answerer)
        for figure, value in after.items():
            found = paired_difference(value, before[figure], held.image)
            pair = {"before": before[figure].mean(), "after": value.mean(), "n": found.n}
            line[figure] = pair | {"difference": found.estimate, "low": found.low, "high": found.high}
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(row(line), flush=True)


def sampled(model, tokenizer, prompts, questions, config: Config, quality: LatentQuality | None) -> list[dict]:
    """Train with GRPO's own trainer; no reply is sampled, as only the restoration is judged. Returns its curve."""
    s, g = config.sampling, config.grpo
    options = Answerer(model, None, tokenizer, config).options
    options = replace(options, restore="always", sigma=g.sigma, temperature=g.temperature, max_tokens=1)
    options = replace(options, shared_noise=g.shared_noise, max_restorations=s.max_restorations)
    with tempfile.TemporaryDirectory() as home:
        run = StageRun("image_term", config, [], Path(home))
        done = train(run, model, Task(tokenizer, prompts, questions, options, quality=quality))
    print({k: round(v, 2) for k, v in done.seconds_per_step.items()}, flush=True)
    keys = (
        "reward_answer",
        "reward_latent_quality",
        "image_advantage",
        "image_groups_with_variance",
        "ratio_error",
        "image_clipped",
    )
    return [{k: line[k] for k in keys if k in line} for line in run.curve]


HEAD = (
    "| setting | restored answers right, hard | paired difference | probability reward | reward in training | seconds |"
)


def row(line: dict) -> str:
    """A run as a row of the table."""
    right, likely = line["right"], line["probability"]
    rewards = [step.get("reward_latent_quality", step.get("reward_answer")) for step in line["curve"]]
    tenth = max(1, len(rewards) // 4)
    return (
        f"| {line['name']} | {right['before']:.4f} → {right['after']:.4f} ({right['n']}) "
        f"| {100 * right['difference']:+.2f} [{100 * right['low']:+.2f}, {100 * right['high']:+.2f}] "
        f"| {100 * likely['difference']:+.2f} [{100 * likely['low']:+.2f}, {100 * likely['high']:+.2f}] "
        f"| {np.mean(rewards[:tenth]):.3f} → {np.mean(rewards[-tenth:]):.3f} | {line['seconds']} |"
    )


def main() -> None:
    """Run settings, or print the table of all runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", nargs="*", choices=[[], *SETTINGS], help="names of SETTINGS")
    parser.add_argument("--questions", type=int, default=4, help="questions per image")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true", help="print every recorded run as Markdown")
    given = parser.parse_args()
    if given.table:
        print("\n".join([HEAD, "|---|---|---|---|---|---|", *map(row, map(json.loads, given.out.open()))]))
        return
    study(given.setting or list(SETTINGS), given.questions, given.out)


if __name__ == "__main__":
    main()

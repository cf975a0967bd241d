"""How fast rollouts are made: batched against one row at a time, and a shared prompt against a copy per row.

A random model of the default profile's shapes (36 latent and 36 ViT tokens), eight prompts and groups of eight,
sampled as in GRPO: temperature 1, SDE, restoration forced, so that every trajectory has two replies and one picture.
Replies of a random model end by chance or at the token limit; the draws are seeded, so they end alike in every run.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from clear.config import compose, from_dict
from clear.errors import ClearError
from clear.model import runtime
from clear.model.bagel import Bagel
from clear.model.tokenizer import word_tokenizer
from clear.reasoning.engine import Options, generate, prefill
from clear.reasoning.prompts import Prompt
from clear.schema import Config
from clear.training.build import bagel_config, scene_words

PROMPTS, GROUP, QUESTION = 8, 8, 12  # QUESTION: words per question
ROLLOUT_REPEATS, PREFILL_REPEATS = 7, 9


def random_model(config: Config) -> tuple[Bagel, object]:
    """An untrained Bagel with the mlp bridge, and its tokenizer; the velocity head is random too."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer(scene_words())
    model = Bagel(replace(bagel_config(config, tokenizer), bridge="mlp")).initialise()
    torch.nn.init.normal_(model.llm2vae.weight, std=0.05)
    return model.eval(), tokenizer


def random_prompts(config: Config, model: Bagel) -> list[Prompt]:
    """Prompts with random images and questions, of one picture's token counts."""
    generator = torch.Generator().manual_seed(0)
    size, stride = config.model, model.config.latent_stride
    latent_grid, vit_grid = (size.vae_size // stride,) * 2, (size.vit_size // size.vit_patch,) * 2
    prompts = []
    for _ in range(PROMPTS):
        question = torch.randint(5, model.config.llm.vocab, (QUESTION,), generator=generator).tolist()  # 5: no marker
        latent = torch.randn(latent_grid[0] ** 2, model.config.latent_channels, generator=generator)
        patches = torch.rand(vit_grid[0] ** 2, 3 * size.vit_patch**2, generator=generator) * 2 - 1
        prompts.append(Prompt((), tuple(question), latent, latent_grid, patches, vit_grid))
    return prompts


def rates(one: Callable[[], int], other: Callable[[], int], repeats: int) -> tuple[float, float]:
    """Median items per second of two ways to make items, run alternately after one run of each."""

    def rate(work: Callable[[], int]) -> float:
        start = time.perf_counter()
        return work() / (time.perf_counter() - start)

    one(), other()
    pairs = [(rate(one), rate(other)) for _ in range(repeats)]
    return statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs)


def _setting() -> tuple[Config, Bagel, object, list[Prompt]]:
    runtime.tune_allocator()
    config = from_dict(compose(["profile=tiny"]))
    model, tokenizer = random_model(config)
    return config, model, tokenizer, random_prompts(config, model)


def _row(value: float, unit: str, baseline: float) -> dict:
    return {"value": value, "unit": unit, "baseline": baseline, "ratio": value / baseline}


def _copies(prompts: Sequence[Prompt]) -> list[Prompt]:
    return [prompt for prompt in prompts for _ in range(GROUP)]


def bench_rollouts() -> dict[str, dict]:
    """Trajectories per second of 8 prompts x 8, against the same 64 rows generated one after the other (batch=1)."""
    config, model, tokenizer, prompts = _setting()
    sampling = config.sampling
    options = Options(
        restore="always",
        flow_steps=sampling.flow_steps,
        shift=sampling.shift,
        sigma=config.grpo.sigma,
        temperature=config.grpo.temperature,
        max_tokens=sampling.max_think_tokens,
        batch=PROMPTS * GROUP,
    )

    def make(wanted: list[Prompt], group: int, batch: int) -> int:
        generator = torch.Generator().manual_seed(1)
        found = generate(model, tokenizer, wanted, replace(options, batch=batch), group, generator)
        if len(found) != PROMPTS * GROUP or any(len(t.restorations) != 1 for t in found):
            raise ClearError(f"rollouts: {len(found)} trajectories, not all with one restoration; see Options.restore.")
        return len(found)

    batched, single = rates(
        lambda: make(prompts, GROUP, PROMPTS * GROUP), lambda: make(_copies(prompts), 1, 1), ROLLOUT_REPEATS
    )
    return {"rollouts": _row(batched, "rows/s", single)}


def bench_prefill() -> dict[str, dict]:
    """Rows per second with a ready cache: each prompt run once and expanded to its group, against eight copies."""
    _, model, _, prompts = _setting()

    def make(wanted: list[Prompt], group: int) -> int:
        with torch.inference_mode():
            return len(prefill(model, wanted, group).trajectories)

    shared, copied = rates(lambda: make(prompts, GROUP), lambda: make(_copies(prompts), 1), PREFILL_REPEATS)
    return {"prefill_shared": _row(shared, "rows/s", copied)}

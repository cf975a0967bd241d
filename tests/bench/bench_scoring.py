"""How fast GRPO scores: K noisy states of a trajectory in one forward, against one forward for each of them.

Forward and backward of groups as in a training step of the default profile: restoring trajectories of a random model
of its shapes, rolled out with the SDE. The rate is that of the tokens computed, so the ratio of the two says what part
of the saved tokens is saved time: 1 if a token costs the same either way, less if the longer rows cost more.
"""

import statistics
import time

import torch

from clear.config import compose, from_dict
from clear.errors import ClearError
from clear.model import flow, runtime
from clear.reasoning.engine import Options, generate
from clear.training.rl import scoring
from tests.bench.bench_rollouts import GROUP, PROMPTS, random_model, random_prompts

STEPS = (0, 2, 4, 6)  # K = 4
ROWS, REPEATS = 16, 3
TIMES = flow.time_grid(99, 1.0).tolist()


def bench_grpo_scoring() -> dict[str, dict]:
    """Tokens per second, forward + backward, of K = 4 states at once; baseline: in four forwards of one state.

    Raises ClearError if the two give different log-probabilities.
    """
    runtime.tune_allocator()
    config = from_dict(compose(["profile=tiny"]))
    s, g = config.sampling, config.grpo
    model, tokenizer = random_model(config)
    prompts = random_prompts(config, model)[: ROWS // GROUP]
    options = Options("always", "bridge", s.flow_steps, s.shift, g.sigma, 1.0, s.max_think_tokens, 1, PROMPTS * GROUP)
    found = generate(model, tokenizer, prompts, options, GROUP, torch.Generator().manual_seed(1))
    owners, times = [prompts[t.prompt] for t in found], flow.time_grid(s.flow_steps, s.shift).tolist()

    def score(steps: tuple[int, ...]) -> torch.Tensor:
        scores = scoring.score(model, owners, found, [list(steps)] * len(found), times, g.sigma, g.temperature)
        (scores.text.sum() / len(STEPS) * len(steps) + scores.image.sum()).backward()
        return scores.image.detach()

    def seconds(parts: list[tuple[int, ...]]) -> float:
        model.zero_grad(set_to_none=True)
        begun = time.perf_counter()
        for part in parts:
            score(part)
        return time.perf_counter() - begun

    whole, single = [STEPS], [(k,) for k in STEPS]
    together, apart = score(STEPS).reshape(len(found), -1), torch.stack([score((k,)) for k in STEPS], 1)
    if (together - apart).abs().max() > 1e-4:
        raise ClearError(
            f"scoring of {len(STEPS)} states differs from single ones by {(together - apart).abs().max()}."
        )
    tokens = {len(STEPS): _tokens(model, owners, found, len(STEPS)), 1: _tokens(model, owners, found, 1)}
    pairs = [(seconds(whole), seconds(single)) for _ in range(REPEATS)]
    rate = tokens[len(STEPS)] / statistics.median(p[0] for p in pairs)
    baseline = len(STEPS) * tokens[1] / statistics.median(p[1] for p in pairs)
    return {"grpo_scoring": {"value": rate, "unit": "tokens/s", "baseline": baseline, "ratio": rate / baseline}}


def _tokens(model, prompts, trajectories, count: int) -> int:
    """Tokens of one forward with `count` noisy states per restoration, padding included."""
    seen: list[int] = []
    plain = scoring.layout

    def counted(*given, **named):
        built, ends = plain(*given, **named)
        seen.append(built.ids.numel())
        return built, ends

    scoring.layout = counted
    try:
        with torch.no_grad():
            scoring.score(model, prompts, trajectories, [list(range(count))] * len(trajectories), TIMES, 1.0, 1.0)
    finally:
        scoring.layout = plain
    return seen[0]

"""The real GRPO trainer over made-up prompts."""

from dataclasses import replace

import torch

from clear.config import compose, from_dict
from clear.data.records import Question
from clear.reasoning.engine import Options, denoise, prefill, text_reply
from clear.training.loop.run import StageRun
from clear.training.rl import grpo
from clear.training.rl.policy import Task

OPTIONS = Options(flow_steps=4, shift=1.0, sigma=0.3, temperature=1.0, max_tokens=6, restore="always")


BASE = (
    "profile=smoke",
    "runtime.log_every=1",
    "runtime.device=cpu",
    "grpo.warmup=0",
    "grpo.holdout_every=0",
    "grpo.reward_accuracy=1.0",
    "grpo.reward_format=0.0",
    "grpo.velocity_weight=0.0",
)


def trainer_of(folder, model, tokenizer, prompts, options, *overrides, quality=None):
    """The real trainer over `prompts`, whose question's answer is "c"."""
    config = from_dict(compose([*BASE, *overrides]))
    (folder / "input.txt").write_text("data")
    run = StageRun("grpo", config, [folder / "input.txt"], folder / "runs")
    questions = [Question(str(i), "test", "a b", "c") for i in range(len(prompts))]
    torch.manual_seed(3)
    return grpo.make_trainer(run, model, Task(tokenizer, prompts, questions, options, quality=quality))


def restored(model, prompts, trigger, sampled) -> torch.Tensor:
    """Restored latents (count, 9, 4) from fixed noise, by the ODE."""
    rows = prefill(model, prompts)
    text_reply(model, rows, trigger)
    noise = torch.randn(len(prompts), 9, 4, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return denoise(model, rows.cache, rows.rope, (3, 3), noise, replace(sampled, sigma=0.0)).x0

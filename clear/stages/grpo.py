"""Stage `grpo`: interleaved GRPO from the bridge model on the rl split."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from clear.bench.scoring import is_correct
from clear.data.io import write_json
from clear.data.records import drawn, read_samples
from clear.errors import ClearError
from clear.model.runtime import apply_runtime
from clear.schema import Config

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from clear.llm.endpoint import Client
    from clear.reasoning.engine import Options
    from clear.training.load import Incoming
    from clear.training.rl.policy import Task

INPUTS = ("data/models/bridge", "data/degraded/rl", "data/degraded/validation")


def rollout_options(config: Config) -> "Options":
    """How rollouts are made: stochastic, without guidance, and with a number of flow steps of their own."""
    from clear.reasoning.engine import Options

    s, g = config.sampling, config.grpo
    return Options(
        restore=g.restore,
        flow_steps=g.flow_steps or s.flow_steps,
        shift=s.shift,
        sigma=g.sigma,
        temperature=g.temperature,
        max_tokens=s.max_think_tokens,
        max_restorations=s.max_restorations,
        batch=s.batch,
        shared_noise=g.shared_noise,
    )


def prepare(config: Config) -> "tuple[Incoming, Task]":
    """Load the bridge model, choose what is trained, and gather the rl split's prompts and what judges the policy."""
    from clear.data.workspace import model_folder
    from clear.model import lora
    from clear.model.bagel import GENERATION, frozen
    from clear.reasoning.answering import Answerer
    from clear.training.load import incoming, labelled, trainable
    from clear.training.rl.latent_quality import LatentQuality
    from clear.training.rl.policy import Task

    g = config.grpo
    start = incoming(model_folder("bridge", config), config, whole=False)
    model, tokenizer = start.model, start.tokenizer
    lora.set_dropout(model, 0.0)
    answerer = Answerer(model, start.vae, tokenizer, config, start.store)
    samples = list(read_samples("data/degraded/rl"))
    known = labelled(samples, config)  # a reward needs the answer
    samples = [s for i, s in enumerate(samples) if i in known]
    paired = [i for i, s in enumerate(samples) if s.paired]
    clean = {paired[k] for k in drawn([samples[i].id for i in paired], round(g.clean_share * len(samples)))}
    shown = [s.image if i in clean else s.seen for i, s in enumerate(samples)]
    bank = answerer.bank(shown, [s.key for s in samples])
    asked = [(i, q) for i, s in enumerate(samples) for q in s.questions]
    prompts = answerer.prompts(bank, asked)

    quality = None
    if g.reward_latent_quality:
        pictures = answerer.bank([s.image for s in samples], [s.key for s in samples])
        partners = [i if samples[i].paired else None for i, _ in asked]
        quality = LatentQuality(g.latent_quality, pictures, partners, answerer.reencode)

    held = list(read_samples("data/degraded/validation"))
    held_bank = answerer.bank([s.seen for s in held], [s.key for s in held])
    held_asked = [(i, q) for i, s in enumerate(held) for q in s.questions[:1]]
    for split, found in (("rl", asked), ("validation", held_asked)):
        if not found:
            raise ClearError(f"grpo: data/degraded/{split} holds no question; raise source.{split} or its share.")

    def holdout(policy) -> float:
        answerer.model = policy  # sharded weights cannot answer; this is a whole copy of them
        answers = answerer.answers(held_bank, held_asked)
        return sum(is_correct(a.prediction, q) for a, (_, q) in zip(answers, held_asked, strict=True)) / len(held_asked)

    never = (*frozen(config.sft.train_vit), *(GENERATION if g.experts == "und" else ()))
    trainable(model, GENERATION if g.experts == "gen" else (), never)
    return start, Task(tokenizer, prompts, [q for _, q in asked], rollout_options(config), holdout, quality=quality)


def _judge(config: Config) -> "AbstractContextManager[Client | None]":
    """The judge that `grpo.accuracy` asks for, its replies kept beside the project; nothing for exact match."""
    from clear.data.workspace import replies_file
    from clear.llm.endpoint import connect

    if config.grpo.accuracy == "exact":
        return nullcontext()
    return connect(config.judge, "judge", replies_file("judge"))


def run(config: Config) -> None:
    """Train and write data/models/grpo, its curves and the first and last figures."""
    apply_runtime(config)
    from clear.data.workspace import checkpoint_dir, record_run
    from clear.training.load import save
    from clear.training.loop import sharded
    from clear.training.loop.parallel import rank
    from clear.training.loop.run import StageRun
    from clear.training.panel import panel
    from clear.training.rl.grpo import train

    start, task = prepare(config)
    run = StageRun("grpo", config, INPUTS, checkpoint_dir("grpo"))
    run.panel = panel(start, config)
    before = None if sharded.enabled() else task.holdout(start.model)
    with _judge(config) as judge:
        done = train(run, start.model, replace(task, judge=judge))
    save(Path("data/models/grpo"), start, config)
    first, last = run.curve[0], run.curve[-1]
    names = ("reward", "reward_accuracy", "call_rate", "groups_with_variance", "ratio_error", "kl")
    figures = {f"{when}_{n}": row.get(n) for when, row in (("first", first), ("last", last)) for n in names}
    after = task.holdout(start.model)
    before = first.get("accuracy_holdout") if before is None else before
    if rank() == 0:
        found = {"holdout_before": before, "holdout_after": after, "steps": done.steps, "stopped": done.stopped}
        found |= figures
        write_json("data/metrics/grpo.json", found)
        record_run("grpo", **{f"{name}_seconds_per_step": value for name, value in done.seconds_per_step.items()})
    run.finish("data/plots/grpo.csv")

"""Interleaved GRPO on trl's GRPOTrainer (METHOD §4, DESIGN "Interleaved GRPO"). The only module that imports trl.

What stays trl's: sampler (each prompt repeated for its group), generation buffer and accumulation, optimiser and
schedule, checkpoints, metric averaging. What is replaced, because trl's machinery carries text completions only:
`_generate_and_score_completions` (our engine rolls out text and images, our rewards score them: a `Rollout`) and
`_compute_loss` (one forward per trajectory scores text tokens and SDE steps together: `grpo_loss`). trl's own reference
model is off (it would be reloaded by name); the reference here is a frozen copy of the incoming policy (of its adapter,
where it has one), so the KL is exactly 0 at step 0.

Several processes share the prompts of a step; each prompt then has a sampling stream of its own, and the loss is
normalised by the tokens and steps of all, so that their number does not matter. Under FSDP policy and reference are
scored sharded, in step everywhere. A rollout cannot be: it takes as many forwards as its longest reply has tokens. So
the weights are gathered for its length into a copy without hooks (clear/training/loop/sharded.py).

Departures from the published code: the text loss is normalised by the real number of scored tokens; groups without
reward variance are skipped and counted; the image term may be anchored by the squared distance of the velocity to
the reference's (no pixel supervision).
"""

import contextlib
import copy
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from clear.errors import ClearError
from clear.model import flow, lora
from clear.model.bagel import Bagel
from clear.model.runtime import autocast
from clear.reasoning.engine import Options, Trajectory, generate
from clear.reasoning.grammar import extract_answer
from clear.reasoning.prompts import Prompt
from clear.schema import Grpo
from clear.training.loop import sharded
from clear.training.loop.parallel import gathered, rank, world
from clear.training.loop.preemption import saved_on_sigterm
from clear.training.loop.run import StageRun, curve_rows
from clear.training.loop.saved import MarkComplete, TrainedOnly, adopt_trained, last_complete
from clear.training.loop.trainer import Progress, training_arguments
from clear.training.rl import scoring
from clear.training.rl.judging import judged
from clear.training.rl.objective import Counts, advantages, grpo_loss
from clear.training.rl.policy import Policy, Task, order, processing_class, streams
from clear.training.rl.rewards import IMAGE_REWARDS, answer_rewards, rewards, weighted
from clear.training.rl.rollout import Rollout
from clear.training.rl.stopping import StopRule

LONGER = 10
"""A step is as long as some ten of the other stages: checkpoints are so many times as frequent."""


class InterleavedGRPO(TrainedOnly, GRPOTrainer):
    """GRPO over trajectories of text and restorations.

    token_budget: trajectories that are scored together share rows of so many tokens (0: a row each). own_streams: a
    prompt's rollouts do not depend on the process that makes them.
    """

    token_budget, own_streams, phase = 0, False, "grpo"

    def __init__(self, policy: Policy, task: Task, grpo: Grpo, args: GRPOConfig) -> None:
        self.reference = None
        self.sharded = sharded.Policies(policy) if sharded.enabled() else None
        if lora.has_adapter(policy.bagel):
            if grpo.compared:
                lora.add_reference(policy.bagel)
        elif self.sharded is None and grpo.compared:
            self.reference = copy.deepcopy(policy.bagel).eval().requires_grad_(False)
        self.task, self.grpo, self.options = task, grpo, task.options
        self.measured: Callable[[float], None] | None = None
        self.times = flow.time_grid(self.options.flow_steps, self.options.shift).tolist()
        self.rollout: Rollout | None = None
        self.seconds = {"rollout": 0.0, "reward": 0.0, "update": 0.0, "holdout": 0.0}
        super().__init__(
            model=policy,
            reward_funcs=_no_reward,
            args=args,
            train_dataset=Dataset.from_dict({"prompt": order(len(task.prompts), grpo, args.seed)}),
            processing_class=processing_class(task.tokenizer, policy.bagel),
            callbacks=[MarkComplete(), Progress("grpo")],
        )
        if self.reference is not None:
            self.reference.to(self.accelerator.device)

    @contextlib.contextmanager
    def _incoming(self, bagel: Bagel) -> Iterator[Callable]:
        """What calls a function with the policy as it came in, for the length of a with block."""
        if self.sharded:
            yield self.sharded.reference()
        elif self.reference is not None:
            yield lambda call: call(self.reference)
        else:
            with lora.reference(bagel) as incoming:
                yield lambda call: call(incoming)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Average the figures over the processes."""
        self._metrics["train"].update(gathered(dict(self._metrics["train"])))
        super().log(logs, start_time)

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Tensor]:
        """Roll out all groups of a generation batch to `self.rollout`; returns the numbers of its rows."""
        group = self.num_generations
        numbers = [int(row["prompt"]) for row in inputs[::group]]
        bagel = self.sharded.whole() if self.sharded else self.accelerator.unwrap_model(self.model).bagel
        if self.task.holdout and self.grpo.holdout_every and self.state.global_step % self.grpo.holdout_every == 0:
            asked = time.perf_counter()
            accuracy = self.task.holdout(bagel)
            self.seconds["holdout"] += time.perf_counter() - asked
            self._metrics["train"]["accuracy_holdout"].append(accuracy)
            if self.measured is not None:
                self.measured(accuracy)
        seed = int(torch.randint(2**31, (1,)))
        if self.own_streams:  # the processes' own random states differ
            seed = self.args.seed * 2**20 + self.state.global_step
            torch.manual_seed(seed)  # trl's shuffling of the slices
        generator = torch.Generator().manual_seed(seed)
        prompts = [self.task.prompts[i] for i in numbers]
        begun = time.perf_counter()
        options = self._placed(generator)
        with autocast(bagel):
            trajectories = self._roll_out(bagel, prompts, options, generator, seed)
        owners, count = [prompts[t.prompt] for t in trajectories], len(trajectories)
        rolled = time.perf_counter()
        parts = self._rewards(bagel, [numbers[t.prompt] for t in trajectories], owners, trajectories)
        # Advantages and figures are those of the whole step, of which this process keeps its own rows.
        step = gathered({"parts": parts, "restored": [bool(t.restorations) for t in trajectories]})
        every = [advantages(v, group, self.grpo.scale_advantages) for v in self._totals(step["parts"])]
        self._log_rollout(step["parts"], step["restored"], *every)
        mine = rank() * len(parts) if world() > 1 else 0
        found = torch.tensor([values[mine : mine + len(parts)] for values in every]).T
        of_step = streams(seed, "steps", count) if self.own_streams else [generator] * count
        steps = [self._chosen_steps(options, stream) for stream in of_step]
        self.rollout = Rollout(owners, trajectories, steps, found, self._counts(trajectories, steps, found))
        self.seconds["rollout"] += rolled - begun
        self.seconds["reward"] += time.perf_counter() - rolled
        return {"index": torch.arange(count)}

    def _counts(self, trajectories: Sequence[Trajectory], steps: Sequence[Sequence[int]], found: Tensor) -> Counts:
        """The counts of a step with these advantages (R, 2); all processes must ask."""
        counted = [n for n, teaches in enumerate(found.any(1).tolist()) if teaches]
        rows = self._per_process(len(counted))
        tokens = self._per_process(sum(len(r.ids) - r.forced for n in counted for r in trajectories[n].replies))
        images = self._per_process(sum(len(trajectories[n].restorations) * len(steps[n]) for n in counted))
        longest = self.options.max_tokens * (1 + self.options.max_restorations)
        return Counts(tokens, rows, images, self.args.gradient_accumulation_steps, longest)

    def _placed(self, generator: torch.Generator) -> Options:
        """The rollout's options, with the window of this rollout drawn within `grpo.sde_range`."""
        if self.grpo.sde_choice != "window":
            return self.options
        count = min(self.grpo.sde_steps, self.options.flow_steps)
        low, high = (round(share * (self.options.flow_steps - count)) for share in self.grpo.sde_range)
        first = int(torch.randint(low, high + 1, (1,), generator=generator))
        return replace(self.options, window=(first, first + count))

    def _rewards(
        self, bagel: Bagel, numbers: Sequence[int], prompts: Sequence[Prompt], trajectories: Sequence[Trajectory]
    ) -> list[dict[str, float] | None]:
        """Every reward of every trajectory, whose prompts have these numbers; None where the judge gave no score."""
        questions = [self.task.questions[i] for i in numbers]
        texts = [t.texts(self.task.tokenizer) for t in trajectories]
        accuracy: list[float | None] = [None] * len(texts)
        if self.task.judge is not None:
            accuracy = judged(self.task.judge, questions, [extract_answer(t[-1]) for t in texts])
        more: dict[str, Sequence[float | None]] = {}
        with autocast(bagel):
            if self.grpo.reward_answer:
                rows = bagel, self.task.tokenizer, prompts, trajectories, questions
                more["reward_answer"] = answer_rewards(*rows, self.grpo.answer_scored, self.options.batch)
            if self.task.quality is not None:
                more["reward_latent_quality"] = self.task.quality(bagel, numbers, trajectories)
        found: list[dict[str, float] | None] = []
        for n, (trajectory, question) in enumerate(zip(trajectories, questions, strict=True)):
            if self.task.judge is not None and accuracy[n] is None:
                found.append(None)
                continue
            own = {name: values[n] for name, values in more.items() if values[n] is not None}
            found.append(rewards(texts[n], bool(trajectory.restorations), question, self.grpo, own, accuracy[n]))
        return found

    def _totals(self, parts: list[dict[str, float] | None]) -> tuple[list[float | None], list[float | None]]:
        """What the text and what the image is judged by: the sum of all rewards, or each by its own."""
        if not self.grpo.separate_advantages:
            return ([p and p["reward"] for p in parts],) * 2
        names = {name for p in parts if p for name in p} - {"reward", *IMAGE_REWARDS}
        text = [p and weighted(p, self.grpo, sorted(names)) for p in parts]
        images = {name for name in IMAGE_REWARDS if getattr(self.grpo, name)}
        # What has no image to judge is left out of its group's mean.
        return text, [weighted(p, self.grpo, sorted(images)) if p and images <= set(p) else None for p in parts]

    def _log_rollout(
        self, parts: list[dict | None], restored: list[bool], text: list[float], image: list[float]
    ) -> None:
        """Figures of a step, from the rows of all processes."""
        log, group = self._metrics["train"], self.num_generations
        known = [p for p in parts if p]
        for name in dict.fromkeys(name for p in known for name in p):
            having = [p[name] for p in known if name in p]
            log[name].append(sum(having) / len(having))
        if self.task.judge is not None:
            log["rejected"].append(float(len(parts) - len(known)))
        log["image_advantage"].append(sum(map(abs, image)) / len(image))
        log["call_rate"].append(sum(restored) / len(restored))
        judged = {"groups_with_variance": text}
        if self.grpo.separate_advantages:
            judged["image_groups_with_variance"] = image
        for name, found in judged.items():
            flat = [found[s : s + group] for s in range(0, len(found), group)]
            log[name].append(sum(any(g) for g in flat) / len(flat))

    def _roll_out(self, bagel: Bagel, prompts: Sequence[Prompt], options: Options, generator, seed: int):
        """The groups of all prompts: drawn from one stream, or each from its own."""
        given, group = (bagel, self.task.tokenizer), self.num_generations
        if not self.own_streams:
            return generate(*given, prompts, options, group, generator)
        found = []
        for place, stream in enumerate(streams(seed, "rollout", len(prompts))):
            found += (own := generate(*given, prompts[place : place + 1], options, group, stream))
            for trajectory in own:
                trajectory.prompt = place
        return found

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self.sharded:
            self.sharded.split_reference()  # while the policy still is the incoming one
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _get_grad_norm(self, model, grad_norm=None):
        # A slice that teaches nothing gives every weight a gradient of 0, another none to those that it does not reach:
        # whether the optimiser goes on with their momentum must not depend on how a step is sliced. Sharded weights
        # have one in every step.
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return super()._get_grad_norm(model, grad_norm)

    def _per_process(self, count: int) -> float:
        """Mean of a count over the processes, as the mean of their gradients asks for it; at least one in all."""
        if world() == 1:
            return max(1, count)
        total = self.accelerator.reduce(torch.tensor(count, device=self.accelerator.device)).item()
        return max(1, total) / world()

    def _chosen_steps(self, options: Options, generator: torch.Generator) -> list[int]:
        """The SDE steps that are scored, in order: K distinct ones, those of the window, or all; none without a use."""
        if not self.grpo.image_weight and not self.grpo.velocity_weight:
            return []
        if self.grpo.sde_choice != "random":
            return list(range(*(options.window or (0, options.flow_steps))))
        count = min(self.grpo.sde_steps, options.flow_steps)
        return sorted(torch.randperm(options.flow_steps, generator=generator)[:count].tolist())

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """trl's, timed; the rollout that the first slice of a step asks for is timed apart."""
        begun, apart = time.perf_counter(), sum(self.seconds.values())
        loss = super().training_step(model, inputs, num_items_in_batch)
        apart = sum(self.seconds.values()) - apart
        self.seconds["update"] += time.perf_counter() - begun - apart
        return loss

    def _compute_loss(self, model, inputs: dict[str, Tensor]) -> Tensor:
        """The loss of one slice of the rollout; its figures go to the log."""
        grpo, rollout, bagel = self.grpo, self.rollout, self.accelerator.unwrap_model(model).bagel
        text = grpo.text_weight > 0  # else nothing of the text is scored: a term times 0 costs, and may be NaN
        kept = rollout.taught(inputs["index"].tolist(), text)
        idle = self.sharded is not None and not kept
        if idle:  # every process takes part in every gathering of a layer, here with weight 0
            kept = [int(inputs["index"][0])]
        if not kept:
            return model(lambda policy: sum(p.sum() for p in policy.parameters() if p.requires_grad) * 0.0)
        prompts, chosen, steps = rollout.scored(kept, text)
        request = (prompts, chosen, steps, self.times, self.options.sigma, grpo.temperature, self.token_budget)
        new, reference = scoring.Scores(*model(lambda policy: self._scores(policy, request))), None
        if grpo.compared:
            with torch.no_grad(), autocast(bagel), self._incoming(bagel) as incoming:
                reference = incoming(lambda policy: scoring.score(policy, *request))
        if idle:
            return new.text.sum() * 0.0
        device = new.text.device
        recorded = tuple(values.to(device) for values in scoring.recorded(chosen, steps))
        loss, figures = grpo_loss(new, reference, recorded, rollout.advantages[kept].T.to(device), rollout.counts, grpo)
        if self.token_budget:
            figures["real_tokens"] = new.real
        for name, value in figures.items():
            self._metrics["train"][name].append(value)
        return loss

    def _scores(self, policy: Bagel, request: tuple) -> tuple:
        """The fields of the scores: FSDP finds tensors in a tuple, to wait for their gradients, and not in `Scores`."""
        found = scoring.score(policy, *request)
        if self.sharded:
            found.text = found.text + self.sharded.anchor()
        return tuple(vars(found).values())


def _no_reward(completions, **_) -> list[float]:
    raise RuntimeError("Rewards are computed with the rollout; trl must not ask for them.")


@dataclass
class Done:
    """How a run ended: optimiser steps, and whether the stop rule ended it (the weights are then the best measured).

    seconds_per_step: of a step in this process, by part: rollout, reward, update, holdout.
    """

    steps: int
    stopped: bool
    seconds_per_step: dict[str, float]


def make_trainer(run: StageRun, model: Bagel, task: Task) -> InterleavedGRPO:
    """The trainer of `train`, ready to run. Raises ClearError as `train` does."""
    grpo, processes = run.config.grpo, int(os.environ.get("WORLD_SIZE", 1))
    if sharded.enabled() and lora.has_adapter(model):
        raise ClearError(
            "grpo: adapters need no sharding, and their rollouts none of its gathering; launch it without FSDP "
            "(--multi_gpu), or train all weights with lora.rank = 0."
        )
    if sharded.enabled() and grpo.stop_after:
        raise ClearError("grpo: the stop rule keeps whole weights; under FSDP set grpo.stop_after = 0.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ClearError(f"grpo has nothing to train; grpo.experts = {grpo.experts} and lora.* leave nothing for it.")
    if grpo.prompts % processes:
        raise ClearError(f"params: grpo.prompts = {grpo.prompts} must divide by the {processes} processes.")
    total = grpo.prompts // processes * grpo.group_size
    micro = max(n for n in range(1, min(grpo.rows_per_pass, total) + 1) if total % n == 0)
    accumulation = total // micro
    args = training_arguments(
        GRPOConfig,
        run,
        run.folder / "grpo",
        micro,
        grpo,
        grpo.optimiser,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=accumulation,
        num_generations=grpo.group_size,
        max_completion_length=task.options.max_tokens,
        temperature=grpo.temperature,
        beta=0.0,
        bf16=False,
        activation_checkpointing=False,
        shuffle_dataset=False,
        # A slice without a restoration leaves the last layer's generation expert out. transformers would not expect it
        # of a model that recomputes its layers, and the processes would wait for each other.
        ddp_find_unused_parameters=True,
    )
    args.logging_steps = 1
    args.save_steps = max(1, args.save_steps // LONGER)
    trainer = InterleavedGRPO(Policy(model), task, grpo, args)
    trainer.token_budget = run.config.runtime.token_budget
    trainer.own_streams |= processes > 1 or sharded.enabled()
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(run: StageRun, model: Bagel, task: Task) -> Done:
    """Train `model` in place for `run.config.grpo.steps` steps; resumes from the last complete checkpoint.

    Raises ClearError for adapters under FSDP, if nothing is trainable, if the prompts of a step do not divide by the
    processes, and for a gradient that is no number.
    """
    trainer = make_trainer(run, model, task)
    trainer.add_callback(run.shown("grpo", lambda: trainer.seconds))
    best = run.folder / "best.safetensors"
    rule = StopRule(trainer, best, run.config.grpo)
    if run.config.grpo.stop_after:
        trainer.add_callback(rule)
        trainer.measured = rule.on_measured
    checkpoint = last_complete(run.folder / "grpo")
    first = int(checkpoint.name.split("-")[1]) if checkpoint else 0
    with saved_on_sigterm(trainer):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.sharded:
        trainer.sharded.join()
    if stopped := rule.stopped():
        adopt_trained(trainer.accelerator.unwrap_model(trainer.model), best)
    model.eval()
    hidden = {"step_time", "num_tokens", "frac_reward_zero_std", "grad_norm"}
    rows = curve_rows("grpo", trainer.state.log_history)
    run.curve += [{k: v for k, v in row.items() if k not in hidden and not k.startswith("completions")} for row in rows]
    here = max(1, trainer.state.global_step - first)
    seconds = {name: value / here for name, value in trainer.seconds.items()}
    return Done(trainer.state.global_step, stopped, seconds)

"""Interleaved GRPO on trl's GRPOTrainer (METHOD §4, DESIGN "Interleaved GRPO"). The only module that imports trl.

What stays trl's: sampler (each prompt repeated for its group), generation buffer and accumulation, optimiser and
schedule, checkpoints, metric averaging. What is replaced, because trl's machinery carries text completions only:
`_generate_and_score_completions` (our engine rolls out text and images, our rewards score them) and `_compute_loss`
(one forward per trajectory scores text tokens and SDE steps together). trl's own reference model is off (it would be
reloaded by name); the reference here is a frozen copy of the incoming policy (of its adapter, where it has one), so
the KL is exactly 0 at step 0.

Several processes share the prompts of a step, each with a sampling stream of its own; the loss is normalised by the
tokens and steps of all. Sharded weights (FSDP) are refused: a rollout runs as long as its longest reply, and every
process would have to gather each layer the same number of times.

Departures from the published code: the text loss is normalised by the real number of scored tokens; groups without
reward variance are skipped and counted; the image term may be anchored by the squared distance of the velocity to
the reference's (no pixel supervision).
"""

import contextlib
import copy
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
)
from trl import GRPOConfig, GRPOTrainer

from clear.config import Grpo
from clear.endpoint import Client
from clear.errors import ClearError
from clear.model import flow, lora
from clear.model.bagel import Bagel
from clear.reasoning.engine import Options, Trajectory, generate
from clear.reasoning.grammar import extract_answer
from clear.reasoning.prompts import Prompt
from clear.records import Question
from clear.training import objective, scoring
from clear.training.judging import judged
from clear.training.objective import advantages
from clear.training.parallel import gathered, rank, world
from clear.training.rewards import IMAGE_REWARDS, answer_rewards, rewards, weighted
from clear.training.stopping import StopRule
from clear.training.trainer import (
    MarkComplete,
    Progress,
    StageRun,
    TrainedOnly,
    adopt_trained,
    curve_rows,
    last_complete,
    training_arguments,
)


class PolicyConfig(PretrainedConfig):
    """What trl wants to see of a configuration."""

    model_type = "clear_policy"


class Policy(PreTrainedModel):
    """Bagel in the dress trl expects; all work goes through `bagel`."""

    config_class = PolicyConfig
    base_model_prefix = "bagel"
    main_input_name = "index"

    def __init__(self, bagel: Bagel) -> None:
        super().__init__(PolicyConfig())
        self.bagel = bagel
        self.generation_config = GenerationConfig()
        self.warnings_issued: dict[str, bool] = {}

    def _init_weights(self, module) -> None:
        """Weights come with the bagel."""

    def get_input_embeddings(self):
        """The token embedding."""
        return self.bagel.language_model.model.embed_tokens

    def get_output_embeddings(self):
        """The language head."""
        return self.bagel.language_model.lm_head

    def forward(self, call: Callable[[Bagel], Any]) -> Any:
        """`call(bagel)`: gradients of several processes meet only in what runs inside the policy's forward."""
        with lora.autocast(self.bagel):
            return call(self.bagel)


class InterleavedGRPO(TrainedOnly, GRPOTrainer):
    """GRPO over trajectories of text and restorations."""

    def __init__(
        self,
        policy: Policy,
        tokenizer,
        prompts: Sequence[Prompt],
        questions: Sequence[Question],
        grpo: Grpo,
        options: Options,
        holdout: Callable[[Bagel], float] | None,
        args: GRPOConfig,
        judge: Client | None = None,
    ) -> None:
        self.reference = None
        if lora.has_adapter(policy.bagel):
            lora.add_reference(policy.bagel)
        else:
            self.reference = copy.deepcopy(policy.bagel).eval().requires_grad_(False)
        self.text_tokenizer, self.grpo, self.options = tokenizer, grpo, options
        self.prompts, self.questions, self.holdout = prompts, questions, holdout
        self.judge = judge
        self.measured: Callable[[float], None] | None = None
        self.times = flow.time_grid(options.flow_steps, options.shift).tolist()
        self.rollout: list[Trajectory] = []
        self.seconds = {"rollout": 0.0, "reward": 0.0, "update": 0.0}
        super().__init__(
            model=policy,
            reward_funcs=_no_reward,
            args=args,
            train_dataset=Dataset.from_dict({"prompt": _order(len(prompts), grpo, args.seed)}),
            processing_class=_processing_class(tokenizer, policy.bagel),
            callbacks=[MarkComplete(), Progress("grpo")],
        )
        if self.reference is not None:
            self.reference.to(self.accelerator.device)

    def _incoming(self, bagel: Bagel) -> contextlib.AbstractContextManager[Bagel]:
        """The policy as it came in, for the length of a with block."""
        return lora.reference(bagel) if self.reference is None else contextlib.nullcontext(self.reference)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Average the figures over the processes."""
        self._metrics["train"].update(gathered(dict(self._metrics["train"])))
        super().log(logs, start_time)

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Tensor]:
        """Roll out all groups of a generation batch; returns numbers into `self.rollout` and their advantages."""
        group = self.num_generations
        numbers = [int(row["prompt"]) for row in inputs[::group]]
        bagel = self.accelerator.unwrap_model(self.model).bagel
        if self.holdout and self.grpo.holdout_every and self.state.global_step % self.grpo.holdout_every == 0:
            accuracy = self.holdout(bagel)
            self._metrics["train"]["accuracy_holdout"].append(accuracy)
            if self.measured is not None:
                self.measured(accuracy)
        seed = int(torch.randint(2**31, (1,)))
        generator = torch.Generator().manual_seed((seed + rank()) % 2**31)
        prompts = [self.prompts[i] for i in numbers]
        begun = time.perf_counter()
        options = self._placed(generator)
        with lora.autocast(bagel):
            self.rollout = generate(bagel, self.text_tokenizer, prompts, options, group, generator)
        self.rollout_prompts = [prompts[t.prompt] for t in self.rollout]
        rolled = time.perf_counter()
        parts = self._rewards(bagel, [self.questions[numbers[t.prompt]] for t in self.rollout])
        text, image = (advantages(v, group, self.grpo.scale_advantages) for v in self._totals(parts))
        self.steps = [self._chosen_steps(options, generator) for _ in self.rollout]
        self._log_rollout(parts, text, image)
        counted = [n for n, pair in enumerate(zip(text, image, strict=True)) if any(pair)]
        self.rows = self._per_process(len(counted))
        self.tokens = self._per_process(sum(len(r.ids) - r.forced for n in counted for r in self.rollout[n].replies))
        self.images = self._per_process(sum(len(self.rollout[n].restorations) * len(self.steps[n]) for n in counted))
        self.seconds["rollout"] += rolled - begun
        self.seconds["reward"] += time.perf_counter() - rolled
        found = torch.tensor(text), torch.tensor(image)
        return {"index": torch.arange(len(text)), "advantages": found[0], "image_advantages": found[1]}

    def _placed(self, generator: torch.Generator) -> Options:
        """The rollout's options, with the window of this rollout drawn within `grpo.sde_range`."""
        if self.grpo.sde_choice != "window":
            return self.options
        count = min(self.grpo.sde_steps, self.options.flow_steps)
        low, high = (round(share * (self.options.flow_steps - count)) for share in self.grpo.sde_range)
        first = int(torch.randint(low, high + 1, (1,), generator=generator))
        return replace(self.options, window=(first, first + count))

    def _rewards(self, bagel: Bagel, questions: Sequence[Question]) -> list[dict[str, float] | None]:
        """Every reward of every trajectory, by name; None for one that the judge could not score."""
        texts = [t.texts(self.text_tokenizer) for t in self.rollout]
        accuracy: list[float | None] = [None] * len(texts)
        if self.judge is not None:
            accuracy = judged(self.judge, questions, [extract_answer(t[-1]) for t in texts])
        more: dict[str, list[float]] = {}
        if self.grpo.reward_answer:
            with lora.autocast(bagel):
                rows = bagel, self.text_tokenizer, self.rollout_prompts, self.rollout, questions
                more["reward_answer"] = answer_rewards(*rows, self.grpo.answer_scored, self.options.batch)
        found: list[dict[str, float] | None] = []
        for n, (trajectory, question) in enumerate(zip(self.rollout, questions, strict=True)):
            if self.judge is not None and accuracy[n] is None:
                found.append(None)
                continue
            own = {name: values[n] for name, values in more.items()}
            found.append(rewards(texts[n], bool(trajectory.restorations), question, self.grpo, own, accuracy[n]))
        return found

    def _totals(self, parts: list[dict[str, float] | None]) -> tuple[list[float | None], list[float | None]]:
        """What the text and what the image is judged by: the sum of all rewards, or each by its own."""
        if not self.grpo.separate_advantages:
            return ([p and p["reward"] for p in parts],) * 2
        names = {name for p in parts if p for name in p} - {"reward", *IMAGE_REWARDS}
        text, image = ([p and weighted(p, self.grpo, sorted(n)) for p in parts] for n in (names, IMAGE_REWARDS))
        return text, image

    def _log_rollout(self, parts: list[dict | None], text: list[float], image: list[float]) -> None:
        log, group = self._metrics["train"], self.num_generations
        known = [p for p in parts if p]
        for name in known[0]:
            log[name].append(sum(p[name] for p in known) / len(known))
        if self.judge is not None:
            log["rejected"].append(float(len(parts) - len(known)))
        log["image_advantage"].append(sum(map(abs, image)) / len(image))
        log["call_rate"].append(sum(bool(t.restorations) for t in self.rollout) / len(self.rollout))
        judged = {"groups_with_variance": text}
        if self.grpo.separate_advantages:
            judged["image_groups_with_variance"] = image
        for name, found in judged.items():
            flat = [found[s : s + group] for s in range(0, len(found), group)]
            log[name].append(sum(any(g) for g in flat) / len(flat))

    def _per_process(self, count: int) -> float:
        """Mean of a count over the processes, as the mean of their gradients asks for it; at least one in all."""
        if world() == 1:
            return max(1, count)
        total = self.accelerator.reduce(torch.tensor(count, device=self.accelerator.device)).item()
        return max(1, total) / world()

    def _chosen_steps(self, options: Options, generator: torch.Generator) -> list[int]:
        """The SDE steps that are scored, in order: K distinct ones, those of the window, or all."""
        if self.grpo.sde_choice != "random":
            return list(range(*(options.window or (0, options.flow_steps))))
        count = min(self.grpo.sde_steps, options.flow_steps)
        return sorted(torch.randperm(options.flow_steps, generator=generator)[:count].tolist())

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """trl's, timed; the rollout that the first slice of a step asks for is timed apart."""
        begun, apart = time.perf_counter(), self.seconds["rollout"] + self.seconds["reward"]
        loss = super().training_step(model, inputs, num_items_in_batch)
        apart = self.seconds["rollout"] + self.seconds["reward"] - apart
        self.seconds["update"] += time.perf_counter() - begun - apart
        return loss

    def _compute_loss(self, model, inputs: dict[str, Tensor]) -> Tensor:
        """Clipped text and image terms, KL to the reference and the velocity anchor, of one slice of the rollout."""
        grpo, bagel = self.grpo, self.accelerator.unwrap_model(model).bagel
        rows = zip(*(inputs[name].tolist() for name in ("index", "advantages", "image_advantages")), strict=True)
        text_too = grpo.text_weight > 0 or grpo.beta > 0
        kept = [row for row in rows if any(row[1:]) and (text_too or self.rollout[row[0]].restorations)]
        if not kept:
            return model(lambda policy: sum(p.sum() for p in policy.parameters() if p.requires_grad) * 0.0)
        numbers = [n for n, _, _ in kept]
        chosen = [self.rollout[n] if text_too else _until_restored(self.rollout[n]) for n in numbers]
        steps = [self.steps[n] for n in numbers]
        request = ([self.rollout_prompts[n] for n in numbers], chosen, steps, self.times, self.options.sigma)
        new = model(lambda policy: scoring.score(policy, *request, grpo.temperature))
        old_text, old_image = (recorded.to(new.text.device) for recorded in scoring.recorded(chosen, steps))
        reference = new
        if grpo.beta or grpo.velocity_weight:
            with torch.no_grad(), lora.autocast(bagel), self._incoming(bagel) as incoming:
                reference = scoring.score(incoming, *request, grpo.temperature)
        text_advantage, image_advantage = torch.tensor([r[1:] for r in kept], device=new.text.device).T
        bounds = grpo.clip, grpo.clip_high or grpo.clip
        weight = objective.log_weights(new.text, old_text, new.text_row, grpo.ratio_level)
        gap = reference.text - new.text
        kl = torch.exp(gap) - gap - 1
        terms = objective.policy_terms(grpo.loss_type, weight, new.text, text_advantage[new.text_row], *bounds)
        parts, longest = (
            self.args.gradient_accumulation_steps,
            self.options.max_tokens * (1 + self.options.max_restorations),
        )
        share = self.tokens, self.rows, parts, longest
        text = objective.aggregate(grpo.loss_type, terms + grpo.beta * kl, new.text_row, *share)
        loss = grpo.text_weight * text
        log = self._metrics["train"]
        ratio, image_error = torch.exp(weight), 0.0
        if len(new.image):
            image_weight = new.image - old_image
            image_terms = objective.policy_terms(
                "clip", image_weight, new.image, image_advantage[new.image_row], *bounds
            )
            anchor = ((new.velocity - reference.velocity) ** 2).mean() * len(new.image) / self.images
            loss = loss + grpo.image_weight * (image_terms.sum() / self.images) + grpo.velocity_weight * anchor
            image_ratio = torch.exp(image_weight)
            image_error = (image_ratio - 1).abs().max().item()
            if reference is not new:
                log["velocity_distance"].append(anchor.item())
            log["image_clipped"].append(((image_ratio - 1).abs() > grpo.clip).float().mean().item())
        text_error = 0.0
        if len(new.text):
            text_error = (ratio - 1).abs().max().item()
            log["entropy"].append(new.entropy.mean().item())
            log["clipped"].append(((ratio - 1).abs() > grpo.clip).float().mean().item())
            if reference is not new:
                log["kl"].append(kl.mean().item())
        log["ratio_error"].append(max(text_error, image_error))
        return loss


def _until_restored(trajectory: Trajectory) -> Trajectory:
    """The trajectory up to its last restoration: all that the image term reads."""
    return replace(trajectory, replies=trajectory.replies[: len(trajectory.restorations)])


def _order(count: int, grpo: Grpo, seed: int) -> list[str]:
    """Prompt numbers of the whole run, one shuffled pass after the other.

    trl's own sampler shuffles with a generator that a resumed run would start again in a later epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < grpo.steps * grpo.prompts:
        order += torch.randperm(count, generator=generator).tolist()
    return [str(i) for i in order[: grpo.steps * grpo.prompts]]


def _no_reward(completions, **_) -> list[float]:
    raise RuntimeError("Rewards are computed with the rollout; trl must not ask for them.")


def _processing_class(tokenizer, bagel: Bagel) -> PreTrainedTokenizerFast:
    special = bagel.config.special
    name = tokenizer.id_to_token
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=name(special.bos),
        eos_token=name(special.eos),
        pad_token=name(special.eos),
    )


@dataclass
class Done:
    """How a run ended: optimiser steps, and whether the stop rule ended it (the weights are then the best measured).

    seconds_per_step: of a step in this process, by part: rollout, reward, update.
    """

    steps: int
    stopped: bool
    seconds_per_step: dict[str, float]


def make_trainer(
    run: StageRun,
    model: Bagel,
    tokenizer,
    prompts: Sequence[Prompt],
    questions: Sequence[Question],
    options: Options,
    holdout: Callable[[Bagel], float] | None,
    judge: Client | None = None,
) -> InterleavedGRPO:
    """The trainer of `train`, ready to run. Raises ClearError as `train` does."""
    grpo, processes = run.config.grpo, int(os.environ.get("WORLD_SIZE", 1))
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ClearError(
            "grpo: its rollouts need whole weights; launch it without FSDP (--multi_gpu), with lora.rank > 0."
        )
    if grpo.prompts % processes:
        raise ClearError(f"params: grpo.prompts = {grpo.prompts} must divide by the {processes} processes.")
    total = grpo.prompts // processes * grpo.group_size
    micro = max(n for n in range(1, min(grpo.rows_per_pass, total) + 1) if total % n == 0)
    accumulation = total // micro
    args = training_arguments(
        GRPOConfig,
        run,
        run.folder / "grpo",
        grpo.steps,
        micro,
        grpo.lr,
        grpo.warmup,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=accumulation,
        num_generations=grpo.group_size,
        max_completion_length=options.max_tokens,
        temperature=grpo.temperature,
        beta=0.0,
        bf16=False,
        activation_checkpointing=False,
        shuffle_dataset=False,
    )
    args.logging_steps = 1
    trainer = InterleavedGRPO(Policy(model), tokenizer, prompts, questions, grpo, options, holdout, args, judge)
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(
    run: StageRun,
    model: Bagel,
    tokenizer,
    prompts: Sequence[Prompt],
    questions: Sequence[Question],
    options: Options,
    holdout: Callable[[Bagel], float] | None,
    judge: Client | None = None,
) -> Done:
    """Train `model` in place for `run.config.grpo.steps` steps; resumes from the last complete checkpoint.

    Raises ClearError under FSDP, or if the prompts of a step do not divide by the processes.
    """
    trainer = make_trainer(run, model, tokenizer, prompts, questions, options, holdout, judge)
    best = run.folder / "best.safetensors"
    rule = StopRule(trainer, best, run.config.grpo)
    if run.config.grpo.stop_after:
        trainer.add_callback(rule)
        trainer.measured = rule.on_measured
    checkpoint = last_complete(run.folder / "grpo")
    first = int(checkpoint.name.split("-")[1]) if checkpoint else 0
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stopped := rule.stopped():
        adopt_trained(trainer.accelerator.unwrap_model(trainer.model), best)
    model.eval()
    hidden = {"step_time", "num_tokens", "frac_reward_zero_std", "grad_norm"}
    rows = curve_rows("grpo", trainer.state.log_history)
    run.curve += [{k: v for k, v in row.items() if k not in hidden and not k.startswith("completions")} for row in rows]
    here = max(1, trainer.state.global_step - first)
    seconds = {name: value / here for name, value in trainer.seconds.items()}
    return Done(trainer.state.global_step, stopped, seconds)

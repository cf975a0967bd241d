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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from clear.config import Grpo
from clear.errors import ClearError
from clear.model import flow, lora
from clear.model.bagel import Bagel
from clear.reasoning.engine import Options, Trajectory, generate
from clear.reasoning.prompts import Prompt
from clear.records import Question
from clear.training import scoring
from clear.training.parallel import gathered, rank, world
from clear.training.preemption import saved_on_sigterm
from clear.training.rewards import advantages, rewards
from clear.training.trainer import (
    MarkComplete,
    Progress,
    StageRun,
    TrainedOnly,
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
    ) -> None:
        self.reference = None
        if lora.has_adapter(policy.bagel):
            lora.add_reference(policy.bagel)
        else:
            self.reference = copy.deepcopy(policy.bagel).eval().requires_grad_(False)
        self.text_tokenizer, self.grpo, self.options = tokenizer, grpo, options
        self.prompts, self.questions, self.holdout = prompts, questions, holdout
        self.times = flow.time_grid(options.flow_steps, options.shift).tolist()
        self.rollout: list[Trajectory] = []
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
            self._metrics["train"]["accuracy_holdout"].append(self.holdout(bagel))
        seed = int(torch.randint(2**31, (1,)))
        generator = torch.Generator().manual_seed((seed + rank()) % 2**31)
        prompts = [self.prompts[i] for i in numbers]
        with lora.autocast(bagel):
            self.rollout = generate(bagel, self.text_tokenizer, prompts, self.options, group, generator)
        self.rollout_prompts = [prompts[t.prompt] for t in self.rollout]
        parts = []
        for trajectory in self.rollout:
            question = self.questions[numbers[trajectory.prompt]]
            texts = trajectory.texts(self.text_tokenizer)
            parts.append(rewards(texts, bool(trajectory.restorations), question, self.grpo))
        found = advantages([p["reward"] for p in parts], group, self.grpo.scale_advantages)
        self.steps = [self._chosen_steps(generator) for _ in self.rollout]
        log = self._metrics["train"]
        for name in parts[0]:
            log[name].append(sum(p[name] for p in parts) / len(parts))
        log["call_rate"].append(sum(bool(t.restorations) for t in self.rollout) / len(self.rollout))
        flat = [found[s : s + group] for s in range(0, len(found), group)]
        log["groups_with_variance"].append(sum(any(g) for g in flat) / len(flat))
        counted = [n for n, a in enumerate(found) if a != 0.0]
        self.tokens = self._per_process(sum(len(r.ids) - r.forced for n in counted for r in self.rollout[n].replies))
        self.images = self._per_process(sum(len(self.rollout[n].restorations) * len(self.steps[n]) for n in counted))
        return {"index": torch.arange(len(found)), "advantages": torch.tensor(found)}

    def _per_process(self, count: int) -> float:
        """Mean of a count over the processes, as the mean of their gradients asks for it; at least one in all."""
        if world() == 1:
            return max(1, count)
        total = self.accelerator.reduce(torch.tensor(count, device=self.accelerator.device)).item()
        return max(1, total) / world()

    def _chosen_steps(self, generator: torch.Generator) -> list[int]:
        """K distinct SDE steps, in order."""
        count = min(self.grpo.sde_steps, self.options.flow_steps)
        return sorted(torch.randperm(self.options.flow_steps, generator=generator)[:count].tolist())

    def _compute_loss(self, model, inputs: dict[str, Tensor]) -> Tensor:
        """Clipped text and image terms, KL to the reference and the velocity anchor, of one slice of the rollout."""
        bagel = self.accelerator.unwrap_model(model).bagel
        kept = [(int(n), float(a)) for n, a in zip(inputs["index"], inputs["advantages"], strict=True) if a != 0]
        if not kept:
            return model(lambda policy: sum(p.sum() for p in policy.parameters() if p.requires_grad) * 0.0)
        numbers = [n for n, _ in kept]
        chosen = [self.rollout[n] for n in numbers]
        steps = [self.steps[n] for n in numbers]
        request = ([self.rollout_prompts[n] for n in numbers], chosen, steps, self.times, self.options.sigma)
        new = model(lambda policy: scoring.score(policy, *request, self.grpo.temperature))
        old_text, old_image = (recorded.to(new.text.device) for recorded in scoring.recorded(chosen, steps))
        with torch.no_grad(), lora.autocast(bagel), self._incoming(bagel) as incoming:
            reference = scoring.score(incoming, *request, self.grpo.temperature)
        advantage = torch.tensor([a for _, a in kept], device=new.text.device)
        ratio = torch.exp(new.text - old_text)
        gap = reference.text - new.text
        kl = torch.exp(gap) - gap - 1
        text = self._clipped(ratio, advantage[new.text_row]) + self.grpo.beta * kl
        loss = text.sum() / self.tokens
        log = self._metrics["train"]
        image_error = 0.0
        if len(new.image):
            image_ratio = torch.exp(new.image - old_image)
            image = self._clipped(image_ratio, advantage[new.image_row]).sum() / self.images
            anchor = ((new.velocity - reference.velocity) ** 2).mean() * len(new.image) / self.images
            loss = loss + self.grpo.image_weight * image + self.grpo.velocity_weight * anchor
            image_error = (image_ratio - 1).abs().max().item()
            log["velocity_distance"].append(anchor.item())
        log["kl"].append(kl.mean().item())
        log["entropy"].append(new.entropy.mean().item())
        log["ratio_error"].append(max((ratio - 1).abs().max().item(), image_error))
        log["clipped"].append(((ratio - 1).abs() > self.grpo.clip).float().mean().item())
        return loss

    def _clipped(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        """−min(ρA, clip(ρ, 1 ± ε)·A), per element."""
        low, high = 1 - self.grpo.clip, 1 + self.grpo.clip
        return -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)


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


def train(
    run: StageRun,
    model: Bagel,
    tokenizer,
    prompts: Sequence[Prompt],
    questions: Sequence[Question],
    options: Options,
    holdout: Callable[[Bagel], float] | None,
) -> None:
    """Train `model` in place for `run.config.grpo.steps` steps; resumes from the last complete checkpoint.

    Raises ClearError under FSDP, or if the prompts of a step do not divide by the processes.
    """
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
    folder: Path = run.folder / "grpo"
    args = training_arguments(
        GRPOConfig,
        run,
        folder,
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
    trainer = InterleavedGRPO(Policy(model), tokenizer, prompts, questions, grpo, options, holdout, args)
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_complete(folder)
    with saved_on_sigterm(trainer):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    model.eval()
    hidden = {"step_time", "num_tokens", "frac_reward_zero_std", "grad_norm"}
    rows = curve_rows("grpo", trainer.state.log_history)
    run.curve += [{k: v for k, v in row.items() if k not in hidden and not k.startswith("completions")} for row in rows]

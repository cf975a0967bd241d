"""Supervised optimisation of a stage, one or more phases, on transformers' Trainer.

This module adds to the Trainer only what it lacks: an `Objective` that computes its own loss from sample numbers, a
folder keyed by the stage's inputs (`run`) so that the same command resumes and another one never picks up its
checkpoints, checkpoints that count only once they are complete (`saved`), and phases whose finished weights are kept
until the stage succeeds. All randomness of a loss comes from torch's global generator, whose state the Trainer stores,
so a resumed run continues with the same numbers.

Several processes (accelerate launch). Every process is given the whole batch and draws for all of it, so that the
numbers are those of one process; `parallel.share_batch` then leaves it its own rows, and `Share.weight` makes means
over the batch's tokens of the processes' own means. A loss that does not share computes the whole batch everywhere,
which is correct but saves nothing. After each step and in checkpoints all processes have the first one's random state,
so a run may resume on another number of processes. Only the first process writes. Checkpoints contain the trained
weights; under FSDP they are sharded.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from clear.data.io import replacing, write_text
from clear.errors import ClearError
from clear.model.checkpoint import save_tensors
from clear.model.mot import LanguageModel
from clear.model.runtime import device, precision
from clear.schema import Grpo, Optimiser, Phase
from clear.training.loop import sharded
from clear.training.loop.parallel import Pass, barrier, gathered, one_pass, one_random_state, rank, world
from clear.training.loop.preemption import saved_on_sigterm
from clear.training.loop.run import StageRun, curve_rows
from clear.training.loop.saved import Ema, MarkComplete, TrainedOnly, adopt_trained, last_complete, trained_state

Loss = Callable[[list[int]], tuple[Tensor, dict[str, float]]]


class Objective(nn.Module):
    """A module and its loss as one model for the Trainer: forward takes sample numbers and returns the loss."""

    def __init__(self, module: nn.Module, loss: Loss, precision: str) -> None:
        super().__init__()
        self.module = module
        self._loss = loss
        self._bf16 = precision == "bfloat16"
        self.anchored = False
        self.logged: dict[str, list[float]] = {}

    def forward(self, index: Tensor) -> dict[str, Tensor]:
        """index (B,) long → {"loss": scalar}; side figures are averaged into the log."""
        with torch.autocast(index.device.type, torch.bfloat16, enabled=self._bf16):
            loss, figures = self._loss(index.tolist())
        for name, value in figures.items():
            self.logged.setdefault(name, []).append(value)
        if world() > 1:
            one_random_state(index.device)
        if self.anchored:
            # Sharded gradients are exchanged for a group of parameters at once, so each must have one everywhere.
            loss = loss + 0.0 * sum(
                p.float().sum() for p in self.parameters() if p.requires_grad and not isinstance(p, DTensor)
            )
        return {"loss": loss}


class _Trainer(TrainedOnly, Trainer):
    """The Trainer, with the objective's side figures in every log line and the whole batch in every process."""

    rows_per_pass = token_budget = 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        objective = self.accelerator.unwrap_model(self.model)
        if "loss" in logs:
            for name, values in gathered(objective.logged).items():
                logs[name] = sum(values) / len(values)
            objective.logged = {}
        super().log(logs, start_time)

    def _open_log(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"log_{rank()}.json"

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.state.global_step > self._globalstep_last_logged:  # saved on request, between two log lines
            logged = self.accelerator.unwrap_model(self.model).logged
            content = [self._globalstep_last_logged, self._tr_loss.item(), logged]
            self._open_log(output_dir).write_text(json.dumps(content))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and self._open_log(checkpoint).exists():
            self._globalstep_last_logged, loss, logged = json.loads(self._open_log(checkpoint).read_text())
            self._tr_loss.fill_(loss)
            self.accelerator.unwrap_model(self.model).logged = logged

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """One step, in as many passes as `rows_per_pass` and `token_budget` ask for."""
        if not (self.rows_per_pass or self.token_budget):
            return super().training_step(model, inputs, num_items_in_batch)
        now, state, total = Pass(self.rows_per_pass, self.token_budget), self._random_state(), 0.0
        while now.number < now.passes:
            if now.number:
                # Each pass draws for the whole batch again, as one pass would; only its rows are computed.
                self._set_random_state(state)
            with one_pass(now):
                total = total + super().training_step(model, inputs, num_items_in_batch)
            now.number += 1
        if self.token_budget and now.tokens:
            logged = self.accelerator.unwrap_model(self.model).logged
            logged.setdefault("real_tokens", []).append(now.real / now.tokens)
            logged.setdefault("passes", []).append(now.passes)
        return total

    @staticmethod
    def _random_state() -> tuple[Tensor, list[Tensor]]:
        return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    @staticmethod
    def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
        torch.set_rng_state(state[0])
        if state[1]:
            torch.cuda.set_rng_state_all(state[1])

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        if world() > 1:  # accelerate has made this a sampler of every n-th batch; here all processes take every one
            loader.batch_sampler.num_processes, loader.batch_sampler.process_index = 1, 0
        return loader


class LogLast(TrainerCallback):
    """Logs the last steps of a phase as well where `log_every` does not divide them; the Trainer drops those."""

    def on_step_end(self, args, state, control, **_) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True


class Progress(TrainerCallback):
    """A progress bar on a terminal; elsewhere (DVC's log, CI) one line per tenth of the steps."""

    def __init__(self, name: str) -> None:
        self._bar = None
        self._name = name
        self._figures: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **_) -> None:
        hidden = None if rank() == 0 else True  # None: shown on a terminal
        total, first = state.max_steps, state.global_step
        self._bar = tqdm(total=total, initial=first, desc=self._name, disable=hidden, mininterval=1)

    def on_step_end(self, args, state, control, **_) -> None:
        self._bar.update(1)
        if rank() == 0 and self._bar.disable and state.global_step % max(1, state.max_steps // 10) == 0:
            shown = " ".join(f"{k} {v:.4g}" for k, v in self._figures.items() if isinstance(v, float))
            print(f"{self._name} {state.global_step}/{state.max_steps} {shown}", file=sys.stderr, flush=True)

    def on_log(self, args, state, control, logs=None, **_) -> None:
        hidden = ("epoch", "learning_rate", "grad_norm")
        self._figures = {k: float(v) for k, v in (logs or {}).items() if k not in hidden and isinstance(v, int | float)}
        self._bar.set_postfix({k: f"{v:.3g}" for k, v in list(self._figures.items())[:4]}, refresh=False)

    def on_train_end(self, args, state, control, **_) -> None:
        self._bar.close()


def training_arguments(
    kind: type, run: StageRun, folder: Path, batch: int, phase: Phase | Grpo, optimiser: Optimiser, **more
):
    """The arguments every optimisation here shares, as `kind` (TrainingArguments or a subclass).

    `batch` samples are computed at a time; `phase` has the steps, the learning rate and the warm-up.
    """
    runtime = run.config.runtime
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        more["accelerator_config"] = {"even_batches": False}
        if sharded.enabled():
            # Else the gradients of all weights stay whole in every process until the last part of a step.
            more["accelerator_config"]["gradient_accumulation_kwargs"] = {"sync_each_batch": True}
    args = kind(
        output_dir=str(folder),
        max_steps=phase.steps,
        per_device_train_batch_size=batch,
        learning_rate=phase.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": optimiser.lr_floor},
        warmup_steps=min(phase.warmup, phase.steps),
        weight_decay=optimiser.weight_decay,
        adam_beta1=optimiser.beta1,
        adam_beta2=optimiser.beta2,
        adam_epsilon=optimiser.eps,
        max_grad_norm=optimiser.clip,
        logging_steps=min(runtime.log_every, phase.steps),
        logging_nan_inf_filter=False,
        save_steps=runtime.checkpoint_every,
        save_total_limit=2,
        seed=run.config.seed,
        data_seed=run.config.seed,
        use_cpu=device(run.config) == "cpu",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        **more,
    )
    args._n_gpu = min(1, args.n_gpu)  # one process uses one GPU; several are accelerate's business
    return args


def optimise(
    run: StageRun, name: str, module: nn.Module, loss: Loss, samples: int, phase: Phase, ema: float = 0.0
) -> None:
    """Train `module` in place for one phase: `loss(sample numbers) -> (scalar, figures)` over `samples` samples.

    `phase.batch` is the batch of all processes together. Resumes from the last complete checkpoint of the same run;
    a finished phase is loaded, not repeated. With `ema` the module ends with averaged weights. Raises ClearError if
    nothing is trainable or there is no sample, for a gradient that is no number, and for a second phase in one process
    under FSDP.
    """
    if phase.steps == 0:
        return
    finished, curve = run.folder / f"{name}.safetensors", run.folder / f"{name}.json"
    if finished.exists():
        adopt_trained(module, finished)
        run.curve += json.loads(curve.read_text())
        return
    if not any(p.requires_grad for p in module.parameters()):
        raise ClearError(f"phase {name} has nothing to train; lora.experts or lora.targets leave nothing for it.")
    if not samples:
        raise ClearError(f"phase {name} has no sample to learn from; bring data for it, or set its steps to 0.")
    sharded.require_fresh(module, f"phase {name}")
    folder = run.folder / (f"{name}_sharded" if sharded.enabled() else name)
    args = training_arguments(TrainingArguments, run, folder, phase.batch, phase, run.config.optimiser, label_names=[])
    objective = Objective(module, loss, precision(run.config))
    average = [Ema(objective, ema)] if ema else []
    trainer = _Trainer(
        model=objective,
        args=args,
        train_dataset=list(range(samples)),
        data_collator=lambda batch: {"index": torch.tensor(batch)},
        callbacks=[*average, LogLast(), MarkComplete(), Progress(name), run.shown(name)],
    )
    trainer.phase, trainer.rows_per_pass = f"phase {name}", run.config.runtime.rows_per_pass
    trainer.token_budget = run.config.runtime.token_budget
    trainer.remove_callback(PrinterCallback)
    module.train()
    _always_both_experts(objective)
    checkpoint = last_complete(folder)
    with saved_on_sigterm(trainer) as leave:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    for one in average:
        one.apply()
    _unshard(module)
    module.eval()
    rows = curve_rows(name, trainer.state.log_history)
    run.curve += rows
    if rank() == 0:
        write_text(curve, json.dumps(rows))
        with replacing(finished) as partial:
            save_tensors(trained_state(module), partial)
        shutil.rmtree(folder, ignore_errors=True)
    barrier()
    if leave():
        raise KeyboardInterrupt


def _always_both_experts(objective: Objective) -> None:
    """Under FSDP every parameter takes part in every step, if need be with no token.

    So weights that no row of a batch uses get a zero gradient there, and AdamW goes on with their momentum; elsewhere
    they get none and stay as they are.
    """
    objective.anchored = sharded.enabled()
    for part in objective.modules():
        if isinstance(part, LanguageModel):
            for layer in part.model.layers:
                layer.always_both = objective.anchored


def _unshard(module: nn.Module) -> None:
    """Replace sharded parameters by whole ones on the first process's CPU, which can then save the module.

    The others keep none: a host has no room for as many whole models as it has GPUs.
    """
    for part in module.modules():
        for name, value in list(part._parameters.items()):
            if isinstance(value, DTensor):
                full = value.detach().full_tensor()
                full = full.to("cpu" if rank() == 0 else "meta")
                part._parameters[name] = nn.Parameter(full, requires_grad=value.requires_grad)

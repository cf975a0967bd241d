"""Supervised optimisation of a stage, one or more phases, on transformers' Trainer.

This module adds to the Trainer only what it lacks: an `Objective` that computes its own loss from sample numbers, a
folder keyed by the stage's inputs so that the same command resumes and another one never picks up foreign
checkpoints, checkpoints that count only once they are complete, and phases whose finished weights are kept until
the stage succeeds. All randomness of a loss comes from torch's global generator, whose state the Trainer stores, so
a resumed run continues with the same numbers.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from clear.config import Config, Phase

Loss = Callable[[list[int]], tuple[Tensor, dict[str, float]]]
_COMPLETE = "complete"


class StageRun:
    """The private working folder of one stage run and the training curves collected so far."""

    def __init__(self, stage: str, config: Config, inputs: Sequence[Path | str], home: Path) -> None:
        """`inputs` are the files or folders whose content, with the parameters, identifies this run."""
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs a tenth of the time
        self.config = config
        digest = hashlib.sha256(json.dumps([stage, _relevant(config)], sort_keys=True).encode())
        for path in inputs:
            for file in sorted(Path(path).rglob("*")) if Path(path).is_dir() else [Path(path)]:
                if file.is_file():
                    digest.update(hashlib.sha256(file.read_bytes()).digest())
        self.folder = home / digest.hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.curve: list[dict[str, Any]] = []

    def finish(self, curve: Path | str) -> None:
        """Write the training curves as CSV and delete the working folder: the stage has succeeded."""
        write_curve(curve, self.curve)
        shutil.rmtree(self.folder)


def _relevant(config: Config) -> dict:
    plain = asdict(config)
    for section in ("report", "evaluate"):
        plain.pop(section)
    for name in ("checkpoint_every", "log_every"):
        plain["runtime"].pop(name)
    return plain


def write_curve(path: Path | str, rows: list[dict[str, Any]]) -> None:
    """Rows of {phase, step, metric: value} as CSV with the union of the metrics; absent values stay empty."""
    names = ["phase", "step", *sorted({key for row in rows for key in row} - {"phase", "step"})]
    lines = [",".join(names)]
    for row in rows:
        values = (row.get(name, "") for name in names)
        lines.append(",".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in values))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join(lines) + "\n")


class Objective(nn.Module):
    """A module and its loss as one model for the Trainer: forward takes sample numbers and returns the loss."""

    def __init__(self, module: nn.Module, loss: Loss, precision: str) -> None:
        super().__init__()
        self.module = module
        self._loss = loss
        self._bf16 = precision == "bfloat16"
        self.logged: dict[str, list[float]] = {}

    def forward(self, index: Tensor) -> dict[str, Tensor]:
        """index (B,) long → {"loss": scalar}; side figures are averaged into the log."""
        with torch.autocast(index.device.type, torch.bfloat16, enabled=self._bf16):
            loss, figures = self._loss(index.tolist())
        for name, value in figures.items():
            self.logged.setdefault(name, []).append(value)
        return {"loss": loss}


class _Trainer(Trainer):
    """The Trainer, with the objective's side figures in every log line."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        objective = self.accelerator.unwrap_model(self.model)
        if "loss" in logs:
            for name, values in objective.logged.items():
                logs[name] = sum(values) / len(values)
            objective.logged = {}
        super().log(logs, start_time)


class Progress(TrainerCallback):
    """A progress bar on a terminal; elsewhere (DVC's log, CI) one line per tenth of the steps."""

    def __init__(self, name: str) -> None:
        self._bar = None
        self._name = name
        self._figures: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **_) -> None:
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self._name, disable=None, mininterval=1)

    def on_step_end(self, args, state, control, **_) -> None:
        self._bar.update(1)
        if self._bar.disable and state.global_step % max(1, state.max_steps // 10) == 0:
            shown = " ".join(f"{k} {v:.4g}" for k, v in self._figures.items() if isinstance(v, float))
            print(f"{self._name} {state.global_step}/{state.max_steps} {shown}", file=sys.stderr, flush=True)

    def on_log(self, args, state, control, logs=None, **_) -> None:
        hidden = ("epoch", "learning_rate", "grad_norm")
        self._figures = {k: float(v) for k, v in (logs or {}).items() if k not in hidden and isinstance(v, int | float)}
        self._bar.set_postfix({k: f"{v:.3g}" for k, v in list(self._figures.items())[:4]}, refresh=False)

    def on_train_end(self, args, state, control, **_) -> None:
        self._bar.close()


class MarkComplete(TrainerCallback):
    """Write the mark of a complete checkpoint last, so that a kill inside a save leaves none."""

    def on_save(self, args, state, control, **_) -> None:
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _COMPLETE).touch()


def last_complete(folder: Path) -> Path | None:
    """The newest complete checkpoint of a phase; incomplete ones are removed."""
    found = []
    for path in folder.glob("checkpoint-*"):
        if (path / _COMPLETE).exists():
            found.append(path)
        else:
            shutil.rmtree(path)
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


def training_arguments(kind: type, run: StageRun, folder: Path, steps: int, batch: int, lr: float, warmup: int, **more):
    """The arguments every optimisation here shares, as `kind` (TrainingArguments or a subclass)."""
    runtime = run.config.runtime
    return kind(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=min(warmup, steps),
        weight_decay=0.01,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        logging_steps=min(runtime.log_every, steps),
        logging_nan_inf_filter=False,
        save_steps=runtime.checkpoint_every,
        save_total_limit=2,
        seed=run.config.seed,
        data_seed=run.config.seed,
        use_cpu=runtime.device == "cpu" or not torch.cuda.is_available(),
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        **more,
    )


def optimise(run: StageRun, name: str, module: nn.Module, loss: Loss, samples: int, phase: Phase) -> None:
    """Train `module` in place for one phase: `loss(sample numbers) -> (scalar, figures)` over `samples` samples.

    Resumes from the last complete checkpoint of the same run; a finished phase is loaded, not repeated.
    """
    if phase.steps == 0:
        return
    finished, curve = run.folder / f"{name}.safetensors", run.folder / f"{name}.json"
    if finished.exists():
        module.load_state_dict(load_file(finished))
        run.curve += json.loads(curve.read_text())
        return
    folder = run.folder / name
    args = training_arguments(
        TrainingArguments, run, folder, phase.steps, phase.batch, phase.lr, phase.warmup, label_names=[]
    )
    objective = Objective(module, loss, run.config.runtime.precision)
    trainer = _Trainer(
        model=objective,
        args=args,
        train_dataset=list(range(samples)),
        data_collator=lambda batch: {"index": torch.tensor(batch)},
        callbacks=[MarkComplete(), Progress(name)],
    )
    trainer.remove_callback(PrinterCallback)
    module.train()
    checkpoint = last_complete(folder)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    module.eval()
    rows = curve_rows(name, trainer.state.log_history)
    run.curve += rows
    curve.write_text(json.dumps(rows))
    partial = finished.with_suffix(".partial")
    save_file({k: v.contiguous() for k, v in module.state_dict().items()}, partial)
    partial.rename(finished)
    shutil.rmtree(folder, ignore_errors=True)


def curve_rows(phase: str, history: list[dict]) -> list[dict[str, Any]]:
    """The Trainer's log lines without clocks."""
    hidden = {"step", "epoch", "learning_rate", "total_flos"}
    rows = []
    for line in history:
        figures = {k: v for k, v in line.items() if k not in hidden and not k.startswith("train_")}
        if "loss" in figures:
            rows.append({"phase": phase, "step": line["step"], **figures})
    return rows

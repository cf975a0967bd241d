"""What is saved while a phase trains, and how it is taken up again: weights, averages, random states, the marker.

Checkpoints hold what is trained and no more, count only once they are complete, and have the random state of the first
process, so that a run may resume on another number of processes.
"""

import json
import math
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback

from clear.data.io import asked_again, sync, write_json
from clear.data.records import file_sha256
from clear.errors import ClearError, say
from clear.model.checkpoint import save_tensors
from clear.training.loop.parallel import barrier, copy_whole, rank, whole

_COMPLETE = "complete"
_WEIGHTS, _EMA = "model.safetensors", "ema.safetensors"


class TrainedOnly:
    """For a Trainer: checkpoints hold only what is trained, and one random state for all processes; and no step is
    taken with a gradient that is no number, after which all weights would be none."""

    phase = ""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        found = super()._get_grad_norm(model, grad_norm)
        if found is not None and not math.isfinite(float(found)):
            raise ClearError(
                f"{self.phase}: the gradient of step {self.state.global_step + 1} is {float(found)}, and its step was "
                f"not taken; lower the learning rate ({self.args.learning_rate:g}) or look for a value of the data "
                "that is none. The last checkpoint is kept."
            )
        return found

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_tensors(trained_state(self.accelerator.unwrap_model(self.model)), Path(output_dir) / _WEIGHTS)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with asked_again(Path(self.args.output_dir)):  # torch.save has no reason for what it could not write
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:  # there the optimiser's checkpoint brings the sharded weights along
            self._save(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            adopt_trained(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint) / _WEIGHTS)

    def _save_rng_state(self, output_dir: str) -> None:
        if self.args.should_save:
            super()._save_rng_state(output_dir)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        found = [Path(checkpoint) / name for name in ("rng_state.pth", "rng_state_0.pth")]
        file = next((path for path in found if path.exists()), None)
        if file is None:
            raise ClearError(f"{checkpoint} has no random state; delete it, and the phase starts from the one before.")
        if self.args.world_size == 1 and file.name == "rng_state.pth":
            super()._load_rng_state(checkpoint)
            return
        numpy_parts = [np._core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]
        with torch.serialization.safe_globals(numpy_parts):
            state = torch.load(file, weights_only=True)
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["cpu"])
        if torch.cuda.is_available() and "cuda" in state:
            first = state["cuda"][0] if isinstance(state["cuda"], list) else state["cuda"]
            torch.cuda.set_rng_state(first)


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """What training changes of a module: its state without what is frozen, whole, on the CPU."""
    frozen = _frozen(module)
    return {k: whole(v).contiguous() for k, v in module.state_dict().items() if k not in frozen}


def adopt_trained(module: nn.Module, file: Path) -> None:
    """Load a `trained_state`. Raises ClearError if the file is of another set of parameters."""
    state, frozen = load_file(file), _frozen(module)
    found = module.load_state_dict(state, strict=False)
    if set(found.missing_keys) - frozen or found.unexpected_keys:
        raise ClearError(f"{file} belongs to another set of trained parameters; delete it and repeat the command.")


def _frozen(module: nn.Module) -> set[str]:
    """Parameters without gradients, and buffers: the weights of quantised layers."""
    fixed = {name for name, value in module.named_parameters() if not value.requires_grad}
    return fixed | {name for name, _ in module.named_buffers()}


class Ema(TrainerCallback):
    """Exponential moving average of the trained parameters, float32, saved with the checkpoints."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module, self._decay = module, decay
        self._mean: dict[str, Tensor] = {}

    def _trained(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self._module.named_parameters() if p.requires_grad}

    def on_train_begin(self, args, state, control, **_) -> None:
        self._mean = {name: p.float().clone() for name, p in self._trained().items()}
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / _EMA
        if state.global_step and file.exists():
            for name, value in load_file(file).items():
                copy_whole(self._mean[name], value)

    @torch.no_grad()
    def on_step_end(self, args, state, control, **_) -> None:
        for name, value in self._trained().items():
            self._mean[name].lerp_(value.float(), 1 - self._decay)

    def on_save(self, args, state, control, **_) -> None:
        found = {}
        for name, value in self._mean.items():
            full = whole(value)  # all processes take part, one keeps it
            found |= {name: full} if rank() == 0 else {}
        if rank() == 0:
            save_tensors(found, Path(args.output_dir) / f"checkpoint-{state.global_step}" / _EMA)

    @torch.no_grad()
    def apply(self) -> None:
        """Put the average into the module."""
        for name, value in self._trained().items():
            value.copy_(self._mean[name])


class MarkComplete(TrainerCallback):
    """Write the marker of a complete checkpoint last, so that a save that is killed leaves none.

    No checkpoint is saved at the last step: the Trainer would resume from it and run one extra step.
    """

    def on_step_end(self, args, state, control, **_) -> None:
        control.should_save = control.should_save and state.global_step < state.max_steps

    def on_save(self, args, state, control, **_) -> None:
        barrier()
        if rank() == 0:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            sync(folder)
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            write_json(folder / _COMPLETE, {str(file.relative_to(folder)): file_sha256(file) for file in files})


def last_complete(folder: Path) -> Path | None:
    """The newest complete checkpoint of a phase that is as it was written; the first process removes any newer one."""
    barrier()
    for path in sorted(folder.glob("checkpoint-*"), key=_step, reverse=True) if rank() == 0 else ():
        if not (path / _COMPLETE).exists():
            shutil.rmtree(path)
        elif damaged := _damaged(path):
            say(f"{damaged}: not what was written; the training goes back to the checkpoint before.", sys.stderr)
            shutil.rmtree(path)
        else:
            break
    barrier()
    found = (path for path in folder.glob("checkpoint-*") if (path / _COMPLETE).exists())
    return max(found, key=_step, default=None)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _damaged(checkpoint: Path) -> Path | None:
    """The first file of a complete checkpoint that its marker knows and that is gone or another one, or the marker."""
    marker = checkpoint / _COMPLETE
    try:
        known = dict(json.loads(marker.read_text() or "{}"))
    except (ValueError, TypeError):
        return marker
    files = ((checkpoint / name, digest) for name, digest in known.items())
    return next((file for file, digest in files if not file.is_file() or file_sha256(file) != digest), None)

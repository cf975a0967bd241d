"""Where a training shows itself while it runs: DVCLive, TensorBoard, MLflow, Weights & Biases (`runtime.trackers`).

A callback beside a phase (`Trackers`), with three things to say to a tracker: figures, a picture, the end. Each tracker
is its library's own writer behind these. transformers' integrations are not used: they also write all 120
arguments of the Trainer as parameters (which `dvc exp show` would list), upload models, and know no pictures.

Nothing here changes a result. The random states are put back after whatever a tracker or the panel does, no stage has
these files as an output, and this file is no dependency of a stage. A tracker that fails is dropped with one warning.
"""

import importlib.util
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from transformers import TrainerCallback

from clear.data.workspace import home, profile
from clear.errors import ClearError, one_line, say
from clear.training.loop.parallel import rank

LIVE = Path("dvclive")
"""Folder of the training in progress or else the last one; data/dvc.yaml names it, so that DVC shows its figures."""

_HIDDEN = ("epoch", "total_flos")


class Tracker(Protocol):
    """What the training asks of a tracker; `step` counts optimiser steps of the phase. Whatever it raises ends it."""

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        """Note finite figures of a step."""

    def picture(self, step: int, image: Image.Image) -> None:
        """Note the panel of a step (RGB)."""

    def end(self) -> None:
        """The phase has ended."""


class _DvcLive:
    def __init__(self, stage: str, phase: str, step: int) -> None:
        from dvclive import Live

        # No dvc.yaml of its own: DVC reads none that git ignores. In `dvc exp run` the files would else be added to the
        # experiment's commit, clocks and all.
        live = Live(str(LIVE), resume=step > 0, save_dvc_exp=False, dvcyaml=None)
        live._inside_dvc_exp = False
        self.live, self.name = live, f"{stage}/{phase}"

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        self.live.step = step
        for name, value in values.items():
            self.live.log_metric(f"{self.name}/{name}", value)
        self.live.next_step()

    def picture(self, step: int, image: Image.Image) -> None:
        self.live.step = step
        self.live.log_image(f"{self.name}/{step}.png", image)
        self.live.sync()

    def end(self) -> None:
        self.live.end()


class _TensorBoard:
    def __init__(self, stage: str, phase: str, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder("tensorboard") / stage / phase, purge_step=step + 1 if step else None)

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def picture(self, step: int, image: Image.Image) -> None:
        self.writer.add_image("panel", np.asarray(image), step, dataformats="HWC")
        self.writer.flush()

    def end(self) -> None:
        self.writer.close()


class _MLflow:
    """A run in `MLFLOW_TRACKING_URI`, or else in a local database; a training that is resumed starts a second run."""

    def __init__(self, stage: str, phase: str, step: int) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # by default a server that is down costs minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow.tracking import MlflowClient

        where = os.environ.get("MLFLOW_TRACKING_URI")
        self.client = MlflowClient(where or f"sqlite:///{folder('mlflow')}/mlflow.db")
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "clear")
        found = self.client.get_experiment_by_name(name)
        kept = None if where else folder("mlflow").as_uri()
        experiment = found.experiment_id if found else self.client.create_experiment(name, kept)
        tags = {"stage": stage, "phase": phase, "profile": profile()}
        self.run = self.client.create_run(experiment, tags=tags, run_name=f"{stage}/{phase}").info.run_id

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.run, [Metric(name, value, now, step) for name, value in values.items()])

    def picture(self, step: int, image: Image.Image) -> None:
        self.client.log_image(self.run, image, f"panel/{step:06d}.png")

    def end(self) -> None:
        self.client.set_terminated(self.run)


class _Wandb:
    """A run of Weights & Biases; offline (`wandb sync` sends it later) unless its environment names a key or a mode."""

    def __init__(self, stage: str, phase: str, step: int) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        self.image, silent = wandb.Image, wandb.Settings(silent=True, console="off", disable_git=True)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "clear"),
            name=f"{stage}/{phase}",
            group=profile(),
            dir=folder("wandb"),
            mode=mode,
            settings=silent,
        )

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def picture(self, step: int, image: Image.Image) -> None:
        self.run.log({"panel": self.image(image)}, step=step)

    def end(self) -> None:
        self.run.finish()


TRACKERS: dict[str, Callable[[str, str, int], Tracker]] = {
    "dvclive": _DvcLive,
    "tensorboard": _TensorBoard,
    "mlflow": _MLflow,
    "wandb": _Wandb,
}
"""Name → what opens the tracker, given the stage, the phase and the step it resumes from."""


def folder(tracker: str) -> Path:
    """Where a tracker other than DVCLive keeps the files of the current profile, absolute, created if need be."""
    found = home() / "trackers" / profile() / tracker
    found.mkdir(parents=True, exist_ok=True)
    return found


def require(names: Sequence[str]) -> None:
    """Raise ClearError for a tracker whose package is not installed; its module has the tracker's name."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ClearError(
                f"params: runtime.trackers names {name}, whose package is not installed: "
                f"`pip install -c infra/constraints.txt -e '.[{name}]'`, or take it out of the list."
            )


class Trackers(TrainerCallback):
    """Shows one phase to every tracker, from the first process only.

    `panel` draws the held-out pictures, every `every` steps and at the last one (0: never); `parts` gives the seconds
    of the process so far, by part, where the Trainer knows more than what it computes and what the optimiser takes.
    """

    def __init__(
        self,
        names: Sequence[str],
        stage: str,
        phase: str,
        every: int = 0,
        panel: Callable[[], Image.Image] | None = None,
        parts: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        self._names, self._stage, self._phase = names if rank() == 0 else (), stage, phase
        self._every, self._panel, self._parts = every, panel, parts
        self._open: dict[str, Tracker] = {}
        self._seconds: dict[str, float] = {}
        self._before: dict[str, float] = {}
        self._steps, self._since = 0, 0.0

    def on_train_begin(self, args, state, control, **_) -> None:
        for name in dict.fromkeys(self._names):
            with self._spared(name, f"tracker {name}"):
                self._open[name] = TRACKERS[name](self._stage, self._phase, state.global_step)
        self._before = dict(self._parts()) if self._parts else {}

    def on_step_begin(self, *_, **__) -> None:
        self._since = time.perf_counter()

    def on_pre_optimizer_step(self, *_, **__) -> None:
        self._spend("compute")

    def on_step_end(self, args, state, control, **_) -> None:
        self._spend("optimiser")
        self._steps += 1
        step, due = state.global_step, self._every and self._panel and self._open
        if due and (step % self._every == 0 or step == state.max_steps):
            self._since = time.perf_counter()
            image = None
            with self._spared("", "the panel of held-out pictures"):
                image = self._panel()
            if image is None:
                self._panel = None
            else:
                self._tell(lambda tracker: tracker.picture(step, image))
            self._spend("panel")

    def on_log(self, args, state, control, logs=None, **_) -> None:
        if "loss" not in (logs or {}):
            return  # the summary at the end, and what is logged before the first step
        given = {k: float(v) for k, v in logs.items() if isinstance(v, int | float) and k not in _HIDDEN}
        values = {k: v for k, v in given.items() if math.isfinite(v)} | self._seconds_per_step()
        self._tell(lambda tracker: tracker.figures(state.global_step, values))

    def on_train_end(self, *_, **__) -> None:
        self._tell(lambda tracker: tracker.end())
        self._open = {}

    def _spend(self, part: str) -> None:
        now = time.perf_counter()
        self._seconds[part] = self._seconds.get(part, 0.0) + now - self._since
        self._since = now

    def _seconds_per_step(self) -> dict[str, float]:
        """Means over the steps since the last log line."""
        found = dict(self._seconds)
        if self._parts:
            now = dict(self._parts())
            found |= {name: value - self._before.get(name, 0.0) for name, value in now.items()}
            self._before = now
        count, self._seconds, self._steps = max(1, self._steps), {}, 0
        return {f"seconds/{name}": value / count for name, value in found.items()}

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            with self._spared(name, f"tracker {name}"):
                what(tracker)

    @contextmanager
    def _spared(self, name: str, what: str) -> Iterator[None]:
        """The training is spared what happens inside: random numbers that are drawn, and errors, of which it warns."""
        try:
            with same_random_state():
                yield
        except Exception as error:
            self._open.pop(name, None)
            reason = one_line(error)[:200] or type(error).__name__
            say(f"warning: {what} failed and is off, the training goes on: {reason}", sys.stderr)


@contextmanager
def same_random_state() -> Iterator[None]:
    """Python, NumPy and torch draw after the block as if it had drawn nothing."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

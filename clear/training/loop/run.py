"""A stage's training as a whole: its private folder, keyed by what it reads, and the curves of its phases."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from clear.data.io import write_text
from clear.data.records import file_sha256
from clear.data.workspace import require_unedited
from clear.schema import Config
from clear.training import trackers
from clear.training.loop.parallel import barrier, rank

_PACKAGE = Path(__file__).parents[2]
_ELSEWHERE = {
    "browse",
    "cli",
    "conf",
    "degradation",
    "drift",
    "project",
    "report",
    "serve",
    "validation",
    "__pycache__",
}
CODE = sorted(part for part in _PACKAGE.iterdir() if part.is_dir() and part.name not in _ELSEWHERE)
"""What training stages use, as dvc.yaml lists it: a run that was interrupted and whose code was changed begins anew, or
its weights would be of both."""


class StageRun:
    """The private working folder of one stage run and the training curves collected so far."""

    def __init__(self, stage: str, config: Config, inputs: Sequence[Path | str], home: Path) -> None:
        """`inputs` are the files or folders whose content, with the parameters and CODE, identifies this run.

        `panel`, which a stage may set, draws what trackers show of its model (clear/training/panel.py). Raises
        ClearError for a tracker that is not installed.
        """
        trackers.require(config.runtime.trackers)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs a tenth of the time
        self.stage, self.config = stage, config
        self.panel: Callable[[], Any] | None = None
        digest = hashlib.sha256(json.dumps([stage, _relevant(config), torch.__version__], sort_keys=True).encode())
        for path in (*CODE, *inputs):
            for file in sorted(Path(path).rglob("*")) if Path(path).is_dir() else [Path(path)]:
                if file.is_file() and file.suffix != ".pyc":
                    digest.update(bytes.fromhex(file_sha256(file)))
        self.folder = home / digest.hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self._gone, ignore_errors=True)  # of a run that was killed as it ended
        self.curve: list[dict[str, Any]] = []

    def shown(self, phase: str, parts: Callable[[], dict[str, float]] | None = None) -> trackers.Trackers:
        """What shows a phase of this run to the trackers; `parts` are the seconds of its Trainer by part."""
        runtime = self.config.runtime
        return trackers.Trackers(runtime.trackers, self.stage, phase, runtime.panel_every, self.panel, parts)

    def finish(self, curve: Path | str) -> None:
        """Write the training curves as CSV and delete the working folder: the stage has succeeded.

        Raises ClearError as `require_unedited`, and the folder stays.
        """
        barrier()
        if rank() == 0:
            require_unedited()
            write_curve(curve, self.curve)
            # A removal that is killed leaves checkpoints that call themselves complete and are not.
            shutil.rmtree(self._gone, ignore_errors=True)
            self.folder.rename(self._gone)
            shutil.rmtree(self._gone)

    @property
    def _gone(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.gone")


def _relevant(config: Config) -> dict:
    plain = asdict(config)
    for section in ("report", "evaluate", "gate"):
        plain.pop(section)
    for name in ("checkpoint_every", "log_every", "trackers", "panel_every"):
        plain["runtime"].pop(name)
    return plain


def write_curve(path: Path | str, rows: list[dict[str, Any]]) -> None:
    """Rows of {phase, step, metric: value} as CSV with the union of the metrics; absent values stay empty."""
    names = ["phase", "step", *sorted({key for row in rows for key in row} - {"phase", "step"})]
    lines = [",".join(names)]
    for row in rows:
        values = (row.get(name, "") for name in names)
        lines.append(",".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in values))
    write_text(path, "\n".join(lines) + "\n")


def curve_rows(phase: str, history: list[dict]) -> list[dict[str, Any]]:
    """The Trainer's log lines without clocks."""
    hidden = {"step", "epoch", "learning_rate", "total_flos"}
    rows = []
    for line in history:
        figures = {k: v for k, v in line.items() if k not in hidden and not k.startswith("train_")}
        if "loss" in figures:
            rows.append({"phase": phase, "step": line["step"], **figures})
    return rows

"""The result table that ends `make repro`: accuracy on MMD-Bench per model and severity.

Where this run's figures differ from the ones committed at HEAD (another CPU, an edited parameter), both are printed,
one line below the other. Columns: accuracy at clean, low, mid and high severity, their average, and the share of
questions at clean and high for which the model chose to restore.
"""

import json
import subprocess
from pathlib import Path

from clear.errors import ClearError
from clear.stages import paths

MODELS = ("base", "sft_direct", "sft", "reencode", "bridge", "grpo")
LEVELS = ("clean", "low", "mid", "high")
HEADER = ("model", *LEVELS, "average", "restores clean", "restores high")


def render(workspace: Path) -> str:
    """The table of the evaluations under `workspace`, and where the report is. Raises ClearError if there are none."""
    files = {model: workspace / "data/metrics" / f"evaluate_{model}.json" for model in MODELS}
    files = {model: file for model, file in files.items() if file.exists()}
    if not files:
        raise ClearError(f"{workspace / 'data/metrics'}: no evaluations here; run `make repro`.")
    rows, differ = [HEADER], 0
    for model, file in files.items():
        figures = _cells(_parse(file.read_text(), str(file)))
        rows.append((model, *figures))
        committed = _committed(workspace, file.relative_to(workspace))
        if committed is not None and committed != figures:
            differ += 1
            rows.append(("  committed", *committed))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" ".join((f"{row[0]:<{widths[0]}}", *map(str.rjust, row[1:], widths[1:]))).rstrip() for row in rows]
    lines[1:1] = ["-" * max(map(len, lines))]
    if differ:
        lines.append(f"{differ} of {len(files)} models differ from the figures committed at HEAD (shown below each).")
    return "\n".join([*lines, _report_line(workspace)])


def _parse(text: str, name: str) -> dict:
    try:
        metrics = json.loads(text)
        if not isinstance(metrics, dict):
            raise ValueError(f"{metrics!r} is no object")
    except ValueError as error:
        raise ClearError(f"{name}: not valid JSON ({error}); run `dvc repro` for the stage that writes it.") from error
    return metrics


def _cells(metrics: dict) -> tuple[str, ...]:
    accuracy, calls = metrics.get("accuracy", {}), metrics.get("call_rate", {})
    found = [*(accuracy.get(level) for level in LEVELS), metrics.get("average"), calls.get("clean"), calls.get("high")]
    return tuple(f"{value:.3f}" if isinstance(value, int | float) else "–" for value in found)


def _committed(workspace: Path, file: Path) -> tuple[str, ...] | None:
    """The same figures at HEAD, or None where nothing is committed (a scratch copy, a new model, no git)."""
    command = ["git", "show", f"HEAD:./{file.as_posix()}"]
    try:
        shown = subprocess.run(command, cwd=workspace, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return _cells(_parse(shown.stdout, f"HEAD:{file}")) if shown.returncode == 0 else None


def _report_line(workspace: Path) -> str:
    folder = paths.report_dir(paths.profile(workspace), create=False)
    pages = sorted(folder.glob("index.*")) or sorted(folder.glob("*.html"))
    if pages:
        return f"report: {pages[0]}"
    return "report: not rendered on this machine yet; `dvc repro --force --single-item report` does it."

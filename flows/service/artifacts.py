"""What a flow run shows in Prefect: figures as a Markdown table, the plot of the report as an inlined picture."""

import base64
import json
from pathlib import Path
from typing import Any

from clear.data.workspace import profile
from clear.errors import ClearError
from clear.project.results import LEVELS

COLUMNS = (
    *((level, ("accuracy", level)) for level in LEVELS),
    ("average", ("average",)),
    ("restores, clean", ("call_rate", "clean")),
    ("restores, high", ("call_rate", "high")),
)
"""Column → path in an evaluation's JSON."""


def metrics_table(workspace: Path, stages: dict[str, str] | None = None) -> str:
    """Markdown: the evaluations under data/metrics, one row per model, then what became of each stage.

    An evaluation that is one bare number is shown as its average. Raises ClearError for a file that is not JSON.
    """
    rows = []
    for file in sorted((workspace / "data/metrics").glob("evaluate_*.json")):
        content = read_json(file)
        values = content if isinstance(content, dict) else {"average": content}
        rows.append((file.stem.removeprefix("evaluate_"), *(_cell(_dig(values, path)) for _, path in COLUMNS)))
    text = table(("model", *(name for name, _ in COLUMNS)), rows) if rows else "No evaluation here yet."
    if stages:
        text += "\n\n" + table(("stage", "this run"), list(stages.items()))
    return text


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows))


def picture(reports: Path, workspace: Path) -> str | None:
    """Markdown with the accuracy plot of the current profile's report inlined; None if it has not been rendered.

    `reports` is the folder with one report per profile.
    """
    if not (workspace / "params.yaml").exists():
        return None
    file = reports / profile(workspace) / "plots" / "accuracy.png"
    if not file.exists():
        return None
    return f"![accuracy](data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()})"


def read_json(file: Path) -> Any:
    """Content of a JSON file. Raises ClearError naming it where it is damaged."""
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ClearError(f"{file}: not valid JSON ({error}); run `dvc repro` for the stage that writes it.") from error


def _dig(content: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "–"

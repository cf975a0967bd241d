"""Stage `report`: predictions, metrics, curves and run records → the report and the tracked table of claims.

Reads data/predictions/<model>.parquet, data/metrics, data/plots and data/bench/degraded; writes the rendered report to
the report's folder (a run record, not tracked), and without clock or machine, in data/results, report.json (verdict,
claims, when CLEAR restores), summary.json (the few figures that `dvc metrics diff` compares) and accuracy.csv (DVC's
plot).
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from clear.bench import predictions
from clear.bench.models import MODELS
from clear.data.io import write_json
from clear.errors import ClearError, shown
from clear.schema import Config

if TYPE_CHECKING:
    import pandas as pd

    from clear.report.claims import Bootstrap

CURVES = ("base", "sft", "sft_direct", "bridge", "grpo")
METRICS = ("source", "degrade", "mmd_bench", "validate", "base", "traces", "sft", "sft_direct", "bridge", "grpo")


def run(config: Config, data: Path = Path("data")) -> None:
    """Make the report of the workspace. Raises ClearError for inputs that are damaged or do not belong together.

    Some absent inputs do not stop it: a model without predictions is named in the first lines, its claims are not
    measured. Without the predictions of any model it raises ClearError before anything is written.
    """
    from clear.data.workspace import report_dir, run_records
    from clear.report import calling, gallery, render
    from clear.report.claims import Bootstrap, evaluate, to_json
    from clear.report.verdict import remarks, verdict

    bootstrap = Bootstrap(config.evaluate.confidence, config.evaluate.bootstrap, config.seed)
    frames = read_frames(data)
    if not frames:
        raise ClearError(
            f"{shown((data / 'predictions').absolute())}: no predictions here, expected <model>.parquet of "
            f"{', '.join(MODELS)}; run this in the project's folder, or `dvc repro evaluate` to make them. No report "
            "was written."
        )
    claims, called = evaluate(frames, bootstrap), calling.figures(frames, bootstrap)
    records = {stage: record for stage, record in run_records().items() if stage != "report"}
    inputs = render.Inputs(
        profile=config.profile,
        frames=frames,
        claims=claims,
        curves=read_curves(data),
        stage_metrics=read_metrics(data),
        records=records,
        examples=gallery.collect(frames, data / "bench" / "degraded", config.report.pictures),
        bootstrap=bootstrap,
        calling=called,
        beyond=read_beyond(data, frames),
    )
    render.write(inputs, report_dir())
    said = [verdict(claims, frames, bootstrap), *remarks(claims, called)]
    write_json(
        data / "results" / "report.json", to_json(claims, frames, bootstrap) | {"calling": called, "verdict": said}
    )
    write_summary(data, frames, bootstrap)


def write_summary(data: Path, frames: dict[str, "pd.DataFrame"], bootstrap: "Bootstrap") -> None:
    """summary.json {model: {level: accuracy, restores_hard: share}} and accuracy.csv, a row per level, in results/."""
    import pandas as pd

    from clear.report.claims import LEVELS

    figures, rows = {}, []
    for model, frame in frames.items():
        found = predictions.metrics(frame, bootstrap.confidence, bootstrap.resamples, bootstrap.seed)
        figures[model] = {LEVELS[level]: value for level, value in found["accuracy"].items()}
        if frame.restored.any():
            figures[model]["restores_hard"] = found["call_rate"].get("high")
        rows += [(model, LEVELS[level], value, *found["interval"][level]) for level, value in found["accuracy"].items()]
    write_json(data / "results" / "summary.json", figures)
    file = data / "results" / "accuracy.csv"
    table = pd.DataFrame(rows, columns=["model", "level", "accuracy", "low", "high"])
    table.to_csv(file, index=False, float_format="%.6f", lineterminator="\n")


def read_frames(data: Path) -> dict[str, "pd.DataFrame"]:
    """The predictions that are there, by model in the order of the report."""
    files = {model: data / "predictions" / f"{model}.parquet" for model in MODELS}
    return {model: predictions.read(file) for model, file in files.items() if file.exists()}


def read_beyond(data: Path, models: Iterable[str]) -> dict[str, dict[str, dict]]:
    """{model: {row: figures}} outside MMD-Bench: a row per set of naturally degraded images, and per further
    degradation and level. Empty if there is neither."""
    from clear.report.claims import LEVELS

    found = {}
    for model in models:
        file = data / "predictions" / f"{model}.parquet"
        further = predictions.extra_metrics(predictions.read_extra(file))
        rows = {f"{name}, {LEVELS[level]}": figures for name, row in further.items() for level, figures in row.items()}
        rows = predictions.incoming_metrics(predictions.read_incoming(file)) | rows
        if rows:
            found[model] = rows
    return found


def read_curves(data: Path) -> dict[str, "pd.DataFrame"]:
    """Training curves by stage: `phase`, `step` and numeric columns; a file without rows gives an empty frame."""
    import pandas as pd

    curves = {}
    for stage in CURVES:
        file = data / "plots" / f"{stage}.csv"
        if not file.exists() or not file.read_text().strip():
            continue
        try:
            frame = pd.read_csv(file, dtype={"phase": str}, keep_default_na=False, na_values=[""])
        except pd.errors.ParserError as error:
            raise ClearError(f"{file}: not a readable table ({error}); run `dvc repro {stage}`.") from error
        for column in ("phase", "step"):
            if column not in frame:
                raise ClearError(f"{file}: column '{column}' is missing; run `dvc repro {stage}`.")
        for column in frame.columns.drop("phase"):
            try:
                frame[column] = pd.to_numeric(frame[column])
            except ValueError as error:
                raise ClearError(
                    f"{file}: column '{column}' is not numeric ({error}); run `dvc repro {stage}`."
                ) from error
        curves[stage] = frame.fillna({"phase": ""})
    return curves


def read_metrics(data: Path) -> dict[str, dict]:
    """The tracked metrics of the stages before evaluation, as far as they are there."""
    found = {}
    for name in METRICS:
        file = data / "metrics" / f"{name}.json"
        if not file.exists():
            continue
        try:
            found[name] = json.loads(file.read_text())
        except ValueError as error:  # no JSON, or no text
            raise ClearError(f"{file}: not valid JSON ({error}); run `dvc repro {name}`.") from error
    return found

"""The predictions of one model on MMD-Bench: one Parquet file, one row per (sample, corruption, severity, question).

This is the only contract between the stage that runs a model and everything that counts. A row holds the full output
next to the extracted answer, so that every figure of the report can be traced back to a text. `metrics` turns
the rows of one model into the figures that the stage evaluate tracks. Protocol: METHOD §7; departure: an
answer that cannot be extracted is an empty string, scored wrong and counted, never replaced by a random option.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clear.bench import scoring, statistics
from clear.data.io import reading_parquet, replacing, whole
from clear.data.records import CLEAN, EXTRA, INCOMING
from clear.errors import ClearError

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = pa.schema(
    [
        ("sample", pa.string()),
        ("corruption", pa.string()),
        ("severity", pa.string()),
        ("question", pa.string()),
        ("task", pa.string()),
        ("pair", pa.string()),
        ("text", pa.string()),
        ("answer", pa.string()),
        ("prediction", pa.string()),
        ("output", pa.string()),
        ("restored", pa.bool_()),
        ("correct", pa.bool_()),
        ("tokens", pa.int64()),
        ("psnr_degraded", pa.float64()),
        ("ssim_degraded", pa.float64()),
        ("psnr_restored", pa.float64()),
        ("ssim_restored", pa.float64()),
        ("restored_png", pa.binary()),
    ]
)
NULLABLE = ("psnr_degraded", "ssim_degraded", "psnr_restored", "ssim_restored", "restored_png")
MMD_BENCH = "mmd_bench"
MOST_ROWS = 2 * 10**6
"""Most rows that are read, 0.7 GiB; the benchmark has a tenth."""

KEY = ["sample", "corruption", "severity", "question"]
"""The columns that identify a row; models are paired on them."""


def write(path: Path | str, rows: Iterable[dict]) -> int:
    """Write `rows` (dictionaries with the columns of SCHEMA) in the given order and return how many there were.

    The file appears only when complete. Raises ClearError for a row that lacks a column or has another type.
    """
    path, rows = Path(path), list(rows)
    for number, row in enumerate(rows):
        if set(row) != set(SCHEMA.names):
            odd = ", ".join(sorted(set(row) ^ set(SCHEMA.names)))
            raise ClearError(
                f"{path}: row {number} has missing or unknown columns: {odd}; see clear/bench/predictions.py."
            )
    try:
        table = pa.Table.from_pylist(rows, SCHEMA)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ClearError(f"{path}: a row does not fit the schema of clear/bench/predictions.py: {error}.") from error
    with replacing(path) as partial:
        pq.write_table(table, partial, compression="zstd")
    return len(rows)


def read(path: Path | str) -> "pd.DataFrame":
    """The rows of one model on MMD-Bench: the columns of SCHEMA (null floats become NaN, null pictures None).

    Naturally degraded images and further degradations are not included: see `read_incoming` and `read_extra`.

    Raises ClearError, naming the file and where possible the row, if the file is missing or unreadable, has no row,
    lacks a column, holds a column of another type, an unknown severity, the same key twice, or a null where one is
    not allowed, and if an empty prediction is marked correct.
    """
    return _read(Path(path), MMD_BENCH)


def read_incoming(path: Path | str) -> "pd.DataFrame":
    """The rows of one model on naturally degraded images, in the form and with the errors of `read`; may be empty."""
    return _read(Path(path), INCOMING)


def read_extra(path: Path | str) -> "pd.DataFrame":
    """The rows on degradations beyond the sixteen (plugins, presets), in the form of `read`; may be empty."""
    return _read(Path(path), EXTRA)


def _read(path: Path, part: str) -> "pd.DataFrame":
    remedy = f"run `dvc repro evaluate@{path.stem}`"
    if not path.exists():
        raise ClearError(f"{path} is not here; {remedy}, or `git checkout` it.")
    with reading_parquet(path, remedy), pq.ParquetFile(path) as file:
        table = _table(path, file).replace_schema_metadata()  # pandas' own may be damaged, too
        table.validate(full=True)
    for column in SCHEMA:
        if column.name not in table.column_names:
            raise ClearError(f"{path}: column '{column.name}' is missing; {remedy}.")
        kind = table.schema.field(column.name).type
        if kind != column.type:
            raise ClearError(f"{path}: column '{column.name}' is {kind}, expected {column.type}; {remedy}.")
        if column.name not in NULLABLE and table.column(column.name).null_count:
            raise ClearError(f"{path}: column '{column.name}' holds a null; {remedy}.")
    frame = table.select(SCHEMA.names).to_pandas()
    came, extra = frame.severity == INCOMING, frame.corruption.str.startswith(EXTRA)
    _check_rows(path, frame[~came].reset_index(drop=True), remedy)
    return frame[{MMD_BENCH: ~(came | extra), INCOMING: came, EXTRA: extra}[part]].reset_index(drop=True)


def _table(path: Path, file: pq.ParquetFile) -> pa.Table:
    """The whole file. Raises ClearError for one of so many rows, or of values so long and so often, that it would fill
    the memory."""
    if (count := file.metadata.num_rows) > MOST_ROWS:
        raise ClearError(f"{path}: {count:,} rows, and at most {MOST_ROWS:,} are read; evaluate fewer samples at once.")
    return whole(path, file)


def _check_rows(path: Path, frame: "pd.DataFrame", remedy: str) -> None:
    if frame.empty:
        raise ClearError(f"{path}: no predictions in this file; {remedy}.")
    clean_name, clean_level = frame.corruption == CLEAN, frame.severity == CLEAN
    wrong = {
        f"has a severity that is not one of {', '.join(scoring.SEVERITIES)}": ~frame.severity.isin(scoring.SEVERITIES),
        "is clean in only one of corruption and severity": clean_name != clean_level,
        "repeats the key of an earlier row": frame.duplicated(KEY),
        "has no prediction and is marked correct": (frame.prediction == "") & frame.correct,
    }
    for reason, rows in wrong.items():
        if rows.any():
            number = int(np.flatnonzero(rows.to_numpy())[0])
            key = "/".join(str(value) for value in frame.loc[number, KEY])
            raise ClearError(f"{path}: row {number} ({key}) {reason}; {remedy}.")


def metrics(frame: "pd.DataFrame", confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> dict:
    """The tracked figures of one model. Shares are in [0, 1], PSNR in dB; severities absent from `frame` are absent.

    `interval` is the cluster-bootstrap interval of `accuracy`. `psnr` and `ssim` average the rows on which the model
    restored, before and after; on clean images there is no degraded figure (None). `average` is the mean of the four
    levels (None if one is absent), `robustness` the hard accuracy and its share of the clean one, `pair` the share of
    minimal pairs with both halves right. `no_answer` counts the rows without an extractable answer; they are wrong,
    never left out. Raises ClearError for a level with one image only.
    """
    groups = statistics.clusters(frame)
    scores, interval = scoring.accuracy(frame), {}
    levels = scores["severity"]
    for severity in levels:
        rows = (frame.severity == severity).to_numpy()
        if len(np.unique(groups[rows])) < 2:
            raise ClearError(
                f"Severity {severity} has predictions for one image only ({int(rows.sum())} questions), which gives no "
                "interval; evaluate more images (params: source.bench)."
            )
        found = statistics.mean_interval(frame.correct.to_numpy()[rows], groups[rows], confidence, resamples, seed)
        interval[severity] = [found.low, found.high]
    return {
        "accuracy": levels,
        "average": float(np.mean([levels[name] for name in scoring.SEVERITIES])) if len(levels) == 4 else None,
        "interval": interval,
        "task": scores["task"],
        "corruption": scores["corruption"],
        "pair": scoring.pair_summary(frame),
        "robustness": scoring.robustness(levels),
        "call_rate": scoring.call_rate(frame),
        "psnr": _restoration(frame, "psnr"),
        "ssim": _restoration(frame, "ssim"),
        "no_answer": scores["no_answer"],
        "questions": scores["questions"],
    }


def incoming_metrics(frame: "pd.DataFrame") -> dict[str, dict]:
    """Figures per set of `read_incoming`, shares in [0, 1]; apart from those of MMD-Bench, whose protocol they lack."""
    return {
        name: {
            "accuracy": float(rows.correct.mean()),
            "call_rate": float(rows.restored.mean()),
            "images": int(rows["sample"].nunique()),
            "questions": len(rows),
            "no_answer": int((rows.prediction == "").sum()),
        }
        for name, rows in frame.groupby("corruption", sort=True)
    }


def extra_metrics(frame: "pd.DataFrame") -> dict[str, dict]:
    """Figures per type and severity of `read_extra`, as `incoming_metrics`; types without their mark."""
    return {
        str(name).removeprefix(EXTRA): {
            severity: incoming_metrics(rows[rows.severity == severity])[name]
            for severity in scoring.present(rows.severity)
        }
        for name, rows in frame.groupby("corruption", sort=True)
    }


def _restoration(frame: "pd.DataFrame", name: str) -> dict[str, dict[str, float | None]]:
    """Mean quality before and after restoration per severity, over the same rows where both are finite."""
    result = {}
    for severity in scoring.present(frame.severity):
        rows = frame[(frame.severity == severity) & frame.restored]
        before, after = (rows[f"{name}_{side}"].to_numpy(float) for side in ("degraded", "restored"))
        # The PSNR of a clean image to itself is infinite, so the clean level has an "after" only.
        use = np.isfinite(after) if severity == CLEAN else np.isfinite(after) & np.isfinite(before)
        if use.any():
            degraded = None if severity == CLEAN else float(before[use].mean())
            result[severity] = {"degraded": degraded, "restored": float(after[use].mean())}
    return result

"""Examples for the report: clean, degraded and restored pictures with the question, the gold answer and the traces."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clear.bench.predictions import KEY
from clear.bench.scoring import SEVERITIES
from clear.data.images import decode_image
from clear.data.records import CLEAN, Sample, read_samples
from clear.errors import ClearError
from clear.report.claims import LEVELS, NAMES

if TYPE_CHECKING:
    import pandas as pd

SHOWN = ("base", "grpo")
"""Models whose traces are shown."""


@dataclass(frozen=True)
class Example:
    """Panels (title, uint8 RGB image), a caption with the question, and the traces as (title, text)."""

    panels: list[tuple[str, np.ndarray]]
    caption: str
    traces: list[tuple[str, str]]


def choose(frame: "pd.DataFrame", count: int) -> "pd.DataFrame":
    """At most `count` rows that hold a restored picture: one per image, hardest level first, corruptions in turn."""
    import pandas as pd

    held = frame[frame.restored_png.notna() & (frame.severity != CLEAN)]
    held = held.drop_duplicates(KEY[:3]).sort_values(KEY)
    hardness = held.severity.map(SEVERITIES.index).astype(int)
    turn = held.groupby(["severity", "corruption"]).cumcount()
    order = pd.DataFrame({"hard": -hardness, "turn": turn, "name": held.corruption}).sort_values(
        ["hard", "turn", "name"]
    )
    return held.loc[order.index].drop_duplicates("sample").head(count)


def collect(frames: dict[str, "pd.DataFrame"], bench: Path, count: int) -> list[Example]:
    """The examples of a run; empty without predictions of CLEAR or without kept pictures.

    `bench` is the folder of degraded benchmark shards. Raises ClearError if a chosen image is not in it.
    """
    if "grpo" not in frames:
        return []
    rows = choose(frames["grpo"], count)
    if rows.empty:
        return []
    wanted = set(rows[KEY[:3]].itertuples(index=False, name=None))
    samples = find([bench], wanted)
    if lost := sorted(wanted - set(samples)):
        raise ClearError(
            f"{bench}: image {'/'.join(lost[0])} of data/predictions/grpo.parquet is not here; the benchmark was "
            "remade after the evaluation: run `dvc repro evaluate@grpo`."
        )
    answers = {name: frames[name].set_index(KEY) for name in SHOWN if name in frames}
    return [_example(row, samples[row.sample, row.corruption, row.severity], answers) for row in records(rows)]


def records(rows: "pd.DataFrame") -> list:
    """The rows of a table as objects with an attribute per column; missing values stay NaN."""
    from types import SimpleNamespace

    return [SimpleNamespace(**record) for record in rows.to_dict("records")]


def find(folders: list[Path], wanted: set[tuple[str, str, str]]) -> dict[tuple[str, str, str], Sample]:
    """The wanted (id, corruption, severity) among benchmark shards, as many as there are; stops at the last one.

    They have their pictures and questions, and no hash or annotation.
    """
    found: dict[tuple[str, str, str], Sample] = {}
    for folder in folders:
        for sample in read_samples(folder, ["id", "image", "degraded", "corruption", "severity", "questions"]):
            key = (sample.id, sample.corruption, sample.severity)
            if key in wanted:
                found[key] = sample
                if len(found) == len(wanted):
                    return found
    return found


def _example(row, sample: Sample, answers: dict[str, "pd.DataFrame"]) -> Example:
    restored = decode_image(row.restored_png, f"data/predictions/grpo.parquet, {sample.key}: restored_png")
    size = (restored.shape[1], restored.shape[0])
    where = f"{row.corruption.replace('_', ' ')}, {LEVELS[row.severity]}"
    panels = [
        ("clean", _small(decode_image(sample.image, sample.key), size)),
        (_titled(where, row.psnr_degraded), _small(decode_image(sample.seen, sample.key), size)),
        (_titled("restored by CLEAR", row.psnr_restored), restored),
    ]
    traces = []
    for name, frame in answers.items():
        key = tuple(getattr(row, column) for column in KEY)
        if key not in frame.index:
            raise ClearError(f"data/predictions/{name}.parquet: row {'/'.join(key)} is missing; evaluate {name} again.")
        found = frame.loc[key]
        said = f"“{found.prediction}”" if found.prediction else "no answer"
        traces.append((f"{NAMES[name]}: {said}, {'right' if found.correct else 'wrong'}", found.output))
    return Example(panels, f"Question: {row.text} Right answer: {row.answer}. Image {sample.key}.", traces)


def _titled(text: str, psnr: float) -> str:
    return f"{text}\n{psnr:.1f} dB" if np.isfinite(psnr) else text


def _small(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    import cv2

    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)

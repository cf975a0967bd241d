"""A workspace in which the stage `bridge` runs in seconds: random weights, a few pictures, one trace each."""

from pathlib import Path

from clear.config import compose, from_dict
from clear.data.records import write_samples
from clear.degradation.build import degraded_samples
from clear.degradation.protocol import CELLS
from clear.project.scratch import write_params
from clear.reasoning import grammar
from clear.sources.scenes.render import scenes
from clear.traces.table import TraceRow, write_traces
from tests.tiny import save_random_model

CELL = CELLS[2]
"""Corruption and severity of every picture."""


def bridge_workspace(folder: Path, overrides: list[str]) -> None:
    """Write parameters, the model of stage `sft`, degraded pairs of both splits and traces to `folder`."""
    folder.mkdir()
    write_params(folder / "params.yaml", overrides)
    save_random_model(folder / "data/models/sft", from_dict(compose(overrides)))
    clean = list(scenes("sft", 8, 3, 256, 4))
    write_samples(folder / "data/degraded/sft", degraded_samples(((s, *CELL) for s in clean), 0.4, workers=1))
    others = list(scenes("rl", 4, 4, 256, 4))
    write_samples(folder / "data/degraded/rl", degraded_samples(((s, *CELL) for s in others), 0.4, workers=1))
    rows = []
    for sample in clean:
        question = sample.questions[0]
        direct = f"<think> </think> <answer> {question.answer} </answer>"
        replies = (grammar.restore_reply(), direct, direct, direct)
        rows.append(TraceRow(sample.id, question.id, question.text, *CELL, *replies, False))
    write_traces(folder / "data/traces", rows)

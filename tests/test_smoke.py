"""The smoke pipeline from end to end through `make`, as in a fresh clone: the longest test, so tests/conftest.py has it
run first."""

import json
import os
import subprocess
import sys
from pathlib import Path

from clear.bench.models import MODELS
from tests.conftest import git
from tests.helpers.secrets import leaks, origin, planted
from tests.helpers.stages import STAGES


def _figures(stage: str) -> str:
    """Where a stage keeps its figures: `report` reads the folder of the others and so has one of its own."""
    return f"data/{'results' if stage == 'report' else 'metrics'}/{stage}.json"


def _make(folder, *arguments):
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "CLEAR_HOME"))}
    plain |= planted()
    command = ["make", *arguments, f"VENV={Path(sys.executable).parent.parent}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=plain)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert leaks(folder, [done.stdout, done.stderr], [folder / ".git/config"]) == []
    return done.stdout


def test_smoke_runs_from_end_to_end_in_a_fresh_clone(clone):
    git(clone, "remote", "add", "origin", origin())
    before = git(clone, "status", "--porcelain", "--ignored")
    first = _make(clone, "repro", "PROFILE=smoke")

    scratch = clone / ".clear/scratch/smoke"
    for model in MODELS:
        assert model in first
        metrics = json.loads((scratch / f"data/metrics/evaluate_{model}.json").read_text())
        assert set(metrics["accuracy"]) == {"clean", "low", "mid", "high"}
        assert (scratch / f"data/predictions/{model}.parquet").stat().st_size > 0
    for stage in STAGES:
        if stage != "evaluate":
            assert (scratch / _figures(stage)).exists(), stage
    pages = [line for line in first.splitlines() if line.startswith("report: ")]
    assert Path(pages[0].removeprefix("report: ")).is_relative_to(clone / "data/report/smoke")
    assert Path(pages[0].removeprefix("report: ")).stat().st_size > 0
    records = {file.stem for file in (clone / ".clear/runs/smoke").glob("*.json")}
    assert records == {*(set(STAGES) - {"evaluate"}), *(f"evaluate_{model}" for model in MODELS)}
    assert not [file for file in (clone / ".clear/checkpoints").rglob("*") if file.is_file()], "success deletes them"

    after = git(clone, "status", "--porcelain", "--ignored")
    new = set(after.splitlines()) - set(before.splitlines())
    assert {line.split()[1].split("/")[0] for line in new if "__pycache__" not in line} <= {".clear", "data", ".dvc"}
    assert git(clone, "status", "--porcelain") == ""

    made = {file: file.stat().st_mtime_ns for file in (clone / ".clear/runs/smoke").glob("*.json")}
    again = _make(clone, "repro", "PROFILE=smoke")
    assert {file: file.stat().st_mtime_ns for file in made} == made, "nothing is run twice"
    assert [line for line in again.splitlines() if line.startswith(tuple(MODELS))] == [
        line for line in first.splitlines() if line.startswith(tuple(MODELS))
    ]

"""A small project that retrains: its stages are a few lines each, its tools plain commands."""

import subprocess
import sys
from pathlib import Path

from clear.data.records import INCOMING
from clear.errors import ClearError
from clear.project.retrain.run import Tools, retrain
from tests.conftest import git
from tests.revisions import rows_of

STAGES = """
stages:
  degrade:
    cmd: {python} code/degrade.py
    deps: [code/degrade.py, data/incoming]
    outs: [data/degraded]
    metrics:
      - data/metrics/degrade.json: {{cache: false}}
      - data/metrics/validate.json: {{cache: false}}
  mmd_bench:
    cmd: {python} code/mmd_bench.py
    deps: [code/mmd_bench.py, data/incoming]
    outs: [data/bench/clean, data/bench/degraded, data/bench/incoming]
  grpo:
    cmd: {python} code/grpo.py
    deps: [code/grpo.py, data/degraded]
    outs: [data/models/grpo]
  evaluate:
    foreach: {{grpo: grpo}}
    do:
      cmd: {python} code/evaluate.py ${{key}}
      deps:
        - code/evaluate.py
        - data/bench/clean
        - data/bench/degraded
        - data/bench/incoming
        - data/metrics/validate.json
        - data/models/${{item}}
      outs:
        - data/predictions/${{key}}.parquet: {{cache: false}}
      metrics:
        - data/metrics/evaluate_${{key}}.json: {{cache: false}}
"""
CODE = {
    "degrade": """
        import json, pathlib
        from clear.sources.incoming import sets
        found = {one.name: {"fingerprint": one.fingerprint} for one in sets()}
        pathlib.Path("data/metrics").mkdir(parents=True, exist_ok=True)
        pathlib.Path("data/degraded").write_text(" ".join(found))
        content = {"incoming": {"sets": found}} if found else {}
        pathlib.Path("data/metrics/degrade.json").write_text(json.dumps(content))
        pathlib.Path("data/metrics/validate.json").write_text(json.dumps({"success": True, "rejected": 0}))
    """,
    "mmd_bench": """
        import pathlib
        for name in ("clean", "degraded", "incoming"):
            folder = pathlib.Path("data/bench", name)
            folder.mkdir(parents=True, exist_ok=True)
            names = sorted(one.name for one in pathlib.Path("data/incoming").iterdir() if one.is_dir())
            (folder / "shard").write_text(" ".join(names) if name == "incoming" else name)
    """,
    "grpo": """
        import os, pathlib, signal
        if (target := pathlib.Path("../kill")).exists():
            pid = int(target.read_text())
            target.unlink()
            os.kill(pid, signal.SIGKILL)
            raise SystemExit("its flow is dead")
        folder = pathlib.Path("data/models/grpo")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "w").write_text(pathlib.Path("data/degraded").read_text())
    """,
    "evaluate": """
        import json, pathlib, shutil
        knows = pathlib.Path("data/models/grpo/w").read_text()
        asked = pathlib.Path("data/bench/incoming/shard").read_text()
        name = "plain" if not asked else "after" if knows else "before"
        pathlib.Path("data/predictions").mkdir(parents=True, exist_ok=True)
        shutil.copy(f"code/{name}.parquet", "data/predictions/grpo.parquet")
        pathlib.Path("data/metrics/evaluate_grpo.json").write_text(json.dumps({"average": 0.5}))
    """,
}


def incoming_rows(right: int) -> list[dict]:
    """Sixty questions about thirty pictures of the set `fog`; the first `right` are answered rightly."""
    rows = [row for row in rows_of(images=30) if row["severity"] == "high"]
    for number, row in enumerate(rows):
        correct = number < right
        row |= {"sample": f"fog-{number // 2}", "corruption": "fog", "severity": INCOMING, "pair": ""}
        row |= {"correct": correct, "prediction": "red" if correct else "blue"}
    return rows


def tools(said: list[str]) -> Tools:
    """Plain commands, without Prefect. Every line that is said is kept."""

    def run(command: list[str], folder: Path) -> tuple[int, list[str]]:
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return done.returncode, done.stdout.splitlines()

    def dvc(arguments: list[str], folder: Path) -> None:
        said.append(f"dvc {' '.join(arguments)}")
        status, lines = run([sys.executable, "-m", "dvc", *arguments], folder)
        if status:
            raise ClearError(f"dvc {arguments}: {lines}")

    def reproduce(folder: Path, stages: list[str] | None) -> None:
        dvc(["repro", "--single-item", *(stages or ["degrade", "mmd_bench", "grpo", "evaluate@grpo"])], folder)

    def refused(name: str, problem: str) -> None:
        said.append(f"refused: {name}: {problem}")

    return Tools(dvc=dvc, reproduce=reproduce, run=run, say=said.append, refused=refused)


def look(project: Path, **options):
    """One check for news; returns its outcome and what was said."""
    said: list[str] = []
    return retrain(project, tools(said), **options), said


def trees(project: Path, branch: str) -> list[str]:
    """Trees and subjects of the commits on a branch, which do not depend on the time."""
    return git(project, "log", "--reverse", "--format=%T %s", f"main..{branch}").splitlines()


def untouched(project: Path) -> None:
    assert git(project, "status", "--porcelain") == "?? data/incoming/fog/\n"
    assert git(project, "branch", "--show-current").strip() == "main"

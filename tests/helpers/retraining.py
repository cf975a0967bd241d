"""A small project that retrains: its stages are a few lines each, its tools plain commands."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from dvc.repo import Repo

from clear.bench import predictions
from clear.data.records import INCOMING
from clear.errors import ClearError
from clear.project.retrain.run import Outcome, Tools, retrain
from clear.project.scratch import write_params
from tests.conftest import ROOT, git
from tests.helpers.forge import Forge
from tests.helpers.incoming_sets import put
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

    def proposed(outcome: Outcome) -> None:
        said.append(f"proposed: {outcome.branch}")

    return Tools(dvc=dvc, reproduce=reproduce, run=run, say=said.append, refused=refused, proposed=proposed)


def look(project: Path, **options):
    """One check for news; returns its outcome and what was said."""
    said: list[str] = []
    return retrain(project, tools(said), **options), said


def die(*given) -> None:
    """End this process as the kernel does: nothing of it runs any more."""
    os.kill(os.getpid(), signal.SIGKILL)


def killed(act: Callable[[], object]) -> None:
    """Do something in a process of its own that `die`s of it; what it patches stays its own."""
    child = os.fork()
    if not child:
        try:
            act()
        finally:  # never back into the test's own frames
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def trees(project: Path, branch: str) -> list[str]:
    """Trees and subjects of the commits on a branch, which do not depend on the time."""
    return git(project, "log", "--reverse", "--format=%T %s", f"main..{branch}").splitlines()


def untouched(project: Path) -> None:
    assert git(project, "status", "--porcelain") == "?? data/incoming/fog/\n"
    assert git(project, "branch", "--show-current").strip() == "main"


@pytest.fixture(scope="module")
def _trained(tmp_path_factory):
    """A small project with a model, committed; its data is in a DVC remote and its branches in a git remote."""
    folder = tmp_path_factory.mktemp("trained")
    project, origin, remote = folder / "project", folder / "origin.git", folder / "remote"
    project.mkdir()
    git(folder, "init", "-q", "-b", "main", "project")
    git(folder, "init", "-q", "--bare", "-b", "main", "origin.git")
    with Repo.init(str(project)) as repo, repo.config.edit("local") as own:
        own["core"]["remote"], own["remote"]["storage"] = "storage", {"url": str(remote)}
    (project / "dvc.yaml").write_text(STAGES.format(python=shlex.quote(sys.executable)).lstrip())
    (project / ".gitignore").write_text("/data/degraded\n/data/bench/\n/data/models/\n/.clear/\n/data/report/\n")
    write_params(project / "params.yaml")
    for name in ("code", "data/incoming"):
        (project / name).mkdir(parents=True)
    (project / "data/incoming/README.md").write_text("sets\n")
    for name, code in CODE.items():
        (project / f"code/{name}.py").write_text(textwrap.dedent(code).lstrip())
    benchmark = rows_of()
    for name, rows in {"plain": [], "before": incoming_rows(20), "after": incoming_rows(50)}.items():
        predictions.write(project / f"code/{name}.parquet", benchmark + rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.chdir(project)
        with Repo() as repo:
            repo.reproduce()
            git(project, "add", "-A")
            git(project, "commit", "-q", "-m", "trained")
            repo.push()
    shutil.rmtree(project / "data/bench")  # no pictures here, so nothing to show them from
    git(project, "remote", "add", "origin", str(origin))
    git(project, "push", "-q", "origin", "main")
    return folder


@pytest.fixture
def trained(_trained, tmp_path, monkeypatch):
    """A copy of the small project, which is also the working directory, with a new set `fog` under data/incoming."""
    folder = tmp_path / "trained"
    subprocess.run(["cp", "-r", str(_trained), str(folder)], check=True)
    project = folder / "project"
    git(project, "remote", "set-url", "origin", str(folder / "origin.git"))
    with Repo(str(project)) as repo, repo.config.edit("local") as own:
        own["remote"]["storage"]["url"] = str(folder / "remote")
    put(project / "data/incoming/fog", range(6))
    monkeypatch.chdir(project)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("GITHUB_TOKEN", "GITHUB_API_URL", "GITHUB_REPOSITORY"):
        monkeypatch.delenv(name, raising=False)
    return project


@pytest.fixture
def forge(monkeypatch):
    """A running forge, configured as a user would."""
    with Forge() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name, value in {"TOKEN": "t0ken", "API_URL": server.url, "REPOSITORY": "team/clear"}.items():
            monkeypatch.setenv(f"GITHUB_{name}", value)
        yield server
        server.shutdown()

"""Retraining through the real stages: the smoke pipeline learns from a new set, from validation to the pull request."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, git
from tests.helpers.incoming_sets import put
from tests.helpers.processes import run_dvc

pytestmark = pytest.mark.slow


@pytest.fixture
def project(clone, first, tmp_path):
    """The workspace of a smoke run, committed, with its data in a DVC remote and a git remote beside it."""
    folder, made = tmp_path / "project", first / "scratch/smoke"
    git(tmp_path, "clone", "-q", str(clone), "project")
    for one in (made / "data").iterdir():
        if one.is_dir() and not one.is_symlink():  # links lead to the clone, which has what they show
            shutil.copytree(one, folder / "data" / one.name, dirs_exist_ok=True)
    for name in ("params.yaml", "dvc.lock"):
        shutil.copy(made / name, folder / name)
    git(tmp_path, "init", "-q", "--bare", "-b", "main", "origin.git")
    git(folder, "remote", "set-url", "origin", str(tmp_path / "origin.git"))
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "The smoke pipeline")
    git(folder, "push", "-q", "origin", "main")
    run_dvc(folder, "cache", "dir", "-q", "--local", str(clone / ".dvc/cache"))
    run_dvc(folder, "remote", "add", "-q", "--local", "--default", "storage", str(tmp_path / "remote"))
    run_dvc(folder, "push", "-q")
    return folder


def _retrain(project) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CLEAR_HOME": str(project.parent / "home")}
    environment.pop("GITHUB_TOKEN", None)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = [sys.executable, "-m", "flows.retrain"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout.strip().splitlines()[-1]


def test_a_new_set_goes_through_every_stage_to_a_pull_request(project, tmp_path):
    put(project / "data/incoming/night", range(24))

    def at(revision: str) -> str:
        return git(project, "rev-parse", revision).strip()

    head = at("HEAD")
    said = _retrain(project)
    (branch,) = git(project, "for-each-ref", "--format=%(refname:short)", "refs/heads/retrain/").split()
    assert branch in said and branch.startswith("retrain/night-")
    assert at("HEAD") == head and not git(project, "diff", "--name-only"), "the workspace moved"

    steps = git(project, "log", "--reverse", "--format=%s", f"{head}..{branch}").splitlines()
    assert len(steps) == 3
    trained = json.loads(git(project, "show", f"{branch}:data/metrics/degrade.json"))
    assert trained["incoming"]["sets"]["night"]["fingerprint"]
    incumbent, retrained = at(f"{branch}~1"), at(branch)
    for sha in (incumbent, retrained):
        answered = json.loads(git(project, "show", f"{sha}:data/metrics/evaluate_grpo.json"))
        assert "night" in json.dumps(answered), "both models were asked about the new pictures"
    body = (project / "data/report" / branch / "pull_request.md").read_text()
    assert "night" in body and head[:7] not in body.splitlines()[0]

    other = tmp_path / "other"
    git(tmp_path, "clone", "-q", "-b", branch, str(tmp_path / "origin.git"), str(other))
    run_dvc(other, "remote", "add", "-q", "--local", "--default", "storage", str(tmp_path / "remote"))
    run_dvc(other, "pull", "-q")
    assert (other / "data/models/grpo").is_dir() and (other / "data/incoming/night/0.jpg").is_file()
    assert branch in _retrain(project), "it waits for review"
    assert git(project, "for-each-ref", "--format=%(refname:short)", "refs/heads/retrain/").split() == [branch]

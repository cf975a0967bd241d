"""A project whose model can be released: git with an origin, DVC with a remote in a folder, one model, evaluated."""

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

from clear.config import load
from clear.project.scratch import write_params
from tests.conftest import ROOT, git
from tests.revisions import fill, rows_of
from tests.tiny import save_random_model

STAGES = """
    artifacts:
      grpo: {path: data/models/grpo, type: model}
      sft: {path: data/models/sft, type: model}
    stages:
      source:
        cmd: mkdir -p data/samples && cp code/source.txt data/samples/sft
        deps: [code/source.txt]
        outs: [data/samples/sft]
      grpo:
        cmd: mkdir -p data/models && cp -r code/model data/models/grpo
        deps: [code/model, data/samples/sft]
        outs: [data/models/grpo]
      evaluate:
        foreach: {grpo: grpo}
        do:
          cmd:
            - mkdir -p data/predictions && cp code/${key}.parquet data/predictions/
            - cp code/evaluate_${key}.json data/metrics/
          deps: [code/evaluate_grpo.json, code/grpo.parquet, "data/models/${item}"]
          outs: ["data/predictions/${key}.parquet": {cache: false}, "data/metrics/evaluate_${key}.json": {cache: false}]
"""


def make(base: Path) -> Path:
    """The project in `base`/project, reproduced, committed and pushed to its two remotes, which lie beside it."""
    from dvc.repo import Repo

    folder, code = base / "project", base / "project/code"
    base.mkdir(parents=True, exist_ok=True)
    git(base, "init", "-q", "--bare", "-b", "main", "origin.git")
    git(base, "init", "-q", "-b", "main", "project")
    with Repo.init(str(folder)):
        pass
    (folder / "dvc.yaml").write_text(textwrap.dedent(STAGES))
    (folder / ".gitignore").write_text("/data/samples/\n/data/models/\n/.clear/\n")
    fill(base / "filled")
    code.mkdir()
    shutil.copy(base / "filled/data/predictions/grpo.parquet", code / "grpo.parquet")
    shutil.copytree(ROOT / "data/metrics", folder / "data/metrics")
    shutil.copytree(ROOT / "data/results", folder / "data/results")
    shutil.copy(ROOT / "data/metrics/evaluate_grpo.json", code / "evaluate_grpo.json")
    (code / "source.txt").write_text("samples")
    write_params(folder / "params.yaml")
    save_random_model(code / "model", load(folder / "params.yaml"))
    git(folder, "config", "user.name", "a person")
    git(folder, "config", "user.email", "person@localhost")
    git(folder, "config", "commit.gpgsign", "false")
    git(folder, "config", "tag.gpgsign", "false")
    dvc(folder, "remote", "add", "-d", "store", "../store")
    git(folder, "remote", "add", "origin", "../origin.git")
    reproduced(folder, "a model")
    git(folder, "push", "-q", "-u", "origin", "main")
    return folder


def dvc(folder: Path, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def reproduced(folder: Path, message: str) -> None:
    program = "from dvc.repo import Repo; repo = Repo(); repo.reproduce(); repo.push()"
    subprocess.run([sys.executable, "-c", program], cwd=folder, check=True, capture_output=True)
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", message)


def another(folder: Path, message: str, **answers) -> None:
    """A later commit with another model and other answers of it."""
    from clear.bench import predictions

    predictions.write(folder / "code/grpo.parquet", rows_of(**answers))
    (folder / "code/model/note.txt").write_text(message)
    reproduced(folder, message)


def copied(made: Path, folder: Path, monkeypatch) -> Path:
    """A copy of a project of `make`, given by the folder above it, with both its remotes and a home of its own."""
    shutil.copytree(made, folder / "all")
    monkeypatch.setenv("CLEAR_HOME", str(folder / "home"))
    return folder / "all/project"

"""What is edited while a stage runs: DVC would record the result as made from it."""

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from clear.cli.pipeline import run_stage
from clear.config import compose, from_dict
from clear.data import workspace
from clear.errors import ClearError
from clear.project.scratch import write_params
from clear.training.loop.run import StageRun
from tests.conftest import ROOT

DVC_YAML = """
stages:
  made: {cmd: python made.py, params: [seed], outs: [data/made.txt]}
  trained:
    foreach: {some: made}
    do:
      cmd: python trained.py "${key}"
      params: [seed, sft.lr, other.yaml: [some]]
      deps: [code, data/added, "data/${item}.txt"]
      outs: ["data/${key}.out"]
"""
STAGE = """
import sys
from pathlib import Path
from clear.data.workspace import require_unedited, unedited
with unedited():
    Path("data", "some.out" if sys.argv[1:] else "made.txt").write_text("x")
    exec(Path("meanwhile.py").read_text())
    require_unedited()
"""
PARAMS = "profile: tiny\nseed: 1\nsft: {lr: 0.1, steps: 5}\ngrpo: {lr: 0.2}\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A DVC project of two stages; what stands in meanwhile.py is done while one runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CLEAR_HOME", str(tmp_path / ".clear"))
    for name, text in {
        "dvc.yaml": DVC_YAML,
        "params.yaml": PARAMS,
        "made.py": STAGE,
        "trained.py": STAGE,
        "meanwhile.py": "",
        "code/lib.py": "1",
        "other.yaml": "some: 1\n",
        "code/__pycache__/lib.nbc": "",
        "data/added/set/a.csv": "1",
    }.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], check=True)
    shutil.copy(ROOT / ".dvcignore", ".dvcignore")
    return tmp_path


def repro(meanwhile: str = "") -> tuple[int, str]:
    Path("meanwhile.py").write_text(meanwhile)
    done = subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def test_dvc_records_nothing_of_a_stage_whose_inputs_were_edited_meanwhile(folder):
    """Through DVC itself: neither dvc.lock nor the run cache says that seed 1's result is seed 2's."""
    status, said = repro(
        "Path('params.yaml').write_text(Path('params.yaml').read_text().replace('seed: 1', 'seed: 2'))"
    )
    assert status and "params.yaml: seed: edited while this stage ran" in said, said
    assert not Path("dvc.lock").exists()
    assert repro()[0] == 0
    assert yaml.safe_load(Path("dvc.lock").read_text())["stages"]["trained@some"]["params"]["params.yaml"]["seed"] == 2


CHANGES = {
    "a parameter of it": (lambda: edit("params.yaml", "lr: 0.1", "lr: 0.3"), r"params\.yaml: sft\.lr: edited"),
    "a parameter that is gone": (lambda: edit("params.yaml", "seed: 1\n", ""), r"params\.yaml: seed: edited"),
    "parameters that cannot be read": (
        lambda: Path("params.yaml").write_text("a: ["),
        r"params\.yaml: seed, .* more: ",
    ),
    "code": (lambda: edit("code/lib.py", "1", "2"), r"code/lib\.py: edited"),
    "code that is new": (lambda: Path("code/new.py").write_text(""), r"code/new\.py: edited"),
    "code that is gone": (lambda: Path("code/lib.py").unlink(), r"code/lib\.py: edited"),
    "added data": (lambda: edit("data/added/set/a.csv", "1", "12"), r"data/added: edited"),
    "added data that is new": (lambda: Path("data/added/set/b.csv").write_text(""), r"data/added: edited"),
    "another stage's parameter": (lambda: edit("params.yaml", "0.2", "0.3"), ""),
    "code by another edit back": (lambda: (edit("code/lib.py", "1", "2"), edit("code/lib.py", "2", "1")), ""),
    "what a stage makes": (lambda: Path("data/made.txt").write_text("by the lock's holder alone"), ""),
    "what .dvcignore names": (lambda: Path("code/__pycache__/lib.nbi").write_text("compiled"), ""),
}


def edit(file: str, old: str, new: str) -> None:
    assert old in Path(file).read_text()
    Path(file).write_text(Path(file).read_text().replace(old, new))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("address", ["trained@some", "../dvc.yaml:trained@some"])
def test_only_what_the_stage_is_recorded_with_counts(folder, monkeypatch, change, address):
    meanwhile, said = CHANGES[change]
    monkeypatch.setenv("DVC_STAGE", address)
    if not said:
        with workspace.unedited():
            meanwhile()
            workspace.require_unedited()
        return
    with pytest.raises(ClearError, match=said + r".* Undo the edit and repeat"), workspace.unedited():
        meanwhile()
        workspace.require_unedited()


def test_a_stage_that_dvc_does_not_run_is_recorded_nowhere(folder, monkeypatch):
    monkeypatch.delenv("DVC_STAGE", raising=False)
    with workspace.unedited():
        edit("code/lib.py", "1", "2")
        workspace.require_unedited()
    monkeypatch.setenv("DVC_STAGE", "of_another_project")
    with workspace.unedited():
        edit("code/lib.py", "2", "1")
        workspace.require_unedited()


def test_a_training_keeps_its_checkpoints_so_that_an_edit_can_be_undone(folder, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "trained@some")
    config = from_dict(compose(["profile=smoke"]))
    with pytest.raises(ClearError, match="goes on from its last checkpoint"), workspace.unedited():
        run = StageRun("sft", config, [], folder / "checkpoints")
        (run.folder / "step").mkdir()
        edit("code/lib.py", "1", "2")
        run.finish("curve.csv")
    assert (run.folder / "step").is_dir() and not Path("curve.csv").exists()
    workspace.require_unedited()  # of the next stage in this process nothing is known yet


def test_an_edit_before_the_parameters_are_read_and_while_the_lock_is_waited_for_is_one_as_well(folder, monkeypatch):
    """The stage would begin with the new parameters and the old weights, or the other way round."""
    monkeypatch.setenv("DVC_STAGE", "trained@some")
    write_params(Path("params.yaml"), ["profile=smoke"])
    ran = []
    monkeypatch.setattr("clear.stages.sft.run", lambda *_, **__: ran.append(1))

    @contextmanager
    def waited(*_):
        edit("code/lib.py", "1", "2")
        yield

    monkeypatch.setattr("clear.data.lock.stage", waited)
    with pytest.raises(ClearError, match=r"code/lib\.py: edited while this stage ran"):
        run_stage("trained", "sft")
    assert not ran

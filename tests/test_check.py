"""`clear check`: silent where everything agrees, one line with a remedy for every kind of drift."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import yaml

from clear.errors import ClearError
from clear.project.check import drifts
from clear.project.git import output as git_output
from clear.project.retrain.request import repository
from clear.project.scratch import clone as scratch_clone
from clear.project.scratch import refresh
from tests.conftest import ROOT, git


def _replace(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def _only(project):
    (line,) = drifts(project)
    return line


def test_a_reproduced_project_agrees(project):
    assert drifts(project) == []


def test_a_fresh_clone_without_data_or_cache_agrees(project, tmp_path):
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(project), str(clone))
    assert not (clone / "data/samples").exists()
    assert drifts(clone) == []
    (clone / "code/lib/a.txt").write_text("edited")
    assert "code/lib" in _only(clone)


@pytest.fixture
def clone(project, tmp_path):
    """A fresh clone with an evaluation, which is not the one in dvc.lock."""
    (project / "data/metrics/evaluate_base.json").write_text('{"accuracy": {"clean": 1.0}}')
    git(project, "commit", "-q", "-a", "-m", "an evaluation")
    git(tmp_path, "clone", "-q", str(project), str(tmp_path / "clone"))
    return tmp_path / "clone"


def test_commands_that_only_read_write_nothing(clone, clear, monkeypatch):
    """`results` made the report's folder and DVC its own one, so a clone that may only be read was refused."""
    monkeypatch.chdir(clone)
    monkeypatch.setenv("CLEAR_HOME", str(clone / ".clear"))

    def state() -> dict:
        return {path: path.stat().st_mtime_ns for path in [clone, *clone.rglob("*")]}

    before = state()
    commands = (["results"], ["check"], ["compare", "HEAD"], ["gate", "HEAD"])
    assert [clear(*command)[0] for command in commands] == [0, 1, 0, 2], "no predictions to judge by in these commits"
    assert state() == before


@pytest.mark.skipif(not shutil.which("setpriv"), reason="drops the right of root to write everywhere")
@pytest.mark.parametrize(("command", "status"), [("results", 0), ("check", 1)])
def test_a_clone_that_may_only_be_read_is_enough(clone, command, status):
    call = [sys.executable, "-B", "-m", "clear", command]
    if os.geteuid() == 0:
        call = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all", *call]
    subprocess.run(["chmod", "-R", "a-w", str(clone)], check=True)
    try:
        environment = {name: value for name, value in os.environ.items() if name != "CLEAR_HOME"}
        environment |= {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(call, cwd=clone, env=environment, capture_output=True, text=True)
    finally:
        subprocess.run(["chmod", "-R", "u+w", str(clone)], check=True)
    said = {"results": "report: not rendered", "check": "1 drift found"}[command]
    assert done.returncode == status and said in done.stdout + done.stderr, done.stderr


def test_an_edited_parameter_is_named_against_conf_and_lock(project):
    _replace(project / "params.yaml", "pretrain: 10000", "pretrain: 9")
    conf, lock = drifts(project)
    assert conf == (
        "params.yaml: source.pretrain is 9, clear/conf composes to 10000: `clear params --adopt` keeps it, "
        "`make params` discards it."
    )
    assert lock == "params.yaml: source.pretrain is 9, dvc.lock has 10000 (stage source): run `dvc repro source`."


def test_a_parameter_of_two_stages_is_one_line(project):
    _replace(project / "dvc.lock", "seed: 20260421", "seed: 1")
    _replace(project / "dvc.lock", "seed: 20260421", "seed: 1")
    assert _only(project) == (
        "params.yaml: seed is 20260421, dvc.lock has 1 (stage source, evaluate): run `dvc repro`."
    )


@pytest.mark.parametrize("name", ["code/source.txt", "code/lib/a.txt"])
def test_edited_code_is_named(project, name):
    (project / name).write_text("edited")
    line = _only(project)
    assert name.removesuffix("/a.txt") in line
    assert "is not the version in dvc.lock" in line and "dvc repro" in line


def test_a_new_file_in_a_code_folder_is_drift_but_a_cache_file_is_not(project):
    (project / "code/lib/__pycache__").mkdir()
    (project / "code/lib/__pycache__/a.pyc").write_text("")
    (project / ".dvcignore").write_text("__pycache__\n")
    assert drifts(project) == []
    (project / "code/lib/b.txt").write_text("")
    assert "code/lib" in _only(project)


def test_data_added_by_hand_is_compared_by_its_own_lock(project):
    from dvc.repo import Repo

    (project / "data/incoming").mkdir()
    (project / "data/incoming/a.txt").write_text("a")
    with Repo() as repo:
        repo.add(["data/incoming"])
    _replace(project / "dvc.yaml", "deps: [code/lib, data/samples]", "deps: [code/lib, data/samples, data/incoming]")
    with Repo() as repo:
        repo.reproduce()
    shutil.rmtree(project / "data/incoming")
    assert drifts(project) == []
    (project / "data/incoming").mkdir()
    (project / "data/incoming/b.txt").write_text("b")
    with Repo() as repo:
        repo.add(["data/incoming"])
    assert "data/incoming was read in another version than incoming.dvc has" in _only(project)


def test_missing_code_is_named(project):
    (project / "code/source.txt").unlink()
    assert _only(project).startswith("dependency code/source.txt is missing (stage source)")


def test_an_edited_or_missing_result_is_named(project):
    result = project / "data/metrics/evaluate_base.json"
    result.write_text("99")
    line = _only(project)
    assert line.startswith("result data/metrics/evaluate_base.json is not the version in dvc.lock (stage evaluate)")
    assert "git checkout data/metrics/evaluate_base.json" in line
    result.unlink()
    assert "is missing" in _only(project)


def test_a_changed_command_is_named(project):
    _replace(project / "dvc.yaml", "cp code/source.txt", "cp  code/source.txt")
    assert _only(project).startswith("source has another command in dvc.yaml than in dvc.lock")


def test_a_stage_missing_from_the_lock_is_named(project):
    with (project / "dvc.yaml").open("a") as file:
        file.write("  report:\n    cmd: 'true'\n    deps: [code/lib]\n")
    assert _only(project) == "report is in dvc.yaml but not in dvc.lock (stage report): run `dvc repro report`."


@pytest.mark.parametrize("content", [b"\xff\xfe", b"- a\n", b"stages: 3\n", b"a: [\n", b""])
def test_a_damaged_lock_is_one_line(project, content):
    (project / "dvc.lock").write_bytes(content)
    with pytest.raises(ClearError, match=r"^[^\n]*dvc\.lock[^\n]*$"):
        drifts(project)


def test_new_dependencies_outputs_and_parameters_are_named(project):
    _replace(project / "dvc.yaml", "deps: [code/source.txt]", "deps: [code/source.txt, code/lib]")
    _replace(project / "dvc.yaml", "outs: [data/samples]", "outs: [data/samples, data/more]")
    _replace(project / "dvc.yaml", "params: [seed, source]", "params: [seed, source, bridge.kind]")
    lines = "\n".join(drifts(project))
    assert "code/lib is a dependency in dvc.yaml but not in dvc.lock" in lines
    assert "data/more is an output in dvc.yaml but not in dvc.lock" in lines
    assert "bridge.kind is 'mlp', dvc.lock has absent" in lines


def test_a_lock_merged_from_two_runs_is_named(project):
    lock = yaml.safe_load((project / "dvc.lock").read_text())
    (samples,) = (dep for dep in lock["stages"]["evaluate"]["deps"] if dep["path"] == "data/samples")
    samples["md5"] = "0" * 32
    (project / "dvc.lock").write_text(yaml.safe_dump(lock))
    assert _only(project) == (
        "data/samples was read in another version than source has in dvc.lock (stage evaluate): "
        "run `dvc repro evaluate`."
    )


def test_a_missing_or_broken_lock_and_a_missing_dvc_are_named(project, tmp_path):
    (project / "dvc.lock").write_text("nonsense")
    with pytest.raises(ClearError, match=r"dvc\.lock"):
        drifts(project)
    (project / "dvc.lock").unlink()
    assert _only(project).startswith("dvc.lock is not here")
    shutil.rmtree(project / ".dvc")
    with pytest.raises(ClearError, match="DVC cannot read"):
        drifts(project)


def test_git_that_refuses_or_is_missing_is_one_line_whoever_asks(project, tmp_path, monkeypatch):
    with pytest.raises(ClearError, match="failed: fatal: ") as refused:
        git_output(project, "log", "nothing", "--")
    assert "\n" not in str(refused.value)
    monkeypatch.setenv("PATH", str(tmp_path))
    for asked in (lambda: scratch_clone(project, "HEAD", tmp_path / "copy"), lambda: repository(project)):
        with pytest.raises(ClearError, match="git is not installed"):
            asked()


def test_a_file_whose_name_is_not_utf8_reaches_the_scratch_copy(project, tmp_path):
    name = os.fsdecode(b"caf\xe9.txt")
    (project / name).write_text("a name of another encoding")
    refresh(project, tmp_path / "copy")
    assert (tmp_path / "copy" / name).exists()


@contextmanager
def nobody(kind: str) -> Iterator[int]:
    """A descriptor on a full disk, or of a pipe whose reader has left (`| head`)."""
    if kind == "left":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open("/dev/full", os.O_WRONLY)
    try:
        yield writer
    finally:
        os.close(writer)


def run(*call: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-B", *call], env=os.environ | {"PYTHONPATH": str(ROOT)}, **options)


@pytest.mark.parametrize(("output", "status", "said"), [("full", 2, "error: output: No space left"), ("left", 141, "")])
def test_a_judgement_that_cannot_be_printed_is_not_the_judgement_no(project, output, status, said):
    """1 would say that the lock and the code disagree."""
    with nobody(output) as writer:
        done = run("-m", "clear", "check", cwd=project, stdout=writer, stderr=subprocess.PIPE, text=True)
    assert done.returncode == status and done.stderr.startswith(said) and (said or not done.stderr), done.stderr


@pytest.mark.parametrize("output", ["full", "left"])
def test_what_cannot_be_judged_keeps_its_status_where_nothing_can_be_printed(project, output):
    (project / "dvc.lock").write_text("nonsense")
    with nobody(output) as writer:
        assert run("-m", "clear", "check", cwd=project, stdout=writer, stderr=writer).returncode == 2


def test_a_thread_that_says_something_to_nobody_goes_on():
    """As the one of `clear serve` that answers requests, which tells when it is ready."""
    told = "threading.Thread(target=lambda: (say('ready'), os.write(2, b'goes on'))).start()"
    code = f"import os, threading; from clear.errors import say; {told}"
    with nobody("left") as writer:
        assert run("-c", code, stdout=writer, stderr=subprocess.PIPE).stderr == b"goes on"

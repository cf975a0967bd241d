"""Two stages never work in one folder, whoever started them: by hand, by a flow, or by one that was killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from clear.data import lock
from clear.data.lock import Busy, holder, lock_file, stage, stage_lock, writer
from clear.errors import UNDECIDED, ClearError
from clear.project import scratch
from clear.project.watch import folder_of
from tests.conftest import ROOT
from tests.helpers.processes import alive, python, wait_until
from tests.helpers.tables import b64, picture, write_tsv

STAGE = """
import os, pathlib, time
from clear.data.lock import stage
here = pathlib.Path.cwd()
with stage(here, "long"):
    (here / ".clear/at_work").write_text(str(os.getpid()))
    while not (here / ".clear/finish").exists():
        time.sleep(0.05)
    (here / "data").mkdir(exist_ok=True)
    (here / "data/long").write_text("done")
"""
STAGES = """
stages:
  long:
    cmd: python code/long.py
    deps: [code/long.py]
    outs: [data/long]
"""
PATIENCE = 300
"""Seconds for what ends by itself, on a machine that has much else to do."""


@pytest.fixture
def long(project):
    """A DVC project, below a folder with a space in its name, whose one stage works until it is told to finish."""
    folder = project.parent / "a folder" / "project"
    folder.parent.mkdir()
    project.rename(folder)
    os.chdir(folder)
    (folder / "dvc.yaml").write_text(STAGES)
    (folder / "dvc.lock").unlink()
    (folder / "code/long.py").write_text(STAGE)
    yield folder
    (folder / ".clear/finish").touch()


def start(folder: Path, *command: str, **variables: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, stderr=subprocess.PIPE, process_group=0)


def at_work(folder: Path) -> int:
    """Wait until the stage works; its process."""
    mark = folder / ".clear/at_work"
    wait_until(lambda: mark.exists() and mark.read_text(), PATIENCE, "a stage at work")
    return int(mark.read_text())


REPRO = (sys.executable, "-m", "dvc", "repro")
ALONE = (sys.executable, "-m", "clear.data.lock", ".", "--", *REPRO)


def test_a_stage_that_outlives_its_killed_dvc_keeps_everybody_else_out(long):
    first = start(long, *REPRO)
    pid = at_work(long)
    first.kill()
    first.wait()
    assert alive(pid)
    said = f"error: {long} is being written to by process {pid} since "
    for command in (REPRO, ALONE):
        second = start(long, *command)
        _, stderr = second.communicate(timeout=PATIENCE)
        assert second.returncode != 0
        (line,) = [line for line in stderr.splitlines() if "is being written to" in line]
        assert said.removeprefix("error: ") in line and "(stage long)" in line, line
    with pytest.raises(Busy, match=r"\(stage long\); run again when it has ended"), writer(long, "leave"):
        pass
    third = start(long, *REPRO, CLEAR_WHEN_BUSY="wait")
    assert "waiting until it ends" in next(line for line in third.stderr if "is being written to" in line)
    (long / ".clear/finish").touch()
    third.communicate(timeout=PATIENCE)
    assert third.returncode == 0 and (long / "data/long").read_text() == "done"


def test_a_killed_holder_leaves_a_stage_that_is_noticed_and_a_stage_of_the_holder_is_not_in_its_way(long):
    first = start(long, *ALONE)
    pid = at_work(long)
    assert json.loads(lock_file(long).read_text())["pid"] == first.pid != pid
    assert json.loads(stage_lock(long).read_text())["pid"] == pid
    first.kill()  # the holder of the writer's lock, which DVC and the stage outlive
    first.wait()
    with pytest.raises(Busy, match=f"process {pid} since .*stage long"), writer(long, "leave"):
        pass
    (long / ".clear/finish").touch()
    wait_until(lambda: not alive(pid), PATIENCE, "the end of the stage")
    with writer(long, "leave"):
        pass


def test_a_hand_typed_run_is_refused_while_a_flow_holds_the_workspace(long):
    with writer(long, label="flow run brave-otter"):
        stranger = start(long, *REPRO, CLEAR_WRITER="")
        _, stderr = stranger.communicate(timeout=PATIENCE)
        assert stranger.returncode != 0 and f"process {os.getpid()} since" in stderr and "brave-otter" in stderr
        for name in ("1", str(os.getppid())):  # another holder's
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(lock.HOLDER, name)
                with pytest.raises(Busy), stage(long, "long"):
                    pass
        assert os.environ[lock.HOLDER] == str(os.getpid())
        with stage(long, "long"):
            pass
    assert lock.HOLDER not in os.environ
    with pytest.MonkeyPatch.context() as patch:  # what is left in a shell
        patch.setenv(lock.HOLDER, str(os.getpid()))
        with stage(long, "long"), pytest.raises(Busy, match="stage long"), writer(long, "leave"):
            pass


def test_a_command_under_the_lock_gets_the_signals_and_tells_its_status(long):
    command = start(long, *ALONE[:5], sys.executable, "-c", "import sys; sys.exit(7)")
    assert command.wait(PATIENCE) == 7
    command = start(long, *ALONE[:5], "no-such-program", "x")
    assert command.communicate(timeout=PATIENCE)[1] == (
        "error: `no-such-program x` cannot be started: No such file or directory.\n"
    )
    for number, to_all in ((signal.SIGTERM, False), (signal.SIGINT, True)):
        (long / ".clear/at_work").unlink(missing_ok=True)
        command = start(long, *ALONE[:5], sys.executable, "code/long.py")
        pid = at_work(long)
        (os.killpg if to_all else os.kill)(command.pid, number)
        assert command.wait(PATIENCE) != 0 and not alive(pid), number


def test_every_stage_command_takes_the_lock(project, clear):
    hold = "import sys; from pathlib import Path; from clear.data.lock import writer\n"
    hold += "with writer(Path.cwd(), label='the holder'): print('held', flush=True); sys.stdin.read()"
    with python(hold, stdin=subprocess.PIPE) as process:
        assert process.stdout.readline() == "held\n"
        for command in (["validate"], ["evaluate", "base"]):
            status, _, stderr = clear(*command)
            assert (status, stderr.count("\n")) == (1, 1)
            assert f"{project} is being written to by process {process.pid} since" in stderr
        process.kill()


@pytest.mark.parametrize(
    ("command", "makes"),
    [
        (
            ["answer", "MMVet.tsv", "--endpoint", "http://127.0.0.1:9/v1", "--name", "m", "--out", "made"],
            "made/m/MMVet",
        ),
        (["merge", "model", "made"], "made"),
        (["quantise", "model", "made"], "made"),
        (["export", "model", "made"], "made"),
        (["incoming", "check", "fog"], "data/report/tiny/incoming/fog"),
        (["decision", "grpo"], ".clear/development/tiny/decision_grpo.json"),
        (["watch", "new"], "data/watch/new"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_command_that_is_begun_beside_itself_is_refused_before_it_writes(project, clear, monkeypatch, command, makes):
    """Two wrote one journal, or one partial folder, which the first to end put in place half made."""
    monkeypatch.setenv("CLEAR_HOME", str(project / ".clear"))
    (project / "model").mkdir()
    write_tsv(project / "MMVet.tsv", [{"index": 0, "image": b64(picture(0)), "question": "which ?", "answer": "red"}])
    place = folder_of("new") if command[0] == "watch" else project / makes
    before = sorted(project.rglob("*"))
    with lock.making(place, "the first"):
        status, _, stderr = clear(*command)
    assert status == (UNDECIDED if command[0] == "watch" else 1)
    said = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and f"error: {place} is being written to by process {os.getpid()} since" in said[0]
    made = {file for file in set(project.rglob("*")) - set(before) if file.is_file()}
    assert not {file for file in made if ".clear" not in file.parts} - {project / "made/replies.sqlite"}


def test_one_who_waits_makes_it_after_the_first(tmp_path, monkeypatch):
    monkeypatch.setenv("CLEAR_HOME", str(tmp_path / "home"))
    file, said = tmp_path / "made", []
    hold = "import pathlib, sys; from clear.data.lock import making\nwith making(sys.argv[1], 'the first'):\n"
    hold += "    print('held', flush=True); sys.stdin.readline(); pathlib.Path(sys.argv[1]).write_text('first')"
    with python(hold, str(file), stdin=subprocess.PIPE) as one:
        assert one.stdout.readline() == "held\n"
        threading.Timer(0.5, lambda: (one.stdin.write("\n"), one.stdin.flush())).start()
        (tmp_path / "link").symlink_to(file)
        with lock.making(tmp_path / "link", "the second", "wait", said.append):
            assert file.read_text() == "first", "the same file by another name"
    assert len(said) == 1 and "waiting until it ends" in said[0]


def test_a_second_scratch_run_of_a_profile_does_not_take_the_code_from_the_first(project):
    folder = scratch.run(Path(), "smoke")
    (project / "code/lib/later.txt").write_text("")
    with writer(folder, label="the first"):
        with pytest.raises(Busy, match=r"scratch/smoke is being written to by .*the first"):
            scratch.run(Path(), "smoke")
        assert not (folder / "code/lib/later.txt").exists()
    scratch.run(Path(), "smoke")
    assert (folder / "code/lib/later.txt").exists()


# The workspace's writer lock

HOLD = """
import sys, time
from pathlib import Path
from clear.data.lock import writer
with writer(Path(sys.argv[1]), label="the holder"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path):
    """A process that holds the writer lock of `tmp_path` until its stdin is closed."""
    with python(HOLD, str(tmp_path), stdin=subprocess.PIPE) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_writer_leaves_and_says_who_holds_the_workspace(held, tmp_path):
    started = time.strftime("%Y-%m-%dT", time.gmtime())
    with pytest.raises(Busy) as refused, writer(tmp_path, "leave"):
        pass
    for word in (str(tmp_path), f"process {held.pid} ", f"since {started}", "(the holder)", "-c"):
        assert word in str(refused.value)


def test_a_second_writer_waits_for_the_first_and_says_so_once(held, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.05)
    said, freed = [], threading.Event()

    def say(line: str) -> None:
        said.append(line)
        threading.Timer(0.3, free).start()  # it looks several times before that, and says nothing more

    def free() -> None:
        freed.set()
        held.stdin.close()

    with writer(tmp_path, "wait", say=say):
        assert freed.is_set(), "it waited"
        assert f"process {os.getpid()} " in holder(tmp_path)
    named = [line for line in said if f"process {held.pid} " in line]
    assert len(named) == 1 and "waiting" in named[0]
    assert lock_file(tmp_path).read_text() == ""


def test_the_lock_of_a_killed_writer_is_free(held, tmp_path):
    held.kill()
    held.wait()
    assert f"process {held.pid} " in holder(tmp_path), "its text is still there"
    with writer(tmp_path, "leave"):
        pass


FORK = """
import os, subprocess, sys, time
from pathlib import Path
from clear.data.lock import writer
with writer(Path(sys.argv[1])):
    child = subprocess.Popen(["sleep", "60"], close_fds=False, stdout=subprocess.DEVNULL)
    up, told = os.pipe()
    fork = os.fork()
    if not fork:
        os.write(told, b"up")
        os.close(1)
        time.sleep(60)
        os._exit(0)
    os.read(up, 2)
    print(child.pid, fork, flush=True)
    sys.stdin.read()
"""


def test_no_child_inherits_the_lock(tmp_path):
    with python(FORK, str(tmp_path), stdin=subprocess.PIPE) as process:
        children_ = [int(word) for word in process.stdout.readline().split()]
        try:
            process.kill()
            process.wait()
            assert all(alive(pid) for pid in children_)
            with writer(tmp_path, "leave"):
                pass
        finally:
            for pid in children_:
                os.kill(pid, signal.SIGKILL)


def test_the_same_process_cannot_write_twice_and_an_unknown_choice_is_refused(tmp_path):
    with writer(tmp_path), pytest.raises(Busy, match=f"process {os.getpid()} "), writer(tmp_path, "leave"):
        pass
    with pytest.raises(ClearError, match="when_busy = 'stay': choose one of wait, leave"), writer(tmp_path, "stay"):
        pass

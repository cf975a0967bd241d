"""One writer per workspace: a run of the pipeline in a folder holds `.clear/writer.lock` there until it ends.

The lock is an advisory `flock` on an open file. The kernel frees it when its process ends, however it ends, so a
crashed run leaves nothing to clean up; a run that is still alive after its supervisor died keeps holding it. No child
inherits it: the descriptor is closed on exec and in a bare fork. The file's content names the holder for human readers;
whether it is held is decided by the lock alone.

A stage is a writer too, whoever started it, so that a hand-typed `dvc repro` and a flow exclude each other. A stage
that the holder started, which the environment variable CLEAR_WRITER tells it, works under the holder's lock. Every
stage also holds `.clear/stage.lock`: a stage may outlive the `dvc repro`, or the holder, that started it, and nobody
may begin beside it.

Whatever else a command makes, a new folder or a table beside its journal, it makes alone (`making`).

`python -m clear.data.lock FOLDER … -- COMMAND …` runs a command as the only writer of the folders, or not at all;
with CLEAR_WHEN_BUSY=wait in the environment it waits for them, as a stage does.
"""

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from clear.data.io import acquire
from clear.errors import ClearError, fail, say, shown

CHOICES = ("wait", "leave")
POLL_SECONDS = 1.0
HOLDER = "CLEAR_WRITER"
"""Environment variable: the pid of the writer that a process works for."""
WHEN_BUSY = "CLEAR_WHEN_BUSY"
"""Environment variable: what commands without an option for it do, `wait` or `leave` (default)."""


class Busy(ClearError):
    """Another process writes to the workspace; the message says which."""


def lock_file(workspace: Path) -> Path:
    """The lock file of a workspace; not created here."""
    return workspace / ".clear" / "writer.lock"


def stage_lock(workspace: Path) -> Path:
    """The file that a stage of a workspace locks in addition; not created here."""
    return workspace / ".clear" / "stage.lock"


def remark(text: str) -> None:
    """Say something of a lock on stderr, beside the output of what is run."""
    say(text, sys.stderr)


def when_busy_here() -> str:
    """What the environment says that commands do where another process is in the way."""
    return os.environ.get(WHEN_BUSY) or "leave"


@contextmanager
def exported(name: str, value: str) -> Iterator[None]:
    """Give an environment variable a value in the block, for what is started there."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def writer(
    workspace: Path, when_busy: str = "wait", label: str = "", say: Callable[[str], None] = print
) -> Iterator[None]:
    """Be the only writer of `workspace` inside the block; stages that are started in it work under this lock.

    If another process is, `when_busy="wait"` waits until it ends, saying once who it is, and `"leave"` raises Busy at
    once. `label` is shown to others beside pid, start and command. Raises ClearError for any other `when_busy`, and
    OSError where the folder cannot be written.
    """
    with _held(lock_file(workspace), workspace, when_busy, label, say):
        with _held(stage_lock(workspace), workspace, when_busy, label, say):
            pass  # no stage is left that outlived its run; new ones ask for the writer's lock first
        with exported(HOLDER, str(os.getpid())):
            yield


@contextmanager
def stage(workspace: Path, name: str, say: Callable[[str], None] = remark) -> Iterator[None]:
    """Run a stage in the block, as the writer of `workspace` or on behalf of the process that is.

    Where another process writes or another stage runs, the environment decides as in `when_busy_here`: Busy is raised,
    or it is waited for. Raises OSError where the folder cannot be written.
    """
    with ExitStack() as held:
        if not _started_by_holder(workspace):
            held.enter_context(_held(lock_file(workspace), workspace, when_busy_here(), f"stage {name}", say))
        held.enter_context(_held(stage_lock(workspace), workspace, when_busy_here(), f"stage {name}", say))
        yield


@contextmanager
def making(path: Path | str, label: str, when_busy: str = "", say: Callable[[str], None] = remark) -> Iterator[None]:
    """Be the only process of this project that makes `path`, a file or folder, in the block; it need not exist.

    Where another one is, `when_busy` decides as in `writer`, by default what `when_busy_here` says. The lock's file is
    in the private folder of the project, named by a hash of the path. Raises OSError where it cannot be written.
    """
    from clear.data.workspace import home

    path = Path(path).absolute()
    file = home() / "locks" / hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    with _held(file, path, when_busy or when_busy_here(), label, say):
        yield


def _started_by_holder(workspace: Path) -> bool:
    """Whether the process that holds the workspace's lock is the one that CLEAR_WRITER names."""
    named, file = os.environ.get(HOLDER), lock_file(workspace)
    if not named or not file.exists():
        return False
    if (descriptor := acquire(file)) is not None:
        os.close(descriptor)
        return False
    return holder(workspace).startswith(f"process {named} ")


@contextmanager
def _held(file: Path, workspace: Path, when_busy: str, label: str, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock on `file`, with a text in it that names this process."""
    if when_busy not in CHOICES:
        raise ClearError(f"when_busy = {when_busy!r}: choose one of {', '.join(CHOICES)}.")
    file.parent.mkdir(parents=True, exist_ok=True)
    told = ""
    while (descriptor := acquire(file)) is None:
        busy = f"{shown(workspace)} is being written to by {holder(workspace, file)}"
        if when_busy == "leave":
            raise Busy(f"{busy}; run again when it has ended.")
        if busy != told:
            say(f"{busy}; waiting until it ends.")
            told = busy
        time.sleep(POLL_SECONDS)
    held = [descriptor]
    os.register_at_fork(after_in_child=lambda: [os.close(one) for one in held])
    try:
        command = " ".join(shlex.join(sys.orig_argv).split()) + (f" ({label})" if label else "")  # one line
        started = datetime.now(UTC).isoformat(timespec="seconds")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "started": started, "command": command}).encode(), 0)
        yield
    finally:
        held.clear()
        os.ftruncate(descriptor, 0)
        os.close(descriptor)


def holder(workspace: Path, file: Path | None = None) -> str:
    """Who wrote themselves into the lock file (default: the writer's): pid, start and command, or a remark where that
    cannot be read."""
    try:
        found = json.loads((file or lock_file(workspace)).read_text())
        return f"process {found['pid']} since {found['started']}: {found['command']}"
    except (OSError, ValueError, KeyError, TypeError):  # in the moment between the lock and its text
        return "a process that has just started"


def main(arguments: list[str]) -> int:
    """Run a command as the only writer of the folders before `--`; its status, or 1 with one line if one is busy.

    Signals of the terminal reach the command itself; SIGTERM is handed on. Both leave the command the time it needs.
    """
    if "--" not in arguments[:-1]:
        print("usage: python -m clear.data.lock FOLDER … -- COMMAND …", file=sys.stderr)
        return 2
    split = arguments.index("--")
    try:
        with ExitStack() as held:
            for folder in arguments[:split]:
                held.enter_context(writer(Path(folder).resolve(), when_busy_here(), say=remark))
            command = shlex.join(arguments[split + 1 :])
            try:
                process = subprocess.Popen(arguments[split + 1 :])
            except OSError as error:
                raise ClearError(f"`{command}` cannot be started: {error.strerror}.") from error
            signal.signal(signal.SIGINT, lambda number, frame: None)  # a handler, unlike SIG_IGN, is not inherited
            signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
            status = process.wait()
            return status if status >= 0 else 128 - status
    except ClearError as error:
        return fail(error)
    except KeyboardInterrupt:  # while waiting for the lock
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

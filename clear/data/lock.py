"""One writer per workspace: a run of the pipeline in a folder holds `.clear/writer.lock` there until it ends.

The lock is an advisory `flock` on an open file. The kernel frees it when its process ends, however it ends, so a
crashed run leaves nothing to clean up; a run that is still alive after its supervisor died keeps holding it. No child
inherits it: the descriptor is closed on exec and in a bare fork. The file's content names the holder for human readers
only; whether it is held is decided by the lock alone.

`python -m clear.data.lock FOLDER … -- COMMAND …` runs a command as the only writer of the folders, or not at all.
"""

import fcntl
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from clear.errors import ClearError

CHOICES = ("wait", "leave")
POLL_SECONDS = 1.0


class Busy(ClearError):
    """Another process writes to the workspace; the message says which."""


def lock_file(workspace: Path) -> Path:
    """The lock file of a workspace; not created here."""
    return workspace / ".clear" / "writer.lock"


@contextmanager
def writer(
    workspace: Path, when_busy: str = "wait", label: str = "", say: Callable[[str], None] = print
) -> Iterator[None]:
    """Be the only writer of `workspace` inside the block.

    If another process is, `when_busy="wait"` waits until it ends, saying once who it is, and `"leave"` raises Busy at
    once. `label` is shown to others beside pid, start and command. Raises ClearError for any other `when_busy`, and
    OSError where the folder cannot be written.
    """
    if when_busy not in CHOICES:
        raise ClearError(f"when_busy = {when_busy!r}: choose one of {', '.join(CHOICES)}.")
    file = lock_file(workspace)
    file.parent.mkdir(parents=True, exist_ok=True)
    told = ""
    while (descriptor := _acquire(file)) is None:
        busy = f"{workspace} is being written to by {holder(workspace)}"
        if when_busy == "leave":
            raise Busy(f"{busy}; run again when it has ended.")
        if busy != told:
            say(f"{busy}; waiting until it ends.")
            told = busy
        time.sleep(POLL_SECONDS)
    held = [descriptor]
    os.register_at_fork(after_in_child=lambda: [os.close(one) for one in held])
    try:
        command = shlex.join(sys.orig_argv) + (f" ({label})" if label else "")
        started = datetime.now(UTC).isoformat(timespec="seconds")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "started": started, "command": command}).encode(), 0)
        yield
    finally:
        held.clear()
        os.ftruncate(descriptor, 0)
        os.close(descriptor)


def holder(workspace: Path) -> str:
    """Who wrote themselves into the lock file: pid, start and command, or a remark where that cannot be read."""
    try:
        found = json.loads(lock_file(workspace).read_text())
        return f"process {found['pid']} since {found['started']}: {found['command']}"
    except (OSError, ValueError, KeyError, TypeError):  # in the moment between the lock and its text
        return "a process that has just started"


def _acquire(file: Path) -> int | None:
    """A descriptor that holds the lock, or None where another process does."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        os.close(descriptor)  # the file was deleted between opening and locking; its name is another file now


def main(arguments: list[str]) -> int:
    """Run a command as the only writer of the folders before `--`; its status, or 1 with one line if one is busy."""
    if "--" not in arguments[:-1]:
        print("usage: python -m clear.data.lock FOLDER … -- COMMAND …", file=sys.stderr)
        return 2
    split = arguments.index("--")
    try:
        with ExitStack() as held:
            for folder in arguments[:split]:
                held.enter_context(writer(Path(folder).resolve(), "leave"))
            return subprocess.run(arguments[split + 1 :], check=False).returncode
    except Busy as busy:
        print(f"error: {busy}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

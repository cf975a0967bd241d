"""Child processes that never outlive the flow that started them.

A command runs in a process group of its own under a small supervisor, which is this file run as a script. The flow
holds one end of a pipe, the supervisor reads the other: when the flow closes it, or dies in any way (SIGKILL
included), the supervisor ends the whole group of the command, SIGTERM first, SIGKILL after `grace()` seconds. The same
happens to what a command leaves behind in its group when it ends by itself. Nothing here needs Linux, and nothing is
imported from the project, so that the supervisor starts in milliseconds.

With a `lock` file the supervisor holds it until the group is gone. A run that takes over from one that was killed
therefore starts its first command only after the last command of the dead one has ended.
"""

import contextlib
import fcntl
import io
import os
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL for the command, unless $CLEAR_GRACE_SECONDS says otherwise."""
LONGEST = 86400.0
LAST_WAIT = 2.0
"""Seconds the supervisor waits for a killed group."""
PROGRESS_SECONDS = 15.0
"""Progress bars redraw several times a second; this often one state of them is passed on."""
KEPT_LINES = 200


def grace() -> float:
    """Seconds that a command has to leave; a training of long steps needs more, to save the one in progress.

    Raises ClearError where the variable is no such number.
    """
    said = os.environ.get("CLEAR_GRACE_SECONDS") or GRACE
    try:
        seconds = float(said)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= LONGEST:
        from clear.errors import ClearError  # not by the supervisor, which is told the seconds

        raise ClearError(f"CLEAR_GRACE_SECONDS={said} is not a number from 0 to {LONGEST:g}; correct or unset it.")
    return seconds


def start(
    command: list[str], folder: Path, environment: dict[str, str], lock: Path | None = None, **options
) -> subprocess.Popen:
    """Start a supervised command; `options` go to Popen (stdout, stderr). End it with `stop`."""
    supervisor = [sys.executable, "-I", "-S", __file__, str(lock or os.devnull), str(grace()), *command]
    return subprocess.Popen(supervisor, cwd=folder, env=environment, stdin=subprocess.PIPE, process_group=0, **options)


def stop(process: subprocess.Popen) -> int:
    """Let go of a supervised command and wait until its group has ended; returns its exit status."""
    process.stdin.close()
    try:
        return process.wait(grace() + LAST_WAIT + 1)
    except subprocess.TimeoutExpired:  # waits for a lock that is not released
        process.kill()
        return process.wait()


def run(
    command: list[str], folder: Path, environment: dict[str, str], say: Callable[[str], None], lock: Path | None = None
) -> tuple[int, list[str]]:
    """Run a command to its end, passing each line to `say` as it appears; returns (exit status, its last lines).

    Whatever ends this call early, such as a termination signal, ends the command's process group too, within
    grace() + LAST_WAIT seconds.
    """
    kept: deque[str] = deque(maxlen=KEPT_LINES)
    process = start(command, folder, environment, lock, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        for line in lines(process.stdout):
            kept.append(line)
            say(line)
        status = process.wait()
    finally:
        stop(process)
        process.stdout.close()
    return status, list(kept)


def settle(lock: Path) -> None:
    """Wait until no command runs under `lock`; after a killed flow that takes grace() + LAST_WAIT seconds at most."""
    if lock.exists():
        with lock.open("a") as held:
            fcntl.flock(held, fcntl.LOCK_EX)


def lines(stream: IO[bytes]) -> Iterator[str]:
    """Non-empty lines; of those that end in a carriage return (a progress bar redrawn) one per PROGRESS_SECONDS."""
    shown = time.monotonic()
    for line in io.TextIOWrapper(stream, errors="replace", newline=""):
        if not line.strip():
            continue
        if line.endswith("\r"):
            if time.monotonic() - shown < PROGRESS_SECONDS:
                continue
            shown = time.monotonic()
        yield line.strip()


def supervise(lock: str, patience: float, command: list[str]) -> int:
    """The supervisor: run `command` in its own group until it ends or standard input closes; returns its status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the pipe decides
    with Path(lock).open("a") as held:
        if lock != os.devnull:
            fcntl.flock(held, fcntl.LOCK_EX)
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
        try:
            while process.poll() is None and not select.select([0], [], [], 0.05)[0]:
                pass
        finally:
            _end_group(process, patience)
    return process.returncode if process.returncode is not None else 1


def _end_group(process: subprocess.Popen, patience: float) -> None:
    for number, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, LAST_WAIT)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            process.poll()
            try:
                os.killpg(process.pid, 0)
            except (ProcessLookupError, PermissionError):  # the latter is what macOS says of a group of dead processes
                return
            time.sleep(0.02)


if __name__ == "__main__":
    code = supervise(sys.argv[1], float(sys.argv[2]), sys.argv[3:])
    sys.exit(code if code >= 0 else 128 - code)

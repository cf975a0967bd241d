"""Processes of tests: start them, wait for what they do, see them end."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.conftest import ROOT

GONE_WITHIN = 10 * max(1.0, os.getloadavg()[0] / os.cpu_count())
"""Seconds; as many times more as others want this machine's cores."""


def python(code: str, *arguments: str, **options) -> subprocess.Popen:
    """Run Python code with the project on its path."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=environment, text=True, stdout=subprocess.PIPE, **options
    )


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and waits to be reaped does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def wait_until(condition, seconds: float, what: str):
    """Poll until `condition()` is true and return it; fail with `what` after `seconds`."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.05)
    return found


def next_second() -> None:
    """Wait until the clock shows another second, for what tells times apart by the second alone."""
    now = int(time.time())
    wait_until(lambda: int(time.time()) > now, 5, "another second")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_dvc(folder: Path, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

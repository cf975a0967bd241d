"""One run of a command for `make kill`: begun, perhaps ended or refused its files, and what it has left."""

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.conftest import ROOT
from tests.kill.commands import Command

PATIENCE = 10.0
HOOK = Path(__file__).parent / "hook"


@dataclass(frozen=True)
class Ended:
    """How a run of a command ended: exit status, output, errors, seconds from the signal to its end, and whether a
    process of it was left after twice PATIENCE."""

    status: int
    out: str
    errors: str
    seconds: float
    outlived: bool


@dataclass(frozen=True)
class Hook:
    """What tests/kill/hook does to a run at the `at`-th change of a file below its workspace: `KILL` ends the process
    before it, `EROFS` refuses it and all later ones of every process. 0 counts only, into `count`.<pid>."""

    at: int = 0
    does: str = "KILL"
    count: Path = field(default_factory=Path)


def run(
    arguments: tuple[str, ...],
    folder: Path,
    hook: Hook | None = None,
    signal_after: tuple[signal.Signals, float, bool] | None = None,
    temporary: Path | None = None,
) -> Ended:
    """Run a command to its end, by the hook's or a signal's doing, and wait until no process of it is left.

    `signal_after` is the signal, the seconds until then, and whether the whole process group gets it. `temporary` is
    the folder for temporary files, by default the system's.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("CLEAR_", "KILL_"))}
    environment |= {"CLEAR_HOME": str(folder / ".clear"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if temporary is not None:
        environment["TMPDIR"] = str(temporary)
    if hook is not None:
        environment |= {"KILL_AT": str(hook.at), "KILL_DOES": hook.does, "KILL_FOLDER": str(folder)}
        environment |= {"KILL_COUNT": str(hook.count), "PYTHONPATH": f"{HOOK}:{ROOT}"}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        command = [sys.executable, "-m", "clear", *arguments]
        begun = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=out, stderr=errors, start_new_session=True
        )
        told = time.monotonic()
        if signal_after:
            number, after, group = signal_after
            with contextlib.suppress(subprocess.TimeoutExpired):
                begun.wait(after)
            while number != signal.SIGKILL and begun.poll() is None and not _listens(begun.pid):
                time.sleep(0.005)  # before its first line Python alone decides what a signal does
            told = time.monotonic()
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if group else os.kill)(begun.pid, number)
        status = begun.wait()
        seconds = time.monotonic() - told
        outlived = not _all_gone(begun.pid)
        texts = []
        for file in (out, errors):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return Ended(status, texts[0], texts[1], seconds, outlived)


def _listens(process: int) -> bool:
    """Whether a process has a handler of SIGTERM, the last that the command line sets."""
    with contextlib.suppress(OSError):
        caught = Path(f"/proc/{process}/status").read_text().partition("SigCgt:")[2].split()
        return bool(caught and int(caught[0], 16) >> (signal.SIGTERM - 1) & 1)
    return False


def _all_gone(group: int) -> bool:
    """Wait for the last process of a group; one that stays is killed, and the answer is no."""
    end = time.monotonic() + 2 * PATIENCE
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(group, 0)
            time.sleep(0.05)
        os.killpg(group, signal.SIGKILL)
        return False
    return True


@contextlib.contextmanager
def fresh(command: Command, base: Path, below: Path | None = None) -> Iterator[Path]:
    """A copy of the workspace without what the command makes, in a new folder `below` (None: the system's)."""
    with tempfile.TemporaryDirectory(prefix="kill-", dir=below) as made:
        folder = Path(made).resolve() / "workspace"
        shutil.copytree(base, folder)
        for path in command.makes:
            shutil.rmtree(folder / path, ignore_errors=True)
            (folder / path).unlink(missing_ok=True)
        command.needs(folder)
        yield folder


def made(command: Command, folder: Path, ended: Ended) -> dict[str, str]:
    """Path → hash of every file that the command has made, or of what it has printed."""
    if not command.makes:
        return {"output": hashlib.sha256(ended.out.replace(str(folder), "").encode()).hexdigest()}
    found = {}
    for path in command.makes:
        below = (folder / path).rglob("*") if (folder / path).is_dir() else [folder / path]
        for file in sorted(below):
            if file.is_file() and not file.name.endswith(command.timed):
                found[file.relative_to(folder).as_posix()] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """The files that are not the same in both, by name."""
    return sorted(path for path in one | other if one.get(path) != other.get(path))

"""`make fuzz`: every reader under many inputs, each in a process of its own with limits; resumable, prints a table.

    python -m tests.fuzz.run INPUTS [TARGET …]

A reader returns or refuses in one line, within SECONDS of processor time and MEMORY beyond the imports, and writes
nowhere but in its folder. An input that breaks this is kept in tests/fuzz/corpus/<target>/, which the suite replays.
"""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from clear.data.io import aligned, write_json
from tests.fuzz.inputs import mutated
from tests.fuzz.targets import REFUSALS, TARGETS

CORPUS = Path(__file__).parent / "corpus"
SECONDS, MEMORY, PATIENCE = 1.0, 2**30, 120.0
"""Processor time of an input, memory in bytes, and the time after which a silent process is ended."""
SEED = 20260421


class Slow(BaseException):
    """Raised in the reader at the end of its time; no reader catches it."""


_allowed: list[str] = []


def _watch(event: str, arguments: tuple) -> None:
    if event != "open" or not _allowed or not isinstance(arguments[0], (str, bytes)):
        return
    path, mode = os.path.realpath(os.fsdecode(arguments[0])), arguments[2]
    if mode & (os.O_WRONLY | os.O_RDWR) and not path.startswith((_allowed[0], "/dev/")):
        raise PermissionError(f"fuzz: written outside: {path}")


def judged(name: str, data: bytes, seconds: float = SECONDS) -> str:
    """What is wrong with how target `name` takes `data`; empty if nothing is. With 0 `seconds` it may take its time."""

    def late(*_: object) -> None:
        raise Slow

    with tempfile.TemporaryDirectory() as folder:
        before = signal.signal(signal.SIGPROF, late)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        _allowed[:] = [os.path.realpath(folder)]
        try:
            TARGETS[name].read(data, Path(folder))
        except REFUSALS as error:
            return f"a refusal of several lines: {str(error)[:200]!r}" if "\n" in str(error) else ""
        except Slow:
            return f"more than {SECONDS:g} s"
        except BaseException as error:
            return f"{type(error).__name__}: {str(error)[:200]}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            _allowed.clear()
            signal.signal(signal.SIGPROF, before)
    return ""


def _child(name: str, end: int, state: Path) -> None:
    target = TARGETS[name]
    seeds, evil = target.seeds(), target.evil()
    for data in seeds:  # what is imported late belongs to no input
        judged(name, data, 0)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    sys.addaudithook(_watch)
    told = json.loads(state.read_text()) if state.exists() else {"done": 0, "seconds": 0, "slowest": 0, "findings": {}}
    at = state.with_suffix(".input")
    for number in range(told["done"], end):
        data = evil[number] if number < len(evil) else mutated(seeds, f"{SEED}/{name}/{number}")
        at.write_bytes(b"%d\n" % number + data)  # what a crash leaves
        began = time.process_time()
        wrong = judged(name, data)
        took = time.process_time() - began
        told["seconds"] += took
        told["slowest"] = max(told["slowest"], took)
        told["done"] = number + 1
        told["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        _note(name, data, wrong, told)
        if number % 50 == 0 or wrong:
            write_json(state, told)
    write_json(state, told)


def _note(name: str, data: bytes, wrong: str, told: dict) -> None:
    """Count a finding by its kind; the first of each kind is kept."""
    if not wrong:
        return
    kind = wrong.split(":")[0] if not wrong.startswith("written") else wrong
    if kind not in told["findings"]:
        (CORPUS / name).mkdir(parents=True, exist_ok=True)
        if len(data) <= 2**16:  # longer ones are made by hand and replayed as such
            (CORPUS / name / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
        print(f"{name}: {wrong}", flush=True)
    told["findings"][kind] = told["findings"].get(kind, 0) + 1


def _run(name: str, end: int, folder: Path) -> dict:
    """Run a target to `end` inputs; a crash or a hang is a finding, after which it goes on with the next input."""
    state = folder / f"{name}.json"
    at, told = state.with_suffix(".input"), {"done": 0, "seconds": 0, "slowest": 0, "findings": {}}
    while not state.exists() or json.loads(state.read_text())["done"] < end:
        at.unlink(missing_ok=True)
        child = subprocess.Popen([sys.executable, "-m", "tests.fuzz.run", "--child", name, str(end), str(state)])
        hung = _watched(psutil.Process(child.pid), at)
        if child.wait() == 0:
            break
        if not at.exists():
            raise SystemExit(f"{name}: its process ended with {child.returncode} before the first input.")
        number, _, data = at.read_bytes().partition(b"\n")
        told = json.loads(state.read_text()) if state.exists() else told
        _note(name, data, "hang" if hung else f"ended with {child.returncode}", told)
        write_json(state, told | {"done": int(number) + 1})
    return json.loads(state.read_text())


def _watched(child: psutil.Process, at: Path) -> bool:
    """Wait for the end of a process that notes each of its inputs in `at`; whether it hung at one and was ended."""
    told, since, used = None, time.monotonic(), 0.0
    while (status := child.status()) != psutil.STATUS_ZOMBIE:
        time.sleep(0.2)
        moved, spent = at.stat().st_mtime_ns if at.exists() else None, sum(child.cpu_times()[:2])
        if moved != told:
            told, since, used = moved, time.monotonic(), spent
        starved = spent - used < PATIENCE and status == psutil.STATUS_RUNNING  # it waits for a processor only
        if time.monotonic() - since > PATIENCE and not starved:
            child.kill()
            return True
    return False


def main() -> int:
    """Run the targets and print the table; 1 if there are findings."""
    if sys.argv[1] == "--child":
        _child(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
        return 0
    end, names = int(float(sys.argv[1])), sys.argv[2:] or list(TARGETS)
    folder = Path(os.environ.get("CLEAR_HOME", ".clear")) / "fuzz"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [("reader", "inputs", "seconds", "inputs/s", "slowest s", "peak MiB", "findings")]
    for name in names:
        told = _run(name, end, folder)
        found = ", ".join(f"{kind} ({count})" for kind, count in told["findings"].items()) or "none"
        rate = told["done"] / max(told["seconds"], 1e-9)
        figures = (told["done"], f"{told['seconds']:.1f}", f"{rate:.0f}", f"{told['slowest']:.3f}", told.get("peak", 0))
        rows.append((name, *map(str, figures), found))
        print(" ".join(rows[-1]), flush=True)
    print("\n".join(aligned(rows)))
    return any(row[-1] != "none" for row in rows[1:])


if __name__ == "__main__":
    sys.exit(main())

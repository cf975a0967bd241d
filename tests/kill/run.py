"""`make kill`: stages and long commands killed in the middle, then run again: are the bytes as if nothing had been?

    python -m tests.kill.run TRIALS [NAME …]

Each trial begins with what the command reads, ends it once, and types the same command again. It is ended in turn by
SIGKILL for its whole process group at a random moment, by SIGKILL for it alone, by SIGKILL just before a change of a
file (over all of them, evenly), and by SIGTERM or Ctrl-C, after which it must leave within PATIENCE seconds,
without a traceback or a process left. Resumable: what was tried is in $CLEAR_HOME/kill; prints a table.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from clear.data.io import aligned, write_json
from clear.project.scratch import write_params
from tests.conftest import ROOT
from tests.kill.commands import OTHERS, OVERRIDES, Command, stages

PATIENCE = 10.0
HOOK = Path(__file__).parent / "hook"
WAYS = ("group", "alone", "change", "asked")


@dataclass(frozen=True)
class Ended:
    """How a run of a command ended: exit status, output, errors, seconds from the signal to its end, and whether a
    process of it was left after twice PATIENCE."""

    status: int
    out: str
    errors: str
    seconds: float
    outlived: bool


def main() -> int:
    """Run the trials that are not done yet and print the table; 1 if one has failed."""
    trials, names = int(sys.argv[1]), sys.argv[2:]
    state = Path(os.environ.get("CLEAR_HOME", ".clear")).absolute() / "kill"
    known = stages() | OTHERS
    base = _base(state / "base")
    rows = [("command", "trials", "seconds", "changes", "slowest leave s", "failed")]
    for name in names or known:
        told = _tried(known[name], base, state / f"{name.replace(' ', '-')}.json", trials, name)
        failed = {key: why for key, why in told["trials"].items() if why}
        rows.append(
            (
                name,
                str(len(told["trials"])),
                f"{told['seconds']:.1f}",
                str(told["changes"]),
                f"{told['slowest']:.1f}",
                "; ".join(f"{key}: {why}" for key, why in failed.items()) or "none",
            )
        )
        print(" ".join(rows[-1]), flush=True)
    print("\n".join(aligned(rows)))
    return any(row[-1] != "none" for row in rows[1:])


def _base(folder: Path) -> Path:
    """The workspace with the results of every stage; made once."""
    if (folder / "complete").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_params(folder / "params.yaml", OVERRIDES)
    for name, command in stages().items():
        models = ("base", "sft_direct", "sft", "reencode", "bridge", "grpo") if name == "evaluate" else ("",)
        for model in models:
            arguments = (name, model) if model else command.arguments
            print(f"kill: {' '.join(arguments)}, to begin with", flush=True)
            ended = _run(arguments, folder)
            if ended.status:
                raise SystemExit(f"{' '.join(arguments)} fails without being killed: {ended.errors.strip()}")
    shutil.rmtree(folder / ".clear", ignore_errors=True)
    (folder / "complete").touch()
    return folder


def _tried(command: Command, base: Path, file: Path, trials: int, name: str) -> dict:
    """The state of a command after so many trials."""
    if file.exists():
        told = json.loads(file.read_text())
    else:
        with _fresh(command, base) as folder:
            count = folder.parent / "count"
            began = time.monotonic()
            ended = _run(command.arguments, folder, at=0, count=count)
            seconds = time.monotonic() - began
            if ended.status:
                raise SystemExit(f"{name} fails without being killed: {ended.errors.strip()}")
            changes = max((int(one.read_text()) for one in folder.parent.glob("count.*")), default=0)
            told = {"seconds": seconds, "changes": changes, "made": _made(command, folder, ended), "slowest": 0.0}
            told["trials"] = {}
        write_json(file, told)
    for number in range(len(told["trials"]), trials):
        with _fresh(command, base) as folder:
            way, why, left = _trial(command, folder, told, number, trials)
        told["trials"][f"{number} {way}"] = why
        told["slowest"] = max(told["slowest"], left)
        write_json(file, told)
        if why:
            print(f"{name}, trial {number} ({way}): {why}", flush=True)
    return told


@contextlib.contextmanager
def _fresh(command: Command, base: Path):
    """A copy of the workspace without what the command makes."""
    with tempfile.TemporaryDirectory(prefix="kill-") as made:
        folder = Path(made).resolve() / "workspace"
        shutil.copytree(base, folder)
        for path in command.makes:
            shutil.rmtree(folder / path, ignore_errors=True)
            (folder / path).unlink(missing_ok=True)
        command.needs(folder)
        yield folder


def _trial(command: Command, folder: Path, told: dict, number: int, trials: int) -> tuple[str, str, float]:
    """(how it was ended, what is wrong or "", seconds it took to leave when it was asked to)."""
    draw = random.Random(f"{command.arguments} {number}")
    way = WAYS[number % len(WAYS)]
    after = draw.uniform(0.0, told["seconds"])
    if way == "change":
        turns = max(1, trials // len(WAYS))
        at = 1 + (number // len(WAYS)) * max(1, told["changes"]) // turns
        ended, way = _run(command.arguments, folder, at=at), f"before change {at}"
    else:
        number_of = {"asked": draw.choice((signal.SIGTERM, signal.SIGINT))}.get(way, signal.SIGKILL)
        ended = _run(command.arguments, folder, signal_after=(number_of, after, way != "alone"))
        way = f"{number_of.name} {way} after {after:.1f} s"
    asked = "asked" in way
    if ended.outlived:
        return way, f"a process outlived it by {2 * PATIENCE:g} s", ended.seconds
    if asked and ended.status not in (0, 130, 143):
        return way, f"status {ended.status}: {ended.errors[-300:]}", ended.seconds
    if asked and ("Traceback" in ended.errors or ended.seconds > PATIENCE):
        return way, f"left after {ended.seconds:.1f} s with {ended.errors[-300:]!r}", ended.seconds
    again = ended if ended.status == 0 else _run(command.arguments, folder)  # it may have been quicker than the signal
    if again.status:
        return way, f"the same command again: status {again.status}: {again.errors[-300:]}", ended.seconds
    made = _made(command, folder, again)
    differ = sorted(path for path in made | told["made"] if made.get(path) != told["made"].get(path))
    why = f"other bytes: {', '.join(differ[:4])}" if differ else ""
    return way, why, ended.seconds if asked else 0.0


def _run(
    arguments: tuple[str, ...],
    folder: Path,
    at: int | None = None,
    count: Path | None = None,
    signal_after: tuple[signal.Signals, float, bool] | None = None,
) -> Ended:
    """Run a command to its end, by the hook's or a signal's doing, and wait until no process of it is left."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("CLEAR_", "KILL_"))}
    environment |= {"CLEAR_HOME": str(folder / ".clear"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if at is not None:
        environment |= {"KILL_AT": str(at), "KILL_FOLDER": str(folder), "PYTHONPATH": f"{HOOK}:{ROOT}"}
        environment["KILL_COUNT"] = str(count)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        command = [sys.executable, "-m", "clear", *arguments]
        run = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=errors, start_new_session=True)
        told = time.monotonic()
        if signal_after:
            number, after, group = signal_after
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.wait(after)
            told = time.monotonic()
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if group else os.kill)(run.pid, number)
        status = run.wait()
        seconds = time.monotonic() - told
        outlived = not _all_gone(run.pid)
        texts = []
        for file in (out, errors):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return Ended(status, texts[0], texts[1], seconds, outlived)


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


def _made(command: Command, folder: Path, ended: Ended) -> dict[str, str]:
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


if __name__ == "__main__":
    sys.exit(main())

"""`make kill`: stages and long commands ended, starved of disk or begun twice: are the bytes as if nothing had been?

    python -m tests.kill.run [--ways WAY,…] TURNS [NAME …]

Each trial begins with what the command reads, goes wrong once, and types the same command again. The ways:

- `group`, `alone`: SIGKILL for its whole process group, or for it alone, at a random moment;
- `change`: SIGKILL just before a change of a file, over all places of the code that make one, evenly; with as many
  turns, at each of them once;
- `asked`: SIGTERM or Ctrl-C, after which it must leave within PATIENCE seconds, without a traceback or a process left;
- `often`: the same up to OFTEN times, each time on what the time before has left, until it is done;
- `full`: a disk that is full after a share of the bytes that the command needs (over all of them, evenly);
- `read-only`: a disk that is read-only at first, and in later turns from one change of a file on: in both it must end
  with one line that names the reason and the remedy, and leave no file under its final name that is not whole;
- `twice`: it is begun twice on one workspace, at the same moment and in later turns a moment apart: one waits or is
  refused in one line.

Resumable: what was tried is in $CLEAR_HOME/kill; prints a table.
"""

import argparse
import contextlib
import errno
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from clear.data.io import aligned, write_json
from clear.project.scratch import write_params
from tests.kill.commands import OTHERS, OVERRIDES, Command, stages
from tests.kill.disk import PLENTY, mounted
from tests.kill.process import PATIENCE, Ended, Hook, differing, fresh, made, run

MOUNTED = ("full", "read-only")
OFTEN = 10


def main() -> int:
    """Run the trials that are not done yet and print the table; 1 if one has failed."""
    asked = argparse.ArgumentParser(prog="python -m tests.kill.run")
    asked.add_argument("--ways", type=lambda text: text.split(","), default=[*WAYS], help=f"of {','.join(WAYS)}")
    asked.add_argument("turns", type=int, help="trials of each command in each way")
    asked.add_argument("names", nargs="*")
    given = asked.parse_args()
    state = Path(os.environ.get("CLEAR_HOME", ".clear")).absolute() / "kill"
    known = stages() | OTHERS
    for kind, named, of in (("way", given.ways, WAYS), ("command", given.names, known)):
        if unknown := [*set(named) - set(of)]:
            raise SystemExit(f"no {kind} {unknown[0]!r}; choose of {', '.join(of)}.")
    base = _base(state / "base")
    rows = [("command", "trials", "seconds", "changes", "places", "room MB", "slowest leave s", "failed")]
    for name in given.names or known:
        told = tried(known[name], base, state / f"{name.replace(' ', '-')}.json", given.turns, name, given.ways)
        failed = {key: why for key, why in told["trials"].items() if why}
        rows.append(
            (
                name,
                str(len(told["trials"])),
                f"{told['seconds']:.1f}",
                str(told["changes"]),
                str(len(told["places"])),
                f"{told['room'] / 1e6:.1f}",
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
            ended = run(arguments, folder)
            if ended.status:
                raise SystemExit(f"{' '.join(arguments)} fails without being killed: {ended.errors.strip()}")
    shutil.rmtree(folder / ".clear", ignore_errors=True)
    (folder / "complete").touch()
    return folder


def tried(command: Command, base: Path, file: Path, turns: int, name: str, ways: list[str] | None = None) -> dict:
    """The state of a command after so many turns of the ways (all, if None)."""
    told = json.loads(file.read_text()) if file.exists() else _undisturbed(command, base, name)
    write_json(file, told)
    most = {"change": min(turns, len(told["places"]))}
    done = {key.partition(":")[0] for key in told["trials"]}
    for turn in range(turns):
        for way in ways or WAYS:
            if f"{way} {turn}" in done or turn >= most.get(way, turns):
                continue
            draw = random.Random(f"{command.arguments} {way} {turn}")
            trial = Trial(command, base, told, turn, most.get(way, turns), draw)
            with contextlib.ExitStack() as stack:
                if way in MOUNTED and (disk := stack.enter_context(mounted())) is None:
                    print(f"{name}, {way}: left out, only root mounts a small disk", flush=True)
                    continue
                how, why, left = WAYS[way](trial, disk) if way in MOUNTED else WAYS[way](trial)
            told["trials"][f"{way} {turn}: {how}"] = why
            told["slowest"] = max(told["slowest"], left)
            write_json(file, told)
            if why:
                print(f"{name}, {way} {turn} ({how}): {why}", flush=True)
    return told


def _undisturbed(command: Command, base: Path, name: str) -> dict:
    """What the command makes and needs: seconds, changes of files by its busiest process (for each place of the code
    that makes some, which they are), bytes of disk."""
    with mounted() as disk, fresh(command, base, disk and disk.folder) as folder:
        count, began = folder.parent / "count", time.monotonic()
        with disk.peak() if disk else contextlib.nullcontext([0]) as peak:
            ended = run(command.arguments, folder, Hook(count=count))
        if ended.status:
            raise SystemExit(f"{name} fails without being disturbed: {ended.errors.strip()}")
        processes = [json.loads(one.read_text()) for one in folder.parent.glob("count.*")]
        places = max(processes, key=lambda places: sum(map(len, places)), default=[])
        told = {"seconds": time.monotonic() - began, "changes": sum(map(len, places)), "places": places}
        told |= {"room": peak[0], "slowest": 0.0, "trials": {}}
        return told | {"made": made(command, folder, ended)}


@dataclass(frozen=True)
class Trial:
    """One trial of a command: `turn` of `turns`, with what `_undisturbed` told and random draws of its own."""

    command: Command
    base: Path
    told: dict
    turn: int
    turns: int
    draw: random.Random

    def share(self, of: int) -> int:
        """A place among `of` places for this turn: the turns cover them all evenly."""
        return int(of * (self.turn + self.draw.random()) / self.turns)

    def again(self, folder: Path, ended: Ended) -> str:
        """Type the command again, if it has not succeeded, and say what is wrong with the result, or "". Of one that
        was killed when all was done the refusal to do it once more is right."""
        last = ended if ended.status == 0 else run(self.command.arguments, folder)
        if last.status and not (ended.status < 0 and self.command.refuses and self.command.refuses in last.errors):
            return f"the same command again: status {last.status}: {last.errors[-300:]}"
        differ = differing(made(self.command, folder, last), self.told["made"])
        return f"other bytes: {', '.join(differ[:4])}" if differ else ""


def _killed(trial: Trial, whole_group: bool) -> tuple[str, str, float]:
    """SIGKILL at a random moment; as every way, (what was done, what is wrong or "", seconds it took to leave)."""
    after = trial.draw.uniform(0.0, trial.told["seconds"])
    with fresh(trial.command, trial.base) as folder:
        ended = run(trial.command.arguments, folder, signal_after=(signal.SIGKILL, after, whole_group))
        return f"after {after:.1f} s", _outlived(ended) or trial.again(folder, ended), 0.0


def _before_change(trial: Trial) -> tuple[str, str, float]:
    places = trial.told["places"]
    at = trial.draw.choice(places[trial.share(len(places))])
    with fresh(trial.command, trial.base) as folder:
        ended = run(trial.command.arguments, folder, Hook(at))
        return f"before {at}", _outlived(ended) or trial.again(folder, ended), 0.0


def _asked(trial: Trial, times: int) -> tuple[str, str, float]:
    """SIGTERM or Ctrl-C at random moments, up to so many times: each time the same command goes on."""
    given, slowest, why = [], 0.0, ""
    with fresh(trial.command, trial.base) as folder:
        while len(given) < times and not why:
            number = trial.draw.choice((signal.SIGTERM, signal.SIGINT))
            after = trial.draw.uniform(0.0, trial.told["seconds"])
            ended = run(trial.command.arguments, folder, signal_after=(number, after, True))
            given, slowest = [*given, f"{number.name} after {after:.1f} s"], max(slowest, ended.seconds)
            why = _not_left(ended)
            if ended.status == 0:
                break
        how = given[0] if times == 1 else f"{len(given)} signals, at last {given[-1]}"
        return how, why or trial.again(folder, ended), slowest


def _not_left(ended: Ended) -> str:
    """What is wrong with how a command has left after a signal, or ""."""
    if why := _outlived(ended):
        return why
    if ended.status not in (0, 130, 143):
        return f"status {ended.status}: {ended.errors[-300:]}"
    if "Traceback" in ended.errors or ended.seconds > PATIENCE:
        return f"left after {ended.seconds:.1f} s with {ended.errors[-300:]!r}"
    return ""


def _full(trial: Trial, disk) -> tuple[str, str, float]:
    room = trial.share(trial.told["room"])
    with fresh(trial.command, trial.base, disk.folder) as folder:
        temporary = folder.parent / "tmp"
        temporary.mkdir()
        disk.leave(room)
        ended = run(trial.command.arguments, folder, temporary=temporary)
        disk.leave(PLENTY)
        why = _outlived(ended) or refused(trial, folder, ended, errno.ENOSPC) or trial.again(folder, ended)
        return f"after {room} bytes", why, 0.0


def _read_only(trial: Trial, disk) -> tuple[str, str, float]:
    at = trial.share(trial.told["changes"]) + 1 if trial.turn else 0
    with fresh(trial.command, trial.base, disk.folder) as folder:
        if at:
            ended = run(trial.command.arguments, folder, Hook(at, "EROFS", folder.parent / "count"))
        else:
            disk.forbid()
            ended = run(trial.command.arguments, folder)
            disk.leave(PLENTY)
        why = _outlived(ended) or refused(trial, folder, ended, errno.EROFS) or trial.again(folder, ended)
        return f"from change {at}" if at else "from the beginning", why, 0.0


def _twice(trial: Trial) -> tuple[str, str, float]:
    apart = trial.draw.uniform(0.0, trial.told["seconds"]) if trial.turn else 0.0

    def begin(after: float) -> Ended:
        time.sleep(after)
        return run(trial.command.arguments, folder)

    with fresh(trial.command, trial.base) as folder, ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(begin, (0.0, apart)))
        how = f"{apart:.1f} s apart, status {runs[0].status} and {runs[1].status}"
        whole = [ended for ended in runs if ended.status == 0]
        for ended in runs:
            if ended.status and (why := _one_line(ended)):
                return how, why, 0.0
        if not whole:
            return how, f"neither is done: {' '.join(ended.errors[-200:] for ended in runs)}", 0.0
        return how, next(filter(None, (_outlived(one) or trial.again(folder, one) for one in whole)), ""), 0.0


def _outlived(ended: Ended) -> str:
    return f"a process outlived it by {2 * PATIENCE:g} s" if ended.outlived else ""


def _one_line(ended: Ended) -> str:
    """What is wrong with how a command has said why it ends: one line, no traceback, and status 1, or 2 ("cannot
    decide") of those that compare."""
    lines = [line for line in ended.errors.splitlines() if line.startswith("error: ")]
    if ended.status not in (1, 2) or len(lines) != 1 or "Traceback" in ended.errors:
        return f"status {ended.status} with {ended.errors[-600:]!r}"
    return ""


def refused(trial: Trial, folder: Path, ended: Ended, number: int) -> str:
    """What is wrong with a run that the disk has refused: what it said, or a file that is not whole under its name."""
    if ended.status == 0:
        return ""  # it needed no more, or did without
    if why := _one_line(ended):
        return why
    said = os.strerror(number)
    line = next(line for line in ended.errors.splitlines() if line.startswith("error: "))
    if said not in line or ";" not in line:
        return f"the line has no {said!r} and remedy: {line}"
    if not trial.command.makes:
        return ""
    left = made(trial.command, folder, ended)
    cut = [path for path, content in left.items() if content != trial.told["made"].get(path)]
    cut = [path for path in cut if not path.endswith((".partial", ".part"))]
    return f"not whole under its name: {', '.join(cut[:4])}" if cut else ""


WAYS: dict[str, Callable[..., tuple[str, str, float]]] = {
    "group": lambda trial: _killed(trial, True),
    "alone": lambda trial: _killed(trial, False),
    "change": _before_change,
    "asked": lambda trial: _asked(trial, 1),
    "often": lambda trial: _asked(trial, OFTEN),
    "full": _full,
    "read-only": _read_only,
    "twice": _twice,
}


if __name__ == "__main__":
    sys.exit(main())

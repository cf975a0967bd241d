"""The job: reproduce one stage on another machine. `python -m flows.batch.worker`, started by AWS Batch.

CLEAR_REQUEST names the request in S3 (flows/batch/request.py). In order: check out the commit and go on as its worker,
which may be newer than the image that holds this one; end where the result is in S3 already; make a workspace of the
request and refuse if an input differs from the request; fetch weights; fetch the newest checkpoint; `dvc repro` the one
stage, keeping checkpoints and the log in S3 meanwhile; push the outputs to the DVC remote; put the stage's entry of
dvc.lock, its small outputs and run records into S3, last a note that says so.

SIGTERM is the notice that the machine is reclaimed: the stage is asked to save, its checkpoint is kept, and the exit
status is 75, which lets Batch start the job again. A kill follows after 30 s, so everything ends before that.

A job on several machines makes the workspace on each of them and starts the stage's processes there; only the first
one writes. Exit status: 0 done, 1 refused or failed with one line, 75 preempted.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clear.data import aws
from clear.data.ports import spare_loopback
from clear.errors import ClearError, fail, refusal, say, without_secrets
from flows.batch.checkpoints import Keeper, forget, restore
from flows.batch.job import PREEMPTED
from flows.batch.notes import Inputs
from flows.batch.request import LOCK, check_out, expand, receive
from flows.batch.store import Store, client, split
from flows.batch.weights import fetch_weights
from flows.dvc_commands import NETWORK, Temporary
from flows.service import children

SAVE_SECONDS = 18.0
"""What a stage has for saving after SIGTERM; the rest of the 30 s is for the upload."""
PAUSES = (10.0, 60.0, 300.0, 900.0)
"""Seconds between tries of `dvc pull` and `dvc push` while the network fails."""
CLONE, WORKER = "clone", Path("flows/batch/worker.py")
LOG_SECONDS = 5.0
LOG_BYTES = 16 * 2**20
"""Of a longer log, S3 holds the beginning; CloudWatch has all of it."""


class Notice:
    """Whether this process was told to leave, and what it was doing."""

    def __init__(self) -> None:
        self.at: float | None = None
        self.ends_at_once = True

    def __call__(self, number: int, frame: object) -> None:
        """As a signal handler."""
        self.at = self.at or time.monotonic()
        if self.ends_at_once:
            raise SystemExit(PREEMPTED)


class Log:
    """Lines to standard output and a file, which is kept in S3."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._store: Store | None = None
        self._lock = threading.Lock()

    def keep_in(self, store: Store, name: str) -> None:
        """Upload every LOG_SECONDS from now on."""
        self._store, self._name, self._sent = store, name, 0
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            self.send()
            time.sleep(LOG_SECONDS)

    def send(self) -> None:
        """Upload what is new; a failure has no cost, the next round sends everything."""
        with self._lock, contextlib.suppress(ClearError):
            size = self.file.stat().st_size if self.file.exists() else 0
            if self._store is not None and self._sent < size <= LOG_BYTES:
                self._store.put(self.file, self._name)
                self._sent = size

    def say(self, line: str) -> None:
        """One line, without the secrets of the job's environment: what the log keeps outlives the job."""
        say(line)
        with self.file.open("a") as opened:
            opened.write(without_secrets(line) + "\n")


def run(request: str, work: Path, notice: Notice) -> int:
    """Do what a request (s3://…) asks for, in the empty folder `work`; returns the exit status."""
    bucket, name = split(request)
    prefix, _, name = name.partition("/requests/")
    store = Store(client("s3"), bucket, prefix)
    try:
        if not (work / CLONE).exists():
            _go_on_as_the_commit(store, f"requests/{name}", request, work)
        content = store.read(f"requests/{name}")
    except aws.Unreachable as error:
        fail(error)
        return PREEMPTED
    if content is None:
        raise ClearError(f"{request}: no such request; it is kept for some days only.")
    job = os.environ.get("AWS_BATCH_JOB_ID", "job").replace(":", "-").replace("#", "-")
    node = int(os.environ.get("AWS_BATCH_JOB_NODE_INDEX", 0))
    attempt = os.environ.get("AWS_BATCH_JOB_ATTEMPT", "1")
    key, log = content["key"], Log(work / "log.txt")
    if node == 0:
        log.keep_in(store, f"logs/{key}/{job}-{attempt}.log")
    try:
        return _run(store, content, key, job, node, work, log, notice)
    except (aws.Unreachable, Temporary) as error:  # nothing is wrong with the stage; what it has done so far is kept
        log.say(f"error: {error}")
        return PREEMPTED
    except (ClearError, OSError) as error:
        if (refused := refusal(error)) is None:
            raise
        log.say(f"error: {refused}")
        return 1
    finally:
        log.send()


def _go_on_as_the_commit(store: Store, name: str, request: str, work: Path) -> None:
    """Check out the commit of a request and become its worker; return where it has none, or the request no commit.

    The image is built for package versions and seldom: what a job does, and the forms of what it is told, are the
    commit's. So no form is asked of the request here.
    """
    content = store.read_bytes(name)
    try:
        check_out(store, json.loads(content or "{}"), work / CLONE)
    except (ValueError, KeyError, TypeError, ClearError):
        shutil.rmtree(work / CLONE, ignore_errors=True)
        return  # it is tried again where what is wrong goes into the log
    if not (work / CLONE / WORKER).exists() or Path(__file__).samefile(work / CLONE / WORKER):
        return
    say("going on as the worker of the commit")
    os.chdir(work / CLONE)  # in front of the import path
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until its handler is there
    command = [sys.executable, "-m", "flows.batch.worker", request, "--work", str(work)]
    os.execve(sys.executable, command, os.environ | {"PYTHONPATH": str(work / CLONE)})


def _run(store: Store, content: dict, key: str, job: str, node: int, work: Path, log: Log, notice: Notice) -> int:
    folder, home = work / CLONE, work / "home" / ".clear"
    environment = os.environ | {
        "CLEAR_HOME": str(home),
        "PATH": f"{shims(work)}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONUNBUFFERED": "1",
    }

    def dvc(*arguments: str) -> None:
        _dvc(arguments, folder, environment, log)

    if _handed_over(store, key, node, log):
        return 0
    begun = time.monotonic()
    inputs = receive(store, content, folder, lambda _, paths: dvc("pull", *paths))
    same_environment(folder)
    fetch_weights(folder, content.get("weights", ""), log.say)
    log.say(f"stage {inputs.stage} of {content['commit'][:12]}: inputs are the requested ones")
    checkpoints = home / "checkpoints"
    restore(store, key, checkpoints, log.say)
    if node:
        return _obey(["sh", "-c", inputs.cmd], folder, environment, log, notice)
    whole = int(os.environ.get("CLEAR_NODES", 1)) == 1
    keeper = Keeper(store, key, job, checkpoints, content["checkpoint_seconds"], log.say, whole)
    keeper.start()
    force = ["--force"] if content.get("force") else []
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", *force, inputs.stage]
    status = 1
    try:
        status = _obey(command, folder, environment, log, notice)
    finally:
        keeper.stop()
        if status:
            _last_checkpoint(keeper, log)
    if status:
        return status
    dvc("push", inputs.stage)
    _hand_over(store, inputs, key, job, folder, home, time.monotonic() - begun)
    _forget(store, key, log)
    return 0


def _handed_over(store: Store, key: str, node: int, log: Log) -> bool:
    """Whether the result is in S3 already: an attempt before this one has lost its machine after that.

    Every node looks: the others would wait for the first one, which has ended.
    """
    if store.usable(f"results/{key}.json") is None:
        return False
    log.say("the result is in S3 already, from an attempt that was lost after it had left it there: nothing is run")
    if node == 0:
        _forget(store, key, log)
    return True


def _forget(store: Store, key: str, log: Log) -> None:
    """Delete the checkpoints; a failure has no cost: the result is there, and the bucket's rules end old ones."""
    try:
        forget(store, key)
    except ClearError as error:
        log.say(f"checkpoints not removed from S3: {error}")


def _dvc(arguments: Sequence[str], folder: Path, environment: dict[str, str], log: Log) -> None:
    """Pull or push, also where the network fails for a while: what is lost with this machine has taken hours.

    Raises Temporary if it goes on failing, and ClearError for any other reason.
    """
    for pause in (*PAUSES, None):
        status, lines = children.run([sys.executable, "-m", "dvc", *arguments], folder, environment, log.say)
        if not status:
            return
        said = f"`dvc {' '.join(arguments)}` ended with status {status}: {' | '.join(lines[-3:])}"
        if not any(word in line for line in lines for word in NETWORK):
            raise ClearError(said)
        if pause is None:
            raise Temporary(said)
        log.say(f"the network fails, trying again in {pause:g} s")
        time.sleep(pause)


def _last_checkpoint(keeper: Keeper, log: Log) -> None:
    """Keep what there is; if that fails the last one kept counts, and why the stage ended is not covered up."""
    try:
        keeper.keep()
    except ClearError as error:
        log.say(f"checkpoint not kept in S3: {error}")


def _obey(command: list[str], folder: Path, environment: dict[str, str], log: Log, notice: Notice) -> int:
    """Run the stage; 0, PREEMPTED if this machine goes, or raises ClearError with its last lines."""
    last: list[str] = []

    def read() -> None:
        for line in children.lines(process.stdout):
            last.append(line)
            del last[:-3]
            log.say(line)

    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        process_group=0,
    )
    notice.ends_at_once = False  # from here on the signal is for the stage
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    asked = None
    # DVC dies of SIGTERM before the stage has saved, so the whole group is waited for.
    while process.poll() is None or (asked and _signal(process, 0)):
        if notice.at and asked is None:
            asked = time.monotonic()
            log.say("this machine is to go: the stage is asked to save")
            _signal(process, signal.SIGTERM)
        if asked and time.monotonic() - asked > SAVE_SECONDS:
            break
        time.sleep(0.1)
    _signal(process, signal.SIGKILL)  # what it has left behind
    process.wait()
    reader.join(2)
    if asked and process.returncode:
        return PREEMPTED
    if process.returncode:
        raise ClearError(f"the stage ended with status {process.returncode}: {' | '.join(last)}")
    return 0


def _signal(process: subprocess.Popen, number: int) -> bool:
    """Send a signal to the command's group; False if nothing of it is left."""
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _hand_over(store: Store, inputs: Inputs, key: str, job: str, folder: Path, home: Path, seconds: float) -> None:
    from dvc.utils.serialize import load_yaml

    entry = load_yaml(folder / LOCK)["stages"][inputs.stage]  # as DVC reads it: 1e-08 is a number, for PyYAML a word
    small = expand(folder, [name for name, cached in inputs.outs.items() if not cached])
    runs = {file.stem: file.read_text() for file in sorted(home.glob("runs/*/*.json"))}
    result: dict[str, Any] = {
        "stage": inputs.stage,
        "job": job,
        "lock": entry,
        "files": {name: store.keep(folder / name) for name in small},
        "runs": runs,
        "seconds": seconds,
    }
    store.write(f"results/{key}.json", result)


def same_environment(folder: Path) -> None:
    """Raise ClearError if the commit asks for other versions than those this image was built with."""
    mine, asked = (root / "infra" / "constraints.txt" for root in (Path(__file__).resolve().parents[2], folder))
    if mine.exists() and asked.exists() and mine.read_bytes() != asked.read_bytes():
        raise ClearError(
            "infra/constraints.txt of the commit is not the one this image was built with; build one with `make image`."
        )


def shims(work: Path) -> Path:
    """A folder for the front of PATH in which `python -m clear …` starts one process per GPU of the job.

    The stage's command in dvc.lock stays what it is. Empty for a job of one process.
    """
    folder = work / "bin"
    folder.mkdir(exist_ok=True)
    kind = os.environ.get("CLEAR_LAUNCH", "single")
    if kind == "single":
        return folder
    launch = shlex.join(launcher(kind, os.environ))
    python = shlex.quote(sys.executable)
    text = f'#!/bin/sh\nif [ "$1 $2" = "-m clear" ]; then exec {launch} "$@"; fi\nexec {python} "$@"\n'
    (folder / "python").write_text(text)
    (folder / "python").chmod(0o755)
    return folder


def launcher(kind: str, environment: Any) -> list[str]:
    """The accelerate command in front of `-m clear <stage>` for this node of a job."""
    gpus, nodes = (int(environment.get(name, 1)) for name in ("CLEAR_GPUS", "CLEAR_NODES"))
    options = ["--config_file", "infra/fsdp.yaml"] if kind == "fsdp" else ["--multi_gpu", "--mixed_precision", "no"]
    options += ["--num_processes", str(gpus * nodes), "--num_machines", str(nodes)]
    if nodes > 1:
        main = environment.get("AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS", "127.0.0.1")
        rank = environment.get("AWS_BATCH_JOB_NODE_INDEX", "0")
        options += ["--machine_rank", rank, "--main_process_ip", main, "--main_process_port", "29500"]
    return [sys.executable, "-m", "accelerate.commands.launch", *options]


def main(arguments: list[str] | None = None) -> int:
    """Run the job that CLEAR_REQUEST names; 0 done, 1 refused or failed, 75 preempted."""
    parser = argparse.ArgumentParser(prog="python -m flows.batch.worker", description="The job of one stage.")
    parser.add_argument("request", nargs="?", default=os.environ.get("CLEAR_REQUEST"), help="s3://…; or CLEAR_REQUEST")
    parser.add_argument("--work", type=Path, help="a folder that holds the clone already, and is removed at the end")
    given = parser.parse_args(arguments)
    if not given.request:
        parser.error("no request is named; set CLEAR_REQUEST")
    notice = Notice()
    signal.signal(signal.SIGTERM, notice)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    spare_loopback()
    work = given.work or Path(tempfile.mkdtemp(prefix="clear-"))
    try:
        return run(given.request, work, notice)
    except (ClearError, OSError) as error:
        if (refused := refusal(error)) is None:
            raise
        return fail(refused)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())

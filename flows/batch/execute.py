"""Where a stage runs: here, or as a job on AWS Batch (infra/compute.yaml; docs/CLOUD.md).

A stage placed on AWS Batch is submitted under a name that stands for its inputs. Asking again, after a crash or from
another run, finds the job that is queued or running, or the result that is there. While it runs, the flow shows its
log, renews its lease (flows/batch/leases.py) and watches what it costs; when the flow is cancelled or fails, the job is
ended unless another flow waits for it. From spot it moves on demand where spot has no machine in time or takes it away
too often. What comes back is taken over only if its entry of dvc.lock names exactly the requested inputs and every file
has the hash in it.
"""

import hashlib
import json
import re
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prefect import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, State

from clear.config import PARAMS, load
from clear.data.aws import Unreachable
from clear.data.io import write_json, write_text
from clear.data.workspace import profile
from clear.errors import ClearError, quoted
from flows.batch import cost, leases, settings
from flows.batch import job as batch
from flows.batch.leases import PATIENCE_SECONDS
from flows.batch.notes import Damaged, Inputs
from flows.batch.request import CACHED, LOCK, describe, environment_tag, remote_for_jobs, send
from flows.batch.settings import BatchJob, Compute
from flows.batch.store import Store
from flows.batch.weights import refuse_unreadable
from flows.dvc_commands import Temporary, dvc, environment, missing_outputs, remote_of

LOCAL, AWS_BATCH = "local", "aws_batch"


class Unusable(ClearError):
    """What a job sent is not what it was asked for."""


class Overspent(ClearError):
    """A job has cost more than it was allowed."""


def elsewhere(stage: str, workspace: Path, force: bool = False) -> State | None:
    """Reproduce a stage that is placed elsewhere; None if it runs here, and then its inputs are here.

    Raises ClearError if it failed or came back wrong, Temporary if AWS was out of reach.
    """
    places = placement(workspace)
    if AWS_BATCH not in places.values():
        return None
    compute = settings.load(workspace)
    settings.refuse_clusters(compute, load(workspace / PARAMS))
    say = get_run_logger().info
    if places.get(stage.partition("@")[0], LOCAL) == LOCAL:
        bring_inputs(stage, workspace, say)
        return None
    status = state(stage, workspace)
    if status == "same" and not force:
        return Completed(name="Cached", message=f"{stage}: up to date")
    if status == "cached" and not force:
        return None  # DVC has the outputs of an earlier run of these inputs here
    try:
        said = reproduce(stage, workspace, compute, say, f"{flow_run.id}" if force else "")
    except Unreachable as error:
        raise Temporary(f"stage {stage}: {error}") from error
    return Completed(name="Ran", message=f"{stage}: {said}")


def placement(workspace: Path) -> dict[str, str]:
    """Stage → place, as infra/compute.yaml says; empty where it is not there (an older revision, another project)."""
    return asdict(settings.load(workspace).place) if (workspace / settings.COMPUTE).exists() else {}


def state(stage: str, workspace: Path) -> str:
    """What `dvc repro` would do with a stage, missing data aside: "same", "cached" (it has the outputs) or "run"."""
    quiet: list[str] = []
    lines = dvc(["repro", "--single-item", "--dry", "--allow-missing", stage], workspace, quiet.append)
    if any(line.startswith(f"Stage '{stage}' didn't change, skipping") for line in lines):
        return "same"
    return "cached" if any(line.startswith(f"Stage '{stage}' is cached - skipping") for line in lines) else "run"


def bring_inputs(stage: str, workspace: Path, say: Callable[[str], None]) -> None:
    """Pull what a stage reads and what was left in the DVC remote because it is large."""
    if remote_of(workspace) is not None and (missing := missing_outputs(workspace, [stage])):
        say(f"fetching what stage {stage} needs here: {', '.join(missing)}")
        dvc(["pull", "--allow-missing", *missing], workspace, say)


def reproduce(
    stage: str, workspace: Path, compute: Compute, say: Callable[[str], None] = print, nonce: str = ""
) -> str:
    """Make a stage's outputs on AWS Batch, or find them made, and take them over; returns what it took, in words.

    `nonce` asks for a run of its own even if the same inputs have been run before.
    """
    inputs = describe(stage, workspace)
    key = inputs.key(nonce)
    account = batch.account(compute)
    store = Store(account.s3, account.outputs["Bucket"])
    try:
        if (result := store.read(f"results/{key}.json")) is not None:
            adopt(result, inputs, store, workspace, compute, say)
            return f"taken from job {result['job']}, which had run it"
    except (Damaged, Unusable) as error:  # whatever else fails, fails here, and the result was paid for
        say(f"the result of an earlier job is not used: {error}")
        store.delete(f"results/{key}.json")
    job = compute.jobs.get(stage.partition("@")[0]) or compute.jobs["default"]
    work = _Work(account, store, compute, job, inputs, key, workspace, say, bool(nonce))
    spent = work.run()
    result = store.read(f"results/{key}.json")
    if result is None:
        raise ClearError(f"stage {stage}: job {work.job_id} ended well and left no result in {store.url('results')}.")
    adopt(result, inputs, store, workspace, compute, say)
    _record(stage, workspace, result, {"aws_batch": {"job": work.job_id, "hours": work.hours, "usd_at_most": spent}})
    return f"ran as job {work.job_id}: {work.hours:.2f} h, {spent:.2f} USD at most"


@dataclass
class _Work:
    """One stage on its way through AWS Batch."""

    account: batch.Account
    store: Store
    compute: Compute
    job: BatchJob
    inputs: Inputs
    key: str
    workspace: Path
    say: Callable[[str], None]
    force: bool
    job_id: str = ""
    hours: float = 0.0
    ended: bool = False
    before: float = 0.0
    """US dollars of the jobs before this one: those that spot took away."""
    waiter: str = field(default_factory=lambda: str(flow_run.id or uuid.uuid4()))
    """Whose lease it is: the flow run's, so that its next attempt renews the same one."""

    def run(self) -> float:
        """Submit or find the job and wait for it; returns US dollars. If this call ends early, the job is ended unless
        others wait for it."""
        name = batch.job_name(self.compute.stack, self.inputs.stage, self.key)
        spot, self.job_id = batch.find(self.account, name) or (self.job.spot, "")
        estimate = cost.estimate(self.compute, self.job)
        try:
            if self.job_id:
                leases.renew(self.store, self.job_id, self.waiter)  # first: whoever leaves now must see it
                self.say(f"stage {self.inputs.stage} is already job {self.job_id}: waiting for it")
                self._enter(spot, estimate.allowed)  # whoever submitted it may not have come so far
            else:
                given = self.compute.weights, self.store.bucket, self.account.weights_bucket
                refuse_unreadable(self.inputs.stage, self.workspace, *given)
                remote_for_jobs(self.workspace, self.store.bucket)
                self.say(f"stage {self.inputs.stage} on AWS Batch, {estimate}")
                cost.settle(self.store, self.account.batch)
                spot = self._submit(name, spot, estimate.allowed)
            while (ended := self._follow(spot, estimate.allowed)) == "on demand":
                spot = self._submit(name, False, estimate.allowed - self.before)
        except Unreachable:
            raise  # the job continues; the next attempt finds it
        except BaseException as error:
            if self.job_id and not self.ended:
                with suppress(ClearError):  # then the sweeper ends it
                    self._leave(error)
            raise
        return ended

    def _leave(self, error: BaseException) -> None:
        if isinstance(error, Overspent):  # whoever else waits for it
            batch.terminate(self.account.batch, self.job_id, str(error))
        elif not leases.leave(self.store, self.account.batch, self.job_id, self.waiter, type(error).__name__):
            self.say(f"job {self.job_id} is not ended: another flow waits for it")

    def _submit(self, name: str, spot: bool, allowed: float) -> bool:
        """Whether the job that is there now, this one's or another flow's, is on spot."""
        with cost.reserved(self.store, self.compute, self.inputs.stage, self.key, allowed):
            spot = self._send(name, spot)
        leases.renew(self.store, self.job_id, self.waiter)
        self._enter(spot, allowed)
        self.say(f"job {self.job_id} in queue {self.account.queue(spot).split('/')[-1]}")
        return spot

    def _enter(self, spot: bool, allowed: float) -> None:
        """The job takes the place of its reservation in the ledger."""
        hourly = cost.hourly(self.compute, self.job, spot)
        cost.enter(self.store, self.job_id, self.inputs.stage, allowed, hourly=hourly)
        cost.release(self.store, self.key)

    def _send(self, name: str, spot: bool) -> bool:
        if here := [path for path in self._cached() if (self.workspace / path).exists()]:
            dvc(["push", *here], self.workspace, self.say)
        request = send(
            self.store,
            self.inputs,
            self.key,
            self.workspace,
            force=self.force,
            weights=self.compute.weights,
            checkpoint_seconds=self.compute.checkpoint_seconds,
        )
        image = self.compute.image or f"{self.account.outputs['Repository']}:{environment_tag(self.workspace)}"
        tags = {"stage": self.inputs.stage, "key": self.key}
        url = self.store.url(request)
        given = self.account, self.compute, self.job, image, name, spot, url, tags
        spot, self.job_id = batch.submit(*given, passed=self.job_id)
        self.ended = False
        return spot

    def _cached(self) -> list[str]:
        return [path for path, kind in self.inputs.kinds.items() if kind == CACHED]

    def _follow(self, spot: bool, allowed: float) -> float | str:
        """Wait until the job has ended; US dollars, or "on demand" if spot does not do; ClearError if it failed."""
        shown: dict[str, int] = {}
        answered, last = time.monotonic(), ""
        price = cost.hourly(self.compute, self.job, spot)
        while True:
            try:
                job = batch.describe(self.account.batch, self.job_id)
                leases.renew(self.store, self.job_id, self.waiter)
                self._show_log(shown)
                answered = time.monotonic()
            except Unreachable as error:
                if time.monotonic() - answered > PATIENCE_SECONDS:
                    raise
                self.say(f"AWS is out of reach, trying again: {error}")
                time.sleep(self.compute.poll_seconds)
                continue
            if job is None:
                if self._handed_over():
                    return self.before
                raise ClearError(f"stage {self.inputs.stage}: AWS Batch does not know job {self.job_id} any more.")
            if job["status"] != last:
                last = job["status"]
                self.say(f"job {self.job_id}: {last}")
            self.hours, self.ended = batch.hours(job), last in batch.ENDED
            spent = self.before + self.hours * price
            if self.ended:
                cost.enter(self.store, self.job_id, self.inputs.stage, allowed, self.hours * price, hours=self.hours)
                self._show_log(shown)
                if last == "SUCCEEDED":
                    return spent
                return self._failed(job, spot, spent)
            late = spot and last == "RUNNABLE" and batch.waiting(job) > self.compute.spot_wait_minutes * 60
            if late or spent > allowed:
                return self._give_up(late, price, spent, allowed)
            time.sleep(self.compute.poll_seconds)

    def _give_up(self, late: bool, price: float, spent: float, allowed: float) -> float | str:
        """End a job that is `late` to get a spot machine, or that has cost too much (else Overspent is raised)."""
        there = self._handed_over()
        if not (late or there):
            raise Overspent(
                f"stage {self.inputs.stage}: job {self.job_id} has cost {spent:.2f} USD, more than the "
                f"{allowed:.2f} it was allowed; its checkpoint is kept; raise compute.jobs.*.timeout_hours."
            )
        if not there:
            self.say(f"no spot machine within {self.compute.spot_wait_minutes:g} min: asking on demand")
        batch.terminate(self.account.batch, self.job_id, batch.NO_SPOT if late else "its result is there")
        cost.enter(self.store, self.job_id, self.inputs.stage, allowed, self.hours * price, hours=self.hours)
        self.before = spent
        return spent if there else "on demand"

    def _handed_over(self) -> bool:
        """Whether the result is there although its job has not ended well: the machine may be lost just after it."""
        if there := self.store.usable(f"results/{self.key}.json") is not None:
            self.say(f"job {self.job_id} has left its result before it ended: it is taken")
        return there

    def _failed(self, job: dict[str, Any], spot: bool, spent: float) -> float | str:
        if self._handed_over():
            return spent
        reason = job.get("statusReason") or job.get("container", {}).get("reason") or "no reason given"
        if reason.startswith(batch.LEFT):
            raise Temporary(
                f"stage {self.inputs.stage}: job {self.job_id} was ended by another flow that waited for it and has "
                "ended; the stage is submitted again."
            )
        if spot and (reason == batch.NO_SPOT or batch.reclaimed(job)):
            why = reason if reason == batch.NO_SPOT else "spot has taken the machine away too often"
            self.say(f"{why}: asking on demand")
            self.before = spent
            return "on demand"
        kept = [line for line in self._log_end() if line.startswith("error: ")]
        raise ClearError(f"stage {self.inputs.stage}: job {self.job_id} failed: {(kept or [reason])[-1]}")

    def _logs(self) -> list[str]:
        return sorted(self.store.names(f"logs/{self.key}/{self.job_id}-"))

    def _show_log(self, shown: dict[str, int]) -> None:
        for name in self._logs():
            content = self.store.read_bytes(name, shown.get(name, 0)) or b""
            whole = content[: content.rfind(b"\n") + 1]
            shown[name] = shown.get(name, 0) + len(whole)
            for line in whole.decode(errors="replace").splitlines():
                self.say(f"│ {line}")

    def _log_end(self) -> list[str]:
        names = self._logs()
        return (self.store.read_bytes(names[-1]) or b"").decode(errors="replace").splitlines() if names else []


def adopt(
    result: dict, inputs: Inputs, store: Store, workspace: Path, compute: Compute, say: Callable[[str], None]
) -> None:
    """Take over what a job has made: small outputs, the entry of dvc.lock, the data up to `fetch_mib`.

    Nothing changes here before the entry is known to belong to these inputs and every small file to the entry. Raises
    Unusable or Damaged where it does not, and ClearError where it cannot be put here.
    """
    entry = result["lock"]
    refuse_other_inputs(entry, inputs)
    arrived = workspace / ".clear" / "arrived"
    shutil.rmtree(arrived, ignore_errors=True)
    outs = {out["path"]: out for out in entry.get("outs", [])}
    for name, digest in result["files"].items():
        inside = any(name == out or name.startswith(f"{out}/") for out, kept in inputs.outs.items() if not kept)
        if not inside or ".." in Path(name).parts:
            raise Unusable(f"stage {inputs.stage}: the job sent {name}, which is not one of its outputs in git.")
        store.fetch(f"objects/{digest}", arrived / name, digest)
        wanted = outs.get(name, {}).get("md5")
        if wanted and _md5(arrived / name) != wanted:
            raise Unusable(f"stage {inputs.stage}: {name} is not the file that the job's entry of {LOCK} names.")
    for name in result["files"]:
        (workspace / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(arrived / name, workspace / name)
    shutil.rmtree(arrived, ignore_errors=True)
    cached = [name for name, kept in inputs.outs.items() if kept]
    large = [name for name in cached if outs[name].get("size", 0) > compute.fetch_mib * 2**20]
    for name in large:  # an older version must not be taken for this one
        path = workspace / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    merge_lock(workspace / LOCK, inputs.stage, entry)
    if fetched := [name for name in cached if name not in large]:
        dvc(["pull", "--force", *fetched], workspace, say)
    if large:
        say(f"left in the DVC remote until a stage here reads it: {', '.join(large)}")
    if state(inputs.stage, workspace) != "same":
        raise ClearError(
            f"stage {inputs.stage} came back and is still out of date; see `dvc status {inputs.stage}`; "
            "if what came back is wrong, run the stage with --force."
        )


def _md5(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "md5").hexdigest()


def refuse_other_inputs(entry: dict, inputs: Inputs) -> None:
    """Raise Unusable unless an entry of dvc.lock is of exactly these inputs."""
    params = {name: value for values in entry.get("params", {}).values() for name, value in values.items()}
    recorded = {
        "cmd": entry.get("cmd"),
        "deps": {dep["path"]: dep.get(dep.get("hash", "md5")) for dep in entry.get("deps", [])},
        "params": params,
        "outs": sorted(out["path"] for out in entry.get("outs", [])),
    }
    wanted = {"cmd": inputs.cmd, "deps": inputs.deps, "params": inputs.params, "outs": sorted(inputs.outs)}
    for name, value in wanted.items():
        if recorded[name] != value:
            raise Unusable(
                f"stage {inputs.stage}: the job's entry of {LOCK} has other {name} ({recorded[name]!r}) than it was "
                f"asked for ({value!r}); nothing is taken over."
            )


def merge_lock(file: Path, stage: str, entry: dict) -> None:
    """Put a stage's entry into dvc.lock, as DVC writes it but whole or not at all: cut, it still is YAML and DVC runs
    the stages that it lacks again."""
    from dvc.utils.serialize import dumps_yaml, parse_yaml_for_update

    content = parse_yaml_for_update(file.read_text(encoding="utf-8") if file.exists() else "", str(file))
    if not content:
        content["schema"] = "2.0"
    content["stages"] = content.get("stages", {})
    content["stages"][stage] = entry
    write_text(file, dumps_yaml(content))


def _record(stage: str, workspace: Path, result: dict, more: dict[str, Any]) -> None:
    """The job's run records, with what it cost, among this machine's."""
    folder = Path(environment(workspace)["CLEAR_HOME"]) / "runs" / profile(workspace)
    for name, text in ({stage.replace("@", "_"): "{}"} | result["runs"]).items():
        if not re.fullmatch(r"\w+", name):
            raise ClearError(f"stage {stage}: the job sent a run record called {quoted(name)}, which no stage has.")
        write_json(folder / f"{name}.json", json.loads(text) | more)

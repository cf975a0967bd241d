"""End jobs on AWS Batch that nobody waits for: `python -m flows.sweep`, or deployed and scheduled.

A flow that is cancelled ends its job itself, unless another one waits for it. One that is killed, or whose machine is
lost, cannot: it no longer renews its lease of the job (flows/batch/leases.py). A job of this stack is ended if none of
its leases is younger than `minutes`. Its checkpoint stays, so that the stage resumes when it is requested again. What
jobs have cost that ended without their flow is entered into the ledger while Batch still knows it.
"""

import argparse
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from prefect import flow, get_run_logger

from clear.data import aws
from clear.data.ports import spare_loopback
from clear.errors import ClearError, fail
from flows.batch import cost, leases, settings
from flows.batch import job as batch
from flows.batch.leases import MINUTES
from flows.batch.settings import Compute
from flows.batch.store import Damaged, Store
from flows.service.announce import announce


def sweep(
    compute: Compute,
    minutes: float = MINUTES,
    say: Callable[[str], None] = print,
    tell: Callable[[list[str]], object] = lambda ended: None,
) -> list[str]:
    """End the jobs of the stack that have no owner; returns their ids. `tell` hears of them even where another job
    cannot be ended, which is raised once all were tried."""
    account = batch.account(compute)
    store = Store(account.s3, account.outputs["Bucket"])
    ended, failed = [], []
    try:
        for job in _jobs(account, compute.stack):
            try:
                if reason := _orphaned(job, store, minutes):
                    say(f"ending job {job['jobId']} ({job['jobName']}): {reason}")
                    batch.terminate(account.batch, job["jobId"], f"swept: {reason}")
                    ended.append(job["jobId"])
            except ClearError as error:  # the others are paid for as well
                say(f"job {job['jobId']} is not ended: {error}")
                failed.append(error)
        try:
            cost.settle(store, account.batch)
        except ClearError as error:
            say(f"what ended jobs have cost is not entered: {error}")
            failed.append(error)
    finally:
        if ended:
            tell(ended)
    if failed:
        raise failed[0]
    return ended


def _jobs(account: batch.Account, stack: str) -> list[dict]:
    """Jobs of this stack's flows that have not ended; others in the same queues are left alone."""
    jobs = []
    for spot in (True, False):
        queue = account.queue(spot)
        with aws.explained(f"jobs in {queue}"):
            for status in batch.ACTIVE:
                pages = account.batch.get_paginator("list_jobs").paginate(jobQueue=queue, jobStatus=status)
                listed = [summary["jobId"] for page in pages for summary in page["jobSummaryList"]]
                for start in range(0, len(listed), 100):
                    jobs += account.batch.describe_jobs(jobs=listed[start : start + 100])["jobs"]
    return [job for job in jobs if job.get("tags", {}).get(batch.TAG) == stack]


def _orphaned(job: dict, store: Store, minutes: float) -> str:
    """Why a job has no owner; empty if it has one."""
    held = leases.of(store, job["jobId"])  # now: a flow may just have begun to wait for it
    last = max(held, key=lambda name: held[name], default="")
    age = leases.age(held[last] if last else datetime.fromtimestamp(job.get("createdAt", 0) / 1000, UTC))
    if age <= minutes:
        return ""
    try:
        run = (store.read(last) or {}).get("flow_run") if last else None
    except Damaged:  # who it was is not what decides
        run = None
    who = f"; the last was flow run {run}" if run else ""
    return f"nobody has asked for it for {age:.0f} min{who}"


@flow(name="sweep")
def sweep_jobs(workspace: str = ".", minutes: float = MINUTES) -> list[str]:
    """End jobs that nobody waits for; returns their ids. Where nothing could have been submitted, AWS is not asked.

    The places alone do not say that: a stage may have been moved back, or placed there by the revision of a clone.
    """
    from flows.batch.execute import AWS_BATCH, placement

    folder = Path(workspace).resolve()
    placed = placement(folder)
    if AWS_BATCH not in placed.values() and not (placed and settings.load(folder).budget_usd):
        get_run_logger().info("no stage is placed on AWS Batch and compute.budget_usd is 0: nothing to sweep.")
        return []
    lines: list[str] = []

    def say(line: str) -> None:
        get_run_logger().info(line)
        lines.append(line)

    def tell(ended: list[str]) -> None:
        count = f"{len(ended)} {'job' if len(ended) == 1 else 'jobs'}"
        announce("swept", f"{count} without an owner ended", "; ".join(lines), "python -m flows.sweep")

    return sweep(settings.load(folder), minutes, say, tell)


def main(arguments: list[str] | None = None) -> int:
    """Sweep once, whatever compute.place says; 0 done, 1 refused with one line."""
    parser = argparse.ArgumentParser(prog="python -m flows.sweep", description="End jobs that nobody waits for.")
    parser.add_argument("workspace", nargs="?", default=".", help="the project's folder")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"age of a dead lease (default {MINUTES:g})")
    given = parser.parse_args(arguments)
    spare_loopback()
    try:
        ended = sweep(settings.load(Path(given.workspace)), given.minutes)
    except ClearError as error:
        return fail(error)
    print(f"{len(ended)} jobs ended" if ended else "every job has an owner")
    return 0


if __name__ == "__main__":
    sys.exit(main())

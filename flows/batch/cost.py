"""What a job may and did cost: estimates before, a monthly budget that refuses, actual time after.

Prices are the estimates of `compute.prices`, at the most expensive of the job's instance types, so the figures
are upper bounds; storage and traffic are not included. A job is allowed the cost of one whole attempt on demand
(`timeout_hours`); the flow ends it when that is spent, whatever machine it ran on. The month's ledger in S3 holds what
each job was allowed, from before it is sent, and, once it has ended, what it cost; the sum may not exceed
`compute.budget_usd`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clear.data.aws import Unreachable
from clear.errors import ClearError
from flows.batch.job import ENDED, describe, hours
from flows.batch.settings import BatchJob, Compute
from flows.batch.store import Store

RESERVED = "reserved-"
"""How the note of a job begins that is being submitted; its key follows."""


class OverBudget(ClearError):
    """A job is not submitted because of what it may cost; infra/alerts.yaml knows such a failure by this name."""


@dataclass(frozen=True)
class Estimate:
    """US dollars of one job, and the hours they are for."""

    expected: float
    allowed: float
    hours: float

    def __str__(self) -> str:
        return (
            f"estimate: {self.expected:.2f} USD for {self.hours:g} h, {self.allowed:.2f} USD at most "
            "(prices of compute.prices, storage and traffic not included)"
        )


def hourly(compute: Compute, job: BatchJob, spot: bool) -> float:
    """US dollars per hour of all machines of a job, at its most expensive instance type."""
    prices = [compute.prices[name] for name in job.instance_types]
    return job.nodes * max(price.spot if spot else price.on_demand for price in prices)


def estimate(compute: Compute, job: BatchJob) -> Estimate:
    """What the job is expected to cost where it starts, and what it is allowed."""
    expected = job.expected_hours * hourly(compute, job, job.spot)
    return Estimate(expected, job.timeout_hours * hourly(compute, job, False), job.expected_hours)


def spent(store: Store, month: str | None = None) -> float:
    """US dollars of this (or the named, YYYY-MM) month: what ended jobs cost, what the others are allowed."""
    notes = [store.read(name) or {} for name in store.names(f"ledger/{month or _month()}/")]
    return sum(note.get("allowed", 0.0) if note.get("cost") is None else note["cost"] for note in notes)


def settle(store: Store, batch: Any) -> None:
    """Enter what the jobs of this month cost that have ended without their flow: cancelled, swept, or it was gone.

    Batch knows an ended job for about a week; the sweeper asks in time. One that it has forgotten stays at what it was
    allowed. What a job says of itself (`seconds` of its result) is not used: it is that of the last attempt alone, and
    a job must have no say in what was spent.
    """
    for name in store.names(f"ledger/{_month()}/"):
        note = {} if Path(name).name.startswith(RESERVED) else store.read(name) or {}
        if note.get("cost") is None and "hourly" in note:
            job = describe(batch, Path(name).stem)
            if job is not None and job["status"] in ENDED:
                store.write(name, note | {"cost": hours(job) * note["hourly"], "hours": hours(job)})


@contextmanager
def reserved(store: Store, compute: Compute, stage: str, key: str, allowed: float) -> Iterator[None]:
    """Set aside what a job may cost while the block submits it, and until `release`; if it fails, it is free again.

    It is written before the month is added up, so that of two flows that ask at the same moment at most one is let
    through; and it stays where this process ends in the block, because the job may have been submitted. Raises
    OverBudget if the month might exceed the budget with it.
    """
    release(store, key)  # one of an earlier attempt, perhaps of another month
    name = f"ledger/{_month()}/{RESERVED}{key}.json"
    store.write(name, {"stage": stage, "allowed": allowed, "cost": None})
    try:
        if (total := spent(store)) > compute.budget_usd:
            raise OverBudget(
                f"stage {stage} is not submitted: it may cost {allowed:.2f} USD, this month's jobs "
                f"{total - allowed:.2f}, and compute.budget_usd is {compute.budget_usd:.2f}; raise it in "
                "infra/compute.yaml, or lower compute.jobs.*.timeout_hours."
            )
        yield
    except Unreachable:
        raise  # it may have arrived
    except Exception:
        store.delete(name)
        raise


def release(store: Store, key: str) -> None:
    """Take back what is set aside for a job, which is entered by its own name."""
    store.delete(*(name for name in store.names("ledger/") if name.endswith(f"/{RESERVED}{key}.json")))


def enter(store: Store, job_id: str, stage: str, allowed: float, cost: float | None = None, **more) -> None:
    """Write a job into the ledger of the month in which it was submitted."""
    entry = next((name for name in store.names("ledger/") if name.endswith(f"/{job_id}.json")), None)
    store.write(entry or f"ledger/{_month()}/{job_id}.json", {"stage": stage, "allowed": allowed, "cost": cost, **more})


def _month() -> str:
    return datetime.now(UTC).strftime("%Y-%m")

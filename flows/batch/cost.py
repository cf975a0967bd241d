"""What a job may and did cost: estimates before, a monthly budget that refuses, actual time after.

Prices are the estimates of `compute.prices`, at the most expensive of the job's instance types, so the figures
are upper bounds; storage and traffic are not included. A job is allowed the cost of one whole attempt on demand
(`timeout_hours`); the flow ends it when that is spent, whatever machine it ran on. The month's ledger in S3 holds what
each job was allowed and, once it has ended, what it cost; the sum may not exceed `compute.budget_usd`.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clear.errors import ClearError
from flows.batch.job import ENDED, describe, hours
from flows.batch.settings import BatchJob, Compute
from flows.batch.store import Store


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
    """Enter what the jobs of this month cost that have ended without their flow: cancelled, swept, or it was gone."""
    for name in store.names(f"ledger/{_month()}/"):
        note = store.read(name) or {}
        if note.get("cost") is None and "hourly" in note:
            job = describe(batch, Path(name).stem)
            if job is not None and job["status"] in ENDED:
                store.write(name, note | {"cost": hours(job) * note["hourly"], "hours": hours(job)})


def refuse_beyond_budget(store: Store, compute: Compute, estimate: Estimate, stage: str) -> None:
    """Raise OverBudget if the job, added to this month's, might exceed the budget."""
    before = spent(store)
    if before + estimate.allowed > compute.budget_usd:
        raise OverBudget(
            f"stage {stage} is not submitted: it may cost {estimate.allowed:.2f} USD, this month's jobs {before:.2f}, "
            f"and compute.budget_usd is {compute.budget_usd:.2f}; raise it in infra/compute.yaml, or lower "
            f"compute.jobs.*.timeout_hours."
        )


def enter(store: Store, job_id: str, stage: str, allowed: float, cost: float | None = None, **more) -> None:
    """Write a job into the ledger of the month in which it was submitted."""
    entry = next((name for name in store.names("ledger/") if name.endswith(f"/{job_id}.json")), None)
    store.write(entry or f"ledger/{_month()}/{job_id}.json", {"stage": stage, "allowed": allowed, "cost": cost, **more})


def _month() -> str:
    return datetime.now(UTC).strftime("%Y-%m")

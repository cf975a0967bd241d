"""Who waits for a job: one lease in S3 for each flow that does, renewed while it waits.

A job's name comes from its inputs, so several flows may wait for one job. A flow that stops waiting takes its own lease
away and ends the job only where no other lease is fresh; the sweeper (flows/sweep.py) ends a job without a fresh one.
S3 cannot look and act in one step: a flow that finds the job just when the last other one leaves may see it ended. The
reason (`LEFT`) tells that from a failure, and the stage is submitted again.
"""

from datetime import UTC, datetime
from typing import Any

from prefect.runtime import flow_run

from flows.batch.job import LEFT, terminate
from flows.batch.store import Store

PATIENCE_SECONDS = 900.0
"""How long AWS may be out of reach while a job runs before the flow's task fails and is tried again."""
MINUTES = 2 * PATIENCE_SECONDS / 60
"""Age at which a lease is that of a flow that is gone. A live one renews it every `compute.poll_seconds`; where AWS is
out of its reach it comes back after its patience and the retries of its task, which take less than as long again
(tests/test_sweep.py adds them up). The job of a flow that comes back must still be there."""


def renew(store: Store, job_id: str, waiter: str) -> None:
    """Say that somebody waits for a job."""
    store.write(f"leases/{job_id}/{waiter}.json", {"flow_run": flow_run.id})


def of(store: Store, job_id: str) -> dict[str, datetime]:
    """Names of a job's leases with the time of their last renewal."""
    # No slash behind it: a flow that runs since before a job had several of them renews leases/<job>.json.
    return store.names(f"leases/{job_id}")


def age(renewed: datetime) -> float:
    """Minutes since then."""
    return (datetime.now(UTC) - renewed).total_seconds() / 60


def leave(store: Store, batch: Any, job_id: str, waiter: str, why: str) -> bool:
    """Take a waiter's lease away, and end the job unless another one is fresh; whether it was ended."""
    store.delete(f"leases/{job_id}/{waiter}.json")
    if any(age(renewed) <= MINUTES for renewed in of(store, job_id).values()):
        return False
    terminate(batch, job_id, f"{LEFT}: {why}")
    return True

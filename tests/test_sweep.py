"""The flow that ends jobs without an owner, with an account that is none; tests/test_compute_flow.py has the other."""

import inspect
import logging
from dataclasses import fields
from types import SimpleNamespace

import pytest
import yaml

from clear.data import aws
from clear.errors import ClearError
from flows import pipeline, sweep
from flows.batch import execute, leases
from flows.batch.settings import Compute
from flows.service.deploy import DEPLOYMENTS
from tests.conftest import ROOT


def test_a_lease_outlives_an_outage_that_its_flow_outlives():
    """Cut off from AWS for 13 of 15 minutes of patience, a flow lost its job to the sweeper, and failed for good."""
    poll = next(field for field in fields(Compute) if field.name == "poll_seconds").metadata["high"]
    attempts = 1 + aws._MOST_RETRIES
    unanswered = attempts * aws._PATIENT[0] + sum(2**n for n in range(attempts - 1))  # seconds, with boto's pauses
    delays = pipeline.retrying["retry_delay_seconds"]
    assert pipeline.retrying["retries"] == len(delays)
    patience = execute.PATIENCE_SECONDS + poll + unanswered
    retries = sum(delays) + (len(delays) - 1) * unanswered  # the last one has its answer
    assert patience + retries < leases.MINUTES * 60


def test_every_place_that_states_the_age_of_a_dead_lease_states_the_same():
    for call in (sweep.sweep, sweep.sweep_jobs.fn):
        assert inspect.signature(call).parameters["minutes"].default == leases.MINUTES
    deployed = yaml.safe_load((ROOT / DEPLOYMENTS).read_text())["deployments"]
    (sweeper,) = [one for one in deployed if one["entrypoint"] == "flows/sweep.py:sweep_jobs"]
    assert sweeper["parameters"]["minutes"] == leases.MINUTES
    cloud, flows = ((ROOT / "docs" / name).read_text() for name in ("CLOUD.md", "FLOWS.md"))
    assert f"a lease renewed within {leases.MINUTES:g} minutes" in cloud
    assert f"no flow has renewed a lease for {leases.MINUTES:g} minutes" in cloud
    assert f"renewed a lease of it for this long ({leases.MINUTES:g})" in flows


def test_what_was_ended_is_announced_although_another_job_cannot_be_ended(monkeypatch, tmp_path):
    told = []
    account = SimpleNamespace(outputs={"Bucket": "b"}, s3=None, batch=None)

    def terminate(client, job, reason):
        if job == "first":
            raise ClearError("job first: AccessDeniedException")

    monkeypatch.setattr(execute, "placement", lambda folder: {"sft": execute.AWS_BATCH})
    monkeypatch.setattr(sweep.settings, "load", lambda folder: SimpleNamespace(stack="clear"))
    monkeypatch.setattr(sweep.batch, "account", lambda compute: account)
    monkeypatch.setattr(sweep.batch, "terminate", terminate)
    monkeypatch.setattr(sweep, "Store", lambda *given: SimpleNamespace(names=lambda below: {}))
    monkeypatch.setattr(
        sweep, "_jobs", lambda *given: [{"jobId": name, "jobName": name} for name in ("first", "second")]
    )
    monkeypatch.setattr(sweep, "announce", lambda *words: told.append(words))
    monkeypatch.setattr(sweep, "get_run_logger", lambda: logging.getLogger("test"))
    with pytest.raises(ClearError, match="job first: AccessDenied"):
        sweep.sweep_jobs.fn(str(tmp_path))
    ((kind, subject, said, _),) = told
    assert (kind, subject) == ("swept", "1 job without an owner ended")
    assert "ending job second" in said and "job first is not ended" in said

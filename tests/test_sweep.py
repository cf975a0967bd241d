"""The flow that ends jobs without an owner, with an account that is none; tests/test_compute_flow.py has the other."""

import logging
from types import SimpleNamespace

import pytest

from clear.errors import ClearError
from flows import sweep
from flows.batch import execute


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

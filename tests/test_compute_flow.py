"""A stage on AWS Batch from the flow's side: boto3 against a local stand-in for Batch whose jobs are processes.

The jobs here are stand-ins that leave a result, fail, or wait to be ended; the real job is tests/test_remote_stage.py.
Several flows that wait for one job: tests/test_compute_waiters.py.
"""

import os
import signal
import subprocess
import sys
from datetime import UTC, datetime

import boto3
import psutil
import pytest
from botocore.config import Config
from prefect.logging import disable_run_logger

from clear.data.aws import Unreachable
from clear.errors import ClearError
from flows import sweep
from flows.batch import execute, leases
from flows.batch import job as compute_batch
from flows.batch.cost import enter, settle, spent
from flows.batch.settings import Price
from flows.batch.store import Damaged, Store
from tests.cloud import aside, compute_of, entry_of, running, write_compute
from tests.conftest import ROOT
from tests.helpers.processes import alive, wait_until

pytest_plugins = ["tests.cloud"]

REQUEST = "s3://cloud/x/requests/key/1.json"


def _submitted(cloud):
    return [body for name, body in cloud.batch.requests if name == "submitjob"]


def _waiters(cloud, count):
    wait_until(lambda: len(cloud.store.names("leases/")) == count, 60, "the leases")


def test_a_stage_that_fails_is_not_tried_again_and_says_why(work, cloud):
    mine = work("fails")
    with pytest.raises(ClearError, match="failed: error: the data is bad"):
        mine.run()
    (job,) = cloud.batch.jobs.values()
    assert len(job["attempts"]) == 1 and job["status"] == "FAILED"
    assert "│ working" in mine.say.__self__


def test_spot_that_is_reclaimed_too_often_is_followed_by_on_demand(work, cloud):
    mine = work("waits", attempts=2)

    def reclaim_twice():
        for attempt in (1, 2):
            job = running(cloud)
            up = cloud.batch.folder / f"{job}-{attempt}" / "up"
            wait_until(up.exists, 60, "the attempt")
            if attempt == 2:
                cloud.batch.environment["KIND"] = "ends"
            cloud.batch.reclaim(job)

    thief = aside(reclaim_twice)
    spent = mine.run()
    thief.join()
    first, second = cloud.batch.jobs.values()
    assert [first["jobQueue"], second["jobQueue"]] == ["spot", "ondemand"]
    assert [one["container"]["exitCode"] for one in first["attempts"]] == [75, 75]
    assert [job["status"] for job in (first, second)] == ["FAILED", "SUCCEEDED"]
    price = mine.compute.prices["g6e.4xlarge"]
    hours = [compute_batch.hours(job) for job in (first, second)]
    assert spent == pytest.approx(hours[0] * price.spot + hours[1] * price.on_demand)
    ledger = [cloud.store.read(name) for name in cloud.store.names("ledger/")]
    assert sum(note["cost"] for note in ledger) == pytest.approx(spent)


def test_without_a_spot_machine_in_time_it_runs_on_demand(work, cloud):
    cloud.batch.held.add("spot")
    mine = work("ends", spot_wait_minutes=0.0)
    mine.run()
    first, second = cloud.batch.jobs.values()
    wait_until(lambda: first["status"] == "FAILED", 10, "the end of the job on spot")
    assert first["attempts"] == [] and second["jobQueue"] == "ondemand" and second["status"] == "SUCCEEDED"


RESULT = {"stage": "sft", "job": "j", "lock": {}, "files": {}, "runs": {}, "seconds": 1.0}
ENDS = {
    "its machine is reclaimed": lambda cloud, job: cloud.batch.reclaim(job),
    "another flow ends it": lambda cloud, job: _terminate(job, f"{compute_batch.LEFT}: KeyboardInterrupt"),
    "somebody ends it": lambda cloud, job: _terminate(job, "by hand"),
    "Batch forgets it": lambda cloud, job: cloud.batch.jobs.pop(job),
    "it costs too much": lambda cloud, job: cloud.batch.jobs[job].update(startedAt=0),
}


def _terminate(job, reason):
    compute_batch.terminate(boto3.client("batch"), job, reason)


def _after(cloud, mine, result, end):
    """Run a job that leaves a result and then does not end well; returns US dollars."""

    def lose():
        job = running(cloud)
        cloud.store.write(f"results/{mine.key}.json", result)
        cloud.batch.environment["KIND"] = "ends"
        end(cloud, job)

    thief = aside(lose)
    try:
        return mine.run()
    finally:
        thief.join()


@pytest.mark.parametrize("end", ENDS)
def test_a_result_is_taken_however_its_job_ends(work, cloud, end):
    """A machine that was lost just after it had left its result was paid for twice, on demand, or failed the stage."""
    assert _after(cloud, work("waits", attempts=1), RESULT, ENDS[end]) >= 0
    assert len(_submitted(cloud)) == 1
    wait_until(lambda: all(job["status"] == "FAILED" for job in cloud.batch.jobs.values()), 60, "the end of the job")


def test_a_damaged_result_does_not_keep_a_job_from_being_run_on_demand(work, cloud):
    _after(cloud, work("waits", attempts=1), {}, ENDS["its machine is reclaimed"])
    assert [job["jobQueue"] for job in cloud.batch.jobs.values()] == ["spot", "ondemand"]


def test_a_job_that_waits_for_another_machine_with_its_result_there_is_ended(work, cloud):
    cloud.batch.held.add("spot")
    mine = work("ends", spot_wait_minutes=0.0)
    cloud.store.write(f"results/{mine.key}.json", RESULT)
    assert mine.run() == 0
    (job,) = cloud.batch.jobs.values()
    wait_until(lambda: job["status"] == "FAILED", 10, "the end of the job on spot")


@pytest.mark.parametrize("reason", [KeyboardInterrupt, SystemExit])
def test_a_flow_that_is_cancelled_ends_its_job(work, cloud, reason):
    mine = work("waits")

    def say(line):
        if line == "│ working":
            running(cloud)
            raise reason

    mine.say = say
    with pytest.raises(reason):
        mine.run()
    (job,) = cloud.batch.jobs.values()
    process = cloud.batch.processes[job["jobId"]]
    wait_until(lambda: job["status"] == "FAILED", 10, "the end of the job")
    assert job["statusReason"] == f"its flow ended: {reason.__name__}" and not alive(process.pid)
    before = spent(cloud.store)
    settle(cloud.store, mine.account.batch)
    assert 0 < spent(cloud.store) < 1 < before, "what it cost counts, not what it was allowed"


def _run_out_of_reach(mine, monkeypatch, patience):
    """Submit a job and lose the way to AWS, for longer than `patience` seconds."""

    def away(*_):
        raise Unreachable("no network")

    with monkeypatch.context() as broken:
        broken.setattr(compute_batch, "describe", away)
        broken.setattr(execute, "PATIENCE_SECONDS", patience)
        with pytest.raises(Unreachable):
            mine.run()


def test_a_flow_that_comes_back_waits_for_the_job_that_is_there(work, cloud, monkeypatch):
    first = work("waits once")
    _run_out_of_reach(first, monkeypatch, 0.5)
    job = running(cloud)
    second = work("waits once")
    thief = aside(lambda: (_waiters(cloud, 2), cloud.batch.reclaim(job)))
    second.run()
    thief.join()
    assert second.job_id == first.job_id == job and len(_submitted(cloud)) == 1
    assert len(cloud.store.names("ledger/")) == 1, "one job is counted once"


def test_a_job_whose_flow_died_before_it_was_entered_is_counted(work, cloud, monkeypatch):
    first = work("waits once")

    def dies(*_, **__):
        raise Unreachable("no network")

    with monkeypatch.context() as broken:
        broken.setattr(execute.cost, "enter", dies)
        with pytest.raises(Unreachable):
            first.run()
    (name,) = cloud.store.names("ledger/")
    assert "/reserved-" in name and spent(cloud.store) == 36
    job = running(cloud)
    second = work("waits once")
    thief = aside(lambda: (_waiters(cloud, 2), cloud.batch.reclaim(job)))
    second.run()
    thief.join()
    (name,) = cloud.store.names("ledger/")
    assert name.endswith(f"/{job}.json") and spent(cloud.store) < 36


@pytest.mark.parametrize("first_on_spot", [True, False])
def test_of_two_submissions_at_once_the_first_stays(work, cloud, monkeypatch, first_on_spot):
    cloud.batch.held |= {"spot", "ondemand"}
    mine = work("ends")
    real, calls = compute_batch.find, []

    def blind_at_first(*arguments):
        calls.append(arguments)
        return None if len(calls) % 2 else real(*arguments)

    monkeypatch.setattr(compute_batch, "find", blind_at_first)
    given = mine.account, mine.compute, mine.job, "image", "clear-sft-key"
    first, second = (compute_batch.submit(*given, spot, REQUEST, {}) for spot in (first_on_spot, True))
    assert first == second and first[0] is first_on_spot and len(_submitted(cloud)) == 2
    loser = next(job for one, job in cloud.batch.jobs.items() if one != first[1])
    wait_until(lambda: loser["status"] == "FAILED", 10, "the end of the second")
    assert len(cloud.batch.definitions) == 1, "one definition for both"


def test_a_job_that_costs_more_than_it_was_allowed_is_ended(work, cloud):
    mine = work("waits", budget_usd=1e9)
    mine.compute.prices["g6e.4xlarge"] = Price(on_demand=0.01, spot=10**4)
    mine.job.timeout_hours = 0.02
    with pytest.raises(ClearError, match=r"more than the 0\.00 it was allowed"):
        mine.run()
    (job,) = cloud.batch.jobs.values()
    wait_until(lambda: job["status"] == "FAILED", 10, "the end of the job")


def test_beyond_the_budget_nothing_is_submitted(work, cloud):
    mine = work("ends", budget_usd=40.0)
    enter(cloud.store, "running", "sft", allowed=36.0)
    with pytest.raises(
        ClearError, match=r"may cost 36\.00 USD, this month's jobs 36\.00, and compute\.budget_usd is 40"
    ):
        mine.run()
    assert _submitted(cloud) == []
    enter(cloud.store, "running", "sft", allowed=36.0, cost=1.5)
    enter(cloud.store, "cheap", "sft", allowed=36.0, cost=0.5)
    mine.run()
    assert len(_submitted(cloud)) == 1


def test_the_sweeper_ends_what_nobody_waits_for_and_nothing_else(work, cloud):
    cloud.batch.held |= {"spot", "ondemand"}
    mine = work("ends")
    given = (mine.account, mine.compute, mine.job, "image")
    young, old, leased, foreign = (
        compute_batch.submit(*given, f"clear-{n}", bool(n % 2), REQUEST, {})[1] for n in range(4)
    )
    hour_ago = int(datetime.now(UTC).timestamp() * 1000) - 3_600_000
    for job in (old, leased, foreign):
        cloud.batch.jobs[job]["createdAt"] = hour_ago
    leases.renew(cloud.store, leased, "waiter")
    cloud.batch.jobs[foreign]["tags"] = {"clear": "another stack"}
    said = []
    assert sweep.sweep(mine.compute, 10, said.append) == [old]
    assert "nobody has asked for it for 60 min" in said[0]
    wait_until(lambda: cloud.batch.jobs[old]["status"] == "FAILED", 10, "the end of the job")
    assert cloud.batch.jobs[old]["statusReason"].startswith("swept: ")
    assert {cloud.batch.jobs[one]["status"] for one in (young, leased, foreign)} == {"RUNNABLE"}
    assert sweep.main(["--minutes", "10"]) == 0
    assert {cloud.batch.jobs[one]["status"] for one in (young, leased, foreign)} == {"RUNNABLE"}


def test_the_sweeper_enters_what_a_job_has_cost_before_batch_forgets_it(work, cloud, monkeypatch):
    mine = work("ends")
    _run_out_of_reach(mine, monkeypatch, 0.0)
    (job,) = cloud.batch.jobs.values()
    wait_until(lambda: job["status"] == "SUCCEEDED", 60, "the end of the job")
    assert spent(cloud.store) == 36
    assert sweep.sweep(mine.compute) == []
    cloud.batch.jobs.clear()
    assert 0 < spent(cloud.store) < 1


def test_a_job_that_cannot_be_ended_does_not_keep_the_others(work, cloud, monkeypatch):
    cloud.batch.held |= {"spot", "ondemand"}
    mine, end = work("ends"), compute_batch.terminate
    given = (mine.account, mine.compute, mine.job, "image")
    jobs = [compute_batch.submit(*given, f"clear-{n}", True, REQUEST, {})[1] for n in range(2)]
    for job in jobs:
        cloud.batch.jobs[job]["createdAt"] = int(datetime.now(UTC).timestamp() * 1000) - 3_600_000
    tried, said = [], []

    def terminate(client, job, why):
        tried.append(job)
        if len(tried) == 1:
            raise ClearError("no right to end jobs")
        end(client, job, why)

    monkeypatch.setattr(compute_batch, "terminate", terminate)
    with pytest.raises(ClearError, match="no right to end jobs"):
        sweep.sweep(mine.compute, 10, said.append)
    assert sorted(tried) == sorted(jobs) and f"job {tried[0]} is not ended: no right to end jobs" in said
    wait_until(lambda: cloud.batch.jobs[tried[1]]["status"] == "FAILED", 10, "the end of the job")


def test_the_sweeping_flow_asks_aws_only_where_a_job_may_be(work, cloud, training, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(sweep, "announce", lambda *words: told.append(words))
    cloud.batch.held |= {"spot", "ondemand"}
    mine = work("ends")
    _, job = compute_batch.submit(mine.account, mine.compute, mine.job, "image", "clear-left", True, REQUEST, {})
    cloud.batch.jobs[job]["createdAt"] = 0
    write_compute(tmp_path)
    with disable_run_logger():
        assert sweep.sweep_jobs.fn(str(tmp_path)) == []
        assert cloud.batch.jobs[job]["status"] == "RUNNABLE"
        write_compute(training, ["compute.budget_usd=1000"])  # all stages are here again; the job is not
        assert sweep.sweep_jobs.fn(str(training)) == [job]
        assert sweep.sweep_jobs.fn(str(training)) == []
    ((kind, subject, said, look),) = told
    assert (kind, subject, look) == ("swept", "1 job without an owner ended", "python -m flows.sweep")
    assert job in said and "nobody has asked for it for" in said


def test_an_attempt_is_ended_after_its_time(work, cloud):
    mine = work("waits", timeout_hours=0.001, expected_hours=0.001)
    wanted = compute_batch.definition(mine.compute, mine.job, "image", mine.account.outputs)
    assert wanted["timeout"] == {"attemptDurationSeconds": 60}, "the least that Batch allows"
    cloud.batch.definitions.clear()
    arn = compute_batch.ensure_definition(mine.account.batch, wanted)
    cloud.batch.definitions[arn]["timeout"] = {"attemptDurationSeconds": 4}
    with pytest.raises(ClearError, match="failed"):
        mine.compute.prices["g6e.4xlarge"] = Price(on_demand=10**4, spot=1)
        mine.compute.budget_usd = 1e9
        mine.run()
    (job,) = cloud.batch.jobs.values()
    assert len(job["attempts"]) == 1 and not psutil.pid_exists(cloud.batch.processes[job["jobId"]].pid)


def test_aws_that_does_not_answer_or_refuses_is_one_line(cloud, monkeypatch, training):
    settings = compute_of(training)
    settings.stack = "nowhere"
    with pytest.raises(ClearError, match=r"stack nowhere .*make stack.*: ValidationError: Stack"):
        compute_batch.account(settings)
    cloud.store.client.put_object(Bucket="cloud", Key="compute/note.json", Body=b"{")
    with pytest.raises(Damaged, match=r"note\.json: not valid JSON"):
        cloud.store.read("note.json")
    with pytest.raises(ClearError, match="NoSuchBucket"):
        Store(cloud.store.client, "no-such-bucket").names("x")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(Unreachable, match="Could not connect"):
        Store(boto3.client("s3", config=Config(retries={"total_max_attempts": 1})), "cloud").read("note.json")


@pytest.mark.slow
def test_the_pipeline_sends_a_stage_away_and_its_end_ends_the_job(training, cloud, tmp_path):
    """The real flow and the real job: cancelled in mid-training, run again, and then up to date."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PREFECT_HOME": str(tmp_path / "prefect")}
    environment["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] = "120"
    command = [sys.executable, "-m", "flows.pipeline", str(training)]
    cloud.batch.environment["STEP_SECONDS"] = "2"
    with (tmp_path / "flow.txt").open("w") as out:
        flow = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
        (job,) = wait_until(lambda: list(cloud.batch.jobs) or (flow.poll() is not None and ["none"]), 240, "a job")
        wait_until(lambda: cloud.batch.jobs[job]["status"] == "RUNNING", 60, "its machine")
        wait_until(lambda: "step 2" in cloud.lines(job), 120, "the second step")
        flow.send_signal(signal.SIGTERM)
        assert flow.wait(60) != 0
    wait_until(lambda: cloud.batch.jobs[job]["status"] == "FAILED", 40, "the end of the job")
    assert cloud.batch.jobs[job]["statusReason"].startswith("its flow ended: ")
    assert cloud.store.names("checkpoints/")

    cloud.batch.environment["STEP_SECONDS"] = "0"
    for count in (2, 2):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(cloud.batch.jobs) == count, "the second time it is up to date"
    start = next(line for line in cloud.lines(list(cloud.batch.jobs)[1]) if line.startswith("starting at step"))
    assert int(start.split()[-1]) >= 2
    assert entry_of(training, "sft")["cmd"] == "python code/train.py"

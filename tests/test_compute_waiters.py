"""Several flows that wait for one job of AWS Batch: who ends it, and what the others do then."""

from datetime import UTC, datetime, timedelta

import pytest

from clear.errors import ClearError
from flows import sweep
from flows.batch import execute
from flows.batch import job as compute_batch
from flows.batch.store import Store
from flows.dvc_commands import Temporary
from tests.cloud import aside, running
from tests.helpers.processes import wait_until

pytest_plugins = ["tests.cloud"]
HOUR = timedelta(hours=1)


class Other:
    """A second flow, which waits for the job of the first."""

    def __init__(self, work, **changes):
        self.work, self.error, self.said = work("waits once", **changes), None, []
        self.work.say = self.said.append
        self.thread = aside(self._run)
        wait_until(lambda: any("is already job" in line for line in self.said), 60, "the second flow")

    def _run(self):
        try:
            self.work.run()
        except ClearError as error:
            self.error = error

    def end(self):
        self.thread.join(60)
        assert not self.thread.is_alive()
        return self.error


def _cancelled(cloud, mine, meanwhile):
    """Run the first flow, do something while its job runs, and cancel it then."""

    def say(line):
        if line == "│ working":
            running(cloud)
            meanwhile()
            raise KeyboardInterrupt

    mine.say = say
    with pytest.raises(KeyboardInterrupt):
        mine.run()


def test_a_flow_that_is_cancelled_leaves_the_job_to_the_other_that_waits_for_it(work, cloud):
    others = []
    _cancelled(cloud, work("waits once"), lambda: others.append(Other(work)))
    (job,) = cloud.batch.jobs.values()
    assert "terminated" not in job and job["status"] == "RUNNING"
    cloud.batch.reclaim(job["jobId"])  # the second attempt ends well
    assert others[0].end() is None and len(cloud.batch.jobs) == 1


def test_the_last_flow_that_is_cancelled_ends_the_job(work, cloud):
    second = work("waits")
    _cancelled(cloud, work("waits"), lambda: _cancelled(cloud, second, lambda: None))
    (job,) = cloud.batch.jobs.values()
    wait_until(lambda: job["status"] == "FAILED", 60, "the end of the job")
    assert job["statusReason"] == "its flow ended: KeyboardInterrupt"
    assert cloud.store.names("leases/") == {}


def test_the_lease_of_a_flow_that_is_gone_does_not_keep_the_job(work, cloud, monkeypatch):
    def gone():
        (name,) = cloud.store.names("leases/")
        cloud.store.write(f"{name.rpartition('/')[0]}/another.json", {"flow_run": None})
        monkeypatch.setattr(execute.leases, "MINUTES", -1.0)

    _cancelled(cloud, work("waits"), gone)
    (job,) = cloud.batch.jobs.values()
    wait_until(lambda: job["status"] == "FAILED", 60, "the end of the job")


def test_a_flow_whose_job_another_one_has_ended_asks_again(work, cloud):
    """It begins to wait just when the last other flow leaves, or for a job that is already being ended."""
    _cancelled(cloud, work("waits once"), lambda: None)
    job = next(iter(cloud.batch.jobs))
    second = work("waits once")
    second.job_id = job
    wait_until(lambda: cloud.batch.jobs[job]["status"] == "FAILED", 60, "the end of the job")
    with pytest.raises(Temporary, match="was ended by another flow"):
        second._follow(True, 36.0)


def test_a_job_that_was_ended_is_not_taken_for_one_that_lost_its_machine(work, cloud):
    """Its stage leaves with the status of a preempted one: whoever tears a stack down does not want it elsewhere."""
    first = work("waits")

    def say(line):
        if line == "│ working":
            compute_batch.terminate(first.account.batch, running(cloud), "swept: by hand")

    first.say = say
    with pytest.raises(ClearError, match="failed: swept: by hand"):
        first.run()
    assert len(cloud.batch.jobs) == 1


def _counted(cloud):
    """The jobs but for one that a flow ended because another had asked in the same moment."""
    said = "submitted twice"
    return [job for job in [*cloud.batch.jobs.values()] if not (job.get("statusReason") or "").startswith(said)]


def test_of_two_flows_without_a_spot_machine_both_wait_for_the_same_job_on_demand(work, cloud):
    cloud.batch.held |= {"spot", "ondemand"}
    first = work("ends")
    thread = aside(first.run)
    wait_until(lambda: cloud.batch.jobs, 60, "the first job")
    other = Other(work)
    first.compute.spot_wait_minutes = 0.0  # the other one would wait on, and hears of it by the end of the job
    wait_until(lambda: len(_counted(cloud)) == 2, 60, "the second job")
    wait_until(lambda: "no spot machine in time: asking on demand" in other.said, 60, "the second flow")
    cloud.batch.held.clear()
    cloud.batch.environment["KIND"] = "ends"
    assert other.end() is None
    thread.join(60)
    assert [job["jobQueue"] for job in _counted(cloud)] == ["spot", "ondemand"]
    assert first.job_id == other.work.job_id


def test_a_flow_that_begins_while_another_gives_up_spot_shares_its_next_job(work, cloud, monkeypatch):
    cloud.batch.held |= {"spot", "ondemand"}
    first, others, send = work("ends", spot_wait_minutes=0.0), [], execute.send

    def begin_another(*given, **more):
        if len(cloud.batch.jobs) == 1 and not others:  # spot is given up, nothing is asked on demand yet
            first.compute.spot_wait_minutes = 60.0
            other = work("ends", spot_wait_minutes=60.0)
            others.append((other, aside(other.run)))
            wait_until(lambda: len(cloud.batch.jobs) == 2, 60, "the other flow's job")
            cloud.batch.held.clear()
        return send(*given, **more)

    monkeypatch.setattr(execute, "send", begin_another)
    first.run()
    (other, thread) = others[0]
    thread.join(60)
    assert not thread.is_alive()
    assert [job["status"] for job in cloud.batch.jobs.values()] == ["FAILED", "SUCCEEDED"], "one was paid for"
    assert first.job_id == other.job_id


def test_a_job_that_has_cost_too_much_is_ended_whoever_waits_for_it(work, cloud, monkeypatch):
    mine, others = work("waits", timeout_hours=0.02, expected_hours=0.01), []
    monkeypatch.setattr(compute_batch, "hours", lambda job: 1.0 if others else 0.0)

    def say(line):
        if line == "│ working":
            running(cloud)
            others.append(Other(work))  # which would allow it 12 h

    mine.say = say
    with pytest.raises(ClearError, match=r"has cost 1\.30 USD, more than the 0\.06 it was allowed"):
        mine.run()
    assert "more than the 0.06 it was allowed" in str(others[0].end())
    assert len(cloud.batch.jobs) == 1


def test_the_sweeper_ends_a_job_only_if_no_lease_of_it_is_fresh(work, cloud, monkeypatch):
    cloud.batch.held |= {"spot", "ondemand"}
    mine = work("ends")
    given = (mine.account, mine.compute, mine.job, "image")
    kept, left, older = (
        compute_batch.submit(*given, f"clear-{n}", True, "s3://cloud/x/requests/key/1.json", {})[1] for n in range(3)
    )
    now = datetime.now(UTC)
    for job in cloud.batch.jobs.values():
        job["createdAt"] = int((now - 2 * HOUR).timestamp() * 1000)
    leases = {
        f"leases/{kept}/a.json": now - HOUR,
        f"leases/{kept}/b.json": now,
        f"leases/{left}/a.json": now - HOUR,
        f"leases/{left}/b.json": now - HOUR,
        f"leases/{older}.json": now,  # of a flow from before a job had several
    }
    monkeypatch.setattr(Store, "names", lambda _, below: {n: t for n, t in leases.items() if n.startswith(below)})
    assert sweep.sweep(mine.compute, 10) == [left]

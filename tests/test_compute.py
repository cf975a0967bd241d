"""Where stages run: what is asked of AWS Batch (on moto), what it may cost, and that nothing changes without it."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import boto3
import pytest
import yaml
from moto import mock_aws

from clear.data.aws import Unreachable
from clear.errors import ClearError
from clear.project.scratch import write_params
from flows.batch import execute, worker
from flows.batch import settings as compute_settings
from flows.batch.cost import OverBudget, enter, estimate, release, reserved, spent
from flows.batch.job import (
    Account,
    definition,
    describe,
    ensure_definition,
    hours,
    job_name,
    reclaimed,
    submit,
    waiting,
)
from flows.batch.notes import Inputs
from flows.batch.request import differences
from flows.batch.settings import Price
from flows.batch.store import Store, split
from tests.cloud import compute_with, write_compute
from tests.conftest import ROOT

OUTPUTS = {
    "Bucket": "cloud",
    "SpotQueue": "clear-spot",
    "OnDemandQueue": "clear-on-demand",
    "Repository": "repository",
    "JobRole": "arn:aws:iam::123456789012:role/job",
    "ExecutionRole": "arn:aws:iam::123456789012:role/execution",
    "LogGroup": "/clear",
}


@pytest.fixture
def settings():
    return compute_settings.load(ROOT)


@pytest.fixture
def aws(monkeypatch, tmp_path):
    """moto in this process, with Batch that runs nothing and queues of the stack's names."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_BATCH", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with mock_aws(config={"batch": {"use_docker": False}}):
        role = "arn:aws:iam::123456789012:role/aws-service-role/batch"
        batch = boto3.client("batch")
        iam = boto3.client("iam")
        iam.create_role(RoleName="batch", AssumeRolePolicyDocument="{}")
        role = iam.get_role(RoleName="batch")["Role"]["Arn"]
        machines = batch.create_compute_environment(
            computeEnvironmentName="machines", type="UNMANAGED", state="ENABLED", serviceRole=role
        )["computeEnvironmentArn"]
        for name in (OUTPUTS["SpotQueue"], OUTPUTS["OnDemandQueue"]):
            order = [{"order": 1, "computeEnvironment": machines}]
            batch.create_job_queue(jobQueueName=name, state="ENABLED", priority=1, computeEnvironmentOrder=order)
        yield Account(OUTPUTS, batch, boto3.client("s3"))


def test_a_definition_asks_for_what_the_configuration_says(aws, settings):
    job = settings.jobs["default"]
    wanted = definition(settings, job, "image:1", OUTPUTS)
    arn = ensure_definition(aws.batch, wanted)
    assert ensure_definition(aws.batch, copy.deepcopy(wanted)) == arn, "an unchanged one is not registered again"
    (found,) = aws.batch.describe_job_definitions(status="ACTIVE")["jobDefinitions"]
    container = found["containerProperties"]
    assert container["image"] == "image:1" and container["command"] == ["python", "-m", "flows.batch.worker"]
    needed = {one["type"]: one["value"] for one in container["resourceRequirements"]}
    assert needed == {"VCPU": "14", "MEMORY": "118000", "GPU": "1"}
    assert container["linuxParameters"]["sharedMemorySize"] == 16384
    assert container["linuxParameters"]["initProcessEnabled"] is True
    assert (container["jobRoleArn"], container["executionRoleArn"]) == (OUTPUTS["JobRole"], OUTPUTS["ExecutionRole"])
    assert found["timeout"] == {"attemptDurationSeconds": 12 * 3600}
    assert found["retryStrategy"]["attempts"] == 4
    rules = found["retryStrategy"]["evaluateOnExit"]
    assert [{**rule, "action": rule["action"].upper()} for rule in rules] == [
        {"onStatusReason": "Host EC2*", "action": "RETRY"},
        {"onExitCode": "75", "action": "RETRY"},
        {"onReason": "*", "action": "EXIT"},
    ]
    assert found["tags"] == {"clear": "clear"} and found["propagateTags"] is True
    job.gpus = 0
    other = definition(settings, job, "image:1", OUTPUTS)
    assert other["jobDefinitionName"] != wanted["jobDefinitionName"]
    assert not any(one["type"] == "GPU" for one in other["containerProperties"]["resourceRequirements"])


def test_several_nodes_are_one_job_of_as_many_containers(aws, settings):
    job = settings.jobs["default"]
    job.nodes, job.gpus, job.spot, job.launch = 2, 8, False, "fsdp"
    wanted = definition(settings, job, "image:1", OUTPUTS)
    assert wanted["type"] == "multinode" and "containerProperties" not in wanted
    nodes = wanted["nodeProperties"]
    assert (nodes["numNodes"], nodes["mainNode"]) == (2, 0)
    (part,) = nodes["nodeRangeProperties"]
    assert part["targetNodes"] == "0:" and part["instanceTypes"] == ["g6e.4xlarge"]
    assert {"name": "CLEAR_LAUNCH", "value": "fsdp"} in part["container"]["environment"]
    aws.batch.register_job_definition(**wanted)  # boto3 checks its shape


def test_a_job_is_submitted_to_its_queue_with_tags_and_its_request(aws, settings):
    name = job_name("clear", "evaluate@grpo", "k" * 32)
    assert name == f"clear-evaluate-grpo-{'k' * 32}"
    given = (settings.jobs["default"], "image:1", name, True, "s3://cloud/compute/requests/k/1.json", {"stage": "x"})
    settings.region = "us-east-1"
    on_spot, job_id = submit(aws, settings, *given)
    job = describe(aws.batch, job_id)
    assert on_spot and job["jobName"] == name and job["jobQueue"].endswith(OUTPUTS["SpotQueue"])
    assert job["tags"] == {"clear": "clear", "stage": "x"}
    environment = {one["name"]: one["value"] for one in job["container"]["environment"]}
    assert environment["CLEAR_REQUEST"] == given[4] and environment["AWS_DEFAULT_REGION"] == "us-east-1"
    assert describe(aws.batch, "no-such-job") is None


def test_time_and_reason_are_read_from_what_batch_says():
    ended = {"startedAt": 1000, "stoppedAt": 3_601_000}
    job = {"status": "FAILED", "attempts": [ended, {**ended, "statusReason": "Host EC2 (instance i-1) terminated."}]}
    assert hours(job) == 2 and reclaimed(job)
    assert reclaimed({"attempts": [{"container": {"exitCode": 75}}]})
    assert not reclaimed({"attempts": [{"container": {"exitCode": 1}}], "statusReason": "Essential container exited"})
    assert hours({"status": "SUCCEEDED", "startedAt": 1000, "stoppedAt": 1_801_000}) == 0.5
    assert hours({"status": "RUNNABLE"}) == 0
    now = int(time.time() * 1000)
    waits = {"createdAt": now - 3_600_000, "attempts": []}
    assert waiting(waits) == pytest.approx(3600, abs=60)
    waits["attempts"] = [{"startedAt": now - 3_000_000, "stoppedAt": now - 60_000}]
    assert waiting(waits) == pytest.approx(60, abs=30), "after a reclaim it waits anew"


def test_an_estimate_takes_the_dearest_machine_where_the_job_starts(settings):
    job = settings.jobs["default"]
    job.instance_types = ["g6e.4xlarge", "p5.4xlarge"]
    settings.prices = {"g6e.4xlarge": Price(on_demand=3, spot=1.5), "p5.4xlarge": Price(on_demand=7, spot=1)}
    found = estimate(settings, job)
    assert (found.expected, found.allowed) == (3 * 1.5, 12 * 7)
    assert "4.50 USD for 3 h, 84.00 USD at most" in str(found)
    job.spot, job.nodes = False, 4
    assert estimate(settings, job).expected == 3 * 7 * 4


def test_the_month_counts_what_ended_jobs_cost_and_others_may(aws, settings):
    store = Store(aws.s3, "cloud")
    aws.s3.create_bucket(Bucket="cloud")
    enter(store, "one", "sft", 36.0)
    enter(store, "two", "sft", 36.0, cost=1.25)
    assert spent(store) == 37.25
    assert spent(store, "2001-01") == 0
    store.write("ledger/2001-01/old.json", {"allowed": 36.0})
    enter(store, "old", "sft", 36.0, cost=2.0)
    assert spent(store, "2001-01") == 2, "a job is counted in the month in which it began"
    settings.budget_usd = 73.25
    with reserved(store, settings, "sft", "key", 36.0):
        assert spent(store) == 73.25, "it counts before it is sent"
    with reserved(store, settings, "sft", "key", 36.0):
        assert spent(store) == 73.25, "and once, however often it is tried"
    release(store, "key")
    settings.budget_usd = 73.0
    with pytest.raises(OverBudget, match=r"37\.25"), reserved(store, settings, "sft", "key", 36.0):
        raise AssertionError("it is not submitted")
    assert spent(store) == 37.25


@pytest.mark.parametrize(("error", "left"), [(ClearError, 0), (Unreachable, 36), (KeyboardInterrupt, 36)])
def test_a_reservation_stays_where_the_job_may_have_been_submitted(aws, settings, error, left):
    store, settings.budget_usd = Store(aws.s3, "cloud"), 100.0
    aws.s3.create_bucket(Bucket="cloud")
    with pytest.raises(error), reserved(store, settings, "sft", "key", 36.0):
        raise error("no answer")
    assert spent(store) == left


def test_of_two_flows_that_ask_at_once_the_month_holds_for_one(aws, settings):
    """Between asking and submitting lie minutes of `dvc push`; both were let through."""
    store, settings.budget_usd = Store(aws.s3, "cloud"), 40.0
    aws.s3.create_bucket(Bucket="cloud")
    with reserved(store, settings, "sft", "one", 36.0):
        with pytest.raises(OverBudget), reserved(store, settings, "grpo", "two", 36.0):
            raise AssertionError("it is not submitted")
        assert spent(store) == 36


INPUTS = Inputs("sft", "python x", {"a": "1"}, {"a": "code"}, {"seed": 1}, {"out": True})


@pytest.mark.parametrize(
    "change",
    [{"cmd": "python y"}, {"deps": {"a": "2"}}, {"deps": {}}, {"params": {"seed": 2}}, {"outs": {"out": False}}],
)
def test_every_input_is_in_the_key_and_a_difference_is_named(change):
    other = Inputs(**{**INPUTS.__dict__, **change})
    assert other.key() != INPUTS.key() == Inputs(**INPUTS.__dict__).key()
    assert len(differences(INPUTS, other)) == 1 and differences(INPUTS, INPUTS) == []
    assert INPUTS.key("again") != INPUTS.key()


def test_a_workspace_without_a_place_for_its_stages_runs_them_here(project, tmp_path):
    assert execute.placement(tmp_path) == {}
    write_compute(project)
    assert set(execute.placement(project).values()) == {"local"}
    assert execute.elsewhere("source", project) is None
    (tmp_path / "params.yaml").write_text("compute: 1\n")
    assert execute.placement(tmp_path) == {}, "a revision from before there were places"
    write_compute(tmp_path)
    (tmp_path / "infra/compute.yaml").write_text("a: [\n")
    with pytest.raises(ClearError, match="not valid YAML"):
        execute.placement(tmp_path)


def test_addresses_in_s3():
    assert split("s3://bucket/a/b") == ("bucket", "a/b") and split("s3://bucket") == ("bucket", "")
    for wrong in ("bucket/a", "s3://", "https://bucket"):
        with pytest.raises(ClearError, match="not an S3 address"):
            split(wrong)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["compute.place.sft=gcp"], "compute.place.sft = 'gcp' is not one of local, aws_batch"),
        (["compute.place.report=aws_batch"], "compute.place.report = 'aws_batch' is not one of local"),
        (["+compute.place.stf=local"], "stf"),
        (["+compute.jobs.stf=${compute.jobs.default}"], "compute.jobs.stf is no stage"),
        (["~compute.jobs.default"], "compute.jobs.default is missing"),
        (["compute.jobs.default.nodes=2", "compute.jobs.default.launch=fsdp"], "set compute.jobs.default.spot = false"),
        (["compute.jobs.default.gpus=8"], "uses one GPU of 8"),
        (["compute.jobs.default.instance_types=[]"], "instance_types is empty"),
        (["compute.jobs.default.instance_types=[p9.large]"], "add its price as compute.prices.p9.large"),
        (["compute.jobs.default.expected_hours=13"], "is more than compute.jobs.default.timeout_hours = 12"),
        (["compute.jobs.default.attempts=0"], "compute.jobs.default.attempts = 0 is outside [1, 10]"),
        (["compute.weights=bagel"], "write it as s3://bucket/prefix"),
        (["compute.stack=Clear"], "lower-case"),
    ],
)
def test_a_place_that_cannot_be_is_refused(changes, named):
    with pytest.raises(ClearError) as caught:
        compute_settings.from_dict(compute_with(*changes))
    assert named in str(caught.value) and str(caught.value).startswith("infra/compute.yaml: ")


@pytest.mark.parametrize(
    ("cluster", "placed", "named"),
    [
        ("evaluate.cluster=tcp://a:1", "evaluate", "evaluate.cluster and compute.place.evaluate"),
        ("degrade.cluster=tcp://a:1", "mmd_bench", "compute.place.mmd_bench = local"),
    ],
)
def test_a_cluster_of_yours_and_a_rented_machine_are_refused_before_anything_runs(project, cluster, placed, named):
    write_params(project / "params.yaml", [cluster])
    write_compute(project)
    assert execute.elsewhere("source", project) is None, "no machine is rented"
    write_compute(project, [f"compute.place.{placed}=aws_batch"])
    with pytest.raises(ClearError, match=re.escape(named)):
        execute.elsewhere("source", project)


def test_several_nodes_on_demand_are_accepted_and_no_stage_depends_on_its_place():
    job = "compute.jobs.default"
    composed = compute_with(f"{job}.nodes=2", f"{job}.gpus=8", f"{job}.launch=fsdp", f"{job}.spot=false")
    assert compute_settings.from_dict(composed).jobs["default"].nodes == 2
    assert "compute" not in yaml.safe_load((ROOT / "params.yaml").read_text())
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for stage in stages.values():
        assert not any(key.startswith("compute") for key in stage.get("do", stage)["params"])


@pytest.mark.parametrize("name", ["data/plots/../../code/evil.py", "../evil.py", "/evil.py", "code/source.txt"])
def test_a_job_that_lies_writes_nothing_outside_its_outputs(project, name):
    """Its result names files; what DVC keeps in git of a stage's outputs is all that they may be."""
    inputs = Inputs("train", "run", {}, {}, {}, {"data/plots": False})
    entry = {"cmd": "run", "outs": [{"path": "data/plots"}]}
    result = {"lock": entry, "files": {name: "0" * 64}, "runs": {}}
    store = SimpleNamespace(fetch=lambda *_: pytest.fail("it was fetched"))
    with pytest.raises(ClearError, match=r"the job sent .*, which is not one of its outputs in git"):
        execute.adopt(result, inputs, store, project, None, lambda line: None)
    with pytest.raises(ClearError, match=r"the job sent a run record called '\.\./\.\./evil', which no stage has"):
        execute._record("train", project, {"runs": {"../../evil": "{}"}}, {})
    assert not list(project.parent.rglob("evil*"))


def test_a_result_that_cannot_be_put_here_is_kept_and_one_that_is_wrong_is_not(aws, settings, project, monkeypatch):
    """It was paid for: a full disk here deleted it, and the next run bought it again, every time."""
    aws.s3.create_bucket(Bucket="cloud")
    store, inputs = Store(aws.s3, "cloud"), Inputs("train", "run", {}, {}, {}, {"data/x": True})
    out = {"path": "data/x", "md5": "0" * 32, "size": 1}
    name = f"results/{inputs.key()}.json"
    told = {"stage": "train", "job": "j", "files": {}, "runs": {}, "seconds": 1.0}
    store.write(name, told | {"lock": {"cmd": "run", "outs": [out]}})
    account = SimpleNamespace(s3=aws.s3, outputs={"Bucket": "cloud"})
    monkeypatch.setattr(execute.batch, "account", lambda compute: account)
    monkeypatch.setattr(execute, "describe", lambda stage, workspace: inputs)
    monkeypatch.setattr(execute._Work, "run", lambda work: pytest.fail("it was bought again"))

    def full(*_):
        raise ClearError("the disk is full; free some space")

    monkeypatch.setattr(execute, "dvc", full)
    for _ in range(2):
        with pytest.raises(ClearError, match="the disk is full"):
            execute.reproduce("train", project, settings)
    monkeypatch.setattr(execute, "dvc", lambda *_: [])
    monkeypatch.setattr(execute, "state", lambda *_: "same")
    assert execute.reproduce("train", project, settings) == "taken from job j, which had run it"
    store.write(name, told | {"lock": {"cmd": "another", "outs": [out]}})
    with pytest.raises(pytest.fail.Exception, match="it was bought again"):
        execute.reproduce("train", project, settings)
    assert store.read(name) is None


TRICKY = {"eps": 1e-8, "lr": 6e-5, "word": "no", "time": "12:30", "octal": "010", "off": False, "big": 10**6}
"""Values of which YAML 1.1, which PyYAML reads, makes others than YAML 1.2, which DVC writes."""


def test_an_entry_of_the_lock_says_after_the_way_back_what_it_said_before(tmp_path):
    """A job of a training was refused for its eps: 1e-08 is a number in dvc.lock, and was taken for a word."""
    from dvc.utils.serialize import dump_yaml

    from clear.project.compare.load import read_lock

    inputs = Inputs("sft", "python -m clear sft", {"data/x": "0" * 32}, {}, {"optimiser": TRICKY}, {"out": False})
    deps = [{"path": path, "hash": "md5", "md5": digest} for path, digest in inputs.deps.items()]
    entry = {"cmd": inputs.cmd, "deps": deps, "params": {"params.yaml": inputs.params}, "outs": [{"path": "out"}]}
    dump_yaml(tmp_path / "dvc.lock", {"schema": "2.0", "stages": {"sft": entry}})
    (tmp_path / "out").write_text("made")
    kept = {}
    store = SimpleNamespace(
        keep=lambda file: "digest", write=lambda name, content: kept.update(json.loads(json.dumps(content)))
    )
    worker._hand_over(store, inputs, "key", "job", tmp_path, tmp_path / "home", 1.0)
    execute.refuse_other_inputs(kept["lock"], inputs)
    execute.merge_lock(tmp_path / "dvc.lock", "sft", kept["lock"])
    assert read_lock(tmp_path / "dvc.lock")["sft"] == entry
    kept["lock"]["params"]["params.yaml"]["optimiser"]["lr"] = 7e-5
    with pytest.raises(ClearError, match="has other params"):
        execute.refuse_other_inputs(kept["lock"], inputs)


MERGE = """
import resource, signal, sys
from pathlib import Path
import dvc.utils.serialize
from flows.batch.execute import merge_lock
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
merge_lock(Path("dvc.lock"), "sft", {"cmd": "another"})
"""


def test_killed_in_the_middle_the_lock_is_the_one_before(tmp_path):
    """Cut, dvc.lock is still YAML: the stages that it lacked were trained again."""
    from dvc.utils.serialize import dump_yaml, modify_yaml

    lock, expected = tmp_path / "dvc.lock", tmp_path / "expected"
    for file in (lock, expected):
        dump_yaml(file, {"schema": "2.0", "stages": {f"s{n}": {"cmd": f"ün {n}", "params": TRICKY} for n in range(50)}})
    before = lock.read_bytes()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", MERGE], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGXFSZ, done.stderr  # the kernel ends it when it has written 1,000 bytes
    assert lock.read_bytes() == before
    execute.merge_lock(lock, "sft", {"cmd": "another"})
    with modify_yaml(str(expected)) as content:
        content["stages"]["sft"] = {"cmd": "another"}
    assert lock.read_bytes() == expected.read_bytes() and sorted(tmp_path.iterdir()) == [lock, expected]
    (tmp_path / "new").mkdir()
    execute.merge_lock(tmp_path / "new/dvc.lock", "sft", {"cmd": "first"})
    assert (tmp_path / "new/dvc.lock").read_text() == "schema: '2.0'\nstages:\n  sft:\n    cmd: first\n"

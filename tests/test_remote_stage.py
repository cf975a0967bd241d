"""The job of one stage, for real: in its own process and clone, against S3, taken away in mid-training and refused."""

import json
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import pytest

from clear.errors import ClearError
from clear.project.scratch import write_params
from flows.batch import execute, worker
from flows.batch.request import describe, receive, send
from tests.cloud import OVERRIDES, compute_of, dvc, entry_of, use_remote, write_compute
from tests.conftest import git
from tests.helpers.processes import wait_until
from tests.helpers.scratch import committed_copy

pytest_plugins = ["tests.cloud"]


def _content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_a_job_whose_machine_is_reclaimed_goes_on_and_leaves_the_bytes_of_a_local_run(training, cloud):
    source = training / "code/source.py"
    source.write_text(source.read_text() + "# changed\n")
    git(training, "commit", "-qam", "another source")
    dvc(training, "repro", "source")  # neither its entry of dvc.lock nor its metrics are committed
    cloud.batch.environment["STEP_SECONDS"] = "0.5"
    said = []

    def take_away():
        (job,) = wait_until(lambda: list(cloud.batch.jobs), 60, "a job")
        wait_until(lambda: cloud.batch.jobs[job]["status"] == "RUNNING", 60, "its machine")
        wait_until(lambda: "step 3" in cloud.lines(job), 120, "the third step")
        cloud.batch.reclaim(job)

    thief = threading.Thread(target=take_away)
    thief.start()
    done = execute.reproduce("sft", training, compute_of(training), said.append)
    thief.join()
    ((job, record),) = cloud.batch.jobs.items()
    assert "│ step 10" in said
    assert job in done and "USD at most" in done
    first, second = record["attempts"]
    assert first["container"]["exitCode"] == worker.PREEMPTED and second["container"]["exitCode"] == 0
    assert first["stoppedAt"] - first["startedAt"] < 1000 * (120 + 30)
    lines = cloud.lines(job, 2)
    (start,) = [int(line.split()[-1]) for line in lines if line.startswith("starting at step")]
    assert start >= 3 and f"step {start + 1}" in lines and f"step {start}" not in lines

    there = {name: (training / name).read_bytes() for name in ("dvc.lock", "data/metrics/sft.json")}
    model = _content(training / "data/models/sft")
    assert model["weights"].endswith(str(len(source.read_text())).encode())
    run = json.loads((training / ".clear/runs/tiny/sft.json").read_text())
    assert run["seconds"] == 1.5 and run["aws_batch"]["job"] == job and run["aws_batch"]["hours"] > 0
    settings = compute_of(training)
    settings.fetch_mib = 0
    assert execute.reproduce("sft", training, settings, said.append).startswith("taken from job")
    assert len(cloud.batch.jobs) == 1, "asking again submits nothing"
    assert not (training / "data/models/sft").exists(), "what is large is left in the remote"
    shutil.rmtree(training / ".dvc/cache")
    dvc(training, "push")  # as the flow does at its end
    execute.bring_inputs("sft", training, said.append)
    assert _content(training / "data/models/sft") == model
    assert not cloud.store.names("checkpoints/"), "success deletes the checkpoints"
    (note,) = (cloud.store.read(name) for name in cloud.store.names("ledger/"))
    assert 0 < note["cost"] < 1 < note["allowed"]

    dvc(training, "repro", "--single-item", "--force", "--no-run-cache", "sft")
    assert {name: (training / name).read_bytes() for name in there} == there
    assert _content(training / "data/models/sft") == model


@pytest.fixture
def smoke(cloud, moto_url, tmp_path, monkeypatch) -> Path:
    """The working tree, committed in a repository of its own, with the smoke profile's data and `base` in the cloud."""
    folder = committed_copy(tmp_path / "smoke")
    places = [one.replace("place.sft", "place.base") for one in OVERRIDES]
    write_params(folder / "params.yaml", ["profile=smoke"])
    write_compute(folder, places)
    use_remote(folder, moto_url)
    dvc(folder, "repro", "degrade")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.slow
def test_a_real_training_that_is_reclaimed_ends_with_the_bytes_of_an_uninterrupted_one(smoke, cloud):
    """Stage `base` of the smoke profile: SIGTERM in the middle of its second phase, continued in another process."""
    said = []

    def take_away():
        (job,) = wait_until(lambda: list(cloud.batch.jobs), 120, "a job")
        wait_until(lambda: cloud.batch.jobs[job]["status"] == "RUNNING", 60, "its machine")
        wait_until(lambda: any(line.startswith("vae ") for line in cloud.lines(job)), 400, "the second phase")
        cloud.batch.reclaim(job)

    thief = threading.Thread(target=take_away)
    thief.start()
    execute.reproduce("base", smoke, compute_of(smoke), said.append)
    thief.join()
    ((job, record),) = cloud.batch.jobs.items()
    assert [one["container"]["exitCode"] for one in record["attempts"]] == [worker.PREEMPTED, 0]
    first, second = cloud.lines(job, 1), cloud.lines(job, 2)
    assert any(line.startswith("vit ") for line in first) and not any(line.startswith("vit ") for line in second)
    done = [line.split()[1] for line in first if line.startswith("vae ")]
    assert not {line.split()[1] for line in second if line.startswith("vae ")} & set(done), "no step is repeated"

    entry, files = entry_of(smoke, "base"), [smoke / "data/metrics/base.json", smoke / "data/plots/base.csv"]
    there = [file.read_bytes() for file in files]
    dvc(smoke, "repro", "--single-item", "--force", "--no-run-cache", "base")
    assert entry_of(smoke, "base") == entry
    assert [file.read_bytes() for file in files] == there


# What a job is given, refuses and leaves


@pytest.fixture
def request_of(training, cloud):
    """A request for the training stage whose data is in the DVC remote, and its content."""
    from dvc.repo import Repo

    with Repo(str(training)) as repo:
        repo.push(targets=["data/samples"])
    inputs = describe("sft", training)
    name = send(cloud.store, inputs, inputs.key(), training, force=False, weights="", checkpoint_seconds=1)
    return cloud.store.read(name)


def _pull(folder, paths):
    from dvc.repo import Repo

    with Repo(str(folder)) as repo:
        repo.pull(targets=[str(folder / path) for path in paths])


@pytest.mark.slow
def test_a_job_makes_the_stage_and_the_flow_takes_it_over(request_of, training, cloud, monkeypatch):
    key = request_of["key"]
    (request,) = cloud.store.names(f"requests/{key}/")
    environment = cloud.batch.environment | {"CLEAR_REQUEST": cloud.store.url(request), "AWS_BATCH_JOB_ID": "job-1"}
    command = [sys.executable, "-m", "flows.batch.worker"]
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert cloud.store.names(f"logs/{key}/job-1-1.log") and not cloud.store.names("checkpoints/")
    result = cloud.store.read(f"results/{key}.json")
    before = (training / "dvc.lock").read_bytes()

    stale = json.loads(json.dumps(result))
    stale["lock"]["deps"][0]["md5"] = "0" * 32
    wrong = json.loads(json.dumps(result))
    wrong["lock"]["outs"][0]["md5"] = "0" * 32
    more = result | {"files": result["files"] | {"code/train.py": result["files"]["data/metrics/sft.json"]}}
    inputs = describe("sft", training)
    for changed, said in ((stale, "has other deps"), (wrong, "is not the file"), (more, "not one of its outputs")):
        with pytest.raises(ClearError, match=said):
            execute.adopt(changed, inputs, cloud.store, training, compute_of(training), print)
    assert (training / "dvc.lock").read_bytes() == before and not (training / "data/metrics/sft.json").exists()

    said = []
    execute.adopt(result, inputs, cloud.store, training, compute_of(training), said.append)
    assert (training / "data/models/sft/weights").read_text() == (training / "data/samples").read_text() + str(
        len((training / "data/samples").read_text())
    )
    assert entry_of(training, "sft") == result["lock"]
    assert "- path: data/metrics/sft.json" in (training / "dvc.lock").read_text()


LOST = """
# A job whose machine is lost when nothing is left to do but to remove its own folder.
import os, shutil, signal, sys
from flows.batch import worker
remove = shutil.rmtree
def lost(path, *given, **more):
    if os.path.dirname(path) == os.environ["TMPDIR"] and os.path.basename(path).startswith("clear-"):
        os.kill(os.getpid(), signal.SIGKILL)
    return remove(path, *given, **more)
shutil.rmtree = lost
sys.exit(worker.main([]))
"""


@pytest.mark.slow
def test_a_job_whose_machine_is_lost_after_its_result_is_not_run_again(request_of, training, cloud, tmp_path):
    key = request_of["key"]
    (request,) = cloud.store.names(f"requests/{key}/")
    environment = cloud.batch.environment | {"CLEAR_REQUEST": cloud.store.url(request), "AWS_BATCH_JOB_ID": "job-1"}
    environment["TMPDIR"] = str(tmp_path / "machine")
    (tmp_path / "machine").mkdir()

    def attempt(*command):
        given = [sys.executable, *command]
        return subprocess.run(given, cwd=tmp_path / "machine", env=environment, capture_output=True, text=True)

    first = attempt("-c", LOST)
    assert first.returncode == -signal.SIGKILL and "step 10" in first.stdout, first.stdout + first.stderr
    left = cloud.store.read_bytes(f"results/{key}.json")
    again = attempt("-m", "flows.batch.worker")
    assert again.returncode == 0 and "nothing is run" in again.stdout and "step" not in again.stdout, again.stdout
    assert left and cloud.store.read_bytes(f"results/{key}.json") == left


@pytest.mark.slow
def test_the_flow_takes_the_result_of_a_job_that_was_lost_after_it(training, cloud):
    cloud.batch.program = ["-c", LOST]
    dvc(training, "push", "data/samples")
    said = []
    done = execute.reproduce("sft", training, compute_of(training), said.append)
    (job,) = cloud.batch.jobs.values()
    assert job["status"] == "FAILED" and done.startswith(f"ran as job {job['jobId']}"), said
    assert (training / "data/models/sft/weights").exists() and entry_of(training, "sft")["outs"]


def test_a_job_gets_exactly_the_inputs_or_refuses(request_of, training, cloud, tmp_path):
    """Stale data, parameters, code or results of the stages before are named and nothing is run."""
    exact = receive(cloud.store, request_of, tmp_path / "exact", _pull)
    assert exact == describe("sft", training)

    def refused(name, **changes):
        changed = request_of | changes
        with pytest.raises(ClearError) as caught:
            receive(cloud.store, changed, tmp_path / name, _pull)
        return str(caught.value)

    files = request_of["files"]
    params = tmp_path / "params.yaml"
    params.write_text((training / "params.yaml").read_text().replace("seed: 20260421", "seed: 7"))
    assert "seed: 7 instead of 20260421" in refused("params", files={**files, "params.yaml": cloud.store.keep(params)})

    metrics = tmp_path / "metrics.json"
    metrics.write_text("0")
    other = {**files, "data/metrics/source.json": cloud.store.keep(metrics)}
    assert "data/metrics/source.json is not what its stage wrote" in refused("metrics", files=other)

    source = training / "code/source.py"
    source.write_text(source.read_text() + "# newer\n")
    git(training, "commit", "-qam", "newer data")
    dvc(training, "repro", "source")
    newer = describe("sft", training)
    lines = refused("data", inputs=asdict(newer))
    for path in ("data/samples", "data/metrics/source.json"):
        assert f"{path}: {exact.deps[path]} instead of {newer.deps[path]}" in lines

    (training / "code/train.py").write_text("print('another training')\n")
    git(training, "commit", "-qam", "another training")
    lines = refused("code", inputs=asdict(describe("sft", training)) | {"deps": newer.deps | {"code/train.py": "0"}})
    assert "code/train.py: " in lines

    broken = {**files, "dvc.lock": cloud.store.keep(metrics)}
    cloud.store.put(params, f"objects/{broken['dvc.lock']}")
    assert "expected" in refused("damaged", files=broken), "what arrives is checked against its hash"


def test_a_job_goes_on_as_the_worker_of_its_commit(training, cloud):
    """An image is built for package versions: a mend of the worker itself reached no job."""
    worker_of_the_commit = "import os, sys\nprint('of the commit', *sys.argv[1:], os.getcwd(), os.listdir())\n"
    for name, text in {"__init__": "", "batch/__init__": "", "batch/worker": worker_of_the_commit}.items():
        file = training / f"flows/{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    git(training, "add", "-A")
    git(training, "commit", "-qm", "another worker")
    dvc(training, "push", "data/samples")
    inputs = describe("sft", training)
    name = send(cloud.store, inputs, inputs.key(), training, force=False, weights="", checkpoint_seconds=1)
    newer = cloud.store.read(name) | {"unknown": "to the form of this worker"}
    cloud.store.write(name, newer)
    environment = cloud.batch.environment | {"CLEAR_REQUEST": cloud.store.url(name)}
    command = [sys.executable, "-m", "flows.batch.worker"]
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    request, option, work, here, *listed = done.stdout.partition("of the commit ")[2].split()
    assert (request, option, here) == (cloud.store.url(name), "--work", f"{work}/clone") and "'code'," in listed


def test_what_dvc_keeps_inside_a_folder_of_inputs_travels_with_it(training, cloud, tmp_path):
    """Below a folder that a stage reads, a set added with `dvc add`: one comes from git, the other from the remote."""
    from dvc.repo import Repo

    (training / "incoming/one").mkdir(parents=True)
    (training / "incoming/README.md").write_text("sets")
    (training / "incoming/one/row").write_text("a row")
    stages = (training / "dvc.yaml").read_text().replace("[code/train.py,", "[code/train.py, incoming,")
    (training / "dvc.yaml").write_text(stages)
    with Repo(str(training)) as repo:
        repo.add("incoming/one")
        repo.push(targets=["data/samples", "incoming/one.dvc"])
    inputs = describe("sft", training)
    assert (inputs.kinds["incoming"], inputs.kinds["incoming/one"]) == ("code", "cached")
    with pytest.raises(ClearError, match=r"incoming/one\.dvc.*not committed"):
        send(cloud.store, inputs, "key", training)
    git(training, "add", "-A")
    git(training, "commit", "-qm", "a set")
    request = cloud.store.read(send(cloud.store, inputs, "key", training))
    receive(cloud.store, request, tmp_path / "clone", _pull)
    assert (tmp_path / "clone/incoming/one/row").read_text() == "a row"


def test_a_request_needs_committed_code_a_whole_clone_and_a_remote_in_s3(training, cloud, tmp_path):
    inputs = describe("sft", training)

    def refused(word, folder=training):
        with pytest.raises(ClearError, match=word):
            send(cloud.store, inputs, "key", folder)

    (training / "notes.txt").write_text("nobody's business")
    (training / "code/train.py").write_text("changed")
    write_compute(training, [*OVERRIDES, "compute.budget_usd=5"])  # no job reads it
    refused(r"^code/train\.py: not committed")
    git(training, "checkout", "-q", "code/train.py")
    git(training, "commit", "-q", "--allow-empty", "-m", "a second commit")
    subprocess.run(["git", "clone", "-q", "--depth=1", f"file://{training}", str(tmp_path / "shallow")], check=True)
    (tmp_path / "shallow/.dvc/config.local").write_bytes((training / ".dvc/config.local").read_bytes())
    refused("git fetch --unshallow", tmp_path / "shallow")
    (training / ".dvc/config.local").write_text("[core]\n    remote = here\n['remote \"here\"']\n    url = /tmp/x\n")
    refused("default DVC remote is /tmp/x; set it with `make remote BUCKET=cloud/dvc`")
    (training / ".dvc/config.local").write_text("[core]\n    remote = o\n['remote \"o\"']\n    url = s3://other/dvc\n")
    refused("the default DVC remote is s3://other/dvc, and a job may write to bucket cloud alone")


def test_an_input_that_is_missing_or_not_what_its_stage_wrote_is_named(training):
    (training / "data/samples").unlink()
    assert describe("sft", training).deps["data/samples"], "what is only in the remote is known by dvc.lock"
    (training / "data/samples").write_text("edited by hand")
    with pytest.raises(ClearError, match="data/samples is not what its stage wrote"):
        describe("sft", training)
    with pytest.raises(ClearError, match="no stage nothing"):
        describe("nothing", training)
    (training / "data/samples").unlink()
    (training / "code/train.py").unlink()
    with pytest.raises(ClearError, match=r"code/train\.py is missing"):
        describe("sft", training)

"""The job of one stage, for real: in its own process and clone, against S3, taken away in mid-training and refused."""

import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import boto3
import pytest

from clear.data.aws import Unreachable
from clear.errors import ClearError
from clear.project.scratch import write_params
from flows.batch import execute, worker
from flows.batch.request import describe, receive, send
from flows.batch.store import Store
from flows.dvc_commands import Temporary
from tests.cloud import OVERRIDES, compute_of, dvc, entry_of, use_remote, write_compute
from tests.conftest import ROOT, git
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
    refused("default DVC remote is /tmp/x; set it with `make remote")


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


# The stage inside the job


@pytest.mark.parametrize(("saves", "status"), [(True, 75), (False, 75)])
def test_a_stage_has_time_to_save_and_no_more(tmp_path, monkeypatch, saves, status):
    monkeypatch.setattr(worker, "SAVE_SECONDS", 1.5)
    handler = "open('saved', 'w').close(); sys.exit(130)" if saves else "None"
    code = f"import signal, sys, time\ndef ask(*_): {handler}\nsignal.signal(15, ask)\nprint('up', flush=True)\n"
    code += "time.sleep(60)\nopen('outlived', 'w').close()"
    notice, log = worker.Notice(), worker.Log(tmp_path / "log")

    def tell():
        wait_until(lambda: log.file.exists() and "up" in log.file.read_text(), 20, "the stage")
        notice(signal.SIGTERM, None)

    threading.Thread(target=tell).start()
    # The shell dies of the signal before its child, as DVC does.
    command = ["sh", "-c", f"{shlex.quote(sys.executable)} -c {shlex.quote(code)}; true"]
    assert worker._obey(command, tmp_path, dict(os.environ), log, notice) == status
    assert (tmp_path / "saved").exists() == saves
    assert not (tmp_path / "outlived").exists(), "it was ended, and did not end by itself"


def test_a_stage_that_fails_says_why_and_leaves_nothing_running(tmp_path):
    log = worker.Log(tmp_path / "log")
    command = ["sh", "-c", "sleep 60 & echo $! > pid; echo 'error: the data is bad'; exit 3"]
    with pytest.raises(ClearError, match="status 3: error: the data is bad"):
        worker._obey(command, tmp_path, dict(os.environ), log, worker.Notice())
    assert (
        not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/cmdline").exists()
        or not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/cmdline").read_bytes()
    )


def test_a_network_that_fails_for_a_while_loses_no_outputs(tmp_path, monkeypatch):
    """They are on this machine alone, which goes when the job ends."""
    log, lines, ran = worker.Log(tmp_path / "log"), ["ERROR: Could not connect to the endpoint URL"], []

    def run(command, *_):
        ran.append(command[2:])
        return (1, lines) if len(ran) < 3 else (0, [])

    monkeypatch.setattr(worker, "PAUSES", (0.01, 0.01))
    monkeypatch.setattr(worker.children, "run", run)
    worker._dvc(("push", "sft"), tmp_path, {}, log)
    assert ran == [["dvc", "push", "sft"]] * 3 and log.file.read_text().count("trying again") == 2
    monkeypatch.setattr(worker.children, "run", lambda *_: (1, lines))
    with pytest.raises(Temporary, match="Could not connect"):
        worker._dvc(("push", "sft"), tmp_path, {}, log)
    monkeypatch.setattr(worker.children, "run", lambda *_: (255, ["ERROR: AccessDenied"]))
    with pytest.raises(ClearError, match="AccessDenied") as refused:
        worker._dvc(("push", "sft"), tmp_path, {}, log)
    assert not isinstance(refused.value, Temporary)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Temporary("away"), 75),
        (Unreachable("away"), 75),
        (OSError(errno.ENOSPC, "x", "/big"), 1),
        (ClearError("no"), 1),
    ],
)
def test_every_end_of_a_job_is_a_line_in_its_log(cloud, tmp_path, monkeypatch, error, status):
    cloud.store.write("requests/key/1.json", {"key": "key"})
    monkeypatch.setattr(Store, "read", lambda *_: {"key": "key"})

    def ends(*_):
        raise error

    monkeypatch.setattr(worker, "_run", ends)
    assert worker.run(cloud.store.url("requests/key/1.json"), tmp_path, worker.Notice()) == status
    (name,) = cloud.store.names("logs/key/")
    (line,) = cloud.store.read_bytes(name).decode().splitlines()
    assert line.startswith("error: ") and ("/big: No space left on device" in line or "no" in line or "away" in line)


def test_before_the_stage_a_notice_ends_the_job_at_once():
    with pytest.raises(SystemExit) as ended:
        worker.Notice()(signal.SIGTERM, None)
    assert ended.value.code == worker.PREEMPTED


def test_weights_come_from_s3_and_are_those_of_the_base(cloud, tmp_path):
    (tmp_path / "params.yaml").write_text("model: {checkpoint: weights}\n")
    with pytest.raises(ClearError, match=r"compute\.weights is not"):
        worker.fetch_weights(tmp_path, "", print)
    with pytest.raises(ClearError, match="nothing there"):
        worker.fetch_weights(tmp_path, "s3://cloud/bagel", print)
    for key in ("bagel/", "bagel/more/"):  # what the console makes of "Create folder"
        boto3.client("s3").put_object(Bucket="cloud", Key=key, Body=b"")
    with pytest.raises(ClearError, match="nothing there"):
        worker.fetch_weights(tmp_path, "s3://cloud/bagel", print)
    boto3.client("s3").put_object(Bucket="cloud", Key="bagel/ema.safetensors", Body=b"weights")
    worker.fetch_weights(tmp_path, "s3://cloud/bagel/", print)
    assert (tmp_path / "weights/ema.safetensors").read_bytes() == b"weights"
    (tmp_path / "params.yaml").write_text("model: {checkpoint: named/ema.safetensors}\n")
    worker.fetch_weights(tmp_path, "s3://cloud/bagel/", print)
    assert (tmp_path / "named/ema.safetensors").read_bytes() == b"weights", "its folder is fetched"
    (tmp_path / "params.yaml").write_text("model: {checkpoint: weights}\n")
    manifest = tmp_path / "data/models/base/manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"files": {"ema.safetensors": {"sha256": "0"}}}))
    with pytest.raises(ClearError, match="not the file that the base was registered with"):
        worker.fetch_weights(tmp_path, "s3://cloud/bagel", print)
    manifest.write_text(json.dumps({"files": {"ae.safetensors": {"sha256": "0"}}}))
    with pytest.raises(ClearError, match=r"ae\.safetensors there"):
        worker.fetch_weights(tmp_path, "s3://cloud/bagel", print)
    (tmp_path / "params.yaml").write_text("model: {checkpoint: weights, base: BAGEL}\n")
    with pytest.raises(ClearError, match=r"model\.base is not brought to a job"):
        worker.fetch_weights(tmp_path, "s3://cloud/bagel", print)
    before = sorted(tmp_path.rglob("*"))
    for checkpoint in ("''", "s3://cloud/bagel"):
        (tmp_path / "params.yaml").write_text(f"model: {{checkpoint: {checkpoint}}}\n")
        worker.fetch_weights(tmp_path, "s3://cloud/bagel", print)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_job_with_several_gpus_starts_a_process_for_each(tmp_path, monkeypatch):
    assert not (worker.shims(tmp_path) / "python").exists(), "one process needs no help"
    monkeypatch.setenv("CLEAR_LAUNCH", "ddp")
    monkeypatch.setenv("CLEAR_GPUS", "4")
    monkeypatch.setenv("CLEAR_NODES", "2")
    monkeypatch.setenv("AWS_BATCH_JOB_NODE_INDEX", "1")
    monkeypatch.setenv("AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS", "10.0.0.7")
    shim = worker.shims(tmp_path) / "python"
    monkeypatch.setattr(worker.sys, "executable", sys.executable)
    said = subprocess.run([shim, "-c", "print('as it is')"], capture_output=True, text=True)
    assert said.stdout == "as it is\n"
    told = worker.launcher("ddp", os.environ)
    from accelerate.commands.launch import launch_command_parser

    asked = launch_command_parser().parse_args([*told[3:], "-m", "clear", "sft"])
    assert (asked.num_processes, asked.num_machines, asked.machine_rank) == (8, 2, 1)
    assert (asked.main_process_ip, asked.module, asked.training_script) == ("10.0.0.7", True, "clear")
    assert asked.training_script_args == ["sft"] and asked.multi_gpu
    assert launch_command_parser().parse_args([*worker.launcher("fsdp", {})[3:], "x"]).config_file == "infra/fsdp.yaml"


def test_an_image_with_other_versions_is_refused(tmp_path):
    (tmp_path / "infra").mkdir()
    worker.same_environment(tmp_path)
    (tmp_path / "infra/constraints.txt").write_bytes((ROOT / "infra/constraints.txt").read_bytes())
    worker.same_environment(tmp_path)
    (tmp_path / "infra/constraints.txt").write_text("torch==1.0\n")
    with pytest.raises(ClearError, match="make image"):
        worker.same_environment(tmp_path)


def test_a_job_without_a_request_says_so(cloud, capsys):
    assert worker.main(["s3://cloud/compute/requests/key/none.json"]) == 1
    assert "no such request" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        worker.main([])

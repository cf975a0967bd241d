"""The job's own program: the stage inside it, its end, its weights, its processes (flows/batch/worker.py)."""

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import boto3
import pytest

from clear.data.aws import Unreachable
from clear.errors import ClearError
from flows.batch import worker
from flows.batch.store import Store
from flows.dvc_commands import NETWORK, Temporary
from tests.conftest import ROOT
from tests.helpers.processes import wait_until

pytest_plugins = ["tests.cloud"]


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
    ("code", "message"),
    [
        ("SlowDown", "Please reduce your request rate."),
        ("ServiceUnavailable", "Reduce your request rate."),
        ("InternalError", "We encountered an internal error. Please try again."),
        ("RequestTimeout", "Your socket connection to the server was not read from or written to within the timeout."),
    ],
)
def test_what_s3_says_when_it_is_overloaded_may_pass(code, message):
    from botocore.exceptions import ClientError

    errors = pytest.importorskip("s3fs.errors")  # DVC's own client of S3
    said = str(errors.translate_boto_error(ClientError({"Error": {"Code": code, "Message": message}}, "PutObject")))
    assert any(word in f"ERROR: unexpected error - {said}" for word in NETWORK), said


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


@pytest.mark.parametrize("node", [0, 1])
@pytest.mark.parametrize("damaged", [False, True])
def test_where_the_result_is_there_no_node_runs_anything(cloud, tmp_path, monkeypatch, node, damaged):
    """A machine that was lost just after it had left its result trained everything again."""
    result = {"stage": "sft", "job": "j", "lock": {}, "files": {}, "runs": {}, "seconds": 1.0}
    cloud.store.write("results/key.json", {} if damaged else result)
    cloud.store.write("checkpoints/key/j/manifests/00000001.json", {})

    def receive(*_):
        raise ClearError("the stage would run")

    monkeypatch.setattr(worker, "receive", receive)
    given = cloud.store, {"commit": "c"}, "key", "j", node, tmp_path, worker.Log(tmp_path / "log"), worker.Notice()
    if damaged:
        with pytest.raises(ClearError, match="the stage would run"):
            worker._run(*given)
    else:
        assert worker._run(*given) == 0
    forgotten = node == 0 and not damaged
    assert bool(cloud.store.names("checkpoints/key/")) != forgotten, "as at the end of the attempt that was lost"


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
    manifest.write_text(json.dumps({"files": {"ae.safetensors": {"bytes": 1}}}))
    with pytest.raises(ClearError, match=r"base/manifest\.json: 'files' cannot be .*; run the base stage again\."):
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

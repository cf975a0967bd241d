"""A cloud on this machine for tests: S3 and CloudFormation by moto, Batch by tests/fake_batch.py, and a small project.

A test module takes the fixtures with `pytest_plugins = ["tests.cloud"]`.
"""

import json
import os
import subprocess
import sys
import textwrap
import threading
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import boto3
import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from clear.project.scratch import write_params
from flows.batch import execute, job, settings
from flows.batch.notes import Inputs
from flows.batch.store import Store
from tests.conftest import ROOT, git
from tests.fake_batch import FakeBatch, plain_environment
from tests.helpers.processes import wait_until

STACK = {
    "Resources": {"Storage": {"Type": "AWS::S3::Bucket", "Properties": {"BucketName": "cloud"}}},
    "Outputs": {
        name: {"Value": value}
        for name, value in {
            "Bucket": "cloud",
            "SpotQueue": "spot",
            "OnDemandQueue": "ondemand",
            "Repository": "repository/clear",
            "JobRole": "arn:aws:iam::123456789012:role/job",
            "ExecutionRole": "arn:aws:iam::123456789012:role/execution",
            "LogGroup": "/clear",
        }.items()
    },
}
OVERRIDES = (
    "compute.place.sft=aws_batch",
    "compute.budget_usd=1000",
    "compute.image=image",
    "compute.poll_seconds=0.2",
    "compute.checkpoint_seconds=0.2",
)
STAGES = """
    stages:
      source:
        cmd: python code/source.py
        params: [seed]
        deps: [code/source.py]
        outs: [data/samples]
        metrics:
          - data/metrics/source.json: {cache: false}
      sft:
        cmd: python code/train.py
        params: [seed, sft.ema]
        deps: [code/train.py, data/samples, data/metrics/source.json]
        outs: [data/models/sft]
        metrics:
          - data/metrics/sft.json: {cache: false}
"""
SOURCE = """
from pathlib import Path
text = Path("code/source.py").read_text()
Path("data/metrics").mkdir(parents=True, exist_ok=True)
Path("data/samples").write_text(text)
Path("data/metrics/source.json").write_text(str(len(text)))
"""
TRAIN = """
# A training in small: counts to ten, with a checkpoint per step, and saves when it is asked to leave.
import json, os, shutil, signal, sys, time
from pathlib import Path
home = Path(os.environ["CLEAR_HOME"])
place = home / "checkpoints/tiny/sft/key"
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
finished = [int(path.parent.name.split("-")[1]) for path in place.glob("checkpoint-*/complete")]
first = max(finished, default=0)
print(f"starting at step {first}", flush=True)
for step in range(first + 1, 11):
    time.sleep(float(os.environ.get("STEP_SECONDS", 0)))
    folder = place / f"checkpoint-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state").write_text(str(step))
    (folder / "complete").touch()
    print(f"step {step}", flush=True)
    if asked and step < 10:
        sys.exit(130)
out = Path("data/models/sft")
out.mkdir(parents=True, exist_ok=True)
(out / "weights").write_text(Path("data/samples").read_text() + Path("data/metrics/source.json").read_text())
Path("data/metrics/sft.json").write_text(json.dumps({"steps": 10}))
runs = home / "runs/tiny"
runs.mkdir(parents=True, exist_ok=True)
(runs / "sft.json").write_text(json.dumps({"seconds": 1.5}))
shutil.rmtree(place)
"""


JOB = """
import os, signal, sys, time, boto3
kind, request = os.environ["KIND"], os.environ["CLEAR_REQUEST"]
key = request.split("/requests/")[1].split("/")[0]
s3 = boto3.client("s3")
def put(name, text):
    s3.put_object(Bucket="cloud", Key=f"compute/{name}", Body=text.encode())
log = f"logs/{key}/{os.environ['AWS_BATCH_JOB_ID']}-{os.environ['AWS_BATCH_JOB_ATTEMPT']}.log"
put(log, "working\\n")
if kind == "fails":
    put(log, "working\\nerror: the data is bad\\nand so on\\n")
    sys.exit(1)
if kind == "waits" or (kind == "waits once" and os.environ["AWS_BATCH_JOB_ATTEMPT"] == "1"):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    open("up", "w").close()
    time.sleep(60)
put(f"results/{key}.json", "{}")
"""
INPUTS = Inputs("sft", "python code/train.py", {}, {}, {"seed": 1}, {"data/metrics/sft.json": False})


@dataclass
class Cloud:
    """Endpoints, the Batch service, and what a process needs in its environment to use them."""

    batch: FakeBatch
    store: Store
    environment: dict[str, str]

    def lines(self, job_id: str, attempt: int = 1) -> list[str]:
        """What an attempt of a job has printed."""
        return (self.batch.folder / f"{job_id}-{attempt}" / "stdout.txt").read_text().splitlines()


@pytest.fixture(scope="session")
def moto_url():
    """A moto server without Docker."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def cloud(moto_url, tmp_path, monkeypatch):
    """An empty cloud, which boto3 in this process uses."""
    urllib.request.urlopen(urllib.request.Request(f"{moto_url}/moto-api/reset", method="POST")).close()
    environment = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": moto_url,
        "AWS_CONFIG_FILE": str(tmp_path / "aws"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "aws"),
    }
    (tmp_path / "aws").touch()
    batch = FakeBatch(tmp_path / "machines", plain_environment() | environment | {"PYTHONPATH": str(ROOT)})
    environment["AWS_ENDPOINT_URL_BATCH"] = batch.url
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    boto3.client("cloudformation").create_stack(StackName="clear", TemplateBody=json.dumps(STACK))
    yield Cloud(batch, Store(boto3.client("s3"), "cloud"), environment)
    batch.close()


@pytest.fixture(scope="session")
def _trained(tmp_path_factory) -> Path:
    """A project whose source is reproduced and committed, and whose training stage has never run."""
    from dvc.repo import Repo

    folder = tmp_path_factory.mktemp("trained")
    git(folder, "init", "-q", "-b", "main")
    with Repo.init(str(folder)):
        pass
    (folder / "dvc.yaml").write_text(textwrap.dedent(STAGES))
    (folder / ".gitignore").write_text("/data/samples\n/data/models/\n/.clear/\n/data/report/\n")
    (folder / "code").mkdir()
    (folder / "code/source.py").write_text(SOURCE)
    (folder / "code/train.py").write_text(TRAIN)
    write_params(folder / "params.yaml")
    write_compute(folder, OVERRIDES)
    dvc(folder, "repro", "source")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "a project with a training stage")
    return folder


def dvc(folder: Path, *arguments: str) -> None:
    """A DVC command in a folder, with its own CLEAR_HOME."""
    environment = os.environ | {
        "CLEAR_HOME": str(folder / ".clear"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def use_remote(folder: Path, url: str) -> None:
    """Make s3://cloud/dvc the default DVC remote of a project."""
    (folder / ".dvc/config.local").write_text(
        f"[core]\n    remote = storage\n['remote \"storage\"']\n    url = s3://cloud/dvc\n    endpointurl = {url}\n"
    )


@pytest.fixture
def training(_trained, cloud, moto_url, tmp_path, monkeypatch) -> Path:
    """A clone of the project, with data, a DVC remote in the cloud and its stage `sft` placed there."""
    folder = tmp_path / "project"
    subprocess.run(["cp", "-R", str(_trained), str(folder)], check=True)
    use_remote(folder, moto_url)
    monkeypatch.chdir(folder)
    return folder


def compute_with(*overrides: str) -> dict:
    """The committed infra/compute.yaml with overrides in Hydra's words."""
    with initialize_config_dir(str(ROOT / "infra"), version_base=None):
        return OmegaConf.to_container(compose("compute", overrides=list(overrides)), resolve=True)


def write_compute(folder: Path, overrides=()) -> None:
    """Write a project's infra/compute.yaml."""
    (folder / settings.COMPUTE).parent.mkdir(exist_ok=True)
    (folder / settings.COMPUTE).write_text(yaml.safe_dump(compute_with(*overrides)))


def compute_of(folder: Path) -> settings.Compute:
    """Where a project's stages run."""
    return settings.load(folder)


def entry_of(folder: Path, stage: str):
    """A stage's entry of dvc.lock."""
    return yaml.safe_load((folder / "dvc.lock").read_text())["stages"][stage]


@pytest.fixture
def work(training, cloud):
    """Make the work of a stage whose job behaves as `kind` says."""
    cloud.batch.program = ["-c", JOB]

    def make(kind, **changes):
        cloud.batch.environment["KIND"] = kind
        settings = compute_of(training)
        for name, value in changes.items():
            target = settings if hasattr(settings, name) else settings.jobs["default"]
            setattr(target, name, value)
        said = []
        account = job.account(settings)
        return execute._Work(
            account, cloud.store, settings, settings.jobs["default"], INPUTS, INPUTS.key(), training, said.append, False
        )

    return make


def running(cloud):
    """The id of the one job that runs and waits."""

    def find():
        ids = [one for one, job in cloud.batch.jobs.items() if job["status"] == "RUNNING"]
        return ids and list(cloud.batch.folder.glob(f"{ids[-1]}-*/up")) and ids[-1]

    return wait_until(find, 60, "a running job")


def aside(call):
    """Call it in a thread, which is returned."""
    thread = threading.Thread(target=call)
    thread.start()
    return thread

"""Data in S3: what a team shares, what each obstacle says, and that nothing half done is ever taken for data."""

import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from flows import pipeline
from tests.conftest import ROOT, git
from tests.test_flow import run_dvc


@pytest.fixture
def store(monkeypatch):
    """Address of an S3 server on this machine with one bucket, `data`."""
    import boto3
    from moto.server import ThreadedMotoServer

    for name, value in {
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "eu-west-1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    urllib.request.urlopen(urllib.request.Request(f"{url}/moto-api/reset", method="POST")).close()
    placed = {"LocationConstraint": "eu-west-1"}
    boto3.client("s3", endpoint_url=url).create_bucket(Bucket="data", CreateBucketConfiguration=placed)
    yield url
    server.stop()


def remote(folder: Path, bucket: str, endpoint: str = "") -> subprocess.CompletedProcess:
    """What `make remote` runs."""
    command = [sys.executable, "-m", "infra.remote", bucket, endpoint]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_what_one_clone_pushes_another_pulls_and_need_not_reproduce(store, project, tmp_path):
    done = remote(project, "data/team", store)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "default DVC remote: s3://data/team" in done.stdout
    assert pipeline.remote_of(project) == "storage"
    assert "secret" not in (project / ".dvc/config.local").read_text()
    assert git(project, "status", "--porcelain") == ""
    run_dvc(project, "push")

    git(tmp_path, "clone", "-q", str(project), "second")
    second = tmp_path / "second"
    assert remote(second, "s3://data/team/", store).returncode == 0
    run_dvc(second, "pull")
    assert (second / "data/samples").read_bytes() == (project / "data/samples").read_bytes()
    assert "Running stage" not in run_dvc(second, "repro")
    assert git(second, "status", "--porcelain") == ""


def _refused(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


def test_a_wrong_bucket_endpoint_or_folder_is_one_line_and_nothing_is_written(store, project, tmp_path, monkeypatch):
    _refused(remote(project, "nothing", store), "has no bucket 'nothing'", store)
    _refused(remote(project, "data", "http://127.0.0.1:1"), "http://127.0.0.1:1 cannot be reached", "ENDPOINT")
    _refused(remote(project, "data", "nonsense"), "nonsense", "ENDPOINT")
    _refused(remote(project, "", store), "BUCKET=")
    _refused(remote(tmp_path, "data", store), "no DVC project here")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    _refused(remote(project, "data", store), "no credentials", "AWS_PROFILE")
    assert not (project / ".dvc/config.local").exists() or pipeline.remote_of(project) is None

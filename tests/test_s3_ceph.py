"""The remote on a real S3 store (Ceph's gateway), which checks signatures and survives being killed."""

import os
import shutil
from pathlib import Path

import boto3
import pytest

from clear.errors import ClearError
from flows import dvc_commands
from tests import radosgw
from tests.conftest import git
from tests.helpers.processes import run_dvc, wait_until
from tests.helpers.store import flow_dvc, objects_are_whole, refused_with, remote

pytestmark = pytest.mark.slow
LARGE = 20_000_000
"""Bytes; above the size from which uploads go in parts."""


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    with radosgw.running(tmp_path_factory.mktemp("ceph")) as found:
        yield found


@pytest.fixture
def bucket(gateway, monkeypatch):
    """A client; the bucket `data` is there and empty."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", radosgw.KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", radosgw.SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    client = boto3.client("s3", endpoint_url=gateway.url)

    def made() -> bool:
        try:
            client.create_bucket(Bucket="data")
        except Exception:  # the gateway is still starting
            return False
        return True

    wait_until(made, 120, "a bucket")
    return client


def names(client) -> list[str]:
    return [item["Key"] for item in client.list_objects_v2(Bucket="data").get("Contents", [])]


def test_clones_share_data_a_killed_gateway_loses_none_and_wrong_keys_are_one_line(
    gateway, bucket, project, tmp_path, monkeypatch
):
    assert remote(project, "data/team", gateway.url).returncode == 0
    (project / "data/many").mkdir()
    for number in range(8):
        (project / f"data/many/{number}").write_bytes(os.urandom(LARGE if number == 7 else 2_000_000))
    run_dvc(project, "add", "-q", "data/many")
    git(project, "add", "-A")
    git(project, "commit", "-q", "-m", "many")
    flow_dvc(project, "push", "data/samples")
    gateway.kill_gateway()
    with pytest.raises(dvc_commands.Temporary):
        flow_dvc(project, "push")
    gateway.start_gateway()
    wait_until(lambda: flow_push(project), 120, "a push that completes")
    assert len(names(bucket)) == 8 + 2
    objects_are_whole(bucket)

    git(tmp_path, "clone", "-q", str(project), "second")
    second = tmp_path / "second"
    assert remote(second, "data/team", gateway.url).returncode == 0
    flow_dvc(second, "pull")
    assert (second / "data/many/7").read_bytes() == (project / "data/many/7").read_bytes()
    assert "Running stage" not in run_dvc(second, "repro")

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    shutil.rmtree(second / ".dvc/cache")
    Path(second / "data/samples").unlink()
    with pytest.raises(ClearError, match="refuses these keys"):
        flow_dvc(second, "pull")
    refused_with(
        remote(second, "data/team", gateway.url), "s3://data at", "SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"
    )


def flow_push(project: Path) -> bool:
    try:
        flow_dvc(project, "push")
    except dvc_commands.Temporary:
        return False
    return True

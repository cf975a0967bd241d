"""A DVC remote in an S3 store: `make remote`, DVC as the flows run it, and what must hold of the store."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from flows import dvc_commands
from tests.conftest import ROOT


def aws_environment(monkeypatch, tmp_path: Path, **more: str) -> None:
    """Keys for a store of this machine, asked once, and nothing of the user's own AWS settings; `more` besides."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    settings = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
    }
    for name, value in (settings | more).items():
        monkeypatch.setenv(name, value)


def remote(folder: Path, bucket: str, endpoint: str = "") -> subprocess.CompletedProcess:
    """What `make remote` runs."""
    command = [sys.executable, "-m", "infra.remote", bucket, endpoint]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def flow_dvc(folder: Path, *arguments: str) -> list[str]:
    """A DVC command as the flows run it."""
    return dvc_commands.dvc(list(arguments), folder, lambda line: None)


def objects_are_whole(client) -> None:
    """Every object has the content that its name, a hash, promises."""
    for item in client.list_objects_v2(Bucket="data").get("Contents", []):
        content = client.get_object(Bucket="data", Key=item["Key"])["Body"].read()
        promised = "".join(Path(item["Key"]).parts[-2:]).removesuffix(".dir")
        assert hashlib.md5(content).hexdigest() == promised, item["Key"]


def refused_with(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr

"""The image that jobs run in: built from the lock, pushed once, without root."""

import re

import pytest

from clear.errors import ClearError
from flows.batch import settings
from flows.batch import stack as compute_stack
from tests.conftest import ROOT

pytest_plugins = ["tests.cloud"]

DOCKER = """#!/bin/sh
echo "$@" >> "$LOG"
case "$1" in login) cat > /dev/null ;; push) exit $PUSH ;; esac
"""


def test_an_image_is_built_from_the_lock_pushed_once_and_runs_without_root(cloud, monkeypatch, tmp_path):
    import boto3

    fakes = tmp_path / "bin"
    fakes.mkdir()
    (fakes / "docker").write_text(DOCKER)
    (fakes / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{fakes}:/usr/bin:/bin")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setenv("PUSH", "0")
    uri = boto3.client("ecr").create_repository(repositoryName="clear")["repository"]["repositoryUri"]
    found = compute_stack.account(settings.load(ROOT))
    found.outputs["Repository"] = uri
    monkeypatch.setattr(compute_stack, "account", lambda compute: found)
    compute = settings.load(ROOT)
    name = compute_stack.push_image(compute, ROOT)
    tag = compute_stack.environment_tag(ROOT)
    assert name == f"{uri}:{tag}" and re.fullmatch("env-[0-9a-f]{12}", tag)
    build, login, push = (tmp_path / "log").read_text().splitlines()
    assert build == f"build --platform linux/amd64 -f infra/Dockerfile -t {name} ."
    assert login.startswith("login --username AWS --password-stdin http") and push == f"push {name}"
    monkeypatch.setenv("PUSH", "3")
    with pytest.raises(ClearError, match="`docker push` ended with status 3"):
        compute_stack.push_image(compute, ROOT)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClearError, match="docker is not installed"):
        compute_stack.push_image(compute, ROOT)


def test_the_dockerfile_pins_its_base_copies_what_exists_and_drops_root():
    lines = (ROOT / "infra/Dockerfile").read_text().splitlines()
    (base,) = [line.split()[1] for line in lines if line.startswith("FROM ")]
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu\d\d\.\d\d", base)
    user = lines.index("USER clear")
    assert user < next(n for n, line in enumerate(lines) if "infra/install.sh .venv" in line)
    assert not any(line.startswith("USER ") for line in lines[user + 1 :])
    allowed = (ROOT / "infra/Dockerfile.dockerignore").read_text()
    for line in lines:
        if line.startswith("COPY "):
            for name in line.split()[2:-1]:
                assert (ROOT / name).exists() and f"!{name}" in allowed, name

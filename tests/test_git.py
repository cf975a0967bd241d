"""What the project does with git where git does not answer."""

import os
import socket
import time

import pytest

from clear.errors import ClearError
from clear.project import git


def test_a_server_that_says_nothing_is_an_error_and_no_flow_that_runs_for_ever(tmp_path, monkeypatch):
    monkeypatch.setitem(git.PATIENCE, "GIT_HTTP_LOW_SPEED_TIME", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        with pytest.raises(ClearError, match=r"`git ls-remote http://127\.0\.0\.1:\d+/x` failed: .*"):
            git.output(tmp_path, "ls-remote", f"http://127.0.0.1:{silent.getsockname()[1]}/x")
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("set_in", ["GIT_SSH", "GIT_SSH_COMMAND", "core.sshCommand", ""])
def test_the_program_that_a_user_has_chosen_for_ssh_is_used(tmp_path, monkeypatch, set_in):
    own = tmp_path / "own"
    own.write_text(f"#!/bin/sh\necho own >> {tmp_path}/ran\nexit 1\n")
    own.chmod(0o755)
    (tmp_path / "ssh").write_text(f"#!/bin/sh\necho $1 >> {tmp_path}/ran\nexit 1\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("GIT_SSH", "GIT_SSH_COMMAND"):
        monkeypatch.delenv(name, raising=False)
    git.output(tmp_path, "init", "-q")
    if set_in == "core.sshCommand":
        git.output(tmp_path, "config", set_in, str(own))
    elif set_in:
        monkeypatch.setenv(set_in, str(own))
    with pytest.raises(ClearError):
        git.output(tmp_path, "ls-remote", "ssh://nowhere/x")
    ran = (tmp_path / "ran").read_text().split()
    assert set(ran) == ({"own"} if set_in else {"-oConnectTimeout=60"})

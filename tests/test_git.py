"""What the project does with git where git does not answer."""

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


def test_a_server_that_asks_for_a_password_is_not_answered_by_a_prompt(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_SSH", "my-ssh")
    monkeypatch.setenv("GIT_HTTP_LOW_SPEED_TIME", "7")
    git.output(tmp_path, "init", "-q")
    shown = git.output(tmp_path, "-c", "alias.told=!env", "told")
    assert "GIT_TERMINAL_PROMPT=0" in shown and "GIT_HTTP_LOW_SPEED_TIME=7" in shown, "what the user set counts"
    assert "GIT_SSH_COMMAND" not in shown, "it would hide the user's own program"

"""What the project does with git where git does not answer."""

import contextlib
import http.server
import os
import pty
import socket
import sys
import threading
import time

import pytest

from clear.errors import ClearError
from clear.project import git
from tests.conftest import ROOT


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


class Denies(http.server.BaseHTTPRequestHandler):
    """A server that wants a password."""

    def do_GET(self):
        self.send_response(401)
        self.send_header("WWW-Authenticate", 'Basic realm="git"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


ASKS = """
import os, signal, subprocess, sys
code = "import sys; from pathlib import Path; from clear.project.git import git; "
code += "print(git(Path(), 'ls-remote', sys.argv[1]).said)"
place = None if sys.argv[2] == "foreground" else 0
child = subprocess.Popen([sys.executable, "-c", code, sys.argv[1]], process_group=place, stdin=subprocess.DEVNULL)
try:
    child.wait(20)
except subprocess.TimeoutExpired:
    print("STOPPED")
    os.killpg(child.pid if place == 0 else 0, signal.SIGKILL)
"""


@pytest.mark.parametrize("place", ["background", "foreground"])
def test_a_flow_in_the_background_of_a_terminal_is_not_stopped_by_a_question(place, monkeypatch):
    """Of a server that wants a password; a person who has typed the command is asked."""
    for name in ("GIT_ASKPASS", "SSH_ASKPASS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Denies) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/x.git"
        pid, terminal = pty.fork()
        if not pid:
            os.execv(sys.executable, [sys.executable, "-c", ASKS, url, place])
        said = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while piece := os.read(terminal, 1000):
                said += piece
                if b"Username" in piece or b"Password" in piece:
                    os.write(terminal, b"me\n")
        os.waitpid(pid, 0)
        os.close(terminal)
        server.shutdown()
    assert b"STOPPED" not in said, said
    assert (b"terminal prompts disabled" in said) == (place == "background"), said
    assert (b"Password for" in said) == (place == "foreground"), said


def test_what_git_tells_a_hook_of_its_repository_is_not_meant_for_others(tmp_path, monkeypatch):
    for name in ("one", "two"):
        git.output(tmp_path, "init", "-q", "-b", name, name)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "one/.git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "one/.git/index"))
    assert git.output(tmp_path / "two", "branch", "--show-current") == "two\n"

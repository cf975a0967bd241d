"""The comment of a pull request and its workflows: one comment, least rights, no foreign code where it writes."""

import json
import os
import re
import socketserver
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml

from clear.errors import ClearError
from clear.project.compare import comment
from tests.conftest import ROOT


class _Forge(BaseHTTPRequestHandler):
    """The two calls on issue comments that GitHub documents, kept in memory."""

    comments: list[dict]
    refuse = False

    def _answer(self, status: int, value) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _given(self) -> str:
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))["body"]

    def do_GET(self):
        page = int(re.search(r"[?&]page=(\d+)", self.path)[1])
        self._answer(200, self.comments[100 * (page - 1) : 100 * page])

    def do_POST(self):
        assert self.headers["Authorization"] == "Bearer secret"
        if self.refuse:
            self._answer(403, {"message": "Resource not accessible by integration"})
            return
        number = len(self.comments) + 1
        made = {"id": number, "body": self._given(), "user": {"login": comment.AUTHOR}, "html_url": f"c/{number}"}
        self.comments.append(made)
        self._answer(201, made)

    def do_PATCH(self):
        found = self.comments[int(self.path.rpartition("/")[2]) - 1]
        found["body"] = self._given()
        self._answer(200, found)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def forge():
    handler = type("Forge", (_Forge,), {"comments": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        handler.url = f"http://127.0.0.1:{server.server_port}"
        yield handler
        server.shutdown()


def test_one_comment_is_made_and_then_replaced(forge, tmp_path):
    report = tmp_path / "compare.md"
    report.write_text(f"**better** – yes\n\n{comment.MARKER}\n")
    others = [{"id": n + 1, "body": "hello", "user": {"login": "someone"}, "html_url": ""} for n in range(100)]
    others[3]["body"] = f"look: {comment.MARKER}"
    forge.comments += others
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"GITHUB_TOKEN": "secret", "GITHUB_API_URL": forge.url}
    command = [sys.executable, "-S", "-m", "clear.project.compare.comment", "--repository", "a/b", "--number", "7"]
    command += ["--commit", "abcdef0123456789", "--run-url", "https://x/run/1", "--report", str(report)]
    for text in ("**better** – yes", "**worse** – no"):
        report.write_text(f"{text}\n\n{comment.MARKER}\n")
        # -S: without any installed package, as in the workflow.
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "c/101\n"), done.stderr
        assert len(forge.comments) == 101
        assert forge.comments[100]["body"].startswith(text)
        assert "Commit abcdef0123, [run](https://x/run/1)." in forge.comments[100]["body"]
    report.unlink()
    assert subprocess.run(command, cwd=ROOT, env=environment).returncode == 0
    assert forge.comments[100]["body"].startswith("**no comparison** – ")
    assert forge.comments[3]["body"] == f"look: {comment.MARKER}", "a quoted marker is left alone"


def test_what_must_not_be_posted_is_refused(forge, tmp_path, monkeypatch, capsys):
    report, secret = tmp_path / "compare.md", tmp_path / "secret"
    report.write_text("hello")
    with pytest.raises(ClearError, match="marker is missing"):
        comment.body(report, "abc", "")
    report.write_text("x" * 70_000 + comment.MARKER)
    with pytest.raises(ClearError, match="nothing was posted"):
        comment.body(report, "abc", "")
    secret.write_text(comment.MARKER)
    report.write_bytes(b"\xff" + comment.MARKER.encode())
    with pytest.raises(ClearError, match=r"compare\.md: byte 0 is not UTF-8; nothing was posted"):
        comment.body(report, "abc", "")
    report.unlink()
    report.symlink_to(secret)
    with pytest.raises(ClearError, match="a link"):
        comment.body(report, "abc", "")
    forge.refuse = True
    with pytest.raises(ClearError, match=r"403 .*Resource not accessible.*pull-requests: write"):
        comment.post(forge.url, "a/b", 7, "text", "secret")
    monkeypatch.delenv("GITHUB_TOKEN", raising=False)
    given = ["--repository", "a/b", "--number", "7", "--commit", "abc", "--run-url", "x", "--report", str(report)]
    assert comment.main(given) == 1
    assert "GITHUB_TOKEN is not set" in capsys.readouterr().err


def _http(body: bytes, length: int | None = None, status: str = "200 OK") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), length or len(body), body)


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([b""], "GET .*closed connection.*; nothing was posted"),
        ([b"nonsense\r\n\r\n"], "GET .*; nothing was posted"),
        ([_http(b"[", 100)], "GET .*IncompleteRead.*; nothing was posted"),
        ([_http(b"cut", 100, "502 Bad Gateway")], "GET .*IncompleteRead.*; nothing was posted"),
        ([_http(b"<html>sign in</html>")], "GET .*the answer is not JSON .*; nothing was posted"),
        ([_http(b"\xff")], "GET .*the answer is not JSON .*; nothing was posted"),
        ([_http(b'{"message": "moved"}')], "GET .*not one of GitHub's; nothing was posted"),
        ([_http(b'[{"id": 1, "user": "me"}]')], "GET .*not one of GitHub's; nothing was posted"),
        ([_http(b"[]"), b""], "POST .*closed connection.*; it may not have been posted: run the job again"),
        ([_http(b"[]"), _http(b"{}")], "POST .*not one of GitHub's; it may not have been posted"),
    ],
)
def test_a_server_that_gives_no_answer_is_one_line(tmp_path, monkeypatch, capsys, answers, said):
    given = iter(answers)

    class Raw(socketserver.StreamRequestHandler):
        def handle(self):
            while self.rfile.readline().strip():  # the head of the request
                pass
            self.wfile.write(next(given))

    (tmp_path / "compare.md").write_text(f"**better**\n\n{comment.MARKER}\n")
    with socketserver.TCPServer(("127.0.0.1", 0), Raw) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GITHUB_TOKEN", "secret")
        monkeypatch.setenv("GITHUB_API_URL", f"http://127.0.0.1:{server.server_address[1]}")
        more = ["--commit", "abc", "--run-url", "x", "--report", str(tmp_path / "compare.md")]
        status = comment.main(["--repository", "a/b", "--number", "7", *more])
        server.shutdown()
    told = capsys.readouterr().err
    assert status == 1 and re.match(f"error: {said}", told) and told.count("\n") == 1, told


WORKFLOWS = {file.stem: file for file in sorted((ROOT / ".github/workflows").glob("*.yml"))}


def _jobs(name: str) -> dict:
    return yaml.safe_load(WORKFLOWS[name].read_text())["jobs"]


def _steps(name: str) -> list[dict]:
    return [step for job in _jobs(name).values() for step in job["steps"]]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_has_the_least_rights_and_pinned_actions(name):
    text = WORKFLOWS[name].read_text()
    content = yaml.safe_load(text)
    assert content["permissions"] == {"contents": "read"}
    assert "pull_request_target" not in text
    for job, definition in content["jobs"].items():
        rights = definition.get("permissions", {})
        writes = {key for key, value in rights.items() if value == "write"}
        assert writes == ({"pull-requests"} if (name, job) == ("comment", "comment") else set())
        assert definition["timeout-minutes"] <= (180 if "schedule" in str(definition.get("if")) else 60)
    for line in re.findall(r"uses: .*", text):
        assert re.fullmatch(r"uses: actions/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line
    for step in _steps(name):
        assert "${{" not in step.get("run", ""), "values reach a shell through the environment only"
        if "checkout" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False


def test_what_may_write_runs_nothing_of_the_pull_request():
    (job,) = _jobs("comment").values()
    for demand in ("head_repository.full_name == github.repository", "workflow_run.event == 'pull_request'"):
        assert demand in job["if"]
    (checkout,) = (step for step in job["steps"] if "checkout" in step.get("uses", ""))
    assert checkout["with"]["ref"] == "${{ github.event.repository.default_branch }}"
    (post,) = (step for step in job["steps"] if "run" in step)
    assert post["run"].split()[:3] == ["python3", "-m", "clear.project.compare.comment"]
    assert post["env"]["NUMBER"] == "${{ github.event.workflow_run.pull_requests[0].number }}"


def test_jobs_have_the_history_and_their_make_targets_exist():
    listed = (ROOT / "Makefile").read_text()
    for name in ("tests", "report"):
        for step in _steps(name):
            if "checkout" in step.get("uses", ""):
                assert step["with"]["fetch-depth"] == 0
            if step.get("run", "").startswith("make "):
                assert re.search(rf"^{step['run'].removeprefix('make ')}:", listed, re.MULTILINE), step["run"]


def test_what_is_too_slow_for_every_change_runs_weekly():
    """Every file with a slow test is in one job: what is ignored in the job of all of them has one of its own."""
    weekly = [job for job in _jobs("tests").values() if job.get("if") == "github.event_name == 'schedule'"]
    commands = [step["run"].split() for job in weekly for step in job["steps"] if "pytest" in step.get("run", "")]
    assert all("-m slow" in " ".join(words) for words in commands)
    tests, run = set((ROOT / "tests").glob("test_*.py")), []
    for words in commands:
        named = {file for name in words if name.startswith("tests/") for file in ROOT.glob(name)}
        ignored = {file for name in words if name.startswith("--ignore") for file in ROOT.glob(name.split("=")[1])}
        run += sorted((named or tests) - ignored)
    assert len(run) == len(set(run)), "none twice"
    assert {file for file in tests if "mark.slow" in file.read_text()} <= set(run)

"""AWS Batch's HTTP interface in front of plain subprocesses, for tests with the real boto3 client.

It does what the flows rely on: definitions with revisions, queues, states, attempts with their exit codes, retries by
`evaluateOnExit` (first match decides, none means another attempt), tags, SIGTERM and the kill after `grace` seconds for
a terminated job and for a reclaimed machine, attempt timeouts. A job's command runs in a folder of its own with the
environment of its definition and submission.
"""

import contextlib
import fnmatch
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil

ENDED = ("SUCCEEDED", "FAILED")


class FakeBatch:
    """The service. `held` names queues without machines; `reclaim(job)` takes a job's machine away."""

    def __init__(self, folder: Path, environment: dict[str, str], grace: float = 30.0) -> None:
        self.folder, self.environment, self.grace = folder, environment, grace
        self.jobs: dict[str, dict] = {}
        self.definitions: dict[str, dict] = {}
        self.held: set[str] = set()
        self.program: list[str] | None = None  # Python arguments in place of a definition's own
        self.requests: list[tuple[str, dict]] = []
        self.processes: dict[str, subprocess.Popen] = {}
        self._lock = threading.RLock()
        self._threads: list[threading.Thread] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
                status, answer = service.answer(urllib.parse.unquote(self.path), body)
                text = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """End the service and every process it has started."""
        for process in self.processes.values():
            self._kill(process)
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path: str, body: dict) -> tuple[int, dict]:
        """HTTP status and content for a request."""
        name = path.removeprefix("/v1/")
        with self._lock:
            self.requests.append((name, body))
            call = getattr(self, f"_{name}", None)
            if call is None:
                return 404, {"message": f"no operation {name}"}
            try:
                return 200, call(body)
            except KeyError as error:
                return 400, {"message": f"unknown {error}"}

    def _registerjobdefinition(self, body: dict) -> dict:
        name = body["jobDefinitionName"]
        revision = 1 + sum(one["jobDefinitionName"] == name for one in self.definitions.values())
        arn = f"arn:aws:batch:us-east-1:123456789012:job-definition/{name}:{revision}"
        self.definitions[arn] = {**body, "jobDefinitionArn": arn, "revision": revision, "status": "ACTIVE"}
        return {"jobDefinitionName": name, "jobDefinitionArn": arn, "revision": revision}

    def _describejobdefinitions(self, body: dict) -> dict:
        found = [one for one in self.definitions.values() if one["jobDefinitionName"] == body["jobDefinitionName"]]
        return {"jobDefinitions": found}

    def _submitjob(self, body: dict) -> dict:
        definition = self.definitions[body["jobDefinition"]]
        job_id = str(uuid.uuid4())
        self.jobs[job_id] = {
            "jobId": job_id,
            "jobArn": f"arn:aws:batch:us-east-1:123456789012:job/{job_id}",
            "jobName": body["jobName"],
            "jobQueue": body["jobQueue"],
            "jobDefinition": body["jobDefinition"],
            "status": "RUNNABLE",
            "createdAt": int(time.time() * 1000),
            "attempts": [],
            "tags": body.get("tags", {}),
            "container": {},
        }
        thread = threading.Thread(target=self._work, args=(job_id, definition, body), daemon=True)
        self._threads.append(thread)
        thread.start()
        return {"jobId": job_id, "jobName": body["jobName"], "jobArn": self.jobs[job_id]["jobArn"]}

    def _listjobs(self, body: dict) -> dict:
        found = [job for job in self.jobs.values() if job["jobQueue"] == body["jobQueue"]]
        for one in body.get("filters", []):
            assert one["name"] == "JOB_NAME"
            found = [job for job in found if any(fnmatch.fnmatch(job["jobName"], value) for value in one["values"])]
        if not body.get("filters"):
            found = [job for job in found if job["status"] == body.get("jobStatus", "RUNNING")]
        return {"jobSummaryList": found}

    def _describejobs(self, body: dict) -> dict:
        return {"jobs": [self.jobs[one] for one in body["jobs"] if one in self.jobs]}

    def _terminatejob(self, body: dict) -> dict:
        job = self.jobs.get(body["jobId"])
        if job is not None and job["status"] not in ENDED:
            job |= {"terminated": body["reason"], "isTerminated": True}
            self._end(job["jobId"])
        return {}

    def reclaim(self, job_id: str) -> None:
        """Take the machine of a running job away: a notice now, the kill after `grace` seconds."""
        self.jobs[job_id]["reclaimed"] = True
        self._end(job_id)

    def _end(self, job_id: str) -> None:
        process = self.processes.get(job_id)
        if process is not None and process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            timer = threading.Timer(self.grace, self._kill, [process])
            timer.daemon = True
            timer.start()

    def _kill(self, process: subprocess.Popen) -> None:
        """SIGKILL for a command and everything below it: a container has nothing left after it."""
        if process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                top = psutil.Process(process.pid)
                for one in [top, *top.children(recursive=True)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.kill()

    def _work(self, job_id: str, definition: dict, submitted: dict) -> None:
        job, container = self.jobs[job_id], definition["containerProperties"]
        given = container.get("environment", []) + submitted.get("containerOverrides", {}).get("environment", [])
        strategy = definition.get("retryStrategy", {"attempts": 1})
        limit = definition.get("timeout", {}).get("attemptDurationSeconds", 3600)
        for attempt in range(1, strategy["attempts"] + 1):
            while job["jobQueue"] in self.held and "terminated" not in job:
                time.sleep(0.02)
            if "terminated" not in job:
                job.pop("reclaimed", None)
                environment = self.environment | {one["name"]: one["value"] for one in given}
                environment |= {"AWS_BATCH_JOB_ID": job_id, "AWS_BATCH_JOB_ATTEMPT": str(attempt)}
                self._attempt(job, container["command"], environment, limit)
            if "terminated" in job:
                job["statusReason"] = job["terminated"]
                job["status"] = "FAILED"
                return
            last = job["attempts"][-1]
            if last["container"]["exitCode"] == 0:
                job["status"] = "SUCCEEDED"
                return
            job["statusReason"] = last["statusReason"]
            job["container"] = last["container"]
            if attempt == strategy["attempts"] or _action(strategy, last) == "EXIT":
                job["status"] = "FAILED"
                return
            job["status"] = "RUNNABLE"

    def _attempt(self, job: dict, command: list[str], environment: dict[str, str], limit: float) -> None:
        folder = self.folder / f"{job['jobId']}-{len(job['attempts']) + 1}"
        folder.mkdir(parents=True)
        started = int(time.time() * 1000)
        with (folder / "stdout.txt").open("w") as out:
            self.processes[job["jobId"]] = process = subprocess.Popen(
                [sys.executable, *(self.program or command[1:])],
                cwd=folder,
                env=environment | {"TMPDIR": str(folder)},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            job |= {"status": "RUNNING", "startedAt": started}
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                self._kill(process)
                process.wait()
        reason = (
            "Host EC2 (instance i-0123456789abcdef0) terminated."
            if job.get("reclaimed")
            else "Essential container in task exited"
        )
        code = process.returncode if process.returncode >= 0 else 128 - process.returncode
        stopped = int(time.time() * 1000)
        job["attempts"] = [
            *job["attempts"],
            {"startedAt": started, "stoppedAt": stopped, "statusReason": reason, "container": {"exitCode": code}},
        ]
        job["stoppedAt"] = stopped


def _action(strategy: dict, last: dict) -> str:
    """RETRY or EXIT for an attempt, as the strategy says."""
    for rule in strategy.get("evaluateOnExit", []):
        found = {
            "onStatusReason": last["statusReason"],
            "onExitCode": str(last["container"]["exitCode"]),
            "onReason": last["container"].get("reason", ""),
        }
        if all(fnmatch.fnmatchcase(found[name], rule[name]) for name in found if name in rule):
            return rule["action"]
    return "RETRY"


def plain_environment() -> dict[str, str]:
    """This process's environment without AWS settings and without what a test has set for itself."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "CLEAR_"))}

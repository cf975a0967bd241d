"""A Prefect server with the deployments, and a worker: `pytest_plugins = ["tests.helpers.prefect_server"]`."""

import contextlib
import os
import signal
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from flows.service.deploy import POOL, deploy
from tests.conftest import ROOT
from tests.helpers.processes import free_port, wait_until

PREFECT = [sys.executable, "-m", "prefect"]


PATIENCE = 180
"""Seconds for what ends by itself; two cores that are also busy with something else need some."""


@dataclass
class Server:
    """A running Prefect server, what its clients need in their environment, and a client."""

    environment: dict[str, str]
    client: SyncPrefectClient

    def deployment(self, name: str):
        return self.client.read_deployment_by_name(name)

    def start(self, name: str, **parameters):
        """Ask for a run of a deployment; returns its id."""
        return self.client.create_flow_run_from_deployment(self.deployment(name).id, parameters=parameters).id

    def state(self, run):
        return self.client.read_flow_run(run).state

    def ended(self, run, seconds: float = PATIENCE):
        """Wait until a run has ended; returns its state."""
        wait_until(lambda: self.state(run).is_final(), seconds, f"the end of run {run}")
        return self.state(run)

    def runs(self, name: str) -> list[dict]:
        asked = {"deployments": {"id": {"any_": [str(self.deployment(name).id)]}}, "sort": "EXPECTED_START_TIME_ASC"}
        return self._read("/flow_runs/filter", asked)

    def tasks(self, run) -> dict[str, str]:
        """State name by task run name."""
        found = self._read("/task_runs/filter", {"flow_runs": {"id": {"any_": [str(run)]}}})
        return {one["name"]: one["state_name"] for one in found}

    def logs(self, run) -> list[dict]:
        asked = {"logs": {"flow_run_id": {"any_": [str(run)]}}, "sort": "TIMESTAMP_ASC"}
        return self._read("/logs/filter", asked)

    def artifacts(self, run) -> dict[str, str]:
        """Content of the artifacts by key."""
        found = self._read("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [str(run)]}}})
        return {one["key"]: one["data"] for one in found}

    def _read(self, path: str, content: dict):
        return self.client.request("POST", path, json=content).raise_for_status().json()


@contextlib.contextmanager
def running(command: list[str], environment: dict[str, str], log: Path):
    """A program in its own process group and in the project's folder, killed at the end if need be."""
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, process_group=0
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def healthy(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
        return answer.status == 200
    return False


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A Prefect server on a free loopback port with everything `make deploy` sends."""
    folder = tmp_path_factory.mktemp("prefect")
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    plain = {key: value for key, value in os.environ.items() if not key.startswith("CLEAR_")}
    environment = plain | {
        "PREFECT_HOME": str(folder),
        "PREFECT_SERVER_UI_ENABLED": "false",
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "2",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
    }
    command = [*PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with running(command, environment, folder / "server.log") as process:
        wait_until(lambda: healthy(url) or process.poll() is not None, PATIENCE, "a Prefect server")
        environment |= {"PREFECT_API_URL": url}
        with (
            temporary_settings({PREFECT_API_URL: url, PREFECT_HOME: folder}),
            pytest.MonkeyPatch.context() as patch,
            get_client(sync_client=True) as client,
        ):
            for name in ("PREFECT_API_URL", "PREFECT_HOME"):
                patch.setenv(name, environment[name])
            deploy(ROOT)
            yield Server(environment, client)


@pytest.fixture
def worker(server, tmp_path):
    """A worker process for the pool of the deployments."""
    with running([*PREFECT, "worker", "start", "--pool", POOL], server.environment, tmp_path / "worker.log") as process:
        yield process

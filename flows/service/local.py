"""A Prefect server and a worker on this machine, deployments included, in one command: `make prefect-local`.

The server listens on the loopback interface only (PORT, default 4200) and keeps its history where Prefect does
(PREFECT_HOME). Ctrl-C or SIGTERM stops worker and server; runs in progress are ended and resume with the next one.
Both run under the supervisor of flows/service/children.py, so that they end even if this command is killed.
"""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import FrameType

from clear.data.ports import HOST, require_free, spare_loopback
from clear.errors import ClearError, fail
from flows.service import children
from flows.service.deploy import POOL

PREFECT = [sys.executable, "-m", "prefect"]
STARTUP_SECONDS = 120


def run(root: Path, port: int) -> None:
    """Start server, deployments and worker, and stay until interrupted.

    Raises ClearError where the port is taken, or as soon as one of them ends by itself.
    """
    require_free(port, ": make prefect-local PORT=4300")
    api = f"http://{HOST}:{port}/api"
    environment = os.environ | {"PREFECT_API_URL": api}
    started = {}
    try:
        started["server"] = start_server(root, port, environment)
        status, lines = children.run([sys.executable, "-m", "flows.service.deploy"], root, environment, print)
        if status:
            raise ClearError(lines[-1].removeprefix("error: ") if lines else "the deployments could not be sent.")
        started["worker"] = children.start([*PREFECT, "worker", "start", "--pool", POOL], root, environment)
        print(f"Prefect: http://{HOST}:{port}   stop with Ctrl-C   in another shell: export PREFECT_API_URL={api}")
        while True:
            for name, process in started.items():
                if process.poll() is not None:
                    raise ClearError(f"the {name} ended with status {process.returncode}; its reason is above.")
            time.sleep(0.5)
    finally:
        for process in reversed(started.values()):
            children.stop(process)


def start_server(folder: Path, port: int, environment: dict[str, str], **options) -> subprocess.Popen:
    """Start a supervised Prefect server and return once its API answers; `options` go to Popen (stdout, stderr).

    Raises ClearError if it does not come up. End it with children.stop.
    """
    command = [*PREFECT, "server", "start", "--host", HOST, "--port", str(port)]
    server = children.start(command, folder, guarded(environment, port), **options)
    deadline = time.monotonic() + STARTUP_SECONDS
    while not _answers(f"http://{HOST}:{port}/api/health"):
        if server.poll() is not None or time.monotonic() > deadline:
            children.stop(server)
            raise ClearError("the Prefect server did not start; its reason is above.")
        time.sleep(0.2)
    return server


def guarded(environment: dict[str, str], port: int) -> dict[str, str]:
    """The server's environment. By default any page that a browser of this machine shows may call Prefect's API, and
    so have the worker run what it likes: only the server's own page may, unless the caller has decided otherwise."""
    pages = f"http://{HOST}:{port},http://localhost:{port}"
    return {
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": pages,
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
    } | environment


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Run from the project's folder; 0 stopped on request, 1 failed with one line."""
    signal.signal(signal.SIGTERM, _interrupt)
    spare_loopback()
    port = sys.argv[1] if len(sys.argv) > 1 and sys.argv[1] else "4200"
    try:
        if not port.isdigit():
            raise ClearError(f"PORT = {port}: not a port number.")
        run(Path.cwd(), int(port))
    except KeyboardInterrupt:
        print("stopped: worker and server", flush=True)
    except ClearError as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())

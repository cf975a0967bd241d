"""A Prefect server that is not there, or is gone in the middle of a run: the run ends, in order, with one line."""

import os
import subprocess
import sys

import pytest
import yaml

from tests.conftest import ROOT
from tests.helpers.prefect_server import PATIENCE, PREFECT, healthy, running
from tests.helpers.processes import free_port, wait_until


def flow(folder, url: str, log, **more: str) -> subprocess.Popen:
    """`python -m flows.pipeline` in a folder, with its own home and the server at `url`."""
    environment = os.environ | {"PREFECT_API_URL": url, "PREFECT_HOME": str(folder.parent / "prefect")}
    environment |= {"PYTHONPATH": str(ROOT), "PREFECT_CLIENT_MAX_RETRIES": "1"} | more
    command = [sys.executable, "-m", "flows.pipeline", str(folder)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


@pytest.mark.slow
def test_a_server_that_is_not_there_is_one_line(project, tmp_path):
    url = f"http://127.0.0.1:{free_port()}/api"
    with (tmp_path / "log").open("w") as log:
        assert flow(project, url, log).wait(PATIENCE) == 1
    text = (tmp_path / "log").read_text()
    assert (
        text.splitlines()[-1].startswith(f"error: the Prefect API at {url} does not answer (") and "; start it" in text
    )
    assert "Traceback" not in text


@pytest.mark.slow
def test_a_server_that_is_gone_in_the_middle_leaves_what_was_made(project, tmp_path):
    port, gate = free_port(), tmp_path / "gate"
    url = f"http://127.0.0.1:{port}/api"
    waits = f"touch {tmp_path}/begun && while [ ! -e {gate} ]; do sleep 0.1; done && echo 1 > one"
    one, two = {"cmd": waits, "outs": ["one"]}, {"cmd": "cat one > two", "deps": ["one"], "outs": ["two"]}
    (project / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"one": one, "two": two}}))
    environment = os.environ | {"PREFECT_HOME": str(tmp_path / "server"), "PREFECT_SERVER_UI_ENABLED": "false"}
    command = [*PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "log").open("w") as log, running(command, environment, tmp_path / "server.log") as server:
        wait_until(lambda: healthy(url), PATIENCE, "a Prefect server")
        run = flow(project, url, log)
        wait_until((tmp_path / "begun").exists, PATIENCE, "the first stage")
        server.kill()
        server.wait()
        gate.touch()
        status = run.wait(PATIENCE)
    text = (tmp_path / "log").read_text()
    assert (status, (project / "two").read_text()) == (1, "1\n"), text
    (said,) = (line for line in text.splitlines() if line.startswith("error: "))
    assert said.startswith(f"error: the Prefect API at {url} does not answer (") and "what was made is kept" in said
    assert "Traceback" not in text

"""Degrading on a Dask cluster of real processes: the bytes of a local run, even when a worker is killed meanwhile."""

import os
import signal
import subprocess
import sys
import time

import pytest

from clear.degradation.build import degraded_samples, parallel
from clear.degradation.protocol import CELLS
from clear.errors import ClearError
from clear.sources.scenes import scenes
from tests.conftest import ROOT


@pytest.fixture
def start(tmp_path):
    """Function: start `dask <arguments>` with a scheduler file in tmp_path; all are ended afterwards."""
    running = []
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    shared = ["--scheduler-file", str(tmp_path / "scheduler.json"), "--no-dashboard"]

    def launch(*arguments):
        command = [sys.executable, "-m", "dask", *arguments, *shared]
        with (tmp_path / f"{len(running)}.log").open("w") as log:
            running.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log))
        return running[-1]

    yield launch
    for process in running:
        process.kill()
        process.wait()


def address_of(tmp_path) -> str:
    import json

    for _ in range(600):
        if (tmp_path / "scheduler.json").exists():
            return json.loads((tmp_path / "scheduler.json").read_text())["address"]
        time.sleep(0.1)
    raise AssertionError((tmp_path / "0.log").read_text())


@pytest.mark.slow
def test_a_killed_worker_changes_no_byte(tmp_path, start):
    samples = list(scenes("rl", 8, 3, 256, 4))
    variants = [(sample, *cell) for sample in samples for cell in CELLS]
    start("scheduler", "--host", "127.0.0.1", "--port", "0")
    address = address_of(tmp_path)
    workers = [start("worker", "--nthreads", "1", "--no-nanny", "--name", name) for name in "ab"]
    from distributed import Client

    with Client(address) as client:
        client.wait_for_workers(2, timeout=60)
    stream = degraded_samples(variants, 0.4, cluster=address)
    found = [next(stream)]
    os.kill(workers[0].pid, signal.SIGKILL)
    found += stream
    assert workers[0].wait(10) == -signal.SIGKILL and workers[1].poll() is None
    assert found == list(degraded_samples(variants, 0.4, workers=1))


def test_an_unreachable_cluster_is_one_clear_line(monkeypatch):
    monkeypatch.setattr("clear.degradation.build.CLUSTER_TIMEOUT", 1)
    with pytest.raises(ClearError, match=r"degrade.cluster = 'tcp://127.0.0.1:1' cannot be reached; start `dask"):
        list(parallel(len, ["a"], cluster="tcp://127.0.0.1:1"))
    with pytest.raises(ClearError, match=r"degrade.cluster = 'nowhere"):
        list(parallel(len, ["a"], cluster="nowhere://x"))


def test_a_cluster_without_workers_is_not_waited_for_forever(tmp_path, start, monkeypatch):
    monkeypatch.setattr("clear.degradation.build.CLUSTER_TIMEOUT", 3)
    start("scheduler", "--host", "127.0.0.1", "--port", "0")
    with pytest.raises(ClearError, match="has no worker; start `dask"):
        list(parallel(len, ["a"], cluster=address_of(tmp_path)))

"""Contracts 3 and 4 on the whole smoke pipeline: same seed same bytes, and a kill changes nothing. Slow."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.test_pipeline import clone as clone  # the fixture

pytestmark = pytest.mark.slow


def _command(home: Path) -> tuple[list[str], dict[str, str]]:
    environment = os.environ | {"CLEAR_HOME": str(home), "PYTHONPATH": ""}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return [sys.executable, "-m", "clear", "scratch", "smoke"], environment


def _outs(home: Path) -> dict[str, str]:
    lock = yaml.safe_load((home / "scratch/smoke/dvc.lock").read_text())["stages"]
    return {out["path"]: out["md5"] for stage in lock.values() for out in stage["outs"]}


@pytest.fixture(scope="module")
def reference(clone, tmp_path_factory) -> dict[str, str]:
    """Output hashes of an uninterrupted run with a cache and checkpoints of its own."""
    home = tmp_path_factory.mktemp("first")
    command, environment = _command(home)
    subprocess.run(command, cwd=clone, env=environment, check=True)
    return _outs(home)


def _forget_cache(clone: Path) -> None:
    subprocess.run(["rm", "-rf", str(clone / ".dvc/cache")], check=True)


def test_two_runs_give_the_same_bytes(clone, reference, tmp_path):
    _forget_cache(clone)
    command, environment = _command(tmp_path)
    subprocess.run(command, cwd=clone, env=environment, check=True)
    assert _outs(tmp_path) == reference


def test_a_killed_run_continues_to_the_same_bytes(clone, reference, tmp_path):
    _forget_cache(clone)
    command, environment = _command(tmp_path)
    for _ in range(4):
        process = subprocess.Popen(command, cwd=clone, env=environment)
        time.sleep(45)
        if process.poll() is None:
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                one.kill()
        process.wait()
    subprocess.run(command, cwd=clone, env=environment, check=True)
    assert _outs(tmp_path) == reference

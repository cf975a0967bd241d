"""Contracts 3 and 4 on the whole smoke pipeline: same seed same bytes, and a kill changes nothing. Slow."""

import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from tests.conftest import ROOT
from tests.helpers.scratch import scratch_command

pytestmark = pytest.mark.slow


def _outs(home: Path) -> dict[str, str]:
    lock = yaml.safe_load((home / "scratch/smoke/dvc.lock").read_text())["stages"]
    return {out["path"]: out["md5"] for stage in lock.values() for out in stage["outs"]}


@pytest.fixture(scope="module")
def reference(first) -> dict[str, str]:
    """Output hashes of that run."""
    return _outs(first)


def _forget_cache(clone: Path) -> None:
    subprocess.run(["rm", "-rf", str(clone / ".dvc/cache")], check=True)


def test_two_runs_give_the_same_bytes(clone, reference, tmp_path):
    _forget_cache(clone)
    command, environment = scratch_command(tmp_path)
    subprocess.run(command, cwd=clone, env=environment, check=True)
    assert _outs(tmp_path) == reference


def test_workers_hash_seed_time_zone_locale_and_folder_change_no_byte(clone, reference, tmp_path):
    folder, link = tmp_path / "a clone with spaces", tmp_path / "a link"
    shutil.copytree(clone, folder, symlinks=True)
    _forget_cache(folder)
    link.symlink_to(folder)
    command, environment = scratch_command(tmp_path / "a home")
    environment |= {"PYTHONHASHSEED": "7", "TZ": "Asia/Kathmandu"}
    environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # a locale that is not UTF-8
    subprocess.run([*command, "--set", "degrade.workers=2"], cwd=link, env=environment, check=True)
    assert _outs(tmp_path / "a home") == reference


def test_a_killed_run_continues_to_the_same_bytes(clone, reference, tmp_path):
    _forget_cache(clone)
    command, environment = scratch_command(tmp_path)
    for _ in range(4):
        process = subprocess.Popen(command, cwd=clone, env=environment)
        time.sleep(25)
        if process.poll() is None:
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                one.kill()
        process.wait()
    subprocess.run(command, cwd=clone, env=environment, check=True)
    assert _outs(tmp_path) == reference


def _left(home: Path) -> set[tuple[str, Path, int]]:
    """What a stage has left in its working folder, each with its inode: a file of the same name may be a new one."""
    found = set()
    for checkpoint in home.glob("checkpoints/smoke/*/*/*/checkpoint-*"):
        with suppress(FileNotFoundError):
            kind = "written" if (checkpoint / "complete").exists() else "writing"
            found.add((kind, checkpoint, checkpoint.stat().st_ino))
    weights = home.glob("checkpoints/smoke/*/*/*.safetensors")
    return found | {("phase", file, 0) for file in weights if file.with_suffix(".json").exists()}


def _killed_when(kind: str, command: list[str], place: Path, environment: dict[str, str]) -> None:
    """Start a stage and end it by SIGKILL as soon as something new of a kind of `_left` is there."""
    home = Path(environment["CLEAR_HOME"])
    before = {(path, inode) for known, path, inode in _left(home) if known == kind}
    process = subprocess.Popen(command, cwd=place, env=environment)
    while not any(now == kind and (path, inode) not in before for now, path, inode in _left(home)):
        assert process.poll() is None, f"the stage ended and nothing new was {kind}"
        time.sleep(0.0005)
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ("stage", "moments"),
    [
        ("sft", ["writing", "written", "phase", "writing"]),
        ("bridge", ["writing", "written", "phase", "writing"]),
        ("grpo", ["writing", "written", "writing"]),
    ],
)
def test_a_stage_killed_in_a_checkpoint_write_or_beside_one_ends_with_the_same_weights(first, tmp_path, stage, moments):
    """The moments are met one after the other, each by a process that continues what the one before it left."""
    made, place = first / "scratch/smoke", tmp_path / "project"
    shutil.copytree(made / "data", place / "data")
    shutil.rmtree(place / "data/models" / stage)
    params, often = re.subn(r"(checkpoint|log)_every: \d+", r"\1_every: 1", (made / "params.yaml").read_text())
    assert often == 2
    (place / "params.yaml").write_text(params)
    environment = os.environ | {"CLEAR_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "clear", stage]
    for moment in moments:
        _killed_when(moment, command, place, environment)
    subprocess.run(command, cwd=place, env=environment, check=True)
    wanted = {file.name: file.read_bytes() for file in (made / "data/models" / stage).iterdir()}
    assert {file.name: file.read_bytes() for file in (place / "data/models" / stage).iterdir()} == wanted

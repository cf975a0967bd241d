"""Bad input and interruptions, end to end through the real command: one line that names what is wrong, no traceback.

Where the matter is not the process, the command runs in this one: a new Python spends its time on imports.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from clear.config import load
from clear.data.records import read_samples, shards, write_samples
from clear.data.rejects import read_rejects
from clear.degradation.corruptions import CORRUPTIONS
from clear.degradation.protocol import degrade
from clear.errors import ClearError
from clear.project.scratch import write_params
from tests.conftest import ROOT
from tests.helpers.processes import wait_until

COUNTS = {"pretrain": 4, "sft": 4, "rl": 4, "validation": 4, "bench": 16, "development": 16}
"""With fewer in bench, corruptions would lack."""


def workspace(folder: Path, workers: int = 1, **counts: int) -> Path:
    """A folder with the parameters of the smoke profile for very few images."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [f"source.{split}={count}" for split, count in (COUNTS | counts).items()]
    write_params(folder / "params.yaml", ["profile=smoke", f"degrade.workers={workers}", *sizes])
    return folder


def run_here(folder: Path, *stages: str) -> Path:
    """Run stages in this process, as the uninterrupted and undisturbed run."""
    from clear.stages import degrade, mmd_bench, source

    modules = {"source": source, "degrade": degrade, "mmd_bench": mmd_bench}
    with contextlib.chdir(folder):
        for stage in stages:
            modules[stage].run(load())
    return folder


def environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "CLEAR_HOME"} | {"PYTHONPATH": str(ROOT)}


def start(folder: Path, stage: str) -> subprocess.Popen:
    """`python -m clear <stage>` in a workspace."""
    command = [sys.executable, "-m", "clear", stage]
    return subprocess.Popen(command, cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True)


def one_line(stage: str, status: int, stderr: str) -> str:
    """The one line with which a stage refuses; progress lines aside, nothing else is on stderr."""
    assert status == 1, stderr
    said = [line for line in stderr.splitlines() if line and not line.startswith((f"{stage}: ", f"{stage} "))]
    assert len(said) == 1 and said[0].startswith("error: "), stderr
    return said[0]


@pytest.fixture
def refusal(clear, monkeypatch):
    """Function: run a stage in a folder, in this process; returns the one line with which it refuses."""

    def call(folder: Path, stage: str) -> str:
        monkeypatch.chdir(folder)
        status, _, stderr = clear(stage)
        return one_line(stage, status, stderr)

    return call


def truncate_last(folder: Path, field: str) -> str:
    """Cut the last sample's image in half; returns its key."""
    *rest, last = read_samples(folder)
    data = getattr(last, field)
    write_samples(folder, [*rest, replace(last, **{field: data[: len(data) // 2]})])
    return last.key


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Content of every file below a folder, by relative path."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def _made(tmp_path_factory) -> Path:
    return run_here(workspace(tmp_path_factory.mktemp("made")), "source", "degrade", "mmd_bench")


@pytest.fixture
def made(_made, tmp_path) -> Path:
    """A copy of a workspace in which the data stages have run."""
    return Path(shutil.copytree(_made, tmp_path / "made"))


@pytest.mark.slow
def test_validate_names_the_sample_whose_degraded_image_is_truncated(made, refusal):
    key = truncate_last(made / "data/degraded/sft", "degraded")
    line = refusal(made, "validate")
    assert f"for 1 samples: {key}" in line and "degraded_sft" in line and "repair" in line
    (reject,) = read_rejects(made / "data/rejects/validate.parquet")
    assert (reject.id, reject.reason) == (key, "decodable") and "not a complete image" in reject.detail


@pytest.mark.slow
def test_degrade_names_the_sample_whose_clean_image_is_truncated(made):
    workspace(made, workers=2)  # the error comes out of a worker process
    before = bytes_of(made / "data/degraded")
    sample = truncate_last(made / "data/samples/rl", "image").split("/")[0]
    with start(made, "degrade") as process:
        _, stderr = process.communicate(timeout=60)
    line = one_line("degrade", process.returncode, stderr)
    assert f"sample {sample}" in line and "not a complete image; replace or remove" in line
    after = {name: data for name, data in bytes_of(made / "data/degraded").items() if ".partial" not in name}
    assert after == before


def test_a_shard_without_a_column_is_named_with_the_column(made, refusal):
    shard = shards(made / "data/samples/sft")[0]
    pq.write_table(pq.read_table(shard).drop_columns(["questions"]), shard)
    line = refusal(made, "degrade")
    assert f"{shard.relative_to(made)}: column 'questions' is missing" in line


def test_a_shard_that_is_no_parquet_file_is_named(made, refusal):
    shard = shards(made / "data/samples/sft")[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert str(shard.relative_to(made)) in refusal(made, "degrade")


@pytest.mark.parametrize("corruption", ["fog", "", "JPEG"])
def test_an_unknown_corruption_is_named_with_the_sample_and_the_choice(corruption):
    with pytest.raises(ClearError, match=f"sample scene-7: '{corruption}' is not a corruption") as refused:
        degrade(np.zeros((64, 64, 3), np.uint8), corruption, "low", "scene-7", 1.0)
    assert all(name in str(refused.value) for name in CORRUPTIONS)


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("source", "image_size", 8, "source.image_size = 8 is outside [96, 2048]"),
        ("source", "sft", 3, "source.sft = 3 is odd"),
        ("degrade", "workres", 2, "workres"),
        ("runtime", "threads", "many", "runtime.threads"),
    ],
)
def test_wrong_parameters_are_named_and_nothing_is_written(tmp_path, refusal, section, key, value, said):
    folder = workspace(tmp_path / "work")
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params[section][key] = value
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    assert said in refusal(folder, "source")
    assert not list(folder.glob("data/**/*.parquet"))


def _workers(pid: int) -> list[psutil.Process]:
    return [p for p in psutil.Process(pid).children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]


def _up(worker: psutil.Process) -> bool:
    """It serves, which begins with cv2; one that is still starting has words of its own for a kill."""
    return any("cv2" in part.path for part in worker.memory_maps())


@contextlib.contextmanager
def _stopped_midway(process: subprocess.Popen, begun: Path) -> Iterator[None]:
    """Inside, a run with two workers is under way: `begun` is there, both are up, and one of them stands still.

    Results are taken in order, so the run cannot come to its end before the one that stands still goes on.
    """
    wait_until(lambda: process.poll() is not None or begun.exists(), 60, "the beginning of the set")
    first = min(_workers(process.pid), key=psutil.Process.create_time)  # which is up: it has made the set before
    first.suspend()
    try:
        wait_until(lambda: len(_workers(process.pid)) == 2 and all(map(_up, _workers(process.pid))), 60, "two workers")
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            first.resume()


def test_an_interrupted_run_leaves_nothing_half_written_and_the_same_command_completes_it(tmp_path):
    counts = {"sft": 400}  # twelve or so chunks of work: enough that the worker that stands still owes one
    reference = bytes_of(run_here(workspace(tmp_path / "whole", **counts), "source") / "data")
    folder = workspace(tmp_path / "interrupted", workers=2, **counts)
    with start(folder, "source") as process:
        with _stopped_midway(process, folder / "data/samples/sft.partial"):
            process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=30)  # ends once the workers, too, have closed stderr
    assert process.returncode == 130
    assert stderr.endswith("interrupted; run the same command again to resume from the last checkpoint\n")
    assert "Traceback" not in stderr
    left = {name: data for name, data in bytes_of(folder / "data").items() if ".partial" not in name}
    assert {name.split("/")[1] for name in left} == {"pretrain"}, "only what was complete has its final name"
    assert left.items() <= reference.items()

    with start(folder, "source") as process:
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert bytes_of(folder / "data") == reference

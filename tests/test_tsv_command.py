"""`clear mmd-bench` as a command: resumed after a kill, two at once, what it says and its exit status."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clear.bench.vlmeval.tsv import write_benchmarks
from tests.conftest import ROOT
from tests.helpers.tables import b64, mmbench, picture, write_tsv


def run_command(folder: Path, *arguments: str, plain: bool = False) -> subprocess.Popen:
    """The command; `plain`: without root's right to override permissions."""
    command = [sys.executable, "-m", "clear", "mmd-bench", *arguments]
    if plain and os.geteuid() == 0:
        rights = "--bounding-set=-dac_override,-dac_read_search"
        command = ["setpriv", rights, "--inh-caps=-all", *command]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_the_command_resumes_after_sigkill_with_the_bytes_of_an_uninterrupted_run(tmp_path):
    mmbench(tmp_path / "in", count=5)
    reference = write_benchmarks(tmp_path / "in", tmp_path / "whole", "full", workers=1)
    arguments = ("--source", "in", "--out", "out", "--protocol", "full", "--workers", "1")
    with run_command(tmp_path, *arguments) as process:
        while len(list(tmp_path.glob("out/*.tsv"))) < 5:
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    left = {
        f.name: f.stat().st_mtime_ns
        for f in tmp_path.glob("out/*.tsv")
        if (tmp_path / f"out/.parts/{f.stem}.jsonl").exists()
    }
    assert 4 <= len(left) < 48 and not (tmp_path / "out/manifest.parquet").exists()
    with run_command(tmp_path, *arguments) as process:
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert stdout.count("already here") == len(left) and stdout.endswith("out/manifest.parquet\n")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in left} == left, "nothing is made twice"
    for file in [*reference, tmp_path / "whole/manifest.parquet"]:
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.slow
def test_two_at_once_into_one_folder_give_the_bytes_of_one(tmp_path):
    mmbench(tmp_path / "in", count=3)
    arguments = ("--source", "in", "--out", "out", "--protocol", "full", "--workers", "1")
    runs = [run_command(tmp_path, *arguments) for _ in range(2)]
    told = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], told
    waited = [stdout for stdout, _ in told if "already here" in stdout]
    assert len(waited) == 1 and waited[0].count("already here") == 48
    reference = write_benchmarks(tmp_path / "in", tmp_path / "whole", "full", workers=1)
    for file in [*reference, tmp_path / "whole/manifest.parquet", tmp_path / "whole/rejects.parquet"]:
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_command_counts_what_it_left_out_and_says_so_in_its_status(tmp_path, clear, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"index": n, "image": b64(picture(n)) if n else "", "question": "?", "answer": "x"} for n in range(3)]
    write_tsv(tmp_path / "in/X.tsv", rows)
    for workers in ((), ("--workers", "1")):  # the second time all files are there already
        status, stdout, stderr = clear("mmd-bench", "--source", "in", "--out", "out", *workers)
        assert status == 1
        assert stderr.splitlines()[-1] == (
            "error: rows that cannot be degraded and were left out: 1; all others are written. out/rejects.parquet has "
            "them, the first: X-0 (no image): the row has no image"
        )
        assert stdout.endswith("out/manifest.parquet\n") and stdout.count("out/X_LOW_LEVEL") == 3


def test_the_command_is_not_the_stage_and_refuses_by_name(tmp_path, clear, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, stdout, _ = clear("mmd-bench", "--help")
    assert all(word in stdout for word in ("--source", "--protocol", "--out", "VLMEvalKit", "row", "full"))
    for arguments, said in {
        ("--source", "none", "--out", "o"): "error: --source none: nothing is there",
        ("--source", ".", "--out", "o", "--protocol", "x"): "error: --protocol x: choose one of row, full.",
        ("--source", ".", "--out", "o"): "error: .: no *.tsv file here",
    }.items():
        status, _, stderr = clear("mmd-bench", *arguments)
        assert status == 1 and stderr.startswith(said), stderr


@pytest.mark.skipif(not shutil.which("setpriv"), reason="drops the right of root to read everything")
def test_a_file_or_folder_without_permission_is_named_and_never_taken_for_empty(tmp_path):
    row = {"index": 1, "image": b64(picture(1)), "question": "?", "answer": "x"}
    for name in ("in/A.tsv", "in/B.tsv", "closed/A.tsv"):
        write_tsv(tmp_path / name, [row])
    (tmp_path / "in/B.tsv").chmod(0)
    (tmp_path / "closed").chmod(0)
    with run_command(tmp_path, "--source", "in", "--out", "out", "--workers", "1", plain=True) as process:
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and stdout.count("out/A_LOW_LEVEL") == 3
    assert stderr.splitlines()[-1] == (
        "error: files that cannot be read and were left out: 1; all others are written. out/rejects.parquet has them, "
        "the first: B.tsv (file): in/B.tsv: Permission denied; check the permissions, or name another place."
    )
    with run_command(tmp_path, "--source", "closed", "--out", "out2", plain=True) as process:
        _, stderr = process.communicate(timeout=60)
    assert stderr == "error: closed: Permission denied; check the permissions, or name another place.\n"
    (tmp_path / "closed").chmod(0o755)

"""The readers keep their contract under the inputs of tests/fuzz: those made by hand, and those that once broke it."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.fuzz import run
from tests.fuzz.run import CORPUS, judged
from tests.fuzz.targets import TARGETS

PATIENCE = 5.0
"""Seconds of processor time for an input here, where other tests run beside; `make fuzz` is stricter."""


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_made_to_do_harm_are_read_or_refused_in_one_line(name):
    target = TARGETS[name]
    judged(name, target.seeds()[0], 0)  # imports belong to no input
    kept = [file.read_bytes() for file in sorted((CORPUS / name).glob("*"))]
    assert {
        number: wrong for number, data in enumerate([*target.evil(), *kept]) if (wrong := judged(name, data, PATIENCE))
    } == {}


def test_a_run_resumes_and_counts_its_inputs(tmp_path):
    def fuzz(count: int) -> str:
        command = [sys.executable, "-m", "tests.fuzz.run", str(count), "json"]
        environment = {"CLEAR_HOME": str(tmp_path), "PATH": ""}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout

    assert "json 20 " in fuzz(20)
    assert "json 30 " in fuzz(30)


ENDS = """
import json, os, pathlib, sys
state = pathlib.Path(sys.argv[1])
if state.exists():  # the second time
    state.write_text(json.dumps(json.loads(state.read_text()) | {"done": 20}))
    sys.exit()
state.with_suffix(".input").write_bytes(b"7\\nab\\ncd")
os.abort()
"""


def test_after_an_input_that_ends_the_process_the_next_one_is_tried(tmp_path, monkeypatch):
    """Fifty were counted as done."""
    left, begin = [], subprocess.Popen

    def child(command):
        left.append(json.loads(Path(command[-1]).read_text())["done"] if left else 0)
        return begin([sys.executable, "-c", ENDS, command[-1]])

    monkeypatch.setattr(run, "CORPUS", tmp_path / "corpus")
    monkeypatch.setattr(run.subprocess, "Popen", child)
    told = run._run("json", 20, tmp_path)
    assert left == [0, 8] and told["done"] == 20 and told["findings"] == {f"ended with {-signal.SIGABRT}": 1}
    assert [file.read_bytes() for file in (tmp_path / "corpus/json").iterdir()] == [b"ab\ncd"]


class Silent:
    """A process that notes nothing and is gone after so many looks."""

    def __init__(self, status: str, spent: float, looks: int):
        self.state, self.spent, self.looks, self.ended = status, spent, looks, False

    def status(self) -> str:
        self.looks -= 1
        return self.state if self.looks > 0 else "zombie"

    def cpu_times(self) -> tuple[float, float]:
        return self.spent, 0.0

    def kill(self) -> None:
        self.ended = True


@pytest.mark.parametrize(
    ("status", "spent", "hung"), [("running", 0.1, False), ("running", 9.0, True), ("sleeping", 0.1, True)]
)
def test_a_process_that_waits_for_a_processor_has_not_hung(tmp_path, monkeypatch, status, spent, hung):
    """Nine inputs were findings because the machine was busy."""
    monkeypatch.setattr(run, "PATIENCE", 0.3)
    process = Silent(status, spent, 12)
    assert run._watched(process, tmp_path / "input") is process.ended is hung

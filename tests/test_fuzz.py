"""The readers keep their contract under the inputs of tests/fuzz: those made by hand, and those that once broke it."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT
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

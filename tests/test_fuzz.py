"""The readers keep their contract under the inputs of tests/fuzz: those made by hand, and those that once broke it."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.fuzz.run import CORPUS, judged
from tests.fuzz.targets import TARGETS

OPEN = {
    "output": "the answer pattern takes quadratic time on tags that are never closed",
    "lmudata": "a header of a million empty columns takes more than 1 s",
}
"""Faults that are known and not yet mended; strict, so that a mend has to take its line away."""


def _marked(name: str):
    return pytest.param(name, marks=[pytest.mark.xfail(strict=True, reason=OPEN[name])] if name in OPEN else [])


@pytest.mark.parametrize("name", map(_marked, TARGETS))
def test_inputs_made_to_do_harm_are_read_or_refused_in_one_line(name):
    target = TARGETS[name]
    judged(name, target.seeds()[0], 0)  # imports belong to no input
    kept = [file.read_bytes() for file in sorted((CORPUS / name).glob("*"))]
    assert {number: wrong for number, data in enumerate([*target.evil(), *kept]) if (wrong := judged(name, data))} == {}


def test_a_run_resumes_and_counts_its_inputs(tmp_path):
    def fuzz(count: int) -> str:
        command = [sys.executable, "-m", "tests.fuzz.run", str(count), "json"]
        environment = {"CLEAR_HOME": str(tmp_path), "PATH": ""}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout

    assert "json 20 " in fuzz(20)
    assert "json 30 " in fuzz(30)

"""`make kill` itself: it kills before every change of a file, and would see other bytes."""

import json

import pytest

from clear.project.scratch import write_params
from tests.kill.commands import Command, stages
from tests.kill.run import WAYS, _tried


def test_every_stage_of_the_pipeline_is_killed():
    assert {"source", "degrade", "sft", "bridge", "grpo", "evaluate", "report"} <= set(stages())
    assert stages()["evaluate"].arguments == ("evaluate", "grpo") and all(one.makes for one in stages().values())


@pytest.mark.slow
def test_a_command_that_survives_passes_and_other_bytes_are_told(tmp_path):
    (tmp_path / "base").mkdir()
    write_params(tmp_path / "base/params.yaml", ["profile=smoke"])
    command, state = Command(("params", "--set", "profile=smoke"), ("params.yaml",)), tmp_path / "state.json"
    told = _tried(command, tmp_path / "base", state, len(WAYS), "params")
    assert told["changes"] >= 2 and list(told["trials"].values()) == [""] * len(WAYS), told
    assert any("before change" in key for key in told["trials"])
    state.write_text(json.dumps(told | {"made": {"params.yaml": "another"}}))
    told = _tried(command, tmp_path / "base", state, len(WAYS) + 1, "params")
    assert list(told["trials"].values())[-1] == "other bytes: params.yaml"

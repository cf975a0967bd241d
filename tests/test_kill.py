"""`make kill` itself: it kills before every change of a file, starves, begins twice, and would see other bytes."""

import errno
import json

import pytest

from clear.project.scratch import write_params
from tests.kill.commands import Command, stages
from tests.kill.disk import mounted
from tests.kill.process import Ended, made
from tests.kill.run import MOUNTED, WAYS, Trial, refused, tried

PARAMS = Command(("params", "--set", "profile=smoke"), ("params.yaml",))


@pytest.fixture
def base(tmp_path):
    write_params(tmp_path / "base/params.yaml", ["profile=smoke"])
    return tmp_path / "base"


def test_every_stage_of_the_pipeline_is_killed():
    assert {"source", "degrade", "sft", "bridge", "grpo", "evaluate", "report"} <= set(stages())
    assert stages()["evaluate"].arguments == ("evaluate", "grpo") and all(one.makes for one in stages().values())


def test_the_turns_cover_all_places_evenly(base):
    """`share` of turn n lies in the n-th part."""
    draw = type("Draw", (), {"random": staticmethod(lambda: 0.5)})
    trials = [Trial(PARAMS, base, {}, turn, 4, draw) for turn in range(4)]
    assert [trial.share(80) for trial in trials] == [10, 30, 50, 70]


def test_with_turns_enough_it_is_killed_once_at_every_place_that_changes_a_file(base, tmp_path, monkeypatch):
    at = []
    monkeypatch.setitem(WAYS, "change", lambda trial: ("", at.append(trial.share(3)) or "", 0.0))
    state, told = tmp_path / "state.json", {"places": [[1, 4], [2], [3, 5]], "trials": {}, "slowest": 0.0}
    state.write_text(json.dumps(told))
    tried(PARAMS, base, state, 9, "params", ["change"])
    assert at == [0, 1, 2]


def test_a_command_that_is_begun_twice_at_once_ends_as_if_begun_once(base, tmp_path, monkeypatch):
    told = tried(PARAMS, base, tmp_path / "state.json", 1, "params", ["twice"])
    assert [*told["trials"].values()] == [""] and next(iter(told["trials"])).startswith("twice 0: 0.0 s apart"), told
    monkeypatch.setitem(WAYS, "twice", None)
    again = tried(PARAMS, base, tmp_path / "state.json", 1, "params", ["twice"])
    assert again["trials"] == told["trials"], "it is not tried again"


@pytest.mark.slow
def test_a_command_that_survives_passes_and_other_bytes_are_told(base, tmp_path):
    state = tmp_path / "state.json"
    told = tried(PARAMS, base, state, 1, "params")
    with mounted() as disk:
        ways = [way for way in WAYS if disk or way not in MOUNTED]
    assert told["changes"] == sum(map(len, told["places"])) >= len(told["places"]) >= 2
    assert [key.partition(" ")[0] for key in told["trials"]] == ways
    assert {*told["trials"].values()} == {""}, told
    state.write_text(json.dumps(told | {"made": {"params.yaml": "another"}}))
    told = tried(PARAMS, base, state, 2, "params", ["alone"])
    assert list(told["trials"].values())[-1] == "other bytes: params.yaml"


@pytest.mark.parametrize(
    ("status", "errors", "left", "why"),
    [
        (0, "", "whole", ""),
        (1, "50 %|\nerror: a/b: No space left on device; free some space there.\n", "whole", ""),
        (1, "50 %|error: a/b: No space left on device; free some space there.\n", "whole", "status 1 with"),
        (1, "error: a: No space left on device; free it.\nerror: again\n", "whole", "status 1 with"),
        (1, "Traceback …\nerror: a: No space left on device; free it.\n", "whole", "status 1 with"),
        (-7, "", "whole", "status -7 with"),
        (1, "error: no.\n", "whole", "the line has no 'No space left on device' and remedy: error: no."),
        (1, "error: No space left on device.\n", "whole", "the line has no"),
        (1, "error: a: No space left on device; free it.\n", "who", "not whole under its name: params.yaml"),
    ],
)
def test_what_is_wrong_with_a_refused_command_is_told(base, status, errors, left, why):
    (base / "params.yaml").write_text(left)
    told = {"made": made(PARAMS, base, Ended(0, "", "", 0.0, False))} if left == "whole" else {"made": {}}
    trial = Trial(PARAMS, base, told, 0, 1, None)
    found = refused(trial, base, Ended(status, "", errors, 0.0, False), errno.ENOSPC)
    assert found.startswith(why) and bool(found) == bool(why)

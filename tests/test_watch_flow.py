"""The flow `watch`: what Prefect is told of a night."""

import json
import logging
import os
import subprocess
import sys

import pytest

from clear.errors import ClearError
from flows import watch as flow
from tests.conftest import ROOT
from tests.helpers.drifting import night, world
from tests.helpers.processes import wait_until

pytest_plugins = ["tests.helpers.prefect_server"]

NIGHT = {
    "night": "2026-01-01",
    "place": "/data/traffic",
    "verdict": "Drifted",
    "message": "300 pictures have changed",
    "begun": "2026-01-01",
    "decision": {"p": 0.001},
    "damage": [{"kind": "+fog", "level": "mid"}],
    "proposal": {"because": "it looks like fog", "commands": ["clear scratch tiny"]},
    "unread": [["secret name.txt", "no picture"]],
}


@pytest.fixture
def told(monkeypatch, tmp_path):
    """Run the flow on a command that ends with a status and, unless `night` is None, writes it; returns its last state
    and what was told. `server` is what listens to announcements, `artifact` what Prefect says of an artifact."""

    def run(status: int, night: dict | None, lines: list[str], server=True, artifact=None, heard=None, **parameters):
        heard = {} if heard is None else heard
        heard |= {"artifacts": [], "events": [], "commands": []}

        def command(arguments, folder, environment, say, lock=None):
            heard["commands"].append(arguments)
            if night is not None:
                page = tmp_path / "data/watch/traffic-1/2026-01-01/index.html"
                page.parent.mkdir(parents=True, exist_ok=True)
                page.with_name("night.json").write_text(json.dumps(night))
                page.with_name("night.md").write_text("**a table**")
                lines.append(f"report: {page}")
            return status, lines

        monkeypatch.setattr(flow.children, "run", command)
        monkeypatch.setattr(flow, "get_run_logger", lambda: logging.getLogger("test"))
        monkeypatch.setattr(flow, "create_markdown_artifact", artifact or (lambda *it: heard["artifacts"].append(it)))
        monkeypatch.setattr(flow, "announce", lambda *given: heard["events"].append(given) or server)
        return flow.watch.fn(str(tmp_path), **parameters), heard

    return run


def test_a_night_that_drifted_is_a_state_an_artifact_and_one_event(told):
    state, heard = told(1, NIGHT, ["1 files are no usable pictures"], place="/data/traffic", reference="@prod")
    assert (state.name, state.type.value, state.message) == ("Drifted", "COMPLETED", "300 pictures have changed")
    ((kind, subject, said, look),) = heard["events"]
    assert (kind, subject) == ("drift", "the pictures of 2026-01-01 have changed")
    assert said == "300 pictures have changed; it looks like fog" and look.endswith("traffic-1/2026-01-01/index.html")
    assert heard["artifacts"] == [("**a table**", "watch", "/data/traffic: Drifted")]
    assert "secret name" not in str(heard["events"]) + str(state)
    (command,) = heard["commands"]
    assert command[3] == "watch" and {"--reference=@prod", "--since=24.0"} <= set(command)
    assert command[-2:] == ["--", "/data/traffic"], "no place is taken for an option"


def test_a_change_that_lasts_is_announced_once_and_a_state_every_night(told):
    for tonight, events in (("2026-01-01", 1), ("2026-01-01", 0), ("2026-01-02", 0)):
        state, heard = told(1, NIGHT | {"night": tonight}, [], place="/data/traffic")
        assert state.name == "Drifted" and len(heard["events"]) == events and len(heard["artifacts"]) == 1
    _, heard = told(1, NIGHT | {"night": "2026-01-09", "begun": "2026-01-09"}, [], place="/data/traffic")
    assert len(heard["events"]) == 1, "another change"


def test_a_change_that_nobody_was_told_of_is_announced_later(told):
    """A person's `clear watch` has found it first, a run had no server, an artifact failed."""
    later = NIGHT | {"night": "2026-01-02"}
    for _ in range(2):
        _, heard = told(1, NIGHT, [], server=False, place="/data/traffic")
        assert len(heard["events"]) == 1

    def fails(*given):
        raise RuntimeError("Failed to reach API")

    heard = {}
    with pytest.raises(RuntimeError, match="Failed to reach API"):
        told(1, later, [], artifact=fails, heard=heard, place="/data/traffic")
    assert len(heard["events"]) == 1, "before the artifact"
    assert told(1, later, [], place="/data/traffic")[1]["events"] == []


@pytest.mark.parametrize(("verdict", "status"), [("NoDrift", 0), ("TooFew", 2)])
def test_other_nights_emit_nothing(told, verdict, status):
    state, heard = told(status, NIGHT | {"verdict": verdict, "decision": None, "damage": []}, [], place="/data/traffic")
    assert state.name == verdict and state.type.value == "COMPLETED" and heard["events"] == []


def test_an_error_fails_the_run_with_its_line_and_no_place_is_no_error(told):
    with pytest.raises(ClearError, match=r"^/gone: no such folder$"):
        told(2, None, ["pictures: 1/2", "error: /gone: no such folder"], place="/gone")
    state, heard = told(0, None, [])
    assert state.name == "NotSet" and heard["commands"] == []


@pytest.mark.slow
def test_a_real_run_on_a_server_ends_as_drifted_with_an_event(server, tmp_path):
    root = world(tmp_path / "project", 120)
    place = night(tmp_path / "traffic", 60, ("gaussian_noise", "high"), 0.4)
    command = [sys.executable, "-m", "flows.watch", str(place), "--workspace", str(root)]
    environment = os.environ | server.environment | {"PYTHONPATH": str(ROOT), "CLEAR_HOME": str(root / ".clear")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Drifted: 60 pictures have changed" in done.stdout, done.stderr
    drifted = {"state": {"name": {"any_": ["Drifted"]}}}  # the deployment has scheduled runs there too
    (run,) = server._read("/flow_runs/filter", {"flow_runs": drifted})
    assert (run["state_name"], run["state_type"]) == ("Drifted", "COMPLETED")
    assert server.artifacts(run["id"])["watch"].startswith("**Drifted**")
    asked = {"filter": {"event": {"name": ["clear.alert.drift"]}}}
    found = wait_until(lambda: server._read("/events/filter", asked)["events"], 30, "the event")
    assert found[0]["payload"]["said"].startswith("60 pictures have changed")
    assert (root / found[0]["payload"]["look"]).is_file()
    assert run["id"] in str(found[0]["related"]), "a message can say which run it was"
    (announced,) = (root / "data/watch").glob("*/announced")
    assert (
        announced.read_text().strip()
        == json.loads(next((root / "data/watch").glob("*/*/night.json")).read_text())["begun"]
    )

"""Alerts from a real Prefect server to receivers on loopback: what is sent, what is not, and a receiver that fails."""

import subprocess
import sys
import time

import pytest
import yaml
from prefect import flow
from prefect.client.schemas.objects import StateType
from prefect.states import Cancelled, Completed, Crashed, Failed, Running, State
from prefect.types._datetime import now

from clear.errors import ClearError
from clear.project.retrain.run import Outcome
from flows.batch.cost import OverBudget
from flows.service import alerts
from flows.service.alerts import ALERTS, PREFIX, ensure_alerts
from flows.service.announce import announce_gate, announce_refused
from tests.conftest import ROOT
from tests.helpers.prefect_server import PATIENCE, Server
from tests.helpers.processes import wait_until
from tests.helpers.receivers import Receiver, mail_server, web_hook

pytest_plugins = ["tests.helpers.prefect_server"]
pytestmark = pytest.mark.slow

SETUP = "CLEAR: alerts are set up"


@pytest.fixture
def hook(server, monkeypatch):
    """A web hook that is the one target of the alerts; none is left at the end."""
    with web_hook() as receiver:
        monkeypatch.setenv(alerts.VARIABLE, receiver.address)
        yield receiver
    monkeypatch.setenv(alerts.VARIABLE, "none")
    assert ensure_alerts(server.client, ROOT).startswith("Alerts: none")
    assert not [one.name for one in server.client.read_automations() if one.name.startswith(PREFIX)]


def ends(server: Server, deployment: str, state: State) -> str:
    """A run of a deployment that begins and ends so, without a worker."""
    run = server.start(deployment)
    for reached in (Running(), state):
        server.client.set_flow_run_state(run, reached, force=True)
    return str(run)


def arrived(receiver: Receiver, *titles: str) -> list[str]:
    """Wait for messages with these titles, in any order, and no others; returns the texts, by title."""
    wait_until(lambda: len(receiver.messages) >= len(titles), PATIENCE, f"{titles}; there is {receiver.titles()}")
    assert sorted(receiver.titles()) == sorted(titles)
    return [text for _, text in sorted(receiver.messages)]


def marker(server: Server, receiver: Receiver) -> None:
    """Wait until the server has dealt with all events so far: it takes them one after the other."""
    before = len(receiver.messages)
    alerts._send(server.client, [alerts._event("clear.alert.marker", "clear.test", subject="marker", said="", look="")])
    wait_until(lambda: "CLEAR: marker" in receiver.titles()[before:], PATIENCE, "the marker")
    receiver.messages = [one for one in receiver.messages if one[0] != "CLEAR: marker"]


def test_targets_are_tried_out_once_and_no_address_is_shown(server, hook, monkeypatch, capfd):
    with mail_server() as mail:
        monkeypatch.setenv(alerts.VARIABLE, f"{hook.address} {mail.address}")
        assert ensure_alerts(server.client, ROOT) == "Alerts go to clear-alert-env-1, clear-alert-env-2."
        assert hook.titles() == mail.titles() == [SETUP]
        assert hook.requests == ["/hook/a-long-secret-path?key=another-long-secret"]
        monkeypatch.delenv(alerts.VARIABLE)  # from a shell without the address nothing changes
        assert ensure_alerts(server.client, ROOT) == "Alerts go to clear-alert-env-1, clear-alert-env-2."
        marker(server, hook)
        assert hook.titles() == [SETUP]
        monkeypatch.setenv(alerts.VARIABLE, mail.address)
        assert ensure_alerts(server.client, ROOT) == "Alerts go to clear-alert-env-1."
    shown = server.client.read_block_documents(include_secrets=False)
    assert [one.name for one in shown if one.name.startswith(PREFIX)] == ["clear-alert-env-1"]
    out = "".join(capfd.readouterr())
    for secret in ("a-long-secret", "another-long", "localhost.test"):
        assert not [one for one in shown if secret in str(one.data)] and secret not in out


def test_a_block_of_prefects_page_is_a_target(server, hook, monkeypatch):
    from prefect.blocks.notifications import CustomWebhookNotificationBlock

    url = hook.address.partition("?")[0]
    block = CustomWebhookNotificationBlock(
        name="team", url=url, json_data={"title": "{{subject}}", "message": "{{body}}"}
    )
    block.save("clear-alert-team")
    try:
        monkeypatch.setenv(alerts.VARIABLE, "none")
        assert ensure_alerts(server.client, ROOT) == "Alerts go to clear-alert-team."
        assert hook.titles() == [SETUP]
    finally:
        CustomWebhookNotificationBlock.delete("clear-alert-team")


def test_failures_of_a_deployment_are_one_message_until_it_is_well_again(server, hook):
    ensure_alerts(server.client, ROOT)
    hook.messages.clear()
    first = ends(
        server, "retrain/check", Failed(message=f"Flow run encountered an exception: {ClearError.__name__}: no x")
    )
    marker(server, hook)
    ends(server, "retrain/check", Failed(message="another"))
    ends(server, "retrain/check", Crashed(message="gone"))
    ends(server, "benchmark/nightly", Crashed(message="process ended\nwith status 137"))
    marker(server, hook)
    crashed, failed = arrived(hook, "CLEAR: retrain/check failed", "CLEAR: benchmark/nightly crashed")
    assert failed.splitlines()[0] == "no x" and crashed.splitlines()[0] == "process ended"
    assert f"/runs/flow-run/{first}\nLook further: prefect flow-run logs {first}\n" in failed
    assert ensure_alerts(server.client, ROOT), "nothing is forgotten by deploying again"
    ends(server, "retrain/check", Failed(message="another"))
    marker(server, hook)
    hook.messages.clear()
    ends(server, "retrain/check", Completed(name="NothingNew"))
    marker(server, hook)
    ends(server, "retrain/check", Completed())
    refused = "Flow run encountered an exception: OverBudget: stage grpo is not submitted"
    assert OverBudget.__name__ in refused
    ends(server, "retrain/check", Failed(message=refused))
    marker(server, hook)
    over, well = arrived(hook, "CLEAR: retrain/check is well again", "CLEAR: retrain/check is over budget")
    assert over.splitlines()[0] == "stage grpo is not submitted" and "/runs/flow-run/" in well


def test_runs_that_are_cancelled_behind_one_that_hangs_are_one_message_until_it_ends(server, hook):
    """They are not late and have not failed, so that nobody would hear of a deployment that stands still."""
    ensure_alerts(server.client, ROOT)
    hook.messages.clear()
    blocked = Cancelled(message="Deployment concurrency limit reached.")
    for _ in range(2):
        ends(server, "retrain/check", blocked)
        ends(server, "benchmark/nightly", Cancelled())
    marker(server, hook)
    assert not hook.titles()
    for _ in range(4):
        ends(server, "retrain/check", blocked)
    marker(server, hook)
    (text,) = arrived(hook, "CLEAR: retrain/check does not get its turn")
    assert "/runs/flow-run/" in text and "prefect flow-run ls --state Running" in text
    hook.messages.clear()
    ends(server, "retrain/check", Completed())
    marker(server, hook)
    for _ in range(3):
        ends(server, "retrain/check", blocked)
    marker(server, hook)
    arrived(hook, "CLEAR: retrain/check does not get its turn")


def test_a_late_run_is_one_message_until_one_begins(server, hook, tmp_path):
    (tmp_path / "infra").mkdir()
    config = yaml.safe_load((ROOT / ALERTS).read_text()) | {"late_minutes": 0.2}
    (tmp_path / ALERTS).write_text(yaml.safe_dump(config))
    ensure_alerts(server.client, tmp_path)
    hook.messages.clear()

    def late(name: str = "Late"):
        state = State(type=StateType.SCHEDULED, name=name, state_details={"scheduled_time": now("UTC")})
        run = server.start("propose/weekly")
        server.client.set_flow_run_state(run, state, force=True)
        return run

    taken = late()
    server.client.set_flow_run_state(taken, Running(), force=True)
    first, second = late(), late()
    wait_until(lambda: hook.messages, PATIENCE, "a message")
    late()
    # Twice the 12 s that make a run late, so that the others are as well, and say nothing.
    server.client.set_flow_run_state(taken, Completed(), force=True)
    time.sleep(25)
    marker(server, hook)
    (text,) = arrived(hook, "CLEAR: propose/weekly is late")
    assert "for 0.2 minutes" in text and str(first) in text
    server.client.set_flow_run_state(second, Running(), force=True)
    again = late()
    wait_until(lambda: len(hook.messages) == 2, PATIENCE, "a second message")
    assert str(again) in hook.messages[1][1]


def test_a_real_run_that_fails_says_why(server, worker, hook, tmp_path):
    ensure_alerts(server.client, ROOT)
    hook.messages.clear()
    run = server.start("pipeline/here", workspace=str(tmp_path))
    assert server.ended(run).is_failed()
    (text,) = arrived(hook, "CLEAR: pipeline/here failed")
    assert text.startswith(f"{tmp_path} has no dvc.yaml; name the project's folder as `workspace`.\n{tmp_path.name} ")
    command = text.splitlines()[2].removeprefix("Look further: ").split()
    done = subprocess.run([sys.executable, "-m", *command], env=server.environment, capture_output=True, text=True)
    assert done.returncode == 0 and "has no dvc.yaml" in done.stdout + done.stderr


def test_what_a_run_announces_is_sent_with_the_run(server, hook):
    ensure_alerts(server.client, ROOT)
    hook.messages.clear()

    @flow(name="retrain")
    def some_run():
        announce_refused("fog-2026", "8 of 14 rows cannot be used")
        announce_gate(Outcome("Retrained on fog: the gate FAILS (retrain/fog-1)", "Proposed", "retrain/fog-1"))
        announce_gate(Outcome("Retrained on fog: the gate FAILS (retrain/fog-1)", "WaitsForReview", "retrain/fog-1"))
        return str(now("UTC"))

    some_run()
    marker(server, hook)
    set_, gate = arrived(hook, "CLEAR: fog-2026 is in quarantine", "CLEAR: retrain: the gate fails")
    assert set_.splitlines()[0] == "8 of 14 rows cannot be used" and "data/quarantine/fog-2026.report" in set_
    assert "Look further: clear gate retrain/fog-1~1 retrain/fog-1" in gate and "/runs/flow-run/" in gate


def test_a_receiver_that_answers_500_is_named_and_a_message_is_tried_again(server, hook, monkeypatch):
    monkeypatch.setitem(alerts.OPTIONS, "wait", 1)
    hook.status = 500
    with pytest.raises(ClearError) as refused:
        ensure_alerts(server.client, ROOT)
    assert "clear-alert-env-1: " in str(refused.value) and "500" in str(refused.value)
    assert "secret" not in str(refused.value) and "\n" not in str(refused.value)
    assert len(hook.requests) == 1 + alerts.OPTIONS["retry"]
    run = ends(server, "retrain/check", Failed(message="x"))
    wait_until(lambda: len(hook.requests) > 1 + alerts.OPTIONS["retry"], PATIENCE, "another try")
    hook.status = 200
    arrived(hook, "CLEAR: retrain/check failed")
    assert server.state(run).is_failed()

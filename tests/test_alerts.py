"""What alerts say and whom they are for, without a server; tests/test_alerts_sent.py sends them."""

import re
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import get_args, get_type_hints
from uuid import UUID

import pytest
import yaml
from apprise import Apprise

from clear.drift import night
from clear.errors import ClearError
from clear.project.retrain.run import Outcome
from flows.service import alerts, announce
from flows.service.alerts import ALERTS, Deployment, Target, addresses, automations, read, template
from tests.conftest import ROOT

CONFIG = read(ROOT / ALERTS)
RUN = "12345678-1234-5678-1234-567812345678"
UI = "http://the-server:4200"
WEEKLY, BY_HAND = Deployment("1", "propose/weekly", True), Deployment("2", "pipeline/here", False)


def says(
    name: str, state: str = "Failed", message: str | None = "", due: datetime | None = None, **more
) -> tuple[str, list[str]]:
    """Subject and lines of an alert, filled in as Prefect's server does it."""
    from prefect.server.utilities.user_templates import render_user_template_sync, validate_user_template

    context = {
        "flow": SimpleNamespace(name="retrain"),
        "deployment": SimpleNamespace(name="check"),
        "flow_run": SimpleNamespace(
            name="tiny 1a2b",
            id=UUID(RUN),
            state=SimpleNamespace(name=state, message=message),
            expected_start_time=due,
        ),
    }
    (alert,) = [one for one in CONFIG["alerts"] if one["name"] == name]
    texts = [template(CONFIG, alert[part], f"{UI}/") for part in ("subject", "body")]
    for text in texts:
        validate_user_template(text)
    subject, body = (render_user_template_sync(text, context | more) for text in texts)
    assert "\n" not in subject and not re.search(r"[{}]|None|Undefined", subject + body)
    return subject, body.splitlines()


@pytest.mark.parametrize(
    ("state", "message", "subject", "line"),
    [
        ("Failed", "Flow run encountered an exception: ClearError: x.csv: no rows", "failed", "x.csv: no rows"),
        ("Failed", "Flow run encountered an exception: KeyError: 'a'\nTraceback", "failed", "KeyError: 'a'"),
        ("Failed", "Flow run encountered an exception: OverBudget: stage grpo …", "is over budget", "stage grpo …"),
        ("Crashed", "No heartbeat for 90 s", "crashed", "No heartbeat for 90 s"),
        ("TimedOut", "after 5 s", "timed out", "after 5 s"),
        ("Failed", None, "failed", "no message"),
        ("Failed", " \n", "failed", "no message"),
        ("Failed", "x" * 5000, "failed", "x" * 597 + "..."),
    ],
)
def test_a_failure_is_one_line_with_link_and_command(state, message, subject, line):
    assert says("failed", state, message) == (
        f"CLEAR: retrain/check {subject}",
        [
            line,
            f"tiny 1a2b: {UI}/runs/flow-run/{RUN}",
            f"Look further: prefect flow-run logs {RUN}",
            "You hear no more of retrain/check until one of its runs ends well.",
        ],
    )


@pytest.mark.parametrize(
    ("name", "subject", "line"),
    [
        ("recovered", "is well again", f"tiny 1a2b: {UI}/runs/flow-run/{RUN}"),
        ("waiting", "waits for a decision", f"tiny 1a2b: {UI}/runs/flow-run/{RUN}"),
        ("late", "is late", "No worker has taken the run of 2026-11-28 03:00 UTC for 30 minutes."),
    ],
)
def test_other_states_say_which_run(name, subject, line):
    due = datetime(2026, 11, 28, 3, tzinfo=UTC)
    assert says(name, "Late", due=due)[0] == f"CLEAR: retrain/check {subject}"
    assert says(name, "Late", due=due)[1][0] == line


def test_an_announcement_says_what_its_run_says():
    payload = SimpleNamespace(subject="fog is in quarantine", said="8 of 14 rows", look="data/quarantine/fog.report")
    event = SimpleNamespace(payload=payload)
    run = f"tiny 1a2b: {UI}/runs/flow-run/{RUN}"
    look = "Look further: data/quarantine/fog.report"
    assert says("news", event=event) == ("CLEAR: fog is in quarantine", ["8 of 14 rows", run, look])
    alone = says("news", event=event, flow_run=None, flow=None, deployment=None)
    assert alone == ("CLEAR: fog is in quarantine", ["8 of 14 rows", look])


def test_every_state_in_which_a_run_ends_well_is_known():
    """A state that is missing would keep a deployment silent for ever after its first failure."""
    states = {"Completed", *get_args(get_type_hints(Outcome)["state"])}
    states |= set(re.findall(r"Completed\(name=\"(\w+)\"", (ROOT / "flows/promote.py").read_text()))
    states |= {night.DRIFTED, night.SAME, night.TOO_FEW}
    states |= set(re.findall(r"Completed\(name=\"(\w+)\"", (ROOT / "flows/watch.py").read_text()))
    assert states >= {"NothingNew", "Declined", "NotSet"}
    triggers = {alert["name"]: alert["trigger"] for alert in CONFIG["alerts"]}
    well = {f"prefect.flow-run.{state}" for state in states}
    assert set(triggers["recovered"]["expect"]) == well
    assert set(triggers["failed"]["after"]) == well | {alerts.START}
    assert triggers["failed"]["expect"] == triggers["recovered"]["after"]


def test_each_alert_is_an_automation_for_all_targets_and_lateness_one_per_schedule():
    targets = [Target("clear-alert-a", RUN), Target("clear-alert-b", RUN.replace("1", "2"))]
    made = {one.name: one for one in automations(CONFIG, targets, [WEEKLY, BY_HAND], UI)}
    assert list(made) == [
        f"clear-alert-{name}" for name in ("failed", "recovered", "late-propose-weekly", "blocked", "waiting", "news")
    ]
    for automation in made.values():
        assert [str(action.block_document_id) for action in automation.actions] == [one.block for one in targets]
    first, still = made["clear-alert-late-propose-weekly"].trigger.triggers
    assert still.within.total_seconds() == CONFIG["late_minutes"] * 60
    for trigger in (first, still):
        ids = {str(spec.root.get("prefect.resource.id", "")) for spec in trigger.match_related}
        assert "prefect.deployment.1" in ids


def test_a_wrong_alert_is_named():
    broken = CONFIG | {"alerts": [CONFIG["alerts"][0] | {"trigger": {"posture": "Sideways"}}]}
    with pytest.raises(ClearError, match=r"alert failed: .*posture") as refused:
        automations(broken, [Target("clear-alert-a", RUN)], [], UI)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            "late_minutes: soon\nalerts: [{name: a, trigger: {}, subject: s, body: b}]",
            "late_minutes = 'soon': give min",
        ),
        ("late_minutes: 0\nalerts: [{name: a, trigger: {}, subject: s, body: b}]", "late_minutes = 0: give minutes"),
        ("late_minutes: 30\nalerts: [{name: a}]", "cannot be read as alerts ('trigger')"),
        ("alerts: []", "cannot be read as alerts ('late_minutes')"),
        ("- [", "cannot be read as alerts"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, content, said):
    file = tmp_path / "alerts.yaml"
    file.write_text(content)
    with pytest.raises(ClearError) as refused:
        read(file)
    assert str(refused.value).startswith(f"{file}: {said}"[:40]) and said in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(ClearError, match="cannot be read as alerts"):
        read(tmp_path / "none.yaml")


SLACK = "https://hooks.slack.com/services/T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ"


def test_addresses_are_services_mail_or_plain_web_hooks():
    given = (
        f"{SLACK} mailto://us:word@mail.example.org?to=a@b.org&from=x@y.org https://host.example.org:8443/h?key=a%26b"
    )
    plugins = [Apprise.instantiate(address) for address in addresses(given)]
    assert [type(plugin).__name__ for plugin in plugins] == ["NotifySlack", "NotifyEmail", "NotifyJSON"]
    assert [(plugin.retry, plugin.wait, plugin.notify_format.value) for plugin in plugins] == [(3, 5.0, "text")] * 3
    slack, mail, web = plugins
    assert slack.token_c and SLACK.endswith(slack.token_c)
    assert mail.targets == [(False, "a@b.org")] and mail.from_addr[1] == "x@y.org"
    assert (web.host, web.port, web.fullpath, web.params, web.secure) == (
        "host.example.org",
        8443,
        "/h",
        {"key": "a&b"},
        True,
    )
    (own,) = addresses("json://host.example.org/x?retry=1&wait=2&format=markdown")
    assert own == "json://host.example.org/x?retry=1&wait=2&format=markdown", "what an address says stays"
    assert addresses(" ") == []


@pytest.mark.parametrize("wrong", ["hidden-word", "hidden://word", "mailto://", "https://", "slack://hidden"])
def test_a_wrong_address_is_named_by_its_place_alone(wrong, capfd, caplog):
    with pytest.raises(ClearError) as refused:
        addresses(f"{SLACK} {wrong}")
    said = str(refused.value)
    assert said.startswith("CLEAR_ALERTS, address 2: ") and "\n" not in said
    shown = said.replace("hidden://", "") + "".join(capfd.readouterr()) + caplog.text
    assert "hidden" not in shown


def test_why_a_target_failed_is_said_without_its_address():
    log = "first\nFailed to send JSON POST notification to /hidden-path-1 of host.example.org: error=500.\n"
    said = alerts._reason({"notification_log": log}, "json://user:password1@host.example.org/hidden-path-1?retry=3")
    assert said == "Failed to send JSON POST notification to /*** of ***: error=500"
    assert alerts._reason({"reason": "Notification failed"}, "") == "Notification failed"


@pytest.mark.parametrize(
    ("outcome", "told"),
    [
        (Outcome("Retrained on fog: the gate FAILS (retrain/fog-1)", "Proposed", "retrain/fog-1"), True),
        (Outcome("Retrained on fog: the gate passes (retrain/fog-1)", "Proposed", "retrain/fog-1"), False),
        (Outcome("retrain/fog-1 waits (Retrained on fog: the gate FAILS)", "WaitsForReview", "retrain/fog-1"), False),
        (Outcome("x waits (… the gate FAILS)", "WaitsForReview", "retrain/fog-1", first=True), True),
        (Outcome("nothing new", "NothingNew"), False),
    ],
)
def test_a_gate_that_fails_is_told_once(monkeypatch, outcome, told):
    sent = []
    monkeypatch.setattr(announce, "flow_run", SimpleNamespace(id=RUN, flow_name="retrain"))
    monkeypatch.setattr(announce, "emit_event", lambda name, resource, payload: sent.append((name, payload)))
    announce.announce_gate(outcome)
    payloads = [payload for name, payload in sent if name == "clear.alert.gate-failed"]
    assert [payload["look"] for payload in payloads] == ["clear gate retrain/fog-1~1 retrain/fog-1"] * told


def test_no_address_is_in_the_repositorys_alerts():
    text = (ROOT / ALERTS).read_text()
    assert "://" not in text and yaml.safe_load(text)["late_minutes"] == 30

"""Who is told where something breaks: Prefect automations from infra/alerts.yaml, one message per trouble.

`make deploy` makes them for every target there is. A target is a notification block of the Prefect API whose name
begins with `clear-alert-`: somebody has made it on Prefect's page, or it comes from an address in CLEAR_ALERTS. The
server keeps addresses encrypted and sends the messages itself, so that it can also say that a machine is gone.
Addresses hold keys: nothing here prints one.
"""

import logging
import os
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import yaml
from prefect.client.orchestration import SyncPrefectClient
from prefect.events.schemas.automations import AutomationCore
from prefect.settings import get_current_settings
from pydantic import ValidationError

from clear.errors import ClearError, one_line, without_secrets
from flows.service.automations import ensure_automation

ALERTS = Path("infra/alerts.yaml")
VARIABLE = "CLEAR_ALERTS"
PREFIX = "clear-alert-"
FROM_VARIABLE = f"{PREFIX}env-"
OPTIONS = {"retry": 3, "wait": 5, "format": "text"}
"""Of every address: how often and after how many seconds the server tries again where a message is not taken."""
PATIENCE_SECONDS = 60
"""For the test message, retries not counted."""
START, TEST = "clear.alerts.start", "clear.alert.test"


@dataclass(frozen=True)
class Target:
    """A notification block of the Prefect API; `address` is "" for one of a kind that has none."""

    name: str
    block: str
    address: str = ""


@dataclass(frozen=True)
class Deployment:
    """A deployment of this project on the Prefect API."""

    id: str
    name: str
    scheduled: bool


def ensure_alerts(client: SyncPrefectClient, root: Path) -> str:
    """Bring targets and automations up to date and try new targets out; returns one line for the person who deploys.

    Raises ClearError for a wrong address, a wrong infra/alerts.yaml, or a target that does not take the test message;
    the automations are there in the last case.
    """
    config = read(root / ALERTS)
    news = _store(client, os.environ.get(VARIABLE, "").strip())
    targets = _targets(client)
    deployments = _deployments(client)
    wanted = automations(config, targets, deployments, get_current_settings().ui_url or "") if targets else []
    changed = [ensure_automation(client, automation) for automation in wanted]
    names = {automation.name for automation in wanted}
    for automation in client.read_automations():
        if automation.name.startswith(PREFIX) and automation.name not in names:
            client.delete_automation(automation.id)
    if not targets:
        return f"Alerts: none; name a target in {VARIABLE} (docs/FLOWS.md)."
    if news or any(changed):
        _send(client, [_start(deployment) for deployment in deployments])
        if problems := _try_out(client, targets):
            raise ClearError(
                f"alerts are set up, but a test message was not taken ({'; '.join(problems)}); correct {VARIABLE} or "
                "the block of that name and run `make deploy` again, or see to the receiver."
            )
    return f"Alerts go to {', '.join(target.name for target in targets)}."


# Targets


def addresses(text: str) -> list[str]:
    """The addresses of CLEAR_ALERTS for Apprise: plain text, and tried again, unless an address says otherwise.

    A web address that Apprise knows as a service's (Slack, Teams, Discord, …) is that service; any other gets JSON.
    Raises ClearError that says which one is wrong without repeating it.
    """
    return [_address(number, given) for number, given in enumerate(text.split(), 1)]


def _address(number: int, given: str) -> str:
    from apprise import Apprise

    scheme, separator, _ = given.partition("://")
    web = [_as_json(given)] if scheme.lower() in ("http", "https") else []
    with _silent():
        # A service's own web address may take no options.
        for address in (_with_options(given), given, *map(_with_options, web)):
            if Apprise.instantiate(address) is not None:
                return address
    kind = f"{scheme}:// is no service that Apprise knows, or something is missing" if separator else "it has no ://"
    raise ClearError(
        f"{VARIABLE}, address {number}: {kind}; write one such as https://host/path or mailto://user:password@host."
    )


def _with_options(address: str) -> str:
    given = {name for name, _ in parse_qsl(address.partition("?")[2], keep_blank_values=True)}
    options = urlencode({name: value for name, value in OPTIONS.items() if name not in given})
    return f"{address}{'&' if '?' in address else '?'}{options}" if options else address


def _as_json(address: str) -> str:
    """A web address for Apprise, which takes the words of a query for its own unless a minus stands before them."""
    scheme, _, rest = address.partition("://")
    path, question, query = rest.partition("?")
    named = urlencode([(f"-{name}", value) for name, value in parse_qsl(query, keep_blank_values=True)])
    return f"{'jsons' if scheme.lower() == 'https' else 'json'}://{path}{question}{named}"


@contextmanager
def _silent() -> Iterator[None]:
    """Without Apprise's log, which repeats an address that it cannot read."""
    logger = logging.getLogger("apprise")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _store(client: SyncPrefectClient, text: str) -> bool:
    """Make the blocks of CLEAR_ALERTS and remove those of former addresses; whether an address is new.

    Without the variable everything stays; `none` is no address.
    """
    from prefect.blocks.notifications import SlackWebhook

    if not text:
        return False
    wanted = [] if text == "none" else addresses(text)
    named = {f"{FROM_VARIABLE}{number}": address for number, address in enumerate(wanted, 1)}
    known = {target.name: target for target in _targets(client) if target.name.startswith(FROM_VARIABLE)}
    news = [name for name, address in named.items() if name not in known or known[name].address != address]
    for name in news:
        # Of Prefect's blocks this one alone hands on any address of Apprise as it is.
        SlackWebhook(url=named[name]).save(name, overwrite=True)
    for name in set(known) - set(named):
        client.delete_block_document(known[name].block)
    return bool(news)


def _targets(client: SyncPrefectClient) -> list[Target]:
    """All notification blocks with the prefix, by name."""
    asked = {
        "block_documents": {"name": {"like_": f"{PREFIX}%"}},
        "block_schemas": {"block_capabilities": {"all_": ["notify"]}},
        "include_secrets": True,
    }
    blocks = client.request("POST", "/block_documents/filter", json=asked).raise_for_status().json()
    found = [Target(block["name"], block["id"], str(block["data"].get("url", ""))) for block in blocks]
    return sorted(found, key=lambda target: target.name)


# Automations


def read(file: Path) -> dict[str, Any]:
    """Content of infra/alerts.yaml. Raises ClearError where it is none, or late_minutes is no time."""
    try:
        content = yaml.safe_load(file.read_text())
        minutes = content["late_minutes"]
        alerts = [(alert["name"], alert["trigger"], alert["subject"], alert["body"]) for alert in content["alerts"]]
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        raise ClearError(f"{file}: cannot be read as alerts ({one_line(error)}); `git checkout {ALERTS}`.") from error
    if type(minutes) not in (int, float) or not 0.2 <= minutes < 1e6 or not alerts:
        raise ClearError(f"{file}: late_minutes = {minutes!r}: give minutes, at least 0.2.")
    return content


def automations(
    config: dict[str, Any], targets: Sequence[Target], deployments: Sequence[Deployment], ui: str
) -> list[AutomationCore]:
    """The automations of infra/alerts.yaml for the targets; `ui` is the address of Prefect's page.

    Raises ClearError for an alert that Prefect cannot read.
    """
    made = []
    for alert in config["alerts"]:
        actions = [_action(config, alert, target, ui) for target in targets]
        if alert.get("for_each_scheduled_deployment"):
            triggers = {
                deployment.name.replace("/", "-"): _of(deployment, alert["trigger"], config["late_minutes"])
                for deployment in deployments
                if deployment.scheduled
            }
        else:
            triggers = {"": alert["trigger"]}
        for suffix, trigger in triggers.items():
            name = f"{PREFIX}{alert['name']}{'-' * bool(suffix)}{suffix}"
            content = {"name": name, "description": alert.get("description", ""), "trigger": trigger}
            try:
                made.append(AutomationCore.model_validate(content | {"actions": actions}))
            except ValidationError as error:
                raise ClearError(f"{ALERTS}: alert {alert['name']}: {one_line(error)}; correct it.") from error
    return made


def _action(config: dict[str, Any], alert: dict[str, Any], target: Target, ui: str) -> dict[str, str]:
    return {
        "type": "send-notification",
        "block_document_id": target.block,
        "subject": template(config, alert["subject"], ui),
        "body": template(config, alert["body"], ui),
    }


def template(config: dict[str, Any], text: str, ui: str) -> str:
    """A text of an alert as the server gets it: with what it may refer to before it."""
    given = {"ui": ui.rstrip("/"), "late_minutes": f"{config['late_minutes']:g}"}
    sets = "".join(f"{{%- set {name} = {value!r} -%}}" for name, value in given.items())
    return f"{sets}{config.get('names', '')}{text}"


def _of(deployment: Deployment, trigger: dict[str, Any], late_minutes: float) -> dict[str, Any]:
    """A sequence of triggers for one deployment; a proactive one waits for `late_minutes`."""
    own = deepcopy(trigger)
    for part in own["triggers"]:
        of = {"prefect.resource.role": "deployment", "prefect.resource.id": f"prefect.deployment.{deployment.id}"}
        part["match_related"] = [*part["match_related"], of]
        if part["posture"] == "Proactive":
            part["within"] = late_minutes * 60
    return own


def _deployments(client: SyncPrefectClient) -> list[Deployment]:
    asked = {"deployments": {"tags": {"all_": ["clear"]}}}
    found = client.request("POST", "/deployments/filter", json=asked).raise_for_status().json()
    return [
        Deployment(
            entry["id"],
            f"{client.read_flow(entry['flow_id']).name}/{entry['name']}",
            any(schedule["active"] for schedule in entry["schedules"]),
        )
        for entry in found
    ]


# Events


def _event(name: str, resource: str, related: Sequence[dict] = (), **payload: str) -> dict[str, Any]:
    return {
        "id": str(uuid.uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": name,
        "resource": {"prefect.resource.id": resource},
        "related": list(related),
        "payload": payload,
    }


def _start(deployment: Deployment) -> dict[str, Any]:
    """From here on a failure of the deployment is news."""
    related = [
        {"prefect.resource.id": f"prefect.deployment.{deployment.id}", "prefect.resource.role": "deployment"},
        {"prefect.resource.id": "prefect.tag.clear", "prefect.resource.role": "tag"},
    ]
    return _event(START, f"clear.deployment.{deployment.id}", related)


def _send(client: SyncPrefectClient, events: list[dict[str, Any]]) -> None:
    client.request("POST", "/events", json=events).raise_for_status()


def _try_out(client: SyncPrefectClient, targets: Sequence[Target]) -> list[str]:
    """Have the server send every target a message; returns what became of those that did not take it."""
    said = f"This is where alerts go, since {datetime.now(UTC):%Y-%m-%d %H:%M} UTC."
    event = _event(TEST, "clear.alerts", subject="alerts are set up", said=said, look="docs/FLOWS.md, Alerts")
    _send(client, [event])
    asked = {
        "filter": {
            "event": {"prefix": ["prefect.automation.action."]},
            "related": {"id": [f"prefect.event.{event['id']}"]},
        },
        "limit": 50,
    }
    results: dict[int, dict] = {}
    end = time.monotonic() + PATIENCE_SECONDS + OPTIONS["retry"] * OPTIONS["wait"] * len(targets)
    while len(results) < len(targets) and time.monotonic() < end:
        time.sleep(0.5)
        found = client.request("POST", "/events/filter", json=asked).raise_for_status().json()["events"]
        ended = [entry for entry in found if entry["event"].endswith((".executed", ".failed"))]
        results = {entry["payload"]["action_index"]: entry for entry in ended}
    problems = []
    for index, target in enumerate(targets):
        if index not in results:
            problems.append(f"{target.name}: the server has not sent it in time")
        elif results[index]["event"].endswith(".failed"):
            problems.append(f"{target.name}: {_reason(results[index]['payload'], target.address)}")
    return problems


def _reason(payload: dict[str, Any], address: str) -> str:
    """Why an action failed: the last line of Apprise's log that says so, without any part of the address."""
    lines = str(payload.get("notification_log", "")).strip().splitlines()
    said = lines[-1] if lines else str(payload.get("reason", "unknown"))
    return without_secrets(said.rstrip("."), *re.findall(r"[\w.%-]{8,}", address))

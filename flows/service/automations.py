"""Automations of a Prefect API: made or brought up to date, and left alone where they are as they should be."""

from prefect.client.orchestration import SyncPrefectClient
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import PrefectHTTPStatusError

from clear.errors import ClearError


def ensure_automation(client: SyncPrefectClient, automation: AutomationCore) -> bool:
    """Create the automation, or bring the one of that name up to date; whether there was anything to do.

    With an update the server forgets what the automation has seen so far. Raises ClearError where it is refused.
    """
    there = client.read_automations_by_name(automation.name)
    if there and _content(there[0]) == _content(automation):
        return False
    try:
        if there:
            client.update_automation(there[0].id, automation)
        else:
            client.create_automation(automation)
    except PrefectHTTPStatusError as error:
        said = " ".join(error.response.text.split())[:600]
        raise ClearError(f"automation {automation.name}: the Prefect API refuses it: {said}") from error
    return True


def _content(automation: AutomationCore) -> dict:
    """What a person would call the automation: without its id, and sets as such."""
    return automation.model_dump(include=set(AutomationCore.model_fields) - {"owner_resource"})

"""What a run has to tell people although it did not fail: an event that infra/alerts.yaml makes a message of.

A failed or crashed run needs none of this: the server knows its state. Without a server, or without targets, nothing
happens, and nothing that goes wrong here ends a run.
"""

from typing import TYPE_CHECKING

from prefect.events import emit_event
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL

if TYPE_CHECKING:
    from clear.project.retrain.run import Outcome

ROOM = 2000
"""Characters of a message that are sent."""


def announce(kind: str, subject: str, said: str, look: str) -> bool:
    """Emit the event of that kind for the run in progress; infra/alerts.yaml has the message. Returns whether a server
    that lasts has been told: the temporary one of a command line ends with it.

    `subject` says what happened, `said` is the line with the reason, `look` the command to look further. Prefect adds
    run, flow and deployment by itself.
    """
    if flow_run.id is None:  # called as a function
        return False
    about = {"prefect.resource.id": f"clear.{kind}.{flow_run.id}"}
    sent = emit_event(f"clear.alert.{kind}", about, payload={"subject": subject, "said": said[:ROOM], "look": look})
    return sent is not None and PREFECT_API_URL.value() is not None


def announce_refused(name: str, problem: str) -> None:
    """A set of new data has gone to quarantine."""
    look = f"data/quarantine/{name}.report (docs/DEGRADATIONS.md)"
    announce("quarantined", f"{name} is in quarantine", problem, look)


def announce_gate(outcome: "Outcome") -> None:
    """What a run proposes does not pass the gate; said once, by the run that has made it public."""
    from clear.project.retrain.request import STATES

    if (outcome.first or outcome.state == "Proposed") and STATES[1] in outcome.message:
        look = f"clear gate {outcome.branch}~1 {outcome.branch}"
        announce("gate-failed", f"{flow_run.flow_name}: the gate fails", outcome.message, look)

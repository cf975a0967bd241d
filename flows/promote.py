"""A version of a model goes into a stage once a person has agreed on Prefect's page: the deployment `promote/prod`.

The version is judged as `clear release --assign` does: what that refuses ends the run. Then the run is suspended, which
takes no process and no worker, and alerts say that it waits. Somebody resumes it on Prefect's page, with a name and a
yes or no. The run goes on where a worker takes it, judges again, because the stage may have another version by now,
and makes and pushes the tag. Prefect's own server knows no users: the name is what the person types.
"""

from pathlib import Path

from prefect import flow, get_run_logger, suspend_flow_run
from prefect.input import RunInput
from prefect.states import Completed, State
from pydantic import Field

from clear.config import PARAMS, load
from clear.project.release import publish
from flows.service.announce import announce

DAY = 24 * 3600


class Approval(RunInput):
    """What a person answers."""

    approve: bool = Field(description="Put the version into the stage")
    name: str = Field(min_length=1, description="Who decides")
    because: str = Field("", description="The reason; needed where the gate cannot decide")


@flow(name="promote", flow_run_name="{version} to {stage}")
def promote(version: str, workspace: str = ".", model: str = "", stage: str = publish.STAGE, days: float = 7) -> State:
    """Put a version (such as v1.2.0) of a model (default: gate.model) into a stage if a person agrees within `days`.

    The last state is Promoted or Declined. Raises ClearError for what is refused without asking, or after.
    """
    root, logger = Path(workspace).resolve(), get_run_logger()
    model = model or load(root / PARAMS).gate.model
    shared = publish.fetch_tags(root)
    asked = Approval.with_initial_data(description=question(root, model, version, stage))
    answer = suspend_flow_run(asked, timeout=round(days * DAY), key="approval")  # the run begins anew when resumed
    if not answer.approve:
        return Completed(name="Declined", message=f"declined by {answer.name}: {answer.because or 'no reason given'}")
    lines = publish.assign(root, model, stage, version, answer.because, shared, answer.name)
    for line in lines:
        logger.info(line)
    announce(
        "promoted", f"{model} {version} is in {stage}", f"{lines[0]} {lines[2]}", f"clear release {model} --history"
    )
    return Completed(name="Promoted", message=f"{lines[0]} Approved by {answer.name}.")


def question(root: Path, model: str, version: str, stage: str) -> str:
    """What a person is asked, as Markdown. Raises ClearError for what needs no asking."""
    try:
        moved, reason = publish.judge(root, model, stage, version)
    except publish.Undecided as error:
        moved, reason = f"{model} {version} would be in {stage}", f"{error}. State it in `because`."
    card = f"data/cards/{model}.md"
    look = f"`git show '{model}@{version}:{card}'` is its card; `clear release {model} --history` what happened before."
    return f"If you agree, {moved}.\n\n{reason}\n\n{look}"

"""The pipeline as a Prefect flow: one task per DVC stage, in graph order.

Run it with `python -m flows.pipeline` (no server needed) or deploy it with `make deploy`. Each task is
`dvc repro --single-item <stage>`, so DVC alone decides what is up to date; Prefect's own result caching is off. Tasks
run one after the other, because a DVC workspace has one writer: the flow holds the workspace's writer lock
(clear/data/lock.py) for as long as it lives. Parallelism lives inside the stages. With a default DVC remote, what is
missing is pulled first and what a stage made is pushed after it. Commands run under a supervisor that ends them when
the flow ends, however it ends (flows/service/children.py).
"""

import argparse
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import CancelledRun
from prefect.logging.loggers import LoggingAdapter
from prefect.runtime import flow_run
from prefect.settings import PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS, temporary_settings
from prefect.states import Cancelled, Completed, State

from clear.data.lock import Busy, writer
from clear.data.ports import spare_loopback
from clear.data.workspace import profile
from clear.errors import NO_READER, ClearError, fail, say
from clear.project.retrain.reproduce import reproduce as reproduce_aside
from clear.project.retrain.run import Outcome, Tools
from flows import RUN_LOGS, in_words
from flows.batch import execute
from flows.dvc_commands import (
    Temporary,
    bring,
    command_lock,
    dvc,
    environment,
    missing_outputs,
    remote_of,
    stages_in_order,
    unchanged,
)
from flows.service import children
from flows.service.announce import announce_gate, announce_refused
from flows.service.artifacts import metrics_table, picture
from flows.service.naming import profile_and_commit

ABORTED = "Execution was aborted by a termination signal"
"""What Prefect says of a run that SIGTERM has ended."""
STARTUP_SECONDS = 180


def _may_pass(task_, run, state) -> bool:
    """Retry only what may pass by itself: a stage that failed would fail again."""
    return Temporary.__name__ in str(state.message)


retrying = {
    "cache_policy": NO_CACHE,
    "persist_result": False,
    "retries": 3,
    "retry_delay_seconds": [20, 60, 180],
    "retry_condition_fn": _may_pass,
}


@task(task_run_name="pull", **retrying)
def pull(workspace: Path, stages: list[str] | None = None) -> State:
    """Fetch what the workspace lacks from its remote; what the remote lacks too is left for the stages to make."""
    remote = remote_of(workspace)
    if remote is None:
        return Completed(name="Skipped", message="no default DVC remote: nothing is pulled or pushed (`make remote`).")
    missing = missing_outputs(workspace, stages)
    if not missing:
        return Completed(name="Cached", message="no output is missing.")
    name, message = bring(missing, remote, workspace, get_run_logger().info)
    return Completed(name=name, message=message)


@task(task_run_name="push", **retrying)
def push(workspace: Path, stages: list[str] | None = None) -> State:
    """Send the outputs of the named stages (default: all) to the remote."""
    lines = dvc(["push", *(stages or [])], workspace, get_run_logger().info)
    return Completed(name="Ran", message=lines[-1] if lines else "pushed")


@task(task_run_name="{stage}", **retrying)
def reproduce(stage: str, workspace: Path, force: bool = False) -> State:
    """Reproduce one stage, with `force` even if it is up to date; its output becomes log lines.

    The state's name says whether the stage ran or was up to date. A stage may be placed on another machine.
    """
    try:
        if (elsewhere := execute.elsewhere(stage, workspace, force)) is not None:
            return elsewhere
        lines = dvc(
            ["repro", "--single-item", *(["--force"] if force else []), stage], workspace, get_run_logger().info
        )
    except ClearError as error:
        raise type(error)(f"stage {stage} failed: {error}") from error
    signs = (f"Stage '{stage}' didn't change, skipping", f"Stage '{stage}' is cached - skipping run")
    cached = any(line.startswith(signs) for line in lines)
    return Completed(name="Cached" if cached else "Ran", message=f"{stage}: {'up to date' if cached else 'ran'}")


@task(task_run_name="{stage}", **retrying)
def skip(stage: str) -> State:
    """The run of a stage that is known to be up to date."""
    return Completed(name="Cached", message=f"{stage}: up to date")


@task(task_run_name="dvc {arguments}", **retrying)
def command(arguments: list[str], folder: Path) -> None:
    """A DVC command in a clone."""
    dvc(arguments, folder, get_run_logger().info)


def tools(say: Callable[[str], None]) -> Tools:
    """The commands of a run aside: as tasks, under the supervisor, and the pipeline as a subflow."""

    def run(arguments: list[str], folder: Path) -> tuple[int, list[str]]:
        lock = command_lock(folder)
        lock.parent.mkdir(exist_ok=True)
        return children.run(arguments, folder, environment(folder), say, lock)

    def reproduce_all(folder: Path, stages: list[str] | None) -> None:
        pipeline(str(folder), stages, "wait")

    told = (announce_refused, announce_gate)
    return Tools(lambda arguments, folder: command(arguments, folder), reproduce_all, run, say, *told)


def aside(home: Path, when_busy: str, run: Callable[[Tools], Outcome], artifact: str) -> State:
    """Do a run aside as the only one in `home`, where its clone is, and end in a state named by what became of it, with
    that as its result and its text as an artifact; Cancelled where another such run is in the way."""
    logger = get_run_logger()
    try:
        with writer(home, when_busy, f"flow run {flow_run.name}", logger.info):
            children.settle(command_lock(home / "copy"))
            outcome = run(tools(logger.info))
    except Busy as busy:
        logger.warning(str(busy))
        return Cancelled(message=str(busy))
    logger.info(outcome.message)
    if outcome.body:
        create_markdown_artifact(outcome.body, artifact, outcome.message)
    return Completed(name=outcome.state, message=outcome.message, data=asdict(outcome))


@flow(name="propose", flow_run_name=profile_and_commit)
def propose(
    workspace: str = ".", target: str | None = None, when_busy: Literal["wait", "leave"] = "wait"
) -> dict[str, Any]:
    """Reproduce what is out of date on a branch (default: the one checked out), as it is at `origin`, in a clone, and
    propose the result. Returns what became of it; the name of the run's last state says it in a word.
    """
    source = Path(workspace).resolve()
    home = source / ".clear" / "scratch" / "reproduce"
    return aside(home, when_busy, lambda given: reproduce_aside(source, given, target or ""), "proposal")


@flow(name="pipeline", flow_run_name=profile_and_commit)
def pipeline(
    workspace: str = ".", stages: list[str] | None = None, when_busy: Literal["wait", "leave"] = "wait"
) -> dict[str, str]:
    """Reproduce all stages (or the named ones) of a workspace; returns {stage: "Ran" or "Cached"}.

    If another run writes to the workspace, wait for it or leave (the flow run then ends Cancelled and says who it is).
    """
    folder = Path(workspace).resolve()
    if not (folder / "dvc.yaml").exists():
        raise ClearError(f"{folder} has no dvc.yaml; name the project's folder as `workspace`.")
    logger = get_run_logger()
    try:
        with writer(folder, when_busy, f"flow run {flow_run.name}", logger.info):
            return _reproduce_all(folder, stages, logger)
    except Busy as busy:
        logger.warning(str(busy))
        return Cancelled(message=str(busy))


def _reproduce_all(folder: Path, stages: list[str] | None, logger: LoggingAdapter) -> dict[str, str]:
    """Stage → "Ran" or "Cached"; raises what the first task that failed raised."""
    pulled = pull(folder, stages, return_state=True)
    pulled.result()
    logger.info(pulled.message)
    remote = pulled.name != "Skipped"
    done = {}
    wanted = stages if stages is not None else stages_in_order(folder)
    same = unchanged(folder) if len(wanted) > 1 else set()
    for stage in wanted:
        state = skip(stage, return_state=True) if stage in same else reproduce(stage, folder, return_state=True)
        state.result()
        done[stage] = state.name
        if remote and state.name == "Ran":
            # Failing here costs nothing yet: the push below, which counts, tries again.
            push(folder, [stage], return_state=True)
    if remote:
        push(folder, stages)
    publish(folder, done)
    return done


def publish(folder: Path, done: dict[str, str]) -> None:
    """Show the figures and the picture of the result as artifacts of this flow run."""
    create_markdown_artifact(metrics_table(folder, done), "metrics", f"Figures in {folder}")
    shown = picture(Path(environment(folder)["CLEAR_HOME"]).parent / "data/report", folder)
    if shown is None:
        get_run_logger().info("no picture: the report has not been rendered on this machine.")
    else:
        create_markdown_artifact(shown, "picture", f"Plot of the report of profile {profile(folder)}")


@contextmanager
def on_the_command_line() -> Iterator[None]:
    """What a flow needs that runs here and now, with Prefect's temporary server if no other is named.

    SIGTERM ends this program in order: Prefect hands the signal on to the handler set here; without one its server
    would be left behind. From an interruption on Prefect is silent: it would report a crash, and at last the state
    Running, where this program says in a line what happened. Inside a run Prefect has the signal first, and this hears
    of it by what it logs. On a busy machine the temporary server needs more than the 20 s that Prefect gives it.
    """

    def leave(number: int, frame: object) -> None:
        logging.disable(logging.CRITICAL)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    def heard(record: logging.LogRecord) -> bool:
        if ABORTED not in record.getMessage():
            return True
        logging.disable(logging.CRITICAL)
        return False

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    spare_loopback()  # Prefect's server is on this machine
    runs = [logging.getLogger(name) for name in RUN_LOGS]
    for log in runs:
        log.addFilter(heard)
    try:
        with temporary_settings({PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: STARTUP_SECONDS}):
            yield
    finally:
        for log in runs:
            log.removeFilter(heard)


def here_and_now(run: Callable[[], Any], after_interruption: str) -> tuple[int, Any]:
    """Call a flow on the command line; (exit status, its result).

    Status 0 done, 1 failed with one line, 3 left because another run is in the way, 130 or 143 interrupted.
    """
    try:
        with on_the_command_line():
            return 0, run()
    except CancelledRun as left:
        say(left, sys.stderr)
        return 3, None
    except Exception as error:
        if (said := in_words(error)) is None:
            raise
        return fail(said), None
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code == NO_READER:
            raise
        print(f"interrupted; run the same command again{after_interruption}", file=sys.stderr)
        return (end.code if isinstance(end, SystemExit) else 130), None


def main(arguments: list[str] | None = None) -> int:
    """Run the flow here and now; the exit status of `here_and_now`."""
    parser = argparse.ArgumentParser(prog="python -m flows.pipeline", description="Reproduce the pipeline.")
    parser.add_argument("workspace", nargs="?", default=".", help="the project's folder")
    parser.add_argument("--stage", action="append", dest="stages", help="only this stage; may be repeated")
    parser.add_argument("--when-busy", choices=("wait", "leave"), default="wait", help="if another run writes there")
    parser.add_argument(
        "--propose",
        nargs="?",
        const="",
        metavar="BRANCH",
        help="reproduce a branch (default: the one checked out) in a clone and propose the result",
    )
    given = parser.parse_args(arguments)
    if given.propose is not None and given.stages:
        parser.error("--propose reproduces all stages; leave --stage out")
    again = " to resume from the last checkpoint"
    if given.propose is None:
        return here_and_now(lambda: pipeline(given.workspace, given.stages, given.when_busy), again)[0]
    status, done = here_and_now(lambda: propose(given.workspace, given.propose, given.when_busy), again)
    if done:
        say(done["message"])
    return status


if __name__ == "__main__":
    sys.exit(main())

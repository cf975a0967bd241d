"""Retraining on new degradation data as a flow: `python -m flows.retrain`, or deployed and scheduled.

What it does is in clear/project/retrain/run.py; here its commands become tasks, under the supervisor that ends them
with the flow, and the pipeline becomes a subflow in the clone. The workspace itself is only read, except for data
that is rejected.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, Literal

from prefect import flow

from clear.errors import say
from clear.project.retrain.intake import FOLDER
from clear.project.retrain.run import retrain as run_retrain
from flows.pipeline import aside, here_and_now
from flows.service.naming import profile_and_commit


@flow(name="retrain", flow_run_name=profile_and_commit)
def retrain(
    workspace: str = ".",
    incoming: str = FOLDER,
    revision: str = "HEAD",
    target: str | None = None,
    when_busy: Literal["wait", "leave"] = "wait",
    rest: float = 0,
) -> dict[str, Any]:
    """Train on new data and propose the result; without new data it ends at once. Returns what became of it; the name
    of the run's last state says it in a word: NothingNew, WaitsForReview, Quarantined or Proposed.

    `incoming` is a folder of the workspace or s3://bucket/prefix; `target` is the branch of the pull request (default:
    the one checked out). `revision` is what to start from, "" the newest commit of that branch at `origin`. A set that
    changed in the last `rest` seconds is left for another run.
    """
    source = Path(workspace).resolve()
    home = source / ".clear" / "scratch" / "retrain"
    more = (incoming, revision, target or "", rest)
    return aside(home, when_busy, lambda given: run_retrain(source, given, *more), "retrain")


def main(arguments: list[str] | None = None) -> int:
    """Run the flow here and now; the exit status of `here_and_now`, 0 too where there is nothing to do."""
    parser = argparse.ArgumentParser(prog="python -m flows.retrain", description="Retrain on new degradation data.")
    parser.add_argument("workspace", nargs="?", default=".", help="the project's folder")
    parser.add_argument("--incoming", default=FOLDER, help=f"folder or s3://bucket/prefix (default: {FOLDER})")
    parser.add_argument(
        "--revision", default="HEAD", help="what to start from (default: HEAD; '': the newest commit at origin)"
    )
    parser.add_argument("--target", help="branch of the pull request (default: the one checked out)")
    parser.add_argument("--when-busy", choices=("wait", "leave"), default="wait", help="if another retraining runs")
    parser.add_argument("--rest", type=float, default=0, help="leave sets that changed in the last REST seconds")
    given = parser.parse_args(arguments)
    status, done = here_and_now(
        lambda: retrain(given.workspace, given.incoming, given.revision, given.target, given.when_busy, given.rest),
        ", it continues after its last step",
    )
    if done:
        say(done["message"])
    return status


if __name__ == "__main__":
    sys.exit(main())

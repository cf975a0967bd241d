"""Watch new pictures for drift: `python -m flows.watch PLACE`, or deployed and scheduled every night.

The work is `clear watch`, run in the workspace under the supervisor that ends it with the flow; the page and the
history stay in that folder's data/watch. Prefect gets numbers alone: an artifact without pictures and names of files,
the state Drifted, NoDrift or TooFew, and where the pictures have changed an announcement, for the alerts to send. A
change that lasts is announced once; the state says it every night. What was announced is in a file of its own,
`announced` beside the history: a person's `clear watch` adds to the history too, and a run may be killed before it
announces.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.logging.loggers import LoggingAdapter
from prefect.states import Completed

from clear.data.io import write_text
from clear.drift.night import DRIFTED
from clear.errors import UNDECIDED, ClearError, say
from flows.dvc_commands import environment
from flows.pipeline import here_and_now
from flows.service import children
from flows.service.announce import announce
from flows.service.naming import profile_and_commit

HOURS = 24.0


@flow(name="watch", flow_run_name=profile_and_commit)
def watch(
    workspace: str = ".",
    place: str = "",
    reference: str = "",
    since: float = HOURS,
    damaged: float = 0.0,
    alpha: float = 0.01,
    answers: str | None = None,
    pictures: bool = True,
) -> dict[str, Any]:
    """Compare the pictures at `place`, a folder or s3://bucket/prefix, with what a model was trained on.

    `reference` names a release (@prod) or is "" for the workspace's own data, `since` is in hours (0 = all files); the
    others are as in `clear watch`. Returns `night`, `verdict`, `message` and `page`, the path of the report in the
    workspace. The run ends as Completed unless something is wrong, and its last state is named by the verdict.
    """
    folder, logger = Path(workspace).resolve(), get_run_logger()
    if not place:
        logger.info("no place is named (parameter `place`): nothing is watched.")
        return Completed(name="NotSet", message="no place is named; set the parameter `place` of the deployment.")
    command = [sys.executable, "-m", "clear", "watch", f"--since={since}", f"--damaged={damaged}"]
    command += [f"--alpha={alpha}", f"--reference={reference}", "--pictures" if pictures else "--no-pictures"]
    command += [*([f"--answers={answers}"] if answers else []), "--", place]
    logger.info("%s is compared with %s.", place, reference or "the training data of the workspace")
    # Its lines name files of the place, so they are not passed on to a server that may be elsewhere.
    status, lines = children.run(command, folder, environment(folder), lambda line: None)
    page = next((line.removeprefix("report: ") for line in reversed(lines) if line.startswith("report: ")), "")
    if status not in (0, 1, UNDECIDED) or not page:
        said = lines[-1].removeprefix("error: ") if lines else f"`clear watch` ended with status {status}"
        raise ClearError(said)
    night = json.loads((folder / page).with_name("night.json").read_text())
    if night["verdict"] == DRIFTED:
        _announce_once(night, page, (folder / page).parent.with_name("announced"), logger)
    create_markdown_artifact((folder / page).with_name("night.md").read_text(), "watch", f"{place}: {night['verdict']}")
    logger.info("%s: %s. Report: %s", night["verdict"], night["message"], page)
    told = {name: night[name] for name in ("night", "verdict", "message")}
    return Completed(name=night["verdict"], message=night["message"], data=told | {"page": page})


def _announce_once(night: dict[str, Any], page: str, file: Path, logger: LoggingAdapter) -> None:
    """Announce a change unless `file` has the night it began, which is written there once a server has been told."""
    begun = night["begun"] or night["night"]
    if file.exists() and file.read_text().strip() == begun:
        logger.info("these pictures have been like this since %s, which has been announced.", begun)
        return
    because = (night["proposal"] or {}).get("because", "")
    if announce("drift", f"the pictures of {night['night']} have changed", f"{night['message']}; {because}", page):
        write_text(file, f"{begun}\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the flow here and now; the exit status of `here_and_now`, 0 too where the pictures have changed."""
    parser = argparse.ArgumentParser(prog="python -m flows.watch", description="Watch new pictures for drift.")
    parser.add_argument("place", help="a folder, or s3://bucket/prefix")
    parser.add_argument("--workspace", default=".", help="the project's folder (default: .)")
    parser.add_argument("--reference", default="", help="a release, such as @prod (default: the workspace's data)")
    parser.add_argument("--since", type=float, default=HOURS, help=f"hours that count as new (default: {HOURS:g})")
    parser.add_argument("--damaged", type=float, default=0.0, help="share of the reference that is damaged (0)")
    parser.add_argument("--alpha", type=float, default=0.01, help="false alarms, as a share of the nights (0.01)")
    parser.add_argument("--answers", help="Parquet of `clear answer`, or a folder")
    parser.add_argument("--no-pictures", action="store_true", help="no thumbnails in the report")
    given = vars(parser.parse_args(arguments))
    pictures = not given.pop("no_pictures")
    status, night = here_and_now(lambda: watch(**given, pictures=pictures), "")
    if night:
        say(f"{night['verdict']}: {night['message']}")
    return status


if __name__ == "__main__":
    sys.exit(main())

"""What nobody needs in DVC's cache and remote, once a month: `python -m flows.tidy`, or deployed and scheduled.

The rules are in clear/project/tidy.py. The deployment only lists; a person who has read its artifact starts a run with
`remove`.
"""

import argparse
import sys
from pathlib import Path

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact

from clear.project.tidy import DAYS
from clear.project.tidy import tidy as find
from clear.report.tables import Table
from flows.dvc_commands import remote_of
from flows.pipeline import here_and_now
from flows.service.naming import profile_and_commit


@flow(name="tidy", flow_run_name=profile_and_commit)
def tidy(workspace: str = ".", days: float = DAYS, remote: bool = True, remove: bool = False) -> dict[str, int]:
    """List what nobody needs in the cache and, with `remote`, in DVC's default remote; with `remove` delete it. Returns
    the bytes that nobody needs, or needed, by store."""
    folder, logger = Path(workspace).resolve(), get_run_logger()
    if remote and not remote_of(folder):
        logger.info("no DVC remote is configured: only the cache is looked at.")
        remote = False
    found = find(folder, days, remote, remove)
    for line in found.lines():
        logger.info(line)
    rows = [
        [store.name, str(len(store.objects)), str(len(store.needless)), *(f"{n / 2**20:,.1f}" for n in store.bytes)]
        for store in found.stores
    ]
    table = Table(["store", "objects", "needless", "MiB", "needless MiB"], rows, " ".join(found.lines()))
    create_markdown_artifact(table.markdown(), key="tidy", description="Data that nobody needs")
    return {store.name: store.bytes[1] for store in found.stores}


def main(arguments: list[str] | None = None) -> int:
    """Run the flow here and now; the exit status of `here_and_now`."""
    parser = argparse.ArgumentParser(prog="python -m flows.tidy", description="Find data that nobody needs.")
    parser.add_argument("workspace", nargs="?", default=".", help="the project's folder")
    parser.add_argument("--days", type=float, default=DAYS, help=f"younger objects stay (default {DAYS})")
    parser.add_argument("--cache-only", action="store_true", help="leave DVC's remote alone")
    parser.add_argument("--remove", action="store_true", help="remove it; without, it is only listed")
    given = parser.parse_args(arguments)
    return here_and_now(lambda: tidy(given.workspace, given.days, not given.cache_only, given.remove), "")[0]


if __name__ == "__main__":
    sys.exit(main())

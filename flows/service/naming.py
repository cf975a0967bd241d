"""How a run is called in Prefect: the profile and the commit it is about, such as `tiny 1a2b3c4d5e`."""

from pathlib import Path

from prefect.runtime import flow_run

from clear.data.workspace import profile
from clear.errors import ClearError
from clear.project.git import git


def profile_and_commit() -> str:
    """The name of the run that begins, by its parameters `workspace` and `revision`.

    `+` behind the commit stands for edits that are not committed, where the run is about the folder as it is. A
    workspace that cannot be read gets a name too: the run itself says what is wrong.
    """
    given = flow_run.parameters
    folder = Path(given.get("workspace") or ".").resolve()
    revision = given.get("revision")
    try:
        asked = git(folder, "rev-parse", "--verify", "--end-of-options", f"{revision or 'HEAD'}^{{commit}}")
        commit = "no commit" if asked.status else asked.text.strip()[:10]
        edited = revision is None and not asked.status and git(folder, "status", "--porcelain", "-uno").text
        return f"{profile(folder)} {commit}{'+' * bool(edited)}"
    except (ClearError, OSError):
        return f"{folder.name} unreadable"

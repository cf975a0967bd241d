"""The weekly run: what is out of date on a branch is reproduced in a clone and proposed, as new data is by `retrain`.

The branch is taken as it is at `origin`, or as the workspace has it where there is no `origin`. The workspace's files
are not touched: edits in it neither enter the run nor are lost. What changed in the clone, `.clear/scratch/reproduce`,
becomes one commit on a branch `reproduce/<commit>`. Data is pushed before the branch, the branch before the pull
request. git is the only state: a commit that has its branch is not reproduced again, on whichever machine, and a killed
run continues from what DVC and the stages' checkpoints have recorded.
"""

from pathlib import Path

from clear.project.git import git as ask_git
from clear.project.retrain import intake, request
from clear.project.retrain.copies import fresh
from clear.project.retrain.run import Outcome, Tools, commit_all, fetch_branches, git, newest, proposal, remind
from clear.project.scratch import bounded, clear_leftovers, discard

BRANCHES = "reproduce"


def reproduce(workspace: Path, tools: Tools, target: str = "") -> Outcome:
    """Reproduce what is out of date on `target` (default: the branch checked out) and propose what came of it.

    The caller makes sure that no other such run of this workspace takes place. Raises ClearError if there is no such
    branch, or if a command fails.
    """
    copy = workspace / ".clear" / "scratch" / "reproduce" / "copy"
    clear_leftovers(copy)
    into = target or git(workspace, "branch", "--show-current") or "main"
    commit = newest(workspace, into)
    branch = f"{BRANCHES}/{commit[:10]}"
    fetch_branches(workspace, f"{BRANCHES}/*")
    remind(workspace, BRANCHES, [branch], tools)
    if request.ref_of(workspace, branch):
        return finish(workspace, branch, commit, into, tools, waiting=True)
    with bounded(copy):
        made = _made(workspace, copy, commit, branch, tools)
    if made:
        fetch_branches(workspace, f"{BRANCHES}/*")  # another machine may have been faster
        outcome = finish(workspace, branch, commit, into, tools)
    else:
        outcome = Outcome(f"nothing is out of date in commit {commit[:10]} of {into}.", "NothingNew")
    discard(copy)
    return outcome


def _made(workspace: Path, copy: Path, commit: str, branch: str, tools: Tools) -> bool:
    """Reproduce the commit in the clone and hand the branch with the result to the workspace; whether there is one."""
    if not _is_of(copy, commit, branch):
        fresh(workspace, commit, copy, tools.dvc, "checkout")  # what the workspace's cache has, sets of incoming too
    if git(copy, "branch", "--show-current") != branch:
        tools.reproduce(copy, None)
        if not git(copy, "status", "--porcelain"):
            return False
        git(copy, "checkout", "--quiet", "-b", branch)
        commit_all(copy, f"Reproduced what was out of date in {commit[:10]}\n")
    if intake.default_remote(workspace) is None:
        tools.say("no default DVC remote: data and models of the branch are in this machine's cache only.")
    else:
        tools.dvc(["push"], copy)
    git(copy, "push", "--quiet", "--no-verify", str(workspace), f"{branch}:{branch}")
    return True


def _is_of(copy: Path, commit: str, branch: str) -> bool:
    """Whether the clone holds a run for this commit, with or without its result."""
    if not (copy / ".git").exists():
        return False
    head = ask_git(copy, "rev-parse", "--verify", "HEAD" if _current(copy) != branch else "HEAD~1")
    return head.text.strip() == commit


def _current(copy: Path) -> str:
    return ask_git(copy, "branch", "--show-current").text.strip()


def finish(workspace: Path, branch: str, commit: str, into: str, tools: Tools, waiting: bool = False) -> Outcome:
    """Publish the branch; with `waiting`, one that an earlier run has made."""
    title, body = request.reproduced(workspace, branch, into, commit)
    return proposal(workspace, branch, into, title, body, tools, {}, waiting)

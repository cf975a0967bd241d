"""The pull request of a retraining: its text, and opening it where a forge's token is configured.

The text is the new sets' figures, paired like everything in `clear compare`, then its report on the two commits: the
model so far and the new one, on the same benchmark. The forge is GitHub, through its REST API: GITHUB_TOKEN and, if
they cannot be read from the remote `origin`, GITHUB_REPOSITORY (owner/name) and GITHUB_API_URL.
"""

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from clear.data.io import remembered, write_json, write_text
from clear.errors import ClearError
from clear.project.git import git, output
from clear.report.tables import Table

if TYPE_CHECKING:
    import pandas as pd

    from clear.report.claims import Bootstrap

ROOM = 56_000
"""Bytes for the report of `clear compare`; a forge takes 65,536 characters in all."""
UNTOLD = "untold.json"
"""Beside a pull request's text, in a folder that git ignores, while a branch is being made public and until that was
told: what a killed run has told nobody is told by the next one. Branches of before have no such file."""
STATES = {0: "the gate passes", 1: "the gate FAILS", 2: "the gate cannot decide"}


def gate_model(workspace: Path) -> str:
    """The model that `gate.model` in params.yaml names."""
    import yaml

    try:
        return str(yaml.safe_load((workspace / "params.yaml").read_text())["gate"]["model"])
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ClearError(f"{workspace}/params.yaml names no gate.model; `make params` composes it.") from error


def body(workspace: Path, branch: str, names: list[str], incumbent: str, retrained: str) -> tuple[str, str]:
    """(title, Markdown) for two commits that the workspace's git has."""
    from clear.project.compare import render
    from clear.project.compare.comment import MARKER
    from clear.project.compare.load import read_sides
    from clear.project.compare.verdict import decide, settings_of

    comparison, verdict = decide(*read_sides(workspace, incumbent, retrained))
    model = verdict.policy.model
    frames = [incoming_rows(workspace, commit, model) for commit in (incumbent, retrained)]
    table = figures(*frames, model, settings_of(verdict.policy))
    title = f"Retrained on {', '.join(names)}: {STATES[verdict.status]}"
    said = [
        f"New degradation data: {', '.join(names)}. The model so far was measured on it first (commit "
        f"{incumbent[:10]}), then everything was trained again (commit {retrained[:10]}). Data and models are in the "
        f"DVC remote: `git switch {branch} && dvc pull`.",
        f"### The new degradations\n\n{table.escaped().markdown()}" if table.rows else table.caption,
        render.markdown(comparison, verdict, ROOM).replace(MARKER, "").strip(),
    ]
    return title, "\n\n".join(said) + "\n"


def reproduced(workspace: Path, branch: str, into: str, commit: str) -> tuple[str, str]:
    """(title, Markdown) for what was out of date in a commit of the branch `into` and was reproduced on `branch`."""
    from clear.project.compare import render
    from clear.project.compare.comment import MARKER
    from clear.project.compare.load import read_sides
    from clear.project.compare.verdict import decide

    head = output(workspace, "rev-parse", ref_of(workspace, branch)).strip()
    comparison, verdict = decide(*read_sides(workspace, commit, head))
    said = [
        f"Commit {commit[:10]} of {into} had stages that were out of date. They were reproduced in commit {head[:10]}; "
        f"data and models are in the DVC remote: `git switch {branch} && dvc pull`.",
        render.markdown(comparison, verdict, ROOM).replace(MARKER, "").strip(),
    ]
    return f"Reproduced {into}: {STATES[verdict.status]}", "\n\n".join(said) + "\n"


def incoming_rows(workspace: Path, commit: str, model: str) -> "pd.DataFrame":
    """The predictions of a commit on naturally degraded images; an empty frame if it has none."""
    import pandas as pd

    from clear.bench import predictions

    path = f"data/predictions/{model}.parquet"
    done = git(workspace, "show", f"{commit}:{path}")
    if done.status:
        return pd.DataFrame(columns=predictions.SCHEMA.names)
    with tempfile.TemporaryDirectory(prefix="clear-retrain-") as made:
        file = Path(made) / f"{model}.parquet"
        file.write_bytes(done.data)
        return predictions.read_incoming(file)


def figures(base: "pd.DataFrame", head: "pd.DataFrame", model: str, settings: "Bootstrap") -> Table:
    """Accuracy of both models per set, on the questions that both were asked."""
    from clear.bench import statistics
    from clear.bench.predictions import KEY
    from clear.data.records import INCOMING
    from clear.project.compare.differences import TITLES, difference, holm
    from clear.project.compare.verdict import change

    rows = base.merge(head, on=KEY, suffixes=("_base", "_head"), validate="one_to_one")
    rows = rows[(rows.text_base == rows.text_head) & (rows.answer_base == rows.answer_head)].reset_index(drop=True)
    if rows.empty:
        return Table([], [], "No question about the new degradations was answered by both models.")
    rows["pair"] = rows.pair_base
    rows["cluster"] = statistics.clusters(rows)
    groups = rows.groupby("corruption", sort=True)
    differences = holm(
        [difference(part, "correct", settings, model, INCOMING, corruption=str(name)) for name, part in groups]
    )
    lines = [
        [d.corruption, f"{d.n:,} about {d.clusters:,} images", change(d), {1: "▲", -1: "▼", 0: ""}[d.sign]]
        for d in differences
    ]
    return Table(
        ["set", "questions", f"{TITLES[model]}, so far → retrained", ""],
        lines,
        "Right answers on the sets' own benchmark slice, which no model was trained on, with the paired difference in "
        "points and its interval. ▲ ▼: certain, as in the tables below. The gate does not look at these.",
    )


def repository(workspace: Path) -> tuple[str, str]:
    """(address of the forge's interface, owner/name), from the environment or else from `origin`."""
    api, name = os.environ.get("GITHUB_API_URL", ""), os.environ.get("GITHUB_REPOSITORY", "")
    origin = git(workspace, "remote", "get-url", "origin").text.strip()
    # https://host/owner/name.git, ssh://git@host/owner/name or git@host:owner/name.git
    matched = re.fullmatch(r"(?:\w+://)?(?:[^@/]+@)?([\w.-]+)(?::\d+)?[:/]([\w.-]+/[\w.-]+?)(?:\.git)?/?", origin)
    if matched and not api:
        host = matched[1]
        api = "https://api.github.com" if host == "github.com" else f"https://{host}/api/v3"
    name = name or (matched[2] if matched else "")
    if not (api and name):
        raise ClearError(
            f"origin = {origin or 'not set'}: no repository of a forge can be read from it; set GITHUB_REPOSITORY to "
            "owner/name and GITHUB_API_URL, or unset GITHUB_TOKEN to get only the text."
        )
    return api.rstrip("/"), name


def ref_of(workspace: Path, branch: str) -> str:
    """Full name of a branch, the workspace's own before a remote's; "" if there is none."""
    patterns = (f"refs/heads/{branch}", f"refs/remotes/*/{branch}")
    return next(iter(output(workspace, "for-each-ref", "--format=%(refname)", *patterns).split()), "")


def publish(
    workspace: Path,
    branch: str,
    target: str,
    title: str,
    text: str,
    say: Callable[[str], None],
    waiting: bool = False,
) -> tuple[str, bool]:
    """Push a branch to `origin`, write the pull request's text below data/report and open the request where it can be.

    `target` is "" for the branch that is checked out; `waiting` says that an earlier run has made the branch. Every
    part is looked up first, so that repeating it changes nothing. Returns the request's address, or "", and whether
    people have to be told: of what this call has made public, and of what an earlier one may have without the caller's
    coming to `told`.
    """
    note = _report(workspace, branch) / UNTOLD
    owed = note.exists()

    def begin() -> None:
        write_json(note, {"title": title})

    origin = "origin" in output(workspace, "remote").split()
    pushed = origin and _push(workspace, branch, waiting, say, begin)
    file = note.with_name("pull_request.md")
    known = file.exists()
    if not origin and not (waiting and known):
        begin()
    write_text(file, f"# {title}\n\n{text}")
    say(f"the pull request's text: {file}")
    into = target or output(workspace, "branch", "--show-current").strip() or "main"
    url, opened = propose(workspace, branch, into, title, text, begin)
    say(f"pull request: {url}" if url else "no GITHUB_TOKEN is set: no pull request is opened.")
    if owed or (url and waiting):
        return url, owed or opened
    return url, pushed or opened if origin else not (waiting and known)


def _report(workspace: Path, branch: str) -> Path:
    return workspace / "data" / "report" / branch


def untold(workspace: Path, kind: str) -> dict[str, str]:
    """Branch `<kind>/…` → title of its pull request, for each that this machine was making public without `told`."""
    notes = sorted(_report(workspace, kind).glob(f"*/{UNTOLD}"))
    return {f"{kind}/{note.parent.name}": str(remembered(note).get("title", "")) for note in notes}


def told(workspace: Path, branch: str) -> None:
    """Remember that people know of the branch, as far as there is something to know."""
    (_report(workspace, branch) / UNTOLD).unlink(missing_ok=True)


def _push(workspace: Path, branch: str, waiting: bool, say: Callable[[str], None], begin: Callable[[], None]) -> bool:
    """Push the workspace's own branch to `origin`, as it was when last fetched, after `begin`; whether there was
    something to push.

    A branch that `origin` has is the reviewers', who may add to it or rebase it: only a run that has just continued it
    pushes to it.
    """
    ref, there = ref_of(workspace, branch), f"refs/remotes/origin/{branch}"
    if not ref.startswith("refs/heads/"):
        return False
    if git(workspace, "rev-parse", "--verify", "--quiet", there).status == 0:
        ahead = output(workspace, "rev-list", "--max-count=1", ref, f"^{there}")
        if waiting or not ahead:
            return False
        if git(workspace, "merge-base", "--is-ancestor", there, ref).status:
            say(f"origin has another {branch}, which is left as it is.")
            return False
    begin()
    output(workspace, "push", "--quiet", "--no-verify", "origin", f"{ref}:{ref}")
    return True


def propose(
    workspace: Path,
    branch: str,
    target: str,
    title: str,
    text: str,
    begin: Callable[[], None] = lambda: None,
) -> tuple[str, bool]:
    """Open the pull request, after `begin`, unless the branch has had one; returns its address, or "" where no token
    is configured, and whether it was opened now.

    It is a draft unless the gate passes. Raises ClearError with what the forge says where it refuses.
    """
    token = os.environ.get("GITHUB_TOKEN", "")
    if not token:
        return "", False
    api, name = repository(workspace)
    asked = f"{api}/repos/{name}/pulls"
    owner = name.partition("/")[0]
    there = _call("GET", asked, token, params={"head": f"{owner}:{branch}", "state": "all"})
    if there:
        return there[0]["html_url"], False
    begin()
    content = {"title": title, "head": branch, "base": target, "body": text, "draft": STATES[0] not in title}
    return _call("POST", asked, token, json=content)["html_url"], True


def _call(method: str, url: str, token: str, **content):
    import httpx

    headers = {"Authorization": f"Bearer {token}", "Accept": "application/vnd.github+json"}
    try:
        answer = httpx.request(method, url, headers=headers, timeout=30, **content)
    except httpx.HTTPError as error:
        raise ClearError(f"{method} {url}: {error}; the branch is pushed, run again to open the request.") from error
    if answer.is_success:
        try:
            return answer.json()
        except ValueError as error:  # a proxy's page, or an answer that was cut short
            raise ClearError(
                f"{method} {url}: the forge's answer is no JSON ({error}); the branch is pushed, run again to open the "
                "request."
            ) from error
    remedy = {401: "check GITHUB_TOKEN", 403: "the token needs the right to write pull requests"}
    said = " ".join(answer.text.split())[:300]
    raise ClearError(
        f"{method} {url}: the forge answers {answer.status_code} ({said}); "
        f"{remedy.get(answer.status_code, 'correct that')} and run again: the branch is pushed already."
    )

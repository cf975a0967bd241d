"""Retraining on new degradation data: from a set under data/incoming to a branch that is ready for review.

A set (clear/sources/incoming.py) is new if neither the revision's data/metrics/degrade.json nor a branch `retrain/…`
names its fingerprint. New sets are validated by the revision's own code in a clone under `.clear/scratch/retrain`;
invalid sets go to quarantine with their report (clear/project/retrain/intake.py). For the valid ones a new branch gets
three commits:

    data         the sets, added by DVC
    incumbent    the revision's own model, measured on the benchmark that the new sets have extended
    retrained    the whole pipeline

so `clear gate` of the last two compares both models on one benchmark. Data is pushed before the branch, the branch
before the pull request. The trailers of each commit name its step and its sets: git is the only state. A killed run
continues after its last step, and within a step from what DVC and the stages' checkpoints have recorded. A finished
step is never repeated, on whichever machine the next run takes place.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from clear.errors import ClearError
from clear.project.git import git as ask_git
from clear.project.retrain import intake, request
from clear.project.retrain.copies import bring, fresh, restore, same
from clear.project.retrain.stages import incumbent_of, measuring, stage_names
from clear.project.scratch import bounded, clear_leftovers, discard
from clear.sources.incoming import IncomingSet, sets

BRANCHES = "retrain"
STEPS = ("data", "incumbent", "retrained")
STEP, SET = "Retrain-Step: ", "Retrain-Set: "
DEGRADE = "data/metrics/degrade.json"


@dataclass(frozen=True)
class Tools:
    """How commands are run; a flow puts its own in, which end with it and are retried.

    `dvc` runs a DVC command in a folder and raises where it fails. `reproduce` reproduces the named stages of a folder
    (None: all), each alone and in order. `run` runs any command and returns (exit status, last lines). `refused` is
    told of each set that goes to quarantine, and why, and `proposed` of what a run is the first to make public: both at
    once, because what follows takes hours and may fail. Both are told again by the next run where one is killed
    before it knows that it has told them.
    """

    dvc: Callable[[list[str], Path], object]
    reproduce: Callable[[Path, list[str] | None], object]
    run: Callable[[list[str], Path], tuple[int, list[str]]]
    say: Callable[[str], None]
    refused: Callable[[str, str], object] = lambda name, problem: None
    proposed: Callable[["Outcome"], object] = lambda outcome: None


@dataclass(frozen=True)
class Outcome:
    """What became of a check: `message` says it in a line, `state` in a word; `branch` is "" if nothing was trained.
    `first`: the branch is public and nobody has been told so before, even if an earlier run has trained it."""

    message: str
    state: Literal["NothingNew", "WaitsForReview", "Quarantined", "Proposed"]
    branch: str = ""
    body: str = ""
    url: str = ""
    quarantined: dict[str, str] = field(default_factory=dict)
    first: bool = False


def retrain(
    workspace: Path,
    tools: Tools,
    incoming: str = intake.FOLDER,
    revision: str = "HEAD",
    target: str = "",
    rest: float = 0,
) -> Outcome:
    """Look for new sets and do all their steps; running it again on the same sets does nothing.

    `incoming` is a folder of the workspace or `s3://bucket/prefix`, `target` the branch that a pull request is for
    (default: the one checked out). `revision` is what to start from, "" the newest commit of that branch at `origin`:
    a clone that nobody updates still trains the code of today. A set to which something was added in the last `rest`
    seconds, or is while it is looked at, waits for another run. The caller makes sure that no other retraining of this
    workspace runs. Raises ClearError if there are new sets but no default DVC remote or no model to compare with, or if
    a command fails.
    """
    home = workspace / ".clear" / "scratch" / "retrain"
    branch = "" if revision else target or git(workspace, "branch", "--show-current")  # "" too where HEAD is detached
    if branch:
        commit = newest(workspace, branch)
    else:
        commit = git(workspace, "rev-parse", "--verify", "--end-of-options", f"{revision or 'HEAD'}^{{commit}}")
    clear_leftovers(home / "copy")
    source = intake.Source.of(workspace, incoming, home / "incoming")
    folder = source.fetch(tools.dvc, tools.say)
    source.remind(partial(refuse, tools))
    trained = known(workspace, commit)
    news = [new for new in sets(folder) if new.present and trained.get(new.name) != new.fingerprint]
    growing = [new for new in news if rest and source.age(new.name) < rest]
    for new in growing:
        tools.say(f"{new.name} changed less than {rest:g} s ago; left for another run, it may still be copied.")
    news = [new for new in news if new not in growing]
    if not news:
        remind(workspace, BRANCHES, (), tools)
        said = f"nothing new in {incoming}: {len(trained)} sets are in the training of {commit[:10]}"
        said += f"; {', '.join(new.name for new in growing)} may still be copied" if growing else ""
        return Outcome(f"{said}.", "NothingNew")
    fetch_branches(workspace, f"{BRANCHES}/*")
    troubles, tried = [], []
    for branch, names in branches(workspace, commit).items():
        if {(new.name, new.fingerprint) for new in news} & names:
            tried.append(branch)
            tools.say(f"{branch} has been trained and waits for review.")
            news = [new for new in news if (new.name, new.fingerprint) not in names]
            try:
                outcome = finish(workspace, branch, commit, target, tools, waiting=True)
            except ClearError as error:  # no reason not to train on what is new
                tools.say(f"{branch} cannot be published: {error}")
                troubles.append(error)
    remind(workspace, BRANCHES, tried, tools)
    if news:
        with bounded(home / "copy"):
            outcome = learn(workspace, news, source, home / "copy", commit, trained, target, tools)
    if troubles:
        raise troubles[0]
    return outcome


def learn(
    workspace: Path,
    news: list[IncomingSet],
    source: intake.Source,
    copy: Path,
    commit: str,
    trained: dict[str, str],
    target: str,
    tools: Tools,
) -> Outcome:
    """Check new sets, train on the good ones and propose the result; `trained` is what the commit was trained with."""
    if intake.default_remote(workspace) is None:
        raise ClearError(
            f"{', '.join(new.name for new in news)}: new, but there is no default DVC remote to share data and models "
            "through; set it with `make remote BUCKET=bucket/prefix`."
        )
    refused = {}
    if not resumable(copy, commit, branch_name(news)):
        fresh(workspace, commit, copy, tools.dvc, "pull")
        if "source" in stage_names(copy):  # a picture that a split already holds has to stay there
            tools.reproduce(copy, ["source"])
        for new in [*news]:
            bring(source.folder / new.name, copy)
            if not new.faults and not same(new, copy):
                news.remove(new)
                restore(copy, new.name, trained.get(new.name, ""))
                tools.say(f"{new.name} changes while it is looked at; left for another run.")
            elif problem := intake.problem_of(new.name, copy, tools.run):
                refused[new.name] = problem
                source.quarantine(new, copy, problem, partial(refuse, tools))
                restore(copy, new.name, trained.get(new.name, ""))
        news = [new for new in news if new.name not in refused]
        if not news:
            discard(copy)
            if not refused:
                return Outcome(f"nothing trained: what is new in {source.named} still changes.", "NothingNew")
            return Outcome(f"nothing trained: {_quarantined(refused)}.", "Quarantined", quarantined=refused)
    branch = branch_name(news)
    train(workspace, copy, branch, commit, news, tools)
    fetch_branches(workspace, f"{BRANCHES}/*")  # another machine may have been faster
    outcome = finish(workspace, branch, commit, target, tools, refused=refused)
    discard(copy)
    return outcome


def train(workspace: Path, copy: Path, branch: str, commit: str, news: Sequence[IncomingSet], tools: Tools) -> None:
    """Take the steps that the branch in the clone lacks, then push the data and hand the branch to the workspace."""
    done = steps(copy, commit)
    model = request.gate_model(copy)
    if "data" not in done:
        git(copy, "checkout", "--quiet", "-B", branch)
        for new in news:
            if not git(copy, "ls-files", f"data/incoming/{new.name}"):
                tools.dvc(["add", "--quiet", f"data/incoming/{new.name}"], copy)
        save(copy, "data", f"New degradation data: {', '.join(new.name for new in news)}", news)
    if "incumbent" not in done:
        folder = incumbent_of(copy, model)
        if not folder.exists():
            raise ClearError(
                f"{folder.relative_to(copy)} of {commit[:10]} is neither in the cache nor in the remote, so there is "
                "nothing to compare a new model with; `dvc push` it where it was trained."
            )
        tools.reproduce(copy, measuring(copy, f"evaluate@{model}"))
        save(copy, "incumbent", f"The model so far ({model}) on the benchmark with the new data", news)
    if "retrained" not in done:
        tools.reproduce(copy, None)
        save(copy, "retrained", f"Retrained on {', '.join(new.name for new in news)}", news)
    tools.dvc(["push"], copy)
    git(copy, "push", "--quiet", "--no-verify", str(workspace), f"{branch}:{branch}")


def finish(
    workspace: Path,
    branch: str,
    commit: str,
    target: str,
    tools: Tools,
    refused: dict[str, str] | None = None,
    waiting: bool = False,
) -> Outcome:
    """Publish a trained branch; with `waiting`, one that an earlier run has trained. Repeating it changes nothing."""
    ref = request.ref_of(workspace, branch)
    commits = {step: sha for sha, step, _ in _history(workspace, f"{commit}..{ref}") if step}
    names = sorted({name for _, _, about in _history(workspace, f"{commit}..{ref}") for name, _ in about})
    title, body = request.body(workspace, branch, names, commits["incumbent"], commits["retrained"])
    return proposal(workspace, branch, target, title, body, tools, refused or {}, waiting)


def proposal(
    workspace: Path,
    branch: str,
    target: str,
    title: str,
    body: str,
    tools: Tools,
    refused: dict[str, str],
    waiting: bool,
) -> Outcome:
    """Make a branch public and tell of it where no run has before."""
    url, first = request.publish(workspace, branch, target, title, body, tools.say, waiting)
    waits = waiting or not first
    said = f"{branch} waits for review ({title})" if waits else f"{title} ({branch})"
    said += f"; {_quarantined(refused)}" if refused else ""
    outcome = Outcome(said, "WaitsForReview" if waits else "Proposed", branch, body, url, refused, first)
    if first:
        tools.proposed(outcome)
    request.told(workspace, branch)
    return outcome


def remind(workspace: Path, kind: str, tried: Collection[str], tools: Tools) -> None:
    """Tell of branches `<kind>/…` that are public and of which a killed run has told nobody; those in `tried` this run
    publishes itself."""
    owed = {branch: title for branch, title in request.untold(workspace, kind).items() if branch not in tried}
    places = "refs/remotes/origin" if owed and fetch_branches(workspace, f"{kind}/*") else "refs/heads"
    for branch, title in owed.items():
        if not ask_git(workspace, "rev-parse", "--verify", "--quiet", f"{places}/{branch}").status:
            said = f"{branch} waits for review ({title})"
            tools.proposed(Outcome(said, "WaitsForReview", branch, first=True))
            request.told(workspace, branch)


def refuse(tools: Tools, name: str, problem: str, place: str) -> None:
    """Tell of a set that is in quarantine."""
    tools.say(f"{name} is not good: {problem}. It is now in {place}, with its report beside it.")
    tools.refused(name, problem)


def _quarantined(refused: dict[str, str]) -> str:
    return "; ".join(f"{name} is in quarantine: {problem}" for name, problem in refused.items())


# What git remembers


def known(workspace: Path, commit: str) -> dict[str, str]:
    """Set → fingerprint of what a commit was trained with."""
    done = ask_git(workspace, "show", f"{commit}:{DEGRADE}")
    if done.status:  # not trained yet
        return {}
    try:
        content = json.loads(done.text)
        recorded = content.get("incoming", {}).get("sets", {}) if isinstance(content, dict) else {}
        return {name: entry["fingerprint"] for name, entry in recorded.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ClearError(f"{commit[:10]}:{DEGRADE} is damaged ({error!r}); `dvc repro degrade`, commit it.") from error


def fetch_branches(workspace: Path, names: str) -> bool:
    """Learn of branches that another clone has pushed or deleted; whether there is an `origin` to ask. Raises
    ClearError where it does not answer."""
    if "origin" not in git(workspace, "remote").split():
        return False
    git(workspace, "fetch", "--quiet", "--prune", "origin", f"+refs/heads/{names}:refs/remotes/origin/{names}")
    return True


def newest(workspace: Path, branch: str) -> str:
    """The commit of a branch at `origin` as of now, or of the workspace's own where there is no `origin`."""
    ref = f"refs/remotes/origin/{branch}" if fetch_branches(workspace, branch) else f"refs/heads/{branch}"
    done = ask_git(workspace, "rev-parse", "--verify", "--end-of-options", f"{ref}^{{commit}}")
    if done.status:
        raise ClearError(f"{workspace}: there is no branch {branch}; name one as `target`.")
    return done.text.strip()


def branches(workspace: Path, commit: str) -> dict[str, set[tuple[str, str]]]:
    """Branch → (set, fingerprint) it was trained on, for every finished one that the commit does not contain."""
    patterns = (f"refs/heads/{BRANCHES}/*", f"refs/remotes/*/{BRANCHES}/*")
    listed = git(workspace, "for-each-ref", "--format=%(refname)", *patterns)
    trained = {}
    for ref in listed.split():
        history = _history(workspace, f"{commit}..{ref}")
        if "retrained" in {step for _, step, _ in history}:
            trained[ref[ref.index(f"{BRANCHES}/") :]] = {pair for _, _, about in history for pair in about}
    return trained


def _history(folder: Path, span: str) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """(commit, step or "", [(set, fingerprint)]) of a range, newest first."""
    steps = []
    for text in filter(None, git(folder, "log", "--format=%H%n%B%x00", span).split("\0")):
        sha, *lines = text.strip().splitlines() or [""]
        step = next((line.removeprefix(STEP) for line in lines if line.startswith(STEP)), "")
        pairs = [tuple(line.removeprefix(SET).split(" ", 1)) for line in lines if line.startswith(SET)]
        if sha:
            steps.append((sha, step, pairs))
    return steps


def branch_name(news: Sequence[IncomingSet]) -> str:
    """`retrain/<names>-<id>`; the id follows from names and content."""
    about = "\n".join(f"{new.name} {new.fingerprint}" for new in news)
    names = "-".join(new.name for new in news)
    return f"{BRANCHES}/{names[:40].strip('-')}-{hashlib.sha256(about.encode()).hexdigest()[:10]}"


def steps(copy: Path, commit: str) -> set[str]:
    """The steps that a clone has committed on top of `commit`."""
    return {step for _, step, _ in _history(copy, f"{commit}..HEAD") if step}


def resumable(copy: Path, commit: str, branch: str) -> bool:
    """Whether the clone holds a run for this branch on this commit that has at least its data; else it starts anew."""
    if not (copy / ".git").exists() or ask_git(copy, "rev-parse", "--verify", f"{commit}^{{commit}}").status:
        return False
    history = _history(copy, f"{commit}..HEAD")
    return bool(history) and all(step for _, step, _ in history) and git(copy, "branch", "--show-current") == branch


def save(copy: Path, step: str, subject: str, news: Sequence[IncomingSet]) -> None:
    """Commit everything that git does not ignore, with the trailers of the step."""
    about = "\n".join(f"{SET}{new.name} {new.fingerprint}" for new in news)
    commit_all(copy, f"{subject}\n\n{STEP}{step}\n{about}\n")


def commit_all(copy: Path, message: str) -> None:
    """Commit everything that git does not ignore, even if nothing changed."""
    (copy / ".git" / "index.lock").unlink(missing_ok=True)  # of a killed run; no other process works here
    git(copy, "add", "--all")
    identity = []
    if ask_git(copy, "config", "user.email").status:
        identity = ["-c", "user.name=retrain", "-c", "user.email=retrain@localhost"]
    git(copy, *identity, "commit", "--quiet", "--no-verify", "--no-gpg-sign", "--allow-empty", "--message", message)


def git(folder: Path, *arguments: str) -> str:
    """Output of a git command. Raises ClearError with what git says."""
    done = ask_git(folder, *arguments)
    if done.status:
        said = " | ".join(done.error_lines()[-2:])
        raise ClearError(f"{folder}: `git {arguments[0]}` failed: {said}; repair that and run again.")
    return done.text.strip()

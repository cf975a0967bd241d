"""`clear release`: a version of a model, or its refusal; and which version is in which stage.

A release is a commit with its cards and a tag on it. It is refused where somebody else could not have the same: a tree
with changes, a lock that disagrees with the code, outputs that are in no remote; and where the gate does not pass
against the version that is in the stage the release is meant for. Putting a former version back into its stage is never
refused, because that is what one does while something is wrong.
"""

import re
from dataclasses import replace
from pathlib import Path

from clear.bench.models import evaluations
from clear.errors import ClearError, one_line
from clear.project.check import drifts
from clear.project.compare.load import read_side
from clear.project.compare.verdict import NOT_COMPARABLE, PASSED, decide_under, policy_of
from clear.project.git import git, output
from clear.project.release import cards, registry
from clear.project.release.registry import Artifact

STAGE = "prod"
"""The stage that a release is meant for unless another is named."""
_ALREADY = " already, by the tags of this clone"
_MADE_BEFORE = "The tag was made before and had not been pushed."


def release(
    root: Path, model: str, version: str, stage: str = STAGE, because: str = "", push: bool = False
) -> list[str]:
    """Write and commit the cards of a model, tag that commit as a version of it, and return what there is to say.

    `because` is a person's reason to release although the gate cannot decide (another benchmark or profile); it does
    not help where the gate fails. With `push` branch and tag go to the remote, both or neither.
    Raises ClearError for the first obstacle, with its remedy; nothing is written then.
    """
    entry = registry.artifact(root, model)
    registry.require_version(version)
    registry.require_stage(stage)
    known = registry.versions(root, model)
    if version in known:
        return _released_before(root, model, version, stage, known[version], push)
    _require_clean(root)
    head = output(root, "rev-parse", "HEAD").strip()
    for other, commit in known.items():
        if commit == head:
            raise ClearError(
                f"this commit is {model} {other} already; put that into a stage with `clear release {model} --assign "
                f"{stage} {other}`."
            )
    _require_agreement(root)
    _require_pushed(root)
    texts = cards.texts(root, entry, f"{model}@{version}")
    reason = _require_gate(root, entry, head, stage, known, because)
    written = cards.write(root, entry, texts)
    _commit(root, written, f"Release {model} {version}")
    commit = output(root, "rev-parse", "HEAD").strip()
    tag = registry.register(root, model, version, commit, f"{model} {version}. {reason}")
    lines = [*map(str, written), f"tag {tag}", reason]
    return [*lines, _published(root, tag, push, branch=True), _assigning(model, stage, version)]


def _assigning(model: str, stage: str, version: str) -> str:
    return f"put it into its stage: clear release {model} --assign {stage} {version}"


def _released_before(root: Path, model: str, version: str, stage: str, commit: str, push: bool) -> list[str]:
    """Publish a version that there is, as after an end between its tag and the push, and return what there is to say.

    Raises ClearError unless that is asked for, its commit is HEAD, whose branch goes with it, and the remote lacks it.
    """
    tags = _here(root, f"{model}@{version}")
    at_head = commit == output(root, "rev-parse", "HEAD").strip()
    why, helps = _unpublished(root, tags, branch=at_head)
    if push and at_head and helps:
        published = _published(root, tags[0], push, branch=True)
        return [f"tag {tags[0]}", _MADE_BEFORE, published, _assigning(model, stage, version)]
    raise ClearError(
        f"{model} {version} exists, at commit {commit[:10]}; choose the next version{f'; {why}' if why else ''}."
    )


class Undecided(ClearError):
    """The gate cannot judge a version, so that a person has to."""


def assign(
    root: Path, model: str, stage: str, version: str, because: str = "", push: bool = False, approved_by: str = ""
) -> list[str]:
    """Put a version into a stage and return what there is to say. A version that has been there is not judged again.

    `approved_by` names in the tag the person who has agreed, if that is another than its author. With `push` the tag
    goes to the remote, beside that of the version, without which nobody else could resolve it; also one that was made
    before and did not get there. Raises ClearError for a version that is not registered, is there already, or does not
    pass the gate.
    """
    moved, reason = judge(root, model, stage, version, because)
    approved = f" Approved by {' '.join(approved_by.split())}." if approved_by.strip() else ""
    if registry.in_stage(root, model, stage) != version:
        tag = registry.assign(root, model, version, stage, f"{moved}. {reason}{approved}")
    elif push:
        tag, reason = _assignment(root, model, stage), _MADE_BEFORE
    else:
        raise ClearError(f"{moved}{_ALREADY}; {reason}")
    versions = _here(root, f"{model}@{version}")
    return [f"{moved}.", f"tag {tag}", reason, _published(root, tag, push, False, *versions)]


def judge(root: Path, model: str, stage: str, version: str, because: str = "") -> tuple[str, str]:
    """(What putting a version into a stage would do, why it may be done), each in words; nothing is changed.

    Where it is there already by tags that the remote lacks, these may be pushed: whoever made them did not get so far.
    Raises ClearError as `assign` does, Undecided where a reason of a person (`because`) would help.
    """
    entry = registry.artifact(root, model)
    registry.require_version(version)
    registry.require_stage(stage)
    known = registry.versions(root, model)
    if version not in known:
        listed = ", ".join(known) or "none"
        raise ClearError(
            f"{model} {version} is no release here (there are: {listed}); `git fetch --tags` brings those of others."
        )
    current = registry.in_stage(root, model, stage)
    if current == version:
        there = f"{model} {version} is in {stage}"
        why, helps = _unpublished(root, [*_here(root, f"{model}@{version}"), _assignment(root, model, stage)])
        if helps:
            return there, f"{why}."
        raise ClearError(f"{there}{_ALREADY}; {why or '`git fetch --tags` brings those of others'}.")
    former = {event.version for event in registry.history(root, model) if event.stage == stage}
    if version in former:
        reason = "It has been there before."
    else:
        reason = _require_gate(root, entry, known[version], stage, known, because)
    return f"{model} {version} is in {stage}" + (f", in place of {_called(current)}" if current else ""), reason


def _require_clean(root: Path) -> None:
    changed = output(root, "status", "--porcelain", "--untracked-files=no").splitlines()
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise ClearError(
            f"{changed[0][3:]}{more}: changed and not committed, so the release would not be what is here; commit, or "
            "discard with `git restore`."
        )


def _require_agreement(root: Path) -> None:
    found = drifts(root)
    if found:
        more = f" ({len(found)} such lines in `clear check`)" if len(found) > 1 else ""
        raise ClearError(f"dvc.lock does not belong to this commit{more}: {found[0]}")


def _require_pushed(root: Path) -> None:
    """Raises ClearError unless every file of every output is in DVC's remote."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        if not repo.config["core"].get("remote"):
            raise ClearError(
                "no DVC remote is configured, so nobody else could have this release; name one with `dvc remote add -d "
                "NAME URL`, commit .dvc/config and run `dvc push`."
            )
        try:
            there = repo.status(cloud=True)
        except (DvcException, OSError) as error:
            raise ClearError(
                f"DVC's remote {repo.config['core']['remote']} cannot be asked what it has "
                f"({one_line(error)}); check `dvc remote list` and its credentials."
            ) from error
    missing = sorted(name for name, state in there.items() if state in ("new", "missing"))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        remedy = "`dvc push`" if "new" in there.values() else "`dvc repro` and `dvc push`"
        raise ClearError(f"{missing[0]}{more}: not in DVC's remote, so nobody else could have it; run {remedy}.")


def _require_gate(root: Path, entry: Artifact, commit: str, stage: str, known: dict[str, str], because: str) -> str:
    """What the gate said about a commit, in one sentence; raises ClearError unless it passes, or cannot decide and a
    person did. Where the stage is empty, or has a version that is none any more, the commit is its own base: that
    leaves the rules about the data."""
    current = registry.in_stage(root, entry.name, stage)
    base = read_side(root, known.get(current, commit))
    head = read_side(root, commit)
    policy, _ = policy_of(base, head)
    verdict = decide_under(replace(policy, model=evaluated(entry)), base, head)
    withdrawn = bool(current) and current not in known
    against = f"{entry.name} {_called(current)}" if current else f"no version, since {stage} is empty"
    against += ", which is no release here" if withdrawn else ""
    decided = f"The gate cannot decide against {against}; decided by a person: {' '.join(because.split())}"
    if verdict.status == PASSED and withdrawn:
        if because.strip():
            return decided
        raise Undecided(
            f"the gate cannot decide against {against} though it is in {stage}; `git fetch --tags` brings it if others "
            "have it, else a person decides, with `--because REASON`."
        )
    if verdict.status == PASSED:
        return f"The gate passes against {against}: {verdict.sentence if current else verdict.rules[2].reason + '.'}"
    command = f"`clear gate {known.get(current, 'HEAD')[:10]} {commit[:10]}` shows all rules"
    if verdict.status == NOT_COMPARABLE:
        if because.strip():
            return decided
        raise Undecided(
            f"the gate cannot decide against {against}: {verdict.sentence} {command}; a person decides, with "
            "`--because REASON`."
        )
    broken = next(rule for rule in verdict.rules if rule.kept is False)
    raise ClearError(f"the gate does not pass against {against}: {broken.name}: {broken.reason}; {command}.")


def _called(version: str) -> str:
    """A version for readers; GTO has the commit in its place where its tag is gone."""
    return f"commit {version[:10]}" if re.fullmatch("[0-9a-f]{40}", version) else version


def evaluated(entry: Artifact) -> str:
    """The name under which a model of the registry is evaluated. Raises ClearError if it is not."""
    names = evaluations(entry.path.name)
    if entry.path.parent != Path("data/models") or not names:
        raise ClearError(f"{entry.path}: no model of the evaluation, so the gate cannot judge {entry.name}.")
    return names[-1]


def _commit(root: Path, files: list[Path], message: str) -> None:
    """Commit files, if they differ from HEAD; where git refuses, they are as they were."""
    names = [file.relative_to(root).as_posix() for file in files]
    output(root, "add", "--", *names)
    if not git(root, "diff", "--cached", "--quiet", "--", *names).status:
        return
    done = git(root, "commit", "-q", "-m", message, "--", *names)
    if done.status:
        git(root, "reset", "-q", "--", *names)
        for name in names:
            if git(root, "checkout", "-q", "--", name).status:
                (root / name).unlink(missing_ok=True)
        raise ClearError(f"git refuses to commit the cards: {done.said}; correct that and repeat.")


def fetch_tags(root: Path) -> bool:
    """Fetch the tags of others; False where there is no remote to ask. Raises ClearError with git's reason."""
    where = remote(root)
    if not where:
        return False
    done = git(root, "fetch", "--tags", where)
    if not done.status:
        return True
    refusals = [line for line in done.error_lines() if line.startswith("!")]
    names = [match[1] for line in refusals if (match := re.search(r"(\S+) +-> ", line))]
    clashing = [name for name in names if not git(root, "rev-parse", "-q", "--verify", f"refs/tags/{name}").status]
    if clashing:
        listed = " ".join(f"'{name}'" for name in clashing)
        raise ClearError(
            f"{where} and this clone have different tags named {listed}; if those of {where} count, delete these with "
            f"`git tag -d {listed}` and repeat."
        )
    raise ClearError(
        f"`git fetch --tags {where}` failed: {' | '.join(refusals) or done.said}; correct that and repeat."
    )


def remote(root: Path) -> str:
    """The remote that tags come from and go to: origin, else that of the branch, else the only one; "" for none."""
    names = output(root, "remote").split()
    tracked = git(root, "config", f"branch.{_branch(root)}.remote").text.strip()  # "." for a local branch
    return next((name for name in ("origin", tracked) if name in names), names[0] if len(names) == 1 else "")


def _branch(root: Path) -> str:
    return git(root, "symbolic-ref", "--short", "-q", "HEAD").text.strip()


def _here(root: Path, *names: str) -> list[str]:
    """Those of some tags that this clone has."""
    return output(root, "tag", "--list", *names).split()


def _assignment(root: Path, model: str, stage: str) -> str:
    """The newest tag of a stage with a version in it: the one that GTO counted last."""
    name = f"{model}#{stage}"
    counts = {tag: tag.removeprefix(name).removeprefix("#") or "0" for tag in _here(root, name, f"{name}#*")}
    return max((tag for tag, count in counts.items() if count.isdecimal()), key=lambda tag: int(counts[tag]))


def _unpublished(root: Path, tags: list[str], branch: bool = False) -> tuple[str, bool]:
    """(Which tag of this clone the remote does not have, with the remedy, "" for none; whether a push may change that).

    A remote that does not answer is no error: a command that pushes nothing has no need of it.
    """
    where = remote(root)
    if not where or not tags:
        return "", False
    publishes = f"`{_typed(_pushing(root, tags, branch))}` publishes it"
    asked = git(root, "ls-remote", "--tags", where, *(f"refs/tags/{tag}" for tag in tags))
    if asked.status:
        return f"{where} does not say whether it has {tags[-1]} ({asked.said}); {publishes}", True
    lines = (line.partition("\t") for line in asked.text.splitlines())
    theirs = {name.removeprefix("refs/tags/"): content for content, _, name in lines}
    for tag in tags:
        if tag in theirs and theirs[tag] != output(root, "rev-parse", f"refs/tags/{tag}").strip():
            remedy = f"if that of {where} counts, delete this with `git tag -d '{tag}'` and run `git fetch --tags`"
            return f"{where} has another {tag}; {remedy}", False
    lacking = [tag for tag in tags if tag not in theirs]
    return (f"{where} lacks {' and '.join(lacking)}; {publishes}" if lacking else ""), bool(lacking)


def _pushing(root: Path, tags: list[str], branch: bool) -> list[str]:
    """The words of the command that pushes tags, and with `branch` the branch they are on: all of it, or nothing."""
    here = _branch(root)
    return ["push", "--atomic", remote(root) or "origin", *([here] if branch and here else []), *tags]


def _typed(words: list[str]) -> str:
    return f"git {' '.join(words)}".replace("#", "\\#")


def _published(root: Path, tag: str, push: bool, branch: bool, *others: str) -> str:
    """Push a tag that is here alone, with `branch` the branch it is on, and other tags that it needs; or say how.

    A tag that is refused, or with which another is, is deleted: it would hide the one that others have.
    """
    words = _pushing(root, [*others, tag], branch)
    command, where, refs = _typed(words), words[2], words[3:]
    if not push:
        return f"others see it after: {command}"
    done = git(root, *words)
    if not done.status:
        said = done.error_lines()
        new = [ref for ref in refs if any(line.endswith(f" -> {ref}") for line in said)]  # those it did not have
        return f"pushed: {' '.join(new or refs)}"
    for name in (tag, *others):
        told = rf"! .*{re.escape(name)} -> {re.escape(name)} \((?!atomic)(.*?)\)"  # for itself, not for another
        refused = re.search(told, done.said)
        if refused and f" -> {tag} (" in done.said:  # else the remote has it
            output(root, "tag", "-d", tag)
            stays = ", while the commit of the cards stays" if branch else ""
            deleted = f"{where} refuses {name} ({refused[1]}), so that {'it' if name == tag else tag} is deleted here"
            raise ClearError(f"{deleted} and does not count{stays}: {_after_refusal(where, refused[1], done.said)}")
    behind = "(fetch first)" in done.said or "(non-fast-forward)" in done.said
    first = f"`git pull --no-rebase {where} {_branch(root)}`, then " if behind else ""
    raise ClearError(f"{tag} is made here, but `{command}` failed: {done.said}; {first}repeat that command.")


def _after_refusal(where: str, reason: str, said: str) -> str:
    """What to do where a remote has refused a tag."""
    if "already exists" in reason:
        return (
            f"somebody else has released or assigned meanwhile; `git fetch --tags {where}` shows what, then repeat if "
            "it is still wanted."
        )
    return f"{said}; `git fetch --tags {where}` and repeat once it accepts it."

"""The clone in which a run aside works: what it is made of beyond the commit, and the sets that come and go in it."""

import shutil
from collections.abc import Callable
from pathlib import Path

from clear.project.git import git as ask_git
from clear.project.scratch import clone, link
from clear.sources.incoming import IncomingSet, present, sets


def fresh(workspace: Path, commit: str, copy: Path, dvc: Callable[[list[str], Path], object], bring: str) -> None:
    """Make `copy` a clone of a commit, with the user's own data and with what the DVC command `bring` has of the rest;
    it gets its name once it has all that."""

    def complete(made: Path) -> None:
        bring_raw(workspace, made)
        dvc([bring, "--allow-missing"], made)

    clone(workspace, commit, copy, complete)


def bring_raw(workspace: Path, copy: Path) -> None:
    """Give the clone the user's own data in data/raw that neither git nor DVC has, as hard links where that works."""
    for given in sorted((workspace / "data" / "raw").glob("*")):
        target = copy / "data" / "raw" / given.name
        if target.exists() or target.with_name(f"{given.name}.dvc").exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if given.is_dir():
            shutil.copytree(given, target, copy_function=link)
        else:
            link(str(given), str(target))


def bring(folder: Path, copy: Path) -> None:
    """Copy a set into the clone, in place of what is there under its name."""
    target = copy / "data" / "incoming" / folder.name
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, target)


def same(new: IncomingSet, copy: Path) -> bool:
    """Whether what was brought into the clone is the set that was found: its fingerprint stands for it from there."""
    return present(copy / "data" / "incoming", new.name)[0].fingerprint == new.fingerprint


def restore(copy: Path, name: str, fingerprint: str) -> None:
    """Take a refused set out of the clone; the version that the revision was trained with, if any, comes back."""
    from dvc.repo import Repo

    target = copy / "data" / "incoming" / name
    shutil.rmtree(target)
    if fingerprint and ask_git(copy, "checkout", "HEAD", "--", f"data/incoming/{name}").status:
        with Repo(str(copy)) as repo:
            repo.checkout(targets=[str(target)], force=True, allow_missing=True)
    here = {incoming.name: incoming.fingerprint for incoming in sets(target.parent)}
    if here.get(name) != (fingerprint or None):
        shutil.rmtree(target, ignore_errors=True)
        target.with_name(f"{name}.dvc").unlink(missing_ok=True)

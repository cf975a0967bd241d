"""Another profile of the pipeline, run in a copy of the workspace: `make repro PROFILE=smoke`.

The copy lies in `$CLEAR_HOME/scratch/<profile>`: every file that git tracks or would track, as it is now, with
params.yaml composed for the profile. It is a separate DVC workspace that shares the cache. In the user's folder only
the rendered report changes, `data/report/<profile>`. The copy stays, so that a second run does only what is
out of date and an interrupted one resumes; there is one copy per profile and `make clean` removes them.
`dvc exp run --temp` does the same from the last commit, but stashes and resets the user's folder meanwhile, forgets
untracked files and refuses a clone without commits of its own. `clone` makes a copy of a commit instead, for flows.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clear.config import PARAMS, compose
from clear.data.io import alone, sync, write_text
from clear.data.lock import exported, remark, when_busy_here, writer
from clear.data.workspace import home
from clear.errors import ClearError
from clear.project.git import git, output
from clear.schema import PROFILES

_OWN = {".clear", ".dvc", "data", "dvc.lock"}
"""What belongs to the copy itself and outlives a refresh."""


def write_params(file: Path, overrides: Sequence[str] = ()) -> None:
    """Compose clear/conf into `file`: the values that `dvc exp run` composes, in a form that is read in two minutes."""
    write_text(file, "\n".join(_yaml(compose(list(overrides)))) + "\n")


def _yaml(tree: dict[str, Any], indent: str = "") -> list[str]:
    """Lines of YAML. A list, or a dictionary without others in it, takes one line where it fits; DVC's own dump has a
    line for every element."""
    import yaml

    lines = []
    for key, value in tree.items():
        line = yaml.safe_dump({key: value}, default_flow_style=True, sort_keys=False, width=10**6).strip()[1:-1]
        inner = value.values() if isinstance(value, dict) else ()
        if inner and (len(indent + line) > 116 or any(isinstance(item, dict) for item in inner)):
            lines += [f"{indent}{key}:", *_yaml(value, indent + "  ")]
        else:
            lines.append(indent + line)
    return lines


def run(
    workspace: Path,
    profile: str,
    overrides: Sequence[str] = (),
    name: str = "",
    targets: Sequence[str] = (),
    begin: Path | None = None,
) -> Path:
    """Reproduce the pipeline of `workspace` under `profile` in its scratch copy and return the copy's folder.

    `name` is the copy's, where it is not the profile's: a variant that `overrides` describe. With `targets` only these
    stages are made, from all that the workspace itself, or its scratch copy `begin`, has made: what the overrides do
    not reach does not run again.
    Raises ClearError if the profile is unknown, the workspace is not a git and DVC project, another run is in that
    copy, or a stage fails.
    """
    if profile not in PROFILES:
        raise ClearError(f"profile {profile!r} is not one of {', '.join(PROFILES)}.")
    folder = home() / "scratch" / (name or profile)
    with writer(folder, when_busy_here(), "scratch run", remark):
        refresh(workspace.resolve(), folder)
        write_params(folder / PARAMS, [f"profile={profile}", *overrides])
        _reproduce(workspace.resolve(), folder, targets, begin or workspace.resolve())
    return folder


def _reproduce(workspace: Path, folder: Path, targets: Sequence[str], begin: Path) -> None:
    environment = os.environ | {
        "CLEAR_HOME": str(home()),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    # Sets under data/incoming that DVC tracks are not in git: they come from the shared cache.
    sets = sorted(file.relative_to(folder).as_posix() for file in folder.glob("data/incoming/*.dvc"))
    if sets and _call([sys.executable, "-m", "dvc", "checkout", "-q", *sets], folder, environment):
        raise ClearError(f"{', '.join(sets)}: not all of this is in the cache; `dvc pull` or `dvc add` it first.")
    if targets:
        _take_over(workspace, begin, folder, environment)
    if _call([sys.executable, "-m", "dvc", "repro", *targets], folder, environment):
        raise ClearError(f"the run in {folder} stopped (see above); the same command continues where it stopped.")


def _call(command: list[str], folder: Path, environment: dict[str, str]) -> int:
    """Run a command in a process group of its own; an interruption reaches all of it and is waited for."""
    # Begun with `&` in a script, or by cron, we ignore SIGINT, and so would the command: SIGTERM would be waited for in
    # vain. A handler of Python's is not passed on.
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(command, cwd=folder, env=environment, process_group=0)
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return process.wait()
    except KeyboardInterrupt:
        # DVC itself ignores SIGINT while a stage runs; the stage ends, and DVC with it.
        os.killpg(process.pid, signal.SIGINT)
        process.wait()
        raise


def refresh(workspace: Path, folder: Path) -> None:
    """Make `folder` a DVC workspace with the current code of `workspace`, keeping the data it already has."""
    files = _listed(workspace)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        if old.name not in _OWN:
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    shutil.rmtree(folder / "data" / "incoming", ignore_errors=True)  # put there by people, so the workspace decides
    _copy([n for n in files if Path(n).parts[0] not in _OWN or n.startswith("data/incoming/")], workspace, folder)
    raw = folder / "data" / "raw"
    if (workspace / "data" / "raw").is_dir() and not raw.exists():  # the user's own data: read, never written
        raw.symlink_to(workspace / "data" / "raw")
    settings = folder / ".dvc"
    settings.mkdir(exist_ok=True)
    shutil.copy2(workspace / ".dvc" / "config", settings / "config")
    (settings / "config.local").write_text(f"[core]\n    no_scm = true\n[cache]\n    dir = {_cache(workspace)}\n")


def _copy(names: Sequence[str], workspace: Path, folder: Path) -> None:
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(workspace / name, target, follow_symlinks=False)


def _take_over(workspace: Path, begin: Path, folder: Path, environment: dict[str, str]) -> None:
    """Let the copy begin where `begin` is, the workspace or a copy of it: its dvc.lock, small results, cached data."""
    lock, begun = begin / "dvc.lock", folder / ".dvc" / "begun-from"
    if not lock.exists():
        raise ClearError(f"{lock} is not here; run `make repro`.")
    if begun.exists() and begun.read_bytes() == lock.read_bytes():
        return  # an interrupted run goes on with what it has made itself
    there = ("data/incoming/", "data/raw/")  # copied before, and linked to
    own = [name for name in _listed(workspace, begin) if name.startswith("data/") and not name.startswith(there)]
    _copy([*own, "dvc.lock"], begin, folder)
    if _call([sys.executable, "-m", "dvc", "checkout", "-q", "--force"], folder, environment):
        raise ClearError(f"{begin}: not all that dvc.lock names is in the cache; `dvc pull` or `make repro` first.")
    shutil.copy2(lock, begun)


def _listed(workspace: Path, folder: Path | None = None) -> list[str]:
    """The files git tracks or would track, as they are in the folder now; those of `$CLEAR_HOME` are no part of it.

    With `folder`, a copy of the workspace, the files there, by what git knows of the workspace.
    """
    folder = folder or workspace
    if not (workspace / ".dvc" / "config").exists():
        raise ClearError(f"{workspace}: no DVC project here; run this from the project's folder.")
    its = [] if folder == workspace else [f"--git-dir={workspace / '.git'}", "--work-tree=."]
    listed = git(folder, *its, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if listed.status:
        raise ClearError(f"{workspace}: {listed.said}; run this in a git clone of the project.")
    names = dict.fromkeys(filter(None, listed.text.split("\0")))  # a file in a merge conflict is listed thrice
    # A home inside the workspace that git does not ignore holds the copies themselves.
    inside = workspace.resolve() in home().resolve().parents
    own = f"{home().resolve().relative_to(workspace.resolve()).as_posix()}/" if inside else "/"
    return [name for name in names if (folder / name).is_file() and not name.startswith(own)]


def _cache(workspace: Path) -> str:
    from dvc.repo import Repo

    with Repo(str(workspace)) as repo:
        return repo.cache.local_cache_dir


def clone(source: Path, revision: str, copy: Path, complete: Callable[[Path], object] = lambda made: None) -> str:
    """Make `copy` a fresh clone of `source` at `revision` with its DVC cache, remote and replies; returns the commit.

    `complete` adds what else belongs to it. The clone has another name, `<copy>.partial`, until all of it is there:
    what a killed run leaves is never taken for a clone. Raises ClearError if the source is not a git clone with DVC or
    does not know the revision.
    """
    if not (source / ".dvc" / "config").exists():
        raise ClearError(f"{source}: no DVC project here; name the project's folder as `workspace`.")
    commit = output(source, "rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}").split()[-1]
    discard(copy)
    copy.parent.mkdir(parents=True, exist_ok=True)
    partial = copy.with_name(f"{copy.name}.partial")
    with bounded(copy):
        output(source, "clone", "--quiet", "--shared", "--no-checkout", str(source), str(partial))
        output(partial, "checkout", "--quiet", "--detach", commit)
        _share(source, partial)
        complete(partial)
    sync(partial)
    partial.rename(copy)
    return commit


def _share(source: Path, copy: Path) -> None:
    """Give a clone the DVC cache, the remotes and the paid replies of its source."""
    from dvc.repo import Repo

    with Repo(str(source)) as repo:
        settings, cache = repo.config.read(), repo.cache.local_cache_dir
    with Repo(str(copy)) as repo, repo.config.edit("local") as own:
        own["cache"] = dict(settings.get("cache", {})) | {"dir": cache}
        own["remote"] = settings.get("remote", {})
        if default := settings.get("core", {}).get("remote"):
            own["core"]["remote"] = default
    # Paid replies outlive the copy. .gitignore does not treat a link as a folder, so the copy is excluded by name.
    replies = source / "data" / "replies"
    replies.mkdir(parents=True, exist_ok=True)
    (copy / "data").mkdir(exist_ok=True)
    (copy / "data" / "replies").symlink_to(replies)
    (copy / ".git" / "info").mkdir(exist_ok=True)
    with (copy / ".git" / "info" / "exclude").open("a") as file:
        file.write("/data/replies\n")


def discard(copy: Path) -> None:
    """Remove a clone. It loses its name first: what a killed removal leaves is never taken for a clone."""
    clear_leftovers(copy)
    if copy.exists():
        gone = copy.with_name(f"{copy.name}.gone")
        copy.rename(gone)
        shutil.rmtree(gone)


def clear_leftovers(copy: Path) -> None:
    """Remove what killed runs have left of making or removing a clone."""
    for left in (copy.with_name(f"{copy.name}.{state}") for state in ("partial", "gone")):
        lock = left / ".clear" / "command.lock"  # of the commands of flows, which end a little later than their flow
        if lock.exists():
            with alone(lock):
                pass
        if left.exists():
            shutil.rmtree(left)


@contextmanager
def bounded(copy: Path) -> Iterator[None]:
    """In the block git, whoever calls it, looks for the repository of a clone in the clone and not above it: in a
    clone that has lost its own it would answer, commit and push for the workspace, in whose folder the clone is."""
    name = "GIT_CEILING_DIRECTORIES"
    with exported(name, os.pathsep.join(filter(None, [os.environ.get(name), str(copy.parent.resolve())]))):
        yield


def link(source: str, target: str) -> None:
    """Hard link, or copy onto another file system; for what is only read."""
    try:
        os.link(Path(source).resolve(), target)
    except OSError:
        shutil.copy2(source, target)

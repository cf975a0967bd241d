"""`clear tidy`: what nobody needs any more in DVC's cache and remote, and its removal.

Needed is what these have in their dvc.lock or .dvc files: the workspace as it is, its experiments, every worktree and
scratch copy, every tag (so every release), every branch here and at the remotes with its commits of the last `days`
days, and the head of every pull request. An object younger than `days` stays in any case: a run that goes on elsewhere
pushes its data before its commit. Everything else is listed, and removed only on request. `dvc gc` alone knows neither
branches that are only at the remote nor pull requests, and has no grace.

Two clones may share one cache; name the other ones (`also`), or their uncommitted results have the grace alone.
"""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from clear.data.lock import Busy, writer
from clear.data.workspace import home
from clear.errors import ClearError, one_line
from clear.project.check import LOCK
from clear.project.compare.load import is_shallow
from clear.project.git import contents_of, git, output, tracked

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc_data.hashfile.db import HashFileDB

DAYS = 30
_PULLS = "refs/clear/pulls"
_TAGS = "refs/clear/tags"
"""Where the tags of the remotes are kept, because a remote may have another tag under a name that is taken here."""


@dataclass(frozen=True)
class Object:
    """A file of a store: its hash, its size in bytes, and when it was last written or put there (seconds since the
    epoch)."""

    id: str
    size: int
    written: float


@dataclass(frozen=True)
class Store:
    """A cache or remote: every object, and those that nobody needs."""

    name: str
    objects: list[Object]
    needless: list[Object]

    @property
    def bytes(self) -> tuple[int, int]:
        """The size of all objects, and of the needless ones."""
        return sum(one.size for one in self.objects), sum(one.size for one in self.needless)

    def __str__(self) -> str:
        whole, needless = (size / 2**20 for size in self.bytes)
        return (
            f"{self.name}: {len(self.needless)} of {len(self.objects)} objects are needless, {needless:,.1f} of "
            f"{whole:,.1f} MiB"
        )


@dataclass(frozen=True)
class Tidied:
    """`kept` are the things that need data, as (what, how many), `absent` counts folders they name that are in none of
    the stores; `removed` says whether `needless` objects are gone."""

    kept: list[tuple[str, int]]
    absent: int
    stores: list[Store]
    removed: bool

    def lines(self) -> list[str]:
        """What a person reads."""
        needed = ", ".join(f"{count} {what}" for what, count in self.kept if count)
        if not any(store.needless for store in self.stores):
            last = "Nothing to remove."
        elif self.removed:
            last = "Removed."
        else:
            last = "Nothing was removed; `clear tidy` with --remove does it."
        lines = [f"Data are kept for {needed}."]
        if self.absent:
            lines.append(f"{self.absent} folders that these name are in none of the stores below.")
        return [*lines, *map(str, self.stores), last]


def tidy(
    root: Path,
    days: float = DAYS,
    remote: bool = False,
    remove: bool = False,
    also: Iterable[Path] = (),
) -> Tidied:
    """Find what nobody needs in the cache, with `remote` also in DVC's default remote, and with `remove` delete it.

    `also` are other clones that share the cache. Raises ClearError where it cannot be known what is needed (a remote of
    git that does not answer, a shallow or partial clone, none at all) and, with `remove`, where a run is going on in
    the workspace or a copy of it. Nothing is removed then.
    """
    if not 0 <= days <= 36500:  # NaN is not, either
        raise ClearError(f"--days {days:g}: from 0 to 36500.")
    if (asked := git(root, "rev-parse", "--git-dir")).status:
        raise ClearError(
            f"{root.resolve()}: not a git repository: run this in a clone of the project (git: {asked.said})."
        )
    others = [Path(folder) for folder in also]
    for folder in others:
        if not (folder / ".dvc").is_dir():
            raise ClearError(f"{folder}: no DVC project, so it is not known what it needs.")
    projects = _distinct([root, *_worktrees(root), *others])
    private = [home()] if root.resolve() == Path.cwd() else []  # of `clear scratch`; those of flows are in .clear
    scratch = [folder / "scratch" for folder in _distinct([*private, *(project / ".clear" for project in projects)])]
    # A flow holds the lock beside its clone while it makes it, and while DVC works in it.
    beside = [folder / name for folder in scratch for name in ("", "retrain", "reproduce")]
    with ExitStack() as held:
        known = _distinct([*projects, *beside])
        if remove:
            _hold(held, known)
        made = _distinct(copy for folder in scratch for copy in _copies(folder))
        copies = [folder for folder in _distinct([*projects, *made]) if folder != root]
        if remove:
            _hold(held, _distinct([*known, *made])[len(known) :])
        revisions = _revisions(root)
        return _tidied(root, days, remote, remove, copies, revisions)


def _hold(held: ExitStack, folders: Iterable[Path]) -> None:
    """Be the only writer of folders until `held` ends. Raises ClearError where one has another writer."""
    for folder in folders:
        try:
            held.enter_context(writer(folder, "leave", "clear tidy"))
        except Busy as error:
            raise ClearError(f"{error} Nothing is removed while a run may add to the cache.") from error


def _distinct(folders: Iterable[Path]) -> list[Path]:
    """Each folder once, in order: whoever locks one twice is in his own way."""
    first: dict[Path, Path] = {}
    for folder in folders:
        first.setdefault(folder.resolve(), folder)
    return list(first.values())


def _worktrees(root: Path) -> list[Path]:
    """Other checkouts of this clone."""
    listed = output(root, "worktree", "list", "--porcelain", "-z").split("\0")
    found = [Path(line.removeprefix("worktree ")) for line in listed if line.startswith("worktree ")]
    top, inside = output(root, "rev-parse", "--show-toplevel", "--show-prefix").split("\n")[:2]
    others = [folder / inside for folder in found if folder.resolve() != Path(top).resolve()]
    return [folder for folder in others if (folder / ".dvc").is_dir()]


def _copies(scratch: Path) -> list[Path]:
    """Copies and clones in which runs work."""
    return sorted(folder.parent for folder in scratch.glob("**/.dvc") if folder.is_dir())


def _revisions(root: Path) -> dict[str, list[str]]:
    """Commits whose data are needed, by what they are; those of the remotes are fetched first."""
    if is_shallow(root):
        raise ClearError("this clone is shallow and does not know every branch: `git fetch --unshallow` first.")
    remotes = output(root, "remote").split()
    for name in remotes:
        heads = f"+refs/heads/*:refs/remotes/{name}/*"
        pulls = [f"+refs/{kind}/*/head:{_PULLS}/{name}/{kind}/*" for kind in ("pull", "merge-requests")]
        tags = f"+refs/tags/*:{_TAGS}/{name}/*"
        done = git(root, "fetch", "--prune", "--no-tags", name, heads, tags, *pulls)
        if done.status:
            raise ClearError(
                f"git's remote {name} does not say what is needed there: {done.said}; repeat when it answers, or "
                "`git remote remove` it."
            )
    kinds = {
        "tags": ("refs/tags", _TAGS),
        "branches": ("refs/heads",),
        "branches of others": ("refs/remotes",),
        "pull requests": (_PULLS,),
        "experiments": ("refs/exps",),
    }
    return {what: _commits(root, *where) for what, where in kinds.items()}


def _commits(root: Path, *where: str) -> list[str]:
    """The commits of the references below `where`; tags may be of something else."""
    listed = output(root, "for-each-ref", "--format=%(objecttype) %(*objecttype) %(objectname) %(*objectname)", *where)
    found = []
    for words in (line.split(" ") for line in listed.splitlines()):
        kind, peeled, name, target = words
        if "commit" in (kind, peeled):
            found.append(target or name)
    return sorted(set(found))


def _tidied(
    root: Path, days: float, remote: bool, remove: bool, copies: list[Path], revisions: dict[str, list[str]]
) -> Tidied:
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    after = time.time() - days * 86400
    recent = _recent(root, days)
    commits = sorted({*recent, *(one for found in revisions.values() for one in found)})
    kept = [("workspace", 1), ("copies of it", len(copies)), *((what, len(found)) for what, found in revisions.items())]
    kept.append((f"commits of the last {days:g} days", len(recent)))
    try:
        with Repo(str(root)) as repo, repo.lock:
            stores = _stores(repo, remote)
            listed = [(store, list(_objects(store))) for _, store in stores]
            named = _named(root, commits).union(*(_named(folder, []) for folder in copies))
            used, absent = _with_files(named, listed)
            found = []
            for (name, _), (store, objects) in zip(stores, listed, strict=True):
                needless = [one for one in objects if one.id not in used and one.written < after]
                found.append(Store(name, objects, needless))
                if remove and needless:
                    _delete(store, needless)
    except (DvcException, OSError) as error:
        raise ClearError(f"it cannot be found out what is needed: {one_line(error)}; nothing was removed.") from error
    return Tidied(kept, absent, found, remove)


def _recent(root: Path, days: float) -> list[str]:
    """The commits of the last days on branches, here and at the remotes."""
    since = (datetime.now(UTC) - timedelta(days=days)).isoformat()
    # Not --since, which ends at the first older commit: clocks differ, and a rebased commit is younger than its child.
    return output(root, "log", "--branches", "--remotes", "--format=%H", f"--since-as-filter={since}").split()


def _stores(repo: "Repo", remote: bool) -> list[tuple[str, "HashFileDB"]]:
    stores: list[tuple[str, HashFileDB]] = [("cache", repo.cache.local)]
    if remote:
        name = repo.config["core"].get("remote")
        if not name:
            raise ClearError("no DVC remote is configured; `dvc remote default NAME` names one.")
        stores.append((f"remote {name}", repo.cloud.get_remote_odb(name, "tidy", hash_name="md5")))
    return stores


def _named(root: Path, commits: Iterable[str]) -> set[str]:
    """The hashes of outputs in the dvc.lock and .dvc files of a folder as it is and of commits; a folder's is that of
    its list."""
    listed = git(root, "ls-files", "-z", "--cached", "--others")
    names = (
        listed.text.split("\0")
        if not listed.status
        else [file.relative_to(root).as_posix() for file in root.rglob("*.dvc")]
    )
    files = {root / name for name in [*names, LOCK] if _names_data(name)}
    texts = [file.read_bytes() for file in files if file.is_file()]
    blobs: set[str] = set()
    for commit in commits:
        blobs |= {blob for path, blob in tracked(root, commit).items() if _names_data(path)}
    found = contents_of(root, blobs) if blobs else {}  # a copy may be outside git
    if len(found) < len(blobs):
        raise ClearError("this clone lacks files of commits that are needed (a partial clone?); `git fetch` them.")
    return set().union(*(_outputs(text) for text in {*texts, *found.values()}))


def _outputs(text: bytes) -> set[str]:
    """The hashes of all outputs in a dvc.lock or a .dvc file. Raises ClearError for one that is neither."""
    try:
        content = yaml.load(text, Loader=yaml.CSafeLoader)
        stages = list(content["stages"].values()) if "stages" in content else [content]
        return {out["md5"] for stage in stages for out in stage.get("outs", []) if "md5" in out}
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise ClearError(f"a {LOCK} or .dvc file that is needed cannot be read: {one_line(error)}") from error


def _names_data(path: str) -> bool:
    return path.endswith(".dvc") or Path(path).name == LOCK


def _with_files(named: set[str], listed: list[tuple["HashFileDB", list[Object]]]) -> tuple[set[str], int]:
    """`named` with the files of its folders, and how many folders have their list in none of the stores: nothing of
    them can be made from what is here, so nothing here is kept for them."""
    ids = [{one.id for one in objects} for _, objects in listed]
    used, absent = set(named), 0
    for value in named:
        if not value.endswith(".dir"):
            continue
        store = next((store for (store, _), here in zip(listed, ids, strict=True) if value in here), None)
        if store is None:
            absent += 1
            continue
        used |= {entry["md5"] for entry in json.loads(store.fs.cat_file(store.oid_to_path(value)))}
    return used, absent


def _objects(store: "HashFileDB") -> Iterator[Object]:
    """Every object of a cache or remote, as its file system lists it."""
    for path, size, written in _files(store):
        start, name = path.split("/")[-2:]
        if len(start) == 2 and len(name.partition(".")[0]) == 30:
            yield Object(start + name, size, written)


def _files(store: "HashFileDB") -> Iterator[tuple[str, int, float]]:
    """(path, size, when written) of every file; where a file system does not say when, it is now, so that it stays.

    A file that DVC has linked into the cache (`cache.type hardlink`) has the date of the picture it was, old or to
    come, and only the change of its entry says when it came.
    """
    if store.fs.protocol == "local":
        for file in Path(store.path).glob("??/*"):
            facts = file.stat()
            yield file.as_posix(), facts.st_size, facts.st_ctime
        return
    for path, facts in store.fs.fs.find(store.path, detail=True).items():
        times = (facts.get(key) for key in ("LastModified", "last_modified", "updated", "mtime"))
        found = next((one for one in times if one), time.time())
        yield path, int(facts.get("size") or 0), found.timestamp() if isinstance(found, datetime) else float(found)


def _delete(store: "HashFileDB", needless: list[Object]) -> None:
    """Remove these objects and no other, since more may have come; a folder's list before its files, as DVC does."""
    from dvc_data.hashfile.db import get_index

    for lists in (True, False):
        paths = [store.oid_to_path(one.id) for one in needless if one.id.endswith(".dir") == lists]
        if paths:
            store.fs.remove(paths)
    get_index(store).clear()

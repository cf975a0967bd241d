"""What the two sides of a comparison are: two git revisions of this project, or folders that hold a `data/` tree.

Of two revisions the base is their merge base, so that a branch is never blamed for what happened on the other one
meanwhile. A revision is read from git's objects, without a checkout; predictions that a revision keeps under DVC
instead are read through DVC's API. Everything is in memory afterwards: nothing here is written to the project.
"""

import hashlib
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from clear.bench import predictions
from clear.bench.models import MODELS
from clear.config import check_yaml
from clear.data import workspace as paths
from clear.errors import ClearError, one_line
from clear.project.compare import figures
from clear.project.git import Answer, NoGit, contents_of, git, output, tracked

if TYPE_CHECKING:
    import pandas as pd

LOCK, PARAMS, PINS = "dvc.lock", "params.yaml", "infra/constraints.txt"
WANTED = ("data/metrics", "data/predictions", LOCK, PARAMS, PINS)
MOST_VALUES = 10**5
"""Of dvc.lock and params.yaml of a side, which may be a stranger's; a dozen times what this project's lock has."""
BENCH = ("data/bench/clean", "data/bench/degraded")

_ENTRIES = [{"path": str, "hash": str}]
_STAGES = {...: {"deps": _ENTRIES, "outs": _ENTRIES}}
"""What is read of dvc.lock, as a shape of clear.project.compare.figures; every entry has a path."""


@dataclass(frozen=True)
class Side:
    """One side. `name` is what the user wrote, `origin` says what was read, `commit` is empty for a folder.

    `lock` holds the stages of dvc.lock, `lock_sha` the SHA-256 of that file. `frames` are predictions by model,
    `missing` says why a model has none. `records` are the run records of this machine that belong to this side.
    `bench` is the folder with the pictures of this side's benchmark, if it is here. `pins` are the locked packages.
    """

    name: str
    origin: str
    commit: str
    profile: str
    params: dict
    lock: dict[str, dict]
    lock_sha: str
    metrics: dict[str, dict]
    frames: dict[str, "pd.DataFrame"]
    missing: dict[str, str] = field(default_factory=dict)
    records: dict[str, dict] = field(default_factory=dict)
    bench: Path | None = None
    pins: dict[str, str] = field(default_factory=dict)

    def hash_of(self, path: str) -> str:
        """Hash that dvc.lock gives an output, empty if it has none."""
        return outputs(self.lock).get(path, "")


def outputs(lock: dict[str, dict]) -> dict[str, str]:
    """Output → hash over all stages of a lock."""
    return {out["path"]: _hash(out) for stage in lock.values() for out in stage.get("outs", [])}


def _hash(entry: dict) -> str:
    return str(entry.get(entry.get("hash", "md5")) or entry.get("md5", ""))


def read_sides(workspace: Path, base: str, head: str) -> tuple[Side, Side]:
    """Both sides, read. `workspace` is the project's folder, in which git revisions are looked up.

    Raises ClearError for a name that is neither a revision nor a folder with `data/`, revisions without a common
    ancestor, and files that are there but cannot be read.
    """
    folders = [_folder(workspace, name) for name in (base, head)]
    if all(folders):
        return _read_folder(folders[0], base), _read_folder(folders[1], head)
    commits = ["" if folder else resolve(workspace, name) for folder, name in zip(folders, (base, head), strict=True)]
    if any(folders):  # a folder has no history, so the revision is taken as it is named
        base_side, head_side = (
            _read_folder(folder, name) if folder else _read_revision(workspace, name, commit, f"commit {commit[:10]}")
            for folder, name, commit in zip(folders, (base, head), commits, strict=True)
        )
        return base_side, head_side
    common = merge_base(workspace, *commits)
    origin = f"commit {common[:10]}, the merge base of {base} and {head}"
    if common != commits[0]:
        origin += f" ({base} itself is at {commits[0][:10]})"
    return (
        _read_revision(workspace, base, common, origin),
        _read_revision(workspace, head, commits[1], f"commit {commits[1][:10]}"),
    )


def read_side(workspace: Path, name: str) -> Side:
    """A revision exactly as it is named, without a merge base. Raises ClearError as read_sides."""
    commit = resolve(workspace, name)
    return _read_revision(workspace, name, commit, f"commit {commit[:10]}")


def _folder(workspace: Path, name: str) -> Path | None:
    folder = workspace / name
    return folder if name and (folder / "data").is_dir() else None


def resolve(workspace: Path, name: str) -> str:
    """Full id of the commit that a revision names. Raises ClearError if it names none."""
    if name and not name.startswith("-"):
        done = _run(workspace, ["rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"])
        if done.status == 0:
            return done.data.decode().strip()
    if is_shallow(workspace):
        remedy = (
            "this clone is shallow: complete it with `git fetch --unshallow` (`fetch-depth: 0` in a workflow), and "
            "fetch a branch it lacks with `git fetch origin BRANCH:BRANCH`"
        )
    else:
        remedy = "name a branch, a tag, a commit (`git fetch` those of a remote first), or a folder"
    raise ClearError(f"{name!r} is neither a git revision here nor a folder with data/ in it; {remedy}.")


def merge_base(workspace: Path, base: str, head: str) -> str:
    """The commit from which `head` and `base` parted. Raises ClearError if there is none in this clone."""
    done = _run(workspace, ["merge-base", base, head])
    if done.status == 0:
        return done.data.decode().split()[0]
    remedy = (
        "this clone is shallow: `git fetch --unshallow`, or `fetch-depth: 0` in a workflow"
        if is_shallow(workspace)
        else "they share no history; compare folders instead"
    )
    raise ClearError(f"{base[:10]} and {head[:10]} have no common ancestor here: {remedy}.")


def is_shallow(workspace: Path) -> bool:
    """Whether a clone lacks older commits."""
    return _run(workspace, ["rev-parse", "--is-shallow-repository"]).data.strip() == b"true"


def _run(workspace: Path, arguments: list[str], given: bytes = b"") -> Answer:
    try:
        return git(workspace, *arguments, given=given)
    except NoGit as error:
        raise ClearError("git is not installed; install it, or compare two folders.") from error


def _git(workspace: Path, arguments: list[str], given: bytes = b"") -> bytes:
    done = _run(workspace, arguments, given)
    if done.status:
        raise ClearError(f"git {arguments[0]}: {done.said}; is this clone complete?")
    return done.data


def _read_folder(folder: Path, name: str) -> Side:
    side = _read_tree(folder, name, f"folder {name}", "", {})
    records = figures.read(folder / ".clear" / "runs" / side.profile, figures.RECORDS) if side.profile else {}
    return _with(side, records, folder / "data" / "bench")


def _read_revision(workspace: Path, name: str, commit: str, origin: str) -> Side:
    with tempfile.TemporaryDirectory(prefix="clear-compare-") as made:
        folder = Path(made)
        kept = _extract(workspace, commit, folder)
        missing = {}
        for model in MODELS:
            path = f"data/predictions/{model}.parquet"
            if path not in kept:
                missing[model] = _from_dvc(workspace, commit, path, folder)
        side = _read_tree(folder, name, origin, commit, missing)
    here = read_lock(workspace / LOCK)
    # A record of this machine is this revision's if the stage was locked alike: same command, inputs and outputs.
    own = {stage for stage, entry in side.lock.items() if here.get(stage) == entry}
    records = figures.read(paths.home() / "runs" / side.profile, figures.RECORDS) if side.profile else {}
    current = {stage: record for stage, record in records.items() if stage_name(stage) in own}
    bench = workspace / "data" / "bench"
    same = side.hash_of(BENCH[1]) and outputs(here).get(BENCH[1]) == side.hash_of(BENCH[1])
    return _with(side, current, bench if same else None)


def stage_name(record: str) -> str:
    """The stage in dvc.lock of a run record's name."""
    return record.replace("evaluate_", "evaluate@", 1)


def _with(side: Side, records: dict[str, dict], bench: Path | None) -> Side:
    return replace(side, records=records, bench=bench if bench and (bench / "degraded").is_dir() else None)


def _extract(workspace: Path, commit: str, folder: Path) -> set[str]:
    """Write the wanted files of a commit below `folder` and return their paths. Links are left out."""
    blobs = tracked(workspace, commit, *WANTED)
    contents = contents_of(workspace, set(blobs.values()))
    for path, blob in blobs.items():
        if blob not in contents:
            raise ClearError(f"{commit[:10]}:{path} is not in this clone ({blob[:10]}); `git fetch` it.")
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(contents[blob])
    return set(blobs)


def _from_dvc(workspace: Path, commit: str, path: str, folder: Path) -> str:
    """Fetch a file that a revision keeps under DVC into `folder`; the reason if that cannot be done, else ''."""
    if path not in outputs(read_lock(folder / LOCK)):
        return "neither in git nor in dvc.lock"
    import dvc.api
    from dvc.exceptions import DvcException

    try:
        content = dvc.api.read(path, repo=str(workspace.resolve()), rev=commit, mode="rb")
    except (DvcException, OSError) as error:
        return f"kept under DVC and not available locally ({one_line(error)}); `dvc pull` fetches it"
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    return ""


def _read_tree(folder: Path, name: str, origin: str, commit: str, missing: dict[str, str]) -> Side:
    """The side whose files lie in `folder`; errors name them after `name`."""
    where = commit[:10] or name
    params = _yaml(folder / PARAMS, where)
    frames, absent = {}, {}
    for model in MODELS:
        file = folder / "data" / "predictions" / f"{model}.parquet"
        if not file.is_file():
            absent[model] = missing.get(model) or "no such file"
            continue
        try:
            frames[model] = predictions.read(file)
        except ClearError as error:  # the file may lie in a temporary folder, which says nothing to the reader
            raise ClearError(str(error).replace(str(folder), where)) from error
    profile = params.get("profile", "")
    if profile and not (isinstance(profile, str) and profile.isidentifier()):
        raise ClearError(f"{where}/{PARAMS}: profile = {profile!r} is not a profile's name; `make params` composes it.")
    lock = folder / LOCK
    return Side(
        name=name,
        origin=origin,
        commit=commit,
        profile=profile,
        params=params,
        lock=read_lock(lock, where),
        lock_sha=hashlib.sha256(lock.read_bytes()).hexdigest() if lock.is_file() else "",
        metrics=figures.read(folder / "data" / "metrics", figures.METRICS, f"{where}/data/metrics"),
        frames=frames,
        missing=absent,
        pins=read_pins(folder / PINS, where),
    )


def _yaml(file: Path, where: str) -> dict:
    return _mapping(_text(file, name := f"{where}/{file.name}"), name) if file.is_file() else {}


def _text(file: Path, name: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ClearError(f"{name}: byte {error.start} is not UTF-8; restore it from git.") from error


def _mapping(text: str, name: str) -> dict:
    # By DVC's own reader: what it writes is YAML 1.2, of which PyYAML takes 1e-08 for a word.
    import yaml
    from dvc.utils.serialize import YAMLFileCorruptedError, parse_yaml

    try:
        check_yaml(text, name, MOST_VALUES)
        content = parse_yaml(text, name)
    except (YAMLFileCorruptedError, yaml.YAMLError, ValueError, KeyError) as error:  # the last two: no such day, a tag
        raise ClearError(f"{name}: not valid YAML ({one_line(error.__cause__ or error)}).") from error
    if not isinstance(content, dict):
        raise ClearError(f"{name}: not a mapping of names to values; restore it from git.")
    return content


def read_lock(file: Path, where: str = "") -> dict[str, dict]:
    """The stages of a dvc.lock; `where` names its folder in errors."""
    where = where or str(file.parent)
    return _stages(_yaml(file, where), f"{where}/{LOCK}")


def lock_at(root: Path, revision: str) -> dict[str, dict]:
    """The stages of the dvc.lock of a revision. Raises ClearError if git has none there."""
    if LOCK not in tracked(root, revision, LOCK):
        raise ClearError(f"{revision} has no {LOCK}; name a later revision.")
    name = f"{revision}:./{LOCK}"
    return _stages(_mapping(output(root, "show", name), name), name)


def _stages(lock: dict, name: str) -> dict[str, dict]:
    stages = lock.get("stages") or {}
    odd = figures.misfit(stages, _STAGES, "stages")
    if odd is None:
        odd = next((f"stages.{stage}" for stage, entry in stages.items() if not _is_stage(stage, entry)), None)
    if odd is not None:
        raise ClearError(f"{name}: not a lock file of DVC ({odd}); restore it from git.")
    return stages


def _is_stage(name: object, stage: dict) -> bool:
    return isinstance(name, str) and all("path" in entry for kind in ("deps", "outs") for entry in stage.get(kind, []))


def read_pins(file: Path, where: str = "") -> dict[str, str]:
    """Package → version of a list of locked packages, {} if there is none; `where` names the project in errors."""
    if not file.is_file():
        return {}
    text = _text(file, f"{where}/{PINS}" if where else str(file))
    lines = (line.partition("==") for line in text.splitlines() if not line.startswith("#"))
    return {name: version for name, _, version in lines if version}

"""`clear lineage PATH`: data, code, parameters, parents and machine of an output, and can it be made here again?

Everything comes from dvc.lock and git, so it can be asked in a fresh clone without data and about any revision. Only
the machine is known to nobody but itself: it stands in the run record of the machine that ran the stage.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from clear.data.io import aligned
from clear.data.workspace import run_records
from clear.errors import ClearError
from clear.project.check import LOCK, lock_drifts, read_only
from clear.project.compare.changes import leaves
from clear.project.compare.load import PINS, is_shallow, lock_at, outputs, read_lock, read_pins, resolve, stage_name
from clear.project.git import git
from clear.project.release.fetch import find

if TYPE_CHECKING:
    from dvc.repo import Repo


@dataclass(frozen=True)
class Commit:
    """A commit as one line of a history."""

    id: str
    date: str
    author: str
    subject: str

    def __str__(self) -> str:
        return f"{self.id} of {self.date} by {self.author}: {self.subject}"


@dataclass(frozen=True)
class Step:
    """A stage as dvc.lock has it.

    `inputs` are paths of data with the stage that made each, empty for data that no stage makes; `code` are paths;
    `parameters` are dotted names with their values; `outputs` path → hash. `commit` is the first one whose dvc.lock
    has the outputs, None if they are not committed. `machine` is what the run record of the workspace says.
    """

    stage: str
    command: str
    inputs: dict[str, str]
    code: list[str]
    parameters: dict[str, object]
    outputs: dict[str, str]
    commit: Commit | None
    machine: str = ""

    @property
    def parents(self) -> list[str]:
        """Stages whose outputs this one read."""
        return sorted({stage for stage in self.inputs.values() if stage})


@dataclass(frozen=True)
class Lineage:
    """An output and the stages behind it, its own first and every stage before its parents.

    `places` are where the output lies (workspace, cache, git). `obstacles` say why it cannot be made again here,
    `cautions` why its bytes may come out differently.
    """

    path: str
    revision: str
    steps: list[Step]
    places: list[str]
    obstacles: list[str] = field(default_factory=list)
    cautions: list[str] = field(default_factory=list)

    def json(self) -> str:
        """All of it, machine-readable."""
        return json.dumps(asdict(self), indent=2, default=str)

    def text(self, full: bool = False) -> str:
        """What a person reads; `full` lists parameters and code, and those of every stage."""
        own = self.steps[0]
        lines = [
            f"{self.path}  MD5 {own.outputs[_holder(self.path, own.outputs)]}",
            f"  lies in      {', '.join(self.places) or 'neither the workspace nor the cache: `dvc pull` may have it'}",
        ]
        for step in self.steps if full else [own]:
            lines += ["", *_paragraph(step, full)]
        rows = [("stage", "recorded in", "on", "read", "made on")]
        for step in self.steps:
            when = (step.commit.id, step.commit.date) if step.commit else ("not committed", "–")
            rows.append((step.stage, *when, ", ".join(step.parents) or "data that no stage makes", step.machine or "–"))
        lines += ["", *aligned(rows), ""]
        if self.obstacles:
            lines.append("It cannot be made again here as it was:")
        elif self.cautions:
            lines.append("It can be made again here, but its bytes may differ:")
        else:
            lines.append("It can be made again here: code, parameters, data and packages are those it was made from.")
        return "\n".join([*lines, *(f"  - {line}" for line in self.obstacles + self.cautions)])


def lineage(root: Path, path: str, revision: str = "") -> Lineage:
    """The lineage of an output, or of a file within one, as a git revision has it; default: as dvc.lock is here.

    `path` may name a release instead (`@prod`, `grpo@v1.2.0`), which is a path and a revision.
    Raises ClearError for a path that no stage makes, with what is known about it, and for an unknown revision.
    """
    if not revision and not (root / path).exists() and (named := find(path, root)):
        path, revision = named[0].path.as_posix(), named[2]
    path = os.path.relpath(root / path, root)
    if revision:
        revision = resolve(root, revision)[:10]
    lock = lock_at(root, revision) if revision else read_lock(root / LOCK)
    made = {out: stage for stage, entry in lock.items() for out in outputs({stage: entry})}
    index = _Index(made)
    held = _holder(path, made)
    if not held:
        raise ClearError(_not_an_output(root, path, made))
    records = {} if revision else {stage_name(name): record for name, record in run_records().items()}
    introduced = _introduced(root, revision)
    steps = [
        _step(stage, lock, index, introduced, records.get(stage, {}).get("machine", ""))
        for stage in _before(lock, index, made[held])
    ]
    here = read_lock(root / LOCK) if revision else lock
    changed = [step.stage for step in steps if here.get(step.stage) != lock[step.stage]]
    obstacles, cautions = [], []
    with read_only(root) as repo:
        places = list(_places(repo, root, path, lock[made[held]], held))
        drifts = [] if changed else lock_drifts(repo, {step.stage for step in steps})
    if changed:
        obstacles.append(
            f"{LOCK} here has another version of {', '.join(changed)}: ask in a copy of that commit (`git worktree add "
            f"../then {revision}`)"
        )
    else:
        obstacles += [line.rstrip(".") for line in drifts]
        obstacles += _absent_weights(root, steps)
        cautions += _other_packages(root)
    if is_shallow(root):
        cautions.append("this clone is shallow, so an output may be older than the commit it is said to be recorded in")
    return Lineage(path, revision, steps, places, obstacles, cautions)


def _holder(path: str, made: dict[str, str]) -> str:
    """The output that is `path` or holds it; empty if there is none."""
    whole = Path(path)
    return next((out for out in made if whole == Path(out) or Path(out) in whole.parents), "")


def _not_an_output(root: Path, path: str, made: dict[str, str]) -> str:
    within = sorted(out for out in made if Path(path) in Path(out).parents)
    if within:
        more = f" and {len(within) - 6} more" if len(within) > 6 else ""
        return f"{path}: holds outputs of several stages; ask for one of {', '.join(within[:6])}{more}."
    last = git(root, "log", "-1", "--format=%h of %cs by %an: %s", "--", path)
    if last.status == 0 and last.text.strip():
        return f"{path}: no stage makes it; it is kept in git, last changed in {last.text.strip()}."
    if (root / f"{path}.dvc").exists():
        return f"{path}: no stage makes it; it was added with `dvc add`, see `git log {path}.dvc`."
    if not made:
        return f"{path}: {root.resolve()} has no {LOCK} with outputs; run this in the project's folder."
    return f"{path}: no output of {LOCK}, and not in git; the outputs are {', '.join(sorted(made)[:6])} …"


class _Index:
    """The outputs of stages, found by their paths: `made` is the stage that made each."""

    def __init__(self, made: dict[str, str]) -> None:
        self.made = made
        self._at: dict[Path, list[int]] = {}
        self._below: dict[Path, list[int]] = {}
        self._outs = list(made)
        for number, out in enumerate(self._outs):
            path = Path(out)
            self._at.setdefault(path, []).append(number)
            for folder in path.parents:
                self._below.setdefault(folder, []).append(number)

    def read(self, entry: dict) -> list[str]:
        """The outputs among what an entry of dvc.lock read, a folder of several as all of them."""
        found = []
        for dep in entry.get("deps", []):
            path = Path(dep["path"])
            numbers = {*self._below.get(path, ())}.union(*(self._at.get(place, ()) for place in (path, *path.parents)))
            found += [self._outs[number] for number in sorted(numbers)]
        return found

    def parents(self, stage: str, entry: dict) -> list[str]:
        """The other stages whose outputs a stage with this entry of dvc.lock read."""
        return sorted({self.made[out] for out in self.read(entry) if out} - {stage})


def _before(lock: dict, index: _Index, stage: str) -> list[str]:
    """A stage and all before it: every stage stands before those it read from."""
    found: list[str] = []
    entered, way = {stage}, [(stage, iter(index.parents(stage, lock[stage])))]
    while way:
        name, parents = way[-1]
        parent = next((parent for parent in parents if parent not in entered), None)
        if parent is None:
            found.append(name)
            way.pop()
        else:
            entered.add(parent)
            way.append((parent, iter(index.parents(parent, lock[parent]))))
    return found[::-1]


def _step(stage: str, lock: dict, index: _Index, introduced: dict[str, tuple[int, Commit]], machine: str) -> Step:
    entry = lock[stage]
    inputs, code = {}, []
    for dep in entry.get("deps", []):
        read = index.read({"deps": [dep]})
        if read or dep["path"].startswith("data/"):
            inputs |= {out: index.made[out] for out in read} or {dep["path"]: ""}
        else:
            code.append(dep["path"])
    given = {key: value for values in entry.get("params", {}).values() for key, value in leaves(values)}
    hashes = outputs({stage: entry})
    return Step(stage, _command(entry), inputs, code, given, hashes, _first(introduced, hashes), machine)


def _command(entry: dict) -> str:
    command = entry.get("cmd", "")
    return command if isinstance(command, str) else " && ".join(command)


def _introduced(root: Path, revision: str) -> dict[str, tuple[int, Commit]]:
    """The first commit that brought each hash into dvc.lock, and its place in the history, by one walk through it."""
    said = git(
        root,
        "-c",
        "log.showRoot=true",
        "log",
        "--topo-order",  # dates may be wrong: a commit after its parents
        "--reverse",
        "--diff-merges=separate",  # those that no parent has: a conflict that was resolved by a new run
        "-p",
        "-U0",
        "--text",  # whatever attributes say of lock files
        "--no-color",
        "--no-ext-diff",
        "--no-textconv",
        "--format=%x00%h%x09%cs%x09%an%x09%s",
        revision or "HEAD",
        "--",
        LOCK,
    )
    if said.status:
        if git(root, "rev-parse", "--quiet", "--verify", revision or "HEAD").status:
            return {}  # nothing is committed yet
        raise ClearError(f"{root.resolve()}: the history of {LOCK} cannot be read: {said.said}.")
    found: dict[str, tuple[int, Commit]] = {}
    for place, entry in enumerate(said.text.split("\0")[1:]):
        head, *changes = entry.split("\n")
        commit = Commit(*head.split("\t", 3))
        for line in changes:
            if line.startswith("+") and line[1:].strip():
                found.setdefault(line.split()[-1].strip("'\""), (place, commit))
    return found


def _first(introduced: dict[str, tuple[int, Commit]], hashes: dict[str, str]) -> Commit | None:
    """The first commit whose dvc.lock has all of these outputs: the one after which none is new."""
    if not all(value in introduced for value in hashes.values()):
        return None
    return max((introduced[value] for value in hashes.values()), key=lambda found: found[0], default=(0, None))[1]


def _paragraph(step: Step, full: bool) -> list[str]:
    given = [f"{key}={_short(value)}" for key, value in step.parameters.items()]
    data = [f"{path} ({stage or 'no stage makes it'})" for path, stage in step.inputs.items()]
    return [
        f"{step.stage}: {step.command}",
        f"  recorded in  {step.commit or 'no commit yet'}",
        f"  data         {', '.join(data) or 'none'}",
        f"  parameters   {', '.join(given) or 'none' if full else f'{len(given)} (--full lists them)'}",
        f"  code         {', '.join(step.code) or 'none' if full else f'{len(step.code)} files and folders'}",
    ]


def _short(value: object) -> str:
    return json.dumps(value) if not isinstance(value, str) else value


def _absent_weights(root: Path, steps: list[Step]) -> list[str]:
    """Checkpoints that parameters name and that are not here; such files are no dependency of a stage."""
    found = []
    for key in ("model.base", "model.checkpoint"):
        named = {str(step.parameters.get(key) or "") for step in steps} - {""}
        found += [f"{key} = {name}: no such folder" for name in sorted(named) if not (root / name).exists()]
    return found


def _other_packages(root: Path) -> list[str]:
    """Locked packages that are installed in another version."""
    others = []
    for name, version in read_pins(root / PINS).items():
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # an extra, or a package of another platform
        if installed.partition("+")[0] != version.partition("+")[0]:
            others.append(f"{name} {installed} instead of {version}")
    if not others:
        return []
    more = f" and {len(others) - 4} more" if len(others) > 4 else ""
    return [f"{PINS} locks other packages than are installed: {', '.join(others[:4])}{more}"]


def _places(repo: "Repo", root: Path, path: str, stage: dict, held: str) -> Iterator[str]:
    """Where the version of an output that a stage of the lock names lies."""
    value = outputs({"": stage})[held]
    out = next((out for out in repo.index.outs if os.path.relpath(out.fs_path, root) == held), None)
    same = out is not None and out.hash_info.value == value
    if same and out.exists and not out.changed_checksum() and (root / path).exists():
        yield "the workspace"
    if out is not None and not out.use_cache:
        if git(root, "ls-files", "--error-unmatch", held).status == 0:
            yield "git"
    elif _in_cache(repo, value):
        yield "the cache"


def _in_cache(repo: "Repo", value: str) -> bool:
    """Whether DVC's cache has a file, or a folder with every file in it."""
    cache = repo.cache.local
    if not value or not cache.exists(value):
        return False
    if not value.endswith(".dir"):
        return True
    entries = json.loads(Path(cache.oid_to_path(value)).read_text())
    return all(cache.exists(entry["md5"]) for entry in entries)

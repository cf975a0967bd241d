"""`clear check`: does what is committed belong together? Works on a fresh clone, without data and without cache.

`dvc.lock` records what every stage was run with. DVC's own status commands need the data or report missing cache
files instead, so this compares the lock with what a clone does have: the stages and commands of dvc.yaml, the values
of params.yaml, the code, the outputs kept in git, and the lock with itself (a stage must have read what the stage
before it wrote). It also compares params.yaml with the composition of clear/conf, because `dvc exp run` recomposes it
silently. Hashes are DVC's own. Nothing is written to the project, which may be one that can only be read.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clear.config import PARAMS, compose, load
from clear.errors import ClearError, one_line

if TYPE_CHECKING:
    from dvc.dependency.param import ParamsDependency
    from dvc.output import Output
    from dvc.repo import Repo
    from dvc.stage import PipelineStage, Stage

LOCK = "dvc.lock"


def drifts(root: Path) -> list[str]:
    """Every disagreement under `root` as one line with its remedy; empty if all agree.

    Raises ClearError where a file cannot be read at all (invalid params.yaml, dvc.yaml or dvc.lock, no DVC here).
    """
    lines = composition_drifts(root)
    with read_only(root) as repo:
        return lines + lock_drifts(repo)


@contextmanager
def read_only(root: Path) -> Iterator["Repo"]:
    """The DVC project at `root`, opened without the files that DVC makes in it; hashes are cached where they may be.

    Raises ClearError for what DVC cannot read, also within the block.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    with tempfile.TemporaryDirectory(prefix="clear-check-") as made:

        class Reader(Repo):
            tmp_dir = made

            @property
            def site_cache_dir(self) -> str:
                try:
                    usual = Path(super().site_cache_dir)
                    usual.mkdir(exist_ok=True)
                except OSError:
                    return made
                return str(usual) if os.access(usual, os.W_OK) else made

            def _ignore(self) -> None:
                """Not even .gitignore is completed."""

        try:
            with Reader(str(root)) as repo:
                yield repo
        except DvcException as error:
            raise ClearError(f"{root.resolve()}: DVC cannot read this project: {one_line(error)}.") from error


def composition_drifts(root: Path) -> list[str]:
    """Keys whose value in params.yaml is not the one that clear/conf composes to."""
    from omegaconf import OmegaConf

    load(root / PARAMS)
    written = OmegaConf.to_container(OmegaConf.load(root / PARAMS), resolve=True)
    return [
        f"{PARAMS}: {key} is {_shown(here)}, clear/conf composes to {_shown(there)}: `clear params --adopt` keeps it, "
        "`make params` discards it."
        for key, here, there in differences(written, compose())
    ]


def lock_drifts(repo: "Repo", stages: set[str] | None = None) -> list[str]:
    """Disagreements between dvc.lock and the workspace of `repo`; stages with the same one share a line. With `stages`,
    of those alone."""
    from dvc.stage import PipelineStage

    root = Path(repo.root_dir)
    if not (root / LOCK).exists():
        return [f"{LOCK} is not here: restore it with `git checkout {LOCK}`, or run `dvc repro`."]
    locked = _locked_stages(root / LOCK)
    written = {out.fs_path: (out, _producer(stage)) for stage in repo.index.stages for out in stage.outs}
    grouped: dict[tuple[str, str], list[str]] = {}
    for stage in repo.index.stages:
        if not isinstance(stage, PipelineStage):  # data added with `dvc add` carries its own lock
            continue
        name = stage.name
        if stages is not None and name not in stages:
            continue
        if name not in locked:
            grouped[f"{name} is in dvc.yaml but not in {LOCK}", ""] = [name]
            continue
        for finding in _stage_drifts(stage, written):
            grouped.setdefault(finding, []).append(name)
    return [_line(what, remedy, names) for (what, remedy), names in grouped.items()]


def _producer(stage: "Stage") -> str:
    return getattr(stage, "name", None) or Path(stage.path).name


def _line(what: str, remedy: str, names: list[str]) -> str:
    target = f"dvc repro {names[0]}" if len(names) == 1 else "dvc repro"
    return f"{what} (stage {', '.join(names)}): run `{target}`{remedy}."


def _locked_stages(file: Path) -> set[str]:
    import yaml

    try:
        return set(yaml.safe_load(file.read_text())["stages"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ClearError(f"{file}: not a lock file of DVC; restore it with `git checkout {LOCK}`.") from error


def _stage_drifts(stage: "PipelineStage", written: dict[str, tuple["Output", str]]) -> Iterator[tuple[str, str]]:
    """(what is wrong, further remedy) for one stage that is in the lock."""
    from dvc.dependency.param import ParamsDependency

    if stage.cmd_changed:
        yield f"{stage.name} has another command in dvc.yaml than in {LOCK}", ""
    for dep in stage.deps:
        if isinstance(dep, ParamsDependency):
            yield from _param_drifts(dep)
        elif not dep.hash_info:
            yield f"{dep.def_path} is a dependency in dvc.yaml but not in {LOCK}", ""
        elif dep.fs_path in written:
            out, producer = written[dep.fs_path]
            if out.hash_info and out.hash_info != dep.hash_info:
                yield f"{dep.def_path} was read in another version than {producer} has in {LOCK}", ""
        elif not any(_lies_in(path, dep.fs_path) and not out.exists for path, (out, _) in written.items()):
            # A folder that holds added data which are not pulled cannot be compared.
            yield from _file_drifts(dep, "dependency")
    for out in stage.outs:
        if not out.hash_info:
            yield f"{out.def_path} is an output in dvc.yaml but not in {LOCK}", ""
        elif not out.use_cache:  # kept in git
            yield from _file_drifts(out, "result")


def _lies_in(path: str, folder: str) -> bool:
    return Path(path) != Path(folder) and Path(path).is_relative_to(folder)


def _param_drifts(dep: "ParamsDependency") -> Iterator[tuple[str, str]]:
    recorded, actual = dep.hash_info.value or {}, dep.read_params()
    for param in dep.params:
        for key, here, there in differences(actual.get(param, ABSENT), recorded.get(param, ABSENT), param):
            yield f"{dep.def_path}: {key} is {_shown(here)}, {LOCK} has {_shown(there)}", ""


def _file_drifts(file: "Output", kind: str) -> Iterator[tuple[str, str]]:
    restore = f", or restore it with `git checkout {file.def_path}`"
    if not file.exists:
        yield f"{kind} {file.def_path} is missing", restore
    elif file.changed_checksum():
        yield f"{kind} {file.def_path} is not the version in {LOCK}", restore


ABSENT = object()


def _shown(value: Any) -> str:
    return "absent" if value is ABSENT else repr(value)


def differences(here: Any, there: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value here, value there) of every leaf in which two nested dictionaries differ; a value that is not
    there is ABSENT."""
    if isinstance(here, dict) and isinstance(there, dict):
        for key in here | there:
            yield from differences(here.get(key, ABSENT), there.get(key, ABSENT), f"{name}.{key}".lstrip("."))
    elif here != there:
        yield name, here, there

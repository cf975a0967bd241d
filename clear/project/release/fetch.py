"""A released model by name: `@prod`, `grpo@prod`, `@v1.2.0` or `grpo@v1.2.0` where a command takes a model folder.

    $CLEAR_HOME/releases/<hash>/<model>-<version>/     the files of a version, verified

What is in a stage is decided by the tags of this clone, once, when the command starts; files come from DVC's cache or
remote. The hash is that of the dvc.lock of the version's commit: a tag may be set anew, and clones that share the
folder may have different releases under one name. A folder that is there was written whole and has that hash.
"""

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import yaml

from clear.config import load
from clear.data.io import sync
from clear.data.lock import making
from clear.data.workspace import home
from clear.errors import ClearError, one_line
from clear.project.check import LOCK
from clear.project.git import output
from clear.project.release import registry

if TYPE_CHECKING:
    from dvc.repo import Repo

_NAME = re.compile(r"(?P<model>[A-Za-z0-9][\w/-]*)?@(?P<which>[A-Za-z0-9][\w.+-]*)")
_HASH = re.compile(r"[0-9a-f]{32}\.dir")
"""What dvc.lock has for a folder."""


def released(given: Path, root: Path = Path()) -> Path:
    """The folder of a released model, fetched if need be; any other path, or one that exists, as it is.

    Raises ClearError for an empty stage, an unknown version, a release without the model, and files that are in no
    cache or remote, or not those of the release.
    """
    if given.exists() or (named := find(str(given), root)) is None:
        return given
    entry, version, commit = named
    wanted = _hash(root, entry.name, version, commit)
    # Programs call the model by the last part of its path, which stays the same whatever the hash is.
    folder = home() / "releases" / wanted.removesuffix(".dir") / f"{entry.name}-{version}".replace("/", "_")
    with making(folder, f"download of {entry.name} {version}", "wait"):
        if not folder.is_dir():
            _fetch(root, entry.name, version, wanted, folder)
    return folder


def find(name: str, root: Path) -> tuple[registry.Artifact, str, str] | None:
    """The model, version and commit that `name` stands for, or None where it is no name of a release.

    Raises ClearError for an empty stage and an unknown version.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    model = match["model"] or load(root / "params.yaml").gate.model
    return registry.artifact(root, model), *_resolve(root, model, match["which"])


def _resolve(root: Path, model: str, which: str) -> tuple[str, str]:
    known = registry.versions(root, model)
    version = which if which in known else registry.in_stage(root, model, which)
    if not version or version not in known:
        listed = ", ".join(known) or "none"
        raise ClearError(
            f"{model}@{which}: no version and no stage with one in it (versions: {listed}); `git fetch --tags` brings "
            f"those of others, `clear release {model} --history` lists them."
        )
    return version, known[version]


@contextmanager
def data_of(root: Path, commit: str, paths: Sequence[Path]) -> Iterator[Path]:
    """A folder with outputs of the pipeline as they were at a commit, from DVC's cache or remote; gone after the block.

    Raises ClearError where DVC has them no more.
    """
    from dvc.exceptions import DvcException

    home().mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=home()) as folder:
        try:
            with _opened(root) as repo, repo.switch(commit):
                for path in paths:
                    repo.dvcfs.get(str(path), str(Path(folder) / path), recursive=True)
        except (DvcException, OSError) as error:
            raise ClearError(
                f"the data of commit {commit[:10]} cannot be fetched ({one_line(error)}); run `dvc push` in the clone "
                "that made it, or check `dvc remote list` and its credentials."
            ) from error
        yield Path(folder)


@contextmanager
def _opened(root: Path) -> Iterator["Repo"]:
    """The repository for reading at a revision, where DVC takes a remote's relative path for one from the root of the
    file system: here remotes have their whole addresses."""
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        remotes = {name: {"url": remote["url"]} for name, remote in repo.config["remote"].items()}
    with Repo(str(root), config={"remote": remotes}) as repo:
        yield repo


def _fetch(root: Path, model: str, version: str, wanted: str, folder: Path) -> None:
    """Bring the files of a version. Raises ClearError where they are not to be had, or have another hash."""
    from dvc.exceptions import DvcException
    from dvc_data.index import DataIndexDirError

    from clear.project.release.export import directory_hash  # which needs torch

    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _opened(root) as repo:
            repo.artifacts.download(model, version=version, out=str(partial))
    except (DvcException, DataIndexDirError, OSError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ClearError(
            f"{model} {version} cannot be fetched ({one_line(error)}); check `dvc remote list` and its credentials."
        ) from error
    if directory_hash(partial) != wanted:
        shutil.rmtree(partial)
        raise ClearError(
            f"{model} {version}: what DVC has is not what the release's {LOCK} names (MD5 {wanted}); run `dvc fetch` "
            "in a clone at that version, and `dvc push` where it is whole."
        )
    sync(partial)
    partial.replace(folder)


def _hash(root: Path, model: str, version: str, commit: str) -> str:
    """The hash of a model's folder in the dvc.lock of its release. Raises ClearError where that has none."""
    from clear.project.compare.load import lock_at, outputs

    hashes = outputs(lock_at(root, commit))
    stated = yaml.safe_load(output(root, "show", f"{commit}:./{registry.FILE}")) or {}
    path = ((stated.get("artifacts") or {}).get(model) or {}).get("path", "")
    found = hashes.get(path, "")
    if not _HASH.fullmatch(found):
        raise ClearError(
            f"{model} {version}: the {LOCK} of commit {commit[:10]} has no such model; `clear release {model} "
            "--history` lists other versions."
        )
    return found

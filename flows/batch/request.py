"""What a job is to reproduce: the stage's inputs by content, and how a workspace with them is made elsewhere.

A commit alone is not enough: the stages before have just written entries of dvc.lock, metrics and parameters that
are not committed. So a request carries a git bundle of the commit plus the current dvc.lock, params.yaml and the
small outputs that live in git. The other side makes a workspace of it, pulls what DVC keeps from the remote, and then
computes the same description of the inputs: if one hash differs, nothing is run.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clear.config import PARAMS
from clear.data.records import file_sha256
from clear.errors import ClearError
from clear.project.git import output
from flows.batch.notes import Inputs
from flows.batch.settings import COMPUTE
from flows.batch.store import Store, split
from flows.dvc_commands import address

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

LOCK = "dvc.lock"
CACHED, CARRIED, CODE = "cached", "carried", "code"
REMOTE_KEYS = ("url", "endpointurl", "region", "version_aware")
"""Of a DVC remote's settings, what a job is told; never a credential."""


def find_stage(repo: "Repo", name: str) -> "PipelineStage":
    """The stage of that name. Raises ClearError if there is none."""
    for stage in repo.index.stages:
        if address(stage, Path(repo.root_dir)) == name:
            return stage
    raise ClearError(f"{repo.root_dir}: no stage {name}; `dvc stage list` shows what there is.")


def describe(stage: str, workspace: Path) -> Inputs:
    """The inputs of a stage as they are now; of data that is not here, what dvc.lock says its stage has made.

    Raises ClearError where an input is missing, or is not what the stage before it wrote.
    """
    from dvc.dependency.param import ParamsDependency
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    deps, kinds, params = {}, {}, {}
    try:
        with Repo(str(workspace)) as repo:
            described = find_stage(repo, stage)
            written = {out.fs_path: out for other in repo.index.stages for out in other.outs}
            for dep in described.deps:
                if isinstance(dep, ParamsDependency):
                    params |= {name: dep.read_params().get(name) for name in dep.params}
                    continue
                path = os.path.relpath(dep.fs_path, workspace)
                maker = written.get(dep.fs_path)
                deps[path] = _hash(dep, maker, path)
                kinds[path] = CODE if maker is None else _kind(maker)
                below = [out for out in written.values() if dep.fs_path in map(str, Path(out.fs_path).parents)]
                kinds |= {os.path.relpath(out.fs_path, workspace): _kind(out) for out in below}
            outs = {os.path.relpath(out.fs_path, workspace): bool(out.use_cache) for out in described.outs}
            return Inputs(stage, described.cmd, deps, kinds, params, outs)
    except DvcException as error:
        raise ClearError(f"{workspace}: DVC cannot read this project: {error}.") from error


def _kind(out: Any) -> str:
    return CACHED if out.use_cache else CARRIED


def _hash(dep: Any, maker: Any, path: str) -> str:
    recorded = maker.hash_info.value if maker is not None and maker.hash_info else None
    actual = dep.get_hash().value if dep.exists else None
    if maker is not None and recorded is None:
        raise ClearError(f"{path}: {LOCK} has no entry of the stage that makes it; reproduce that one first.")
    if recorded and actual and recorded != actual:
        raise ClearError(
            f"{path} is not what its stage wrote (hash {actual[:12]}, {LOCK} has {recorded[:12]}); reproduce that "
            f"stage, or restore the file with `dvc checkout {path}`."
        )
    if (actual or recorded) is None:
        raise ClearError(f"{path} is missing; restore it.")
    return actual or recorded


def differences(wanted: Inputs, actual: Inputs) -> list[str]:
    """One line for each input in which two descriptions differ."""
    asked, given = asdict(wanted), asdict(actual)
    named = [name for name in ("stage", "cmd") if asked[name] != given[name]]
    lines = [f"{name}: {given[name]!r} instead of {asked[name]!r}" for name in named]
    for part in ("deps", "params", "outs"):
        for name in sorted(asked[part] | given[part]):
            here, there = asked[part].get(name), given[part].get(name)
            if json.dumps(here, sort_keys=True, default=str) != json.dumps(there, sort_keys=True, default=str):
                lines.append(f"{name}: {there} instead of {here}")
    return lines


def send(store: Store, inputs: Inputs, key: str, workspace: Path, **more: Any) -> str:
    """Upload everything a job needs for `inputs` and return the name of its request.

    Raises ClearError if code is not committed, the clone is shallow, or the DVC remote is not in the store's bucket.
    """
    remote = remote_for_jobs(workspace, store.bucket)
    commit = _committed(workspace, inputs)
    bundle = workspace / ".clear" / f"{commit}.bundle"
    bundle.parent.mkdir(exist_ok=True)
    name = f"bundles/{commit}-{uuid.uuid4().hex[:8]}"
    try:
        output(workspace, "bundle", "create", "--quiet", str(bundle), "HEAD")
        digest = file_sha256(bundle)
        store.put(bundle, name)
    finally:
        bundle.unlink(missing_ok=True)
    carried = expand(workspace, [LOCK, str(PARAMS), *(p for p, kind in inputs.kinds.items() if kind == CARRIED)])
    content = {
        "inputs": asdict(inputs),
        "key": key,
        "commit": commit,
        "bundle": {"name": name, "sha256": digest},
        "files": {path: store.keep(workspace / path) for path in carried},
        "remote": remote,
        **more,
    }
    request = f"requests/{key}/{uuid.uuid4().hex[:12]}.json"
    store.write(request, content)
    return request


def environment_tag(workspace: Path) -> str:
    """Tag of the container image with the environment of this workspace: its Dockerfile and locked versions."""
    digest = hashlib.sha256()
    for name in ("infra/Dockerfile", "infra/constraints.txt", "infra/hashes.txt", "infra/install.sh", "pyproject.toml"):
        if not (workspace / name).exists():
            raise ClearError(f"{workspace / name} is missing; restore it, or name an image as compute.image.")
        digest.update((workspace / name).read_bytes())
    return f"env-{digest.hexdigest()[:12]}"


def expand(workspace: Path, names: list[str]) -> list[str]:
    """The files that these names stand for: a folder's are all below it; one that is not there has none."""
    files = []
    for name in names:
        inside = sorted(path for path in (workspace / name).rglob("*") if path.is_file())
        files += [path.relative_to(workspace).as_posix() for path in inside]
        files += [name] if (workspace / name).is_file() else []
    return files


def remote_for_jobs(workspace: Path, bucket: str) -> dict[str, Any]:
    """What a job is told of the default DVC remote, in which its data lies. Raises ClearError unless that is in the
    stack's `bucket`, the only one that JobRole may write to: an instance would be paid for to find out."""
    from dvc.repo import Repo

    with Repo(str(workspace)) as repo:
        name = repo.config["core"].get("remote")
        settings = repo.config["remote"].get(name, {}) if name else {}
    if not str(settings.get("url", "")).startswith("s3://"):
        raise ClearError(
            f"{workspace}: a stage in the cloud reads and writes its data in S3, and the default DVC remote is "
            f"{settings.get('url') or 'not set'}; set it with `make remote BUCKET={bucket}/dvc`."
        )
    if (foreign := split(settings["url"])[0]) != bucket:
        raise ClearError(
            f"{workspace}: the default DVC remote is {settings['url']}, and a job may write to bucket {bucket} alone, "
            f"not to {foreign}; set it with `make remote BUCKET={bucket}/dvc` and `dvc push` what the stages read."
        )
    return {key: settings[key] for key in REMOTE_KEYS if settings.get(key) is not None}


def _committed(workspace: Path, inputs: Inputs) -> str:
    """The commit of HEAD, which has all the code. Raises ClearError naming what is not committed."""
    from dvc.repo import Repo

    if output(workspace, "rev-parse", "--is-shallow-repository").strip() == "true":
        raise ClearError(f"{workspace} is a shallow clone; complete it with `git fetch --unshallow`.")
    with Repo(str(workspace)) as repo:
        made = {os.path.relpath(out.fs_path, workspace) for stage in repo.index.stages for out in stage.outs}
    carried = {LOCK, str(PARAMS), str(COMPUTE), *made}  # no job reads the last one
    code = [path for path, kind in inputs.kinds.items() if kind == CODE]
    listed = output(workspace, "status", "--porcelain", "-z", "--no-renames", "--untracked-files=all").split("\0")
    changed = []
    for state, name in ((line[:2], line[3:]) for line in listed if line):
        ours = any(name == path or name.startswith(f"{path}/") for path in code)
        if name not in carried and (ours or state != "??"):
            changed.append(name)
    if changed:
        raise ClearError(
            f"{', '.join(changed[:5])}{' …' if len(changed) > 5 else ''}: not committed, and a job gets its code from "
            "a commit; commit it and repeat."
        )
    return output(workspace, "rev-parse", "HEAD").strip()


def check_out(store: Store, request: dict, folder: Path) -> None:
    """Make `folder` a clone at the commit of a request."""
    bundle = folder.with_suffix(".bundle")
    store.fetch(request["bundle"]["name"], bundle, request["bundle"]["sha256"])
    output(folder.parent, "clone", "--quiet", "--no-checkout", str(bundle), str(folder))
    bundle.unlink()
    output(folder, "checkout", "--quiet", "--detach", request["commit"])


def receive(store: Store, request: dict, folder: Path, pull: Callable[[Path, list[str]], None]) -> Inputs:
    """Make the clone `folder` a workspace with the inputs of a request; `pull(workspace, paths)` brings what DVC keeps.

    Raises ClearError naming every input that is not what the request says: a job never runs on anything else.
    """
    wanted = Inputs(**request["inputs"])
    if not folder.exists():
        check_out(store, request, folder)
    for name, digest in request["files"].items():
        store.fetch(f"objects/{digest}", folder / name, digest)
    settings = "".join(f"    {name} = {value}\n" for name, value in request["remote"].items())
    (folder / ".dvc" / "config.local").write_text(f"[core]\n    remote = storage\n['remote \"storage\"']\n{settings}")
    if needed := [path for path, kind in wanted.kinds.items() if kind == CACHED]:
        pull(folder, needed)
    lacking = [path for path in wanted.deps if not (folder / path).exists()]
    if lacking:
        raise ClearError(f"{', '.join(lacking)}: neither in the commit nor in the DVC remote; `dvc push` there first.")
    actual = describe(wanted.stage, folder)
    if lines := differences(wanted, actual):
        raise ClearError(f"stage {wanted.stage} is not run, its inputs are not the requested ones: {'; '.join(lines)}.")
    return wanted

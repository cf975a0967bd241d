"""The pretrained weights that a job reads: whether it may, before it is submitted, and how it fetches them.

`model.checkpoint` is a path on the flow's machine, whose files a job takes from `compute.weights`, or an address in S3,
which the stage fetches by itself (clear/model/weights.py). The stack's JobRole may read the stack's own bucket and that
of `compute.weights` (infra/stack.yaml).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from clear.config import PARAMS
from clear.data import aws
from clear.data.records import file_sha256
from clear.errors import ClearError
from clear.model.weights import READERS
from flows.batch.settings import COMPUTE
from flows.batch.store import Store, client, split


def sources(model: Mapping[str, Any], weights: str) -> dict[str, str]:
    """Setting → address in S3 of what is read under these `model` parameters and `compute.weights`.

    Raises ClearError where a local checkpoint cannot be had from there.
    """
    given = {f"model.{name}": str(model.get(name) or "") for name in ("checkpoint", "base")}
    there = {name: address for name, address in given.items() if address.startswith("s3://")}
    if not given["model.checkpoint"] or "model.checkpoint" in there:
        return there
    if given["model.base"]:
        raise ClearError("params: model.base is not brought to a job; make one whole folder (docs/PUBLISHED.md).")
    if not weights:
        raise ClearError("params: model.checkpoint is set and compute.weights is not; name the weights' s3:// prefix.")
    return {"compute.weights": weights}


def refuse_unreadable(stage: str, workspace: Path, weights: str, bucket: str, further: str) -> None:
    """Raise ClearError where the job of a stage would need weights that it may not read: the instance would be paid for
    nothing. It may read the stack's `bucket`, and the one for which the stack was given the right (`further`, if any).
    """
    for setting, address in sources(_model(workspace), weights).items():
        if setting != "compute.weights" and stage.partition("@")[0] not in READERS:
            continue  # it never looks at them
        if (foreign := split(address)[0]) in (bucket, further):
            continue
        name = setting if setting == "compute.weights" else f"params: {setting}"
        allow = "" if weights and split(weights)[0] == foreign else f"set compute.weights = {address} in {COMPUTE} and "
        raise ClearError(
            f"{name} = {address}: a job may not read bucket {foreign}; {allow}run `make stack`, which gives it that "
            f"right, or copy the files into s3://{bucket} and name them there."
        )


def fetch_weights(folder: Path, address: str, say: Callable[[str], None]) -> None:
    """Bring the files of `model.checkpoint` from S3; those that the base's manifest lists must have its hashes.

    Does nothing for a model trained from scratch, and where `model.checkpoint` is itself in S3: the stage fetches that.
    Raises ClearError without an address, or for a wrong file.
    """
    from clear.model.checkpoint import named_file, recorded

    model = _model(folder)
    if "compute.weights" not in sources(model, address):
        return
    bucket, prefix = split(address.rstrip("/") + "/")
    store = Store(client("s3"), bucket, prefix.rstrip("/"))
    target, _ = named_file(folder / model["checkpoint"])
    manifest = folder / "data/models/base/manifest.json"
    known = recorded(manifest, "run the base stage again") if manifest.exists() else {}
    names = [name for name in store.names("") if name and not name.endswith("/")]  # not the console's empty folders
    if not names or (lacking := sorted(set(known) - set(names))):
        raise ClearError(f"{address}: {', '.join(lacking) if names else 'nothing'} there of the base's weights.")
    for name in names:
        file = target / name
        if not file.resolve().is_relative_to(target.resolve()):
            raise ClearError(f"{address}/{name} would be written outside {target}; rename it.")
        file.parent.mkdir(parents=True, exist_ok=True)
        with aws.explained(store.url(name)):
            store.client.download_file(bucket, f"{store.prefix}/{name}", str(file))
        if name in known and file_sha256(file) != known[name]["sha256"]:
            raise ClearError(f"{address}/{name} is not the file that the base was registered with; upload that one.")
    say(f"weights: {len(names)} files from {address}")


def _model(folder: Path) -> dict[str, Any]:
    return (yaml.safe_load((folder / PARAMS).read_text()) or {}).get("model") or {}

"""Where new degradation data comes from and where rejected data goes: a folder of the workspace, or a prefix in S3.

Every folder below the prefix is a set. It is mirrored to the private folder; unchanged objects (by ETag) are not
fetched again; the mirror is a cache and may be deleted. Rejected data is moved, in S3 next to the prefix:
`…/incoming/x` becomes `…/quarantine/x`. Its report is next to it, in `x.report`. Nothing can be lost in between: the
report is written before the data moves, and in S3 an object is deleted only after it has been copied.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from clear.data import aws
from clear.data.io import remembered, replacing, write_json
from clear.data.lock import writer
from clear.data.workspace import profile
from clear.errors import ClearError, shown
from clear.sources.incoming import IncomingSet, sets

FOLDER = "data/incoming"
QUARANTINE = "quarantine"


@dataclass(frozen=True)
class Source:
    """Where sets are looked for; `named` is the user's word for it. `bucket` and `prefix` are "" for a folder, `mirror`
    holds what came from S3."""

    workspace: Path
    folder: Path
    mirror: Path
    named: str
    bucket: str = ""
    prefix: str = ""

    @staticmethod
    def of(workspace: Path, incoming: str, mirror: Path) -> "Source":
        """The source that `incoming` names. Raises ClearError for a URL without a prefix and a folder elsewhere."""
        if not incoming.startswith("s3://"):
            folder = (workspace / incoming).resolve()
            if not folder.is_dir():
                raise ClearError(f"incoming = {incoming}: neither a folder of {workspace} nor an s3://bucket/prefix.")
            return Source(workspace, folder, mirror, incoming)
        bucket, _, prefix = incoming.removeprefix("s3://").strip("/").partition("/")
        if not bucket or not prefix:
            raise ClearError(f"incoming = {incoming}: name a prefix too, such as s3://bucket/incoming.")
        return Source(workspace, mirror, mirror, incoming, bucket, prefix)

    def fetch(self, dvc: Callable[[list[str], Path], object], say: Callable[[str], None]) -> Path:
        """Bring what is missing of every set and return the folder with the sets."""
        if self.bucket:
            self._download(say)
            return self.mirror
        absent = [incoming.name for incoming in sets(self.folder) if not incoming.present]
        if absent and default_remote(self.workspace):
            with writer(self.workspace, say=say):
                dvc(["pull", "--allow-missing", *(f"{self.folder / name}.dvc" for name in absent)], self.workspace)
        elif absent:
            say(f"{', '.join(absent)}: only the .dvc file is here and no default DVC remote is set; not looked at.")
        return self.folder

    def age(self, name: str) -> float:
        """Seconds since something was last added to a set or changed in it."""
        if self.bucket:
            objects = json.loads(self._listing.read_text())
            times = [item["written"] for path, item in objects.items() if path.startswith(f"{name}/")]
        else:  # a copy may bring its time of modification along, not that of the change here
            times = [path.lstat().st_ctime for path in [self.folder / name, *(self.folder / name).rglob("*")]]
        return time.time() - max(times)

    @property
    def _listing(self) -> Path:
        return self.mirror.with_name(f"{self.mirror.name}.json")

    def quarantine(self, incoming: IncomingSet, copy: Path, problem: str) -> str:
        """Move a refused set, with the report of its check in the clone `copy`; returns the new place."""
        report = report_of(incoming.name, copy)
        write_json(
            report / "refused.json", {"name": incoming.name, "fingerprint": incoming.fingerprint, "problem": problem}
        )
        if self.bucket:
            return self._move(incoming, report)
        quarantined = self.folder.parent / QUARANTINE
        target = quarantined / incoming.name
        if target.exists():  # an earlier version of it
            target = quarantined / f"{incoming.name}-{incoming.fingerprint[:8]}"
        quarantined.mkdir(exist_ok=True)
        shutil.rmtree(quarantined / f"{target.name}.report", ignore_errors=True)
        shutil.copytree(report, quarantined / f"{target.name}.report")
        with writer(self.workspace):
            shutil.rmtree(target, ignore_errors=True)
            (self.folder / incoming.name).rename(target)
            (self.folder / f"{incoming.name}.dvc").unlink(missing_ok=True)
        return str(target.relative_to(self.workspace))

    def _objects(self, client: Any, say: Callable[[str], None] = lambda text: None) -> dict[str, dict]:
        """Path below the prefix → ETag, size and when it was written. Raises ClearError where the store refuses.

        Left out, and said, is a key that is no path below a folder: of `incoming//etc/x` it would be another one.
        """
        objects = {}
        with asked(f"s3://{self.bucket}/{self.prefix}"):
            for item in aws.listed(client, self.bucket, f"{self.prefix}/"):
                name = item["Key"].removeprefix(f"{self.prefix}/")
                parts = name.removesuffix("/").split("/")
                if not {"", ".", ".."}.isdisjoint(parts) and name:
                    say(f"s3://{self.bucket}/{shown(item['Key'])}: no path of a file can have this key; not fetched")
                elif len(parts) > 1 and not name.endswith("/"):
                    written = item["LastModified"].timestamp()
                    objects[name] = {"etag": item["ETag"], "size": item["Size"], "written": written}
        return objects

    def _download(self, say: Callable[[str], None]) -> None:
        client = store(self.workspace)
        there = self._objects(client, say)
        file = self._listing
        had = remembered(file)
        self.mirror.mkdir(parents=True, exist_ok=True)
        for old in sorted(self.mirror.rglob("*"), reverse=True):
            if old.is_dir() and not any(old.iterdir()):
                old.rmdir()
            elif old.is_file() and str(old.relative_to(self.mirror)) not in there:
                old.unlink()
        wanted = [name for name, item in there.items() if had.get(name) != item or not (self.mirror / name).exists()]
        if wanted:
            say(f"{len(wanted)} of {len(there)} files to fetch from s3://{self.bucket}/{self.prefix}")
        for name in wanted:
            with replacing(self.mirror / name) as part, asked(f"s3://{self.bucket}/{self.prefix}/{name}"):
                aws.save(client, self.bucket, f"{self.prefix}/{name}", part)
        write_json(file, there)

    def _move(self, incoming: IncomingSet, report: Path) -> str:
        client, name = store(self.workspace), incoming.name
        target = str(PurePosixPath(self.prefix).parent / QUARANTINE)
        with asked(f"s3://{self.bucket}/{target}"):
            there = {item["Key"] for item in aws.listed(client, self.bucket, f"{target}/{name}")}
            kept, told = name, f"{target}/{name}.report/refused.json"
            if any(key.startswith(f"{target}/{name}/") for key in there):  # an earlier version, or half of this one
                before = aws.content(client, self.bucket, told) if told in there else b""
                if incoming.fingerprint.encode() not in before:
                    kept = f"{name}-{incoming.fingerprint[:8]}"
            for file in sorted(path for path in report.rglob("*") if path.is_file()):
                client.upload_file(str(file), self.bucket, f"{target}/{kept}.report/{file.relative_to(report)}")
            mine = [path for path in self._objects(client) if path.startswith(f"{name}/")]
            for path in mine:
                old = {"Bucket": self.bucket, "Key": f"{self.prefix}/{path}"}
                client.copy(old, self.bucket, f"{target}/{kept}/{path.removeprefix(f'{name}/')}")
            for path in mine:
                client.delete_object(Bucket=self.bucket, Key=f"{self.prefix}/{path}")
        shutil.rmtree(self.mirror / name)
        return f"s3://{self.bucket}/{target}/{kept}"


def report_of(name: str, copy: Path) -> Path:
    """Where `clear incoming check` in the clone writes its report."""
    return copy / "data" / "report" / profile(copy) / "incoming" / name


def problem_of(name: str, copy: Path, run: Callable[[list[str], Path], tuple[int, list[str]]]) -> str:
    """Check a set with the clone's own code: "" if it is good, else what is wrong in a line.

    Raises ClearError where the check itself breaks.
    """
    status, lines = run([sys.executable, "-m", "clear", "incoming", "check", name], copy)
    verdict = report_of(name, copy) / "verdict.json"
    if status == 0:
        return ""
    if status == 1 and lines and lines[-1].startswith("error: "):  # it cannot be read at all
        return lines[-1].removeprefix("error: ")
    if status == 1 and verdict.exists():
        checked = json.loads(verdict.read_text())
        if not checked["accepted"]:
            return f"no row of it can be used, {checked['rejected']} are rejected"
        return "; ".join(
            f"'{failed['expectation']}' fails: not true that {failed['means']}" for failed in checked["failed"]
        )
    raise ClearError(f"`clear incoming check {name}` ended with status {status}: {' | '.join(lines[-3:])}")


def default_remote(workspace: Path) -> str | None:
    """Name of the default DVC remote, or None."""
    return _settings(workspace)[0]


def _settings(workspace: Path) -> tuple[str | None, dict]:
    from dvc.repo import Repo

    with Repo(str(workspace)) as repo:
        name = repo.config["core"].get("remote")
        return name, dict(repo.config["remote"].get(name, {})) if name else {}


def store(workspace: Path) -> Any:
    """An S3 client with endpoint and profile of the default DVC remote; keys come from the AWS environment."""
    _, remote = _settings(workspace)
    return aws.client(
        endpoint=remote.get("endpointurl") or "",
        profile=os.environ.get("AWS_PROFILE") or remote.get("profile"),
        settings="the AWS environment, or the DVC remote with `make remote`",
    )


def asked(location: str) -> AbstractContextManager[None]:
    """Turn what S3 refuses inside the block into one line about `place`."""
    return aws.explained(
        location,
        endpoint="the endpoint of the DVC remote (`make remote`)",
        remedy="check the AWS keys, their rights, and the endpoint",
    )

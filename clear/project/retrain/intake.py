"""Where new degradation data comes from and where rejected data goes: a folder of the workspace, or a prefix in S3.

Every folder below the prefix is a set. It is mirrored to the private folder; unchanged objects (by ETag) are not
fetched again; the mirror is a cache and may be deleted. Rejected data is moved, in S3 next to the prefix:
`…/incoming/x` becomes `…/quarantine/x`. Its report is next to it, in `x.report`. Nothing can be lost in between: the
report is written before the data moves, and in S3 an object is deleted only after all have been copied.

Two notes in the report say what a killed run leaves to the next one, and are gone when it is done:

    moving.json     in S3, once all is copied: key → ETag of what is still to be deleted. What is left of a refused set
                    is another set, which might pass; so the deletion is finished before sets are looked for.
    untold.json     before the data moves (in S3: once it is copied): what people are told, until they have been
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
from clear.errors import ClearError, one_line, shown
from clear.sources.incoming import IncomingSet, sets

FOLDER = "data/incoming"
QUARANTINE = "quarantine"
REPORT, MOVING, UNTOLD = ".report", "moving.json", "untold.json"


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

    def quarantine(
        self,
        incoming: IncomingSet,
        copy: Path,
        problem: str,
        tell: Callable[[str, str, str], object] = lambda name, problem, place: None,
    ) -> str:
        """Move a refused set, with the report of its check in the clone `copy`, and `tell` its name, the problem and
        the new place, which is returned."""
        report = report_of(incoming.name, copy)
        refused = {"name": incoming.name, "fingerprint": incoming.fingerprint, "problem": problem}
        write_json(report / "refused.json", refused)
        kept = self._move(incoming, report, refused) if self.bucket else self._move_here(incoming, report, refused)
        tell(incoming.name, problem, self._place(kept))
        self._told(kept)
        return self._place(kept)

    def remind(self, tell: Callable[[str, str, str], object]) -> None:
        """Tell, as `quarantine` does, of sets of which nobody has been told, because the run that moved them was
        killed."""
        for kept, refused in sorted(self._untold().items()):
            tell(str(refused.get("name", kept)), str(refused.get("problem", "see its report")), self._place(kept))
            self._told(kept)

    @property
    def _quarantined(self) -> Path:
        return self.folder.parent / QUARANTINE

    @property
    def _target(self) -> str:
        return str(PurePosixPath(self.prefix).parent / QUARANTINE)

    def _place(self, kept: str) -> str:
        """The user's word for where a set in quarantine is."""
        if self.bucket:
            return f"s3://{self.bucket}/{self._target}/{kept}"
        return str((self._quarantined / kept).relative_to(self.workspace))

    def _untold(self) -> dict[str, dict]:
        """Name in quarantine → what `quarantine` says of it, where that was not told."""
        if self.bucket:
            client = store(self.workspace)
            with asked(f"s3://{self.bucket}/{self._target}"):
                notes = self._notes(client, UNTOLD)
                return {kept: self._read(client, item["Key"]) for kept, item in notes.items()}
        notes = {note.parent.name.removesuffix(REPORT): note for note in self._quarantined.glob(f"*{REPORT}/{UNTOLD}")}
        return {kept: remembered(note) for kept, note in notes.items() if (self._quarantined / kept).exists()}

    def _told(self, kept: str) -> None:
        if self.bucket:
            with asked(f"s3://{self.bucket}/{self._target}"):
                key = f"{self._target}/{kept}{REPORT}/{UNTOLD}"
                store(self.workspace).delete_object(Bucket=self.bucket, Key=key)
        else:
            (self._quarantined / f"{kept}{REPORT}" / UNTOLD).unlink(missing_ok=True)

    def _move_here(self, incoming: IncomingSet, report: Path, refused: dict[str, str]) -> str:
        """Move a set of a folder; returns its name in quarantine."""
        kept = _kept(incoming, (self._quarantined / incoming.name).exists())
        target, beside = self._quarantined / kept, self._quarantined / f"{kept}{REPORT}"
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(report, beside)
        write_json(beside / UNTOLD, refused)
        with writer(self.workspace):
            shutil.rmtree(target, ignore_errors=True)
            # A .dvc file that outlives its set would bring the set back, to be refused again.
            (self.folder / f"{incoming.name}.dvc").unlink(missing_ok=True)
            (self.folder / incoming.name).rename(target)
        return kept

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
        if gone := self._finish_moves(client, there):
            say(f"{len(gone)} files of sets in quarantine were left in {self.named} by a run that was killed; deleted.")
        there = {name: item for name, item in there.items() if name not in gone}
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

    def _move(self, incoming: IncomingSet, report: Path, refused: dict[str, str]) -> str:
        """Move a set of a prefix; returns its name in quarantine."""
        client, name, target = store(self.workspace), incoming.name, self._target
        with asked(f"s3://{self.bucket}/{target}"):
            there = {item["Key"] for item in aws.listed(client, self.bucket, f"{target}/{name}")}
            taken, said = any(key.startswith(f"{target}/{name}/") for key in there), f"{name}{REPORT}/refused.json"
            if taken and f"{target}/{said}" in there:  # by an earlier version, or by half of this one
                before = aws.content(client, self.bucket, f"{target}/{said}")
                taken = incoming.fingerprint.encode() not in before
            kept = _kept(incoming, taken)
            for file in sorted(path for path in report.rglob("*") if path.is_file()):
                client.upload_file(str(file), self.bucket, f"{target}/{kept}{REPORT}/{file.relative_to(report)}")
            found = self._objects(client).items()
            mine = {f"{self.prefix}/{path}": item["etag"] for path, item in found if path.startswith(f"{name}/")}
            for key in mine:
                old = {"Bucket": self.bucket, "Key": key}
                client.copy(old, self.bucket, f"{target}/{kept}/{key.removeprefix(f'{self.prefix}/{name}/')}")
            for note, content in ((UNTOLD, refused), (MOVING, mine)):
                key = f"{target}/{kept}{REPORT}/{note}"
                client.put_object(Bucket=self.bucket, Key=key, Body=json.dumps(content, indent=1).encode())
            self._finish_moves(client, self._objects(client))
        shutil.rmtree(self.mirror / name)
        return kept

    def _finish_moves(self, client: Any, there: dict[str, dict]) -> set[str]:
        """Delete what is still `there` of sets that are in quarantine as a whole; returns the paths. What was written
        since stays, even with the same content: somebody is putting a mended set back."""
        gone = set()
        with asked(f"s3://{self.bucket}/{self._target}"):
            for note in self._notes(client, MOVING).values():
                moved, since = self._read(client, note["Key"]), note["LastModified"].timestamp()
                for path, item in there.items():
                    if moved.get(f"{self.prefix}/{path}") == item["etag"] and item["written"] <= since:
                        client.delete_object(Bucket=self.bucket, Key=f"{self.prefix}/{path}")
                        gone.add(path)
                if all(key.startswith(f"{self.prefix}/") for key in moved):  # else it is another prefix's
                    client.delete_object(Bucket=self.bucket, Key=note["Key"])
        return gone

    def _notes(self, client: Any, name: str) -> dict[str, dict]:
        """Name in quarantine → the note `name` in its report, as S3 lists it."""
        start, end = f"{self._target}/", f"{REPORT}/{name}"
        listed = [item for item in aws.listed(client, self.bucket, start) if item["Key"].endswith(end)]
        notes = {item["Key"].removeprefix(start).removesuffix(end): item for item in listed}
        return {kept: item for kept, item in notes.items() if "/" not in kept}

    def _read(self, client: Any, key: str) -> dict:
        try:
            return dict(json.loads(aws.content(client, self.bucket, key)))
        except (ValueError, TypeError) as error:
            raise ClearError(
                f"s3://{self.bucket}/{key} is damaged ({one_line(error)}); delete it, and what is left in {self.named} "
                "of the set that it is about."
            ) from error


def _kept(incoming: IncomingSet, taken: bool) -> str:
    """A set's name in quarantine: with its fingerprint where another version is there under its own, and where this is
    one that a report could have, so that no file of a set is ever read as a note of ours."""
    plain = not taken and not incoming.name.endswith(REPORT)
    return incoming.name if plain else f"{incoming.name}-{incoming.fingerprint[:8]}"


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

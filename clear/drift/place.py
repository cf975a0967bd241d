"""Where new pictures lie: a folder, or a prefix of an S3 bucket. They are read where they are; nothing is copied."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from clear.data import aws
from clear.data.records import drawn
from clear.errors import ClearError, one_line, shown

LARGEST = 64 * 2**20
"""Bytes of a file that is read; a larger one is no picture of this kind of traffic."""


@dataclass(frozen=True)
class Place:
    """A folder, or `bucket` and `prefix` with a boto3 client."""

    name: str
    folder: Path | None = None
    client: Any = field(default=None, repr=False)
    bucket: str = ""
    prefix: str = ""

    def listed(self, since: datetime | None = None) -> tuple[list[tuple[str, int]], int]:
        """(name, bytes) of the files, sorted, those changed at `since` or later alone; and how many there are in all.

        In a folder a file that was copied, linked or renamed there has changed, in a bucket one that was uploaded.

        Raises ClearError for a folder or prefix that does not exist, and for what S3 refuses.
        """
        files = list(self._objects() if self.client else self._files())
        kept = [(name, size) for name, size, changed in files if since is None or changed >= since.timestamp()]
        return sorted(kept), len(files)

    def _files(self) -> Iterator[tuple[str, int, float]]:
        if not self.folder.is_dir():
            raise ClearError(f"{shown(self.folder)}: no such folder; name the one that the pictures are put into.")
        for path in self.folder.rglob("*"):
            parts = path.relative_to(self.folder).parts
            if path.is_file() and not any(part.startswith(".") for part in parts):
                yield str(path.relative_to(self.folder)), path.stat().st_size, came(path)

    def _objects(self) -> Iterator[tuple[str, int, float]]:
        with self._asked():
            found = list(aws.listed(self.client, self.bucket, f"{self.prefix}/" if self.prefix else ""))
        if not found:
            raise ClearError(
                f"{self.name}: no such prefix, or nothing below it; name the one that pictures are put below."
            )
        for item in found:
            if not item["Key"].endswith("/"):
                name = item["Key"].removeprefix(f"{self.prefix}/")
                yield name, item["Size"], item["LastModified"].timestamp()

    def read(self, name: str) -> bytes:
        """The bytes of one file. Raises ClearError or OSError where it cannot be read."""
        if not self.client:
            return (self.folder / name).read_bytes()
        key = f"{self.prefix}/{name}" if self.prefix else name
        with self._asked(f"{self.name}/{name}"):
            return aws.content(self.client, self.bucket, key)

    def _asked(self, where: str = "") -> Any:
        return aws.explained(where or self.name, remedy="check the AWS keys and their rights")


def came(path: Path) -> float:
    """When a file, or the link to it, was last changed or put where it is, in seconds of the epoch.

    A copy may bring its time of modification along, an old one or one to come; that of the change is the machine's own.
    Raises OSError for a file that is gone.
    """
    return max(path.stat().st_ctime, path.lstat().st_ctime)


def s3_parts(place: str) -> tuple[str, str]:
    """Bucket and prefix of an s3:// URL. Raises ClearError for one without a bucket."""
    bucket, _, prefix = place.removeprefix("s3://").partition("/")
    if not bucket:
        raise ClearError(f"{place}: no bucket is named; write s3://bucket/prefix.")
    return bucket, prefix.strip("/")


def chosen(files: list[tuple[str, int]], limit: int) -> list[tuple[str, int]]:
    """At most `limit` of the files, drawn by the hashes of their names."""
    kept = drawn([shown(name) for name, _ in files], limit)
    return [file for number, file in enumerate(files) if number in kept]


def contents(place: Place, files: list[tuple[str, int]]) -> Iterator[tuple[str, bytes, str]]:
    """(name, bytes, "") of each file, or (name, b"", why it cannot be read).

    What S3 refuses is raised, except for an object that is gone by now: half a night would be another night.
    """
    for name, size in files:
        if size > LARGEST:
            yield name, b"", f"{size} bytes, more than {LARGEST}; not read."
            continue
        try:
            yield name, place.read(name), ""
        except (OSError, ClearError) as error:
            if isinstance(error, ClearError) and "NoSuchKey" not in str(error):
                raise
            yield name, b"", one_line(error)

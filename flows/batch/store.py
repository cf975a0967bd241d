"""What flow and job tell each other, in S3: small files by content, and JSON notes.

    objects/<sha256>                  dvc.lock, params.yaml, results: files by their content
    bundles/<commit>-<random>         git bundles
    requests/<key>/<id>.json          what a job is to do (flows/batch/request.py)
    results/<key>.json                what came out of it; written last
    logs/<key>/<job>-<attempt>.log    what the job printed
    checkpoints/<key>/<job>/…         flows/batch/checkpoints.py
    leases/<job>/<waiter>.json        a flow run that waits for a job (flows/batch/leases.py)
    ledger/<month>/<job>.json         what a job was allowed to cost, and did

`key` stands for a stage and the content of everything it reads. Downloads are checked against their hash. What AWS
refuses is a ClearError, and what may pass Unreachable (clear/data/aws.py).
"""

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from clear.data import aws
from clear.data.io import replacing
from clear.data.records import file_sha256
from clear.errors import ClearError
from flows.batch.notes import Damaged, parse

PREFIX = "compute"


def client(service: str, region: str = "") -> Any:
    """A boto3 client for a job's or a flow's own use; `region` is that of the configuration."""
    return aws.client(service, region=region, settings="AWS_PROFILE, compute.region or AWS_ENDPOINT_URL")


@dataclass(frozen=True)
class Store:
    """A place in a bucket. `client` is a boto3 S3 client."""

    client: Any
    bucket: str
    prefix: str = PREFIX

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}"

    def url(self, name: str) -> str:
        """s3://bucket/prefix/name."""
        return f"s3://{self.bucket}/{self._key(name)}"

    def put(self, file: Path, name: str) -> None:
        """Upload a file."""
        with aws.explained(self.url(name)):
            self.client.upload_file(str(file), self.bucket, self._key(name))

    def keep(self, file: Path, under: str = "objects") -> str:
        """Upload a file under its hash and return the hash."""
        digest = file_sha256(file)
        self.put(file, f"{under}/{digest}")
        return digest

    def fetch(self, name: str, target: Path, digest: str) -> None:
        """Download to `target`. Raises Damaged if the content has another hash; nothing is left behind then."""
        with replacing(target) as partial:
            with aws.explained(self.url(name)):
                aws.save(self.client, self.bucket, self._key(name), partial)
            actual = file_sha256(partial)
            if actual != digest:
                raise Damaged(f"{self.url(name)} has hash {actual[:12]}…, expected {digest[:12]}…; it is not used.")

    def write(self, name: str, content: Any) -> None:
        """Put a JSON note."""
        with aws.explained(self.url(name)):
            body = json.dumps(content, indent=1).encode()
            self.client.put_object(Bucket=self.bucket, Key=self._key(name), Body=body)

    def read(self, name: str) -> Any:
        """A JSON note, or None if there is none. Raises Damaged if it has not the form of flows/batch/notes.py."""
        content = self.read_bytes(name)
        try:
            return None if content is None else parse(name, content)
        except Damaged as error:
            raise Damaged(f"{self.url(name)}: {error}") from error

    def usable(self, name: str) -> Any:
        """A JSON note, or None if there is none or a damaged one, for readers that do without it."""
        try:
            return self.read(name)
        except Damaged:
            return None

    def read_bytes(self, name: str, start: int = 0) -> bytes | None:
        """Content from byte `start` on, empty if there is no more; None if there is no such object."""
        from botocore.exceptions import ClientError

        try:
            with aws.explained(self.url(name)):
                return aws.content(self.client, self.bucket, self._key(name), start)
        except ClearError as error:
            code = error.__cause__.response["Error"]["Code"] if isinstance(error.__cause__, ClientError) else ""
            if code in ("NoSuchKey", "404"):
                return None
            if code in ("InvalidRange", "416"):
                return b""
            raise

    def names(self, under: str) -> dict[str, datetime]:
        """Names below a folder with the time of their last change."""
        modified = {}
        with aws.explained(self.url(under)):
            for item in aws.listed(self.client, self.bucket, self._key(under)):
                modified[item["Key"].removeprefix(f"{self.prefix}/")] = item["LastModified"]
        return modified

    def delete(self, *names: str) -> None:
        """Delete objects; those that are not there are no error."""
        with aws.explained(self.url("")):
            for name in names:
                self.client.delete_object(Bucket=self.bucket, Key=self._key(name))


def split(url: str) -> tuple[str, str]:
    """(bucket, key) of an s3:// address. Raises ClearError for another one."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not url.startswith("s3://") or not bucket:
        raise ClearError(f"{url!r} is not an S3 address; write it as s3://bucket/prefix.")
    return bucket, key

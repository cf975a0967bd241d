"""Weights in S3: `model.checkpoint: s3://bucket/prefix` is fetched once to a folder that the stages then read; so is
`model.base`.

    $CLEAR_HOME/weights/<bucket>/<prefix>/     the files directly under the prefix
    $CLEAR_HOME/weights/<bucket>/<prefix>.s3.json    their sizes and ETags, as far as they are here and verified

`s3://bucket/prefix/model.safetensors` names one of several weight files there, as a path does (model/checkpoint).

Credentials, region and endpoint are those of AWS tools (clear/data/aws.py). Each run lists the prefix: a file with the
recorded ETag is kept, one with another ETag is fetched again, and an interrupted download resumes. A file is accepted
once its size is right and its ETag matches its content (MD5, or for multipart uploads the MD5 of the parts' MD5s, for
the part sizes in use); encrypted objects have other ETags, so only their size is checked.
"""

import hashlib
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from clear.data import aws
from clear.data.io import alone, remembered, sync, write_json
from clear.data.workspace import home
from clear.errors import ClearError, naming, refusal
from clear.schema import Config

READERS = ("base", "traces", "sft", "sft_direct", "bridge", "grpo", "evaluate", "ask")
"""Stages (and the command) that read the weights of `model.checkpoint`, if there are any."""
PART = ".part"
_MIB = 2**20
_PART_SIZES = tuple(size * _MIB for size in (5, 8, 10, 16, 25, 32, 50, 64, 100, 128, 256, 512))
_CHUNK = 4 * _MIB


@dataclass(frozen=True)
class Remote:
    """One object: its key, size in bytes and ETag without quotes."""

    key: str
    size: int
    etag: str


def with_local_weights(config: Config, stage: str) -> Config:
    """The configuration with `model.checkpoint` and `model.base` as local paths, fetched first if they lie in S3."""
    urls = {name: getattr(config.model, name) for name in ("checkpoint", "base")}
    there = {name: url for name, url in urls.items() if url.startswith("s3://")}
    if stage not in READERS or not there:
        return config
    return replace(config, model=replace(config.model, **{name: _fetched(name, url) for name, url in there.items()}))


def with_base(config: Config, base: Path | None) -> Config:
    """The configuration in which a model folder that a command names builds on `base`: an adapter adapts its weights,
    and weights alone are completed from it. None changes nothing. Raises ClearError where nothing is there."""
    if base is None:
        return config
    if not base.exists():
        raise ClearError(f"--base {base}: nothing is there; name the folder of BAGEL-7B-MoT, or the weights adapted.")
    path = str(base.absolute())
    return replace(config, model=replace(config.model, checkpoint=path, base=path))


def _fetched(name: str, url: str) -> str:
    from clear.model.checkpoint import named_file

    _, file = named_file(url)
    folder = fetch(url if file is None else url.removesuffix(file.name), name)
    return str(folder / file.name if file else folder)


def fetch(url: str, name: str = "checkpoint") -> Path:
    """Bring the files of `s3://bucket/prefix` to their folder, those that are not there yet, and return it.

    `name` is the key under `model` that errors name. One process at a time fetches; others wait. Raises ClearError for
    no credentials, no bucket, an empty prefix, an interrupted or a corrupt download, each with what to do.
    """
    found = re.fullmatch(r"s3://([^/]+)/+(.*?)/*", url)
    if not found or not found[2]:
        raise ClearError(f"params: model.{name} = {url!r} is not an S3 folder; write s3://bucket/prefix.")
    bucket, prefix = found.groups()
    folder = home() / "weights" / bucket / prefix
    if ".." in folder.parts:
        raise ClearError(f"params: model.{name} = {url!r} leaves its folder; write s3://bucket/prefix.")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (
            aws.explained(url, again="repeat the command, the download resumes"),
            alone(folder.with_name(f"{folder.name}.lock")),
        ):
            client = aws.client()
            objects = _list(client, bucket, prefix + "/")
            if not objects:
                raise ClearError(f"{url} holds no files; check the prefix: it must be the folder with ema.safetensors.")
            _bring(client, bucket, objects, folder)
    except OSError as error:  # a full disk; `clear browse` shows ClearErrors only
        raise refusal(error) or error from error
    return folder


def _list(client, bucket: str, prefix: str) -> dict[str, Remote]:
    """The objects directly under a prefix, by file name."""
    found = {}
    for item in aws.listed(client, bucket, prefix):
        name = item["Key"].removeprefix(prefix)
        if name and "/" not in name:
            found[name] = Remote(item["Key"], item["Size"], item["ETag"].strip('"'))
    return found


def _bring(client, bucket: str, objects: dict[str, Remote], folder: Path) -> None:
    record = folder.with_name(f"{folder.name}.s3.json")
    known = remembered(record)
    for name in known.keys() - objects.keys():
        (folder / name).unlink(missing_ok=True)
    known = {name: value for name, value in known.items() if name in objects}
    missing = {n: o for n, o in objects.items() if not _here(folder / n, o, known.get(n))}
    with tqdm(total=sum(o.size for o in missing.values()), desc="weights", unit="B", unit_scale=True) as bar:
        for name, remote in missing.items():
            _download(client, bucket, remote, folder / name, bar)
            known[name] = {"bytes": remote.size, "etag": remote.etag}
            write_json(record, known)


def _here(path: Path, remote: Remote, known: dict | None) -> bool:
    same = known == {"bytes": remote.size, "etag": remote.etag}
    return same and path.is_file() and path.stat().st_size == remote.size


def _download(client, bucket: str, remote: Remote, path: Path, bar: tqdm) -> None:
    """Fetch one object under a name that says which version it is of, verify it, and give it its own name."""
    from botocore.exceptions import FlexibleChecksumError

    part = path.with_name(f"{path.name}.{remote.etag}{PART}")
    for other in path.parent.glob(f"{path.name}.*{PART}"):
        if other != part:
            other.unlink()
    have = part.stat().st_size if part.exists() else 0
    # Of a part that is whole the last byte is asked for again: the answer says how the object is encrypted.
    have = min(have, max(remote.size - 1, 0)) if have <= remote.size else 0
    bar.update(have)
    with naming(part), part.open("r+b" if have else "wb") as file:
        file.seek(have)
        answer, chunks = aws.opened(client, bucket, remote.key, have, remote.etag, _CHUNK)
        plain = answer.get("ServerSideEncryption") in (None, "AES256") and "SSECustomerAlgorithm" not in answer
        try:
            for chunk in chunks:
                file.write(chunk)
                bar.update(len(chunk))
        except FlexibleChecksumError:  # all has arrived, and is something else
            part.unlink()
            raise
    size = part.stat().st_size
    if size != remote.size:
        raise ClearError(f"{path}: {size} of {remote.size} bytes arrived; repeat the command, the download resumes.")
    if plain and not etag_matches(part, remote.etag):
        part.unlink()
        raise ClearError(
            f"{path}: its content does not match the ETag {remote.etag}; repeat the command to fetch it again."
        )
    sync(part)
    part.replace(path)


def etag_matches(path: Path, etag: str) -> bool:
    """Whether a file may be the object of this ETag: False only where one of the known ways to make it says so.

    An ETag of N parts is compared for every usual part size that gives N parts; of another size nothing is known.
    """
    size = path.stat().st_size
    whole, _, count = etag.partition("-")
    if not re.fullmatch(r"[0-9a-f]{32}", whole):
        return True
    if not count:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "md5").hexdigest() == whole
    sizes = [part for part in _PART_SIZES if math.ceil(size / part) == int(count)]
    return not sizes or any(_of_parts(path, part) == whole for part in sizes)


def _of_parts(path: Path, size: int) -> str:
    digests = []
    with path.open("rb") as file:
        while chunk := file.read(size):
            digests.append(hashlib.md5(chunk).digest())
    return hashlib.md5(b"".join(digests)).hexdigest()

"""Files that are whole or not there: written beside their place under another name, brought to the disk, then renamed.

Without the second step a file system may rename first and write later, and a crash of the machine in between leaves an
empty file under the final name. git and DVC ignore the other name (`*.partial`). JSON is written so that equal values
give equal bytes. Also the form of tables in plain text, and how Parquet is read that is damaged, or far more than its
bytes.
"""

import fcntl
import json
import math
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from clear.errors import ClearError, naming, one_line

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


@contextmanager
def replacing(path: Path | str, several: bool = False, crashes: bool = True) -> Iterator[Path]:
    """The file to write instead of `path`, which it becomes when the block ends; after an error there is none of it.

    `several` processes or threads may write `path` at once: one waits for the other, and the last one counts; what one
    that was killed has left is written over. (They must write into the file they are given, not replace it.) `crashes`
    says that it must be whole after a crash of the machine, too (`sync`); not needed where its readers verify its
    content. What is no file (/dev/stdout, a pipe) is written itself: renamed to its name, a file would take its place.
    Raises ClearError for a path that cannot be a file's or a new folder's, such as `.`.
    """
    path = Path(path)
    if path.name in ("", ".."):
        raise ClearError(f"{path}: not the name of a file; name one in this folder.")
    no_file = path.exists() and not (path.is_file() or path.is_dir())
    if no_file or (path.is_symlink() and path.parent == Path("/dev")):
        with naming(path):
            yield path
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with alone(partial) if several else nullcontext():
        try:
            with naming(path):
                yield partial
                if crashes:
                    sync(partial)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def alone(file: Path) -> Iterator[None]:
    """Wait for the lock of a file and hold it in the block, which may rename or delete the file; whoever waits makes a
    new one then."""
    descriptor = acquire(file, wait=True)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process forked meanwhile has the descriptor, too
        os.close(descriptor)


def acquire(file: Path, wait: bool = False) -> int | None:
    """A descriptor that holds the lock (`flock`) of a file, which is made where it is absent; None where another holds
    it and `wait` is false. The kernel frees it when its process ends, however it ends."""
    while True:
        with ExitStack() as opened:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            opened.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                return None
            with suppress(FileNotFoundError):  # renamed since, or deleted: its name is another file's now, or none's
                if os.path.samestat(os.fstat(descriptor), file.stat()):
                    opened.pop_all()
                    return descriptor


def sync(path: Path) -> None:
    """Wait until a file, or every file below a folder, is on the disk; before the rename that says it is whole."""
    for file in path.rglob("*") if path.is_dir() else (path,):
        if file.is_file():
            with naming(file), file.open("rb") as written:
                os.fsync(written.fileno())


@contextmanager
def asked_again(folder: Path) -> Iterator[None]:
    """For libraries that say only that writing failed: where a RuntimeError ends the block and `folder` takes no other
    file either, raise the OSError that says why, with the folder's name."""
    try:
        yield
    except RuntimeError as error:
        probe = folder / f"{uuid.uuid4().hex[:8]}.partial"
        try:
            with naming(folder):
                probe.write_bytes(os.urandom(2**20))
                sync(probe)
        except OSError as reason:
            raise reason from error
        finally:
            with suppress(OSError):
                probe.unlink(missing_ok=True)
        raise


def require_new(folder: Path) -> None:
    """Raise ClearError if something would be written over: `folder` is there and is not an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ClearError(f"{folder} exists and is not empty; name a new folder.")


def write_text(path: Path | str, text: str) -> None:
    """Write a text file (UTF-8), whole or not at all; of several that write it at once the last one counts."""
    with replacing(path, several=True) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: dict) -> None:
    """Write JSON with sorted keys, rounded floats and a final newline, so that equal values give equal bytes.

    What is not a finite number is null: JSON has no other word for it, and strict readers refuse Python's.
    """
    write_text(path, json.dumps(_rounded(value), indent=1, sort_keys=True) + "\n")


def remembered(file: Path) -> dict:
    """What a JSON file holds that only saves work; nothing where it is absent or damaged: the work is done again."""
    try:
        return dict(json.loads(file.read_text())) if file.exists() else {}
    except (ValueError, TypeError):
        return {}


def json_values(data: bytes) -> int:
    """About how many values JSON has, by the characters that begin or part them, those in its texts included. Counted
    before it is parsed: millions take seconds and gigabytes, and to be told of each wrong one takes minutes."""
    return sum(map(data.count, (b"{", b"[", b",")))


def aligned(rows: Sequence[Sequence[str]], gap: str = " ", left: int = 1) -> list[str]:
    """Lines of a table of plain text: its first `left` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.ljust if column < left else str.rjust for column in range(len(widths))]
    return [gap.join(pad(*cell) for pad, *cell in zip(sides, row, widths, strict=True)).rstrip() for row in rows]


def _rounded(value):
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return value


@contextmanager
def reading_parquet(file: Path, remedy: str) -> Iterator[None]:
    """Raise ClearError with the remedy where `file` turns out in the block to be no Parquet file, or a damaged one."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:  # the latter of names and metadata that are no text
        raise ClearError(f"{file}: not a readable Parquet file ({one_line(error)}); {remedy}.") from error


UNPACKED = 2**28
"""Bytes up to which a Parquet file may have any size unpacked."""

AT_ONCE = 2**30
"""Most bytes of rows that are read at once."""

MOST_PACKED = 100
"""Beyond, how many times its own size; pictures have once, tables of text ten times."""

WHOLE = 4096
"""Rows of a table that are brought into memory at once where all of them are wanted."""

MANY_ROWS = 10**6
"""Rows up to which a Parquet file may have any size; beyond, it has a byte for each."""


def check_unpacked(file: Path, metadata: "pq.FileMetaData") -> None:
    """Raise ClearError for a Parquet file that by its metadata is far more than its bytes: one value 10^8 times."""
    size, groups = file.stat().st_size, (metadata.row_group(n) for n in range(metadata.num_row_groups))
    unpacked, rows = sum(group.total_byte_size for group in groups), metadata.num_rows
    many = rows > MANY_ROWS and rows > size
    if many or (unpacked > UNPACKED and unpacked > MOST_PACKED * size):
        what = f"{rows:,} rows" if many else f"{unpacked:,} bytes unpacked"
        raise ClearError(f"{file}: states {what} in {size:,} bytes, more than is read; write the table again.")


def rows_at_once(metadata: "pq.FileMetaData", most: int) -> int:
    """How many rows of a Parquet file are read at once: at most `most`, and so few that they take AT_ONCE even where
    all have the same value, which a group of rows states once. (Its columns are not asked: of damaged metadata they end
    the process.)"""
    groups = (metadata.row_group(n) for n in range(metadata.num_row_groups))
    return max(1, min(most, AT_ONCE // max(1, 1, *(group.total_byte_size for group in groups))))


def batches(
    file: Path, parquet: "pq.ParquetFile", most: int, columns: list[str] | None = None
) -> "Iterator[pa.RecordBatch]":
    """The rows of a Parquet file that `check_unpacked` has let through, `most` at a time. Raises ClearError where its
    values turn out to be shared by so many rows."""
    packed, size, count = file.stat().st_size, 0, 0
    for batch in parquet.iter_batches(batch_size=rows_at_once(parquet.metadata, most), columns=columns):
        size, count = size + batch.nbytes, count + batch.num_rows
        if size > UNPACKED and size > MOST_PACKED * packed:
            raise ClearError(
                f"{file}: {size:,} bytes in the first {count:,} rows of a file of {packed:,}, more than is read; write "
                "the table again."
            )
        yield batch


def whole(file: Path, parquet: "pq.ParquetFile", columns: list[str] | None = None) -> "pa.Table":
    """All rows of a Parquet file, or those columns of them that it has; checked, and raises, as `batches`."""
    import pyarrow as pa

    check_unpacked(file, parquet.metadata)
    schema = parquet.schema_arrow
    if columns is not None:
        schema = pa.schema([schema.field(name) for name in columns if name in schema.names])
    return pa.Table.from_batches(batches(file, parquet, WHOLE, schema.names), schema)

"""The one data contract: `Sample` records in Parquet shards.

A sample is one image with its questions; a degraded copy carries the clean image next to the degraded one, so a
pair is never separated. Images are stored as `{bytes, path}` structs, the layout of `datasets.Image`, inside few
large Parquet files (DVC and S3 suffer from many small ones). Nothing written here depends on clock, host or path,
so equal samples give equal bytes.
"""

import functools
import hashlib
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from clear.data.io import batches, check_unpacked, reading_parquet, sync
from clear.errors import ClearError, naming

if TYPE_CHECKING:  # the model code needs only `Question` and the pictures, on machines without pyarrow
    import pyarrow as pa
    import pyarrow.parquet as pq

CLEAN = "clean"
"""Value of `Sample.corruption` and `Sample.severity` for an image that was not degraded."""

INCOMING = "incoming"
"""Value of `Sample.severity` for a naturally degraded image (data/incoming); its corruption is the name of its set."""

EXTRA = "+"
"""First character of `Sample.corruption` for a degradation other than MMD-Bench's sixteen."""


@functools.cache
def schema() -> "pa.Schema":
    """Columns of a shard of samples."""
    import pyarrow as pa

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    text = ("id", "task", "text", "options", "answer", "evidence", "pair")
    kind = {name: pa.list_(pa.string()) if name == "options" else pa.string() for name in text}
    return pa.schema(
        [
            ("id", pa.string()),
            ("source", pa.string()),
            ("split", pa.string()),
            ("image", image),
            ("image_sha256", pa.string()),
            ("questions", pa.list_(pa.struct(list(kind.items())))),
            ("annotation", pa.string()),
            ("degraded", image),
            ("corruption", pa.string()),
            ("severity", pa.string()),
            ("intensity", pa.float64()),
            ("seed", pa.uint64()),
            ("paired", pa.bool_()),
        ]
    )


@dataclass(frozen=True)
class Question:
    """One question about an image.

    `options` is empty for a free answer. `evidence` is what a careful observer would note before answering, in the
    words of the trace grammar; it is empty where no oracle exists. `pair` joins the two halves of a minimal pair.
    """

    id: str
    task: str
    text: str
    answer: str
    options: tuple[str, ...] = ()
    evidence: str = ""
    pair: str = ""


@dataclass(frozen=True)
class Sample:
    """One image and its questions; with `degraded` set, one degraded copy of it.

    `image` and `degraded` are encoded bytes (PNG or JPEG). `annotation` is JSON known to the source only.
    `seed` is the one that made the degradation, so that any copy can be made again. `paired` is false for a naturally
    degraded image without a clean one to restore; it is in both fields then.
    """

    id: str
    source: str
    split: str
    image: bytes
    image_sha256: str
    questions: tuple[Question, ...] = ()
    annotation: str = ""
    degraded: bytes | None = None
    corruption: str = CLEAN
    severity: str = CLEAN
    intensity: float = 0.0
    seed: int = 0
    paired: bool = True

    @property
    def seen(self) -> bytes:
        """The encoded image that a model is shown: the degraded one where there is one."""
        return self.image if self.degraded is None else self.degraded

    @property
    def key(self) -> str:
        """Identity of this copy among all copies: id, corruption and severity."""
        return f"{self.id}/{self.corruption}/{self.severity}"


def sha256(data: bytes) -> str:
    """Hex digest that identifies an image by content."""
    return hashlib.sha256(data).hexdigest()


def drawn(names: Iterable[str], count: int) -> set[int]:
    """Numbers of `count` of the names (of all, if there are fewer): those with the smallest hashes.

    Which they are depends on the names alone, so that a choice neither follows their order nor prefers a subset. The
    names may be a stream; hashes of `count` of them are in memory.
    """
    hashes = ((hashlib.sha256(name.encode()).digest(), n) for n, name in enumerate(names))
    return {n for _, n in heapq.nsmallest(count, hashes)}


def file_sha256(path: Path | str) -> str:
    """Hex digest of a file of any size."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_row(sample: Sample) -> dict:
    """Sample to a dictionary in the layout of `schema`."""
    row = {f.name: getattr(sample, f.name) for f in fields(Sample)}
    row["questions"] = [asdict(q) | {"options": list(q.options)} for q in sample.questions]
    row["image"] = {"bytes": sample.image, "path": None}
    row["degraded"] = None if sample.degraded is None else {"bytes": sample.degraded, "path": None}
    return row


def from_row(row: dict) -> Sample:
    """Inverse of `to_row`."""
    questions = tuple(Question(**q | {"options": tuple(q["options"])}) for q in row["questions"])
    degraded = row["degraded"]["bytes"] if row["degraded"] else None
    return Sample(**row | {"questions": questions, "image": row["image"]["bytes"], "degraded": degraded})


GROUP = 256
"""Samples of a row group, which is all that a writer or a reader of samples holds at once."""


@dataclass
class ShardWriter:
    """Writes samples to `<folder>/00000.parquet`, …; at most `rows` samples or `size` image bytes per shard.

    The folder appears only when the writer is closed: an interrupted run leaves `<folder>.partial`, never half a
    dataset under the final name.
    """

    folder: Path
    rows: int = 4096
    size: int = 192 * 2**20
    count: int = 0
    _buffer: list[dict] = field(default_factory=list)
    _rows: int = 0
    _bytes: int = 0
    _shards: int = 0
    _shard: "pq.ParquetWriter | None" = None

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        self._partial = self.folder.with_name(self.folder.name + ".partial")
        _remove_tree(self._partial)
        self._partial.mkdir(parents=True)

    def add(self, sample: Sample) -> None:
        """Append one sample."""
        self._buffer.append(to_row(sample))
        self._rows += 1
        self._bytes += len(sample.image) + len(sample.degraded or b"")
        self.count += 1
        if self._rows >= self.rows or self._bytes >= self.size:
            self._end_shard()
        elif len(self._buffer) >= GROUP:
            self._write_group()

    def _write_group(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        shard = self._partial / f"{self._shards:05d}.parquet"
        with naming(shard):
            if self._shard is None:
                self._shard = pq.ParquetWriter(shard, schema(), compression="zstd")
            if self._buffer or not self._rows:  # an empty shard has an empty group
                self._shard.write_table(pa.Table.from_pylist(self._buffer, schema=schema()), row_group_size=GROUP)
        self._buffer = []

    def _end_shard(self) -> None:
        self._write_group()
        with naming(self._partial / f"{self._shards:05d}.parquet"):
            self._shard.close()
        self._shards, self._shard = self._shards + 1, None
        self._rows, self._bytes = 0, 0

    def close(self) -> None:
        """Write what is left and put the folder in place."""
        if self._rows or not self._shards:
            self._end_shard()
        sync(self._partial)
        _remove_tree(self.folder)
        self._partial.rename(self.folder)


def _remove_tree(folder: Path) -> None:
    import shutil

    if folder.exists():
        shutil.rmtree(folder)


def write_samples(folder: Path | str, samples: Iterable[Sample]) -> int:
    """Write all samples under `folder` (see ShardWriter) and return how many there were."""
    writer = ShardWriter(Path(folder))
    for sample in samples:
        writer.add(sample)
    writer.close()
    return writer.count


def shards(folder: Path | str) -> list[Path]:
    """The Parquet files of a dataset folder, in order. Raises ClearError if there are none."""
    files = sorted(Path(folder).glob("*.parquet"))
    if not files:
        raise ClearError(f"{folder}: no Parquet shards here; run `dvc repro` for the stage that makes this folder.")
    return files


def read_samples(folder: Path | str, columns: Iterable[str] | None = None) -> Iterator[Sample]:
    """Stream the samples of a folder in order. With `columns`, the other fields keep an empty value.

    Raises ClearError naming the shard and the column when one is missing or of another type.
    """
    wanted = list(columns) if columns is not None else schema().names
    for file in shards(folder):
        parquet = open_shard(file)
        check_schema(file, parquet.schema_arrow)
        for batch in batches(file, parquet, GROUP, wanted):
            for row in batch.to_pylist():
                if "image" in row and row["image"] is None:
                    raise ClearError(f"{file}: sample {row.get('id', '?')} has no image; remake the shard without it.")
                yield from_row(_EMPTY_ROW | row)


def open_shard(file: Path) -> "pq.ParquetFile":
    """Open one shard. Raises ClearError naming it if it is not a Parquet file, or one as `check_unpacked` refuses."""
    import pyarrow.parquet as pq

    with reading_parquet(file, "remake or `dvc pull` it"):
        parquet = pq.ParquetFile(file)
        check_unpacked(file, parquet.metadata)
        return parquet


_EMPTY_ROW = to_row(Sample(id="", source="", split="", image=b"", image_sha256=""))


def check_schema(file: Path, found: "pa.Schema") -> None:
    """Raise ClearError unless `found` has every column of `schema` with its type."""
    for column in schema():
        if column.name not in found.names:
            raise ClearError(
                f"{file}: column '{column.name}' is missing; a Sample shard has {', '.join(schema().names)}. Run the "
                "stage that makes it again, or write it with clear.data.records."
            )
        if found.field(column.name).type != column.type:
            kind = found.field(column.name).type
            raise ClearError(
                f"{file}: column '{column.name}' is {kind}, expected {column.type}; write it with clear.data.records."
            )

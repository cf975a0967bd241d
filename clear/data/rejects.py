"""What was not used, and why: one small Parquet file per stage under data/rejects."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from clear.data.io import sync
from clear.errors import naming


@dataclass(frozen=True)
class Reject:
    """One row that is not used. `reason` is one of a few words that are counted, `detail` says what was found.

    `subset` is the part of the data that the row belongs to.
    """

    id: str
    subset: str
    reason: str
    detail: str


def read_rejects(path: Path) -> list[Reject]:
    """What a RejectWriter wrote."""
    import pyarrow.parquet as pq

    return [Reject(**row) for row in pq.read_table(path).to_pylist()]


class RejectWriter:
    """Streams rejects to a Parquet file with the columns of Reject; in place when its `with` block ends.

    Also when the block ends with an error, so that what was found can be looked up.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path, self._partial = path, path.with_name(path.name + ".partial")
        self._schema = pa.schema([(item.name, pa.string()) for item in fields(Reject)])
        self._rows: list[dict] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = pq.ParquetWriter(self._partial, self._schema, compression="zstd")

    def add(self, reject: Reject) -> None:
        """Append one."""
        # What a reject quotes may not be valid text; it is written nevertheless.
        row = {key: value.encode(errors="backslashreplace").decode() for key, value in asdict(reject).items()}
        self._rows.append(row)
        if len(self._rows) >= 4096:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        with naming(self._partial):
            self._writer.write_table(pa.Table.from_pylist(self._rows, self._schema))
        self._rows = []

    def __enter__(self) -> "RejectWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        with naming(self._partial):
            self._writer.close()
        sync(self._partial)
        self._partial.rename(self.path)


def write_rejects(path: Path, rejects: Iterable[Reject]) -> None:
    """Write rejects that are all known, as RejectWriter does."""
    with RejectWriter(path) as writer:
        for reject in rejects:
            writer.add(reject)

"""Demonstrations as a table: which replies a model is to give to which question about which image.

One row per trace; the pictures stay in the degraded data set and are found by sample id, so a trace costs a hundred
bytes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import chain, islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from clear.data.io import batches, check_unpacked, reading_parquet, replacing
from clear.errors import ClearError
from clear.reasoning.grammar import Trace

FILE = "traces.parquet"


@dataclass(frozen=True)
class TraceRow:
    """A trace of a question about a sample. `severity` "clean" means the clean image is shown.

    `reply_2` is empty for a direct trace. `direct` is the reply that never restores, `restored` the one after a
    restoration, whichever the trace takes. `base_correct` says whether the base model answered this very image.
    """

    sample: str
    question: str
    text: str
    corruption: str
    severity: str
    reply_1: str
    reply_2: str
    direct: str
    restored: str
    base_correct: bool

    @property
    def trace(self) -> Trace:
        """The replies."""
        return Trace((self.reply_1, self.reply_2) if self.reply_2 else (self.reply_1,))


_SCHEMA = pa.schema([(f.name, pa.bool_() if f.type in (bool, "bool") else pa.string()) for f in fields(TraceRow)])


GROUP = 2**16
"""Rows of a row group: what a writer or a reader of the table holds at once."""

_BATCH = 2**10
"""Rows that are Python objects at once."""


def write_traces(folder: Path | str, rows: Iterable[TraceRow]) -> int:
    """Write `<folder>/traces.parquet` and return how many there are; `rows` may be a stream.

    The file appears when it is complete. After an error of `rows`, and where there is none, there is no new one.
    """
    count, rows = 0, iter(rows)
    first = next(rows, None)
    if first is None:
        return 0
    rows = chain([first], rows)
    with replacing(Path(folder) / FILE) as partial, pq.ParquetWriter(partial, _SCHEMA, compression="zstd") as writer:
        while group := list(_tables(islice(rows, GROUP))):
            # In one piece, so that the bytes do not depend on how the rows came.
            writer.write_table(pa.concat_tables(group).combine_chunks(), row_group_size=GROUP)
            count += sum(len(table) for table in group)
    return count


def _tables(rows: Iterator[TraceRow]) -> Iterator[pa.Table]:
    while batch := list(islice(rows, _BATCH)):
        yield pa.Table.from_pylist([vars(row) for row in batch], schema=_SCHEMA)


def read_traces(folder: Path | str) -> Iterator[TraceRow]:
    """Stream the traces of a folder, in order; no more than a row group is in memory.

    Raises ClearError if the file or a column is missing or unreadable.
    """
    path = Path(folder) / FILE
    if not path.exists():
        raise ClearError(f"{path} is missing; run `dvc repro traces`.")
    remedy = "remake it with `dvc repro traces`"
    with reading_parquet(path, remedy), pq.ParquetFile(path) as table:
        check_unpacked(path, table.metadata)
        for name in _SCHEMA.names:
            if name not in table.schema_arrow.names:
                raise ClearError(f"{path}: column '{name}' is missing; {remedy}.")
        for batch in batches(path, table, _BATCH, _SCHEMA.names):
            batch.validate(full=True)
            yield from (TraceRow(**row) for row in batch.to_pylist())

"""Demonstrations as a table: which replies a model is to give to which question about which image.

One row per trace; the pictures stay in the degraded data set and are found by sample id, so a trace costs a hundred
bytes.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from clear.data.io import replacing
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


def write_traces(folder: Path | str, rows: list[TraceRow]) -> None:
    """Write `<folder>/traces.parquet`."""
    table = pa.Table.from_pylist([asdict(row) for row in rows], schema=_SCHEMA)
    with replacing(Path(folder) / FILE) as partial:
        pq.write_table(table, partial, compression="zstd")


def read_traces(folder: Path | str) -> list[TraceRow]:
    """Read the traces of a folder. Raises ClearError if the file or a column is missing or unreadable."""
    path = Path(folder) / FILE
    if not path.exists():
        raise ClearError(f"{path} is missing; run `dvc repro traces`.")
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ClearError(
            f"{path}: not a readable Parquet file ({error}); remake it with `dvc repro traces`."
        ) from error
    for name in _SCHEMA.names:
        if name not in table.column_names:
            raise ClearError(f"{path}: column '{name}' is missing; remake it with `dvc repro traces`.")
    return [TraceRow(**row) for row in table.select(_SCHEMA.names).to_pylist()]

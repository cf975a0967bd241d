"""MMD-Bench as files for VLMEvalKit: degraded copies of its TSVs, and what each row got (METHOD §6 "Benchmark TSV").

Protocol `row`: every picture of a benchmark gets one corruption, the same at three levels, in
`<bench>_LOW_LEVEL_{LOW,MID,HIGH}.tsv` (the authors' names). Protocol `full`: every picture gets all sixteen, in
`<bench>_<corruption>_{LOW,MID,HIGH}.tsv`. Only the column `image` changes (JPEG of quality 95 in base64); rows, order,
columns and every other cell stay as they were, rows that name another row's picture keep doing so.

Departures (METHOD §8 items 15, 16): corruptions are drawn by the published weights from a hash of benchmark and
picture, not from an unseeded generator; `manifest.parquet` says what each row got; a picture that cannot be degraded
stops the command instead of staying clean in the file. The two pictures of an MMVP pair get the same corruption.

A finished file has its final name, so an interrupted run makes only what is missing; what is there is compared with
the manifest and the source, and refused if it belongs to other data or another protocol version.
"""

import base64
import csv
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from clear.degradation.corruptions import CORRUPTIONS
from clear.degradation.protocol import BENCHMARK_WEIGHTS, PROTOCOL_VERSION, SEVERITIES, degrade, draw, seed_of
from clear.errors import ClearError
from clear.records import decode_image, encode_image, file_sha256, sha256
from clear.sources import lmudata
from clear.workers import CHUNK, parallel

PROTOCOLS = ("row", "full")
LEVELS = {"low": "LOW", "mid": "MID", "high": "HIGH"}
MANIFEST = "manifest.parquet"


@dataclass(frozen=True)
class Made:
    """One row of the manifest: a row of one file. Hashes are SHA-256 of the encoded picture before and after.

    `image_index` is the index of the row that holds the picture, mostly the row itself.
    """

    bench: str
    file: str
    index: str
    image_index: str
    corruption: str
    severity: str
    intensity: float
    seed: int
    clean_sha256: str
    degraded_sha256: str


@dataclass(frozen=True)
class Target:
    """One file to write. `corruption` "" means that each picture has its own."""

    bench: str
    corruption: str
    severity: str

    @property
    def name(self) -> str:
        """The file's name, without `.tsv`: how VLMEvalKit calls the data set."""
        return f"{self.bench}_{self.corruption or 'LOW_LEVEL'}_{LEVELS[self.severity]}"


def targets(bench: str, protocol: str) -> list[Target]:
    """The files of a benchmark. Raises ClearError for an unknown protocol."""
    if protocol not in PROTOCOLS:
        raise ClearError(f"protocol '{protocol}' is not one of {', '.join(PROTOCOLS)}.")
    names = CORRUPTIONS if protocol == "full" else ("",)
    return [Target(bench, name, severity) for name in names for severity in SEVERITIES]


def write_benchmarks(
    source: Path, out: Path, protocol: str, scale: float = 1.0, workers: int = 0, say: Callable[[str], None] = print
) -> list[Path]:
    """Write the files of every TSV at `source` into `out`, and `out`/manifest.parquet; return the TSVs' paths.

    `scale` multiplies the corruptions' sizes in pixels, `workers` are processes (0 = one per core). Raises ClearError
    naming the row of a picture that cannot be read or degraded, and for files in `out` that were made from other data.
    """
    found = lmudata.files(source)
    if out.resolve() == (source if source.is_dir() else source.parent).resolve():
        raise ClearError(f"--out {out} is the source's own folder; name another one.")
    out.mkdir(parents=True, exist_ok=True)
    written, parts = [], []
    for file in found:
        state = {"source_sha256": file_sha256(file), "protocol_version": PROTOCOL_VERSION, "size_scale": scale}
        table = None
        for target in targets(file.stem, protocol):
            path, part = out / f"{target.name}.tsv", out / ".parts" / f"{target.name}.jsonl"
            if _finished(path, part, state):
                say(f"{path.name}: already here")
            else:
                table = table or lmudata.Table(file)
                _write(path, part, state, table, target, scale, workers)
            written.append(path)
            parts.append(part)
    _write_manifest(out / MANIFEST, parts)
    return written


def _finished(path: Path, part: Path, state: dict) -> bool:
    """Whether a file is complete and made from this source; its part of the manifest begins with the state."""
    if not (path.exists() and part.exists()):
        if path.exists():
            raise ClearError(f"{path}: there, but not made by this command; move it away or choose another --out.")
        return False
    with part.open() as lines:
        if json.loads(lines.readline()) == state | {"tsv_sha256": file_sha256(path)}:
            return True
    raise ClearError(
        f"{path}: was changed, or made from other data, another protocol version or scale; choose another --out, or "
        f"delete it and {part}."
    )


def _write(
    path: Path, part: Path, state: dict, table: lmudata.Table, target: Target, scale: float, workers: int
) -> None:
    """One TSV and its part of the manifest; each is complete when it has its name, the TSV first."""
    part.parent.mkdir(exist_ok=True)
    waiting: deque[tuple[dict[str, str], str, bytes]] = deque()

    def jobs() -> Iterator[tuple[bytes, str, str, str, float]]:
        for number, record in enumerate(lmudata.records(table.file)):
            corruption = target.corruption or corruption_of(target.bench, record["index"], number)
            image = record.get("image", "")
            if 0 < len(image.strip()) <= lmudata.REFERENCE:  # it names a row; checked, then kept as it is
                if image.strip() not in table:
                    raise ClearError(
                        f"{table.file}: row {record['index']} names the picture of row {image}, which has none."
                    )
                waiting.append((record, "", b""))
                continue
            data = lmudata.image_of(record, table)
            if isinstance(data, str):
                raise ClearError(f"{table.file}: row {record['index']}: {data}; repair or remove the row.")
            waiting.append((record, corruption, data))
            yield data, corruption, target.severity, f"{target.bench}-{record['index']}", scale

    made: dict[str, Made | str] = {}  # by index; a text is the index of the row that holds the picture
    total = sum(1 for _ in lmudata.records(table.file))
    workers = 1 if total <= CHUNK else workers  # starting a pool takes longer
    with _replacing(path) as file:
        header = table.header if "image" in table.header else [*table.header, "image"]
        _write_row(file, header)

        def pass_on() -> None:
            """Write the rows without a picture of their own that wait in front."""
            while waiting and not waiting[0][1]:
                record = waiting.popleft()[0]
                _write_row(file, [record[name] for name in header])
                made[record["index"]] = record["image"].strip()

        for data in parallel(_degraded, jobs(), workers, total, target.name):
            pass_on()
            record, corruption, clean = waiting.popleft()
            text = base64.b64encode(data).decode()
            _write_row(file, [text if name == "image" else record[name] for name in header])
            index = record["index"]
            seed = seed_of(f"{target.bench}-{index}", corruption, target.severity)
            what = target.bench, path.name, index, index, corruption, target.severity
            made[index] = Made(*what, SEVERITIES[target.severity], seed, sha256(clean), sha256(data))
        pass_on()
    with _replacing(part) as file:
        file.write(json.dumps(state | {"tsv_sha256": file_sha256(path)}) + "\n")
        for index, row in made.items():
            row = replace(made[row], index=index) if isinstance(row, str) else row
            file.write(json.dumps(asdict(row)) + "\n")


def _write_row(file, cells: list[str]) -> None:
    # A lone carriage return ends a line for pandas unless it is quoted, which csv forgets.
    quoting = csv.QUOTE_ALL if any("\r" in cell for cell in cells) else csv.QUOTE_MINIMAL
    csv.writer(file, delimiter="\t", lineterminator="\n", quoting=quoting).writerow(cells)


def corruption_of(bench: str, index: str, number: int) -> str:
    """The one corruption of a picture under protocol `row`, drawn by the published weights; alike in an MMVP pair."""
    id = f"{bench}-pair-{number // 2}" if bench.split("_")[0] == "MMVP" else f"{bench}-{index}"
    return draw(id, BENCHMARK_WEIGHTS, [1.0] * len(SEVERITIES))[0]


def _degraded(job: tuple[bytes, str, str, str, float]) -> bytes:
    data, corruption, severity, id, scale = job
    return encode_image(degrade(decode_image(data, id), corruption, severity, id, scale), "jpeg")


@contextmanager
def _replacing(path: Path) -> Iterator:
    """A text file that has its name only once it is whole and on disk."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def _write_manifest(path: Path, parts: list[Path]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"float": pa.float64(), "int": pa.uint64(), "str": pa.string()}
    schema = pa.schema([(f.name, kinds[getattr(f.type, "__name__", f.type)]) for f in fields(Made)])
    partial = path.with_name(path.name + ".partial")
    with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        for part in parts:
            rows = [json.loads(line) for line in part.read_text().splitlines()[1:]]
            writer.write_table(pa.Table.from_pylist(rows, schema))
    partial.rename(path)

"""MMD-Bench as files for VLMEvalKit: degraded copies of its TSVs, and what each row got (METHOD §6 "Benchmark TSV").

Protocol `row`: every picture of a benchmark gets one corruption, the same at three levels, in
`<bench>_LOW_LEVEL_{LOW,MID,HIGH}.tsv` (the authors' names). Protocol `full`: every picture gets all sixteen, in
`<bench>_<corruption>_{LOW,MID,HIGH}.tsv`, or as the authors' 96 files, at level high only, in
`<bench>_<their name of it>.tsv`. Only the column `image` changes (JPEG of quality 95 in base64, turned as its EXIF data
say); rows, order, columns and every other cell stay as they were, rows that name another row's picture keep doing so.

Departures (METHOD §8 items 15, 16): corruptions are drawn by the published weights from a hash of benchmark and
picture, not from an unseeded generator; `manifest.parquet` says what each row got; a row whose picture cannot be read,
or not be degraded at one of the levels, is left out at all of them and listed in `rejects.parquet` instead of staying
clean in the file; so is a whole file that cannot be read. The two pictures of an MMVP pair get the same corruption.

A finished file has its final name, so an interrupted run makes only what is missing; what is there is compared with
the manifest and the source, and rejected if it belongs to other data or another protocol version. Output of this
command is never its input: files named like degraded ones are skipped. Of two runs into one folder the second waits.
"""

import base64
import csv
import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import groupby
from pathlib import Path

from clear.bench.vlmeval import names
from clear.data.images import decode_image, encode_image
from clear.data.io import replacing, sync
from clear.data.lock import writer
from clear.data.pool import CHUNK, parallel
from clear.data.records import file_sha256, sha256
from clear.data.rejects import Reject, write_rejects
from clear.degradation.corruptions import CORRUPTIONS
from clear.degradation.protocol import BENCHMARK_WEIGHTS, PROTOCOL_VERSION, SEVERITIES, degrade, draw, seed_of
from clear.errors import ClearError, naming, refusal, shown
from clear.sources import lmudata

PROTOCOLS = ("row", "full")
NAMES = ("ours", "authors")
MANIFEST, REJECTS = "manifest.parquet", "rejects.parquet"


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
    authors: bool = False

    @property
    def name(self) -> str:
        """The file's name, without `.tsv`: how VLMEvalKit calls the data set."""
        return names.target_name(self.bench, self.corruption, self.severity, self.authors)


@dataclass(frozen=True)
class Output:
    """Where a file goes, and the part of the manifest and the rejects that belongs to it."""

    target: Target
    out: Path

    @property
    def path(self) -> Path:
        """The TSV."""
        return self.out / f"{self.target.name}.tsv"

    @property
    def part(self) -> Path:
        """A first line with what it was made from, then a JSON object per row of the TSV and per reject."""
        return self.out / ".parts" / f"{self.target.name}.jsonl"

    @property
    def partial(self) -> Path:
        """The TSV while it is written."""
        return self.path.with_name(self.path.name + ".partial")


def targets(bench: str, protocol: str, style: str = "ours") -> list[Target]:
    """The files of a benchmark. Raises ClearError for unknown words, and for the authors' names without `full`."""
    if protocol not in PROTOCOLS:
        raise ClearError(f"protocol '{protocol}' is not one of {', '.join(PROTOCOLS)}.")
    if style not in NAMES:
        raise ClearError(f"names '{style}' are not one of {', '.join(NAMES)}.")
    if style == "authors":
        if protocol != "full":
            raise ClearError(f"names '{style}' are those of one corruption per file: choose protocol full.")
        return [Target(bench, corruption, names.AUTHORS_LEVEL, authors=True) for corruption in CORRUPTIONS]
    corruptions = CORRUPTIONS if protocol == "full" else ("",)
    return [Target(bench, corruption, severity) for corruption in corruptions for severity in SEVERITIES]


def write_benchmarks(
    source: Path,
    out: Path,
    protocol: str,
    scale: float = 1.0,
    workers: int = 0,
    say: Callable[[str], None] = print,
    style: str = "ours",
) -> list[Path]:
    """Write the files of every TSV at `source` into `out`, and `out`/manifest.parquet; return the TSVs' paths.

    `scale` multiplies the corruptions' sizes in pixels, `workers` are processes (0 = one per core). Rows that cannot be
    degraded and TSVs that cannot be read are in `out`/rejects.parquet only. Raises ClearError where there is no clean
    TSV, and for files in `out` that were made from other data. Waits while another process writes to `out`.
    """
    files = lmudata.files(source)
    if out.resolve() == (source if source.is_dir() else source.parent).resolve():
        raise ClearError(f"--out {out} is the source's own folder; name another one.")
    clean = [file for file in files if not names.is_degraded(file.stem)]
    if not clean:
        raise ClearError(f"{shown(files[0])}: is degraded already, by its name; name the clean benchmark.")
    for file in files:
        if file not in clean:
            say(f"{shown(file.name)}: is degraded already, by its name; passed over")
    out.mkdir(parents=True, exist_ok=True)
    written, unreadable = [], []
    with writer(out, say=say):
        for file in clean:
            try:
                made = _write_bench(file, out, targets(file.stem, protocol, style), scale, workers, say)
            except _Unreadable as error:
                unreadable.append(lmudata.unreadable(file, error))
                continue
            written += [output.path for output in made]
        # What an earlier call made of other benchmarks is still here, and one manifest has all.
        parts = [part for part in sorted((out / ".parts").glob("*.jsonl")) if (out / f"{part.stem}.tsv").exists()]
        _write_manifest(out / MANIFEST, parts)
        # The files of one corruption have the same rejects.
        rejects = dict.fromkeys(reject for part in parts for reject in _read_part(part)[1])
        with naming(out / REJECTS):
            write_rejects(out / REJECTS, [*unreadable, *rejects])
    return written


class _Unreadable(ClearError):
    """A TSV cannot be read."""


def _write_bench(
    file: Path, out: Path, wanted: Sequence[Target], scale: float, workers: int, say: Callable[[str], None]
) -> list[Output]:
    """The files of one TSV. Raises _Unreadable before anything is written."""
    table, written = None, []
    try:
        digests = lmudata.identity(file)
    except (ClearError, OSError) as error:
        raise _Unreadable(str(refusal(error))) from error
    state = {"source_sha256": digests.pop("table"), **digests}
    state |= {"protocol_version": PROTOCOL_VERSION, "size_scale": scale}
    for _, group in groupby(wanted, key=lambda target: target.corruption):
        outputs = [Output(target, out) for target in group]
        missing = [output for output in outputs if not _finished(output, state)]
        for output in outputs:
            if output not in missing:
                say(f"{output.path.name}: already here")
        if missing:
            try:
                table = table or lmudata.Table(file)
            except ClearError as error:
                raise _Unreadable(str(error)) from error
            _write(missing, [output.target for output in outputs], state, table, scale, workers)
        written += outputs
    return written


def _finished(output: Output, state: dict) -> bool:
    """Whether a file is complete and made from this source; its part of the manifest begins with the state."""
    if not output.path.exists():
        return False
    if not output.part.exists():
        raise ClearError(f"{output.path}: there, but not made by this command; move it away or choose another --out.")
    with output.part.open() as lines:
        if json.loads(lines.readline()) == state | {"tsv_sha256": file_sha256(output.path)}:
            return True
    raise ClearError(
        f"{output.path}: was changed, or made from other data, another protocol version or scale; "
        f"choose another --out, or delete it and {output.part}."
    )


@dataclass
class _Rows:
    """What became of the rows of a table, by index: a row of the manifest per file, or the index of the row whose
    picture it shows, or the reason why it is in no file."""

    made: dict[str, list[Made] | str] = field(default_factory=dict)
    rejects: dict[str, Reject] = field(default_factory=dict)

    def reject_followers(self, bench: str, subset: str) -> set[str]:
        """Reject the rows that show the picture of a rejected one; their indices."""
        lost = {index: of for index, of in self.made.items() if isinstance(of, str) and of in self.rejects}
        for index, of in lost.items():
            del self.made[index]
            reason = self.rejects[of].reason
            self.rejects[index] = Reject(f"{bench}-{index}", subset, reason, f"it shows the picture of row {of}")
        return set(lost)


def _write(
    outputs: Sequence[Output], group: Sequence[Target], state: dict, table: lmudata.Table, scale: float, workers: int
) -> None:
    """The missing files of one corruption, of `group` at all levels; a file is complete when it has its name."""
    header = table.header if "image" in table.header else [*table.header, "image"]
    with ExitStack() as stack:
        files = [stack.enter_context(_opened(output.partial)) for output in outputs]
        for file in files:
            _write_row(file, header)
        rows = _degrade_rows(outputs, group, files, header, table, scale, workers)
    if lost := rows.reject_followers(group[0].bench, _subset(group[0])):
        for output in outputs:
            _leave_out(output.partial, header.index("index"), lost)
    for n, output in enumerate(outputs):
        with replacing(output.part) as partial, _opened(partial) as file:
            file.write(json.dumps(state | {"tsv_sha256": file_sha256(output.partial)}) + "\n")
            for index, row in rows.made.items():
                entry = replace(rows.made[row][n], index=index) if isinstance(row, str) else row[n]
                file.write(json.dumps(asdict(entry)) + "\n")
            for reject in rows.rejects.values():
                file.write(json.dumps(asdict(reject)) + "\n")
        sync(output.partial)
        output.partial.rename(output.path)


def _subset(target: Target) -> str:
    return f"{target.bench}/{target.corruption}" if target.corruption else target.bench


def _degrade_rows(
    outputs: Sequence[Output],
    group: Sequence[Target],
    files: list,
    header: list[str],
    table: lmudata.Table,
    scale,
    workers,
) -> _Rows:
    """Write the rows that can be degraded at every level of `group` to the open `files`, in the order of the table."""
    first, rows = group[0], _Rows()
    levels = tuple(target.severity for target in group)
    waiting: deque[tuple[dict[str, str], str, bytes | str | Reject]] = deque()

    def jobs() -> Iterator[tuple[bytes, str, tuple[str, ...], str, float]]:
        for record in lmudata.records(table.file):
            index, image = record["index"], record.get("image", "").strip()
            corruption = first.corruption or corruption_of(first.bench, index, table.pairs.get(index))
            if lmudata.refers(image) and (holder := table.holder(image)[0]):  # it names a row and is kept as it is
                waiting.append((record, "", holder))
                continue
            id, data = f"{first.bench}-{index}", lmudata.image_of(record, table)
            if isinstance(data, str):
                waiting.append((record, "", Reject(id, _subset(first), "no image", data)))
                continue
            waiting.append((record, corruption, data))
            yield data, corruption, levels, id, scale

    def pass_on() -> None:
        """Settle the rows without a picture of their own that wait in front."""
        while waiting and not waiting[0][1]:
            record, _, what = waiting.popleft()
            if isinstance(what, Reject):
                rows.rejects[record["index"]] = what
                continue
            rows.made[record["index"]] = what
            for file in files:
                _write_row(file, [record[name] for name in header])

    total = sum(1 for _ in lmudata.records(table.file))
    workers = 1 if total <= CHUNK else workers  # starting a pool takes longer
    for degraded in parallel(_degraded, jobs(), workers, total, first.name):
        pass_on()
        record, corruption, clean = waiting.popleft()
        index, id = record["index"], f"{first.bench}-{record['index']}"
        if isinstance(degraded, str):
            rows.rejects[index] = Reject(id, _subset(first), "image", degraded)
            continue
        rows.made[index] = []
        for output, file in zip(outputs, files, strict=True):
            severity = output.target.severity
            data = degraded[levels.index(severity)]
            text = base64.b64encode(data).decode()
            _write_row(file, [text if name == "image" else record[name] for name in header])
            what = first.bench, output.path.name, index, index, corruption, severity, SEVERITIES[severity]
            rows.made[index].append(Made(*what, seed_of(id, corruption, severity), sha256(clean), sha256(data)))
    pass_on()
    return rows


def _leave_out(path: Path, column: int, indices: set[str]) -> None:
    """Rewrite one of this command's TSVs without some rows; `column` holds the index."""
    csv.field_size_limit(sys.maxsize)  # a cell holds a whole picture
    with path.open(newline="", encoding="utf-8") as lines, replacing(path) as partial, _opened(partial) as file:
        for number, cells in enumerate(csv.reader(lines, delimiter="\t")):
            if number == 0 or cells[column] not in indices:
                _write_row(file, cells)


def _write_row(file, cells: list[str]) -> None:
    # A lone carriage return ends a line for pandas unless it is quoted, which csv forgets.
    quoting = csv.QUOTE_ALL if any("\r" in cell for cell in cells) else csv.QUOTE_MINIMAL
    csv.writer(file, delimiter="\t", lineterminator="\n", quoting=quoting).writerow(cells)


def corruption_of(bench: str, index: str, pair: int | None = None) -> str:
    """The one corruption of a picture under protocol `row`, drawn by the published weights; alike in an MMVP pair."""
    id = f"{bench}-{index}" if pair is None else f"{bench}-pair-{pair}"
    return draw(id, BENCHMARK_WEIGHTS, [1.0] * len(SEVERITIES))[0]


def _degraded(job: tuple[bytes, str, tuple[str, ...], str, float]) -> list[bytes] | str:
    """The picture at every level, or why it is missing at one of them."""
    data, corruption, levels, id, scale = job
    try:
        image = decode_image(data, id)
        return [encode_image(degrade(image, corruption, level, id, scale), "jpeg") for level in levels]
    except ClearError as error:
        return str(error)


@contextmanager
def _opened(path: Path) -> Iterator:
    """A new text file, which errors of writing it name."""
    with naming(path), path.open("w", newline="", encoding="utf-8") as file:
        yield file


def _read_part(part: Path) -> tuple[list[dict], list[Reject]]:
    """The rows of the manifest and the rejects of one file."""
    rows = [json.loads(line) for line in part.read_text().splitlines()[1:]]
    return [row for row in rows if "reason" not in row], [Reject(**row) for row in rows if "reason" in row]


def _write_manifest(path: Path, parts: Iterable[Path]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"float": pa.float64(), "int": pa.uint64(), "str": pa.string()}
    schema = pa.schema([(f.name, kinds[getattr(f.type, "__name__", f.type)]) for f in fields(Made)])
    with replacing(path) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as file:
        for part in parts:
            file.write_table(pa.Table.from_pylist(_read_part(part)[0], schema))

"""Files that state more than they hold: pictures of thousands of scans, segments or tags, Parquet of one value millions
of times, chains of thousands of stages. Refused before they are decoded, or gone through once."""

import io
import re
import struct
import warnings
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clear.bench import predictions
from clear.data import images, records, tables
from clear.data import io as files
from clear.drift.night import restorations
from clear.errors import ClearError
from clear.project import lineage, seeds
from clear.sources import incoming, llava_onevision, lmudata
from clear.traces import table as traces
from tests.helpers.tables import b64, picture, write_tsv


def saved(kind: str, **options) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (64, 64), 128).save(stream, kind, **options)
    return stream.getvalue()


def repeated(data: bytes, part: bytes, count: int, before: bytes) -> bytes:
    at = data.index(before)
    return data[:at] + part * count + data[at:]


def scans(count: int) -> bytes:
    """A progressive JPEG with its last scan `count` times more."""
    whole = saved("JPEG", progressive=True)
    return whole[:-2] + whole[whole.rindex(b"\xff\xda") : -2] * count + whole[-2:]


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def tags(count: int, shared: bytes, order: str, big: bool) -> bytes:
    """A TIFF of which `count` further tags all have their values in the same bytes."""
    data = saved("TIFF", big_tiff=big)
    at, head, entry = (8, "Q", "HHQQ") if big else (4, "H", "HHII")
    (start,) = struct.unpack_from("<Q" if big else "<I", data, at)
    (known,) = struct.unpack_from(f"<{head}", data, start)
    start += struct.calcsize(head)
    size = struct.calcsize(f"<{entry}")
    own = data[start : start + known * size]
    more = [struct.pack(f"<{entry}", 40000 + n, 12, len(shared) // 8, len(data)) for n in range(count)]
    end = len(data) + len(shared)
    made = data[:at] + struct.pack("<Q" if big else "<I", end) + data[at + (8 if big else 4) :] + shared
    return made + struct.pack(f"<{head}", known + count) + own + b"".join(more) + bytes(8)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (scans(images.MOST_SCANS), "more than 100 scans in a JPEG"),
        (repeated(saved("JPEG"), b"\xff\xfe\0\2", images.MOST_MARKERS // 2, b"\xff\xdb"), "bytes of JPEG markers"),
        (repeated(saved("JPEG"), b"\xff", images.MOST_MARKERS, b"\xff\xdb"), "bytes of JPEG markers"),
        (repeated(saved("JPEG"), b"\xff\x01", images.MOST_MARKERS // 2, b"\xff\xdb"), "bytes of JPEG markers"),
        (tags(200, bytes(2**16), "<", big=False), "the tags of this TIFF state 13,1[0-9,]+ bytes of"),
        (tags(200, bytes(2**16), "<", big=True), "the tags of this TIFF state 13,1[0-9,]+ bytes of"),
        (repeated(saved("PNG"), chunk(b"eXIf"), images.MOST_CHUNKS, saved("PNG")[33:41]), "more than 100 chunks"),
    ],
)
def test_a_picture_of_more_parts_than_any_encoder_writes_is_refused_before_it_is_opened(data, said, monkeypatch):
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(ClearError, match=rf"^a\.x: .*{said}.*; save it"):
        images.decode_image(data, "a.x")


def test_a_picture_of_many_parts_is_read_as_before():
    grey = np.full((64, 64, 3), 128)
    comments = repeated(saved("JPEG"), b"\xff\xfe\0\2", 10**4, b"\xff\xdb")
    film = saved("JPEG", progressive=True) + b"\xff\xda\0\2" * 10**4  # behind the end mark, of a motion photo
    split = repeated(saved("PNG"), chunk(b"IDAT"), 10**4, saved("PNG")[33:41])
    for data in (comments, film, split, saved("TIFF"), tags(3, bytes(16), "<", big=False)):
        with warnings.catch_warnings(action="ignore"):
            assert np.array_equal(images.decode_image(data), grey)


def parquet(path, rows: dict, schema: pa.Schema, count: int, **options):
    """A file with one row `count` times."""
    one = pa.Table.from_pylist([rows], schema)
    path.parent.mkdir(exist_ok=True)
    with pq.ParquetWriter(path, schema, compression="zstd", **options) as writer:
        writer.write_table(one.take(pa.array([0] * count)))
    return path


_PREDICTION = {"string": "a", "bool": True, "int64": 1, "double": 1.0, "binary": b"x"}
PREDICTION = {column.name: _PREDICTION[str(column.type)] for column in predictions.SCHEMA} | {"severity": "low"}
TABLE = pa.schema([("index", pa.int64()), ("question", pa.string())])
LLAVA = pa.schema([("conversations", pa.string()), ("image", pa.binary())])


def readers(folder, count: int, long: int) -> list:
    """What reads each kind of Parquet file, of `count` rows with a value of `long` bytes."""
    row, text = PREDICTION | {"output": "a" * long}, {"index": 1, "question": "a" * long}
    sample = records.to_row(records.Sample("a", "s", "t", b"x" * long, "0"))
    predicted = parquet(folder / "p.parquet", row, predictions.SCHEMA, count)
    table = parquet(folder / "t.parquet", text, TABLE, count)
    shard = parquet(folder / "shards/0.parquet", sample, records.schema(), count)
    kept = {name: row[name] for name in row if name not in seeds.DROPPED}
    columns = pa.schema([*(predictions.SCHEMA.field(name) for name in kept), ("model", pa.string())])
    collected = parquet(folder / "c.parquet", kept | {"question": "a" * long, "model": "base"}, columns, count)
    named = parquet(folder / "m.parquet", kept | {"model": "a" * long}, columns, count)
    published = parquet(folder / "l/0.parquet", {"conversations": "a" * long, "image": b""}, LLAVA, count)
    trace = {column.name: "a" if column.type == pa.string() else True for column in traces._SCHEMA}
    parquet(folder / traces.FILE, trace | {"reply_1": "a" * long}, traces._SCHEMA, count)
    night = parquet(folder / "n.parquet", {"restored": "a" * long}, pa.schema([("restored", pa.string())]), count)
    return [
        lambda: predictions.read(predicted),
        lambda: list(tables.read(table)[1]),
        lambda: list(records.read_samples(shard.parent)),
        lambda: list(incoming._parquet_rows(shard)),
        lambda: list(llava_onevision.rows(published.parent)),
        lambda: list(traces.read_traces(folder)),
        lambda: seeds._rows(collected, 1),
        lambda: seeds.models(named),
        lambda: restorations(night),
    ]


@pytest.mark.parametrize("reader", range(9))
@pytest.mark.parametrize(
    ("count", "long", "limit", "most", "stated"),
    [(30_000, 1, "MANY_ROWS", 10_000, "30,000 rows"), (1, 10**7, "UNPACKED", 10**6, "10,[0-9,]+ bytes unpacked")],
)
def test_a_parquet_file_that_is_far_more_than_its_bytes_is_refused_before_it_is_read(
    tmp_path, monkeypatch, count, long, limit, most, stated, reader
):
    read = readers(tmp_path, count, long)[reader]
    monkeypatch.setattr(files, limit, most)
    for name in ("read", "iter_batches"):
        monkeypatch.setattr(pq.ParquetFile, name, None)
    with pytest.raises(ClearError, match=rf"parquet: states {stated} in [0-9,]+ bytes, more than is read; write"):
        read()


@pytest.mark.parametrize("reader", range(9))
def test_a_long_value_that_many_rows_share_is_not_made_for_all_of_them(tmp_path, monkeypatch, reader):
    """Its column states the value once, whatever the number of rows."""
    read, made = readers(tmp_path, 500, 10**5)[reader], []
    monkeypatch.setattr(files, "UNPACKED", 10**6)
    monkeypatch.setattr(files, "AT_ONCE", 10**6)
    original = pq.ParquetFile.iter_batches

    def counted(*args, **options):
        for batch in original(*args, **options):
            made.append(batch.nbytes)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    with pytest.raises(ClearError, match=r"bytes in the first \d+ rows of a file of [0-9,]+, more than is read; write"):
        read()
    assert max(made) < 1.5 * 10**6 and sum(made) < 3 * 10**6


def test_however_few_rows_are_read_at_once_they_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "_check_rows", lambda *rest: None)
    monkeypatch.setattr(seeds, "_check_once", lambda *rest: None)
    reading = readers(tmp_path, 20, 10**5)[:7]
    found = [read() for read in reading]
    monkeypatch.setattr(files, "AT_ONCE", 1)
    predicted, *others, collected = (read() for read in reading)
    assert predicted.equals(found[0]) and others == found[1:-1] and collected.equals(found[-1])
    assert [*map(len, found)] == [20] * 7


def test_more_predictions_or_cells_than_are_read_are_refused_by_their_number(tmp_path, monkeypatch):
    predicted, table, *_ = readers(tmp_path, 100, 1)
    for name in ("read", "iter_batches"):
        monkeypatch.setattr(pq.ParquetFile, name, None)
    monkeypatch.setattr(predictions, "MOST_ROWS", 99)
    monkeypatch.setattr(tables, "CELLS", 199)
    with pytest.raises(ClearError, match=r"p\.parquet: 100 rows, and at most 99 are read"):
        predicted()
    with pytest.raises(ClearError, match=r"t\.parquet: more than 199 cells in 2 columns"):
        table()


def test_a_chain_of_thousands_of_stages_is_followed_without_comparing_all(monkeypatch):
    count, made, original = 3000, [], lineage.Path
    lock = {f"s{n}": {"deps": [{"path": f"o/{n - 1}"}] if n else []} for n in range(count)}
    monkeypatch.setattr(lineage, "Path", lambda path: made.append(path) or original(path))
    index = lineage._Index({f"o/{n}": f"s{n}" for n in range(count)})
    assert lineage._before(lock, index, f"s{count - 1}") == [f"s{n}" for n in reversed(range(count))]
    assert len(made) <= 2 * count


def test_outputs_are_found_by_what_they_are_below_and_hold_in_their_order():
    index = lineage._Index({"b/x": "1", "a": "2", "b/y": "3", "c/d": "4", "b": "5", "bb": "6"})

    def read(*paths: str) -> list[str]:
        return index.read({"deps": [{"path": path} for path in paths]})

    assert read("b") == ["b/x", "b/y", "b"] and read("b/x/z") == ["b/x", "b"] and read("b/y") == ["b/y", "b"]
    assert read("c/d/", "a") == ["c/d", "a"] and read("c") == ["c/d"] and read("d", "c/dd") == []
    circle = {name: {"deps": [{"path": "b"}]} for name in "1235"}
    assert set(lineage._before(circle, index, "1")) == {"1", "3", "5"}


@pytest.mark.parametrize(("kept", "calls"), [(lmudata.KEPT, 3), (1, 6)])
def test_a_picture_is_read_once_for_all_rows_that_refer_to_it(tmp_path, monkeypatch, kept, calls):
    rows = [{"index": n, "image": str(n % 3), "question": "q", "answer": "a"} for n in range(9)]
    pictures = picture(0), picture(1)
    rows[0]["image"], rows[1]["image"], rows[2]["image"] = b64(pictures[0]), b64(pictures[1]), "[" + "a" * 80
    asked, original = [], tables.text_row
    monkeypatch.setattr(tables, "text_row", lambda *args: asked.append(args) or original(*args))
    monkeypatch.setattr(lmudata, "KEPT", kept)
    found = list(lmudata.rows(write_tsv(tmp_path / "a.tsv", rows)))
    assert [row.image for row in found if hasattr(row, "image")] == [*pictures, *pictures, *pictures]
    lists = [row for row in found if not hasattr(row, "image")]
    assert len(lists) == 3 and all(re.search("list of images", str(row)) for row in lists)
    assert len(asked) == calls

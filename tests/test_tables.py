"""The reader of tables from outside: text stays text, no row is lost or shifted, odd files are refused by name."""

import csv
import json
import random
import re
import zipfile
from pathlib import Path

import openpyxl
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from clear.data import tables
from clear.errors import ClearError
from tests.conftest import ROOT

ENDINGS = ("tsv", "csv", "parquet", "xlsx", "json", "jsonl")
PLAIN = ("None", "NA", "null", "nan", "N/A", "007", "1e5", "True", "1.0", "-5", "12345678901234567890", "", " x ", '"')


def write(file: Path, rows: list[dict]) -> Path:
    """Rows of text in the format of the file's ending, written by the usual library for it."""
    frame = pd.DataFrame(rows)
    if file.suffix in tables.DELIMITERS:
        frame.to_csv(file, sep=tables.DELIMITERS[file.suffix], index=False)
    elif file.suffix == ".parquet":
        frame.to_parquet(file, index=False)
    elif file.suffix == ".xlsx":
        frame.to_excel(file, index=False)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def cells(file: Path, **more) -> list[dict[str, str]]:
    return [row.cells for row in tables.read(file, **more)[1]]


def text(folder: Path, content: str | bytes, name: str = "x.tsv") -> Path:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


@pytest.mark.parametrize("ending", ENDINGS)
def test_text_stays_text_in_every_format(tmp_path, ending):
    rows = [{"index": str(n), "A": value, "B": "end"} for n, value in enumerate(PLAIN)]
    file = write(tmp_path / f"x.{ending}", rows)
    header, found = tables.read(file)
    assert header == ["index", "A", "B"]
    found = list(found)
    assert [row.cells for row in found] == rows
    assert [row.number for row in found] == list(range(1, len(rows) + 1))


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_null_is_an_absent_cell_and_a_whole_float_an_integer(tmp_path, ending):
    """pandas makes floats of a column of integers with a gap, and writes them as such."""
    rows = [{"index": 1, "A": "red", "n": 2.0, "f": 0.25}, {"index": 2**53 + 1, "A": None, "n": None, "f": 1e-7}]
    found = cells(write(tmp_path / f"x.{ending}", rows))
    assert [row["index"] for row in found] == ["1", str(2**53 + 1)] if ending != "xlsx" else found
    assert [row["A"] for row in found] == ["red", ""]
    whole = "2.0" if ending in ("tsv", "csv") else "2"  # the text that stands in a text file stays
    assert [row["n"] for row in found] == [whole, ""] and [row["f"] for row in found] == ["0.25", "1e-07"]


def test_types_of_parquet(tmp_path):
    table = pa.table({"b": [True], "u": pa.array([2**64 - 1], pa.uint64()), "l": [["x", "é"]], "i": [b"\xff"]})
    pq.write_table(table, tmp_path / "x.parquet")
    (row,) = cells(tmp_path / "x.parquet", skip=("i",))
    assert row == {"b": "True", "u": "18446744073709551615", "l": '["x", "é"]'}
    with pytest.raises(ClearError, match=r"x\.parquet: row 1, column 'i': bytes, expected text"):
        cells(tmp_path / "x.parquet")


# --- quoting and shape -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(*[st.text(st.sampled_from('a"\t\n, é'), max_size=7)] * 4).map(list), min_size=1, max_size=5))
def test_what_pandas_writes_is_read_as_it_was(tmp_path, quoting, rows):
    for ending, delimiter in tables.DELIMITERS.items():
        assume(all("".join(row) for row in rows))  # a row of nothing is a blank line for csv
        file = tmp_path / f"x{ending}"
        pd.DataFrame(rows, columns=list("abcd")).to_csv(file, sep=delimiter, index=False, quoting=quoting)
        header, found = tables.read(file)
        try:
            found = list(found)
        except ClearError as error:  # a cell that looks like rows: tabs as many as in one, in a line of its own
            assert "closed only rows later" in str(error) and any("\n" in cell for row in rows for cell in row)
            assume(False)
        assert [list(row.cells.values()) for row in found] == rows
        for row in found:
            assert tables.text_row(file, header, row.offset) == row.cells


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(*[st.text(st.sampled_from('a" ,'), max_size=5)] * 3), min_size=1, max_size=6))
@example([('"', '"', '"'), ("", '"', "")])  # two marks enclose a tab, the third the next row
def test_no_row_written_by_hand_is_ever_lost_silently(tmp_path, rows):
    """Without quoting: as many rows as lines, each text as it stands or without the marks around it; or a refusal."""
    lines = ["\t".join([str(n), *row]) for n, row in enumerate(rows)]
    file = text(tmp_path, "\n".join(["i\ta\tb\tc", *lines]))
    try:
        found = cells(file)
    except ClearError as error:
        assert re.search(r"closed only rows later|row \d+ has \d cells", str(error))
        return
    assert [row["i"] for row in found] == [str(n) for n in range(len(rows))]
    for row, given_ in zip(found, rows, strict=True):
        for got, cell in zip(list(row.values())[1:], given_, strict=True):
            assert got in (cell, cell[1:-1].replace('""', '"'))


def test_a_quotation_mark_that_begins_a_cell_swallows_nothing(tmp_path):
    body = 'i\tq\tA\n1\t"Stop the car\tred\n2\twho\tred\n3\t"Go on\tred\n4\t"Stop" it says\tx\n5\t"all"\t"it ""is"""\n'
    found = cells(text(tmp_path, body))
    assert [row["q"] for row in found] == ['"Stop the car', "who", '"Go on', '"Stop" it says', "all"]
    assert found[-1]["A"] == 'it "is"'


def test_marks_that_could_enclose_whole_rows_are_refused(tmp_path):
    body = 'i\tq\tA\n1\t"Stop\tred\n2\twho\tred\n3\tgo on"\tred\n'
    with pytest.raises(ClearError, match=r"x\.tsv: the quotation mark that begins a cell of row 1 is closed only rows"):
        cells(text(tmp_path, body))


def test_an_open_mark_in_a_long_file_keeps_nothing_in_memory(tmp_path):
    import tracemalloc

    line = "\t".join(["1", "x" * 10_000, "red"])
    file = text(tmp_path, "\n".join(["i\tq\tA", '0\t"Stop\tred', *[line] * 2000]))
    tracemalloc.start()
    assert sum(1 for _ in tables.read(file)[1]) == 2001
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("ending", ["tsv", "csv"])
def test_a_delimiter_at_the_end_of_rows_is_no_cell_and_a_value_there_is_refused(tmp_path, ending):
    def made(body):
        return text(tmp_path, body if ending == "tsv" else body.replace("\t", ","), f"x.{ending}")

    good = [{"i": "0", "q": "who", "A": "B"}]
    assert cells(made("i\tq\tA\n0\twho\tB\t\n")) == good
    assert cells(made("i\tq\tA\t\n0\twho\tB\t\t\n\n")) == good
    assert cells(made("\ti\tq\tA\n7\t0\twho\tB\n")) == [{"": "7"} | good[0]], "the index that pandas writes"
    for body, count in {"i\tq\tA\n0\twho\tA\tB\n": 4, "i\tq\tA\n0\twho\n": 2, 'i\tq\tA\n0\t"who\tA\n': 2}.items():
        if count == 2 and '"' in body:
            assert cells(made(body)) == [{"i": "0", "q": '"who', "A": "A"}]
            continue
        with pytest.raises(ClearError, match=rf"row 1 has {count} cells, the header 3; repair the row"):
            cells(made(body))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        ("i\tq\n".encode("utf-16"), "is UTF-16"),
        (b"i\tq\n1\tn\xefve\n", "byte 7 is not UTF-8"),
        (b"i\tq\ti\n", "column 'i' occurs twice"),
        (b"\ti\t\tq\n", "a column without a heading occurs twice"),
        (b"i\tq\r1\tx\r2\ty\r", "the header has a carriage return outside quotation marks"),
        (b"i\tq\n1\tx\ry\n", "row 1 has a carriage return outside quotation marks"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, content, said):
    with pytest.raises(ClearError, match=rf"x\.tsv: .*{said}"):
        cells(text(tmp_path, content))


def test_byte_order_mark_windows_line_ends_and_line_ends_in_cells(tmp_path):
    file = text(tmp_path, b'\xef\xbb\xbfi\tq\r\n1\t"a\r\nb"\r\n2\t"c\rd"\r\n')
    header, found = tables.read(file)
    found = list(found)
    assert header == ["i", "q"] and [row.cells["q"] for row in found] == ["a\r\nb", "c\rd"]
    assert tables.text_row(file, header, found[1].offset) == found[1].cells


def test_absent_files_and_unknown_endings_are_named(tmp_path):
    with pytest.raises(ClearError, match=r"none\.tsv: cannot be read \(No such file"):
        tables.read(tmp_path / "none.tsv")
    with pytest.raises(ClearError, match=r"none\.parquet: cannot be read \(No such file"):
        tables.read(tmp_path / "none.parquet")
    with pytest.raises(ClearError, match=r"x\.pkl: '\.pkl' is not a supported table .*\.xlsx"):
        tables.read(tmp_path / "x.pkl")


# --- damaged and hostile files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["parquet", "xlsx", "json", "jsonl"])
@pytest.mark.parametrize("cut", [0, 10, 40, -30])
def test_a_damaged_file_is_named_in_one_line(tmp_path, ending, cut):
    file = write(tmp_path / f"x.{ending}", [{"index": "1", "A": "red"}] * 9)
    whole = file.read_bytes()
    file.write_bytes(whole[:cut])
    with pytest.raises(ClearError, match=rf"x\.{ending}: ") as caught:
        if cells(file) == []:
            raise ClearError(f"x.{ending}: nothing in it")  # an empty JSONL file is a table without rows
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", ["parquet", "xlsx", "json", "tsv"])
def test_a_byte_that_is_wrong_never_ends_in_a_traceback(tmp_path, ending):
    file = write(tmp_path / f"x.{ending}", [{"index": str(n), "A": "red é", "n": n * 1.5} for n in range(9)])
    whole, generator, refused = file.read_bytes(), random.Random(0), 0
    for _ in range(150):
        data = bytearray(whole)
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        file.write_bytes(data)
        try:
            cells(file)
        except ClearError as error:
            refused += 1
            assert str(file) in str(error) and "\n" not in str(error)
    assert refused


def test_json_that_is_no_list_of_objects_is_named(tmp_path):
    for body in ('{"a": 1}', "[1]", "[[]]"):
        with pytest.raises(ClearError, match=r"x\.json: is not a list of objects"):
            cells(text(tmp_path, body, "x.json"))
    with pytest.raises(ClearError, match=r"x\.json: not a readable json table \(maximum recursion depth"):
        cells(text(tmp_path, "[" * 200_000, "x.json"))
    with pytest.raises(ClearError, match=r"row 1, column 'a': 'utf-8' codec can't encode"):
        cells(text(tmp_path, '[{"a": "\\ud800"}]', "x.json"))


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_a_repeated_key_of_json_is_refused_by_row(tmp_path, ending):
    """Of the two answers the last one was read, as if the first had never been given."""

    def made(*rows: str) -> Path:
        body = "\n".join(rows) if ending == "jsonl" else f"[{','.join(rows)}]"
        return text(tmp_path, body, f"x.{ending}")

    plain, twice = '{"i": 1, "p": "A", "d": {"p": 1}}', '{"i": 2, "p": "A", "p": "A"}'
    assert [row["i"] for row in cells(made(plain, plain))] == ["1", "1"]
    with pytest.raises(ClearError, match=rf"x\.{ending}: the key 'p' occurs twice in row 2; remove one of them"):
        tables.read(made(plain, twice, plain))
    with pytest.raises(ClearError, match=rf"x\.{ending}: the key 'a' occurs twice in an object inside a cell; remove"):
        tables.read(made(plain, '{"i": 1, "d": [{"a": 1, "a": 2}]}'))
    if ending == "json":
        with pytest.raises(ClearError, match=r"x\.json: is not a list of objects"):
            tables.read(text(tmp_path, '{"a": 1, "a": 2}', "x.json"))


def sheet(file: Path, rows: list[list]) -> Path:
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.save(file)
    return file


def test_formulas_errors_and_cells_without_heading_of_a_spreadsheet_are_named(tmp_path):
    for value, said in {"=5": "the formula =5", "#N/A": "the error value #N/A"}.items():
        with pytest.raises(ClearError, match=rf"row 2, column 'A' holds {said}; put its text"):
            cells(sheet(tmp_path / "x.xlsx", [["index", "A"], [1, "x"], [2, value]]))
    with pytest.raises(ClearError, match="row 1 has 3 cells, the header 2"):
        cells(sheet(tmp_path / "x.xlsx", [["index", "A"], [1, "x", "y"]]))
    assert cells(sheet(tmp_path / "x.xlsx", [["index", "A"], [1], [], [2, "x", None]])) == [
        {"index": "1", "A": ""},
        {"index": "2", "A": "x"},
    ]
    with pytest.raises(ClearError, match=r"x\.xlsx: is empty"):
        cells(sheet(tmp_path / "x.xlsx", []))


def test_a_spreadsheet_that_unpacks_to_too_much_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    file = sheet(tmp_path / "x.xlsx", [["index"], [1]])
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/more.xml", b" " * 2**22)
    assert file.stat().st_size < 2**16
    monkeypatch.setattr(tables, "UNPACKED", 2**21)
    with pytest.raises(ClearError, match=r"x\.xlsx: has \d+ bytes unpacked, at most 2097152 are read"):
        cells(file)


def test_a_spreadsheet_whose_directory_lies_takes_no_memory(tmp_path):
    """Python's zipfile would take the gigabytes that a part of this file of some kilobytes says it has."""
    file = tmp_path / "x.xlsx"
    file.write_bytes((ROOT / "tests/fuzz/corpus/xlsx/8ba81fbc91ca0632").read_bytes())
    with pytest.raises(ClearError, match=r"x.xlsx: not a readable xlsx table \(a part is larger than the file\)"):
        cells(file)


def test_entities_of_a_spreadsheet_do_not_multiply(tmp_path):
    """Expat refuses a document whose entities grow out of proportion."""
    file, out = sheet(tmp_path / "x.xlsx", [["index", "A"], [1, "here"]]), tmp_path / "y.xlsx"
    bomb = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12))
    bombs = 0
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            data = old.read(name).decode()
            if "here" in data:
                doctype = f'<!DOCTYPE x [<!ENTITY e0 "{"x" * 100}">{bomb}]>'
                data = doctype + data.rpartition("?>")[2].replace("here", "&e11;")
                bombs += 1
            new.writestr(name, data)
    assert bombs == 1
    with pytest.raises(ClearError, match=r"y\.xlsx: not a readable xlsx table \(limit on input amplification"):
        cells(out)

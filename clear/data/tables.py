"""Tables that come from outside: TSV, CSV, Parquet, xlsx, JSON and JSONL, read as rows of text.

One rule for all formats: a cell is text and is kept literally ("None", "NA", "007", "1e5", "True"); a missing cell or
a null is "". Numbers of a typed format are written in their shortest form: 7, and also 7 for the 7.0 that pandas makes
of a column of integers with gaps. Every row has as many cells as the header, so that no cell is ever shifted: surplus
cells are dropped if they are empty (a tab at the end of the line) and rejected if they are not.

Quoting in TSV and CSV. pandas and VLMEvalKit write quoted cells with doubled quotation marks, either all cells or only
where necessary; hand-written files quote nothing. So a cell is quoted if it begins with a quotation mark and its end
mark comes before a delimiter, the end of a line or of the file; otherwise the mark is a character of the text and the
cell ends at the delimiter. If both readings give complete rows the file is rejected, because one of them loses rows.
"""

import io
import json
import math
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clear.data.io import batches, check_unpacked
from clear.errors import ClearError, one_line, quoted

DELIMITERS = {".tsv": "\t", ".csv": ","}
UNPACKED = 2**29
"""Most bytes that an xlsx file may have unpacked; a spreadsheet of predictions has a hundredth of them."""

COLUMNS = 10**4
"""Most columns of a TSV or CSV file; a benchmark has twenty."""

CELLS = 5 * 10**7
"""Most cells of a file of any other format, those counted that its rows do not state; a benchmark has a million."""

_QUOTE = '"'


@dataclass(frozen=True)
class TableRow:
    """One row: its number (the first row below the header is 1), the text of its cells by column (absent: ""), and in
    TSV and CSV the byte at which it begins, for `text_row` (elsewhere -1)."""

    number: int
    cells: dict[str, str]
    offset: int = -1


def read(path: Path, skip: Collection[str] = ()) -> tuple[list[str], Iterator[TableRow]]:
    """(columns, rows) of a table by its file's ending; rows are read as they are asked for, in flat memory.

    Columns named in `skip` are left out. A column without a heading (the index that pandas writes) is called "".
    Raises ClearError naming the file, and the row where there is one, here for a file without a readable header and
    from the rows for what is wrong in them.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in DELIMITERS:
        stream = _text(path, DELIMITERS[suffix])
    elif suffix in _TYPED:
        stream = _typed(path, suffix, skip)
    else:
        known = ", ".join((*DELIMITERS, *_TYPED))
        raise ClearError(f"{path}: '{path.suffix}' is not a supported table format; save it as one of {known}.")
    header = next(stream)
    counts = Counter(header)  # typed formats may have any number of columns
    twice = next((name for name in header if counts[name] > 1), None)
    if twice is not None:
        what = f"column '{twice}'" if twice else "a column without a heading"
        raise ClearError(f"{path}: {what} occurs twice in the header; give every column a different name.")
    kept = [name for name in header if name not in skip]
    return kept, (TableRow(n, {name: cells[name] for name in kept}, at) for n, cells, at in stream)


def text_row(path: Path, columns: Sequence[str], offset: int) -> dict[str, str]:
    """One row of a TSV or CSV file by its `offset`; `columns` are all columns of the file."""
    with path.open("rb") as stream:
        stream.seek(offset)
        lines = _Lines(stream, path)
        return dict(zip(columns, _record(lines, DELIMITERS[path.suffix.lower()], len(columns), 0), strict=False))


def text_of(value: Any) -> str:
    """A value of a typed table as text; null and NaN are "". Raises ValueError unless it is text, number or date."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        value.encode()  # a lone surrogate could never be written again
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=text_of)
    if isinstance(value, bytes):
        raise ValueError("bytes, expected text")
    return str(value)


# --- TSV and CSV -----------------------------------------------------------------------------------------------------


class _Lines:
    """The lines of a binary file as text without their ends, and the byte at which the next one begins."""

    def __init__(self, stream: io.BufferedReader, path: Path) -> None:
        self.stream, self.path, self.offset, self.ending = stream, path, stream.tell(), ""

    def next(self) -> str | None:
        """The next line, None at the end of the file; `ending` is what stood between it and the one after."""
        line = self.stream.readline()
        if not line:
            return None
        if self.offset == 0 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise ClearError(f"{self.path}: is UTF-16; save it as UTF-8.")
        try:
            text = line.decode("utf-8-sig" if self.offset == 0 else "utf-8")
        except UnicodeDecodeError as error:
            byte = self.offset + error.start
            raise ClearError(f"{self.path}: byte {byte} is not UTF-8; save the file as UTF-8.") from error
        self.offset += len(line)
        self.ending = "\r\n" if text.endswith("\r\n") else "\n" if text.endswith("\n") else ""
        return text.removesuffix(self.ending)

    def back(self, offset: int, ending: str) -> None:
        """Go back to behind a line that was read."""
        self.stream.seek(offset)
        self.offset, self.ending = offset, ending


def _text(path: Path, delimiter: str) -> Iterator[Any]:
    """The header, then (number, cells, offset) of each row."""
    with _opened(path) as stream:
        lines = _Lines(stream, path)
        header = _record(lines, delimiter, 0, 0)
        if header is None:
            raise ClearError(f"{path}: is empty; a table begins with a line of column names.")
        header = _headings(header)
        yield header
        number = 0
        while True:
            start, number = lines.offset, number + 1
            cells = _record(lines, delimiter, len(header), number)
            if cells is None:
                return
            if len(cells) < len(header) or any(cells[len(header) :]):
                raise _misshapen(path, number, len(cells), header)
            yield number, dict(zip(header, cells, strict=False)), start


def _record(lines: _Lines, delimiter: str, columns: int, number: int) -> list[str] | None:
    """The cells of the next row, None at the end; blank lines between rows are passed over, as in pandas.

    `columns` is the header's number of cells, 0 for the header itself, in which no cell extends over a line.
    """
    while (line := lines.next()) == "":
        pass
    if line is None:
        return None
    if not columns and (count := line.count(delimiter)) >= COLUMNS:
        raise ClearError(f"{lines.path}: the header has {count + 1} cells, at most {COLUMNS} are read; save it anew.")
    cells, position = [], 0
    while position <= len(line):
        if line.startswith(_QUOTE, position):
            end = _closing(line, position + 1, delimiter)
            if end is None and columns:  # no closing mark in this line
                # A whole row by itself: from here on, or with every mark in it, those of the cells before too, as text.
                is_row = columns in (len(cells) + line.count(delimiter, position) + 1, line.count(delimiter) + 1)
                line, end = _extended(lines, line, delimiter, columns if is_row else 0, number)
            if end is not None and end >= 0:
                cells.append(line[position + 1 : end].replace(_QUOTE * 2, _QUOTE))
                position = end + 2
                continue
        end = line.find(delimiter, position)
        end = len(line) if end < 0 else end
        cells.append(line[position:end])
        if "\r" in cells[-1]:
            raise ClearError(
                f"{lines.path}: {f'row {number}' if number else 'the header'} has a carriage return outside quotation "
                "marks, which pandas reads as the end of a row; end rows with a line feed, or quote the cell."
            )
        position = end + 1
    return cells


def _closing(line: str, position: int, delimiter: str) -> int | None:
    """Where the quoted cell ends that `position` is in: -1 if its mark is followed by text, None if it has none."""
    while True:
        position = line.find(_QUOTE, position)
        if position < 0:
            return None
        following = line[position + 1 : position + 2]
        if following != _QUOTE:
            return position if following in ("", delimiter) else -1
        position += 2


def _extended(lines: _Lines, line: str, delimiter: str, columns: int, number: int) -> tuple[str, int | None]:
    """`line` with the lines that its open cell extends over, and where in that text the cell ends.

    The line alone, and None, if the cell is not quoted after all. `columns` is 0 unless the line is a whole row by
    itself. Raises ClearError where it is, the next line is one too, and still the cell ends in a later one.
    """
    resume, ending = lines.offset, lines.ending
    parts, length = [line, ending], len(line) + len(ending)
    both = None
    while (more := lines.next()) is not None:
        if both is None:
            both = more.count(delimiter) + 1 == columns
        end = _closing(more, 0, delimiter)
        if end is None:
            if not both:  # otherwise the lines are rows, read again one by one, or the file is refused
                parts += [more, lines.ending]
            length += len(more) + len(lines.ending)
            continue
        if end < 0:
            break
        if both:
            raise ClearError(
                f"{lines.path}: the quotation mark that begins a cell of row {number} is closed only rows later, so "
                "rows may be lost; quote the cell and double the marks inside, or remove the mark."
            )
        return "".join((*parts, more)), length + end
    lines.back(resume, ending)
    return line, None


# --- Parquet, xlsx, JSON ---------------------------------------------------------------------------------------------


def _typed(path: Path, suffix: str, skip: Collection[str]) -> Iterator[Any]:
    """The header, then (number, cells, -1) of each row, of a format that has types; without the columns `skip`."""
    import pyarrow as pa

    _opened(path).close()
    try:
        stream = _TYPED[suffix](path, skip)
        header = next(stream)
        yield header
        for number, row in enumerate(stream, start=1):
            cells = {}
            if number * len(header) > CELLS:  # of a row that states one cell each column takes time
                raise _too_many(path, header)
            for name in header:
                try:
                    cells[name] = text_of(row.get(name))
                except ValueError as error:
                    raise ClearError(f"{path}: row {number}, column '{name}': {error}; repair the cell.") from error
            yield number, cells, -1
    except (*_DAMAGED, pa.ArrowException) as error:
        text = one_line(error)[:200]
        raise ClearError(f"{path}: not a readable {suffix[1:]} table ({text}); write it again.") from error


def _parquet(path: Path, skip: Collection[str]) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        names = [name for name in file.schema_arrow.names if name not in skip]
        check_unpacked(path, file.metadata)
        if file.metadata.num_rows * len(names) > CELLS:
            raise _too_many(path, names)
        yield names
        for batch in batches(path, file, 256, names):
            yield from batch.to_pylist()


def _xlsx(path: Path, skip: Collection[str]) -> Iterator[Any]:
    """The first sheet. Expat, which parses it, limits the expansion of entities; the size unpacked is limited here."""
    from openpyxl import load_workbook

    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        size, packed = sum(member.file_size for member in members), [member.compress_size for member in members]
    if max(packed, default=0) > path.stat().st_size:  # memory would be taken for what it says
        raise ClearError(f"{path}: not a readable xlsx table (a part is larger than the file); write it again.")
    if size > UNPACKED:
        raise ClearError(f"{path}: has {size} bytes unpacked, at most {UNPACKED} are read; save the table as TSV.")
    with warnings.catch_warnings(action="ignore"):  # of parts that no cell is in
        book = load_workbook(path, read_only=True)
    try:
        sheet = book.worksheets[0]
        sheet.reset_dimensions()  # some writers state a wrong size
        rows = sheet.iter_rows()
        header = _headings([text_of(cell.value) for cell in next(rows, ())])
        if not header:
            raise ClearError(f"{path}: is empty; a table begins with a row of column names.")
        yield [name for name in header if name not in skip]
        for number, cells in enumerate(rows, start=1):
            values = [cell.value for cell in cells]
            if all(value is None for value in values):
                continue
            if any(value is not None for value in values[len(header) :]):
                raise _misshapen(path, number, len(values), header)
            for name, cell in zip(header, cells, strict=False):
                if cell.data_type in ("e", "f") and name not in skip:
                    what = "the error value" if cell.data_type == "e" else "the formula"
                    raise ClearError(
                        f"{path}: row {number}, column '{name}' holds {what} {cell.value}; put its text in the cell."
                    )
            yield dict(zip(header, values, strict=False))
    finally:
        book.close()


def _json(path: Path, skip: Collection[str]) -> Iterator[Any]:
    text, repeated = path.read_text(encoding="utf-8-sig"), []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        cells = dict(pairs)  # of a repeated key the last value only
        if len(cells) < len(pairs):
            repeated.append((cells, next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)))
        return cells

    if path.suffix.lower() == ".jsonl":
        rows = [json.loads(line, object_pairs_hook=unique) for line in text.split("\n") if line.strip()]
    else:
        rows = json.loads(text, object_pairs_hook=unique)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ClearError(f"{path}: is not a list of objects; write one object per row.")
    if repeated:
        raise _repeated(path, rows, repeated)
    yield [name for name in dict.fromkeys(name for row in rows for name in row) if name not in skip]
    yield from rows


_DAMAGED = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, SyntaxError, RuntimeError, EOFError),
    *(zipfile.BadZipFile, zlib.error),
)
"""What the readers raise for damaged files: SyntaxError for XML, RuntimeError for what is packed in another way or
nested too deeply."""

_TYPED = {".parquet": _parquet, ".xlsx": _xlsx, ".json": _json, ".jsonl": _json}


def _opened(path: Path) -> io.BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise ClearError(f"{path}: cannot be read ({error.strerror}); name an existing file.") from error


def _headings(cells: list[str]) -> list[str]:
    """The header without empty cells at its end, where a delimiter ended the line."""
    count = len(cells)
    while count and not cells[count - 1]:
        count -= 1
    return cells[:count]


def _repeated(path: Path, rows: list[dict], repeated: list[tuple[dict, str]]) -> ClearError:
    """For JSON objects of which a key occurs twice, each with that key: the first row, else one inside a cell."""
    keys = {id(cells): key for cells, key in repeated}
    number = next((number for number, row in enumerate(rows) if id(row) in keys), None)
    if number is None:
        key, where = repeated[0][1], " in an object inside a cell"
    else:
        key, where = keys[id(rows[number])], f" in row {number + 1}"
    return ClearError(f"{path}: the key {quoted(key)} occurs twice{where}; remove one of them.")


def _too_many(path: Path, header: Sequence[str]) -> ClearError:
    return ClearError(f"{path}: more than {CELLS:,} cells in {len(header):,} columns; leave columns out.")


def _misshapen(path: Path, number: int, count: int, header: Sequence[str]) -> ClearError:
    return ClearError(
        f"{path}: row {number} has {count} cells, the header {len(header)}; repair the row, or name every column."
    )

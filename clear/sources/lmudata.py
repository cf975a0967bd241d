"""Benchmark files of VLMEvalKit: `<name>.tsv` with images in base64 (METHOD §6 "Benchmark TSV").

Columns: `index`; `image`, base64 or (64 characters and less) the index of the row that holds it, before or after;
`question` or `prompt` (CV-Bench); options `A`, `B`, …; `answer`; `category`, `l2-category`, `split`, `hint`, and any
other. Instead of `image` there may be `image_path`, relative to the folder. A file is read twice, first to learn where
the images are, so that memory stays flat. In MMVP two rows in succession are the two halves of a pair.
"""

import base64
import binascii
import csv
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from clear.errors import ClearError
from clear.rejects import Reject
from clear.sources.rows import Row, question

REFERENCE = 64
"""An image field of at most so many characters names another row, as in VLMEvalKit."""

OPTIONS = "ABCDEFGHIJ"


def files(path: Path) -> list[Path]:
    """The TSV files at a path. Raises ClearError if there are none."""
    found = [path] if path.is_file() else sorted(path.glob("*.tsv"))
    if not found or found[0].suffix != ".tsv":
        raise ClearError(f"{path}: no *.tsv file here; name VLMEvalKit's LMUData folder or one of its files.")
    return found


def count(path: Path) -> int | None:
    """Number of rows, counted without decoding."""
    return sum(1 for file in files(path) for _ in records(file))


def rows(path: Path) -> Iterator[Row | Reject]:
    """Every row of the files at `path`, or why it cannot be used. Raises ClearError for a file without the columns."""
    for file in files(path):
        table = Table(file)
        for number, record in enumerate(records(file)):
            yield _row(file.stem, number, record, table)


def records(file: Path) -> Iterator[dict[str, str]]:
    """The rows of a file as dictionaries of text; absent cells are "". Raises ClearError naming a row that is odd."""
    yield from (record for _, record in _located(file))


def _located(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(offset in bytes, row) for each row."""
    csv.field_size_limit(sys.maxsize)  # a cell holds a whole picture
    with file.open("rb") as stream:
        lines = _Lines(stream, file)
        reader = csv.reader(lines, delimiter="\t")
        header = _cells(reader, file, 0)
        if header is None or "index" not in header or not {"question", "prompt"} & set(header):
            raise ClearError(
                f"{file}: no header with 'index' and 'question' in its first line; is it a VLMEvalKit TSV?"
            )
        number = 0
        while True:
            start, number = lines.offset, number + 1
            cells = _cells(reader, file, number)
            if cells is None:
                return
            if len(cells) != len(header):
                raise ClearError(
                    f"{file}: row {number} has {len(cells)} cells, the header {len(header)}; repair or remove the row."
                )
            yield start, dict(zip(header, cells, strict=True))


class _Lines:
    """The lines of a binary file as text, and how far it was read."""

    def __init__(self, stream: io.BufferedReader, file: Path) -> None:
        self.stream, self.file, self.offset = stream, file, stream.tell()

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self.stream.readline()
        if not line:
            raise StopIteration
        try:
            text = line.decode("utf-8-sig" if self.offset == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise ClearError(
                f"{self.file}: byte {self.offset + error.start} is not UTF-8; convert the file."
            ) from error
        self.offset += len(line)
        return text


def _cells(reader, file: Path, number: int) -> list[str] | None:
    try:
        return next(reader, None)
    except csv.Error as error:
        raise ClearError(f"{file}: row {number} is no row of tab-separated values ({error}).") from error


class Table:
    """Where the images of a file are: index to offset. Raises ClearError if an index occurs twice."""

    def __init__(self, file: Path) -> None:
        self.file, self.header, self._places = file, None, {}
        seen: set[str] = set()
        for offset, record in _located(file):
            self.header = list(record)
            if record["index"] in seen:
                raise ClearError(f"{file}: index {record['index']} occurs twice; number the rows.")
            seen.add(record["index"])
            if len(record.get("image", "")) > REFERENCE:
                self._places[record["index"]] = offset

    def __contains__(self, index: str) -> bool:
        return index in self._places

    def image(self, index: str) -> str:
        """The base64 text of the row with this index."""
        csv.field_size_limit(sys.maxsize)
        with self.file.open("rb") as stream:
            stream.seek(self._places[index])
            cells = next(csv.reader(_Lines(stream, self.file), delimiter="\t"))
        return cells[self.header.index("image")]


def image_of(record: dict[str, str], table: Table) -> bytes | str:
    """The encoded image of a row, or what is wrong with it."""
    text = record.get("image", "").strip()
    if not text and record.get("image_path"):
        return _from_path(record["image_path"], table.file.parent)
    if not text:
        return "the row has no image"
    if len(text) <= REFERENCE:
        if text not in table:
            return f"image refers to index {text}, and no row with this index holds an image"
        text = table.image(text)
    if text.startswith("["):
        return "the row has several images, expected one"
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        return f"the image is not base64 ({error})"


def _from_path(name: str, folder: Path) -> bytes | str:
    if Path(name).is_absolute() or os.path.normpath(name).startswith(".."):
        return f"image_path {name} leads out of the folder"
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        return f"image_path {name}: {error.strerror}"


def _row(bench: str, number: int, record: dict[str, str], table: Table) -> Row | Reject:
    id = f"{bench}-{record['index']}"
    image = image_of(record, table)
    if isinstance(image, str):
        return Reject(id, bench, "no image", image)
    listed = [record.get(letter, "") for letter in OPTIONS]
    options = listed[: listed.index("")] if "" in listed else listed
    if any(listed[len(options) :]):
        return Reject(id, bench, "question", f"option {OPTIONS[len(options)]} is empty, a later one is not")
    text = record.get("question") or record.get("prompt", "")
    if record.get("hint"):
        text = f"Hint: {record['hint']}\n{text}"
    pair = f"{bench}-pair-{number // 2}" if bench.split("_")[0] == "MMVP" else ""
    made = question(id, bench, text, record.get("answer", ""), options, pair=pair)
    if isinstance(made, str):
        return Reject(id, bench, "question", made)
    known = {"image", "image_path", "question", "prompt", "answer", "hint", *OPTIONS}
    return Row(id, bench, image, (made,), {"subset": bench} | {k: v for k, v in record.items() if k not in known and v})

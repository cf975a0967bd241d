"""Benchmark files of VLMEvalKit: `<name>.tsv` with images in base64 (METHOD §6 "Benchmark TSV").

Columns: `index`; `image`, base64 (also wrapped, also as a data: URI) or, in 64 characters and less, the index of the
row that contains it, before or after, directly or through other rows; `question` or `prompt` (CV-Bench); options `A`,
`B`, …; `answer`; `category`, `l2-category`, `split`, `hint`, and any other. Instead of `image` there may be
`image_path`, relative to the folder. All cells are text (clear/data/tables.py). A file is read twice, first to learn
where the images are, so that memory stays flat. In MMVP two rows are the halves of a pair (`pairs`).
"""

import base64
import binascii
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import dropwhile
from pathlib import Path, PurePath

from clear.data import tables
from clear.data.records import file_sha256, sha256
from clear.data.rejects import Reject
from clear.errors import ClearError, quoted, shown
from clear.sources.rows import Row, question
from clear.sources.scenes.words import LABELS as OPTIONS

REFERENCE = 64
"""An image field of at most so many characters names another row, as in VLMEvalKit."""

MMVP = "MMVP"
"""What the name of the benchmark contains whose questions are pairs."""

KEPT = 2**26
"""Bytes of pictures that are kept for the rows that refer to them; a file's own are read again beyond."""

_SHOWN = 5
"""Rows of a circle that a reject names."""

FILE = "file"
"""Reason of a reject that stands for a whole file."""


def files(path: Path) -> list[Path]:
    """The TSV files at a path, whether they can be read or not.

    Raises ClearError if there are none and OSError for a folder that cannot be read.
    """
    found = [path] if path.is_file() else sorted(path.iterdir())
    found = [file for file in found if file.suffix.lower() == ".tsv"]
    if not found:
        raise ClearError(f"{path}: no *.tsv file here; name VLMEvalKit's LMUData folder or one of its files.")
    return found


def count(path: Path) -> int | None:
    """Number of rows, counted without decoding; of a damaged file those before the damage."""
    total = 0
    for file in files(path):
        with suppress(ClearError):
            for _ in records(file):
                total += 1
    return total


def rows(path: Path) -> Iterator[Row | Reject]:
    """Every row of the files at `path`, or why it cannot be used; one reject for a file that cannot be read."""
    for file in files(path):
        try:
            table = Table(file)
        except ClearError as error:
            yield unreadable(file, error)
            continue
        for record in records(file):
            yield _row(file.stem, record, table)


def unreadable(file: Path, error: ClearError) -> Reject:
    """The reject that stands for a file."""
    return Reject(shown(file.name), shown(file.stem), FILE, shown(str(error)))


def records(file: Path) -> Iterator[dict[str, str]]:
    """The rows of a file as dictionaries of text; absent cells are "". Raises ClearError naming a row that is odd."""
    yield from (row.cells for row in _read(file)[1])


def _read(file: Path) -> tuple[list[str], Iterator[tables.TableRow]]:
    if shown(file.name) != file.name:
        raise ClearError(f"{shown(file)}: the name {_oddity(file.name)}, and it names the benchmark; rename the file.")
    header, found = tables.read(file)
    if "index" not in header or not {"question", "prompt"} & set(header):
        raise ClearError(f"{file}: no header with 'index' and 'question' in its first line; is it a VLMEvalKit TSV?")
    return header, found


def _oddity(name: str) -> str:
    """What is wrong with the name of a file that cannot be printed as it is."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return "is not UTF-8"
    return "has a line break or another character that cannot be printed"


def identity(file: Path) -> dict[str, str]:
    """What everything that is made of a file depends on: the SHA-256 of its bytes as `table` and, if it has rows whose
    picture is a file of its own, of these as `pictures`. Raises ClearError as `records`, and OSError."""
    found, paths = {"table": file_sha256(file)}, {}
    header, rows = _read(file)
    if "image_path" in header:
        for row in rows:
            path = row.cells["image_path"].strip()
            if path and not row.cells.get("image", "").strip() and path not in paths:
                content = _from_path(path, file.parent)
                paths[path] = content if isinstance(content, str) else sha256(content)
    return found | ({"pictures": sha256(json.dumps(paths).encode())} if paths else {})


class Table:
    """What has to be known of a file before its rows can be used: where its images are and which rows are pairs.

    `header` lists the columns; `pairs` has the number of its pair for every index of MMVP and nothing elsewhere.
    Raises ClearError for a file that cannot be read, without rows or in which an index occurs twice, and for one of
    another format than TSV and CSV in which a row names the picture of another: rows are found by their bytes.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.header, found = _read(file)
        self._places: dict[str, int] = {}
        self._references: dict[str, str] = {}
        self._holders: dict[str, tuple[str, str]] = {}  # what `holder` found
        self._pictures: dict[str, bytes | str] = {}  # what `picture` made
        self._kept = 0
        seen: set[str] = set()
        asked: dict[str, str] = {}
        paired = re.search(MMVP, file.stem, re.IGNORECASE)
        for row in found:
            index, image = row.cells["index"], row.cells.get("image", "").strip()
            if index in seen:
                raise ClearError(f"{file}: index {index!r} occurs twice; number the rows.")
            seen.add(index)
            if refers(image):
                if row.offset < 0:
                    raise ClearError(
                        f"{file}: row {row.number} names the picture of another row (image = {quoted(image)}), which "
                        "is found in TSV and CSV only; write the table as TSV."
                    )
                self._references[index] = image
            elif image:
                self._places[index] = row.offset
            if paired and index.isdecimal():
                asked[index] = _text(row.cells)
        if not seen:
            raise ClearError(f"{file}: has a header and no row; copy the file again, or remove it.")
        self.pairs = pairs(asked)

    def holder(self, index: str) -> tuple[str, str]:
        """(index of the row that holds the picture of the row with this one, "") or ("", what is wrong)."""
        first, passed = index, {}
        while index not in self._holders:  # each row of a long way is gone through once, not once per row
            if index in passed:
                circle = [*dropwhile(index.__ne__, passed)]
                self._holders |= {one: ("", _in_circle(circle, n)) for n, one in enumerate(circle)}
            elif index in self._places:
                self._holders[index] = index, ""
            elif index not in self._references:
                wrong = f"image refers to index {index}, and no row with this index holds an image"
                self._holders[index] = "", wrong
            else:
                passed[index] = None
                index = self._references[index]
        for one in passed:
            self._holders.setdefault(one, self._holders[index])
        return self._holders[first]

    def image(self, index: str) -> str:
        """The text of the picture in the row with this index, which holds one."""
        return tables.text_row(self.file, self.header, self._places[index])["image"].strip()

    def picture(self, index: str) -> bytes | str:
        """The picture in the row with this index, which holds one, or what is wrong with it."""
        if index not in self._pictures:  # any number of rows may refer to one
            made = _decoded(self.image(index))
            if self._kept + len(made) > KEPT:
                self._pictures, self._kept = {}, 0
            self._pictures[index], self._kept = made, self._kept + len(made)
        return self._pictures[index]


def _in_circle(circle: list[str], first: int) -> str:
    shown = [circle[(first + n) % len(circle)] for n in range(min(len(circle), _SHOWN))]
    more = ["…"] if len(circle) > _SHOWN else []
    return f"image refers in a circle: {' → '.join((*shown, *more, circle[first]))}"


def refers(image: str) -> bool:
    """Whether the text of an image field is the index of another row."""
    return 0 < len(image) <= REFERENCE and not image.startswith(("data:", "["))


def image_of(record: dict[str, str], table: Table) -> bytes | str:
    """The encoded image of a row, or what is wrong with it."""
    text, path = record.get("image", "").strip(), record.get("image_path", "").strip()
    if refers(text):
        holder, wrong = table.holder(text)
        return wrong or table.picture(holder)
    if text or path.startswith("["):
        return _decoded(text or path)
    return _from_path(path, table.file.parent) if path else "the row has no image"


def _decoded(text: str) -> bytes | str:
    """The picture that a cell holds, or what is wrong with it."""
    if text.startswith("["):
        return "the row has a list of images, expected one"
    if text.startswith("data:"):
        head, _, text = text.partition(",")
        if not head.endswith(";base64"):
            return f"the image is a data: URI, but not in base64 ({head[:40]})"
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        return f"the image is not base64 ({error})"


def _from_path(name: str, folder: Path) -> bytes | str:
    # A file or folder may be a link, so not by where it leads; `link/..` would lead elsewhere than it seems.
    if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
        return f"image_path {name} leads out of the folder"
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        return f"image_path {name}: {error.strerror}"
    except ValueError as error:
        return f"image_path {name!r}: {error}"


def _text(record: dict[str, str]) -> str:
    return record.get("question") or record.get("prompt", "")


def _row(bench: str, record: dict[str, str], table: Table) -> Row | Reject:
    id = f"{bench}-{record['index']}"
    image = image_of(record, table)
    if isinstance(image, str):
        return Reject(id, bench, "no image", image)
    options = options_of(record)
    text = _text(record)
    if record.get("hint"):
        text = f"Hint: {record['hint']}\n{text}"
    number = table.pairs.get(record["index"])
    pair = "" if number is None else f"{bench}-pair-{number}"
    made = question(id, bench, text, record.get("answer", ""), options, blank=True, pair=pair)
    if isinstance(made, str):
        return Reject(id, bench, "question", made)
    known = {"image", "image_path", "question", "prompt", "answer", "hint", *OPTIONS}
    return Row(id, bench, image, (made,), {"subset": bench} | {k: v for k, v in record.items() if k not in known and v})


def options_of(cells: Mapping[str, str]) -> list[str]:
    """The options of a row, [] for a free answer: up to the last with a text, or to the one that is the answer.

    VLMEvalKit reads an option "None" as an absent cell and writes it as an empty one: it is an option without text
    wherever another follows or its letter is the answer, and the others keep their letters.
    """
    listed = [cells.get(letter, "") for letter in OPTIONS]
    filled = [n for n, text in enumerate(listed) if text.strip()]
    answer = cells.get("answer", "").strip().rstrip(".").strip("()")
    if filled and len(answer) == 1 and answer in OPTIONS and answer in cells:
        filled.append(OPTIONS.index(answer))
    return listed[: max(filled, default=-1) + 1]


def number(index: str) -> int:
    """The number of a row. Raises ClearError for an index that is not a number: rotations and pairs are found by it."""
    if not re.fullmatch(r"\d{1,18}(?:\.0+)?", index.strip()):
        raise ClearError(
            f"index {quoted(index)} is not a number of up to 18 digits; rotations and pairs are found by the number."
        )
    return int(index.split(".")[0])


def pairs(questions: Mapping[str, str] | Iterable[tuple[str, str]]) -> dict[str, int]:
    """Index of every MMVP question to the number of its pair, from (index, question's text).

    The two halves of a pair have successive indices and ask the same question. Whether the first half has an odd index
    (1 and 2, 3 and 4, …) or an even one (0 and 1, …) follows from where two neighbours, and not a third, ask the same,
    so that no row that is left out moves the other pairs; where nothing follows, an index 0 means even, else odd.
    Raises ClearError for an index that is not a number.
    """
    questions = dict(questions)
    numbers = {index: number(index) for index in questions}
    texts = {numbers[index]: " ".join(text.split()).casefold() for index, text in questions.items()}

    def alike(n: int, other: int) -> bool:
        return n in texts and texts[n] == texts.get(other)

    first = [n % 2 for n in texts if alike(n, n + 1) and not alike(n - 1, n) and not alike(n + 2, n + 1)]
    odd = first.count(1) - first.count(0) or int(0 not in texts)
    return {index: (n - (odd > 0)) // 2 for index, n in numbers.items()}

"""The fields of a row from outside: texts, options, images, and the files that contain the rows.

One reader of each for every layout (folder, llava_onevision, incoming), for both JSON Lines and Parquet. Only
unambiguous values are read; anything else raises `Unusable` with its name, so that the row is rejected and no value is
silently turned into another: not NaN into a number, not a string into a list of its letters, not half an emoji.
"""

import base64
import binascii
import json
import math
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clear.errors import ClearError, one_line, quoted, shown
from clear.sources.scenes.words import LABELS

_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters except tab and the ends of lines, and halves of characters beyond U+FFFF, which no UTF-8 holds."""
_SIDE_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx"}
"""What Windows and macOS leave in folders, beside hidden files such as .DS_Store and ._cup.png."""

_BASE64 = re.compile(r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR|SUkq|TU0A|Qk)[A-Za-z0-9+/\s]+(?:={1,2}\s*)?")
"""JPEG, PNG, GIF, WebP, TIFF or BMP in base64; the name of such a file has a dot."""
_LONGEST_NAME, _LONGEST_PATH = 255, 4000


class Unusable(ClearError):
    """What makes a row unusable. `reason` is a word of the rejects, the message their detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def unprintable(text: str) -> str:
    """What a text contains that no text may, such as U+0000; "" if nothing."""
    found = _UNPRINTABLE.search(text)
    return f"U+{ord(found[0]):04X}" if found else ""


def text_of(value: Any, name: str, reason: str = "question") -> str:
    """A text, or a number as text. Raises Unusable for anything else, NaN and unprintable characters included."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        # 7 also for the 7.0 that pandas makes of integers with gaps, as in clear/data/tables.py.
        return str(int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value)
    if not isinstance(value, str):
        raise Unusable(reason, f"`{name}` is {quoted(value)}, expected a text")
    if found := unprintable(value):
        raise Unusable(reason, f"`{name}` = {quoted(value)} contains {found}, which is not valid text; remove it")
    return value


def id_of(value: Any) -> str:
    """A text of one line that names a row. Raises Unusable."""
    text = text_of(value, "id", "id")
    if not text.strip() or len(text.splitlines()) > 1:
        raise Unusable("id", f"`id` is {quoted(value)}, expected a text of one line")
    return text


def options_of(value: Any) -> tuple[str, ...]:
    """Options given as a list, or as an object {"A": …, "B": …}: in the order of the letters, those that are null left
    out at the end (Parquet gives every row all letters). Raises Unusable for anything else: a single text, a number,
    other keys, a letter without a text before another."""
    if value is None or value == "" or (isinstance(value, list | tuple | dict) and not value):
        return ()
    if isinstance(value, list) and all(isinstance(item, tuple) and len(item) == 2 for item in value):
        value = _unique(value)  # a map in Parquet
    if isinstance(value, Mapping):
        given = {str(key): text for key, text in value.items() if text is not None}
        letters = LABELS[: len(given)]
        if sorted(given) != list(letters):
            raise Unusable(
                "question", f"`options` = {quoted(value)}: expected a list, or an object with the keys A, B, … to J"
            )
        value = [given[letter] for letter in letters]
    if not isinstance(value, list | tuple):
        raise Unusable("question", f"`options` is {quoted(value)}, expected a list of texts")
    return tuple(text_of(option, "options") for option in value)


def picture_of(value: Any, key: str, table: Path, root: Path) -> bytes:
    """The encoded bytes of a picture given as bytes, as {bytes, path}, in base64, as a data: URI, or as the name of a
    file, relative to `table` and below `root`. Raises Unusable. Whether it is a whole picture is not looked at."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if not isinstance(value, str) or not value:
        raise Unusable("no image", f"`{key}` is {quoted(value)}, expected a file name or the bytes of a picture")
    if value.startswith("data:"):
        head, _, data = value.partition(",")
        if not head.endswith(";base64"):
            raise Unusable("no image", f"`{key}` = {quoted(value)}: a data: URI must be in base64")
        return _decoded(data, key)
    if _BASE64.fullmatch(value):
        return _decoded(value, key)
    return _file(value, key, table, root)


def _decoded(text: str, key: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Unusable("no image", f"`{key}` = {quoted(text)} is not base64 ({error}); encode it again") from error


def _file(value: str, key: str, table: Path, root: Path) -> bytes:
    name = text_of(value, key, "no image")
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in Path(name).parts) or len(name) > _LONGEST_PATH:
        raise Unusable("no image", f"`{key}` = {quoted(name)} is neither a file name nor an image in base64")
    if re.match(r"https?://", name):
        raise Unusable("no image", f"`{key}` = {quoted(name)} is not here; download it and name the file")
    file = located(name, table)
    # A file may be a link to anywhere (`cp -rs`, DVC's cache); into linked folders DVC does not look.
    inside = file.parent.resolve().is_relative_to(root.resolve())
    if Path(name).is_absolute() or not file.is_relative_to(unlinked(root)) or not inside:
        raise Unusable("no image", f"`{key}` = {quoted(name)} lies outside {shown(root)}; copy it there")
    if found := unreadable(file):
        detail = f"no such file beside {table.name}" if not os.path.lexists(file) else found
        raise Unusable("no image", f"`{key}` = {quoted(name)}: {detail}")
    return file.read_bytes()


def located(name: str, table: Path) -> Path:
    """Where a file is that a table names, without following links.

    A Mac writes é as e and an accent (NFD), other systems as one character (NFC): to Unicode both are the same name.
    Where the name as written is absent, the file that has it in the other form is meant, if only one has.
    """
    file = unlinked(table.parent / name)
    if name.isascii() or os.path.lexists(file):
        return file
    forms = {unlinked(table.parent / unicodedata.normalize(form, name)) for form in ("NFC", "NFD")}
    there = [form for form in forms if os.path.lexists(form)]
    return there[0] if len(there) == 1 else file


def unlinked(path: Path) -> Path:
    """A path as an absolute one, without following links."""
    return Path(os.path.abspath(path))  # noqa: PTH100, resolve() follows them


def unreadable(file: Path) -> str:
    """Why a file cannot be read, with the remedy; "" if it can."""
    try:
        if unprintable(file.name):
            return "its name is not UTF-8 or has control characters; rename it"
        if not stat.S_ISREG(file.stat().st_mode):
            return "is not a file; remove it"
        with file.open("rb"):
            return ""
    except OSError as error:
        link = "a broken link" if file.is_symlink() else os.strerror(error.errno)
        return f"{link}; {'correct or remove it' if file.is_symlink() else 'repair or remove it'}"


@dataclass(frozen=True)
class Found:
    """Files below a folder, sorted by name, and what cannot be read there: path and reason, with the remedy."""

    files: tuple[Path, ...]
    faults: tuple[tuple[Path, str], ...]


def look_through(folder: Path) -> Found:
    """All files below a folder but hidden ones and those that file managers leave behind. A folder that cannot be
    opened is a fault, and never taken for an empty one; so is a link to a folder, into which DVC does not look."""
    files, faults = [], []

    def closed(error: OSError) -> None:
        faults.append((Path(error.filename), f"{os.strerror(error.errno)}; make the folder readable or remove it"))

    for place, names, here in os.walk(folder, onerror=closed):
        names[:] = sorted(name for name in names if not aside(name))
        for path in (Path(place, name) for name in names):
            if path.is_symlink():
                faults.append((path, f"a link to a folder; link its files instead: `cp -rs {shown(path.resolve())} …`"))
        for path in (Path(place, name) for name in here if not aside(name)):
            if fault := unreadable(path):
                faults.append((path, fault))
            else:
                files.append(path)
    return Found(*(tuple(sorted(found, key=_posix)) for found in (files, faults)))


def _posix(item: Path | tuple[Path, str]) -> str:
    return (item[0] if isinstance(item, tuple) else item).as_posix()


def aside(name: str) -> bool:
    """Whether a file or folder is hidden, or left behind by a file manager."""
    return name.startswith(".") or name.lower() in _SIDE_FILES


def tables(path: Path, *suffixes: str, deep: bool = False) -> list[Path]:
    """The files with one of the suffixes at a path, sorted. Raises ClearError for one that cannot be read, and where a
    folder cannot be opened."""
    found = look_through(path) if path.is_dir() else Found((path,), ())
    for place, fault in found.faults:
        if place.suffix.lower() in suffixes or place.is_dir():
            raise ClearError(f"{shown(place)}: {fault}.")
    files = (file for file in found.files if file.suffix.lower() in suffixes)
    return [file for file in files if deep or file == path or file.parent == path]


def count_lines(file: Path) -> int:
    """Lines of a file that are not blank: as many as `json_lines` gives."""
    with file.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    """(number, value) of every line of a file that is not blank, an Unusable instead of one that is not JSON in UTF-8.

    Raises ClearError for a file in UTF-16.
    """
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise ClearError(f"{shown(file)}: is UTF-16, expected UTF-8; convert it (`iconv -f UTF-16 -t UTF-8`).")
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield number, _json(line)


def _json(line: bytes) -> Any:
    try:
        return json.loads(line.decode(), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        return Unusable("line", f"byte {error.start + 1} of the line, 0x{line[error.start]:02x}, is not UTF-8; "
                                "convert the file, perhaps by `iconv -f WINDOWS-1252 -t UTF-8`")  # fmt: skip
    except Unusable as error:
        return error
    except (ValueError, RecursionError) as error:
        return Unusable("line", f"the line is not a JSON object ({error}); write one object per line")


def _unique(pairs: Iterable[tuple[Any, Any]]) -> dict:
    found = {}
    for key, value in pairs:
        if key in found:
            raise Unusable("line", f"the key {quoted(key)} occurs twice; keep one of them")
        found[key] = value
    return found


@contextmanager
def readable(file: Path, what: str, remedy: str) -> Iterator[None]:
    """Refuse `file` in one line with the remedy where pyarrow raises inside (ValueError: names that are not UTF-8)."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, ValueError, OSError) as error:
        raise ClearError(f"{shown(file)}: not a readable {what} ({one_line(error)}); {remedy}.") from error


def batch_rows(batch) -> Iterator[Any]:
    """The rows of an Arrow batch as dictionaries, an Unusable in place of one whose texts are not UTF-8."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # nothing was yielded: the list is made first
        for row in range(batch.num_rows):
            try:
                yield batch.slice(row, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield Unusable("line", f"byte {error.start + 1} of a text is not UTF-8 ({quoted(error.object)})")

"""Naturally degraded images: sets under data/incoming/<name> and their rows (docs/DEGRADATIONS.md).

A set is a folder with tables (`*.jsonl`, `*.parquet`) and the files that they name. A row names the degraded picture
(`image`), its clean version if there is one (`clean`), and the question with its answer; a row may also contain the
images themselves, and Parquet files may be shards of `clear.data.records`. A row or image that cannot be used is passed
on as a reject; a set with a table or folder that cannot be opened is rejected as a whole, because its content is
unknown. `clear.sources.intake` makes samples of the rows.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clear.data.images import decode_image, pixel_sha256, stored
from clear.data.io import batches
from clear.data.records import INCOMING, Question, file_sha256, open_shard, sha256
from clear.data.rejects import Reject
from clear.errors import ClearError, quoted, shown
from clear.sources.fields import (
    Found,
    Unusable,
    aside,
    batch_rows,
    json_lines,
    located,
    look_through,
    options_of,
    picture_of,
    readable,
    text_of,
    unlinked,
)
from clear.sources.scenes.words import LABELS, normalise, option_named

FOLDER = Path("data/incoming")
TASK = "question"
"""Task of a question whose row names none."""
LEAST = 32
"""px, the smallest side of a usable picture."""
READABLE = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".jp2", ".ppm")
PICTURES = (*READABLE, ".heic", ".heif", ".jxl", ".ico", ".tga", ".dng", ".nef", ".cr2", ".arw")
"""Endings of files that somebody meant as pictures, whether they can be read or not."""
TABLES = (".jsonl", ".parquet")
OTHER_TABLES = (".csv", ".tsv", ".json", ".xlsx", ".xls", ".ods", ".arrow", ".feather")
"""Endings of files that somebody may have meant as tables, which are not read."""

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_RESERVED = re.compile(r"</?(?:think|answer)>|<image_restore>|<\|\w+\|>")
"""Words of the trace grammar and of the tokenizers, which a question or an answer may not contain."""


@dataclass(frozen=True)
class IncomingSet:
    """One set. `size` in bytes; `fingerprint` identifies the content and is "" for a set that is not `present`.
    `faults` says what of it cannot be read, or why no set can have its name."""

    name: str
    files: int
    size: int
    present: bool
    fingerprint: str
    faults: tuple[str, ...] = ()


def rejected(name: str, where: str, reason: str, detail: str) -> Reject:
    """The reject of a row or file of the set `name`."""
    return Reject(f"{name}/{where}", name, reason, detail)


@dataclass(frozen=True)
class Row:
    """A row of a table with its pictures, or the reject that says why not. `where` is `<table>:<number>`."""

    set: str
    where: str
    image: bytes = b""
    clean: bytes | None = None
    questions: tuple[Question, ...] = ()
    reject: Reject | None = None


@dataclass(frozen=True)
class Seen:
    """What is remembered of a row, never the pictures: their pixel digests, and byte digests of the `files`, as they
    are and as a source stores them."""

    set: str
    where: str
    questions: tuple[Question, ...] = ()
    reject: Reject | None = None
    image: str = ""
    clean: str = ""
    files: tuple[str, ...] = ()


def names(folder: Path = FOLDER) -> list[str]:
    """The names of the sets of a folder, those of which only the `.dvc` file is here included.

    Raises ClearError for what is there and is no folder: it would pass for a folder without sets."""
    if not folder.is_dir():
        if os.path.lexists(folder):
            raise ClearError(f"{shown(folder)} is not a folder; move it away, and put the sets into a folder there.")
        return []
    found = {path.name for path in folder.iterdir() if path.is_dir() or _leads_nowhere(path)} | {
        path.stem for path in folder.glob("*.dvc")
    }
    return sorted(name for name in found if not aside(name))


def sets(folder: Path = FOLDER) -> list[IncomingSet]:
    """The sets of a folder by name."""
    return [_described(folder / name) for name in names(folder)]


def _described(folder: Path) -> IncomingSet:
    found, digest, size = look_through(folder) if folder.is_dir() else Found((), ()), hashlib.sha256(), 0
    for file in found.files:
        digest.update(os.fsencode(file.relative_to(folder)) + f"\0{file_sha256(file)}\n".encode())
        size += file.stat().st_size
    for path, fault in found.faults:  # another name or another fault is another content, as far as can be seen
        digest.update(os.fsencode(path.relative_to(folder)) + f"\0{fault}\n".encode())
    faults = tuple(f"{shown(path.relative_to(folder.parent))}: {fault}" for path, fault in found.faults)
    fingerprint = digest.hexdigest() if folder.is_dir() else ""
    faults = (*_refused(folder), *faults)
    return IncomingSet(folder.name, len(found.files), size, folder.is_dir(), fingerprint, faults)


def _refused(folder: Path) -> tuple[str, ...]:
    """Why a folder cannot be a set, if so."""
    if not _NAME.fullmatch(folder.name) or folder.name in ("clean", INCOMING):
        rule = f"use lower-case letters, digits, - and _, and neither clean nor {INCOMING}"
        return (f"{shown(folder.name)}: no name for a set; {rule}",)
    return (f"{folder.name}: a broken link; correct or remove it",) if _leads_nowhere(folder) else ()


def _leads_nowhere(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def present(folder: Path = FOLDER, only: str = "") -> list[IncomingSet]:
    """`sets`, or the one named `only`, without a look at the others. Raises ClearError if it is none of them, or naming
    one that was not pulled or has a name that no set can have."""
    here = names(folder)
    if only and only not in here:
        raise unknown(only, folder)
    for name in [only] if only else here:
        if wrong := _refused(folder / name):
            raise ClearError(f"{folder}/{wrong[0]}.")
        if not (folder / name).is_dir():
            raise ClearError(f"{folder / name} is not here; run `dvc pull {folder / name}.dvc`.")
    return [_described(folder / name) for name in ([only] if only else here)]


def unknown(name: str, folder: Path = FOLDER) -> ClearError:
    """What to raise for the name of a set that none of a folder has; it may be empty."""
    known = ", ".join(map(shown, names(folder))) or "none"
    return ClearError(f"{shown(folder / name) if name else quoted(name)} is not an incoming set; there are: {known}.")


def rows_of(folder: Path) -> Iterator[Row]:
    """The rows of one set in a fixed order, unusable ones with their reject, pictures not yet decoded.

    Pictures that no table names, and files that cannot be read, follow as rejected rows. Raises ClearError for a table
    or a folder that cannot be read.
    """
    named: set[Path] = set()
    found = look_through(folder)
    for path, fault in found.faults:
        if path.suffix.lower() in TABLES or path.is_dir():
            raise ClearError(f"{shown(path)}: {fault}.")
    for table in (file for file in found.files if file.suffix.lower() in TABLES):
        label = table.relative_to(folder).as_posix()
        read = json_lines if table.suffix.lower() == ".jsonl" else _parquet_rows
        for number, record in read(table):
            yield _row(folder, table, f"{label}:{number}", record, named)
    for path, reason, detail in _left(folder, found, named):
        where = shown(path.relative_to(folder))
        yield Row(folder.name, where, reject=rejected(folder.name, where, reason, detail))


def _left(folder: Path, found: Found, named: set[Path]) -> Iterator[tuple[Path, str, str]]:
    """(path, reason, detail) of the files of a set that give no row."""
    yield from ((path, "file", fault) for path, fault in found.faults if unlinked(path) not in named)
    left = [file for file in found.files if file.suffix.lower() in PICTURES and unlinked(file) not in named]
    if left or not any(file.suffix.lower() in TABLES for file in found.files):
        yield from _no_tables(found)
    for file in left:
        yield file, "no row", "no table names this picture; add a row with question and answer"


def _no_tables(found: Found) -> Iterator[tuple[Path, str, str]]:
    """As `_left`, the files that are not read as tables: the first, with the number of the others, as there may be one
    beside each picture."""
    others = [file for file in found.files if file.suffix.lower() in OTHER_TABLES]
    if others:
        more = f", nor are {len(others) - 1} more like it" if len(others) > 1 else ""
        yield others[0], "file", f"is not read as a table{more}; write it as {' or '.join(TABLES)}"


def _parquet_rows(table: Path) -> Iterator[tuple[int, Any]]:
    with readable(table, "Parquet file", "copy or `dvc pull` it again"):
        read = batches(table, open_shard(table), 64)
        yield from enumerate((row for batch in read for row in batch_rows(batch)), start=1)


def _row(folder: Path, table: Path, where: str, record: Any, named: set[Path]) -> Row:
    try:
        if isinstance(record, Unusable):
            raise record
        if not isinstance(record, dict):
            what = type(record).__name__
            raise Unusable("line", f"the row is {what}, expected an object with image, question and answer")
        picture = record.get("image") or record.get("file_name")
        image, clean = picture, record.get("clean")
        if record.get("degraded"):  # the layout of clear.data.records
            image, clean = record["degraded"], picture
        pictures = [_picture(folder, table, one, key, named) for one, key in ((image, "image"), (clean, "clean"))]
        return Row(folder.name, where, pictures[0] or b"", pictures[1], questions_of(record))
    except Unusable as error:
        return Row(folder.name, where, reject=rejected(folder.name, where, error.reason, str(error)))


def _picture(folder: Path, table: Path, value: Any, key: str, named: set[Path]) -> bytes | None:
    """The bytes of a picture; None if there is no clean partner. The name of a file is noted in `named`."""
    if key == "clean" and (not value or (isinstance(value, dict) and not any(value.values()))):
        return None
    name = value.get("path") if isinstance(value, dict) and not value.get("bytes") else value
    if isinstance(name, str) and len(name) < os.pathconf("/", "PC_PATH_MAX"):  # longer, it is the picture itself
        named.add(located(name, table))
    return picture_of(value, key, table, folder)


def questions_of(record: dict) -> tuple[Question, ...]:
    """The questions of a row, still without ids. Raises Unusable saying what is wrong with them."""
    given = record.get("questions")
    if given is None:
        given = [record] if record.get("question") or record.get("answer") else []
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise Unusable("question", "there is no question; give `question` and `answer`, or a list `questions` of them")
    return tuple(_question(one, record.get("task")) for one in given)


def _question(one: Any, task: Any) -> Question:
    if not isinstance(one, dict):
        raise Unusable("question", f"a question is {type(one).__name__}, expected an object with question and answer")
    values = {"question": one.get("question") or one.get("text"), "answer": one.get("answer")}
    values |= {"task": one.get("task") or task or TASK, "evidence": one.get("evidence") or ""}
    options = options_of(one.get("options"))
    for name, value in [*values.items(), *(("options", option) for option in options)]:
        value = text_of(value, name)
        if name != "evidence" and not value.strip():
            raise Unusable("question", f"`{name}` is {quoted(value)}, expected a text")
        if _RESERVED.search(value):
            raise Unusable(
                "question", f"`{name}` contains {_RESERVED.search(value)[0]}, a word of the trace grammar; rephrase it"
            )
        values[name] = value.strip()
    values.pop("options", None)
    answer, choices = values["answer"], [normalise(option) for option in options]
    if choices and (not 2 <= len(choices) <= len(LABELS) or len(set(choices)) < len(choices)):
        raise Unusable("question", f"`options` = {quoted(list(options))} must be two to {len(LABELS)} different texts")
    if choices and option_named(answer, options) is None:
        raise Unusable("question", f"`answer` = {quoted(answer)} names none of the options {quoted(list(options))}")
    text = values.pop("question")
    return Question(id="", text=text, options=tuple(option.strip() for option in options), **values)


def look(row: Row) -> Seen:
    """Decode the pictures of a row and keep their digests, or say what is wrong with them."""
    if row.reject:
        return Seen(row.set, row.where, reject=row.reject)
    try:
        image = decode_image(row.image, "image")
        if min(image.shape[:2]) < LEAST:
            raise Unusable(
                "size", f"image: {image.shape[1]}x{image.shape[0]} px, the sides must have at least {LEAST} px"
            )
        digests, files = [pixel_sha256(image), ""], [sha256(row.image), sha256(stored(row.image, image))]
        if row.clean is not None:
            clean = decode_image(row.clean, "clean")
            if clean.shape != image.shape:
                raise Unusable(
                    "size",
                    f"the picture has {image.shape[1]}x{image.shape[0]} px and its clean partner "
                    f"{clean.shape[1]}x{clean.shape[0]} px; resize the degraded one to the clean one",
                )
            digests[1] = pixel_sha256(clean)
            files += sha256(row.clean), sha256(stored(row.clean, clean))
            if digests[0] == digests[1]:
                raise Unusable("partner", "the clean partner is the picture itself; leave `clean` out")
    except ClearError as error:  # what is not Unusable comes from the decoder
        reason = error.reason if isinstance(error, Unusable) else "image"
        return Seen(row.set, row.where, reject=rejected(row.set, row.where, reason, str(error)))
    return Seen(row.set, row.where, row.questions, None, *digests, tuple(dict.fromkeys(files)))

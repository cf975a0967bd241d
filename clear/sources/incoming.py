"""Pictures that came degraded: sets under data/incoming/<name> and their rows (docs/DEGRADATIONS.md).

A set is a folder with tables (`*.jsonl`, `*.parquet`) and the files that they name. A row names the degraded picture
(`image`), where there is one its clean partner (`clean`), and the question with its answer; Parquet may hold the
pictures themselves, or be shards of `clear.records`. A row that cannot be used is passed on as its reject.
`clear.sources.intake` makes samples of the rows.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clear.errors import ClearError
from clear.records import INCOMING, Question, decode_image, file_sha256, open_shard, pixel_sha256, sha256
from clear.rejects import Reject
from clear.sources.words import normalise

FOLDER = Path("data/incoming")
TASK = "question"
"""Task of a question whose row names none."""
LEAST = 32
"""px, the smallest side of a usable picture."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
LETTERS = "ABCDEFGHIJ"

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_RESERVED = re.compile(r"</?(?:think|answer)>|<image_restore>|<\|\w+\|>")
"""Words of the trace grammar and of the tokenizers, which a question or an answer may not contain."""


@dataclass(frozen=True)
class IncomingSet:
    """One set. `size` in bytes; `fingerprint` identifies the content and is "" for a set that is not `present`."""

    name: str
    files: int
    size: int
    present: bool
    fingerprint: str


class Unusable(ClearError):
    """What makes a row unusable. `reason` is a word of the rejects, the message their detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


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
    """What is remembered of a row: pixel digests and byte digests of its pictures, never the pictures."""

    set: str
    where: str
    questions: tuple[Question, ...] = ()
    reject: Reject | None = None
    image: str = ""
    clean: str = ""
    files: tuple[str, ...] = ()


def sets(folder: Path = FOLDER) -> list[IncomingSet]:
    """The sets of a folder by name, those of which only the `.dvc` file is here included. Raises ClearError for a
    folder whose name no set can have."""
    if not folder.is_dir():
        return []
    names = {path.name for path in folder.iterdir() if path.is_dir()} | {path.stem for path in folder.glob("*.dvc")}
    return [_described(folder / name) for name in sorted(name for name in names if not name.startswith("."))]


def _described(folder: Path) -> IncomingSet:
    if not _NAME.fullmatch(folder.name) or folder.name in ("clean", INCOMING):
        raise ClearError(
            f"{folder}: no name for a set; use lower-case letters, digits, - and _, and neither clean nor {INCOMING}."
        )
    files = _files(folder)
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(folder).as_posix()}\0{file_sha256(file)}\n".encode())
    size = sum(file.stat().st_size for file in files)
    return IncomingSet(folder.name, len(files), size, folder.is_dir(), digest.hexdigest() if folder.is_dir() else "")


def _files(folder: Path) -> list[Path]:
    """Every file of a set in a fixed order; hidden ones, such as .DS_Store, are no part of it."""
    found = (path for path in folder.rglob("*") if path.is_file())
    visible = (p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    return sorted(visible, key=lambda path: path.relative_to(folder).as_posix())


def present(folder: Path = FOLDER, only: str = "") -> list[IncomingSet]:
    """`sets`, or the one named `only`. Raises ClearError if it is none of them, or naming one that was not pulled."""
    found = sets(folder)
    if only:
        names = ", ".join(one.name for one in found) or "none"
        found = [one for one in found if one.name == only]
        if not found:
            raise ClearError(f"{folder / only} is no incoming set; there are: {names}.")
    for one in found:
        if not one.present:
            raise ClearError(f"{folder / one.name} is not here; run `dvc pull {folder / one.name}.dvc`.")
    return found


def rows_of(folder: Path) -> Iterator[Row]:
    """The rows of one set in a fixed order, unusable ones with their reject, pictures not yet decoded.

    Pictures that no table names follow as rejected rows. Raises ClearError for a table that cannot be read.
    """
    named: set[Path] = set()
    for table in (file for file in _files(folder) if file.suffix in (".jsonl", ".parquet")):
        label = table.relative_to(folder).as_posix()
        records = _json_lines(table) if table.suffix == ".jsonl" else _parquet_rows(table)
        for number, record in enumerate(records, start=1):
            yield _row(folder, table, f"{label}:{number}", record, named)
    for file in _files(folder):
        if file.suffix.lower() in PICTURES and file.resolve() not in named:
            where = file.relative_to(folder).as_posix()
            detail = "no table names this picture; add a row with question and answer"
            yield Row(folder.name, where, reject=rejected(folder.name, where, "no row", detail))


def _json_lines(table: Path) -> Iterator[Any]:
    with table.open(encoding="utf-8-sig", errors="replace") as lines:
        for line in lines:
            try:
                yield json.loads(line) if line.strip() else Unusable("line", "the line is empty; remove it")
            except json.JSONDecodeError as error:
                yield Unusable("line", f"the line is no JSON object ({error}); write one object per line")


def _parquet_rows(table: Path) -> Iterator[dict]:
    import pyarrow as pa

    try:
        for batch in open_shard(table).iter_batches(batch_size=64):
            yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise ClearError(f"{table}: not a readable Parquet file ({error}); copy or `dvc pull` it again.") from error


def _row(folder: Path, table: Path, where: str, record: Any, named: set[Path]) -> Row:
    try:
        if isinstance(record, Unusable):
            raise record
        if not isinstance(record, dict):
            what = type(record).__name__
            raise Unusable("line", f"the row is {what}, expected an object with image, question and answer")
        picture = record.get("image") or record.get("file_name")
        image, clean = picture, record.get("clean")
        if record.get("degraded"):  # the layout of clear.records
            image, clean = record["degraded"], picture
        pictures = [_picture(folder, table, one, key, named) for one, key in ((image, "image"), (clean, "clean"))]
        return Row(folder.name, where, pictures[0] or b"", pictures[1], questions_of(record))
    except Unusable as error:
        return Row(folder.name, where, reject=rejected(folder.name, where, error.reason, str(error)))


def _picture(folder: Path, table: Path, value: Any, key: str, named: set[Path]) -> bytes | None:
    """The bytes of a picture given as file name, bytes, or {bytes, path}; None if there is none."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if not value and key == "clean":
        return None
    if not isinstance(value, str) or not value:
        raise Unusable("no image", f"`{key}` is {value!r}, expected a file name or the bytes of a picture")
    file = (table.parent / value).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise Unusable("no image", f"`{key}` = {value!r} lies outside {folder}; copy it into the set")
    named.add(file)
    if not file.is_file():
        raise Unusable("no image", f"`{key}` = {value!r}: no such file beside {table.name}")
    return file.read_bytes()


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
    options = [str(option) if _is_number(option) else option for option in one.get("options") or ()]
    for name, value in [*values.items(), *(("options", option) for option in options)]:
        value = str(value) if _is_number(value) else value
        if not isinstance(value, str) or (name != "evidence" and not value.strip()):
            raise Unusable("question", f"`{name}` is {value!r}, expected a text")
        if _RESERVED.search(value):
            raise Unusable(
                "question", f"`{name}` contains {_RESERVED.search(value)[0]}, a word of the trace grammar; rephrase it"
            )
        values[name] = value.strip()
    values.pop("options", None)
    answer, choices = normalise(values["answer"]), [normalise(option) for option in options]
    if choices and (not 2 <= len(choices) <= len(LETTERS) or len(set(choices)) < len(choices)):
        raise Unusable("question", f"`options` = {options} must be two to {len(LETTERS)} different texts")
    if choices and answer not in choices and answer not in LETTERS[: len(choices)]:
        raise Unusable("question", f"`answer` = {values['answer']!r} names none of the options {options}")
    text = values.pop("question")
    return Question(id="", text=text, options=tuple(option.strip() for option in options), **values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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
        digests, files = [pixel_sha256(image), ""], [sha256(row.image)]
        if row.clean is not None:
            clean = decode_image(row.clean, "clean")
            if clean.shape != image.shape:
                raise Unusable(
                    "size",
                    f"the picture has {image.shape[1]}x{image.shape[0]} px and its clean partner "
                    f"{clean.shape[1]}x{clean.shape[0]} px; resize the degraded one to the clean one",
                )
            digests[1] = pixel_sha256(clean)
            files.append(sha256(row.clean))
            if digests[0] == digests[1]:
                raise Unusable("partner", "the clean partner is the picture itself; leave `clean` out")
    except ClearError as error:  # what is not Unusable comes from the decoder
        reason = error.reason if isinstance(error, Unusable) else "image"
        return Seen(row.set, row.where, reject=rejected(row.set, row.where, reason, str(error)))
    return Seen(row.set, row.where, row.questions, None, *digests, tuple(files))

"""Prediction tables from benchmark tables: what `clear answer` does with VLMEvalKit's TSVs.

For each input `<bench>.tsv` the folder `<out>/<name>` gets, named as VLMEvalKit names them:

    <name>_<bench>.tsv or .xlsx      every column of the input but the picture, and `prediction`
    <name>_<bench>.parquet           index, prediction, trace, restored, tokens, seconds
    <name>_<bench>_rejects.parquet   rows without a prediction, if there are any, and why
    <name>_<bench>.jsonl             the journal: a line for each shard that was answered

The journal makes a run resumable: a line is on disk before the next shard is begun, and a line that a kill cut short is
answered again. Its first line says what the answers are a function of; a journal of something else is refused. Tables
are written when all rows are there, from the journal alone, so that they are the same bytes however often the run was
interrupted (the seconds in the Parquet are those of the shard's only answering). A reject that may pass, such as an
outage, is not journaled: the same command asks again.
"""

import csv
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clear.bench.vlmeval.prompts import prompt_of
from clear.bench.vlmeval.respond import Asked, Given, Respondent, Shard, shards_of
from clear.data.io import replacing
from clear.data.rejects import Reject, write_rejects
from clear.errors import ClearError, naming
from clear.sources import lmudata

FORMATS = ("tsv", "xlsx")
CELL = 32_767
"""Characters that a cell of xlsx holds."""

VERSION = 1
_NUMBER = re.compile(r"0|[1-9][0-9]{0,14}")


@dataclass(frozen=True)
class Answered:
    """The files of one table, and the rows that are in none of its predictions."""

    table: Path
    rows: int
    rejects: list[Reject]


def answer_table(
    file: Path,
    out: Path,
    name: str,
    respondent: Respondent,
    style: str = "vlmeval",
    form: str = "tsv",
    progress: Callable[[int], Any] | None = None,
) -> Answered:
    """Answer the rows of `file`, those that the journal lacks, and write the tables of `<out>/<name>`.

    `progress` is called with the number of further rows that are done. Raises ClearError for a table that cannot be
    read, for a journal of another run, and as the respondent.
    """
    table = lmudata.Table(file)
    bench = file.stem
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{name}_{bench}"
    state = {"version": VERSION, **lmudata.identity(file), "prompt": style, "by": respondent.identity()}
    unread: list[Given] = []
    with _Journal(stem.with_name(stem.name + ".jsonl"), state) as journal:
        if progress:
            progress(sum(map(len, journal.done.values())))
        rows = _rows(table, bench, style, unread)
        pending: list[Shard] = []

        def open_shards() -> Iterator[Shard]:
            for shard in shards_of(rows, respondent.size):
                if shard.number not in journal.done:
                    pending.append(shard)
                    yield shard

        unsettled: dict[int, list[Given]] = {}
        for found in respondent.respond(open_shards()):
            number = pending.pop(0).number
            if any(given.passing for given in found):
                unsettled[number] = found
            else:
                journal.add(number, found)
            if progress:
                progress(len(found))
        for _ in rows:  # none are left, unless the respondent stops early
            raise ClearError(f"{file}: rows were left without an answer; run the same command again.")
        shards = journal.done | unsettled
    done = [given for number in sorted(shards) for given in shards[number]]
    rejected = [*unread, *(given for given in done if given.reject)]
    kept = {given.index: given for given in done if not given.reject}
    rejects = [Reject(f"{bench}-{given.index}", bench, given.reject, given.detail) for given in rejected]
    target = _write_table(stem.with_name(f"{stem.name}.{form}"), table, kept, rejects)
    _write_details(stem.with_name(stem.name + ".parquet"), kept.values())
    beside = stem.with_name(stem.name + "_rejects.parquet")
    if rejects:
        write_rejects(beside, rejects)
    else:
        beside.unlink(missing_ok=True)
    return Answered(target, len(kept), rejects)


def count(file: Path) -> int:
    """Rows of a table. Raises ClearError for one that cannot be read."""
    return sum(1 for _ in lmudata.records(file))


def _rows(table: lmudata.Table, bench: str, style: str, unread: list[Given]) -> Iterator[Asked]:
    """The rows that can be asked; the others are put into `unread`."""
    for cells in lmudata.records(table.file):
        index = cells["index"]
        image = lmudata.image_of(cells, table)
        if isinstance(image, str):
            unread.append(Given(index, reject="no image", detail=image))
            continue
        try:
            text = prompt_of(bench, cells, style)
        except ClearError as error:
            unread.append(Given(index, reject="question", detail=str(error)))
            continue
        if not text.strip():
            unread.append(Given(index, reject="question", detail="the row asks nothing"))
            continue
        yield Asked(index, text, image)


class _Journal:
    """The answered shards of one table, each written when it is known. `done`: number of a shard → its rows."""

    def __init__(self, path: Path, state: dict) -> None:
        self.path, self.done = path, {}
        first = json.dumps({"state": state}, sort_keys=True, ensure_ascii=False)
        whole = self._read(first)
        with naming(path):
            self._file = path.open("r+b" if whole else "wb")
            if whole:
                self._file.truncate(whole)
                self._file.seek(whole)
            else:
                self._append(first)

    def _read(self, first: str) -> int:
        """Read the whole lines; returns where they end, 0 where there is no journal yet. Raises ClearError."""
        whole = 0
        if not self.path.exists():
            return whole
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines):
                if not line.endswith(b"\n"):
                    break  # a kill cut it short
                text = line.decode(errors="replace").rstrip("\n")
                if number == 0 and text != first:
                    raise ClearError(
                        f"{self.path}: answers to another table, by another model or under other settings; remove it, "
                        "or name another --out or --name."
                    )
                if number:
                    try:
                        shard = json.loads(text)
                        self.done[shard["shard"]] = [Given(**row) for row in shard["rows"]]
                    except (ValueError, KeyError, TypeError, RecursionError) as error:
                        raise ClearError(f"{self.path}: line {number + 1} is damaged ({error}); remove it.") from error
                whole += len(line)
        return whole

    def add(self, number: int, rows: Sequence[Given]) -> None:
        """Write one shard; it is on disk when this returns."""
        self.done[number] = list(rows)
        self._append(json.dumps({"shard": number, "rows": [asdict(row) for row in rows]}, ensure_ascii=False))

    def _append(self, line: str) -> None:
        with naming(self.path):
            self._file.write(line.encode(errors="surrogatepass") + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def __enter__(self) -> "_Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


# --- the files ------------------------------------------------------------------------------------------------------


def _write_table(path: Path, table: lmudata.Table, kept: dict[str, Given], rejects: list[Reject]) -> Path:
    """The input's rows that have a prediction, with it. In xlsx, a row with a longer cell is put into `rejects`."""
    columns = [name for name in table.header if name not in ("image", "prediction")]
    rows = (
        [*(cells[name] for name in columns), kept[cells["index"]].prediction]
        for cells in lmudata.records(table.file)
        if cells["index"] in kept
    )
    header = [*columns, "prediction"]
    if path.suffix == ".xlsx":
        _write_xlsx(path, header, rows, table.file.stem, rejects)
        return path
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def _write_xlsx(path: Path, header: list[str], rows: Iterator[list[str]], bench: str, rejects: list[Reject]) -> None:
    """One sheet. Cells are text, also those that begin with "=", but for an index that is the text of its number, as
    VLMEvalKit writes it: 007 would be 7, and of more than fifteen digits a sheet keeps fifteen."""
    from openpyxl import Workbook
    from openpyxl.cell import WriteOnlyCell
    from openpyxl.utils.exceptions import IllegalCharacterError

    book = Workbook(write_only=True)
    sheet = book.create_sheet()
    index = header.index("index")

    def cell(text: str, numeric: bool) -> Any:
        made = WriteOnlyCell(sheet, value=int(text) if numeric and _NUMBER.fullmatch(text) else text)
        if isinstance(made.value, str):
            made.data_type = "s"
        return made

    sheet.append(header)
    for row in rows:
        id = f"{bench}-{row[index]}"
        if longest := max((text for text in row if len(text) > CELL), key=len, default=""):
            detail = f"a cell of {len(longest)} characters, xlsx holds {CELL}; write --format tsv"
            rejects.append(Reject(id, bench, "xlsx", detail))
            continue
        try:
            sheet.append([cell(text, n == index) for n, text in enumerate(row)])
        except IllegalCharacterError:
            detail = "a control character, which xlsx cannot hold; write --format tsv"
            rejects.append(Reject(id, bench, "xlsx", detail))
    with replacing(path) as partial:
        book.save(partial)


def _write_details(path: Path, given: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"tokens": pa.int64(), "seconds": pa.float64(), "restored": pa.bool_()}
    names = ("index", "prediction", "trace", "restored", "tokens", "seconds")
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in names])
    rows = [{name: getattr(one, name) for name in names} for one in given]
    with replacing(path) as partial:
        pq.write_table(pa.Table.from_pylist(rows, schema), partial, compression="zstd")

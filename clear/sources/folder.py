"""A folder of your own images, described by JSON Lines files.

`path` is a folder with one or more `*.jsonl` files (or one such file). A line is an object with `image` (a file name,
relative to the table; or the picture in base64 or as a data: URI) and either `question` and `answer`, or `questions`: a
list of objects with both. A question may also have `options` (a list, or an object {"A": …, "B": …}; the answer is then
a letter or one of them), `id`, `task`, `evidence` and `pair`. `id` names the row; without one it is the file's name and
the line's number.
"""

from collections.abc import Iterator
from pathlib import Path

from clear.data.records import Question
from clear.data.rejects import Reject
from clear.errors import ClearError, quoted, shown
from clear.sources.fields import Unusable, count_lines, id_of, json_lines, options_of, picture_of, tables, text_of
from clear.sources.rows import Row, question

_TEXTS = ("question", "answer", "task", "evidence", "pair")


def files(path: Path) -> list[Path]:
    """The JSONL files at a path. Raises ClearError if there are none, or one cannot be read."""
    found = tables(path, ".jsonl")
    if not found:
        raise ClearError(f"{shown(path)}: no *.jsonl file here; write one line per image, see docs/DATA.md.")
    return found


def count(path: Path) -> int | None:
    """Number of lines."""
    return sum(map(count_lines, files(path)))


def rows(path: Path) -> Iterator[Row | Reject]:
    """Every line of the files at `path` that is not empty, or why it cannot be used."""
    root = path if path.is_dir() else path.parent
    for file in files(path):
        for number, record in json_lines(file):
            yield _row(file, root, f"{file.stem}-{number:06d}", record)


def _row(file: Path, root: Path, name: str, record: object) -> Row | Reject:
    subset = file.stem
    try:
        if isinstance(record, Unusable):
            raise record
        if not isinstance(record, dict) or not record.get("image"):
            raise Unusable("line", "not an object with 'image', a picture or the name of its file")
        if record.get("id") not in (None, ""):
            name = id_of(record["id"])
        asked = record.get("questions", [record])
        if not isinstance(asked, list) or not asked:
            raise Unusable("question", "'questions' is not a list of objects, or is empty")
        made, ids = [], set()
        for number, item in enumerate(asked):
            found = _question(f"{name}-{number}", subset, item)
            if isinstance(found, str):
                raise Unusable("question", f"question {number}: {found}")
            if found.id in ids:
                raise Unusable("question", f"question {number}: its id {found.id} is an earlier one's, too")
            made.append(found)
            ids.add(found.id)
        image = picture_of(record["image"], "image", file, root)
    except Unusable as error:
        return Reject(name, subset, error.reason, f"{file.name}: {error}")
    short = isinstance(record["image"], str) and len(record["image"]) <= 255
    named = record["image"] if short else quoted(record["image"])
    return Row(name, subset, image, tuple(made), {"image": named, "subset": subset})


def _question(id: str, task: str, item: object) -> Question | str:
    if not isinstance(item, dict):
        return "it is not an object"
    own = {key: text_of("" if item.get(key) is None else item[key], key) for key in _TEXTS}
    # A row's own `id` names the image; only a question inside `questions` has one of its own.
    if "image" not in item and item.get("id") not in (None, ""):
        id = id_of(item["id"])
    more = {"evidence": own["evidence"], "pair": own["pair"]}
    return question(id, own["task"] or task, own["question"], own["answer"], options_of(item.get("options")), **more)

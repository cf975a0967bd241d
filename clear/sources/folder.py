"""A folder of images of one's own, described by JSON lines.

`path` is a folder with one or more `*.jsonl` files (or one such file). A line is an object with `image` (relative to
the file) and either `question` and `answer`, or `questions`: a list of objects with both. A question may also have
`options` (a list; the answer is then a letter or one of them), `id`, `task`, `evidence` and `pair`. `id` names the row;
without one it is the file's name and the line's number.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from clear.errors import ClearError
from clear.records import Question
from clear.rejects import Reject
from clear.sources.rows import Row, question

_TEXTS = ("question", "answer", "task", "evidence", "pair", "id")


def files(path: Path) -> list[Path]:
    """The JSONL files at a path. Raises ClearError if there are none."""
    found = [path] if path.is_file() else sorted(path.glob("*.jsonl"))
    if not found or found[0].suffix != ".jsonl":
        raise ClearError(f"{path}: no *.jsonl file here; write one line per image, see docs/DATA.md.")
    return found


def count(path: Path) -> int | None:
    """Number of lines."""
    total = 0
    for file in files(path):
        with file.open("rb") as lines:
            total += sum(1 for line in lines if line.strip())
    return total


def rows(path: Path) -> Iterator[Row | Reject]:
    """Every line of the files at `path`, or why it cannot be used."""
    for file in files(path):
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _row(file, f"{file.stem}-{number:06d}", line)


def _row(file: Path, name: str, line: bytes) -> Row | Reject:
    subset = file.stem
    try:
        record = json.loads(line)
    except ValueError as error:
        return Reject(name, subset, "line", f"{file.name}: not JSON ({error})")
    if not isinstance(record, dict) or not isinstance(record.get("image"), str):
        return Reject(name, subset, "line", f"{file.name}: not an object with 'image', the name of a file")
    name = str(record.get("id") or name)
    asked = record.get("questions", [record])
    if not isinstance(asked, list) or not asked:
        return Reject(name, subset, "question", "'questions' is no list of objects, or empty")
    made = [_question(f"{name}-{number}", subset, item) for number, item in enumerate(asked)]
    for number, found in enumerate(made):
        if isinstance(found, str):
            return Reject(name, subset, "question", f"question {number}: {found}")
    image = _image(file.parent, record["image"])
    if isinstance(image, str):
        return Reject(name, subset, "no image", image)
    return Row(name, subset, image, tuple(made), {"image": record["image"], "subset": subset})


def _image(folder: Path, name: str) -> bytes | str:
    if Path(name).is_absolute() or os.path.normpath(name).startswith(".."):  # a file may be a link, so not by resolve()
        return f"{name} leads out of the folder"
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        return f"{name}: {error.strerror}"


def _question(id: str, task: str, item: object) -> Question | str:
    if not isinstance(item, dict):
        return "it is no object"
    values = {key: item.get(key, "") for key in _TEXTS}
    odd = [key for key, value in values.items() if not isinstance(value, str | int | float) or isinstance(value, bool)]
    options = item.get("options", [])
    if odd:
        return f"'{odd[0]}' is no text"
    if not isinstance(options, list) or not all(isinstance(option, str | int | float) for option in options):
        return "'options' is no list of texts"
    text = {key: str(value) for key, value in values.items()}
    # A row's own `id` names the image; only a question inside `questions` has one of its own.
    own = text["id"] if "image" not in item and text["id"] else id
    more = {"evidence": text["evidence"], "pair": text["pair"]}
    return question(own, text["task"] or task, text["question"], text["answer"], [str(o) for o in options], **more)

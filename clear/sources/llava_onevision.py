"""LLaVA-OneVision and data in its layout: a Hugging Face data set on disk, as Parquet files or saved Arrow files.

`path` is one file or a folder; below it every `*.parquet` and `*.arrow` file is read in the order of their names, a
few rows at a time. Columns: `image` (a struct of `bytes` and `path`, bytes, base64, a file's name) and `conversations`
(a list of `{from, value}` or `{role, content}`, human and assistant in turn; `content` is a text, or a list of parts as
in chat templates); `id` is optional. The subset is the file's first folder below `path`, or its name up to `-`. Each
pair of turns becomes a question about the image; METHOD §6.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from clear.data.io import batches, check_unpacked
from clear.data.records import Question, sha256
from clear.data.rejects import Reject
from clear.errors import ClearError, quoted, shown
from clear.sources.fields import Unusable, batch_rows, picture_of, readable, tables, text_of
from clear.sources.rows import Row, options_in, question

_HUMAN, _ASSISTANT = ("human", "user"), ("gpt", "assistant")
_KEYS = ("from", "role"), ("value", "content")
_BATCH = 32
_LEAD = re.compile(r"^\s*answer\s*:\s*(?=\S)", re.IGNORECASE)
"""What may stand before the right option: "Answer: B"."""


def files(path: Path) -> list[Path]:
    """The data files below a path, in order. Raises ClearError if there are none."""
    found = [file for file in tables(path, ".parquet", ".arrow", deep=True) if not file.name.startswith("cache-")]
    if not found:
        raise ClearError(
            f"{shown(path)}: no *.parquet or *.arrow file here; put a Hugging Face data set with images there."
        )
    return found


def count(path: Path) -> int | None:
    """Number of rows if the files say it without being read (Parquet does)."""
    import pyarrow.parquet as pq

    if any(file.suffix != ".parquet" for file in files(path)):
        return None
    count = 0
    for file in files(path):
        with readable(file, f"{file.suffix[1:]} file", "fetch it again"):
            count += pq.ParquetFile(file).metadata.num_rows
    return count


def rows(path: Path) -> Iterator[Row | Reject]:
    """Every row below `path`, or why it cannot be used. Raises ClearError for a file without the two columns."""
    root = path if path.is_dir() else path.parent
    stems = {file: file.relative_to(root).with_suffix("").as_posix() for file in files(path)}
    alike = Counter(_plain(stem) for stem in stems.values())
    for file, stem in stems.items():
        name = _plain(stem) if alike[_plain(stem)] == 1 else f"{_plain(stem)}-{sha256(os.fsencode(stem))[:8]}"
        for number, record in enumerate(_records(file)):
            yield _row(f"llava-{name}-{number:06d}", _subset(file, path), record, file, root)


def _subset(file: Path, path: Path) -> str:
    folders = file.relative_to(path).parts[:-1] if path.is_dir() else ()
    return folders[0] if folders else file.stem.split("-")[0]


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text)


def _records(file: Path) -> Iterator[dict | Unusable]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with readable(file, f"{file.suffix[1:]} file", "fetch it again"):
        if file.suffix == ".parquet":
            parquet = pq.ParquetFile(file)
            wanted = _columns(file, parquet.schema_arrow.names)
            check_unpacked(file, parquet.metadata)
            read = batches(file, parquet, _BATCH, wanted)
        else:
            stream = pa.ipc.open_stream(pa.memory_map(str(file)))
            wanted = _columns(file, stream.schema.names)
            read = (part for whole in stream for part in _parts(whole.select(wanted)))
        for batch in read:
            yield from batch_rows(batch)


def _parts(batch) -> Iterator:
    for start in range(0, batch.num_rows, _BATCH):
        yield batch.slice(start, _BATCH)


def _columns(file: Path, names: list[str]) -> list[str]:
    for name in ("image", "conversations"):
        if name not in names:
            raise ClearError(f"{file}: no column '{name}' among {', '.join(names)}; see docs/DATA.md for the layout.")
    return [name for name in ("id", "image", "conversations") if name in names]


def _row(id: str, subset: str, record: dict | Unusable, file: Path, root: Path) -> Row | Reject:
    try:
        if isinstance(record, Unusable):
            raise record
        image = _image(record["image"], file, root)
        asked = _questions(id, subset, record["conversations"])
        own = "" if record.get("id") is None else text_of(record["id"], "id", "id")
    except Unusable as error:
        return Reject(id, subset, error.reason, str(error))
    return Row(id, subset, image, asked, {"id": own, "subset": subset})


def _image(value: object, file: Path, root: Path) -> bytes:
    if isinstance(value, list):
        if len(value) != 1:
            raise Unusable("no image", f"{len(value)} images in the row, expected one")
        value = value[0]
    if not value or (isinstance(value, dict) and not any(value.values())):
        raise Unusable("no image", "the row has no image")
    return picture_of(value, "image", file, root)


def _questions(id: str, subset: str, turns: object) -> tuple[Question, ...]:
    """Pairs of turns as questions. Raises Unusable saying what is wrong with the conversation."""
    if not isinstance(turns, list) or len(turns) < 2 or len(turns) % 2:
        count = len(turns) if isinstance(turns, list) else "no"
        raise Unusable("conversation", f"{count} turns, expected pairs of question and answer")
    found, said = [], [_turn(number, turn) for number, turn in enumerate(turns)]
    if (images := sum(images for _, _, images in said)) > 1:
        raise Unusable("conversation", f"{images} images in the conversation, expected one")
    for number in range(0, len(turns), 2):
        (asker, text, _), (replier, answer, shows) = said[number : number + 2]
        if asker not in _HUMAN or replier not in _ASSISTANT:
            raise Unusable("conversation", f"turns {number} and {number + 1} are by {asker!r} and {replier!r}")
        if shows:
            raise Unusable("conversation", f"turn {number + 1} answers with an image, expected a text")
        text = text.replace("<image>", "").strip()
        options = options_in(text)
        # At last as a free answer: what names none of the options may be that of a list that only looks like options.
        for gold, listed in ((answer, options), (_LEAD.sub("", answer), options), (answer, ())):
            made = question(f"{id}-{number // 2}", subset, text, gold, listed)
            if not isinstance(made, str) or "options" not in made:
                break
        if isinstance(made, str):
            raise Unusable("conversation", f"turn {number}: {made}")
        found.append(made)
    return tuple(found)


def _turn(number: int, turn: object) -> tuple[str, str, int]:
    """Who speaks, what is said, and how many images are shown with it."""
    if not isinstance(turn, dict):
        return "?", "", 0
    by, said = (next((turn[key] for key in keys if turn.get(key) is not None), "") for keys in _KEYS)
    parts = said if isinstance(said, list) else [{"type": "text", "text": said}]
    texts, images = [], 0
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("image", "image_url"):
            images += 1
        elif kind == "text":
            texts.append(text_of(part.get("text"), f"turn {number}", "conversation"))
        else:
            raise Unusable("conversation", f"turn {number} holds {quoted(part)}, expected parts of text and image")
    return str(by) or "?", "\n".join(texts), images

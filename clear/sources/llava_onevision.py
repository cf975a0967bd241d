"""LLaVA-OneVision and data in its layout: a Hugging Face data set on disk, as Parquet files or saved Arrow files.

`path` is one file or a folder; below it every `*.parquet` and `*.arrow` file is read in the order of their names, a
few rows at a time. Columns: `image` (a struct of `bytes` and `path`, or bytes) and `conversations` (a list of
`{from, value}` or `{role, content}`, human and assistant in turn); `id` is optional. The subset is the file's first
folder below `path`, or its name up to `-`. Each pair of turns becomes a question about the image; METHOD §6.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from clear.errors import ClearError
from clear.records import Question
from clear.rejects import Reject
from clear.sources.rows import Row, options_in, question

_HUMAN, _ASSISTANT = ("human", "user"), ("gpt", "assistant")
_BATCH = 32


def files(path: Path) -> list[Path]:
    """The data files below a path, in order. Raises ClearError if there are none."""
    found = [path] if path.is_file() else sorted({*path.rglob("*.parquet"), *path.rglob("*.arrow")})
    found = [file for file in found if file.suffix in (".parquet", ".arrow") and not file.name.startswith("cache-")]
    if not found:
        raise ClearError(f"{path}: no *.parquet or *.arrow file here; put a Hugging Face data set with images there.")
    return found


def count(path: Path) -> int | None:
    """Number of rows if the files say it without being read (Parquet does)."""
    import pyarrow.parquet as pq

    if any(file.suffix != ".parquet" for file in files(path)):
        return None
    return sum(_opened(file, pq.ParquetFile).metadata.num_rows for file in files(path))


def rows(path: Path) -> Iterator[Row | Reject]:
    """Every row below `path`, or why it cannot be used. Raises ClearError for a file without the two columns."""
    for file in files(path):
        subset = _subset(file, path)
        stem = file.relative_to(path).with_suffix("").as_posix() if path.is_dir() else file.stem
        for number, record in enumerate(_records(file)):
            yield _row(f"llava-{_plain(stem)}-{number:06d}", subset, record, file.parent)


def _subset(file: Path, path: Path) -> str:
    folders = file.relative_to(path).parts[:-1] if path.is_dir() else ()
    return folders[0] if folders else file.stem.split("-")[0]


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text)


def _opened(file: Path, opener):
    import pyarrow as pa

    try:
        return opener(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise ClearError(f"{file}: not a readable {file.suffix[1:]} file ({error}); fetch it again.") from error


def _records(file: Path) -> Iterator[dict]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.suffix == ".parquet":
        parquet = _opened(file, pq.ParquetFile)
        wanted = _columns(file, parquet.schema_arrow.names)
        batches = parquet.iter_batches(batch_size=_BATCH, columns=wanted)
    else:
        stream = _opened(file, lambda name: pa.ipc.open_stream(pa.memory_map(str(name))))
        wanted = _columns(file, stream.schema.names)
        batches = (part for whole in stream for part in _parts(whole.select(wanted)))
    try:
        for batch in batches:
            yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise ClearError(f"{file}: damaged ({error}); fetch it again.") from error


def _parts(batch) -> Iterator:
    for start in range(0, batch.num_rows, _BATCH):
        yield batch.slice(start, _BATCH)


def _columns(file: Path, names: list[str]) -> list[str]:
    for name in ("image", "conversations"):
        if name not in names:
            raise ClearError(f"{file}: no column '{name}' among {', '.join(names)}; see docs/DATA.md for the layout.")
    return [name for name in ("id", "image", "conversations") if name in names]


def _row(id: str, subset: str, record: dict, folder: Path) -> Row | Reject:
    image = _image(record["image"], folder)
    if isinstance(image, str):
        return Reject(id, subset, "no image", image)
    asked = _questions(id, subset, record["conversations"])
    if isinstance(asked, str):
        return Reject(id, subset, "conversation", asked)
    return Row(id, subset, image, asked, {"id": str(record.get("id", "")), "subset": subset})


def _image(value: object, folder: Path) -> bytes | str:
    """The encoded bytes, or what is wrong."""
    if isinstance(value, list):
        if len(value) != 1:
            return f"{len(value)} images in the row, expected one"
        value = value[0]
    if isinstance(value, bytes) and value:
        return value
    if not isinstance(value, dict):
        return "the row has no image"
    if value.get("bytes"):
        return value["bytes"]
    name = value.get("path")
    if not name:
        return "the row has no image"
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        return f"{name}: {error.strerror}"


def _questions(id: str, subset: str, turns: object) -> tuple[Question, ...] | str:
    """Pairs of turns as questions, or what is wrong with the conversation."""
    if not isinstance(turns, list) or len(turns) < 2 or len(turns) % 2:
        return f"{len(turns) if isinstance(turns, list) else 'no'} turns, expected pairs of question and answer"
    found = []
    for number in range(0, len(turns), 2):
        pair = [_turn(turn) for turn in turns[number : number + 2]]
        if pair[0][0] not in _HUMAN or pair[1][0] not in _ASSISTANT:
            return f"turns {number} and {number + 1} are by {pair[0][0]!r} and {pair[1][0]!r}"
        text = pair[0][1].replace("<image>", "").strip()
        made = question(f"{id}-{number // 2}", subset, text, pair[1][1], options_in(text))
        if isinstance(made, str) and "options" in made:  # a list that only looks like options
            made = question(f"{id}-{number // 2}", subset, text, pair[1][1])
        if isinstance(made, str):
            return f"turn {number}: {made}"
        found.append(made)
    return tuple(found)


def _turn(turn: object) -> tuple[str, str]:
    if not isinstance(turn, dict):
        return "?", ""
    return str(turn.get("from", turn.get("role")) or "?"), str(turn.get("value", turn.get("content")) or "")

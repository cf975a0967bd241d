"""Files that are whole or not there: written beside their place under another name, then renamed.

git and DVC ignore the other name (`*.partial`). JSON is written so that equal values give equal bytes.
"""

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clear.errors import naming


@contextmanager
def replacing(path: Path | str, several: bool = False) -> Iterator[Path]:
    """The file to write instead of `path`, which it becomes when the block ends; after an error there is none of it.

    `several` processes may write `path` at once: each has a file of its own, and the last one counts.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    own = f".{uuid.uuid4().hex[:8]}" if several else ""
    partial = path.with_name(f"{path.name}{own}.partial")
    try:
        with naming(path):
            yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path | str, text: str) -> None:
    """Write a text file (UTF-8), whole or not at all; of several that write it at once the last one counts."""
    with replacing(path, several=True) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: dict) -> None:
    """Write JSON with sorted keys, rounded floats and a final newline, so that equal values give equal bytes."""
    write_text(path, json.dumps(_rounded(value), indent=1, sort_keys=True) + "\n")


def _rounded(value):
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {str(k): _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return value

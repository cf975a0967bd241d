"""Rows of the layouts of sources, as a user writes them, and what is read from them."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clear.config import compose, from_dict
from clear.data.images import encode_image
from clear.data.rejects import Reject
from clear.sources import folder, incoming
from clear.sources.rows import examine

PICTURE = encode_image(np.random.default_rng(0).integers(0, 255, (40, 48, 3), np.uint8))
GOOD = {"image": "a.png", "question": "Which?", "answer": "red"}
RULES = from_dict(compose([])).source


def read_folder(place: Path, rows: list) -> list:
    """What the source `folder` makes of JSON lines: questions, or the reject."""
    (place / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [examine(row, RULES) for row in folder.rows(place)]
    return [row if isinstance(row, Reject) else row.sample.questions[0] for row in found]


def read_incoming(place: Path, rows: list, kind: str = "jsonl") -> list:
    """What data/incoming makes of a table of a kind: questions, or the reject, by row."""
    inside = place / "road"
    inside.mkdir(exist_ok=True)
    (inside / "a.png").write_bytes((place / "a.png").read_bytes())
    if kind == "jsonl":
        (inside / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), inside / "t.parquet")
    seen = [incoming.look(row) for row in incoming.rows_of(inside)]
    return [row.reject or row.questions[0] for row in seen]


def read_parquet(place: Path, rows: list) -> list:
    return read_incoming(place, rows, "parquet")


def parts(*texts: str | None) -> list[dict]:
    return [{"type": "image", "text": None} if text is None else {"type": "text", "text": text} for text in texts]


def turns(question: object, answer: object) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

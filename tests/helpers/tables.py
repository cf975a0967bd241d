"""Benchmark tables as VLMEvalKit writes them."""

import base64
import csv
from pathlib import Path

import numpy as np
import pandas as pd

from clear.data.images import encode_image


def b64(data: bytes) -> str:
    """Bytes as base64 text, as a cell holds a picture."""
    return base64.b64encode(data).decode()


def write_tsv(file: Path, rows: list[dict]) -> Path:
    """Write rows as a TSV, in a folder that need not exist yet."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(file, sep="\t", index=False, quoting=csv.QUOTE_NONNUMERIC)
    return file


def picture(number: int, side: int = 64) -> bytes:
    """A PNG of coloured squares."""
    rng = np.random.default_rng(number)
    return encode_image(
        np.kron(rng.integers(0, 255, (8, 8, 3), np.uint8), np.ones((side // 8, side // 8, 1), np.uint8))
    )


def mmbench(folder: Path, count: int = 6) -> Path:
    """A small circular benchmark: rotations name the row that holds the picture, one of them before it."""
    rows = []
    for i in range(count):
        common = {"question": f'What "is"\tthat,\nline {i}?', "category": "a", "l2-category": "b", "split": "dev"}
        common |= {"A": "red", "B": "blue", "C": "None" if i % 2 else None, "hint": "one\rreturn" if i == 1 else None}
        rows.append({"index": i, "image": b64(picture(i)), "answer": "A", **common})
        rows.append({"index": i + 1000000, "image": str(i), "answer": "B", **common})
    rows.insert(0, rows.pop())
    return write_tsv(folder / "MMBench_DEV_EN_V11.tsv", rows)


def png(number: int, side: int = 48) -> bytes:
    """A PNG of noise."""
    return encode_image(np.random.default_rng(number).integers(0, 255, (side, side, 3), np.uint8))

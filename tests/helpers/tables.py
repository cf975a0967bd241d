"""Benchmark tables as VLMEvalKit writes them."""

import base64
import csv
from pathlib import Path

import pandas as pd


def b64(data: bytes) -> str:
    """Bytes as base64 text, as a cell holds a picture."""
    return base64.b64encode(data).decode()


def write_tsv(file: Path, rows: list[dict]) -> Path:
    """Write rows as a TSV, in a folder that need not exist yet."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(file, sep="\t", index=False, quoting=csv.QUOTE_NONNUMERIC)
    return file

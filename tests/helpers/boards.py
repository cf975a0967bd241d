"""Small prediction tables of several models, and the leaderboard made of them."""

from pathlib import Path

import pandas as pd

from clear.bench.vlmeval import collect, scores
from clear.bench.vlmeval.leaderboard import leaderboard


def mcq(index: int, right: bool, **more) -> dict:
    listed = {"A": "red", "B": "blue"}
    return {"index": index, "question": f"Q{index}?", **listed, "answer": "A", "prediction": "AB"[not right], **more}


def rows(count: int, right, **more) -> list[dict]:
    return [mcq(index, bool(right(index)), **more) for index in range(count)]


def put(folder: Path, model: str, **tables: list[dict]) -> list[Path]:
    """Tables of a model as `clear answer` writes them; `__` in a name stands for what Python's names cannot hold."""
    files = []
    for name, table in tables.items():
        file = folder / model / f"{model}_{name.replace('__', '-')}.tsv"
        file.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(table).to_csv(file, sep="\t", index=False)
        files.append(file)
    return files


def made(files, reference="", manifest=None, **more) -> dict:
    return leaderboard(scores.score(collect.read(files, manifest)), reference, **more)


def cell(board: dict, model: str, level: str, bench: str = "") -> dict:
    found = board["models"][model]["levels"][level]
    return found["benchmarks"][bench] if bench else found["average"]

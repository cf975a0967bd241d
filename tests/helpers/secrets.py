"""Planted secrets: a marker for every variable that a user may hold one in, and the search for them in what was left.

No marker stands in a file of this repository: each is made of its variable's name when a test runs.
"""

import hashlib
import sqlite3
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.conftest import git

VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "CLEAR_JUDGE_KEY",
    "CLEAR_SERVE_KEY",
    "CLEAR_TEACHER_KEY",
    "GITHUB_TOKEN",
    "HF_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "PREFECT_API_AUTH_STRING",
    "PREFECT_API_KEY",
    "SLACK_WEBHOOK_URL",
    "WANDB_API_KEY",
)
"""Those that the code reads itself, and those that its libraries do."""


def marker(name: str) -> str:
    """The value of a variable: 24 characters that occur nowhere else."""
    return f"planted{hashlib.sha256(name.encode()).hexdigest()[:17]}"


def planted() -> dict[str, str]:
    """An environment with a secret in every variable."""
    return {name: marker(name) for name in VARIABLES}


def origin() -> str:
    """An address of a git remote with a token in it, at which nothing listens."""
    return f"https://{marker('origin')}:x-oauth-basic@127.0.0.1:9/owner/name.git"


def _contents(file: Path) -> Iterator[bytes]:
    yield file.read_bytes()
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        yield repr(pq.read_table(file).to_pylist()).encode()
    elif file.suffix == ".sqlite":
        with sqlite3.connect(file) as database:
            yield "\n".join(database.iterdump()).encode()
    elif file.suffix == ".xlsx":
        with zipfile.ZipFile(file) as book:
            yield from map(book.read, book.namelist())


def leaks(folder: Path, said: Iterable[str] = (), given: Iterable[Path] = ()) -> list[str]:
    """`<where>: <variable>` for every planted secret in the files below `folder`, its commits and what was `said`.

    `given` are files that a test has put a secret into, as a user does.
    """
    names = {name: marker(name).encode() for name in (*VARIABLES, "origin")}
    texts = [(f"output {number}", text.encode()) for number, text in enumerate(said)]
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not file.is_symlink() and file not in set(given):
            texts += [(str(file.relative_to(folder)), content) for content in _contents(file)]
    for repository in {file.parent for file in folder.rglob(".git")}:
        texts.append((f"commits of {repository.name}", git(repository, "log", "-p", "--all").encode()))
    return [f"{where}: {name}" for where, text in texts for name, secret in names.items() if secret in text]

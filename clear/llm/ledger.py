"""Where replies of an endpoint are kept, and what was spent on them: one SQLite file, safe to kill at any time.

A reply and its cost are written in one transaction. An attempt's maximum cost is reserved before it is sent and
corrected afterwards; if the process dies in between, the reservation stays, because the server may have billed it.
Several processes may share a file.
"""

import errno
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clear.errors import ClearError, refusal

IMAGE_TOKENS = 4096
"""More than current models bill for one image; used only to forecast a cost, the report has the real count."""

_REFUSED = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
    sqlite3.SQLITE_PERM: errno.EACCES,
    sqlite3.SQLITE_IOERR: errno.EIO,
}
WAIT = 60
"""Seconds for another process to let go of the file."""
_TABLES = """
CREATE TABLE IF NOT EXISTS replies (
    hash TEXT PRIMARY KEY, text TEXT NOT NULL,
    prompt INTEGER NOT NULL, completion INTEGER NOT NULL, cut INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS attempts (
    id INTEGER PRIMARY KEY, hash TEXT NOT NULL, cost REAL NOT NULL, settled INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS total (one INTEGER PRIMARY KEY CHECK (one = 1), spent REAL NOT NULL);
INSERT OR IGNORE INTO total VALUES (1, 0.0);
"""


class ReplyStore:
    """Replies by hash, and a ledger. Made with the file's path; folders are created."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        with self._errors():
            self._db = sqlite3.connect(self.path, timeout=WAIT, isolation_level=None, check_same_thread=False)
            self._db.executescript(_TABLES)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if number := _REFUSED.get(code):  # nothing is wrong with the file
                raise refusal(OSError(number, os.strerror(number), os.fspath(self.path))) from error
            if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise ClearError(
                    f"{self.path}: another process has held it for {WAIT} s; end that one, then run the command again."
                ) from error
            raise ClearError(
                f"{self.path}: not a usable reply file ({error}); move it away, and all requests are sent again."
            ) from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # SQLite has undone it already where the disk is full
                    self._db.execute("ROLLBACK")
                raise

    def get(self, key: str) -> tuple[str, int, int, bool] | None:
        """The kept reply: text, prompt tokens, completion tokens, whether it was cut."""
        with self._lock, self._errors():
            row = self._db.execute(
                "SELECT text, prompt, completion, cut FROM replies WHERE hash = ?", (key,)
            ).fetchone()
        return (*row[:3], bool(row[3])) if row else None

    def reserve(self, key: str, cost: float, budget: float) -> tuple[int | None, float]:
        """Set `cost` aside and return a ticket, or None if that would pass `budget`; and the sum so far (USD)."""
        with self._transaction() as db:
            spent = db.execute("SELECT spent FROM total").fetchone()[0]
            if cost and spent + cost > budget + 1e-9:  # free requests are allowed after the budget is spent
                return None, spent
            db.execute("UPDATE total SET spent = spent + ?", (cost,))
            ticket = db.execute("INSERT INTO attempts (hash, cost, settled) VALUES (?, ?, 0)", (key, cost)).lastrowid
        return ticket, spent

    def settle(self, ticket: int, cost: float, key: str = "", reply: tuple[str, int, int, bool] | None = None) -> None:
        """Replace the reservation by the attempt's cost, and keep its reply."""
        with self._transaction() as db:
            aside = db.execute("SELECT cost FROM attempts WHERE id = ?", (ticket,)).fetchone()[0]
            db.execute("UPDATE total SET spent = max(0.0, spent + ?)", (cost - aside,))
            db.execute("UPDATE attempts SET cost = ?, settled = 1 WHERE id = ?", (cost, ticket))
            if reply is not None:
                db.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?, ?)", (key, *reply))

    def totals(self) -> dict[str, float]:
        """Counts and sums over all runs."""
        with self._lock, self._errors():
            replies, prompt, completion = self._db.execute(
                "SELECT count(*), coalesce(sum(prompt), 0), coalesce(sum(completion), 0) FROM replies"
            ).fetchone()
            attempts, open_cost = self._db.execute(
                "SELECT count(*), coalesce(sum(CASE WHEN settled THEN 0 ELSE cost END), 0) FROM attempts"
            ).fetchone()
            spent = self._db.execute("SELECT spent FROM total").fetchone()[0]
        return {
            "replies": replies,
            "attempts": attempts,
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "spent_usd": spent,
            "unconfirmed_usd": open_cost,
        }

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()


def most_tokens(body: dict) -> tuple[int, int]:
    """Upper bounds on the tokens of a request, (prompt, completion), for a cost that is reserved before it is sent.

    A token is at least one byte of text; an image counts IMAGE_TOKENS; 64 frame each message.
    """
    most = 0
    for message in body["messages"]:
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            most += len(part["text"].encode()) if part["type"] == "text" else IMAGE_TOKENS
        most += 64
    return most, body["max_tokens"]

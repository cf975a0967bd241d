"""The one exception a user is meant to read.

Anything wrong with the user's data, configuration or workspace is raised as `ClearError` with a message that
names the file, the row, the value and the remedy; the command line prints it as one line without a traceback. An
operation that the operating system refuses (no permission, no space left, a file where a folder must be) is printed in
the same way, wherever it occurs: no code has to catch it, see `refusal`. Programming errors stay ordinary exceptions.

What is said passes through one place each: a ClearError holds no secret of the environment (`without_secrets`), and a
terminal gets no control character from outside (`say`).
"""

import errno
import os
import re
import reprlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

_REMEDIES = {
    "check the permissions, or name another place": (errno.EACCES, errno.EPERM, errno.EROFS),
    "free some space there, then run the command again": (errno.ENOSPC, errno.EDQUOT),
    "correct the path": (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ENOTEMPTY),
    "remove or correct the link": (errno.ELOOP,),
    "the disk, or the connection to it, fails: check it before anything else": (errno.EIO,),
    "raise the limit on the size of a file (ulimit -f)": (errno.EFBIG,),
    "raise the limit on open files (ulimit -n)": (errno.EMFILE, errno.ENFILE),
}

LONGEST = 4000
"""Characters of what a ClearError says, before what cannot be printed is escaped. A name or value from outside may have
millions; the middle is left out, because the place stands in front and the remedy at the end."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


UNDECIDED = 2
"""Exit status of a command that judges (`gate`, `compare`, `check`) where it cannot; 1 is a judgement: no."""


NO_READER = 141
"""Exit status of a program whose output nobody reads to the end, as of one that SIGPIPE ends: no judgement."""

_SECRET = re.compile(r"(KEY|KEY_ID|TOKEN|SECRET|PASSWORD|PASSWD|AUTH_STRING|WEBHOOK_URL|ALERTS)$", re.IGNORECASE)
_SHORTEST_SECRET = 8
_USER = re.compile(r"(?<=://)[^\s/]+@")
HIDDEN = "***"


def without_secrets(text: object, *more: str) -> str:
    """Text without what must not be kept or shown: the user and password of a URL, the value of every environment
    variable that is named like a secret, and `more` secrets. A value of fewer than 8 characters could be any word, and
    is left; those of `more` never are."""
    hidden = _USER.sub(f"{HIDDEN}@", str(text))
    named = (value for name, value in os.environ.items() if _SECRET.search(name) and len(value) >= _SHORTEST_SECRET)
    for secret in sorted({*named, *filter(None, more)}, key=len, reverse=True):  # one may be part of another
        hidden = hidden.replace(secret, HIDDEN)
    return hidden


class ClearError(Exception):
    """Bad input or workspace state. `str(error)` is a complete sentence with the remedy, on one line that can be
    printed, whatever names from outside are in it and however long they are, and has no secret in it."""

    status = 1
    """Exit status of the command that it ends."""

    def __init__(self, *said: object) -> None:
        super().__init__(*(printable(_on_one_line(_shortened(without_secrets(text)))) for text in said))


@contextmanager
def judging() -> Iterator[None]:
    """What keeps a command from judging, or from saying so, in the block, ends it with the status UNDECIDED."""
    try:
        yield
    except Exception as error:
        if (refused := refusal(error)) is None:
            error.undecided = True  # a fault of ours is no judgement either
            raise
        refused.status = UNDECIDED
        raise refused from error


def shown(path: Path | str) -> str:
    """A path as text that can be printed and stored; control characters and bytes that are not UTF-8 become `\\xNN`."""
    return printable(os.fsencode(path).decode(errors="backslashreplace"), "")


def printable(text: str, kept: str = "\n\t") -> str:
    """Text from outside for a terminal: control characters, which could rewrite what stands there, become `\\xNN`."""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def say(text: object, stream: TextIO | None = None) -> None:
    """A line on a terminal (standard output, or `stream`), at once: what cannot be printed is escaped, no secret in it.

    Every program of this project prints with it whatever could hold text from outside. Where nobody reads standard
    output any more (`| head`), the program ends without a word and with the status NO_READER; a thread of it goes on.
    """
    try:
        print(printable(without_secrets(text)), file=stream or sys.stdout, flush=True)
    except BrokenPipeError:
        if stream not in (None, sys.stdout):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is in its buffer is written at the end
        if threading.current_thread() is threading.main_thread():
            raise SystemExit(NO_READER) from None


def fail(error: ClearError) -> int:
    """Say on standard error why a program ends, if it can be written to; returns its exit status."""
    with suppress(OSError):
        say(f"error: {error}", sys.stderr)
    return error.status


def quoted(value: object) -> str:
    """A value in a message: quoted, what cannot be printed escaped, the middle of what is long left out."""
    return _SHORT.repr(value)


def one_line(error: BaseException) -> str:
    """What an error of a library says, on one line."""
    return " ".join(str(error).split())


def _shortened(text: str) -> str:
    left_out = len(text) - LONGEST
    return text if left_out <= 0 else f"{text[: LONGEST // 2]} … ({left_out:,} characters) … {text[-LONGEST // 2 :]}"


def _on_one_line(text: str) -> str:
    return " ".join(filter(None, map(str.strip, text.splitlines())))


def refusal(error: BaseException) -> ClearError | None:
    """What an error tells a person: a ClearError itself, and what the operating system refused as one line with the
    path and the remedy; None for any other.

    An OSError without a number is a library's own (a damaged file, no network) and says nothing about a path.
    """
    if isinstance(error, ClearError):
        return error
    if not isinstance(error, OSError) or error.errno is None:
        return None
    said, path = os.strerror(error.errno), error.filename2 or error.filename
    # Libraries written in C++ name the path in their text only, and add their own remarks to it.
    where = shown(path) if path else str(error.strerror or error).split(". Detail:")[0].replace(said, "output")
    remedy = next((f"; {remedy}" for remedy, numbers in _REMEDIES.items() if error.errno in numbers), "")
    return ClearError(f"{where}: {said}{remedy}.")


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Add `path` to an OSError of the block that names none, such as one raised while writing on a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise

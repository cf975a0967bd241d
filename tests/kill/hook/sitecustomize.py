"""Put in front of the import path by tests/kill/process.py: what happens at the KILL_AT-th change of a file below
KILL_FOLDER (opened for writing, renamed, removed, a folder made). KILL_DOES=KILL: this process ends by SIGKILL just
before it. EROFS: it is refused, and all later ones, of other processes too, as on a disk that has become read-only.
At 0 the changes are told, into KILL_COUNT: the numbers of those that each place of the code makes."""

import atexit
import errno
import json
import os
import signal
import sys
from pathlib import Path

_folder, _at = os.environ["KILL_FOLDER"], int(os.environ["KILL_AT"])
_refuses, _refused = os.environ["KILL_DOES"] == "EROFS", Path(f"{os.environ['KILL_COUNT']}.refused")
_changes, _places, _CODE = 0, {}, f"{Path(__file__).parents[3] / 'clear'}/"
_EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "open"}


def _watch(event: str, arguments: tuple) -> None:
    global _changes
    if event not in _EVENTS or not isinstance(arguments[0], (str, bytes, os.PathLike)):
        return
    if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
        return
    path = os.path.abspath(os.fsdecode(arguments[0]))  # noqa: PTH100 - not where a link leads
    if not path.startswith(_folder) or "__pycache__" in path:
        return
    _changes += 1
    if not _at:
        _places.setdefault((event, *_stack()), []).append(_changes)
    elif _refuses:
        _refuse(event, path)
    elif _changes == _at:
        os.kill(os.getpid(), signal.SIGKILL)


def _refuse(event: str, path: str) -> None:
    """What Linux says of a change on a read-only disk: of a folder that is there, that it is there."""
    if _changes >= _at and not _refused.exists():
        _refused.touch()
    if _refused.exists() and not (event == "os.mkdir" and Path(path).exists()):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)


def _stack() -> list[tuple[str, int]]:
    """Files and lines of the project from which the change is made."""
    frame, found = sys._getframe(2), []
    while frame is not None:
        if frame.f_code.co_filename.startswith(_CODE):
            found.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return found


def _tell() -> None:
    Path(f"{os.environ['KILL_COUNT']}.{os.getpid()}").write_text(json.dumps([*_places.values()]))


if not _at:
    atexit.register(_tell)
sys.addaudithook(_watch)

"""Checkpoints of a stage in S3, so that the next machine resumes after the last one was reclaimed.

A snapshot is the content of the stage's checkpoint folder: complete checkpoints, finished phases. Its files go to S3 by
content, a manifest with their hashes last, so that a snapshot is whole or not there. Each job writes under its own id;
a later job for the same inputs reads the newest whole snapshot of any of them. A file whose hash is wrong makes its
snapshot unusable, and the one before it counts. Two snapshots are kept per job.
"""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from clear.data.aws import Unreachable
from clear.data.records import file_sha256
from clear.errors import ClearError
from flows.batch.store import Damaged, Store

KEPT = 2
COMPLETE, SHARDED = "complete", "_sharded"  # marks of clear/training/loop


def files_of(folder: Path, whole: bool = True) -> list[Path]:
    """The files of a checkpoint folder that count, in order; what is still being written does not.

    Where the folder is not `whole`, sharded checkpoints do not either: other machines hold the rest of them.
    """
    files = []
    for file in sorted(folder.rglob("*")):
        if not whole and any(part.endswith(SHARDED) for part in file.relative_to(folder).parts):
            continue
        unfinished = any(
            part.name.startswith("checkpoint-") and not (part / COMPLETE).exists()
            for part in file.parents
            if folder in part.parents
        )
        if file.is_file() and not unfinished and file.suffix != ".partial":
            files.append(file)
    return files


def _number(name: str) -> int:
    return int(Path(name).stem)


class Keeper:
    """Keeps the newest snapshot of `folder` in S3, beside the stage, in a thread of its own."""

    def __init__(
        self,
        store: Store,
        key: str,
        job: str,
        folder: Path,
        seconds: float,
        say: Callable[[str], None],
        whole: bool = True,
    ) -> None:
        self._store, self._folder, self._seconds, self._say, self._whole = store, folder, seconds, say, whole
        self._place = f"checkpoints/{key}/{job}"
        self._known: dict[tuple[str, int, int], str] = {}
        self._last: dict[str, dict] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        numbers = [_number(name) for name in store.names(f"{self._place}/manifests/")]
        self._next = max(numbers, default=0) + 1

    def start(self) -> None:
        """Begin to look for new snapshots every `seconds`."""
        self._thread.start()

    def _work(self) -> None:
        while not self._ended.wait(self._seconds):
            try:
                self.keep()
            except ClearError as error:  # the next round tries again; the training continues
                self._say(f"checkpoint not kept in S3: {error}")

    def stop(self) -> None:
        """End the thread; a look in progress is waited for."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def keep(self) -> bool:
        """Upload a snapshot if there is a new one; False if there is not, or it was rotated away meanwhile."""
        with self._lock:
            try:
                content = {}
                for file in files_of(self._folder, self._whole):
                    content[file.relative_to(self._folder).as_posix()] = self._describe(file)
                if not content or content == self._last:
                    return False
                begun = time.monotonic()
                there = {entry["sha256"] for entry in self._last.values()}
                for name, entry in content.items():
                    if entry["sha256"] not in there:
                        self._store.put(self._folder / name, f"{self._place}/objects/{entry['sha256']}")
            except FileNotFoundError:
                return False
            self._store.write(f"{self._place}/manifests/{self._next:08d}.json", content)
            self._last = content
            self._next += 1
            size = sum(entry["bytes"] for entry in content.values()) / 2**20
            self._say(f"checkpoint kept in S3: {len(content)} files, {size:.1f} MiB, {time.monotonic() - begun:.1f} s")
            self._tidy()
            return True

    def _describe(self, file: Path) -> dict:
        stat = file.stat()
        mark = (str(file), stat.st_size, stat.st_mtime_ns)
        if mark not in self._known:
            self._known[mark] = file_sha256(file)
        return {"sha256": self._known[mark], "bytes": stat.st_size}

    def _tidy(self) -> None:
        manifests = sorted(self._store.names(f"{self._place}/manifests/"))
        old, new = manifests[:-KEPT], manifests[-KEPT:]
        if not old:
            return
        used = {entry["sha256"] for name in new for entry in (self._store.read(name) or {}).values()}
        self._store.delete(*old)
        objects = self._store.names(f"{self._place}/objects/")
        self._store.delete(*(name for name in objects if Path(name).name not in used))


def restore(store: Store, key: str, folder: Path, say: Callable[[str], None]) -> bool:
    """Bring the newest usable snapshot for these inputs into `folder`; False if there is none."""
    names = store.names(f"checkpoints/{key}/")
    manifests = [name for name in names if "/manifests/" in name]
    for name in sorted(manifests, key=lambda name: (names[name], name), reverse=True):
        snapshot = name.partition("/manifests/")[0]
        try:
            content = store.read(name) or {}
            for file, entry in content.items():
                if not (folder / file).resolve().is_relative_to(folder.resolve()):
                    raise Damaged(f"{store.url(name)} names {file}, which is outside the checkpoint folder.")
                store.fetch(f"{snapshot}/objects/{entry['sha256']}", folder / file, entry["sha256"])
        except Unreachable:  # starting anew instead would throw away what is there
            raise
        except ClearError as error:
            shutil.rmtree(folder, ignore_errors=True)
            say(f"a checkpoint in S3 is not used: {error}")
            continue
        say(f"continuing from a checkpoint in S3: {len(content)} files of {Path(snapshot).name}")
        return True
    return False


def forget(store: Store, key: str) -> None:
    """Delete all snapshots for these inputs: the stage has succeeded."""
    store.delete(*store.names(f"checkpoints/{key}/"))

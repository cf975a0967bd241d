"""A small disk for `make kill`: full after so many bytes, or read-only from one change of a file on.

Full is a tmpfs with as much room as is left to the command, so that every writer meets it, those of C++ and Rust too.
Read-only is such a disk from the beginning, and else the hook, which refuses what Python asks for: Linux makes no file
system read-only that has a file open for writing.
"""

import contextlib
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

PLENTY = 2**30
"""Bytes that are left to a command that is to succeed."""
_MOST_FILES = 200_000


class Disk:
    """A tmpfs, mounted at `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def used(self) -> int:
        """Bytes that are taken."""
        found = os.statvfs(self.folder)
        return (found.f_blocks - found.f_bfree) * found.f_frsize

    def leave(self, room: int) -> None:
        """Have so many bytes free, to the next page."""
        self._remount(f"size={max(self.used() + room, 4096)},rw")

    def forbid(self) -> None:
        """Allow no writing."""
        self._remount("ro")

    def _remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", self.folder], check=True, capture_output=True)

    @contextlib.contextmanager
    def peak(self) -> Iterator[list[int]]:
        """The most bytes taken beyond those at the beginning, while the block lasts, as the list's only value."""
        before, most, over = self.used(), [0], threading.Event()

        def watch() -> None:
            while not over.wait(0.005):
                most[0] = max(most[0], self.used() - before)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield most
        finally:
            over.set()
            thread.join()


@contextlib.contextmanager
def mounted() -> Iterator[Disk | None]:
    """A disk of its own, or None where this user mounts nothing."""
    with tempfile.TemporaryDirectory(prefix="kill-disk-") as folder:
        options = f"size={PLENTY},nr_inodes={_MOST_FILES}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True)
        if done.returncode:
            yield None
            return
        try:
            yield Disk(Path(folder))
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True, capture_output=True)

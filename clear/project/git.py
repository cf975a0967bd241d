"""The one caller of git: what a command printed, how it ended, and what it said about it in one line."""

import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from clear.errors import ClearError


class NoGit(ClearError):
    """git is not installed."""


@dataclass(frozen=True)
class Answer:
    """What a git command left: its exit status, and both its outputs as they came."""

    status: int
    data: bytes
    errors: bytes

    @property
    def text(self) -> str:
        """Standard output; names that are not UTF-8 remain names of files."""
        return os.fsdecode(self.data)

    @property
    def said(self) -> str:
        """Standard error in one line."""
        return " | ".join(self.error_lines())

    def error_lines(self) -> list[str]:
        """The lines of standard error that are not empty."""
        lines = self.errors.decode(errors="replace").splitlines()
        return [line.strip() for line in lines if line.strip()]


PATIENCE = {
    "GIT_HTTP_LOW_SPEED_LIMIT": "1000",
    "GIT_HTTP_LOW_SPEED_TIME": "60",
    "GIT_SSH_COMMAND": "ssh -oConnectTimeout=60 -oServerAliveInterval=15 -oServerAliveCountMax=4",
}
"""A server that accepts and says nothing is an error after a minute, and no flow that runs for ever."""
REMOTE = ("clone", "fetch", "ls-remote", "pull", "push")
NAMES = (
    *("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_COMMON_DIR", "GIT_SHALLOW_FILE"),
    *("GIT_OBJECT_DIRECTORY", "GIT_ALTERNATE_OBJECT_DIRECTORIES"),
)
"""Variables that name a repository, as git sets them for hooks: commands here name theirs by its folder."""


def git(folder: Path, *arguments: str, given: bytes = b"") -> Answer:
    """Run a git command in a folder with `given` as its input. Raises NoGit where there is no git."""
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    if arguments[0] in REMOTE:
        environment = PATIENCE | environment
        if not _asks():
            environment |= {"GIT_TERMINAL_PROMPT": "0", "SSH_ASKPASS_REQUIRE": "never"}
            if "GIT_SSH_COMMAND" not in os.environ:
                environment["GIT_SSH_COMMAND"] += " -oBatchMode=yes"
        # The user's own program, which the other would hide.
        own = "GIT_SSH" in os.environ or git(folder, "config", "core.sshCommand").text
        if own and "GIT_SSH_COMMAND" not in os.environ:
            del environment["GIT_SSH_COMMAND"]
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, input=given, capture_output=True, check=False, env=environment
        )
    except FileNotFoundError as error:
        raise NoGit("git is not installed; install it and repeat.") from error
    return Answer(done.returncode, done.stdout, done.stderr)


def _asks() -> bool:
    """Whether somebody at a terminal can be asked for a password: in its background, where flows run, the question
    would stop the whole process group for ever."""
    try:
        terminal = os.open(os.ctermid(), os.O_RDWR | os.O_NOCTTY)
    except OSError:  # there is none
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    finally:
        os.close(terminal)


def output(folder: Path, *arguments: str) -> str:
    """Standard output of a git command. Raises ClearError with the command and what git says."""
    done = git(folder, *arguments)
    if done.status:
        raise ClearError(f"{folder}: `git {' '.join(arguments)}` failed: {done.said}")
    return done.text


def tracked(folder: Path, commit: str, *paths: str) -> dict[str, str]:
    """The files of a commit below some paths (default: all of the folder's), path → id of its content; no links."""
    found = {}
    for line in output(folder, "ls-tree", "-r", "-z", commit, "--", *paths).split("\0"):
        entry, _, path = line.partition("\t")
        if path:
            mode, kind, blob = entry.split()
            if kind == "blob" and mode != "120000":
                found[path] = blob
    return found


def contents_of(folder: Path, blobs: Iterable[str]) -> dict[str, bytes]:
    """Id → content; ids that this clone does not have are left out."""
    names = list(blobs)
    done = git(folder, "cat-file", "--batch", given="".join(f"{name}\n" for name in names).encode())
    if done.status:
        raise ClearError(f"{folder}: `git cat-file` failed: {done.said}")
    found, start = {}, 0
    for name in names:
        end = done.data.index(b"\n", start)
        words, start = done.data[start:end].split(), end + 1
        if words[-1] != b"missing":
            found[name] = done.data[start : start + int(words[-1])]
            start += int(words[-1]) + 1
    return found

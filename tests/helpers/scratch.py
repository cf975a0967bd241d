"""The working tree and the smoke pipeline in a folder of their own."""

import os
import shutil
import sys
from pathlib import Path

from tests.conftest import ROOT, git


def committed_copy(folder: Path) -> Path:
    """The working tree as it is now, committed in a repository of its own; no data, no cache. Returns the folder."""
    listed = git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, dict.fromkeys(listed)):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    git(folder, "init", "-q", "-b", "main")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "the working tree")
    return folder


def scratch_command(home: Path) -> tuple[list[str], dict[str, str]]:
    """`clear scratch smoke` and its environment, with `home` for CLEAR_HOME."""
    environment = os.environ | {"CLEAR_HOME": str(home), "PYTHONPATH": ""}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return [sys.executable, "-m", "clear", "scratch", "smoke"], environment

"""The smoke pipeline in a folder of its own, as a command."""

import os
import sys
from pathlib import Path


def scratch_command(home: Path) -> tuple[list[str], dict[str, str]]:
    """`clear scratch smoke` and its environment, with `home` for CLEAR_HOME."""
    environment = os.environ | {"CLEAR_HOME": str(home), "PYTHONPATH": ""}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return [sys.executable, "-m", "clear", "scratch", "smoke"], environment

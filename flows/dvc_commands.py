"""How a flow runs DVC: its commands under the supervisor, what of a failure may pass, and what a failure means.

A command runs with the workspace's environment and holds the workspace's command lock, also where a killed flow has
left it behind. A failure becomes one line that says what to do, or DVC's own last lines where nothing fits. The module
is not called `dvc`: Prefect puts the folder of a deployed flow in front of the import path, where it would hide DVC.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from clear.data.ports import spare_loopback
from clear.errors import ClearError, printable, without_secrets
from flows.service import children

if TYPE_CHECKING:
    from dvc.stage import PipelineStage

LOCKED = ("Unable to acquire lock", "is busy, it is being blocked by")
NETWORK = (
    "Could not connect to the endpoint",
    "Connect timeout on endpoint",
    "Read timeout on endpoint",
    "Connection was closed before we received a valid response",
    "Connection reset by peer",
    "Connection refused",
    "Network is unreachable",
    "Temporary failure in name resolution",
    "Name or service not known",
    "educe your request rate",  # S3 throttles
    "We encountered an internal error",
    "Your socket connection to the server was not read from or written to",
)
CAUSES: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("NoSuchBucket", "The specified bucket does not exist"),
        "the remote's bucket does not exist; create it, or name another one with `make remote BUCKET=…`",
    ),
    (
        ("InvalidAccessKeyId", "SignatureDoesNotMatch", "Forbidden", "AccessDenied", "Access Denied", "(403)"),
        "the remote refuses these keys; check AWS_PROFILE or AWS_ACCESS_KEY_ID with its secret, and their rights",
    ),
    (
        ("The config profile",),
        "the remote names an AWS profile that ~/.aws does not have; set AWS_PROFILE and repeat `make remote`",
    ),
    (
        ("Invalid bucket name", "InvalidBucketName"),
        "the remote's bucket has a name that no bucket can have; name the bucket with `make remote BUCKET=…`",
    ),
    (
        ("Unable to locate credentials", "NoCredentialsError", "Credential error"),
        "there are no keys for the remote; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and its secret",
    ),
    (
        ("No space left on device", "[Errno 28]", "Disk quota exceeded"),
        "the disk is full; free some space (`dvc gc --workspace` removes data of other revisions) and run again",
    ),
    (
        ("QuotaExceeded", "InsufficientCapacity", "XMinioStorageFull", "(507)"),
        "the remote is full; free some space there and run again",
    ),
)
"""Words in DVC's output → what they mean."""

ADVICE = (
    "To track the changes with git, run:",
    "git add ",
    "To enable auto staging, run:",
    "dvc config core.autostage true",
    "Use `dvc push` to send your updates to remote storage.",
)
"""Lines of DVC that advise a person at a terminal; a flow does itself what has to be done."""
NOISE = ("Having any troubles?", "Is your cache up to date?", "<https://error.dvc.org")


class Temporary(ClearError):
    """A command failed for a reason that may pass: another DVC process, or the network."""


def address(stage: "PipelineStage", workspace: Path) -> str:
    """How DVC calls a stage inside the workspace; its own `addressing` depends on the working directory."""
    file, name = os.path.relpath(stage.path, workspace), getattr(stage, "name", None)
    return file if name is None else name if file == "dvc.yaml" else f"{file}:{name}"


def stages_in_order(workspace: Path) -> list[str]:
    """All stage names of dvc.yaml, dependencies first; ties in alphabetical order."""
    import networkx
    from dvc.repo import Repo

    with Repo(str(workspace)) as repo:
        graph = networkx.reverse_view(repo.index.graph)
        ordered = networkx.lexicographical_topological_sort(graph, key=lambda stage: address(stage, workspace))
        return [address(stage, workspace) for stage in ordered]


def remote_of(workspace: Path) -> str | None:
    """Name of the default DVC remote of a workspace, or None."""
    from dvc.repo import Repo

    with Repo(str(workspace)) as repo:
        return repo.config["core"].get("remote")


def missing_outputs(workspace: Path, stages: list[str] | None = None) -> list[str]:
    """Cached outputs that dvc.lock knows and the workspace lacks; with `stages`, only their outputs and inputs."""
    from dvc.repo import Repo

    with Repo(str(workspace)) as repo:
        chosen = [stage for stage in repo.index.stages if stages is None or address(stage, workspace) in stages]
        near = {item.fs_path for stage in chosen for item in (*stage.outs, *stage.deps)}
        lacking = [
            out.fs_path
            for out in repo.index.outs
            if out.use_cache and out.hash_info and out.fs_path in near and not Path(out.fs_path).exists()
        ]
    return sorted(os.path.relpath(path, workspace) for path in lacking)


def bring(names: Sequence[str], remote: str, workspace: Path, say: Callable[[str], None]) -> tuple[str, str]:
    """Bring outputs that the workspace lacks from DVC's cache, and what that lacks from the remote.

    Returns ("Cached" or "Ran", what came from where). `dvc pull` alone asks the remote for what the cache has too, and
    fails where the remote is away.
    """
    dvc(["checkout", "--allow-missing", *names], workspace, say)
    absent = _absent(names, workspace)
    if not absent:
        return "Cached", f"{len(names)} missing outputs came from the cache."
    dvc(["pull", "--allow-missing", *absent], workspace, say)
    still = _absent(absent, workspace)
    fetched = f"{len(absent) - len(still)} of {len(absent)} missing outputs fetched from {remote}"
    return "Ran", fetched + (f"; it has no {', '.join(still)}" if still else "")


def _absent(names: Sequence[str], workspace: Path) -> list[str]:
    return [name for name in names if not (workspace / name).exists()]


def unchanged(workspace: Path) -> set[str]:
    """The stages of dvc.yaml that neither changed nor depend on one that did; one question instead of one per stage.

    None is known while another DVC process is in the way: then each stage asks for itself, and waits.
    """
    import networkx
    from dvc.repo import Repo

    try:
        lines = dvc(["status", "--json"], workspace, lambda line: None)
    except Temporary:
        return set()
    changed = set(json.loads(next((line for line in reversed(lines) if line.startswith("{")), "{}")))
    with Repo(str(workspace)) as repo:
        graph = repo.index.graph
        # DVC's edges lead from a stage to what it depends on, so its ancestors are what depends on it.
        behind = {
            upstream
            for stage in graph
            if address(stage, workspace) in changed
            for upstream in networkx.ancestors(graph, stage)
        }
        return {address(stage, workspace) for stage in graph if stage not in behind} - changed


def environment(workspace: Path) -> dict[str, str]:
    """Environment of the commands: this interpreter first on PATH, output unbuffered, the workspace's CLEAR_HOME."""
    home = os.environ.get("CLEAR_HOME") if workspace == Path.cwd() else None
    variables = os.environ | {
        "CLEAR_HOME": home or str(workspace / ".clear"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONUNBUFFERED": "1",
    }
    spare_loopback(variables)
    return variables


def command_lock(workspace: Path) -> Path:
    """Held while a command of a flow runs in the workspace, also by one that a killed flow has left behind."""
    return workspace / ".clear" / "command.lock"


def dvc(arguments: list[str], workspace: Path, say: Callable[[str], None]) -> list[str]:
    """Run a DVC command in the workspace and return its last lines of output.

    Raises Temporary where another DVC process or the network was in the way, else ClearError with the last lines.
    """
    lock = command_lock(workspace)
    lock.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "dvc", *arguments]
    status, lines = children.run(command, workspace, environment(workspace), partial(_without_advice, say), lock)
    if status:
        kind = Temporary if any(sign in line for line in lines[-30:] for sign in LOCKED + NETWORK) else ClearError
        raise kind(f"`dvc {' '.join(arguments)}` ended with status {status}: {explain(lines)}")
    return lines


def _without_advice(say: Callable[[str], None], line: str) -> None:
    if not line.startswith(ADVICE):
        say(printable(without_secrets(line)))  # it is kept in the log of a run


def explain(lines: Sequence[str]) -> str:
    """The cause of a failure from a command's last lines, in one line."""
    recent = [line for line in lines[-30:] if not line.startswith(NOISE)]
    said = " | ".join(line.removeprefix("ERROR:").strip() for line in recent[-3:]) or "no output"
    errors = [line for line in recent if line.startswith("ERROR:")] + recent[-3:]
    for signs, meaning in CAUSES:
        if any(sign in line for line in errors for sign in signs):
            return f"{meaning} ({said})"
    return said

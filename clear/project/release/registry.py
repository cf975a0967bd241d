"""The model registry: `artifacts` of dvc.yaml, and versions and stages as GTO's tags of this git repository.

`grpo@v1.2.0` registers a version at a commit, `grpo#prod#3` is the third assignment of a version to a stage. `dvc
artifacts`, DVC's extension for editors and `gto show` read the same tags; parsing and writing them is GTO's.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clear.errors import ClearError, one_line, printable

if TYPE_CHECKING:
    from gto.base import BaseEvent
    from gto.registry import GitRegistry

FILE = Path("dvc.yaml")


@dataclass(frozen=True)
class Artifact:
    """A model of `artifacts` in dvc.yaml: its name, its folder, and what `meta` states of its licence and origin."""

    name: str
    path: Path
    license: str = ""
    base_model: str = ""


@dataclass(frozen=True)
class Event:
    """One line of the history. `when` is ISO 8601; `what` is GTO's word: registration, assignment, …"""

    when: str
    what: str
    version: str
    stage: str
    commit: str
    author: str
    message: str


def artifact(root: Path, name: str) -> Artifact:
    """The entry of a model. Raises ClearError, naming those there are, if it has none, or one that is no folder."""
    import yaml

    file = root / FILE
    try:
        entries = (yaml.safe_load(file.read_text()) or {}).get("artifacts") or {}
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise ClearError(f"{file}: cannot be read; run this in the project's folder.") from error
    if name not in entries:
        known = ", ".join(sorted(entries)) or "none"
        raise ClearError(f"{name}: no model that {FILE} has under `artifacts` (it has: {known}); name one, or add it.")
    entry = entries[name] if isinstance(entries[name], dict) else {}
    meta = entry.get("meta") or {}
    if not isinstance(entry.get("path"), str):
        raise ClearError(f"{file}: artifacts.{name} has no `path`; state the folder of the model there.")
    texts = {key: str(meta.get(key) or "") for key in ("license", "base_model")}
    return Artifact(name, Path(entry["path"]), **texts)


@contextmanager
def _opened(root: Path) -> Iterator["GitRegistry"]:
    """GTO's registry of this repository; what GTO refuses becomes one line."""
    from gto.exceptions import GTOException
    from gto.registry import GitRegistry
    from scmrepo.exceptions import SCMError

    try:
        with GitRegistry.from_url(str(root)) as registry:
            yield registry
    except (GTOException, SCMError) as error:
        raise ClearError(f"{root.resolve()}: the model registry refuses: {one_line(error)}") from error


def require_version(version: str) -> None:
    """Raises ClearError for what is no version as GTO has them."""
    from gto.versions import SemVer

    if not version or not SemVer.is_valid(version):
        raise ClearError(f"{version or 'no version'}: a version is v, three numbers and dots, such as v1.2.0.")


def require_stage(stage: str) -> None:
    """Raises ClearError for what is no name of a stage as GTO has them."""
    from gto.constants import check_string_is_valid

    if not check_string_is_valid(stage):
        raise ClearError(f"{stage}: a stage's name has letters, digits, - and _, such as prod.")


def versions(root: Path, model: str) -> dict[str, str]:
    """Version → commit of all versions of a model that are registered, the newest first; empty if there are none."""
    from gto.exceptions import ArtifactNotFound

    with _opened(root) as registry:
        try:
            found = registry.find_artifact(model)
        except ArtifactNotFound:
            return {}
        known = [v for v in found.get_versions(include_non_explicit=False) if v.is_registered and v.is_active]
        return {version.version: version.commit_hexsha for version in sorted(known, key=_rank, reverse=True)}


def _rank(version: object) -> object:
    from gto.versions import SemVer

    return SemVer(version.version)


def in_stage(root: Path, model: str, stage: str) -> str:
    """The version that is in a stage now, "" if there is none.

    The tags' counter decides and not their clock, which has seconds only and differs between machines.
    """
    events = [event for event in history(root, model) if event.stage == stage]
    return events[0].version if events and events[0].what == "assignment" else ""


def history(root: Path, model: str) -> list[Event]:
    """Everything that happened to a model, the newest first; what concerns stages is in the order of GTO's counter."""
    from gto.tag import parse_name

    with _opened(root) as registry:
        artifacts = registry.get_artifacts()
        if model not in artifacts:
            return []
        found = {event.ref: event for event in artifacts[model].get_events() if type(event).__name__ != "Commit"}
    counters = {ref: parse_name(ref).get("counter", 0) for ref in found}
    ordered = sorted(found, key=lambda ref: (found[ref].created_at, counters[ref]), reverse=True)
    counted = iter(sorted((ref for ref in found if counters[ref]), key=counters.get, reverse=True))
    return [_event(found[next(counted) if counters[ref] else ref]) for ref in ordered]


def _event(event: "BaseEvent") -> Event:
    return Event(
        event.created_at.isoformat(timespec="seconds"),
        type(event).__name__.lower(),
        getattr(event, "version", None) or "",
        getattr(event, "stage", None) or "",
        event.commit_hexsha,
        printable(event.author or "", ""),
        printable((event.message or "").strip(), ""),
    )


def register(root: Path, model: str, version: str, commit: str, message: str) -> str:
    """Tag a commit as a version and return the tag's name."""
    with _opened(root) as registry:
        return registry.register(model, commit, version=version, message=message, simple=True).ref


def assign(root: Path, model: str, version: str, stage: str, message: str) -> str:
    """Put a version into a stage, in place of the one that is there, and return the tag's name.

    GTO and DVC take the assignment of the latest second, so two of them never share one: this waits for the next.
    """
    with _opened(root) as registry:
        known = registry.get_artifacts().get(model)
        taken = {int(event.created_at.timestamp()) for event in known.get_events()} if known else set()
        while int(time.time()) in taken:
            time.sleep(0.05)
        return registry.assign(model, stage, version=version, message=message, simple=False, force=True).ref

"""The cards of a release, made from what is committed: parameters, metrics, results and dvc.lock."""

from pathlib import Path

from clear.bench.models import MODELS
from clear.config import PARAMS, load
from clear.data.io import write_text
from clear.errors import ClearError
from clear.project.compare.load import read_lock
from clear.project.release.export import LOCK, Wishes, gather
from clear.project.release.registry import FILE, Artifact
from clear.project.results import parse
from clear.report import card, data_card

FOLDER = Path("data/cards")
_DATA = (
    "data/samples/",
    "data/degraded/",
    "data/bench/",
    "data/development/",
    "data/traces",
    "data/raw",
    "data/incoming",
)
_METRICS = ("source", "degrade", "mmd_bench", "validate")


def write(root: Path, entry: Artifact, both: tuple[str, str]) -> list[Path]:
    """Write model card and data card (of `texts`) below data/cards and return both files."""
    files = [root / FOLDER / f"{entry.name}.md", root / FOLDER / f"{entry.name}_data.md"]
    for file, text in zip(files, both, strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
    return files


def texts(root: Path, entry: Artifact, tag: str) -> tuple[str, str]:
    """Model card and data card.

    Raises ClearError for a model that dvc.lock does not have, figures of other weights, or a licence that only a person
    can state and dvc.yaml does not.
    """
    lock, config = read_lock(root / LOCK), load(root / PARAMS)
    outputs = {out["path"]: out for stage in lock.values() for out in stage.get("outs", [])}
    path = entry.path.as_posix()
    if path not in outputs:
        raise ClearError(f"{path}: no output of a stage in {LOCK}, so {entry.name} is no release; run `dvc repro`.")
    given = bool(config.model.checkpoint)
    if not entry.license and (given or config.source.kind != "scenes"):
        raise ClearError(_missing(entry, "license", "weights or data were given to this training"))
    if not entry.base_model and given:
        raise ClearError(_missing(entry, "base_model", "this training began with given weights"))
    wishes = Wishes(name=entry.name, license=entry.license, base_model=entry.base_model)
    weights = outputs[path].get("md5", "")
    facts = gather(root / entry.path, config, wishes, root, weights)
    restores = entry.path.name in {MODELS[name][0] for name in ("bridge", "grpo")}
    facts |= {"commit": "", "tag": tag, "tracked": {path: outputs[path]}}
    facts |= {"bridge": config.bridge.kind if restores else "direct"}
    inputs = {dep["path"]: dep for stage in lock.values() for dep in stage.get("deps", [])}
    tracked = {name: found for name, found in (inputs | outputs).items() if name.startswith(_DATA)}
    files = {name: root / f"data/metrics/{name}.json" for name in _METRICS}
    metrics = {name: parse(file.read_text(), str(file)) for name, file in files.items() if file.is_file()}
    return card.render(card.Facts(**facts)), data_card.render(data_card.DataFacts(tag, config, metrics, tracked))


def _missing(entry: Artifact, key: str, why: str) -> str:
    return f"{FILE}: artifacts.{entry.name}.meta.{key} is missing: {why}, and only a person knows it; state it there."

"""`clear export`: a model folder for other programs with its model card, written whole or not at all.

Figures of the pipeline belong to a card only if they are of these weights: dvc.lock has the hash of the folder that the
evaluation read, and the folder must still have it.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch

from clear.bench.models import MODELS, evaluations
from clear.data.io import require_new, sync
from clear.data.records import file_sha256
from clear.errors import ClearError, quoted, shown
from clear.model import release
from clear.model.checkpoint import fingerprint, read_config
from clear.model.checkpoint.config import json_object
from clear.project.compare.load import read_lock
from clear.project.git import NoGit, git
from clear.project.results import parse
from clear.report import card
from clear.schema import Config

LOCK = Path("dvc.lock")
CARD = "README.md"

_METRICS = ("traces", "degrade", "grpo", *(f"evaluate_{name}" for name in MODELS))


@dataclass(frozen=True)
class Wishes:
    """What whoever releases a model says of it; "" for what the project knows or leaves open."""

    name: str = ""
    license: str = ""
    base_model: str = ""
    datasets: list[str] = field(default_factory=list)
    languages: list[str] = field(default_factory=lambda: ["en"])
    model: str = ""
    scores: Path | None = None


def export(
    folder: Path, out: Path, config: Config, wishes: Wishes, dtype: torch.dtype | None = None, base: Path | None = None
) -> list[Path]:
    """Write the release of a model folder to `out` and return its files.

    Raises ClearError as clear.model.release.write; for a folder that is not of this project's training; for a model of
    given weights or data without a named licence and base; for figures that are not of these weights, or of no model
    of the scores; for a wish that the card cannot hold.
    """
    _check(wishes)
    facts = gather(folder, config, wishes)
    require_new(out)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        release.write(folder, partial, dtype, base)
        facts |= {
            "files": fingerprint(partial),
            "foreign": release.foreign(partial),
            "bridge": read_config(partial).bridge,
        }
        (partial / CARD).write_text(card.render(card.Facts(**facts)), encoding="utf-8")
        sync(partial)
        if out.exists():
            out.rmdir()
        partial.replace(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return sorted(out.iterdir())


def apart(folder: Path, out: Path, workspace: Path = Path()) -> None:
    """Raise ClearError where the new folder `out` would be part of the model `folder` it is made of, or of anything
    that DVC tracks in the workspace: that would have another content then, and the next checkout would delete it."""
    places = (out.resolve(), *out.resolve().parents)
    if folder.is_dir() and folder.resolve() in places:
        raise ClearError(f"{out} belongs to {folder}, the model that it is made of; name a folder elsewhere.")
    lock = workspace / LOCK
    stages = read_lock(lock) if lock.is_file() else {}
    for stage, path in ((stage, out["path"]) for stage, entry in stages.items() for out in entry.get("outs", [])):
        if (workspace / path).resolve() in places:
            raise ClearError(f"{out} belongs to {path}, an output of stage {stage}; name a folder elsewhere.")
    for place in places:
        if Path(f"{place}.dvc").is_file():
            raise ClearError(f"{out} belongs to what {shown(place)}.dvc tracks; name a folder elsewhere.")


def _check(wishes: Wishes) -> None:
    """Raise ClearError for a wish with a line break or another character that the card's header cannot hold."""
    for option, values in (
        ("--name", [wishes.name]),
        ("--license", [wishes.license]),
        ("--base-model", [wishes.base_model]),
        ("--dataset", wishes.datasets),
        ("--language", wishes.languages),
    ):
        if odd := next((value for value in values if not value.isprintable()), ""):
            raise ClearError(
                f"{option} {quoted(odd)}: has a line break or another character that cannot be printed, and stands in "
                "the header of the model card; leave it out."
            )


def gather(folder: Path, config: Config, wishes: Wishes, workspace: Path = Path(), weights: str = "") -> dict:
    """The fields of card.Facts that do not depend on the written files; errors as of `export`.

    `weights` is the folder's hash in dvc.lock where that is to be believed; else the folder itself is hashed.
    """
    scratch = config.source.kind == "scenes" and not config.model.checkpoint
    if not wishes.license and not scratch:
        raise ClearError(
            "--license is missing: weights or data were given to this training, and only you know their terms; name "
            "a licence of the hub, such as apache-2.0, or other."
        )
    if config.model.checkpoint and not wishes.base_model:
        raise ClearError(
            "--base-model is missing: this training began with given weights; name the model they are on the hub, such "
            "as ByteDance-Seed/BAGEL-7B-MoT."
        )
    stage = folder.resolve().name
    names = evaluations(stage)
    if folder.resolve().parent != (workspace / "data/models").resolve() or not names:
        raise ClearError(
            f"{folder}: no model of this project's training, so a card could not say how it was made; run this in the "
            "project's folder and name one of data/models, such as data/models/grpo."
        )
    model = wishes.model or names[-1]
    if model not in names:
        raise ClearError(f"--evaluation {model}: {folder} is evaluated as {' and '.join(names)}.")
    metrics = {name: _read(workspace / f"data/metrics/{name}.json") for name in _METRICS}
    metrics = {name: found for name, found in metrics.items() if found}
    verified = False
    if f"evaluate_{model}" in metrics:
        verified = _verify(folder, model, workspace, weights)
    elif wishes.model:
        raise ClearError(f"data/metrics/evaluate_{model}.json is not here; run `dvc repro evaluate@{model}`.")
    else:
        model = ""
    board, row = _board(wishes)
    lock = workspace / LOCK
    return {
        "name": wishes.name or folder.resolve().name,
        "config": config,
        "license": wishes.license or card.LICENSE,
        "base_model": wishes.base_model,
        "datasets": wishes.datasets,
        "languages": wishes.languages,
        "stage": stage,
        "model": model,
        "metrics": metrics,
        "report": _read(workspace / "data/results/report.json") if model else {},
        "board": board,
        "row": row,
        "commit": _commit(workspace),
        "lock": file_sha256(lock) if lock.is_file() else "",
        "verified": verified,
    }


def _verify(folder: Path, model: str, workspace: Path, weights: str) -> bool:
    """Whether dvc.lock says what the evaluation read; raises ClearError if that is not this folder."""
    lock = workspace / LOCK
    if not lock.is_file():
        return False
    try:
        read = {dep["path"]: dep.get("md5") for dep in read_lock(lock)[f"evaluate@{model}"]["deps"]}
    except (ClearError, KeyError, TypeError) as error:
        raise ClearError(f"{lock}: no readable stage evaluate@{model} ({quoted(error)}); run `dvc repro`.") from error
    wanted = read.get(f"data/models/{MODELS[model][0]}")
    if wanted is None:
        return False
    if (weights or directory_hash(folder)) != wanted:
        raise ClearError(
            f"{folder}: not what evaluate@{model} evaluated ({lock} has another hash); run `dvc repro "
            f"evaluate@{model}`, or `dvc pull` the folder, so that the card's figures are of these weights."
        )
    return True


def directory_hash(folder: Path) -> str:
    """The hash by which dvc.lock knows a folder: the MD5 of the list of its files' MD5s."""
    listed = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "md5").hexdigest()
        listed.append({"md5": digest, "relpath": file.relative_to(folder).as_posix()})
    text = json.dumps(sorted(listed, key=lambda entry: entry["relpath"]), sort_keys=True)
    return f"{hashlib.md5(text.encode()).hexdigest()}.dir"


def _board(wishes: Wishes) -> tuple[dict, str]:
    """The leaderboard of `--scores` and the row of this model in it."""
    if wishes.scores is None:
        return {}, ""
    if not wishes.scores.is_file():
        raise ClearError(f"--scores {wishes.scores}: no such file; name the JSON of `clear score`.")
    board = json_object(wishes.scores, "name the JSON of `clear score`")
    if not {"models", "benchmarks", "notes"} <= board.keys():
        raise ClearError(
            f"{wishes.scores}: no leaderboard; make it with `clear score … --published --json {wishes.scores}`."
        )
    names = list(board["models"])
    if wishes.name in names:
        return board, wishes.name
    if len(names) == 1:
        return board, names[0]
    raise ClearError(f"{wishes.scores}: has the models {', '.join(names)}; say by --name which of them this one is.")


def _read(file: Path) -> dict:
    return parse(file.read_text(encoding="utf-8"), str(file)) if file.is_file() else {}


def _commit(workspace: Path) -> str:
    """The commit of the code, with a mark where files differ from it; "" where there is no git."""
    try:
        head = git(workspace, "rev-parse", "HEAD")
        changed = git(workspace, "status", "--porcelain", "--untracked-files=no")
    except NoGit:
        return ""
    if head.status:
        return ""
    return head.text.strip() + (", with changes that are not committed" if changed.text.strip() else "")

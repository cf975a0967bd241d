"""The default profile over several seeds: `make results SEEDS="1 2 3"`, any number of sittings.

Each seed is a world of its own (pictures, questions, training) in a scratch copy of the workspace; the same command
continues where it was stopped. What a seed leaves is small and tracked: the predictions of all models without texts
and pictures, `data/results/seeds/<seed>.parquet`. docs/RESULTS.md is made from all files in that folder, and from those
of clear/project/ablations.py. Each file says in its metadata what it was made under.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clear.bench.models import MODELS
from clear.config import PARAMS, read_yaml
from clear.data.io import reading_parquet, replacing, whole, write_text
from clear.data.lock import making
from clear.data.workspace import home
from clear.errors import ClearError, quoted
from clear.project import check, scratch
from clear.project.compare.load import LOCK, outputs, read_lock
from clear.report import seeds

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

FOLDER, ABLATIONS, PAGE = Path("data/results/seeds"), Path("data/results/ablations"), Path("docs/RESULTS.md")
PREDICTIONS = "data/predictions/{}.parquet"
DROPPED = ("output", "restored_png")
_AGAIN = "restore it with `git checkout`, or delete it and make it again (`make results`, `make ablations`)"
_ABOUT = "clear."
"""Prefix of the metadata that says what a file was made under: its setting, and what an ablation changes."""
_NEUTRAL = ("seed",), ("runtime",), ("incoming", "limits")
"""Parameters that change no result of a seed, or only refuse data."""
_LATER = {
    ("model", "base"): "",
    ("degrade", "held_out"): [],
    ("sft", "labelled"): 1.0,
    ("sft", "robust_vit"): {"steps": 0, "batch": 64, "lr": 0.001, "warmup": 20},
    ("sft", "train_vit"): False,
    ("evaluate", "votes"): 1,
}
"""Parameters that seeds of before do not have, with the value that changes nothing."""


def run(workspace: Path, wanted: Sequence[int]) -> Path:
    """Run every seed that is wanted, then render the page from all seeds there are; returns the page.

    The parameters are those of the workspace. Raises ClearError where a run stops, for seeds of different settings, and
    where the workspace's own results are not those of its code and parameters, which say what the setting is, or are
    others than at the beginning.
    """
    params = parameters(workspace)
    if wanted and (stale := check.drifts(workspace)):
        raise ClearError(
            f"seeds are run under the setting of the committed results, and these are out of date: {stale[0]}"
        )
    began = setting(workspace) if wanted else ""
    for seed in wanted:
        copy, target = _copy_name(params, seed), workspace / FOLDER / f"{seed}.parquet"
        with making(home() / "scratch" / copy, "make results"):  # here one waits for another, and only then asks
            require_setting(workspace, began, f"seed {seed}")
            own = seed == params["seed"]
            folder = workspace if own else scratch.run(workspace, params["profile"], [f"seed={seed}"], copy)
            collect(folder, target, list(MODELS), {"setting": began})
    return render(workspace)


def require_setting(workspace: Path, began: str, what: str) -> None:
    """Raises ClearError unless the workspace has the setting yet with which a command of hours began.

    Each run copies the workspace as it is when that run begins, so an edit would reach the later ones alone.
    """
    stale = check.drifts(workspace)
    if stale or setting(workspace) != began:
        found = stale[0] if stale else f"{PARAMS} or {LOCK} has another setting."
        raise ClearError(
            f"{what} is not run, since {workspace.resolve()} was edited after this command began: {found} What is done "
            "stays; undo the edit and repeat, or begin again with all of them."
        )


def _copy_name(params: dict, seed: int) -> str:
    return f"{params['profile']}-seed-{seed}"


def copy_of(workspace: Path, seed: int) -> Path:
    """The scratch copy in which a seed was run. Raises ClearError unless it was, here and under the same setting."""
    file = workspace / FOLDER / f"{seed}.parquet"
    found = home() / "scratch" / _copy_name(parameters(workspace), seed)
    if about(file).get("setting") != setting(workspace) or not (found / LOCK).exists():
        raise ClearError(f"seed {seed} was not run on this machine; `make results SEEDS={seed}` does it.")
    return found


def collect(folder: Path, target: Path, models: Sequence[str], made: dict[str, str]) -> None:
    """Write the predictions of `models` in a workspace as one small file, with what `about` shall say of it."""
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    from clear.bench import predictions

    frames = []
    for model in models:
        frame = predictions.read(folder / PREDICTIONS.format(model))
        frames.append(frame.drop(columns=list(DROPPED)).assign(model=model))
    table = pa.Table.from_pandas(pd.concat(frames, ignore_index=True), preserve_index=False)
    table = table.replace_schema_metadata({_ABOUT + key: value for key, value in made.items()})
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as partial:
        pq.write_table(table, partial, compression="zstd", compression_level=19)


def _rows(file: Path, models: int) -> "pd.DataFrame":
    """The rows of a file of `collect`, which are of so many models.

    Raises ClearError for one that cannot be read, lacks a column, has rows of more, fewer or unknown models, or one
    question of a model twice.
    """
    from clear.bench.predictions import SCHEMA

    frame = _table(file).to_pandas()
    for column in (*SCHEMA.names, "model"):
        if column not in frame and column not in DROPPED:
            raise ClearError(f"{file}: no column '{column}' in this file; {_AGAIN}.")
    found = [model for model in MODELS if model in set(frame["model"])]
    if len(found) != models or frame["model"].nunique() != models:
        what = ", ".join(map(str, frame["model"].unique())) or "none"
        raise ClearError(f"{file}: predictions of {what}, expected {models} of {', '.join(MODELS)}; {_AGAIN}.")
    _check_once(file, frame)
    return frame


def _check_once(file: Path, frame: "pd.DataFrame") -> None:
    from clear.bench.predictions import KEY

    again = frame[frame.duplicated(["model", *KEY])]
    if len(again):
        which = "/".join(again.iloc[0][["model", *KEY]])
        raise ClearError(f"{file}: {quoted(which)} is there twice; {_AGAIN}.")


def about(file: Path) -> dict[str, str]:
    """What a file of `collect` was made under, {} where there is none. Raises ClearError for one that is damaged."""
    import pyarrow.parquet as pq

    with reading_parquet(file, _AGAIN):
        found = (pq.read_schema(file).metadata or {}) if file.exists() else {}
    texts = {key.decode(): value.decode() for key, value in found.items()}
    return {key.removeprefix(_ABOUT): text for key, text in texts.items() if key.startswith(_ABOUT)}


def models(file: Path) -> set[str]:
    """The models whose predictions a file of `collect` holds. Raises ClearError for one that is damaged."""
    return set(_table(file, ["model"]).to_pydict().get("model", []))


def _table(file: Path, columns: list[str] | None = None) -> "pa.Table":
    """All rows of a file of `collect`. Raises ClearError for one that is damaged, or far more than its bytes."""
    import pyarrow.parquet as pq

    with reading_parquet(file, _AGAIN), pq.ParquetFile(file) as parquet:
        return whole(file, parquet, columns)


def parameters(workspace: Path) -> dict:
    """The parameters of a workspace. Raises ClearError where it has none."""
    from omegaconf import OmegaConf

    if not (workspace / PARAMS).exists():
        raise ClearError(f"{workspace / PARAMS} is not here; run `make repro`.")
    return OmegaConf.to_container(read_yaml(workspace / PARAMS))


def setting(workspace: Path) -> str:
    """Hash of the parameters without the seed, and of what code they are, told by what the code makes of its own seed.

    The code is not hashed as text: an edit that leaves every prediction of the workspace's own seed as it was would
    leave those of other seeds too, and hours of training stay good. An edit that changes one changes the setting.
    """
    params = parameters(workspace)
    later = [path for path, neutral in _LATER.items() if _section(params, path).get(path[-1]) == neutral]
    for path in (*_NEUTRAL, *later):
        _section(params, path).pop(path[-1], None)
    if not (workspace / LOCK).exists():
        raise ClearError(f"{workspace / LOCK} is not here; run `make repro`.")
    made = outputs(read_lock(workspace / LOCK))
    missing = [path for path in map(PREDICTIONS.format, MODELS) if path not in made]
    if missing:
        raise ClearError(f"dvc.lock has no {missing[0]}; run `make repro`.")
    own = [made[PREDICTIONS.format(model)] for model in MODELS]
    return hashlib.sha256(json.dumps([params, own], sort_keys=True).encode()).hexdigest()


def _section(params: dict, path: Sequence[str]) -> dict:
    """What holds the last key of a path; a dictionary of nothing where it is not there."""
    for name in path[:-1]:
        params = params.get(name, {})
    return params


def render(workspace: Path) -> Path:
    """Write the page from every seed in the folder. Raises ClearError for none, where their settings differ, where the
    files of one ablation were made with different changes, and for a file that is none of `collect`."""
    files = sorted((workspace / FOLDER).glob("*.parquet"), key=_seed_of)
    if not files:
        raise ClearError(f'{FOLDER}: no seed here; run `make results SEEDS="1 2 3"`.')
    settings = {int(file.stem): about(file).get("setting", "") for file in files}
    _require_one(settings, workspace)
    frames = {int(file.stem): _rows(file, len(MODELS)) for file in files}
    ablations, others = {}, {}
    changed: dict[tuple[bool, str, str], tuple[Path, str]] = {}
    for file in sorted((workspace / ABLATIONS).glob("*.parquet")):
        if not re.fullmatch(r"\w+(\.-?[0-9]+)?", file.stem):
            raise ClearError(
                f"{file}: the name is not that of an ablation; remove the file, or call it <name>.parquet."
            )
        said = about(file)
        against, kinds = (tuple(said.get(key, "").split()) for key in ("against", "kinds"))
        setting, seed = said.get("setting", ""), int(said.get("seed", -1))
        of = ablations if setting in settings.values() and seed in frames else others
        name = file.stem.split(".")[0]
        former = of.get(name)
        if former and former.setting != setting:
            name, former = file.stem, None
        rows = _rows(file, 1)
        if made := _change(rows["model"].iloc[0], said.get("changes")):
            first, other = changed.setdefault((of is others, name, setting), (file, made))
            if made != other:
                raise ClearError(
                    f"{file}: {made}, but {first.name}: {other}; runs of different changes cannot be pooled as {name}. "
                    "Delete the file that is not of clear/conf/ablations.yaml and run `make ablations` for its seed."
                )
        runs = (former.frames if former else {}) | {seed: rows}
        of[name] = seeds.Ablation(said.get("what", ""), runs, against, setting, kinds)
    page = workspace / PAGE
    write_text(page, seeds.page(frames, ablations, others))
    return page


def _require_one(settings: dict[int, str], workspace: Path) -> None:
    """Raises ClearError for seeds of different settings. Only the workspace's own says which of them are out of date:
    their numbers do not, and files of a clone have no dates."""
    groups: dict[str, list[str]] = {}
    for seed, value in settings.items():
        groups.setdefault(value, []).append(str(seed))
    if len(groups) < 2:
        return
    try:
        own, why = setting(workspace), "none of them is that of this workspace"
    except ClearError as error:
        own, why = None, f"that of this workspace is not known ({str(error).rstrip('.')})"
    if own in groups:
        odd = [str(seed) for seed, value in settings.items() if value != own]
        raise ClearError(
            f"{FOLDER}: the runs of {_named(odd)} had other parameters, or code with other results, than "
            f"{_named(groups[own])} and this workspace, so they cannot be pooled; delete their files and run "
            f'`make results SEEDS="{" ".join(odd)}"`.'
        )
    raise ClearError(
        f"{FOLDER}: seeds of {len(groups)} settings, parameters or code with other results, cannot be pooled: "
        f"{' / '.join(map(_named, groups.values()))}; {why}, so restore the {PARAMS} and {LOCK} of those that count, "
        "and repeat."
    )


def _named(listed: Sequence[str]) -> str:
    return f"seed{'s' if len(listed) > 1 else ''} {', '.join(listed)}"


def _change(model: str, changes: str | None) -> str:
    """What an ablation's file was made with, to be compared and shown; "" for an old file that does not say."""
    return "" if changes is None else f"{model} with {' '.join(sorted(changes.split())) or 'nothing changed'}"


def _seed_of(file: Path) -> int:
    """The seed by the name of its file. Raises ClearError for any other name, such as that of a copy."""
    if not re.fullmatch(r"0|-?[1-9][0-9]{0,17}", file.stem):
        raise ClearError(f"{file}: the name is not that of a seed; remove the file, or call it <seed>.parquet.")
    return int(file.stem)

"""Prediction tables of several models, brought together for one comparison: whose they are, and what they share.

The model of a table is named by a column `model`, by its folder or by the file's name (clear.bench.vlmeval.names).
Models are compared on questions that all of them were asked and have a verdict on. What only some have is left out and
reported by name; tables that share nothing, or ask different things under one index, are rejected.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clear.bench.vlmeval import names, scores
from clear.bench.vlmeval.names import CIRCULAR
from clear.bench.vlmeval.scores import WHERE
from clear.data import tables
from clear.errors import ClearError, quoted

if TYPE_CHECKING:
    import pandas as pd

SPLIT = ("model", *WHERE)
_SHOWN = 3


def models_of(files: Sequence[Path]) -> list[str]:
    """The models that files are of, by their names and columns alone; "" where neither says."""
    found: dict[str, None] = {}
    for file in map(Path, files):
        header, rows = tables.read(file, skip=("", "image", "image_path"))
        if "model" in header:
            found |= dict.fromkeys(names.tidy(row.cells["model"]) for row in rows)
        else:
            found[names.of_file(file)[0]] = None
    return list(found)


def no_average(frame: "pd.DataFrame") -> str:
    """Why rows of scores.read_predictions have no average: two or more tables are of unknown benchmarks, so that their
    names do not say where a model's ends nor a column `model` whose they are, and may be of several models. "" where
    they have one."""
    found: dict[frozenset[str], str] = {}
    for file, rows in frame.groupby("file", sort=False):
        if names.of_file(Path(file))[0] or ("model" in rows and rows["model"].any()):
            continue
        benches = frozenset(rows["benchmark"])
        if not all(map(names.is_known, benches)):
            found.setdefault(benches, names.tidy(Path(file).name))  # tables of the same benchmarks are levels of them
    if len(found) < 2:
        return ""
    listed = ", ".join([*found.values()][:_SHOWN]) + (" …" if len(found) > _SHOWN else "")
    return (
        f"no average: {listed} do not say whose predictions they are, and may be of several models; put each model's "
        "tables into a folder of its name, or give them a column `model`"
    )


def read(files: Sequence[Path], manifest: Path | None = None) -> "pd.DataFrame":
    """The rows of all files with the columns of scores.read_predictions and model, restored, picture.

    `bench` is the benchmark alone. `restored` is True or False where a Parquet of `clear answer` beside the table says
    so, else None. `picture` is the index of the row that holds the picture: by `manifest` of `clear mmd-bench`, else
    the row's own. Raises ClearError as scores.read_predictions, and for a table of no named model, for rows that two
    tables of one model have, and for a Parquet that lacks rows of its table.
    """
    import pandas as pd

    frame = pd.concat([_file(Path(file)) for file in files], ignore_index=True)
    texts = [column for column in frame.columns if column != "restored"]
    frame[texts] = frame[texts].fillna("")
    key = [*SPLIT, "index"]
    again = frame[frame.duplicated(key)]
    if len(again):
        row = again.iloc[0]
        one, other = frame[(frame[key] == row[key]).all(axis=1)]["file"].iloc[:2]
        raise ClearError(
            f"{'/'.join(row[key])} is in {one} and in {other}: two tables of one name; put the second model's tables "
            "into a folder of its own name, or give them a column `model`."
        )
    frame = scores.damaged_as_hard(frame)
    return frame.assign(picture=_pictures(frame, manifest))


def _file(path: Path) -> "pd.DataFrame":
    frame = scores.read_file(path)
    model, _ = names.of_file(path)
    if "model" in frame:
        frame["model"] = frame["model"].map(names.tidy)
        empty = frame[frame["model"] == ""]
        if len(empty):
            raise ClearError(f"{path}: index {empty['index'].iloc[0]}: the column model is empty.")
    elif not model:
        raise ClearError(
            f"{path}: its name does not say whose predictions these are; call it <model>_<benchmark>{path.suffix}, put "
            "it into a folder of the model's name, or add a column `model`."
        )
    else:
        frame["model"] = model
    frame["bench"] = frame["benchmark"]
    return frame.assign(restored=_restored(path, frame["index"].tolist()))


def _restored(path: Path, indices: list[str]) -> list[bool | None]:
    """Whether each row was restored first, by the record that `clear answer` writes beside a table; None where the one
    who answered does not say."""
    beside = path.with_suffix(".parquet")
    if beside == path or not beside.is_file():
        return [None] * len(indices)
    header, rows = tables.read(beside)
    if not {"index", "restored"} <= set(header):
        return [None] * len(indices)  # the same table in another format
    said = {row.cells["index"]: row.cells["restored"] for row in rows}
    known = {"True": True, "False": False, "": None}
    lost = next((index for index in indices if said.get(index) not in known), None)
    if lost is not None:
        raise ClearError(
            f"{beside}: does not say whether index {lost} was restored, so it is not the record of {path}; run "
            "`clear answer` again, or move it away to score without it."
        )
    return [known[said[index]] for index in indices]


def _pictures(frame: "pd.DataFrame", manifest: Path | None) -> list[str]:
    if manifest is None:
        return frame["index"].tolist()
    header, rows = tables.read(manifest)
    if missing := [name for name in ("bench", "index", "image_index") if name not in header]:
        raise ClearError(f"{manifest}: no column '{missing[0]}'; name the manifest.parquet of `clear mmd-bench`.")
    of = {(row.cells["bench"], row.cells["index"]): row.cells["image_index"] for row in rows}
    made = {bench for bench in frame["bench"].unique() if not names.DAMAGED.search(bench)}  # the others came so
    if missing := sorted(made - {bench for bench, _ in of}):
        raise ClearError(
            f"{manifest}: no row of {missing[0]}, so which of its questions share a picture is not known; name the "
            "manifest.parquet of the folder that this benchmark was made in."
        )
    return [of.get((bench, index), index) for bench, index in zip(frame["bench"], frame["index"], strict=True)]


def groups_of(frame: "pd.DataFrame") -> "pd.Series":
    """The group of every row within its benchmark: rotations of one question, halves of an MMVP pair, else the row."""
    import pandas as pd

    group = pd.Series("", index=frame.index)
    for bench, rows in frame.groupby("bench"):
        kind, keys = names.family(bench), rows["index"]
        if kind == "mmvp":
            of = names.pairs(zip(rows["index"], rows["question"], strict=True))
            keys = keys.map(lambda index, of=of: f"pair {of[index]}")
        elif kind == "mmbench":
            keys = keys.map(lambda index: str(names.number(index) % CIRCULAR))
        group[rows.index] = keys
    return group


def shared(frame: "pd.DataFrame") -> "tuple[pd.DataFrame, list[str]]":
    """The rows that can be compared, of a scored frame with the column `group`, and what was left out, in words.

    Per benchmark and level these are the questions on which every model that answered there has a verdict; of
    MMBench's rotations whole groups. Raises ClearError for models that share no question, and for an index under which
    two tables have another question or answer.
    """
    _same_questions(frame)
    kept, notes = [], []
    for (bench, level), rows in frame.groupby(["bench", "severity"], sort=True):
        models = list(dict.fromkeys(rows["model"]))
        judged = rows[rows["reject"] == ""]
        key = list(zip(judged["corruption"], judged["index"], strict=True))
        count = judged.assign(key=key).groupby("key")["model"].nunique()
        common = {key for key, number in count.items() if number == len(models)}
        all_keys = list(zip(rows["corruption"], rows["index"], strict=True))
        inside = [key in common for key in all_keys]
        if names.family(bench) == "mmbench":  # a question on fewer rotations is an easier one
            cells = list(zip(rows["corruption"], rows["group"], strict=True))
            broken = {cell for cell, within in zip(cells, inside, strict=True) if not within}
            inside = [within and cell not in broken for cell, within in zip(cells, inside, strict=True)]
        if not any(inside):
            sides = "; ".join(f"{model}: {_said(rows[rows['model'] == model])}" for model in models)
            raise ClearError(
                f"{bench}, {level}: no question has a verdict for every model ({sides}); score tables of one question "
                "set and protocol, with the same judge."
            )
        part = rows[inside]
        kept.append(part)
        lost = {model: int((rows["model"] == model).sum() - (part["model"] == model).sum()) for model in models}
        rejected = {model: int(((rows["model"] == model) & (rows["reject"] != "")).sum()) for model in models}
        if any(lost.values()):
            said = [
                f"{number} of {model}" + (f" ({rejected[model]} without a verdict)" if rejected[model] else "")
                for model, number in lost.items()
                if number
            ]
            number = len(part) // len(models)
            notes.append(f"{bench}, {level}: compared on {number} shared rows; left out: {', '.join(said)}.")
    import pandas as pd

    return pd.concat(kept, ignore_index=True), notes


def _said(rows: "pd.DataFrame") -> str:
    kinds = sorted(set(rows["corruption"]))
    listed = ", ".join(kinds[:_SHOWN]) + (" …" if len(kinds) > _SHOWN else "")
    return f"{len(rows)} rows of {listed}, first index {rows['index'].iloc[0]}"


def _same_questions(frame: "pd.DataFrame") -> None:
    """Raise ClearError where one index of a benchmark stands for different questions or right answers."""
    right = frame["gold"].where(frame["gold"] != "", frame["answer"])
    asked = frame["question"].map(lambda text: " ".join(text.split())) + "\0" + right.map(str.strip)
    keyed = frame.assign(asked=asked)
    first = keyed.groupby(["bench", "index"])["asked"].transform("first")
    if (asked == first).all():
        return
    other = keyed[asked != first].iloc[0]
    one = keyed[(keyed["bench"] == other["bench"]) & (keyed["index"] == other["index"])].iloc[0]
    texts = [quoted(row["asked"].replace("\0", " → ")) for row in (one, other)]
    raise ClearError(
        f"{one['bench']}, index {one['index']}: {one['file']} asks {texts[0]}, {other['file']} asks {texts[1]}; score "
        "tables that were made from one version of the benchmark."
    )

"""Scores of prediction files on the public benchmarks, clean and degraded: what `clear score` prints (METHOD §7).

A file holds the predictions of one benchmark at one level: VLMEvalKit's table as TSV (or the same columns as Parquet):
`index`, `question` (or `prompt`), options `A`, `B`, …, `answer`, `prediction`. Benchmark, corruption and level come
from the file's name (`<model>_<bench>[_LOW_LEVEL|_<corruption>][_LOW|_MID|_HIGH].tsv`) or from columns of these names.

Rules: multiple choice by clear.bench.options; MMBench circular (every rotation must be right); MMVP by single question
as published and by pair; MM-Vet by a judge, mean of grades; free answers elsewhere by exact match. An answer that no
rule decides is wrong and counted, or put to the judge if there is one; a row whose judge fails is rejected: it is in no
figure, and the count says so. Every figure is computed from rows; nothing is typed in or averaged over what is missing.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from clear.bench.options import chosen
from clear.bench.scoring import HARD, SEVERITIES, present, robustness
from clear.degradation.protocol import TRAINING_WEIGHTS
from clear.errors import ClearError
from clear.records import CLEAN
from clear.sources.lmudata import OPTIONS

if TYPE_CHECKING:
    import pandas as pd

    from clear.endpoint import Client

LEVEL = re.compile(
    rf"^(?P<bench>.+?)(?:_(?P<corruption>LOW_LEVEL|{'|'.join(TRAINING_WEIGHTS)}))?_(?P<level>LOW|MID|HIGH)$"
)
CIRCULAR = 1_000_000
"""Rotations of one MMBench question have indices that differ by multiples of this."""

BENCHES = {
    "mmbench": re.compile(r"MMBench", re.IGNORECASE),
    "mmvet": re.compile(r"MM-?Vet", re.IGNORECASE),
    "mmvp": re.compile(r"MMVP", re.IGNORECASE),
}
"""Families with a rule of their own; every other benchmark is plain accuracy."""


def family(bench: str) -> str:
    """mmbench, mmvet, mmvp or plain."""
    return next((name for name, pattern in BENCHES.items() if pattern.search(bench)), "plain")


def place_of(name: str) -> tuple[str, str, str]:
    """(benchmark, corruption, severity) by a file's name without its ending; clean where it names no level."""
    match = LEVEL.match(name)
    if not match:
        return name, CLEAN, CLEAN
    corruption = match["corruption"]
    return match["bench"], "mixed" if corruption in (None, "LOW_LEVEL") else corruption, match["level"].lower()


def read_predictions(path: Path) -> "pd.DataFrame":
    """One file, all cells as text, with the columns bench, corruption and severity.

    Raises ClearError naming the file, and the row where there is one, for a missing column, a repeated index or a
    missing prediction.
    """
    import pandas as pd

    if not path.is_file():
        raise ClearError(f"{path}: no such file; name a TSV or Parquet file with predictions.")
    try:
        if path.suffix == ".parquet":
            frame = pd.read_parquet(path).astype(str).replace({"None": "", "nan": "", "<NA>": ""})
        else:
            frame = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    except (ValueError, OSError) as error:
        raise ClearError(f"{path}: not a readable {path.suffix[1:]} table ({error}).") from error
    frame = frame.rename(columns={} if "question" in frame else {"prompt": "question"})
    for column in ("index", "question", "answer", "prediction"):
        if column not in frame:
            raise ClearError(f"{path}: no column '{column}' among {', '.join(frame.columns)}; is it a prediction file?")
    if frame.empty:
        raise ClearError(f"{path}: no row in this file.")
    if frame["index"].duplicated().any():
        raise ClearError(f"{path}: index {frame['index'][frame['index'].duplicated()].iloc[0]} occurs twice.")
    if (frame["answer"].str.strip() == "").any():
        row = frame[frame["answer"].str.strip() == ""].iloc[0]
        raise ClearError(f"{path}: index {row['index']} has no answer to compare with; score a split that has answers.")
    for column, value in zip(("bench", "corruption", "severity"), place_of(path.stem), strict=True):
        frame[column] = frame.get(column, value)
    odd = frame[~frame["severity"].isin(SEVERITIES)]
    if len(odd):
        raise ClearError(f"{path}: severity {odd['severity'].iloc[0]!r} is not one of {', '.join(SEVERITIES)}.")
    return frame.drop(columns=[c for c in ("image", "image_path") if c in frame])


def score(frame: "pd.DataFrame", judge: "Client | None" = None, progress: Callable[[int], None] | None = None):
    """`frame` with the columns `extracted`, `score` (0 to 1, NaN where rejected), `how` and `reject` (a reason or "").

    `how` is letter-or-text rule ("rule"), "exact", "judge" or "unmatched". Raises ClearError for MM-Vet without a
    judge, and where a gold answer names no option.
    """
    import numpy as np

    from clear.reasoning.grammar import ANSWER, extract_answer

    frame = frame.reset_index(drop=True).copy()
    said = [extract_answer(text) if ANSWER in text else text for text in frame["prediction"]]
    options = [_options(row) for row in frame.to_dict("records")]
    kinds = [family(bench) for bench in frame["bench"]]
    values, how, reject, extracted = np.zeros(len(frame)), ["unmatched"] * len(frame), [""] * len(frame), list(said)
    for n, row in enumerate(frame.to_dict("records")):
        if kinds[n] == "mmvet":
            continue
        if options[n]:
            extracted[n], gold = chosen(said[n], options[n]), _gold(row, options[n])
            how[n], values[n] = "rule" if extracted[n] else "unmatched", float(extracted[n] == gold)
        else:
            values[n], how[n] = float(_exact(said[n]) == _exact(row["answer"]) != ""), "exact"
    graded = [n for n in range(len(frame)) if kinds[n] == "mmvet"]
    open_ = [n for n in range(len(frame)) if kinds[n] != "mmvet" and how[n] == "unmatched" and said[n].strip()]
    if graded and judge is None:
        raise ClearError(f"{frame['bench'][graded[0]]} is graded by a judge; set judge.url in params and add --judge.")
    if judge is not None:
        from clear.bench import judge as by_judge

        asked = [(frame["question"][n], frame["answer"][n], said[n]) for n in graded]
        for n, verdict in zip(graded, by_judge.scores(judge, asked, progress), strict=True):
            how[n] = "judge"
            values[n], reject[n] = (np.nan, verdict) if isinstance(verdict, str) else (verdict, "")
        meant = by_judge.options_meant(judge, [(frame["question"][n], options[n], said[n]) for n in open_], progress)
        for n, verdict in zip(open_, meant, strict=True):
            how[n] = "judge"
            if isinstance(verdict, str):
                values[n], reject[n] = np.nan, verdict
            else:
                extracted[n] = verdict[0]
                values[n] = float(verdict[0] == _gold(frame.iloc[n], options[n]))
    return frame.assign(extracted=extracted, score=values, how=how, reject=reject)


def _options(row: dict) -> list[str]:
    listed = [row.get(letter, "") for letter in OPTIONS]
    return listed[: listed.index("")] if "" in listed else listed


def _gold(row: dict, options: list[str]) -> str:
    answer = row["answer"].strip().rstrip(".").strip("()")
    if len(answer) == 1 and 0 <= ord(answer) - ord("A") < len(options):
        return answer
    found = [i for i, option in enumerate(options) if option.strip().lower() == row["answer"].strip().lower()]
    if len(found) == 1:
        return OPTIONS[found[0]]
    raise ClearError(f"index {row['index']}: the answer {row['answer']!r} names none of {options}; correct the file.")


def _exact(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def summary(frame: "pd.DataFrame") -> dict:
    """Figures of a scored frame: per benchmark and level, robustness, and the mean over benchmarks.

    A benchmark's figure is its published one: circular for MMBench, mean grade for MM-Vet, share of single questions
    for all others. With several corruptions at a level (protocol `full`) the figure is the mean over corruptions. All
    are shares in [0, 1].
    """
    benches: dict[str, dict] = {}
    for bench, rows in frame.groupby("bench", sort=True):
        levels = {level: _level(bench, rows[rows.severity == level]) for level in present(rows.severity)}
        by_severity = {level: found["score"] for level, found in levels.items() if found["score"] is not None}
        benches[bench] = {"levels": levels, "robustness": robustness(by_severity)}
    average = {}
    for level in present(frame.severity):
        values = [found["levels"].get(level, {}).get("score") for found in benches.values()]
        if all(
            value is not None for value in values
        ):  # a mean over the benchmarks that happen to be there says nothing
            average[level] = sum(values) / len(values)
    rejected = int((frame.reject != "").sum())
    whole = {"levels": average, "robustness": robustness(average)}
    return {"benchmarks": benches, "average": whole, "rows": len(frame), "rejected": rejected}


def _level(bench: str, rows: "pd.DataFrame") -> dict:
    cells = [_cell(bench, part) for _, part in rows.groupby("corruption", sort=True)]
    found = {
        "questions": len(rows),
        "rejected": int((rows.reject != "").sum()),
        "unmatched": int((rows.how == "unmatched").sum()),
        "by_judge": int((rows.how == "judge").sum()),
    }
    for name in ("score", "single", "circular", "pair"):
        values = [cell[name] for cell in cells if name in cell]
        if values:
            known = [value for value in values if value is not None]
            found[name] = sum(known) / len(known) if len(known) == len(values) else None
    if len(cells) > 1:
        names = [name for name, _ in rows.groupby("corruption", sort=True)]
        found["corruptions"] = {name: cell["score"] for name, cell in zip(names, cells, strict=True)}
    return found


def _cell(bench: str, rows: "pd.DataFrame") -> dict[str, float | None]:
    """Figures of one benchmark under one corruption at one level; None where every row is rejected."""
    found = {"single": _mean(rows.score)}
    kind = family(bench)
    if kind == "mmbench":
        found["circular"] = _groups(rows, [_number(index) % CIRCULAR for index in rows["index"]])
    if kind == "mmvp":
        numbers = [_number(index) for index in rows["index"]]
        found["pair"] = _groups(rows, [(number - min(numbers)) // 2 for number in numbers], size=2)
    return found | {"score": found.get("circular", found["single"])}


def _mean(values: "pd.Series") -> float | None:
    return float(values.mean()) if values.notna().any() else None


def _groups(rows: "pd.DataFrame", keys: Iterable[int], size: int = 0) -> float | None:
    """Share of groups in which every row is right; a group with a rejected row (or not of `size` rows) is left out."""
    groups = rows.assign(key=list(keys)).groupby("key").score
    whole = groups.apply(lambda s: s.notna().all() and (not size or len(s) == size))
    right = groups.apply(lambda s: bool((s == 1).all()))[whole]
    return float(right.mean()) if len(right) else None


def _number(index: str) -> int:
    try:
        return int(float(index))
    except ValueError as error:
        raise ClearError(f"index {index!r} is no number; rotations and pairs are found by the number.") from error


def table(found: dict) -> str:
    """The summary as lines of text: per cent, one row per benchmark."""
    levels = [level for level in SEVERITIES if any(level in b["levels"] for b in found["benchmarks"].values())]
    rows = [("benchmark", *levels, "hard / clean", "questions", "unmatched", "rejected")]

    def percent(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.2f}"

    def line(name: str, values: dict, relative: float | None, *counts: int | str) -> None:
        rows.append((name, *(percent(values.get(level)) for level in levels), percent(relative), *map(str, counts)))

    for bench, part in found["benchmarks"].items():
        cells = part["levels"].values()
        counts = [sum(cell[name] for cell in cells) for name in ("questions", "unmatched", "rejected")]
        line(bench, {k: v["score"] for k, v in part["levels"].items()}, part["robustness"]["relative"], *counts)
        for extra in ("pair", "single"):
            values = {k: v[extra] for k, v in part["levels"].items() if extra in v}
            if values and (extra == "pair" or family(bench) == "mmbench"):
                line(f"  {extra}", values, robustness(values)["relative"] if values.get(HARD) else None, "", "", "")
    if len(found["benchmarks"]) > 1:
        line("average", found["average"]["levels"], found["average"]["robustness"]["relative"], "", "", "")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" ".join((f"{r[0]:<{widths[0]}}", *map(str.rjust, r[1:], widths[1:]))).rstrip() for r in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])

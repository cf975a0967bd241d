"""Scores of prediction files on the public benchmarks, clean and degraded: what `clear score` prints (METHOD §7).

A file holds the predictions of one benchmark at one level: VLMEvalKit's table in any format of clear.data.tables, with
the columns `index`, `question` (or `prompt`), options `A`, `B`, …, `answer`, `prediction`. Benchmark, corruption and
level come from the columns `bench`, `corruption` and `severity` where a table has all three, else from the file's name
(clear.bench.vlmeval.names): a benchmark may have a column of one of these names for something else (MMStar's `bench`
is the set a question was taken from).

Rules: multiple choice by clear.bench.vlmeval.options; MMBench circular as in VLMEvalKit (every rotation must be right,
a group without its first row is left out), plain where the files have no rotations; MMVP by single question as
published and by pair; CV-Bench by single question as published, and as in VLMEvalKit by the mean over its sources;
MM-Vet by a judge, mean of grades; free answers elsewhere by exact match. An answer that no rule decides is wrong and
counted, or put to the judge if there is one; a row whose judge fails is rejected: it is in no figure, and the count
says so. Every figure is computed from rows; nothing is typed in or averaged over what is missing.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clear.bench.scoring import HARD, SEVERITIES, present, robustness
from clear.bench.vlmeval import names
from clear.bench.vlmeval.names import CIRCULAR, OWN
from clear.bench.vlmeval.options import answer_in, chosen
from clear.bench.vlmeval.scores_levels import apart
from clear.data import tables
from clear.data.io import aligned
from clear.data.records import CLEAN
from clear.errors import ClearError, quoted
from clear.sources.lmudata import options_of
from clear.sources.scenes.words import LABELS, normalise

if TYPE_CHECKING:
    import pandas as pd

    from clear.llm.endpoint import Client

GROUPED = ("mmbench", "mmvp")
"""Families of which groups of rows are found by the index."""

WHERE = ("bench", "corruption", "severity")

MOST_PARTS = 2000
"""Benchmarks, corruptions and levels of one file together: each has figures and lines of its own. All of MMD-Bench's
are a quarter of that."""


def read_predictions(files: Sequence[Path]) -> "pd.DataFrame":
    """The rows of all files, all cells as text, with the columns file, bench, corruption, severity, benchmark and gold.

    `bench` has the model's name in front, as the files have; `benchmark` has not, and by it a benchmark's rules are
    found. `gold` is the letter of the right option, "" for a free answer. Raises ClearError naming the file, and the
    row where there is one, for a missing column, answer or level, a repeated index, one that is not a number where
    groups are found by it, an answer that names no option, a name that is not that of a benchmark, and for two files of
    the same rows.
    """
    import pandas as pd

    frame = pd.concat([read_file(Path(file)) for file in files], ignore_index=True).fillna("")
    again = frame[frame.duplicated([*WHERE, "index"])]
    if len(again):
        which = "/".join(again.iloc[0][[*WHERE, "index"]])
        raise ClearError(f"{which} is in two of the files; name files of different data sets and one model.")
    return damaged_as_hard(frame)


def damaged_as_hard(frame: "pd.DataFrame") -> "pd.DataFrame":
    """`frame` with a benchmark that is damaged as published (R-Bench-Dis) at level hard, as corruption OWN."""
    levels = frame.groupby("bench")["severity"].agg(set)
    alone = dict(zip(frame["bench"], frame["benchmark"], strict=True))
    own = [bench for bench, found in levels.items() if names.DAMAGED.search(alone[bench]) and found == {CLEAN}]
    frame.loc[frame["bench"].isin(own), ["corruption", "severity"]] = OWN, HARD
    return frame


def read_file(path: Path) -> "pd.DataFrame":
    """The rows of one file, as `read_predictions`."""
    import pandas as pd

    header, rows = tables.read(path, skip=("", "image", "image_path"))
    for column in ("index", "question", "answer", "prediction"):
        if column not in header and not (column == "question" and "prompt" in header):
            raise ClearError(f"{path}: no column '{column}' among {', '.join(header)}; {_without(column)}")
    frame = pd.DataFrame([row.cells for row in rows], columns=header, dtype=str)
    frame = frame.rename(columns={} if "question" in frame else {"prompt": "question"})
    if frame.empty:
        raise ClearError(f"{path}: no row in this file.")
    twice = frame["index"][frame["index"].duplicated()]
    if len(twice):
        raise ClearError(f"{path}: index {twice.iloc[0]} occurs twice; number the rows.")
    frame = _placed(path, frame)
    frame["benchmark"] = _alone(path, frame)
    for index in frame["index"][frame["benchmark"].map(names.family).isin(GROUPED)]:
        try:
            names.number(index)
        except ClearError as error:
            raise ClearError(f"{path}: {error}") from error
    return frame.assign(file=str(path), gold=[_gold(path, row) for row in frame.to_dict("records")])


def _placed(path: Path, frame: "pd.DataFrame") -> "pd.DataFrame":
    """`frame` with benchmark, corruption and level, by its columns or the file's name, each written in one way."""
    if set(WHERE) <= set(frame):
        frame = frame.assign(**{column: frame[column].str.strip() for column in WHERE})
        frame = frame.assign(bench=frame["bench"].map(names.composed), corruption=frame["corruption"].map(names.ours))
    else:
        try:
            named = names.parsed(names.composed(path.stem))
        except ClearError as error:
            raise ClearError(f"{path}: the name {error}") from error
        frame = frame.assign(**dict(zip(WHERE, named, strict=True)))
    if (parts := int((~frame.duplicated(list(WHERE))).sum())) > MOST_PARTS:
        raise ClearError(
            f"{path}: {parts:,} different {', '.join(WHERE)}, and at most {MOST_PARTS:,} are scored; do these columns "
            "name the benchmarks?"
        )
    for column in WHERE:
        known = SEVERITIES if column == "severity" else None
        odd = frame[~frame[column].isin(known) if known else frame[column].str.strip() == ""]
        if len(odd):
            what = f"is not one of {', '.join(known)}" if known else "is empty"
            raise ClearError(f"{path}: index {odd['index'].iloc[0]}: {column} {odd[column].iloc[0]!r} {what}.")
    odd = frame[(frame["corruption"] == CLEAN) != (frame["severity"] == CLEAN)]
    if len(odd):
        index, corruption, severity = odd[["index", "corruption", "severity"]].iloc[0]
        raise ClearError(
            f"{path}: row {odd.index[0] + 1}, index {index}: corruption {quoted(corruption)} and severity '{severity}' "
            f"contradict each other; write {CLEAN} in both columns, or a corruption and its level."
        )
    return frame


def _alone(path: Path, frame: "pd.DataFrame") -> list[str]:
    """The benchmark of every row without the model's name, by which no rule may be found: a model may be called after a
    benchmark."""
    folder, (named, _) = path.absolute().parent.name, names.of_file(path)
    models = frame["model"].map(names.tidy) if "model" in frame else [named] * len(frame)
    pairs = list(zip(frame["bench"], models, strict=True))
    found = {(bench, model): names.alone(bench, folder, (named, model)) for bench, model in dict.fromkeys(pairs)}
    return [found[pair] for pair in pairs]


def _without(column: str) -> str:
    if column == "answer":
        return (
            "without the right answers nothing can be scored here: score a split whose TSV has them (as "
            "MMBench_DEV_EN_V11 has), or send the predictions to the benchmark's own server."
        )
    return "is it a prediction file?"


def _gold(path: Path, row: dict) -> str:
    """The letter of the right option: a capital letter, an option's text, or a small letter; "" for a free answer."""
    given, options = row["answer"].strip(), options_of(row)
    if not given:
        raise ClearError(f"{path}: index {row['index']} has no answer to compare with; score a split that has answers.")
    if not options:
        return ""
    letter, texts = given.rstrip(".").strip("()"), [option.strip().lower() for option in options]
    if letter in LABELS[: len(options)] and len(letter) == 1:
        return letter
    if texts.count(given.lower()) == 1:
        return LABELS[texts.index(given.lower())]
    if len(letter) == 1 and letter.upper() in LABELS[: len(options)]:
        return letter.upper()
    raise ClearError(
        f"{path}: index {row['index']}: the answer {row['answer']!r} names none of {options}; correct the file."
    )


def score(frame: "pd.DataFrame", judge: "Client | None" = None, progress: Callable[[int], None] | None = None):
    """`frame` with the columns `extracted`, `score` (0 to 1, NaN where rejected), `how` and `reject` (a reason or "").

    `how` is letter-or-text rule ("rule"), "exact", "judge" or "unmatched". Raises ClearError for MM-Vet without a
    judge.
    """
    import numpy as np

    frame = frame.reset_index(drop=True).copy()
    said = [answer_in(text) for text in frame["prediction"]]
    options = [options_of(row) for row in frame.to_dict("records")]
    kinds = [names.family(bench) for bench in frame["benchmark"]]
    values, how, reject, extracted = np.zeros(len(frame)), ["unmatched"] * len(frame), [""] * len(frame), list(said)
    for n, (answer, gold) in enumerate(zip(frame["answer"], frame["gold"], strict=True)):
        if kinds[n] == "mmvet":
            continue
        if options[n]:
            extracted[n] = chosen(said[n], options[n])
            how[n], values[n] = "rule" if extracted[n] else "unmatched", float(extracted[n] == gold)
        else:
            values[n], how[n] = float(normalise(said[n]) == normalise(answer)), "exact"
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
                values[n] = float(verdict[0] == frame["gold"][n])
    return frame.assign(extracted=extracted, score=values, how=how, reject=reject)


def summary(frame: "pd.DataFrame", no_average: str = "") -> dict:
    """Figures of a scored frame: per benchmark and level, robustness, and the mean over benchmarks.

    A benchmark's figure is its published one: circular for MMBench (if every file of it has rotations), mean grade for
    MM-Vet, share of single questions for all others. With several corruptions at a level (protocol `full`) the figure
    is the mean over corruptions. All are shares in [0, 1]. `incomplete` counts the MMVP pairs of which one half is
    missing and the MMBench groups without their first row; they are in no figure of pairs or groups.

    The average of a level is over all benchmarks, and absent where one of them has no figure; R-Bench-Dis, damaged as
    published, counts in that of hard alone. Average robustness is over the benchmarks that have both clean and hard.

    `relative` robustness is over the questions of both levels (clear.bench.vlmeval.scores_levels); where levels differ
    in them, `lacking` says how many each has fewer than all have together (`questions`), and `shared` has the figures
    of clean and hard over what these share. `no_average` is a reason why there is no average over these tables.
    """
    benches: dict[str, dict] = {}
    for bench, rows in frame.groupby("bench", sort=True):
        alone = rows.benchmark.iloc[0]
        groups = grouping(alone, rows)
        levels = {level: _level(rows[rows.severity == level], groups) for level in present(rows.severity)}
        by_severity = {level: cell["score"] for level, cell in levels.items() if cell["score"] is not None}
        damaged = bool((rows.corruption == OWN).all())
        benches[bench] = {"levels": levels, "robustness": robustness(by_severity), "damaged": damaged}
        benches[bench] |= _unequal(bench, rows, groups)
        benches[bench]["robustness"]["relative"] = _relative(_compared(benches[bench]), "score")
        if names.family(alone) == "mmbench":
            benches[bench]["circular"] = groups is not None
    average = {}
    for level in present(frame.severity):
        counted = [cell["levels"] for cell in benches.values() if level == HARD or not cell["damaged"]]
        mean = _average(counted, level)
        if mean is not None:  # a mean over the benchmarks that happen to be there says nothing
            average[level] = mean
    both = [cell for cell in benches.values() if {CLEAN, HARD} <= set(cell["levels"])]
    robust = {level: _average([_compared(cell) for cell in both], level) for level in (CLEAN, HARD)}
    robust = robustness(robust) | {"absolute": _average([cell["levels"] for cell in both], HARD)}
    rejected = int((frame.reject != "").sum())
    found = {"benchmarks": benches, "average": {"levels": average, "robustness": robust}}
    found |= {"rows": len(frame), "rejected": rejected}
    if no_average:
        found |= {"average": {"levels": {}, "robustness": robustness({})}, "no_average": no_average}
    if note := names.further(frame["corruption"]):
        found["further"] = note
    return found


def _unequal(bench: str, rows: "pd.DataFrame", groups: "tuple[str, dict[str, int]] | None") -> dict:
    """What `summary` adds where the levels of one benchmark have different questions."""
    found = apart(rows, bool(groups) and groups[0] == "circular")
    if found is None:
        return {}
    added = {"questions": found.questions, "lacking": found.lacking, "unequal": found.note(bench, "hard / clean")}
    if found.shared is not None:
        within = found.within(rows).groupby("severity", sort=True)
        added["shared"] = {level: _level(part, groups) for level, part in within}
    return added


def _compared(bench: dict) -> dict[str, dict]:
    """The figures by level of which a benchmark's relative robustness is made."""
    return bench.get("shared", bench["levels"])


def _relative(levels: dict[str, dict], figure: str) -> float | None:
    return robustness({level: cell.get(figure) for level, cell in levels.items()})["relative"]


def grouping(bench: str, rows: "pd.DataFrame") -> "tuple[str, dict[str, int]] | None":
    """(name of the figure, group of every index) of the benchmarks that are scored by groups of rows, for one model.

    The figure is "pair" or "circular"; None for every other benchmark, and for MMBench where a file has no rotations.
    """
    indices = dict.fromkeys(rows["index"])
    if names.family(bench) == "mmvp":
        return "pair", names.pairs(zip(rows["index"], rows["question"], strict=True))
    if names.family(bench) == "mmbench":
        numbers = {index: names.number(index) for index in indices}
        files = rows.groupby(["corruption", "severity"])["index"]
        if all(any(numbers[index] >= CIRCULAR for index in part) for _, part in files):
            return "circular", {index: number % CIRCULAR for index, number in numbers.items()}
    return None


def _level(rows: "pd.DataFrame", groups: "tuple[str, dict[str, int]] | None") -> dict:
    parts = {name: _cell(part, groups) for name, part in rows.groupby("corruption", sort=True)}
    figures = {
        "questions": len(rows),
        "rejected": int((rows.reject != "").sum()),
        "unmatched": int((rows.how == "unmatched").sum()),
        "by_judge": int((rows.how == "judge").sum()),
        "incomplete": sum(cell.pop("incomplete") for cell in parts.values()),
    }
    keys = dict.fromkeys(key for cell in parts.values() for key in cell)
    figures |= {key: _over([cell.get(key) for cell in parts.values()]) for key in keys}
    if "by_source" in figures:
        figures["sources"] = _over(list((figures["by_source"] or {}).values()))
    if len(parts) > 1:
        figures["corruptions"] = {name: cell["score"] for name, cell in parts.items()}
    return figures


def _average(benches: list[dict], level: str) -> float | None:
    return _over([levels.get(level, {}).get("score") for levels in benches])


def _over(values: list) -> float | dict | None:
    """The mean; None over nothing and where one has no figure. Figures by source or category are taken one by one, of
    every source that any of `values` has."""
    if not values or any(value is None for value in values):
        return None
    if isinstance(values[0], dict):
        keys = sorted({key for value in values for key in value})
        return {key: _over([value.get(key) for value in values]) for key in keys}
    return sum(values) / len(values)


def _cell(rows: "pd.DataFrame", groups: "tuple[str, dict[str, int]] | None") -> dict:
    """Figures of one benchmark under one corruption at one level; None where every row is rejected."""
    figures: dict = {"single": _mean(rows.score), "incomplete": 0}
    if groups:
        name, of = groups
        figures[name], figures["incomplete"] = _groups(rows, of, name == "pair")
    if names.family(rows.benchmark.iloc[0]) == "cvbench":
        for key, column in (("by_source", "source"), ("by_category", "category")):
            if column in rows and (rows[column] != "").all():
                figures[key] = {name: _mean(part.score) for name, part in rows.groupby(column, sort=True)}
    return figures | {"score": figures.get("circular", figures["single"])}


def _mean(values: "pd.Series") -> float | None:
    return float(values.mean()) if values.notna().any() else None


def _groups(rows: "pd.DataFrame", of: dict[str, int], pairs: bool) -> tuple[float | None, int]:
    """Share of groups in which every row is right, and the groups left out as incomplete.

    A pair needs both halves, a circular group its first row, which VLMEvalKit asks for. A group with a rejected row is
    left out, too.
    """
    columns = {"right": rows.score == 1, "judged": rows.score.notna()}
    if not pairs:
        columns["first"] = [names.number(index) < CIRCULAR for index in rows["index"]]
    groups = rows[["index"]].assign(**columns).groupby([of[index] for index in rows["index"]])
    whole = groups.size() == 2 if pairs else groups["first"].any()
    right = groups["right"].all()[whole & groups["judged"].all()]
    return float(right.mean()) if len(right) else None, int((~whole).sum())


def table(summarised: dict) -> str:
    """The summary as lines of text: per cent, one row per benchmark."""
    levels = [level for level in SEVERITIES if any(level in b["levels"] for b in summarised["benchmarks"].values())]
    rows = [("benchmark", *levels, "hard / clean", "questions", "unmatched", "rejected")]

    def percent(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.2f}"

    def line(name: str, values: dict, relative: float | None, *counts: int | str) -> None:
        rows.append((name, *(percent(values.get(level)) for level in levels), percent(relative), *map(str, counts)))

    for bench, part in summarised["benchmarks"].items():
        cells = part["levels"].values()
        counts = [sum(cell[name] for cell in cells) for name in ("questions", "unmatched", "rejected")]
        plain = " (no rotations)" if part.get("circular") is False else ""
        line(bench + plain, {k: v["score"] for k, v in part["levels"].items()}, part["robustness"]["relative"], *counts)
        for extra, label in {"pair": "pair", "sources": "mean over sources", "single": "single"}.items():
            values = {k: v[extra] for k, v in part["levels"].items() if v.get(extra) is not None}
            if values and (extra != "single" or part.get("circular")):
                line(f"  {label}", values, _relative(_compared(part), extra), "", "", "")
    if len(summarised["benchmarks"]) > 1 and "no_average" not in summarised:
        line("average", summarised["average"]["levels"], summarised["average"]["robustness"]["relative"], "", "", "")
    lines = aligned(rows)
    notes = [summarised[key] for key in ("no_average", "further") if key in summarised]
    for bench, part in summarised["benchmarks"].items():
        if "unequal" in part:
            notes.append(part["unequal"])
        if part["damaged"]:
            notes.append(f"{bench}: damaged as published; it counts as hard and in no robustness")
        if count := sum(cell["incomplete"] for cell in part["levels"].values()):
            what = "questions of which the first row" if "circular" in part else "pairs of which one half"
            notes.append(f"{bench}: {count} {what} is missing; they are in no figure of pairs or rotations")
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], *notes])

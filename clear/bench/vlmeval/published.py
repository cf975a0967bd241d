"""The published figures of MMD-Bench (METHOD §7) as rows of a leaderboard: printed, not measured here, no intervals.

published.json holds what is printed. Averages are computed from its columns; where the print says something else, a
note says what. Averages over benchmarks whose columns are not printed are taken as printed, where the leaderboard
averages the same benchmarks.
"""

import json
from pathlib import Path

from clear.bench.scoring import HARD, SEVERITIES
from clear.bench.vlmeval import names
from clear.data.records import CLEAN

FILE = Path(__file__).with_suffix(".json")
PRINTED = json.loads(FILE.read_text(encoding="utf-8"))
BENCHMARKS: list[str] = PRINTED["benchmarks"]
"""The seven benchmarks, as VLMEvalKit calls them, in the order of the paper."""

ROUNDING = 0.0101
"""Points by which a printed average may be off: two figures that are rounded or cut to two decimals."""


def canonical(bench: str) -> str:
    """A benchmark's name without what its spellings differ in (MM-Vet and MMVet, CV-Bench-2D and CVBench-2D)."""
    return "".join(c for c in bench.casefold() if c.isalnum())


def rows(board: dict) -> tuple[dict[str, dict], list[str]]:
    """(rows by name, notes), in the form of the models of a leaderboard `board`; shares in [0, 1].

    A benchmark that the leaderboard lacks is not shown, one that it has under another name neither (MMBench_DEV_EN is
    not MMBench_DEV_EN_V11); both are in the notes.
    """
    columns = {canonical(bench): bench for bench in board["benchmarks"]}
    place = {columns[canonical(name)]: n for n, name in enumerate(BENCHMARKS) if canonical(name) in columns}
    notes = []
    if missing := [name for name in BENCHMARKS if canonical(name) not in columns]:
        notes.append(f"Published, but in no table here: {', '.join(missing)}.")
    found = {}
    for model, printed in PRINTED["models"].items():
        levels = {}
        for level, benches in board["averaged"].items():
            values = printed.get(level, [])
            cells = {
                bench: _cell(values[place[bench]]) if bench in place and place[bench] < len(values) else None
                for bench in benches
            }
            levels[level] = {"benchmarks": cells, "average": _average(model, level, cells)}
        absolute, clean = (_average(model, level, _over(levels, level, board["robust"])) for level in (HARD, CLEAN))
        relative = {"estimate": absolute["estimate"] / clean["estimate"]} if absolute and clean else None
        found[model] = {
            "source": f"published: {PRINTED['source']}",
            "judge": PRINTED["judge"],
            "protocol": PRINTED["protocol"],
            "levels": levels,
            "robustness": {"absolute": absolute, "relative": relative},
            "restored": _restored(model, board, place),
        }
    return found, notes + corrections()


def gains() -> dict[str, float]:
    """Relative gain of the paper's CLEAR over its base by level, in the mean of the benchmarks printed for both."""
    own, base = (PRINTED["models"][name] for name in ("CLEAR-RL", "BAGEL"))
    both = {level: min(len(own[level]), len(base[level])) for level in SEVERITIES if level in own and level in base}
    return {level: sum(own[level][:count]) / sum(base[level][:count]) - 1 for level, count in both.items()}


def corrections() -> list[str]:
    """Where the print contradicts itself: averages that are not the mean of their columns."""
    notes = []
    for said in PRINTED["printed_averages"]:
        values = PRINTED["models"][said["model"]].get(said["level"], [])[: said["over"]]
        if len(values) != said["over"]:
            continue
        mean = sum(values) / len(values)
        if abs(mean - said["value"]) > ROUNDING:
            level = "hard" if said["level"] == HARD else said["level"]
            notes.append(
                f"The paper prints {said['value']:.2f} as the {level} average of {said['model']}; the mean of its "
                f"{said['over']} columns is {mean:.2f}. Averages here are computed."
            )
    return notes


def _cell(percent: float) -> dict:
    return {"estimate": percent / 100}


def _over(levels: dict, level: str, benches: list[str]) -> dict:
    return {bench: levels.get(level, {}).get("benchmarks", {}).get(bench) for bench in benches}


def _average(model: str, level: str, cells: dict[str, dict | None]) -> dict | None:
    """The mean of the columns; the printed average where it is of just these benchmarks and there are no columns."""
    known = [cell["estimate"] for cell in cells.values() if cell]
    if known and len(known) == len(cells):
        return {"estimate": sum(known) / len(known)}
    for said in PRINTED["printed_averages"]:
        of = {canonical(name) for name in BENCHMARKS[: said["over"]]}
        if (said["model"], said["level"]) == (model, level) and of == set(map(canonical, cells)):
            return _cell(said["value"])
    return None


def _restored(model: str, board: dict, place: dict[str, int]) -> dict:
    found = {}
    for level in SEVERITIES:
        values = PRINTED["restored"].get(model, {}).get(level, [])
        benches = board["averaged"].get(level, [])
        shares = {b: values[place[b]] / 100 if b in place and place[b] < len(values) else None for b in benches}
        found[level] = {"benchmarks": shares, "average": mean_restored(shares)}
    return found


def mean_restored(shares: dict[str, float | None]) -> float | None:
    """The mean share over benchmarks but R-Bench-Dis, which the published mean leaves out; None if one is unknown."""
    used = [share for bench, share in shares.items() if not names.DAMAGED.search(bench)]
    return None if not used or None in used else sum(used) / len(used)

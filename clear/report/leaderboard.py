"""A leaderboard (clear.bench.vlmeval.leaderboard) as plain text, Markdown and one self-contained page.

Names of models and benchmarks come from files and columns: they are shown in one line, and as text in every form.
"""

from pathlib import Path
from typing import Any

from clear.bench.scoring import HARD
from clear.data.records import CLEAN
from clear.report.claims import LEVELS, points
from clear.report.markdown import as_text
from clear.report.render import Section, page
from clear.report.tables import Table

TEMPLATE = Path(__file__).parent / "leaderboard.html"
NONE = "–"
Rows = list[tuple[str, dict]]
"""(name, row) of the models; a published model may have the name of a measured one."""


def sections(board: dict) -> list[Section]:
    """The tables: averages and robustness, each level by benchmark, differences to the reference, and the notes."""
    rows = [*board["models"].items()]
    rows += [(f"{name} (published)", row) for name, row in board.get("published", {}).items()]
    found = [Section("Averages and robustness", [_averages(board, rows)])]
    for level in board["levels"]:
        found.append(Section(f"Accuracy, {LEVELS[level]}", [_level(board, rows, level)]))
    if board["reference"]:
        for level in board["levels"]:
            table = _differences(board, level)
            found.append(Section(f"Minus {board['reference']}, {LEVELS[level]}", [table]))
    found.append(Section("Share restored", [_restored(board, rows)]))
    found.append(Section("How the figures were made", [_origins(rows), *board["notes"]]))
    return found


def text(board: dict) -> str:
    """The tables in aligned plain text, the notes below them."""
    parts = []
    for section in sections(board):
        lines = [_line(section.title)]
        for block in section.blocks:
            if isinstance(block, Table):
                lines += [block.text()] * bool(block.rows) + [block.caption]
            else:
                lines.append(_line(block))
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def markdown(board: dict) -> str:
    """The tables in GitHub's Markdown."""
    parts = ["# MMD-Bench"]
    for section in sections(board):
        parts.append(f"## {as_text(section.title)}")
        for block in section.blocks:
            if isinstance(block, Table):
                header = [as_text(cell) for cell in block.header]
                cells = [[as_text(cell) for cell in row] for row in block.rows]
                parts.append(Table(header, cells, as_text(block.caption)).markdown())
            else:
                parts.append(as_text(block))
    return "\n\n".join(parts) + "\n"


def html(board: dict) -> str:
    """One page that loads nothing from elsewhere."""
    return page(TEMPLATE, TEMPLATE.parent, _mark, reference=board["reference"] or "", sections=sections(board))


def _line(text: str) -> str:
    return " ".join(text.split())


def _mark(cell: str) -> tuple[str, str]:
    number = bool(cell) and cell[0] in "0123456789+-–" and len(cell) < 30
    return "number" if number else "", cell


def interval(cell: dict | None, signed: bool = False) -> str:
    """`65.3 [63.0, 67.5]`; without brackets where there is no interval."""
    if not cell or cell["estimate"] is None:
        return NONE
    shown = f"{100 * cell['estimate']:{'+' if signed else ''}.2f}"  # as the paper prints them
    if cell.get("low") is None:
        return shown
    return f"{shown} [{points(cell['low'], signed)}, {points(cell['high'], signed)}]"


def _difference(cell: dict | None) -> str:
    return interval((cell or {}).get("minus_reference"), signed=True)


def _averages(board: dict, rows: Rows) -> Table:
    levels, reference = board["levels"], board["reference"]
    header = ["model", "figures", *(LEVELS[level] for level in levels)]
    robust = bool(board["robust"])
    header += ["absolute robustness", "relative robustness"] * robust
    if reference:
        header += [f"{LEVELS[level]} − {reference}" for level in levels if level in (CLEAN, HARD)]
        header += [f"relative − {reference}"] * robust
    cells = []
    for name, row in rows:
        averages = {level: row["levels"][level]["average"] for level in levels}
        line = [name, row["source"], *(interval(averages[level]) for level in levels)]
        if robust:
            line += [interval(row["robustness"][kind]) for kind in ("absolute", "relative")]
        if reference:
            line += [_difference(averages[level]) for level in levels if level in (CLEAN, HARD)]
            line += [_difference(row["robustness"]["relative"])] * robust
        cells.append([_line(cell) for cell in line])
    over = "; ".join(f"{LEVELS[level]}: {', '.join(benches)}" for level, benches in board["averaged"].items())
    caption = (
        f"Percent, with {100 * board['confidence']:g} % intervals; without brackets where nothing was measured here or "
        f"the questions are too few. Averages are over benchmarks: {over}."
    )
    if robust:
        caption += (
            f" Absolute robustness is the average at hard, relative robustness its share of the clean one, both over "
            f"{', '.join(board['robust'])}."
        )
    if reference:
        caption += f" Differences to {reference} are paired: both models on the same questions."
    return Table(header, cells, _line(caption))


def _level(board: dict, rows: Rows, level: str) -> Table:
    benches = board["averaged"][level]
    cells = []
    for name, row in rows:
        found = row["levels"][level]["benchmarks"]
        if any(found.values()) or row["levels"][level]["average"]:
            line = [*(interval(found[bench]) for bench in benches), interval(row["levels"][level]["average"])]
            cells.append([_line(name), row["source"], *line])
    counts = ", ".join(f"{bench} {board['benchmarks'][bench]['levels'][level]['rows']}" for bench in benches)
    caption = f"Percent. Rows of every measured model: {counts}."
    return Table(["model", "figures", *benches, "average"], cells, _line(caption))


def _differences(board: dict, level: str) -> Table:
    benches = board["averaged"][level]
    cells = []
    for name, row in board["models"].items():
        if name != board["reference"]:
            found = row["levels"][level]
            line = [*(_difference(found["benchmarks"][bench]) for bench in benches), _difference(found["average"])]
            cells.append([_line(name), *line])
    return Table(["model", *benches, "average"], cells, "Points; an interval that leaves out 0 is a difference.")


def _restored(board: dict, rows: Rows) -> Table:
    cells = []
    for name, row in rows:
        shares = [row["restored"].get(level, {}).get("average") for level in board["levels"]]
        if any(share is not None for share in shares):
            cells.append([_line(name), row["source"], *map(points, shares)])
    caption = (
        "Percent of the answers before which the picture was restored, mean over benchmarks but R-Bench-Dis."
        if cells
        else "No table has a record of restorations beside it (the Parquet of `clear answer`)."
    )
    return Table(["model", "figures", *(LEVELS[level] for level in board["levels"])], cells, caption)


def _origins(rows: Rows) -> Table:
    def line(name: str, row: dict[str, Any]) -> list[str]:
        unmatched = row.get("unmatched")
        made = [row["source"], row["judge"], row["protocol"], NONE if unmatched is None else str(unmatched)]
        return [_line(cell) for cell in (name, *made)]

    caption = "Unmatched: answers in which no rule found one option; they count as wrong."
    return Table(["model", "figures", "judge", "damage", "unmatched"], [line(*row) for row in rows], caption)

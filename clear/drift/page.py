"""The report of a night: the page index.html, and the same tables as Markdown for Prefect, without pictures.

Names of files come from outside; the page escapes them, and Markdown shows them as text.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clear.data.io import write_text
from clear.data.records import CLEAN
from clear.drift.measures import METRICS
from clear.drift.night import HISTORY, Night, standing_out
from clear.drift.power import needed
from clear.drift.reference import Reference, kind_of
from clear.report.markdown import as_text, fenced
from clear.report.plots import figure_file, pictures
from clear.report.render import Figure, Folded, Quote, Section, page
from clear.report.tables import Table

TEMPLATE = Path(__file__).with_name("drift.html")
NIGHT, BEFORE = "#D55E00", "#5A5A5A"
PANELS = 6
NIGHTS = 60
LISTED = 30
WORTH_A_ROW = 0.005


def write(
    folder: Path,
    night: Night,
    values: np.ndarray,
    baseline: np.ndarray,
    reference: Reference,
    history: Sequence[Mapping[str, str]],
    figures: Mapping[str, Any],
    thumbnails: Sequence[tuple[str, np.ndarray]],
) -> Path:
    """Write index.html with everything inlined, and its plots beside it; returns the page.

    `values` are the metrics of the night's pictures, `baseline` those they were compared with, `thumbnails` (name,
    uint8 RGB) of those to look at first; without them the page shows no picture.
    """
    for old in (folder / "plots").glob("*.png"):
        old.unlink()
    sections = [Section("What would cover it", _proposal(night))] if night.proposal else []
    if night.decision:
        sections += [
            Section("What has changed", _changes(folder, night, values, baseline)),
            Section("What the pictures look like", _resemblance(folder, night, reference)),
            Section("Pictures to look at first", _pictures(folder, thumbnails)),
        ]
    sections += [
        Section("Nights so far", _history(folder, history)),
        Section("The files", _files(night)),
        Section("How this is decided", _method(night, figures)),
    ]
    file = folder / "index.html"
    write_text(file, page(TEMPLATE, folder, _mark, night=night, sections=sections))
    return file


def markdown(night: Night) -> str:
    """Decision, what stands out, and the proposal, for a page elsewhere: numbers and names of columns only, no picture
    and no file's name."""
    parts = [f"**{night.verdict}**: {as_text(night.message)}."]
    if night.decision:
        changed, _ = _changed(night)
        parts += [changed.markdown(), _damage(night).markdown()]
    if night.restored:
        parts.append(_restored(night))
    if night.proposal:
        commands = "\n".join(night.proposal.commands)
        parts.append(f"{as_text(night.proposal.because)}:\n\n{fenced(commands)}")
    return "\n\n".join(parts)


def _mark(cell: str) -> tuple[str, str]:
    if cell in ("Drifted", "changed"):
        return "bad", cell
    if cell == "NoDrift":
        return "good", cell
    return ("number" if cell and cell[0] in "0123456789+-–" and len(cell) < 30 else ""), cell


def _proposal(night: Night) -> list:
    return [f"{night.proposal.because}.", Quote("Commands", "\n".join(night.proposal.commands))]


# --- what has changed -------------------------------------------------------------------------------------------------


def _changed(night: Night) -> tuple[Table, Table]:
    """The columns that stand out, at least three, and all others."""
    columns = standing_out(night.decision)
    first = max(3, sum(column.p <= night.decision.alpha for column in columns))
    header = ["", "changed", "median now", "median before", "distance", "p"]
    rows = [
        [
            column.name,
            "changed" if column.p <= night.decision.alpha else "",
            _number(column.night),
            _number(column.reference),
            f"{_number(column.distance)} [{_number(column.low)}, {_number(column.high)}]",
            f"{column.p:.3f}",
        ]
        for column in columns
    ]
    caption = (
        "Distances are in units of the metric, with 95 % intervals; p is adjusted for the number of rows. A row "
        "`like …` is the probability that a picture has this kind of damage."
    )
    return Table(header, rows[:first], caption), Table(header, rows[first:])


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _changes(folder: Path, night: Night, values: np.ndarray, baseline: np.ndarray) -> list:
    first, rest = _changed(night)
    shown = [column.name for column in standing_out(night.decision) if column.name in METRICS][:PANELS]
    with figure_file(folder / "plots/metrics.png", 2, PANELS // 2, (10.2, 5.2)) as (_, axes):
        for axis, name in zip(axes.flat, shown, strict=True):
            number = list(METRICS).index(name)
            both = np.concatenate([values[:, number], baseline[:, number]])
            bins = np.linspace(both.min(), max(both.max(), both.min() + 1e-9), 31)
            for rows, colour, label in ((baseline, BEFORE, "before"), (values, NIGHT, "now")):
                weights = np.full(len(rows), 100 / len(rows))
                axis.hist(
                    rows[:, number], bins, weights=weights, histtype="step", color=colour, label=label, linewidth=1.4
                )
            axis.set_title(name.replace("_", " "))
            axis.set_ylabel("pictures (%)")
        axes.flat[0].legend(fontsize=8)
    caption = "The metrics that stand out most, in percent of the pictures. To see: where the two lines part."
    meanings = [[name, meaning] for name, meaning in METRICS.items()]
    return [
        first,
        Figure("plots/metrics.png", caption),
        Folded(f"The other {len(rest.rows)} columns", rest),
        Folded("What the metrics are", Table(["metric", "what it is"], meanings)),
    ]


# --- what it looks like -----------------------------------------------------------------------------------------------


def _damage(night: Night) -> Table:
    rows = [
        [
            kind_of(share.kind),
            share.level,
            f"{100 * share.share:.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}]",
            f"{100 * share.reference:.1f}",
            str(share.trained) if share.trained else "no",
        ]
        for number, share in enumerate(night.damage[:10])
        if number < 3 or share.share >= WORTH_A_ROW
    ]
    caption = (
        f"Percent of the pictures, with 95 % intervals, and of undamaged ones before. {100 * night.strange:.1f} % "
        f"of the pictures are unlike everything that is known ({100 * night.strange_expected:.0f} % are expected)."
    )
    return Table(["looks like", "level", "pictures now", "seems so before", "copies in training"], rows, caption)


def _resemblance(folder: Path, night: Night, reference: Reference) -> list:
    kinds = [CLEAN, *reference.model.kinds]
    of = np.array([[kind == k for k in kinds] for kind, _ in reference.model.cells], int)
    table = of.T @ reference.confusion @ of
    _confusion(folder / "plots/confusion.png", table, [kind_of(kind) for kind in kinds])
    rows = [_row(reference, number, of, kinds) for number in range(len(reference.model.cells))]
    caption = (
        "How far to believe that: for pictures of known damage (rows, all levels) that the classifier had not "
        "seen, what it takes them for (columns, percent). Its probabilities are off by "
        f"{100 * reference.calibration_error:.1f} points on average. Slight damage that does not show is taken "
        "for none, and presets are taken for their like among the sixteen."
    )
    header = ["kind", "level", "pictures", "kind right", "level right too", "taken for clean", "most often otherwise"]
    return [
        _damage(night),
        Figure("plots/confusion.png", caption),
        Folded("The same by level", Table(header, rows)),
    ]


def _row(reference: Reference, number: int, of: np.ndarray, kinds: list[str]) -> list[str]:
    counts = reference.confusion[number]
    by_kind, total = counts @ of, max(int(counts.sum()), 1)
    kind, level = reference.model.cells[number]
    own = kinds.index(kind)
    others = np.where(np.arange(len(kinds)) == own, 0, by_kind)
    other = int(others.argmax())
    return [
        kind_of(kind),
        level,
        str(int(counts.sum())),
        f"{100 * by_kind[own] / total:.0f}",
        f"{100 * counts[number] / total:.0f}",
        f"{100 * by_kind[0] / total:.0f}",
        f"{kind_of(kinds[other])} {100 * others[other] / total:.0f}" if others[other] else "–",
    ]


def _confusion(path: Path, table: np.ndarray, names: list[str]) -> None:
    share = 100 * table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    side = 2 + 0.28 * len(names)
    with figure_file(path, 1, 1, (side, side)) as (_, axes):
        axis = axes[0, 0]
        axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
        axis.set_xticks(range(len(names)), names, rotation=90)
        axis.set_yticks(range(len(names)), names)
        axis.set_xlabel("taken for")
        axis.set_ylabel("is")
        axis.grid(visible=False)
        for row, column in zip(*np.nonzero(np.rint(share)), strict=True):
            colour = "white" if share[row, column] > 55 else "black"
            axis.text(column, row, f"{share[row, column]:.0f}", ha="center", va="center", fontsize=6, color=colour)


def _pictures(folder: Path, thumbnails: Sequence[tuple[str, np.ndarray]]) -> list:
    if not thumbnails:
        return ["Left out on request, or none could be read again."]
    pictures(folder / "plots/pictures.png", [(str(number), image) for number, (_, image) in enumerate(thumbnails, 1)])
    named = "; ".join(f"{number}: {name}" for number, (name, _) in enumerate(thumbnails, 1))
    return [Figure("plots/pictures.png", f"Those least like training, then those surely damaged. {named}.")]


# --- over time, files, method -----------------------------------------------------------------------------------------


def _restored(night: Night) -> str:
    given = night.restored
    return (
        f"The model restored the picture before {100 * given.share:.1f} % [{100 * given.low:.1f}, "
        f"{100 * given.high:.1f}] of {given.answers} answers."
    )


def _history(folder: Path, history: Sequence[Mapping[str, str]]) -> list:
    recent = list(history)[-NIGHTS:]
    nights = range(len(recent))
    with figure_file(folder / "plots/nights.png", 1, 2, (10.2, 3)) as (_, axes):
        _curve(axes[0, 0], recent, "damaged", "pictures that look damaged (%)", BEFORE)
        changed = [n for n in nights if recent[n]["verdict"] == "Drifted" and recent[n]["damaged"]]
        values = [100 * float(recent[n]["damaged"]) for n in changed]
        axes[0, 0].plot(changed, values, "o", color=NIGHT, label="drifted")
        axes[0, 0].legend(fontsize=8)
        _curve(axes[0, 1], recent, "restored", "answers with a restoration (%)", "#0072B2")
    header = [name.replace("_", " ") for name in HISTORY]
    table = Table(header, [[row[name] for name in HISTORY] for row in reversed(recent)])
    return [
        Figure(
            "plots/nights.png",
            "Night by night. To see: a level that leaves where it was, and whether the model follows.",
        ),
        Folded(f"The last {len(recent)} nights", table),
    ]


def _curve(axis: Any, rows: Sequence[Mapping[str, str]], name: str, label: str, colour: str) -> None:
    there = [n for n, row in enumerate(rows) if row[name]]
    values = [100 * float(rows[n][name]) for n in there]
    axis.plot(there, values, color=colour, marker="o", markersize=3)
    if rows and f"{name}_low" in rows[0] and there:
        bounds = [[100 * float(rows[n][f"{name}_{side}"]) for n in there] for side in ("low", "high")]
        axis.fill_between(there, *bounds, color=colour, alpha=0.2, linewidth=0)
    axis.set_ylabel(label)
    ticks = sorted({0, len(rows) // 2, len(rows) - 1})
    axis.set_xticks(ticks, [rows[n]["night"] for n in ticks])


def _files(night: Night) -> list:
    said = (
        f"{night.files} files at the place, {night.new} of them new; {night.looked_at} were opened and "
        f"{night.pictures} pictures compared. {night.repeated} repeat another picture and count once; "
        f"{len(night.unread)} are no usable pictures. {night.larger} are larger than training's {night.side} px "
        f"and were measured at that size; {night.smaller} are smaller. A change of size alone may show as a "
        "change of sharpness and detail."
    )
    table = Table(["file", "why it was left out"], [list(row) for row in night.unread[:LISTED]])
    rest = len(night.unread) - LISTED
    return [
        said,
        *([table] if night.unread else []),
        *([f"… and {rest} more; night.json has all."] if rest > 0 else []),
    ]


def _method(night: Night, figures: Mapping[str, Any]) -> list:
    setting, alarms = figures["measured"], figures["false_alarms"]
    rates = ", ".join(
        f"{count} of {setting['unchanged']} at a rate of {float(level):.0%}" for level, count in alarms.items()
    )
    rows = [
        [
            f"{share:.0%}",
            *(f"{100 * np.mean([row[n] for row in cells.values()]):.0f}" for cells in figures["power"].values()),
        ]
        for n, share in enumerate(figures["mixtures"])
    ]
    main = figures["power"][str(setting["size"])]
    cells = [
        [*map(kind_of, cell.split("/")), *(f"{100 * value:.0f}" for value in row)] for cell, row in sorted(main.items())
    ]
    header = ["changed", *(f"{size} pictures" for size in figures["power"])]
    least = ", ".join(f"{share:.0%}: {size or 'more'}" for share, size in needed(figures))
    return [
        "One decision over all columns together: the Wasserstein distance of each, in standard deviations over "
        "permutations of night and reference, and the largest of them against the largest of each permutation. "
        f"Simulated nights without change were called drifted {rates}.",
        Table(
            header,
            rows,
            f"Power: percent of simulated nights that are noticed, mean over {len(main)} kinds and levels of "
            f"damage, by the share of changed pictures, at a false-alarm rate of {setting['alpha']:.0%}. Pictures "
            f"needed for 80 %: {least}.",
        ),
        Folded(
            f"Power for each kind and level, {setting['size']} pictures",
            Table(["kind", "level", *(f"{share:.0%} changed" for share in figures["mixtures"])], cells),
        ),
    ]

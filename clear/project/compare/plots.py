"""Plots of a comparison and the strips of samples whose answer changed: data in, PNG files out.

Drawn in the manner of clear.report.plots (its palette, markers and cell labels). Base is hollow and dashed, head is
solid, in the colour of the model.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clear.bench.predictions import KEY
from clear.bench.scoring import SEVERITIES
from clear.data.images import decode_image
from clear.data.records import CLEAN, Sample
from clear.project.compare.differences import TITLES, Comparison, changed_answers
from clear.report import plots as drawing
from clear.report.claims import LEVELS
from clear.report.gallery import Example, find, records

if TYPE_CHECKING:
    import pandas as pd

TILE = 144
"""Height of a shown picture in pixels."""


def accuracy(path: Path, comparison: Comparison) -> None:
    """Accuracy in percent against severity, one panel per model, base and head with their own intervals."""
    models = list(comparison.joined)
    columns = min(3, len(models))
    height = -(-len(models) // columns)
    with drawing.figure_file(path, height, columns, (3.6 * columns + 0.6, 2.9 * height), sharey=True) as (_, axes):
        for axis, model in zip(axes.flat, models, strict=False):
            own = [d for d in comparison.levels if d.model == model and d.base_interval and d.head_interval]
            places = np.array([SEVERITIES.index(d.severity) for d in own], float)
            for side, shift, style in (("base", -0.06, "--"), ("head", 0.06, "-")):
                values = 100 * np.array([getattr(d, side) for d in own])
                ends = 100 * np.array([getattr(d, f"{side}_interval") for d in own]).reshape(-1, 2)
                axis.errorbar(
                    places + shift,
                    values,
                    # Rounding may put an end of a percentile interval on the wrong side of the mean by 1e-15.
                    yerr=np.clip([values - ends[:, 0], ends[:, 1] - values], 0, None),
                    color=drawing.COLOURS[model],
                    marker=drawing.MARKERS[model],
                    markerfacecolor="white" if side == "base" else drawing.COLOURS[model],
                    linestyle=style,
                    linewidth=1.5,
                    capsize=2.5,
                    label=side,
                )
            axis.set_title(TITLES[model])
            axis.set_xticks(range(len(SEVERITIES)), [LEVELS[name] for name in SEVERITIES])
            axis.grid(axis="x", visible=False)
            axis.legend(fontsize=8, loc="lower left")
        for axis in axes[:, 0]:
            axis.set_ylabel(f"right answers (%)\nbars: {100 * comparison.settings.confidence:g} % interval")
        for axis in axes[-1]:
            axis.set_xlabel("damage to the image")
        for axis in list(axes.flat)[len(models) :]:
            axis.set_visible(False)


def heat_map(path: Path, comparison: Comparison, model: str) -> None:
    """Corruption × severity: head minus base in points for one model; a ring marks a certain difference."""
    cells = {(d.corruption, d.severity): d for d in comparison.corruptions if d.model == model}
    names, levels = sorted({name for name, _ in cells}), [name for name in SEVERITIES if name != CLEAN]
    grid = np.full((len(names), len(levels)), np.nan)
    for (name, severity), difference in cells.items():
        grid[names.index(name), levels.index(severity)] = 100 * difference.estimate
    limit = max(10.0, float(np.nanmax(np.abs(grid))))
    with drawing.figure_file(path, 1, 1, (6.2, 0.36 * max(len(names), 4) + 1.4)) as (figure, axes):
        axis = axes[0, 0]
        image = axis.imshow(grid, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
        drawing.cell_labels(axis, grid, "{:+.0f}", lambda value: "white" if abs(value) > 0.7 * limit else "black")
        for (name, severity), difference in cells.items():
            if difference.sign:
                spot = (levels.index(severity), names.index(name))
                axis.plot(*spot, "o", markersize=21, markerfacecolor="none", markeredgecolor="black")
        axis.set_title(f"{TITLES[model]}: head minus base (points)")
        axis.grid(visible=False)
        axis.tick_params(length=0)
        axis.set_xticks(range(len(levels)), [LEVELS[level] for level in levels])
        axis.set_xlabel("damage to the image")
        axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
        axis.spines[:].set_visible(False)
        figure.colorbar(image, ax=axis, fraction=0.05)


def choose(comparison: Comparison, model: str, count: int) -> "pd.DataFrame":
    """At most `count` joined rows of `model` whose right or wrong changed: one per image, losses and gains in turn.

    Losses first, since they are what a reviewer looks for; degraded before clean, hardest first, those with a stored
    restoration before those without. If nothing changed between right and wrong, rows with another answer.
    """
    rows = changed_answers(comparison.joined[model])
    turned = rows[rows.correct_base != rows.correct_head]
    rows = (turned if len(turned) else rows).copy()
    rows["hardness"] = -rows.severity.map(SEVERITIES.index).astype(int)
    rows["bare"] = ~(rows.restored_png_head.notna() | rows.restored_png_base.notna())
    rows = rows.sort_values(["hardness", "bare", *KEY]).drop_duplicates("sample")
    rows["turn"] = rows.groupby("correct_head").cumcount()
    return rows.sort_values(["turn", "correct_head", "hardness", *KEY]).head(count)


def examples(comparison: Comparison, model: str, count: int) -> tuple[list[Example], str]:
    """Strips of samples whose answer changed, and a sentence about what they show or why they are missing."""
    rows = choose(comparison, model, count)
    changed = changed_answers(comparison.joined[model])
    turned = changed[changed.correct_base != changed.correct_head]
    lost, won = int(turned.correct_base.sum()), int(turned.correct_head.sum())
    told = (
        f"{TITLES[model]} gives another answer to {len(changed):,} of {len(comparison.joined[model].rows):,} shared "
        f"questions: {won:,} became right, {lost:,} became wrong, {len(changed) - won - lost:,} stayed wrong."
    )
    if rows.empty:
        return [], told
    bench = comparison.head.bench or comparison.base.bench
    if bench is None:
        return [_example(row, model, {}) for row in records(rows)], (
            f"{told} Their pictures are not shown: data/bench of these sides is not on this machine (`dvc pull "
            "data/bench` fetches it)."
        )
    folders = [folder for folder in (bench / "degraded", bench / "clean") if folder.is_dir()]
    pictures = find(folders, {(row.sample, row.corruption, row.severity) for row in records(rows)})
    lacking = sum((row.sample, row.corruption, row.severity) not in pictures for row in records(rows))
    if lacking:
        told += f" {lacking} of the {len(rows)} shown have no picture, since data/bench here does not hold them."
    told += " A restored picture is shown where the predictions keep one."
    return [_example(row, model, pictures) for row in records(rows)], told


def _example(row, model: str, pictures: dict[tuple[str, str, str], Sample]) -> Example:
    key, panels = (row.sample, row.corruption, row.severity), []
    if key in pictures:
        sample = pictures[key]
        panels.append(("clean", _tile(decode_image(sample.image, sample.key))))
        if sample.degraded is not None:
            title = f"{row.corruption.replace('_', ' ')}, {LEVELS[row.severity]}"
            panels.append((title, _tile(decode_image(sample.degraded, sample.key))))
        for side in ("base", "head"):
            stored = getattr(row, f"restored_png_{side}")
            if isinstance(stored, bytes):
                panels.append((f"restored, {side}", _tile(decode_image(stored, f"{sample.key}: restored_png"))))
    traces = []
    for side in ("base", "head"):
        said, right = getattr(row, f"prediction_{side}"), getattr(row, f"correct_{side}")
        answer = f"“{said}”" if said else "no answer"
        title = f"{TITLES[model]}, {side}: {answer}, {'right' if right else 'wrong'}"
        traces.append((title, getattr(row, f"output_{side}")))
    where = "clean" if row.severity == CLEAN else f"{row.corruption.replace('_', ' ')}, {LEVELS[row.severity]}"
    return Example(panels, f"{row.text_head} Right answer: {row.answer_head}. ({row.sample}, {where})", traces)


def _tile(image: np.ndarray) -> np.ndarray:
    import cv2

    height, width = image.shape[:2]
    method = cv2.INTER_AREA if height > TILE else cv2.INTER_NEAREST
    return cv2.resize(image, (max(1, round(width * TILE / height)), TILE), interpolation=method)

"""Plots of the report, one function per picture: data in, PNG file out.

Every model keeps one colour and one marker throughout (Okabe-Ito palette, safe for colour-blind readers); every axis
has a name and a unit. Pictures are drawn with the Agg backend on fixed sizes and carry no date, so equal figures give
equal files.
"""

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clear.bench.models import MODELS
from clear.bench.scoring import SEVERITIES
from clear.data.io import replacing
from clear.data.records import CLEAN
from clear.report.claims import LEVELS, NAMES

if TYPE_CHECKING:
    import pandas as pd

COLOURS = {
    "base": "#5A5A5A",
    "sft_direct": "#E69F00",
    "sft": "#56B4E9",
    "reencode": "#CC79A7",
    "bridge": "#009E73",
    "grpo": "#0072B2",
}
MARKERS = {"base": "o", "sft_direct": "s", "sft": "^", "reencode": "v", "bridge": "D", "grpo": "P"}
INTENSITY = {"clean": "0", "low": "0.23", "mid": "0.45", "high": "0.9"}
DPI = 110

_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "clear",
}


@contextmanager
def figure_file(path: Path, rows: int, columns: int, size: tuple[float, float], **options):
    """Axes (rows, columns) of a new figure of `size` inches, written to `path` and closed on leaving."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with matplotlib.rc_context(_STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **options)
        try:
            yield figure, axes
            with replacing(path) as partial:
                figure.savefig(partial, dpi=DPI, format="png", metadata={"Software": None})
        finally:
            plt.close(figure)


def _level_axis(axis, levels: list[str]) -> None:
    labels = [f"{LEVELS[name]}\n({INTENSITY[name]})" for name in levels]
    axis.set_xticks(range(len(levels)), labels)
    axis.set_xlabel("damage to the image (intensity, 0 = none, 1 = strongest)")
    axis.grid(axis="x", visible=False)


def _models(measured: dict) -> list[str]:
    return [name for name in MODELS if name in measured]


def accuracy(path: Path, measured: dict[str, dict], confidence: float) -> None:
    """Accuracy in percent against severity, one line per model with its interval; `measured`: {model: metrics}."""
    with figure_file(path, 1, 1, (8.4, 4.6)) as (_, axes):
        axis, models = axes[0, 0], _models(measured)
        for index, model in enumerate(models):
            found = measured[model]
            levels = [name for name in SEVERITIES if name in found["accuracy"]]
            # A small sideways shift keeps the interval bars of the models apart.
            places = np.array([SEVERITIES.index(name) for name in levels]) + 0.07 * (index - (len(models) - 1) / 2)
            values = 100 * np.array([found["accuracy"][name] for name in levels])
            ends = 100 * np.array([found["interval"][name] for name in levels])
            axis.errorbar(
                places,
                values,
                yerr=np.abs(ends.T - values),
                color=COLOURS[model],
                marker=MARKERS[model],
                markersize=6,
                linewidth=2.4 if model == "grpo" else 1.3,
                capsize=2.5,
                label=NAMES[model],
            )
        _level_axis(axis, list(SEVERITIES))
        axis.set_ylabel(f"right answers (%), bars: {confidence * 100:g} % interval")
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def calls(path: Path, measured: dict[str, dict]) -> None:
    """Share of answers with a restoration in percent against severity, for the models that can restore."""
    shown = [name for name in _models(measured) if name not in ("base", "sft_direct")]
    with figure_file(path, 1, 1, (8.4, 4.0)) as (_, axes):
        axis = axes[0, 0]
        for model in shown:
            rates = measured[model]["call_rate"]
            levels = [name for name in SEVERITIES if name in rates]
            places = [SEVERITIES.index(name) for name in levels]
            values = [100 * rates[name] for name in levels]
            # Re-encoding is the bridge model with another hand-over, so its line often lies under the bridge's.
            style = (0, (2, 2)) if model == "reencode" else "-"
            axis.plot(
                places,
                values,
                color=COLOURS[model],
                marker=MARKERS[model],
                linestyle=style,
                linewidth=2.4 if model == "grpo" else 1.6,
                label=NAMES[model],
                zorder=4 if model == "reencode" else 3,
            )
        _level_axis(axis, list(SEVERITIES))
        axis.set_ylim(bottom=0)
        axis.set_ylabel("answers with a restoration (%)")
        if shown:
            axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        else:
            _nothing(axis, "no model that can restore was evaluated")


def corruptions(path: Path, measured: dict[str, dict]) -> None:
    """Heat maps of corruption × level: accuracy of CLEAR in percent, and its difference to the base in points."""
    ours, base = measured["grpo"]["corruption"], measured.get("base", {}).get("corruption", {})
    levels = [name for name in SEVERITIES if name != CLEAN]
    values = {name: [100 * ours[name].get(level, np.nan) for level in levels] for name in ours if name != CLEAN}
    other = {name: [100 * base.get(name, {}).get(level, np.nan) for level in levels] for name in values}
    gains = {name: np.array(values[name]) - np.array(other[name]) for name in values}
    # Largest gain at hard first; a corruption without a comparison comes last.
    order = sorted(values, key=lambda name: (-np.nan_to_num(gains[name][-1], nan=-np.inf), name))
    with figure_file(path, 1, 2, (9.0, 0.36 * max(len(order), 4) + 1.4), sharey=True) as (figure, axes):
        grid = np.array([values[name] for name in order]).reshape(len(order), len(levels))
        difference = np.array([gains[name] for name in order]).reshape(len(order), len(levels))
        limit = max(10.0, float(np.nanmax(np.abs(difference)))) if np.isfinite(difference).any() else 10.0
        left = axes[0, 0].imshow(grid, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        right = axes[0, 1].imshow(difference, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
        cell_labels(axes[0, 0], grid, "{:.0f}", lambda value: "black" if value > 55 else "white")
        cell_labels(axes[0, 1], difference, "{:+.0f}", lambda value: "white" if abs(value) > 0.7 * limit else "black")
        for axis, title in zip(axes[0], ("CLEAR: right answers (%)", "CLEAR minus base (points)"), strict=True):
            axis.set_title(title)
            axis.grid(visible=False)
            axis.tick_params(length=0)
            axis.set_xticks(range(len(levels)), [LEVELS[level] for level in levels])
            axis.set_xlabel("damage to the image")
            axis.spines[:].set_visible(False)
        axes[0, 0].set_yticks(range(len(order)), [name.replace("_", " ") for name in order])
        figure.colorbar(left, ax=axes[0, 0], fraction=0.05)
        figure.colorbar(right, ax=axes[0, 1], fraction=0.05)


def restorations(path: Path, cells: dict[str, dict], confidence: float) -> None:
    """Per corruption at one level: share restored in percent, and CLEAR minus direct fine-tuning with its interval."""
    names, leads = list(cells), [cell["minus_direct"] for cell in cells.values()]
    with figure_file(path, 1, 2, (9.4, 0.3 * max(len(names), 4) + 1.3), sharey=True) as (_, axes):
        places, (rates, gains) = np.arange(len(names)), axes[0]
        values = [100 * cell["call_rate"] for cell in cells.values()]
        rates.barh(places, values, color=COLOURS["grpo"], height=0.7)
        for place, value in zip(places, values, strict=True):
            rates.text(value + 1.5, place, f"{value:.0f}" if value >= 0.5 else "0", va="center", fontsize=9)
        rates.set_xlim(0, 112)
        rates.set_xticks(range(0, 101, 25))
        rates.set_yticks(places, [name.replace("_", " ") for name in names])
        rates.invert_yaxis()
        rates.set_title("CLEAR restores before … of its answers (%)")
        for place, lead in zip(places, leads, strict=True):
            if lead is None:
                gains.text(0, place, "not measured", va="center", ha="center", color="#777777", fontsize=9)
                continue
            ends = 100 * np.array([lead["low"], lead["high"]])
            certain = ends[0] > 0 or ends[1] < 0
            colour = COLOURS["grpo"] if ends[0] > 0 else "#A84300" if ends[1] < 0 else "#8A8A8A"
            gains.plot(ends, [place, place], color=colour, linewidth=2.2, solid_capstyle="round")
            gains.plot(100 * lead["estimate"], place, "o", color=colour, markerfacecolor=colour if certain else "white")
        gains.axvline(0, color="#333333", linewidth=1)
        gains.set_title(f"CLEAR − direct fine-tuning (points, {confidence * 100:g} % interval)")
        for axis in axes[0]:
            axis.grid(axis="y", visible=False)
            axis.tick_params(axis="y", length=0)


def cell_labels(axis, grid: np.ndarray, form: str, colour) -> None:
    for (row, column), value in np.ndenumerate(grid):
        if np.isfinite(value):
            text = form.format(value + 0.0) if round(value) else "0"
            axis.text(column, row, text, ha="center", va="center", color=colour(value), fontsize=9)
        else:
            axis.text(column, row, "–", ha="center", va="center", color="#777777")


def quality(path: Path, measured: dict[str, dict]) -> None:
    """PSNR (dB) and SSIM before and after restoration per level, for every model that restored."""
    shown = [name for name in _models(measured) if measured[name]["psnr"]]
    labels = {"psnr": "PSNR to the clean image (dB)", "ssim": "SSIM to the clean image (1 = equal)"}
    with figure_file(path, 1, 2, (9.4, 3.9)) as (figure, axes):
        for axis, (name, label) in zip(axes[0], labels.items(), strict=True):
            for index, model in enumerate(shown):
                for severity, pair in measured[model][name].items():
                    if pair["degraded"] is None:
                        continue
                    place = SEVERITIES.index(severity) - 1 + 0.16 * (index - (len(shown) - 1) / 2)
                    ends = (pair["degraded"], pair["restored"])
                    axis.plot([place, place], ends, color=COLOURS[model], linewidth=1.6)
                    axis.plot(place, ends[0], "o", color=COLOURS[model], markerfacecolor="white", markersize=6)
                    axis.plot(place, ends[1], MARKERS[model], color=COLOURS[model], markersize=7)
            _level_axis(axis, [level for level in SEVERITIES if level != CLEAN])
            axis.set_xlim(-0.5, 2.5)
            axis.set_ylabel(label)
            if not shown:
                _nothing(axis, "no restored image was measured")
        if shown:
            _quality_legend(figure, shown)


def _quality_legend(figure, shown: list[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], marker=MARKERS[name], color=COLOURS[name], label=f"{NAMES[name]}: after") for name in shown
    ]
    hollow = {"marker": "o", "color": "#5A5A5A", "markerfacecolor": "white", "linestyle": ""}
    handles.append(Line2D([], [], **hollow, label="before, on the same images"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)))


def losses(path: Path, curves: dict[str, "pd.DataFrame"]) -> bool:
    """Training loss against optimiser step, one panel per stage and phase. Returns False if no curve holds a loss."""
    panels = [
        (stage, phase, rows)
        for stage, frame in curves.items()
        if "loss" in frame
        for phase, rows in frame[frame.loss.notna()].groupby("phase", sort=False)
    ]
    if not panels:
        return False
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    with figure_file(path, height, columns, (3.3 * columns + 0.4, 2.4 * height)) as (_, axes):
        for axis, (stage, phase, rows) in zip(axes.flat, panels, strict=False):
            _line(axis, rows.step, rows.loss, "#333333")
            axis.set_title(f"{stage}: {phase}" if str(phase) not in ("", stage) else stage)
            axis.set_ylabel("loss")
            axis.set_xlabel("optimiser step")
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
    return True


_REWARD_PANELS = {
    "Rewards": (
        "points (0 to 1)",
        {
            "reward": "total",
            "reward_format": "format",
            "reward_decision": "decision",
            "reward_answer": "probability of the right answer",
            "reward_latent_quality": "restored latents",
        },
    ),
    "Rewarded and true accuracy": (
        "share right",
        {"reward_accuracy": "training rollouts", "accuracy_holdout": "held-out images"},
    ),
    "Restorations": ("share of rollouts", {"call_rate": "asks for a restoration"}),
    "Distance from the start": ("KL (nats per token)", {"kl": "KL"}),
    "On-policy check": ("largest |ratio − 1|", {"ratio_error": "before the update"}),
    "Variety of the answers": ("entropy (nats)", {"entropy": "entropy"}),
    "Groups that teach": (
        "share with unequal rewards",
        {"groups_with_variance": "text", "image_groups_with_variance": "image"},
    ),
    "Clipped": ("share of ratios", {"clipped": "text tokens", "image_clipped": "image steps"}),
}
RATIO_LIMIT = 1e-3
"""Largest deviation of the on-policy probability ratio from 1 that rounding may cause."""

_REWARD_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")


def rewards(path: Path, frame: "pd.DataFrame") -> bool:
    """GRPO's reward and health curves against optimiser step. Returns False if none of them was recorded."""
    panels = []
    for title, (unit, names) in _REWARD_PANELS.items():
        present = {name: label for name, label in names.items() if name in frame and frame[name].notna().any()}
        if present:
            panels.append((title, unit, present))
    if not panels:
        return False
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    with figure_file(path, height, columns, (3.4 * columns + 0.4, 2.7 * height)) as (_, axes):
        for axis, (title, unit, names) in zip(axes.flat, panels, strict=False):
            for colour, (name, label) in zip(_REWARD_COLOURS, names.items(), strict=False):
                rows = frame[frame[name].notna()]
                _line(axis, rows.step, rows[name], colour, label)
            axis.set_title(title)
            axis.set_ylabel(unit)
            axis.set_xlabel("optimiser step")
            if "ratio_error" in names:
                axis.set_yscale("log", nonpositive="clip")
                axis.axhline(RATIO_LIMIT, color="#5A5A5A", linestyle="--", linewidth=1, label="limit")
            if len(names) > 1 or "ratio_error" in names:
                axis.legend(fontsize=8)
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
    return True


def _line(axis, steps: "pd.Series", values: "pd.Series", colour: str, label: str = "") -> None:
    """A curve: single points where there are few, otherwise the raw values pale below their running mean."""
    if len(values) < 25:
        axis.plot(steps, values, color=colour, marker="o", markersize=3.5, linewidth=1.4, label=label)
        return
    axis.plot(steps, values, color=colour, alpha=0.28, linewidth=0.8)
    window = max(5, len(values) // 20)
    axis.plot(
        steps, values.rolling(window, center=True, min_periods=1).mean(), color=colour, linewidth=1.8, label=label
    )


def pictures(path: Path, panels: list[tuple[str, np.ndarray]]) -> None:
    """A strip of uint8 RGB images (H, W, 3) side by side, each below its title, enlarged without smoothing."""
    with figure_file(path, 1, len(panels), (2.3 * len(panels), 2.75)) as (_, axes):
        for axis, (title, image) in zip(axes[0], panels, strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set_title(title, fontsize=9)
            axis.set_axis_off()


def _nothing(axis, text: str) -> None:
    axis.text(0.5, 0.5, text, ha="center", va="center", transform=axis.transAxes, color="#777777")

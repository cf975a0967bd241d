"""Command `clear decision MODEL`: what restoring gains and whether the model knows it, on the development split.

Writes a run record into the private folder of the project: the outcomes per question (Parquet), their figures (JSON)
and the accuracy at every budget of restorations (PNG). Nothing that DVC or git tracks changes.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from clear.bench import decision
from clear.bench.answers import development
from clear.bench.models import under_test
from clear.bench.scoring import SEVERITIES
from clear.data.io import replacing, write_json
from clear.data.workspace import home
from clear.report import plots
from clear.report.claims import LEVELS, NAMES
from clear.schema import Config

if TYPE_CHECKING:
    import pandas as pd


def run(config: Config, model: str) -> Path:
    """Measure the decision of one model; returns the file of its figures.

    Raises ClearError for a model that never restores, and where the split holds no question.
    """
    tested = under_test(model, config)
    samples = development()
    total = 2 * sum(len(sample.questions) for sample in samples)
    with tqdm(total=total, desc=f"decision {model}", unit="answer", mininterval=2) as bar:
        frame = decision.outcomes(tested, samples, bar.update)
    e = config.evaluate
    out = place(config, model)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out.with_suffix(".parquet")) as partial:
        frame.to_parquet(partial)
    found = decision.figures(frame, confidence=e.confidence, resamples=e.bootstrap, seed=config.seed)
    draw(out.with_suffix(".png"), frame, f"{NAMES[model]}, development split")
    write_json(out, found)
    return out


def place(config: Config, model: str) -> Path:
    """The file of a model's figures."""
    return home() / "development" / config.profile / f"decision_{model}.json"


def table(found: dict) -> str:
    """The figures per severity and per corruption at high as text, in percent."""
    columns = ("never", "always", "either", "own", "calls")
    lines = [f"{'':18}" + "".join(f"{name:>9}" for name in columns)]
    for part in ("severity", "corruption"):
        for name, row in found[part].items():
            lines.append(f"{name:18}" + "".join(f"{100 * row[column]:9.1f}" for column in columns))
    odds = found.get("odds_of_a_call_where_it_helps")
    if odds:
        estimate, *ends = (_bounded(odds[key]) for key in ("estimate", "low", "high"))
        lines.append(
            f"odds of a call where it helps, within kind and level: {estimate} times those where it harms "
            f"[{', '.join(ends)}]"
        )
    return "\n".join(lines)


def _bounded(value: float | None) -> str:
    """A ratio; "–" where few questions, or a perfect decision, bound it by nothing."""
    return "–" if value is None or not np.isfinite(value) else f"{value:.1f}"


def draw(path: Path, frame: "pd.DataFrame", title: str) -> None:
    """Accuracy in percent against the share of pictures that are restored, one panel per severity.

    `frame` has the columns of clear.bench.decision.outcomes. The curve restores the pictures first that the model most
    wants to; the straight line is a random choice, the star the oracle, the dot the model's own decision.
    """
    levels = [name for name in SEVERITIES if (frame["severity"] == name).any()]
    with plots.figure_file(path, 1, len(levels), (3.1 * len(levels), 3.4), sharex=True) as (figure, axes):
        for axis, level in zip(axes[0], levels, strict=True):
            rows = frame[frame["severity"] == level]
            calls, values = decision.curve(rows)
            direct, restored = rows["direct"].to_numpy(bool), rows["restored"].to_numpy(bool)
            called = (rows["probability"] > decision.DECIDES).to_numpy()
            axis.plot(100 * calls, 100 * values, color=plots.COLOURS["grpo"], linewidth=2, label="by its probability")
            ends = [100 * values[0], 100 * values[-1]]
            axis.plot([0, 100], ends, color=plots.COLOURS["base"], linewidth=1, linestyle="--", label="at random")
            own = 100 * np.where(called, restored, direct).mean()
            axis.plot(
                100 * called.mean(), own, "o", color=plots.COLOURS["grpo"], markersize=8, label="its own decision"
            )
            helped = 100 * (restored & ~direct).mean()
            axis.plot(
                helped,
                100 * (restored | direct).mean(),
                "*",
                color=plots.COLOURS["sft_direct"],
                markersize=11,
                label="oracle",
            )
            axis.set_title(LEVELS[level])
            axis.set_xlabel("pictures restored (%)")
        axes[0, 0].set_ylabel("right answers (%)")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
        figure.suptitle(title, fontsize=11)

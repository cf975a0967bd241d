"""The page docs/RESULTS.md: every figure over several seeds, pooled, with intervals clustered by image and seed.

A seed is a world of its own, so an image belongs to one seed and the bootstrap over images is one over both; how much a
figure moves from seed to seed is shown beside it. With few seeds the interval says how certain the pooled figure is
for *these* trainings; the spread says how much the next one may differ.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from clear.bench import statistics
from clear.bench.models import MODELS
from clear.bench.scoring import HARD, SEVERITIES
from clear.bench.vlmeval import published
from clear.data.records import CLEAN
from clear.report import calling, claims, tables
from clear.report.claims import LEVELS, NAMES, Bootstrap, points
from clear.report.tables import Table

if TYPE_CHECKING:
    import pandas as pd

Frames = dict[int, "pd.DataFrame"]
SETTINGS = Bootstrap()
FEW = 20
"""Restorations; the mean of fewer is no figure of a model."""


def pooled(frames: Frames) -> "dict[str, pd.DataFrame]":
    """The rows of all seeds by model; samples and pairs are named after their seed too."""
    import pandas as pd

    parts = []
    for seed, frame in frames.items():
        pair = frame["pair"].where(frame["pair"] == "", f"{seed}/" + frame["pair"])
        parts.append(frame.assign(sample=f"{seed}/" + frame["sample"], pair=pair, seed=seed))
    whole = pd.concat(parts, ignore_index=True)
    return {
        model: whole[whole["model"] == model].reset_index(drop=True) for model in MODELS if model in set(whole["model"])
    }


@dataclass(frozen=True)
class Ablation:
    """A run with something changed: `what` in words, the predictions of one model by seed, the names of the ablations
    that it is compared with besides the run without the change, what it was made under, and the kinds of damage that
    alone count beside clean pictures (none: all)."""

    what: str
    frames: Frames
    against: tuple[str, ...] = ()
    setting: str = ""
    kinds: tuple[str, ...] = ()

    def counted(self, frames: Frames) -> "tuple[str, pd.DataFrame]":
        """The model of `frames` by seed and its pooled rows that count."""
        ((model, rows),) = pooled(frames).items()
        return model, rows[rows["corruption"].isin([CLEAN, *self.kinds])].reset_index(drop=True) if self.kinds else rows


def page(
    frames: Frames, ablations: dict[str, Ablation] | None = None, others: dict[str, Ablation] | None = None
) -> str:
    """The whole page as Markdown; `frames` are the files of clear/project/seeds.py by seed, `ablations` by name.

    `others` are ablations that cannot be compared with those, because they ran under another setting: other parameters,
    other code, or another machine's training. What ran under the same setting is compared all the same.
    """
    ablations, others = ablations or {}, others or {}
    pairs = side_by_side(frames, ablations), side_by_side({}, others)
    shown = {name for name, run in others.items() for other in run.against if _beside(others, run, other)}
    shown |= {other for name in shown for other in others[name].against}
    models = pooled(frames)
    found = calling.figures(models, SETTINGS)
    decided = claims.evaluate(models, SETTINGS)
    parts = [
        "# Results over seeds",
        f"Made by `make results`, {len(frames)} seed{'s' if len(frames) > 1 else ''} ({', '.join(map(str, frames))}): "
        "each is a world of its own, with its pictures, questions and trainings. Intervals (95 %) are a bootstrap over "
        "the images of all seeds, a minimal pair being one image; “(x–y)” is the smallest and the largest seed."
        + (
            ""
            if len(frames) > 2
            else " **Fewer than three seeds: nothing here says what another training would give.**"
        ),
        "## What it must show",
        must_show(models, found).markdown(),
        "## Models",
        accuracy(models).markdown(),
        "## By task, hard",
        by_task(models).markdown(),
        "## Claims",
        tables.claims_table(decided, SETTINGS.confidence).markdown(),
        "## CLEAR minus direct fine-tuning",
        lead(models, found).markdown(),
        "## By corruption, hard",
        tables.restorations(found["corruptions"][HARD], HARD, SETTINGS.confidence).markdown(),
        "## When it restores",
        tables.odds(found["odds"], SETTINGS.confidence).markdown(),
        "## Beside other figures",
        gains(models).markdown(),
    ]
    if ablations:
        parts += ["## Ablations", one_change(frames, ablations).markdown()]
    if pairs[0].rows:
        parts += ["### Both models under the same change", pairs[0].markdown()]
    if pairs[1].rows:
        parts += ["### Under another setting", pairs[1].markdown(), ELSEWHERE]
    if left := [name for name in others if name not in shown]:
        parts.append(f"Run under other parameters, or code with other results, and left out: {', '.join(left)}.")
    return "\n\n".join(parts) + "\n"


def _by_seed(frame: "pd.DataFrame", severity: str, column: str = "correct") -> np.ndarray:
    return frame[frame["severity"] == severity].groupby("seed")[column].mean().to_numpy()


def accuracy(models: "dict[str, pd.DataFrame]") -> Table:
    """Accuracy of every model at every level: the mean of the seeds, and the smallest and largest."""
    rows = []
    for model, frame in models.items():
        row = [NAMES[model]]
        for severity in SEVERITIES:
            values = 100 * _by_seed(frame, severity)
            row.append(f"{values.mean():.1f} ({values.min():.1f}–{values.max():.1f})")
        row.append(f"{100 * drop(models, model):.1f}")
        calls = [100 * _by_seed(frame, level, "restored").mean() for level in (CLEAN, HARD)]
        row.append(f"{calls[0]:.1f} → {calls[1]:.1f}" if any(calls) else "–")
        rows.append([*row, f"{_by_seed(frame, HARD, 'tokens').mean():.1f}"])
    caption = (
        "Percent: mean (smallest–largest seed). The drop is what is lost from clean to hard, as a share of clean; "
        "tokens are those a model writes for a hard question, without the pictures between them."
    )
    header = ["model", *LEVELS.values(), "drop", "restores, clean → hard", "tokens"]
    return Table(header, rows, caption)


def by_task(models: "dict[str, pd.DataFrame]") -> Table:
    """Accuracy at hard per task and model, the mean of the seeds."""
    hard = {name: frame[frame["severity"] == HARD] for name, frame in models.items()}
    means = {
        name: frame.groupby(["task", "seed"])["correct"].mean().groupby("task").mean() for name, frame in hard.items()
    }
    asked = next(iter(hard.values())).groupby("task").size()
    rows = [
        [task, str(number), *(f"{100 * means[name][task]:.1f}" for name in means)] for task, number in asked.items()
    ]
    return Table(["task", "questions", *(NAMES[name] for name in means)], rows, "Percent of right answers at hard.")


def lead(models: "dict[str, pd.DataFrame]", found: dict) -> Table:
    """CLEAR minus direct fine-tuning per level, pooled and seed by seed."""
    rows = []
    for level in SEVERITIES:
        own, direct = (100 * _by_seed(models[name], level) for name in ("grpo", "sft_direct"))
        pool = found["levels"][level]
        values = [points(pool[key], True) for key in ("estimate", "low", "high")]
        rows.append(
            [LEVELS[level], values[0], f"{values[1]} to {values[2]}", ", ".join(f"{v:+.1f}" for v in own - direct)]
        )
    return Table(["level", "points", "95 % interval", "seed by seed"], rows)


def drop(models: "dict[str, pd.DataFrame]", model: str) -> float:
    """Accuracy lost from clean to hard, as a share of the clean one (METHOD §7)."""
    clean, hard = (_by_seed(models[model], level).mean() for level in (CLEAN, HARD))
    return (clean - hard) / clean


def must_show(models: "dict[str, pd.DataFrame]", found: dict) -> Table:
    """The conditions that this project sets itself, each with its figure and whether it holds."""
    levels, rows = found["levels"], []

    def add(condition: str, figure: str, held: bool) -> None:
        rows.append([condition, figure, "holds" if held else "**does not hold**"])

    hard = levels[HARD]
    enough = hard["estimate"] >= 0.03 and hard["low"] > 0
    add("CLEAR over direct fine-tuning at hard: at least 3 points", tables.signed_interval(hard), enough)
    for level in SEVERITIES[:-1]:
        one = levels[level]
        add(
            f"not behind it at {LEVELS[level]}: the interval above −{100 * claims.MARGIN:g} point",
            tables.signed_interval(one),
            one["low"] >= -claims.MARGIN,
        )
    own, base = drop(models, "grpo"), drop(models, "base")
    smaller = 1 - own / base if base else 0.0
    add(
        "the drop from clean to hard: at least 40 % smaller than the base's",
        f"{100 * own:.1f} % against {100 * base:.1f} %: {100 * smaller:.0f} % smaller",
        smaller >= 0.4,
    )
    gained = {
        name: cell["minus_direct"]["estimate"]
        for name, cell in found["corruptions"][HARD].items()
        if cell["minus_direct"] and cell["minus_direct"]["estimate"] >= 0.05
    }
    listed = ", ".join(f"{name.replace('_', ' ')} {100 * value:+.1f}" for name, value in sorted(gained.items()))
    add("at least three kinds of damage with a gain of 5 points at hard", listed or "none", len(gained) >= 3)
    odds = found["odds"] and found["odds"]["within"]
    ratio = "–" if not odds else f"× {odds['estimate']:.1f}"
    add(
        "within a kind and level, the odds of a restoration at least twice as high where the base fails",
        ratio,
        bool(odds) and odds["estimate"] >= 2,
    )
    return Table(["condition", "measured", ""], rows)


def gains(models: "dict[str, pd.DataFrame]") -> Table:
    """Relative gains over the base beside what the project's brief hoped for and what the paper reports."""
    hoped = {"low": "15–20 % (“mild”)", "mid": "25–35 % (“moderate”)", "high": "–"}
    printed, rows = published.gains(), []
    for level in SEVERITIES[1:]:
        base, own = (_by_seed(models[name], level).mean() for name in ("base", "grpo"))
        theirs = f"{100 * printed[level]:+.1f} %" if level in printed else "–"
        gain = f"{100 * base:.1f} → {100 * own:.1f}", f"{100 * (own / base - 1):+.1f} %"
        rows.append([LEVELS[level], *gain, hoped[level], theirs])
    caption = (
        "Gain of CLEAR over the base, relative. A gain cannot exceed what the damage took: where the base still "
        "answers nine of ten questions, it is about ten percent at most. The paper's is that of CLEAR-RL over BAGEL in "
        "the mean of the benchmarks that it prints for both, on photographs (METHOD §7); at low and mid it prints no "
        "figure of BAGEL."
    )
    header = ["level", "base → CLEAR", "relative gain", "hoped for in the brief", "the paper's"]
    return Table(header, rows, caption)


def one_change(frames: Frames, ablations: dict[str, Ablation]) -> Table:
    """Each ablation against the same model of the same seeds without the change, on the same questions."""
    rows = []
    for name, run in ablations.items():
        model, own = run.counted(run.frames)
        _, default = run.counted(_of(frames, model, run.frames))
        row = [f"`{name}`: {run.what}", NAMES[model], _seeds(run.frames)]
        row += _differences({f"the ablation {name}": own, "the run without its change": default})
        hard = own[own["severity"] == HARD]
        was = default[default["severity"] == HARD]
        gained = (hard["psnr_restored"] - hard["psnr_degraded"]).dropna()
        row.append(f"{100 * was['restored'].mean():.1f} → {100 * hard['restored'].mean():.1f}")
        row.append("–" if len(gained) < FEW else f"{gained.mean():+.1f}")
        rows.append(row)
    caption = (
        "Points against the run of the same seed with everything as it is, paired by question; the restored share is "
        "that of the hard questions, in percent, and the last column what a restoration gains there in PSNR, of at "
        f"least {FEW} restorations. Where no answer differs, both ends of the interval are 0, and up to "
        f"{100 * _unseen(frames):.1f} points, with all kinds of damage, can stay hidden on one seed. Of "
        f"{3 * len(rows)} intervals one in twenty is expected to miss 0 by chance."
    )
    return Table(["changed", "model", "seeds", "clean", "mid", "hard", "restored at hard", "dB"], rows, caption)


def _unseen(frames: Frames) -> float:
    """The largest effect, as a share, that leaves no trace in the images of one seed with a probability of 5 %."""
    rows = [frame[frame["model"] == "base"].reset_index(drop=True) for frame in frames.values()]
    return 1 - 0.05 ** (1 / min(len(np.unique(statistics.clusters(frame))) for frame in rows))


def _of(frames: Frames, model: str, seeds: Iterable[int]) -> Frames:
    return {seed: frames[seed][frames[seed]["model"] == model] for seed in seeds}


def _seeds(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(seeds)))


ELSEWHERE = (
    "Not made under the setting of the committed run (other parameters or code, or a machine whose processor rounds "
    "otherwise and so trains another base), these are compared with each other alone."
)


def _beside(ablations: dict[str, Ablation], run: Ablation, other: str) -> list[int]:
    """The seeds for which the ablation `other` is there too, made under the same setting as `run`."""
    found = ablations.get(other)
    return [seed for seed in run.frames if seed in found.frames] if found and found.setting == run.setting else []


def side_by_side(frames: Frames, ablations: dict[str, Ablation]) -> Table:
    """Each ablation against those it names; before them, of the seeds in `frames`, CLEAR against direct fine-tuning."""
    pairs = []
    for name, run in ablations.items():
        for other in run.against:
            if common := _beside(ablations, run, other):
                beside = ablations[other]
                of = f"`{name}`: {run.what}", f"`{other}`: {beside.what}"
                pairs.append((common, run, *of, run.frames, beside.frames))
    as_it_is = {(tuple(common), run.kinds): run for common, run, *_ in pairs if set(common) <= set(frames)}
    for (common, _), run in as_it_is.items():
        models = (_of(frames, model, common) for model in ("grpo", "sft_direct"))
        pairs.insert(0, (list(common), run, "everything as it is", "everything as it is", *models))
    rows = []
    for common, run, name, other, *both in pairs:
        (first, own), (second, beside) = (run.counted({seed: one[seed] for seed in common}) for one in both)
        right = [f"{100 * frame[frame['severity'] == HARD]['correct'].mean():.1f}" for frame in (own, beside)]
        kinds = ", ".join(run.kinds).replace("_", " ") or "all"
        what = [f"{NAMES[first]}, {name}", f"{NAMES[second]}, {other}", kinds, _seeds(common)]
        rows.append([*what, *right, *_differences({what[0]: own, what[1]: beside})])
    caption = "Right at hard in percent, and the first minus the second in points, paired by question."
    return Table(["model", "against", "damage", "seeds", "right", "against’s", "clean", "mid", "hard"], rows, caption)


def _differences(frames: "dict[str, pd.DataFrame]") -> list[str]:
    """The first of two minus the second at three levels, with intervals, paired by question; errors name them."""
    remedy, row = "delete its file in data/results and make it again (`make ablations`, `make results`)", []
    for level in (CLEAN, "mid", HARD):
        a, b, clusters = claims.paired(frames, *frames, level, "{}", remedy)
        row.append(tables.signed_interval(asdict(statistics.paired_difference(a, b, clusters, **vars(SETTINGS)))))
    return row

"""The report of a run: the same blocks as Markdown (report.md) and as one self-contained page (index.html).

`build` gathers the blocks from predictions, metrics, curves and run records and draws the plots; `markdown` and `html`
only write them out. Nothing is loaded from the network: plots are inlined in the page. A model without
predictions is named in the first lines and left out of every table; it is never replaced or averaged over.
"""

import base64
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from clear.bench.models import MODELS
from clear.bench.predictions import metrics
from clear.bench.scoring import HARD
from clear.data.io import write_text
from clear.report import gallery, plots, tables
from clear.report.claims import LEVELS, Bootstrap, Claim
from clear.report.markdown import as_prose, fenced
from clear.report.tables import Table
from clear.report.verdict import remarks, verdict

if TYPE_CHECKING:
    import pandas as pd

TEMPLATE = Path(__file__).parent / "template.html"


@dataclass(frozen=True)
class Figure:
    """A picture in the report's folder (path relative to it) with what it shows and what to see in it."""

    file: str
    caption: str


@dataclass(frozen=True)
class Quote:
    """Text shown letter by letter, with a title."""

    title: str
    text: str


@dataclass(frozen=True)
class Folded:
    """A table behind a title, closed at first on the page."""

    title: str
    table: Table


Block = str | Table | Figure | Quote | Folded


@dataclass
class Section:
    """A heading and its blocks."""

    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass(frozen=True)
class Inputs:
    """Everything a report is made of.

    `frames` {model: predictions}, `claims` decided on them, `curves` {stage: frame of data/plots/<stage>.csv},
    `stage_metrics` {name: data/metrics/<name>.json}, `records` {stage: run record}, `examples` from gallery.collect.
    `calling` from calling.figures, `beyond` {model: {row: figures}} for what is not part of MMD-Bench.
    """

    profile: str
    frames: dict[str, "pd.DataFrame"]
    claims: list[Claim]
    curves: dict[str, "pd.DataFrame"]
    stage_metrics: dict[str, dict]
    records: dict[str, dict]
    examples: list["gallery.Example"]
    bootstrap: Bootstrap
    calling: dict = field(default_factory=dict)
    beyond: dict[str, dict[str, dict]] = field(default_factory=dict)


def build(inputs: Inputs, folder: Path) -> tuple[list[str], list[Section]]:
    """Draw all plots into `folder`/plots and return the first lines of the report and its sections."""
    settings = vars(inputs.bootstrap)
    measured = {name: metrics(inputs.frames[name], **settings) for name in MODELS if name in inputs.frames}
    lines = [verdict(inputs.claims, inputs.frames, inputs.bootstrap)]
    missing = [name for name in MODELS if name not in inputs.frames]
    if missing:
        files = ", ".join(f"data/predictions/{name}.parquet" for name in missing)
        lines.append(
            f"Incomplete: {len(missing)} of {len(MODELS)} models have no predictions ({files}). They are absent from "
            "every table and plot below, nothing is averaged over them, and claims about them are not measured."
        )
    lines += remarks(inputs.claims, inputs.calling)
    sections = [
        Section("What was claimed, and what held", [tables.claims_table(inputs.claims, inputs.bootstrap.confidence)]),
        _results(inputs, measured, folder),
        _restoring(inputs, folder),
        _detail(measured, folder),
        _training(inputs.curves, folder),
        _restoration(measured, folder),
        _examples(inputs.examples, folder),
        _cost(inputs.records),
        _data(inputs.stage_metrics),
        _reproduce(inputs.profile),
    ]
    if inputs.beyond:
        sections.insert(4, Section("Beyond MMD-Bench", [tables.beyond(inputs.beyond)]))
    return lines, sections


def _results(inputs: Inputs, measured: dict[str, dict], folder: Path) -> Section:
    section = Section("Results")
    if not measured:
        section.blocks.append("No model was evaluated.")
        return section
    plots.accuracy(folder / "plots/accuracy.png", measured, inputs.bootstrap.confidence)
    plots.calls(folder / "plots/call_rate.png", measured)
    section.blocks += [
        tables.results(measured),
        Figure(
            "plots/accuracy.png",
            "Accuracy against damage. To see: every line falls to the right; the flatter it is, the more robust the "
            "model. Models are shifted sideways a little so that their bars stay readable. The comparison that counts "
            "is the paired one in the table of claims, which is sharper than two overlapping bars.",
        ),
        Figure(
            "plots/call_rate.png",
            "How often a model restores the image before it answers. To see: a flat line restores without looking; a "
            "rise says only that worse damage is restored more, the odds below say whether need decides. The base and "
            "the direct baseline cannot restore.",
        ),
    ]
    return section


def _restoring(inputs: Inputs, folder: Path) -> Section:
    section, found = Section("When it restores, and whether that pays"), inputs.calling
    if not found.get("corruptions"):
        section.blocks.append("CLEAR has no predictions on degraded images.")
        return section
    confidence = inputs.bootstrap.confidence
    if found["odds"]:
        section.blocks.append(tables.odds(found["odds"], confidence))
    for severity, cells in found["corruptions"].items():
        table = tables.restorations(cells, severity, confidence)
        if severity != HARD:
            section.blocks.append(Folded(f"The same at {LEVELS[severity]}", table))
            continue
        plots.restorations(folder / "plots/restorations.png", cells, confidence)
        caption = (
            "Per kind of damage at hard, most restored first. To see: whether CLEAR restores a few kinds wholesale and "
            "the others never, and whether it leads where it restores. Filled: the whole interval is on one side of 0."
        )
        section.blocks += [Figure("plots/restorations.png", caption), table]
    return section


def _detail(measured: dict[str, dict], folder: Path) -> Section:
    section = Section("Per corruption and per kind of question")
    if any(name != "clean" for name in measured.get("grpo", {}).get("corruption", {})):
        plots.corruptions(folder / "plots/corruptions.png", measured)
        section.blocks.append(
            Figure(
                "plots/corruptions.png",
                "Left: right answers of CLEAR in percent, dark is low. Right: difference to the base model in points, "
                "purple is better than the base, orange is worse; the largest gain at hard is on top. To see: where "
                "restoring helps. One cell holds few questions, so single cells are noisy; read rows and columns.",
            )
        )
    else:
        section.blocks.append("CLEAR has no predictions on degraded images, so there is no picture per corruption.")
    if measured:
        section.blocks.append(tables.tasks(measured))
    return section


def _training(curves: dict[str, "pd.DataFrame"], folder: Path) -> Section:
    section = Section("Training")
    if plots.losses(folder / "plots/losses.png", curves):
        section.blocks.append(
            Figure(
                "plots/losses.png",
                "Training loss per stage and phase; pale: recorded values, dark: running mean. To see: a loss that "
                "falls and flattens. Losses of different phases measure different things and must not be compared.",
            )
        )
    if "grpo" in curves and plots.rewards(folder / "plots/rewards.png", curves["grpo"]):
        section.blocks.append(
            Figure(
                "plots/rewards.png",
                "Reinforcement learning. To see: reward rises and true accuracy on held-out images rises with it (if "
                "only the reward rises, it is being gamed); the share of restorations collapses neither to 0 nor to 1; "
                "the ratio error stays at rounding level (rollout and training compute the same probabilities).",
            )
        )
    if not section.blocks:
        section.blocks.append("No training curve was recorded.")
    return section


def _restoration(measured: dict[str, dict], folder: Path) -> Section:
    plots.quality(folder / "plots/quality.png", measured)
    caption = (
        "Likeness to the clean image before (hollow) and after (filled) restoration, averaged over the images that the "
        "model chose to restore, so the hollow points differ between models. To see: filled above hollow means "
        "that restoring brought the image closer to the clean one. Both are measured at the model's own input size."
    )
    return Section("Restored against degraded images", [Figure("plots/quality.png", caption)])


def _examples(examples: list["gallery.Example"], folder: Path) -> Section:
    section = Section("Examples")
    if not examples:
        section.blocks.append("No restored pictures were kept in the predictions of CLEAR, so there are no examples.")
        return section
    section.blocks.append(
        "Each strip shows the clean image, the degraded one that the models see, and what CLEAR restored from it, at "
        "the size the model works with. Examples are taken in turn over the corruptions, hardest level first, among "
        "the images that CLEAR restored; they are not chosen by whether the answer is right."
    )
    for number, example in enumerate(examples, 1):
        file = f"plots/example_{number:02d}.png"
        plots.pictures(folder / file, example.panels)
        section.blocks.append(Figure(file, example.caption))
        section.blocks += [Quote(title, text) for title, text in example.traces]
    return section


def _cost(records: dict[str, dict]) -> Section:
    if not records:
        return Section("Time and memory", ["No run records are here: this report was made without running the stages."])
    return Section("Time and memory", [tables.times(records)])


def _data(stage_metrics: dict[str, dict]) -> Section:
    section = Section("Data")
    source, checks = stage_metrics.get("source", {}), stage_metrics.get("validate")
    images = source.get("images")
    if isinstance(images, dict):
        counts = ", ".join(f"{name} {count}" for name, count in images.items())
        section.blocks.append(f"Clean images per split (no image is in two splits): {counts}.")
    if checks is None:
        section.blocks.append(
            "Validation: no data/metrics/validate.json is here, so the data of this run is unchecked."
        )
    else:
        section.blocks.append(tables.validation(checks))
    baseline = source.get("blind_baseline", {})
    if isinstance(baseline, dict) and isinstance(baseline.get("bench"), dict):
        section.blocks.append(tables.blind(baseline["bench"]))
    if not stage_metrics:
        section.blocks.append("No stage metrics are here (data/metrics).")
    for name, value in stage_metrics.items():
        rows = [[key, text] for key, text in tables.flat(value)]
        section.blocks.append(Folded(f"All figures of stage {name} ({len(rows)})", Table(["figure", "value"], rows)))
    return section


def _reproduce(profile: str) -> Section:
    return Section(
        "How to reproduce, and what this is not",
        [
            Quote(
                "Commands",
                "make venv                  # the locked environment, once\n"
                "make repro                 # every stage that is out of date, then this table in the terminal\n"
                "python -m clear results    # the result table beside the committed one\n"
                "python -m clear report     # this report again",
            ),
            f"This report is of the profile “{profile}”. On the same machine a second run gives the same bytes; on "
            "another processor the last digits of training differ, and the terminal shows both results side by side.",
            "Not comparable with the published CLEAR figures: the images here are rendered scenes, not photographs; in "
            "the small profiles the model has about a million parameters and sees 48 × 48 pixels; the questions are "
            "this project's own, made in six families that stand in for the six published benchmarks; and an answer is "
            "judged by exact match, not by a language model. What can be compared is the direction of an effect "
            "within this report, between models that share one base.",
        ],
    )


def markdown(profile: str, lines: list[str], sections: list[Section]) -> str:
    """The report in GitHub's Markdown; pictures are links to files beside it."""
    parts = [f"# CLEAR report, profile {profile}", *(f"**{as_prose(line)}**" for line in lines)]
    for section in sections:
        parts.append(f"## {section.title}")
        parts += map(block_markdown, section.blocks)
    return "\n\n".join(parts) + "\n"


def block_markdown(block: Block) -> str:
    """A block in GitHub's Markdown: its texts, which may come from questions and models, are shown as they are."""
    if isinstance(block, Table):
        return block.escaped().markdown() if block.rows else as_prose(block.caption)
    if isinstance(block, Figure):
        return f"![{Path(block.file).stem}]({block.file})\n\n*{as_prose(block.caption)}*"
    if isinstance(block, Quote):
        return f"{as_prose(block.title)}:\n\n{fenced(block.text)}"
    if isinstance(block, Folded):
        return f"<details><summary>{as_prose(block.title)}</summary>\n\n{block_markdown(block.table)}\n\n</details>"
    return as_prose(block)


def html(profile: str, lines: list[str], sections: list[Section], folder: Path) -> str:
    """The report as one page with the pictures of `folder` inlined."""
    return page(TEMPLATE, folder, _mark, profile=profile, lines=lines, sections=sections)


def page(template: Path, folder: Path, mark: Callable[[str], tuple[str, str]], **values) -> str:
    """One self-contained page: `template` extends page.html, pictures are read from `folder` and inlined.

    `mark` gives a table cell's class (good, bad, unknown, number or none) and the text to show. The page's `sections`
    have a title and blocks.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, TEMPLATE.parent]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["kind"] = lambda block: type(block).__name__
    environment.filters["inline"] = lambda file: base64.b64encode((folder / file).read_bytes()).decode()
    environment.filters["mark"] = mark
    return environment.get_template(template.name).render(**values)


_MARKS = {
    "HELD, NOT CERTAIN": ("unknown", "(✓) "),
    "HELD": ("good", "✓ "),
    "DOES NOT HOLD": ("bad", "✗ "),
    "NOT MEASURED": ("unknown", "? "),
}


def _mark(cell: str) -> tuple[str, str]:
    kind, sign = _MARKS.get(cell, ("", ""))
    if not kind and cell and cell[0] in "0123456789+-–" and len(cell) < 30:
        kind = "number"
    return kind, sign + cell


def write(inputs: Inputs, folder: Path) -> None:
    """Write report.md, index.html and plots/*.png into `folder`; plots of an earlier report are removed first."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in (folder / "plots").glob("*.png"):
        old.unlink()
    lines, sections = build(inputs, folder)
    write_text(folder / "report.md", markdown(inputs.profile, lines, sections))
    write_text(folder / "index.html", html(inputs.profile, lines, sections, folder))

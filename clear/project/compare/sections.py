"""The parts of a comparison's report, in the order in which a reviewer asks: what it means, where, why, at what cost.

Every part is a title with tables, figures, quotes and sentences; clear.project.compare.render writes them as Markdown
or as a page. ▲ and ▼ mark a certain difference (clear/project/compare/differences.py says when it is one).
"""

from dataclasses import dataclass, field
from pathlib import Path

from clear.bench.scoring import HARD, SEVERITIES
from clear.bench.statistics import Interval
from clear.data.records import CLEAN
from clear.project.compare import changes, plots
from clear.project.compare.differences import TITLES, Comparison, Difference
from clear.project.compare.verdict import Verdict, gap
from clear.report import plots as drawing
from clear.report.claims import LEVELS, points
from clear.report.render import Figure, Folded, Quote
from clear.report.tables import ABOUT, Table

Block = str | Table | Figure | Quote | Folded
MARKS = {1: " ▲", -1: " ▼", 0: ""}
ARROWS = {1: " ↑", -1: " ↓", 0: ""}  # for what is neither good nor bad in itself


@dataclass
class Part:
    """A titled piece of the report. `open` parts are shown unfolded in the comment, `page` parts on the page only."""

    title: str
    blocks: list[Block] = field(default_factory=list)
    open: bool = False
    page: bool = False


def lines(comparison: Comparison, verdict: Verdict) -> list[str]:
    """What stands above everything else: the verdict first, then what the reader must know about it."""
    sides = f"Base: {comparison.base.origin}. Head: {comparison.head.origin}."
    if comparison.base.profile and comparison.base.profile == comparison.head.profile:
        sides += f" Profile: {comparison.base.profile}."
    noted = [*comparison.notes, *verdict.notes]
    if comparison.obstacles and comparison.joined:
        noted.insert(0, "The models that both sides have are compared below; that is no verdict on the change.")
    return [f"{verdict.kind} – {verdict.sentence}", *noted, sides]


def build(comparison: Comparison, verdict: Verdict, folder: Path | None = None) -> list[Part]:
    """All parts. With `folder` figures are drawn into it; without, there are none."""
    model = verdict.policy.model
    parts = [Part("The gate", [_rules(verdict)], open=True)]
    if comparison.joined:
        parts += [
            _levels(comparison, model, folder),
            Part("Robustness and the clean guard", [_robustness(comparison, verdict)]),
            Part("How often it restores", [_calls(comparison)]),
        ]
    if comparison.obstacles:
        parts.append(Part("Each side alone", [changes.alone(comparison.base, comparison.head)], open=True))
    if model in comparison.joined:
        parts += [
            Part("Per corruption", _corruptions(comparison, model, folder)),
            Part("Per kind of question", [_cells(comparison.tasks, model, "task", SEVERITIES)]),
            _answers(comparison, verdict, folder),
        ]
    if comparison.joined:
        parts.append(Part("Tests and sizes", [_tests(comparison, model)]))
    parts += [_data(comparison), _training(comparison), _params(comparison), _cost(comparison)]
    for other in (name for name in comparison.joined if name != model):
        tables = [
            Folded(
                f"{TITLES[other]}: per corruption", _cells(comparison.corruptions, other, "corruption", SEVERITIES[1:])
            ),
            Folded(f"{TITLES[other]}: per kind of question", _cells(comparison.tasks, other, "task", SEVERITIES)),
        ]
        parts.append(Part(f"{TITLES[other]} in detail", [f"{TITLES[other]}: {ABOUT[other]}.", *tables], page=True))
    parts.append(Part("Provenance", [changes.provenance(comparison.base, comparison.head)]))
    return parts


def _rules(verdict: Verdict) -> Table:
    words = {True: "✓ kept", False: "✗ broken", None: "? not decided"}
    rows = [[words[rule.kept], rule.name, rule.reason] for rule in verdict.rules]
    outcome = {0: "The gate passes.", 1: "The gate FAILS.", 2: "The gate cannot decide."}[verdict.status]
    return Table(
        ["", "rule", "what decided"],
        rows,
        f"{outcome} A rule on accuracy is broken only when the whole interval lies below what is allowed.",
    )


def _order(comparison: Comparison, model: str) -> list[str]:
    """The gate's model first, the others in the order of the report."""
    return sorted(comparison.joined, key=lambda name: name != model)


def _levels(comparison: Comparison, model: str, folder: Path | None) -> Part:
    rows = []
    for name in _order(comparison, model):
        cells = (comparison.level(name, severity) for severity in SEVERITIES)
        rows.append([TITLES[name], *(_both(difference) for difference in cells)])
    table = Table(
        ["model", *(LEVELS[severity] for severity in SEVERITIES)],
        rows,
        f"Right answers in percent, base → head, with the paired difference in points and its "
        f"{100 * comparison.settings.confidence:g} % interval (bootstrap over images; a minimal pair counts as one). "
        "▲ ▼: certain, also by the exact test by image, corrected for all comparisons of this table (Holm).",
    )
    blocks: list[Block] = [table]
    if folder:
        plots.accuracy(folder / "accuracy.png", comparison)
        blocks.append(
            Figure(
                "accuracy.png",
                "Accuracy against damage, base hollow and dashed, head solid. Each bar is one side's own interval; the "
                "paired differences in the table are sharper than two overlapping bars suggest.",
            )
        )
    return Part("Accuracy", blocks, open=True)


def _both(difference: Difference | None, marks: dict[int, str] = MARKS) -> str:
    if difference is None:
        return "–"
    return f"{points(difference.base)} → {points(difference.head)} ({gap(difference, '')}){marks[difference.sign]}"


def _cells(differences: list[Difference], model: str, column: str, severities: tuple[str, ...]) -> Table:
    """Differences of one model, one row per task or corruption, one column per severity."""
    own = {(getattr(d, column), d.severity): d for d in differences if d.model == model}
    rows = []
    for name in sorted({name for name, _ in own}):
        cells = [own.get((name, severity)) for severity in severities]
        shown = [
            "–" if difference is None else f"{gap(difference, '')}{MARKS[difference.sign]}" for difference in cells
        ]
        rows.append([name.replace("_", " "), *shown])
    sizes = sorted({d.n for d in own.values()})
    each = f"{sizes[0]} to {sizes[-1]} questions" if len(sizes) > 1 else f"{sizes[0]} questions" if sizes else "nothing"
    return Table(
        [{"task": "kind of question"}.get(column, column), *(LEVELS[severity] for severity in severities)],
        rows,
        f"{TITLES[model]}, head minus base in points with intervals; each cell holds {each}, so single cells are "
        f"noisy: of {len(own)} intervals about {len(own) * (1 - _confidence(own)):.0f} miss 0 by chance. ▲ ▼: certain "
        "after correction for all cells of this table.",
    )


def _confidence(differences: dict[tuple[str, str], Difference]) -> float:
    return next(iter(differences.values())).confidence if differences else 1.0


def _corruptions(comparison: Comparison, model: str, folder: Path | None) -> list[Block]:
    blocks: list[Block] = [_cells(comparison.corruptions, model, "corruption", SEVERITIES[1:])]
    if folder and any(d.model == model for d in comparison.corruptions):
        plots.heat_map(folder / "corruptions.png", comparison, model)
        caption = (
            "The same differences as a map: purple is better at head, orange is worse, a ring marks a certain one."
        )
        blocks.insert(0, Figure("corruptions.png", caption))
    return blocks


def _robustness(comparison: Comparison, verdict: Verdict) -> Table:
    margin, rows = verdict.policy.clean_margin, []
    for name in _order(comparison, verdict.policy.model):
        sides = comparison.robustness(name)
        clean = comparison.level(name, CLEAN)
        rows.append(
            [
                TITLES[name],
                " → ".join(points(sides[side]["absolute"]) for side in ("base", "head")),
                " → ".join(points(sides[side]["relative"]) for side in ("base", "head")),
                _ratio_gap(comparison.relative.get(name)),
                "–" if clean is None else gap(clean, ""),
                "not measured" if clean is None or clean.low is None else _guard(clean, margin),
            ]
        )
    return Table(
        [
            "model",
            "hard (%)",
            "hard / clean (%)",
            "its change",
            "clean, head minus base",
            "clean guard",
        ],
        rows,
        "Absolute robustness is the accuracy at hard, relative robustness its share of the clean accuracy (its change: "
        "head minus base, with the cluster-bootstrap interval). The guard "
        f"allows clean accuracy to fall by {points(margin)} points: “kept” if the whole interval is above that, "
        "“broken” if the whole interval is below.",
    )


def _ratio_gap(interval: Interval | None) -> str:
    if interval is None:
        return "not measured"
    return f"{points(interval.estimate, True)} [{points(interval.low, True)}, {points(interval.high, True)}]"


def _guard(clean: Difference, margin: float) -> str:
    if clean.low >= -margin:
        return "kept"
    return "not certain" if clean.high >= -margin else "broken"


def _calls(comparison: Comparison) -> Table:
    rows = []
    for name in comparison.joined:
        own = {d.severity: d for d in comparison.calls if d.model == name}
        if any(d.base or d.head for d in own.values()):
            rows.append([TITLES[name], *(_both(own.get(severity), ARROWS) for severity in SEVERITIES)])
    return Table(
        ["model", *(LEVELS[severity] for severity in SEVERITIES)],
        rows,
        "Answers before which the model restored the image, in percent, base → head, with the paired difference. ↑ ↓: "
        "certain."
        if rows
        else "No compared model restored anything.",
    )


def _tests(comparison: Comparison, model: str) -> Table:
    rows = []
    for d in sorted(comparison.levels, key=lambda difference: difference.model != model):
        counts = [f"{d.only_base:,}", f"{d.only_head:,}", probability(d.p), probability(d.holm)]
        detectable = points(d.detectable if d.only_base or d.only_head else None)
        rows.append([TITLES[d.model], LEVELS[d.severity], *counts, detectable, f"{d.n:,}", f"{d.clusters:,}"])
    return Table(
        [
            "model",
            "level",
            "only base right",
            "only head right",
            "p, by image",
            "Holm p",
            "detectable",
            "questions",
            "image groups",
        ],
        rows,
        "“Detectable” is the smallest true difference in points that a sample of this size would find with 80 % power. "
        "p is of an exact test that swaps the two sides of whole image groups, so that questions about one image count "
        "as one piece of evidence.",
    )


def probability(p: float) -> str:
    """A p-value with three decimals."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _answers(comparison: Comparison, verdict: Verdict, folder: Path | None) -> Part:
    shown, told = plots.examples(comparison, verdict.policy.model, verdict.policy.pictures)
    blocks: list[Block] = [told]
    for number, example in enumerate(shown, 1):
        if folder and example.panels:
            file = f"example_{number:02d}.png"
            drawing.pictures(folder / file, example.panels)
            blocks.append(Figure(file, example.caption))
        else:
            blocks.append(example.caption)
        blocks += [Quote(title, text) for title, text in example.traces]
    return Part("Answers that changed", blocks)


def _data(comparison: Comparison) -> Part:
    base, head = comparison.base, comparison.head
    return Part(
        "Data",
        [
            changes.images(base, head),
            changes.samples(base, head),
            "Other figures of the data stages that differ:",
            changes.data_figures(base, head),
        ],
    )


def _training(comparison: Comparison) -> Part:
    table, warning = changes.rewards(comparison.base, comparison.head)
    hard = comparison.level("grpo", HARD)
    blocks: list[Block] = [warning] if warning else []
    blocks.append(table)
    if hard:
        blocks.append(f"True accuracy of {TITLES['grpo']} on the benchmark at hard: {_both(hard)}.")
    return Part("Reward and true accuracy", blocks)


def _params(comparison: Comparison) -> Part:
    base, head = comparison.base, comparison.head
    return Part(
        "Parameters, code and versions",
        [changes.params(base, head), changes.upstream(base, head), changes.versions(base, head)],
    )


def _cost(comparison: Comparison) -> Part:
    means = {
        name: tuple(float(one.rows[f"tokens_{side}"].mean()) for side in ("base", "head"))
        for name, one in comparison.joined.items()
    }
    blocks: list[Block] = [changes.latency(comparison.base, comparison.head, means)] if means else []
    return Part("Time", [*blocks, changes.times(comparison.base, comparison.head)])

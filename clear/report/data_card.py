"""The data card of a release: what a model was trained and judged on, in counts, hashes and the verdict of validation.

Everything is taken from tracked metrics and dvc.lock, so equal commits have equal cards.
"""

from dataclasses import dataclass, field

from clear.bench.scoring import SEVERITIES
from clear.data.records import CLEAN, INCOMING
from clear.report.card import LICENSE, SOURCES
from clear.report.markdown import as_prose, as_text
from clear.report.tables import Table
from clear.schema import Config

_DAMAGED = tuple(level for level in SEVERITIES if level != CLEAN)
_COLUMNS = {"sft": "fine-tuning", "rl": "GRPO", "validation": "held out"}
_APART = "apart from MMD-Bench"


@dataclass(frozen=True)
class DataFacts:
    """What a data card says. `metrics` are those of data/metrics by name; `tracked` the data's outputs and inputs in
    dvc.lock, path → {size, nfiles, md5}."""

    tag: str
    config: Config
    metrics: dict[str, dict] = field(default_factory=dict)
    tracked: dict[str, dict] = field(default_factory=dict)


def render(facts: DataFacts) -> str:
    """The card as Markdown."""
    parts = [
        f"# Data of {as_text(facts.tag)}",
        "## Source and licence",
        _source(facts),
        "## Samples",
        _samples(facts),
        "## Damage by type and severity",
        _damage(facts),
        "## Validation",
        _validation(facts),
        "## Hashes",
        _hashes(facts),
        "## Known limits",
        "\n".join(f"- {limit}" for limit in _limits(facts)),
    ]
    return "\n\n".join(parts) + "\n"


def _source(facts: DataFacts) -> str:
    kind = facts.config.source.kind
    licence = LICENSE if kind == "scenes" else "their own"
    text = f"Source `{kind}`: {SOURCES[kind]}. Licence: {licence}. Seed {facts.config.seed}."
    if facts.config.traces.kind == "teacher":
        text += f" Demonstrations were written by {facts.config.teacher.model}; the terms of its provider apply."
    return as_prose(text)


def _samples(facts: DataFacts) -> str:
    metrics = facts.metrics.get("source", {})
    questions = metrics.get("questions", {})
    rows = [
        [split, f"{images:,}", f"{_all(questions[split]):,}" if split in questions else "–"]
        for split, images in sorted(metrics.get("images", {}).items())
    ]
    if not rows:
        return "Not counted: data/metrics/source.json is not part of this commit."
    return Table(["split", "images", "questions"], rows, "No image is in two splits.").markdown()


def _all(questions: int | dict[str, int]) -> int:
    """Of scenes they are counted by task."""
    return questions if isinstance(questions, int) else sum(questions.values())


def _damage(facts: DataFacts) -> str:
    """Pictures of each kind of damage at low / mid / hard, or of no level, by what they are for."""
    degrade, bench = (facts.metrics.get(stage, {}) for stage in ("degrade", "mmd_bench"))
    sets = degrade.get("incoming", {}).get("sets", {})
    counts = {
        title: degrade.get("images", {}).get(split, {})
        | {f"{INCOMING}/{name}": {INCOMING: came[split]} for name, came in sets.items() if came.get(split)}
        for split, title in _COLUMNS.items()
    }
    cells = bench.get("degraded", {}).get("cells", {})
    counts["MMD-Bench"] = {
        kind: {level: cell["images"] for level, cell in levels.items()} for kind, levels in cells.items()
    }
    counts[_APART] = {
        f"{INCOMING}/{name}": {INCOMING: came["images"]} for name, came in bench.get("incoming", {}).items()
    }
    counts = {title: found for title, found in counts.items() if found}
    kinds = sorted({kind for found in counts.values() for kind in found})
    if not kinds:
        return "Nothing was degraded, or it was not counted."

    def cell(levels: dict[str, int]) -> str:
        if not levels.keys() - {INCOMING}:
            return str(sum(levels.values()))
        return " / ".join(str(levels.get(level, 0)) for level in _DAMAGED)

    rows = [[kind.replace("_", " "), *(cell(found.get(kind, {})) for found in counts.values())] for kind in kinds]
    version = degrade.get("protocol_version")
    caption = "Pictures at low / mid / hard; one number where the pictures came with their damage." + (
        f" Protocol {version}." if version else ""
    )
    if _APART in counts:
        caption += " What is apart from MMD-Bench every model was asked about, too; no figure of MMD-Bench counts it."
    return Table(["damage", *counts], rows, caption).markdown()


def _validation(facts: DataFacts) -> str:
    checks = facts.metrics.get("validate")
    if checks is None:
        return "Not validated: data/metrics/validate.json is not part of this commit."
    verdict = "Every check passed." if checks.get("success") is True else "**Checks failed.**"
    rows = []
    for name, found in sorted(checks.get("datasets", {}).items()):
        failed = ", ".join(str(item.get("expectation")) for item in found.get("failed", [])) or "none"
        rows.append([name, *(str(found.get(key, "–")) for key in ("images", "questions", "expectations")), failed])
    text = f"{verdict} Rejected rows: {checks.get('rejected', '?')}."
    return (
        f"{text}\n\n{Table(['data set', 'images', 'questions', 'checks', 'failed'], rows).markdown()}" if rows else text
    )


def _hashes(facts: DataFacts) -> str:
    rows = [
        [f"`{path}`", str(out.get("nfiles", 1)), str(out.get("size", "–")), f"`{out.get('md5', '–')}`"]
        for path, out in sorted(facts.tracked.items())
    ]
    if not rows:
        return "dvc.lock names no data."
    return Table(["data", "files", "bytes", "MD5 in dvc.lock"], rows).markdown()


def _limits(facts: DataFacts) -> list[str]:
    limits = ["Damage is synthetic, except that of sets below data/incoming; other damage is not represented."]
    if facts.config.source.kind == "scenes":
        limits.append(
            "Pictures are rendered scenes: there are no photographs, no people and no text but single letters."
        )
    elif facts.config.source.kind == "llava_onevision":
        limits.append("Subsets have licences of their own, which this card cannot sum up; some forbid commercial use.")
    limits.append("Answers are as right as their source: validation checks pictures and form, not every answer.")
    return limits

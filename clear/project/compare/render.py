"""Writes a comparison: Markdown for a forge's comment, one self-contained page, JSON with every number.

The Markdown holds no pictures (a comment cannot carry them) and stays below LIMIT: parts that do not fit are named in
its last lines and are on the page. Its first line is the verdict, its last the marker by which the comment is found
again and replaced.
"""

import tempfile
from dataclasses import asdict
from pathlib import Path

from clear.bench.models import MODELS
from clear.data.io import write_json, write_text
from clear.project.compare import changes, sections
from clear.project.compare import verdict as verdicts
from clear.project.compare.comment import LIMIT, MARKER
from clear.project.compare.differences import Comparison, Difference, changed_answers
from clear.project.compare.load import Side
from clear.project.compare.sections import Part
from clear.project.compare.verdict import Verdict
from clear.report.markdown import as_prose
from clear.report.render import Figure, block_markdown, page

TEMPLATE = Path(__file__).parent / "template.html"
FORMATS = ("md", "html", "json")
FILES = {"md": "compare.md", "html": "compare.html", "json": "compare.json"}


def write(comparison: Comparison, verdict: Verdict, folder: Path, formats: tuple[str, ...] = FORMATS) -> list[Path]:
    """Write the report in the given formats into `folder` and return the files."""
    written = []
    for name in formats:
        file = folder / FILES[name]
        if name == "json":
            write_json(file, to_json(comparison, verdict))
        else:
            write_text(file, markdown(comparison, verdict) if name == "md" else html(comparison, verdict))
        written.append(file)
    return written


def markdown(comparison: Comparison, verdict: Verdict, limit: int = LIMIT) -> str:
    """The report as a comment of at most `limit` bytes in UTF-8."""
    first, *rest = (as_prose(line) for line in sections.lines(comparison, verdict))
    kind = verdict.kind
    text = "\n\n".join([f"**{kind}**{first.removeprefix(kind)}", *rest])
    parts = [part for part in sections.build(comparison, verdict) if not part.page]
    text, left_out = _fitted(text, [(part.title, _part(part)) for part in parts], limit - _END)
    end = "Plots, pictures and the other models in detail are on the page (`clear compare … --format html`)."
    if left_out:
        end += f" Left out here for length: {', '.join(left_out)}."
    return f"{text}\n\n{end}\n\n{MARKER}\n"


_END = 1_500
"""Bytes kept free for the last lines."""


def _fitted(text: str, parts: list[tuple[str, str]], room: int) -> tuple[str, list[str]]:
    """`text` with as many parts as fit into `room` bytes, in order, and the titles of the others."""
    left_out, size = [], len(text.encode())
    for title, part in parts:
        added = len(part.encode()) + 2
        if size + added > room:
            left_out.append(title)
        else:
            text, size = f"{text}\n\n{part}", size + added
    return text, left_out


def _part(part: Part) -> str:
    body = "\n\n".join(filter(None, (block_markdown(block) for block in part.blocks if not isinstance(block, Figure))))
    if part.open:
        return f"### {part.title}\n\n{body}"
    return f"<details><summary>{part.title}</summary>\n\n{body}\n\n</details>"


def html(comparison: Comparison, verdict: Verdict) -> str:
    """The report as one page with its pictures inlined; nothing is loaded from elsewhere."""
    with tempfile.TemporaryDirectory(prefix="clear-compare-") as made:
        folder = Path(made)
        parts = sections.build(comparison, verdict, folder)
        first, *rest = sections.lines(comparison, verdict)
        first = first.removeprefix(verdict.kind)
        return page(TEMPLATE, folder, _mark, kind=verdict.kind, first=first, lines=rest, sections=parts)


def _mark(cell: str) -> tuple[str, str]:
    if cell.endswith("▲") or cell.startswith("✓"):
        return "good", cell
    return "bad" if cell.endswith("▼") or cell.startswith("✗") else "", cell


def to_json(comparison: Comparison, verdict: Verdict) -> dict:
    """Every number of the comparison as plain values."""
    return verdicts.to_json(verdict) | {
        "obstacles": comparison.obstacles,
        "notes": [*comparison.notes, *verdict.notes],
        "settings": asdict(comparison.settings),
        "base": _side(comparison.base),
        "head": _side(comparison.head),
        "shared": {
            name: {
                "questions": len(one.rows),
                "base": one.base_rows,
                "head": one.head_rows,
                "changed_answers": len(changed_answers(one)),
            }
            for name, one in comparison.joined.items()
        },
        "accuracy": [_difference(one) for one in comparison.levels],
        "tasks": [_difference(one) for one in comparison.tasks],
        "corruptions": [_difference(one) for one in comparison.corruptions],
        "call_rate": [_difference(one) for one in comparison.calls],
        "robustness": {
            name: comparison.robustness(name)
            | {"relative_difference": vars(comparison.relative[name]) if name in comparison.relative else None}
            for name in comparison.joined
        },
        "params": _triples(comparison.base.params, comparison.head.params),
        "metrics": {
            name: _triples(comparison.base.metrics.get(name, {}), comparison.head.metrics.get(name, {}))
            for name in sorted(comparison.base.metrics.keys() | comparison.head.metrics.keys())
        },
        "versions": _triples(comparison.base.pins, comparison.head.pins),
    }


def _difference(difference: Difference) -> dict:
    return asdict(difference) | {"certain": difference.sign}


def _triples(base: dict, head: dict) -> dict[str, list]:
    return {key: [old, new] for key, old, new in changes.differing(base, head)}


def _side(side: Side) -> dict:
    names = ("name", "origin", "commit", "profile", "lock_sha", "missing", "records")
    own = {name: getattr(side, name) for name in names}
    return own | {"models": [name for name in MODELS if name in side.frames]}

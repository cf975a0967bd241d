"""Tables of the report, as plain cells, and their forms for Markdown and for the terminal.

Every figure comes from the tracked metrics of the stage evaluate (METHOD §7) or from the claims; averages are
computed here, never typed in. Shares are shown in percent, differences in points.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from clear.bench.models import MODELS
from clear.bench.predictions import metrics
from clear.bench.scoring import CLEAN, HARD, SEVERITIES
from clear.data.io import aligned
from clear.report.claims import LEVELS, NAMES, STRATIFIED, Claim, points
from clear.report.markdown import as_prose

if TYPE_CHECKING:
    import pandas as pd

ABOUT = {
    "base": "never saw a degraded question",
    "sft_direct": "fine-tuned to answer directly; the matched baseline",
    "sft": "fine-tuned to restore when needed, bridge untrained",
    "reencode": "bridge model, but the restored image is decoded and encoded again",
    "bridge": "reads its restored latents through the trained bridge",
    "grpo": "the bridge model after reinforcement learning (GRPO)",
}
"""What each model is, in one line."""


@dataclass(frozen=True)
class Table:
    """Cells of a table with its caption; every row has as many cells as the header."""

    header: list[str]
    rows: list[list[str]]
    caption: str = ""

    def markdown(self) -> str:
        """The table in GitHub's Markdown."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        text = "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)
        return f"{text}\n\n{self.caption}" if self.caption else text

    def escaped(self) -> "Table":
        """The same table for `markdown`, where its texts come from data: see `as_prose`."""
        header, *rows = ([as_prose(cell) for cell in line] for line in (self.header, *self.rows))
        return Table(header, rows, as_prose(self.caption))

    def text(self) -> str:
        """The table in aligned plain text: the first column to the left, the others to the right."""
        return "\n".join(aligned([self.header, *self.rows], gap="  "))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def beyond(found: dict[str, dict[str, dict]]) -> Table:
    """Accuracy per model, one row per set of naturally degraded images and per further degradation and level."""
    models = [name for name in MODELS if name in found]
    rows = list(dict.fromkeys(row for name in models for row in found[name]))
    cells = []
    for row in rows:
        figures = [found[name].get(row) for name in models]
        questions = next(f["questions"] for f in figures if f)
        cells.append([row, str(questions), *("" if f is None else f"{100 * f['accuracy']:.1f}" for f in figures)])
    caption = (
        "Accuracy in percent on naturally degraded images (data/incoming) and on degradations beyond the sixteen. No "
        "figure of MMD-Bench counts them."
    )
    return Table(["set or degradation", "questions", *(NAMES[name] for name in models)], cells, caption)


def claims_table(claims: list[Claim], confidence: float) -> Table:
    """One row per claim: verdict, estimate, interval, smallest detectable effect, what decides."""
    rows = []
    for claim in claims:
        signed = claim.id != "base_clean"
        show = _ratio if claim.unit == "odds" else points
        interval = f"{show(claim.low, signed)} to {show(claim.high, signed)}" if claim.measured else "–"
        size = f"{claim.n} / {claim.clusters}" if claim.measured else "–"
        what = f"Rule: {claim.rule}. {claim.note}".strip()
        detectable, estimate = show(claim.detectable), show(claim.estimate, signed)
        rows.append([claim.verdict.upper(), claim.text, estimate, interval, detectable, size, what])
    level = f"{confidence * 100:g} %"
    return Table(
        ["verdict", "claim", "estimate", f"{level} interval", "detectable", "answers / images", "how it is decided"],
        rows,
        "Estimates, intervals and detectable effects are in percentage points (×: odds ratios). The interval is a "
        f"{level} bootstrap over images (a minimal pair counts as one image). “Detectable” is the smallest true effect "
        "that a sample of this size would find with 80 % power: a smaller difference can stay hidden. “Not certain” "
        "means that the estimate keeps the rule but part of its interval does not.",
    )


def _ratio(value: float | None, _: bool = False) -> str:
    return "–" if value is None else f"× {value:.2f}"


def odds(found: dict[str, dict | None], confidence: float) -> Table:
    """How much more often CLEAR restores where the base model fails, by `odds` of calling.figures."""
    rows = []
    for name, title in STRATIFIED.items():
        one = found[name]
        ends = [_ratio(one and one[end]) for end in ("low", "high")]
        rows.append([title, _ratio(one and one["estimate"]), " to ".join(ends), str(one["n"]) if one else "–"])
    return Table(
        [
            "odds of a restoration, base wrong against base right",
            "ratio",
            f"{confidence * 100:g} % interval",
            "answers",
        ],
        rows,
        "Does CLEAR restore when it needs to? × 1 means that a restoration has nothing to do with whether the base "
        "model fails. The first row compares answers about equally damaged images only (Mantel-Haenszel over kinds and "
        "levels, bootstrap over images). The last row mixes the kinds: it is large as soon as the kinds that hurt the "
        "base most are restored most, even by a model that never looks at the question.",
    )


def restorations(cells: dict[str, dict], severity: str, confidence: float) -> Table:
    """Per corruption at one level, most restored first: `corruptions[severity]` of calling.figures."""
    others = [model for model in ("direct", "base") if any(cell["all"][model] is not None for cell in cells.values())]
    rows = []
    for name, cell in cells.items():
        shares = [cell[part]["clear"] for part in ("restored", "not_restored", "all")]
        row = [name.replace("_", " "), *map(points, [cell["call_rate"], *shares, *(cell["all"][m] for m in others)])]
        if "direct" in others:
            row.append(signed_interval(cell["minus_direct"]))
        rows.append([*row, f"{cell['questions']} / {cell['images']}"])
    header = [f"damage, {LEVELS[severity]}", "restored", "right, restored", "right, not restored", "right"]
    header += [f"right, {model}" for model in others]
    header += [f"CLEAR − direct [{confidence * 100:g} %]"] * ("direct" in others)
    return Table(
        [*header, "answers / images"],
        rows,
        "In percent, differences in points; most restored first. Restored and not restored answers of a row are about "
        "different questions, so their difference is no effect of restoring; CLEAR − direct compares the same ones. Of "
        f"{len(cells)} such intervals about {len(cells) * (1 - confidence):.0f} miss 0 by chance.",
    )


def results(measured: dict[str, dict]) -> Table:
    """Models × levels in percent with call rate and missing answers; `measured` is {model: metrics of evaluate}."""
    rows = []
    for model in (name for name in MODELS if name in measured):
        found = measured[model]
        cells = [_percent_interval(found, severity) for severity in SEVERITIES]
        calls = " / ".join(points(found["call_rate"].get(severity)) for severity in SEVERITIES)
        kept = points(found["robustness"]["relative"])
        rows.append(
            [NAMES[model], *cells, points(found["average"]), kept, calls, str(found["no_answer"]), ABOUT[model]]
        )
    counts = (
        [next(iter(measured.values()))["questions"].get(severity, 0) for severity in SEVERITIES] if measured else []
    )
    mixed = (
        ""
        if len(set(counts)) < 2
        else " The mix of tasks differs a little; claims that compare levels use the questions asked at every level."
    )
    asked = ", ".join(f"{LEVELS[severity]} {count}" for severity, count in zip(SEVERITIES, counts, strict=False))
    return Table(
        [
            "model",
            *(LEVELS[severity] for severity in SEVERITIES),
            "average",
            "hard / clean",
            "restored (clean / low / mid / hard)",
            "no answer",
            "what it is",
        ],
        rows,
        f"Right answers in percent, with the interval in brackets. Questions asked: {asked}.{mixed} “Average” is the "
        "mean of the four levels, “hard / clean” the share of the clean accuracy that is left at hard, “restored” the "
        "percentage of answers before which the model restored the image, “no answer” the number of outputs without an "
        "answer (counted as wrong).",
    )


def signed_interval(found: dict | None) -> str:
    """An estimate with its interval, in points; a dash where nothing was measured."""
    if found is None:
        return "–"
    return f"{points(found['estimate'], True)} [{points(found['low'], True)}, {points(found['high'], True)}]"


def _percent_interval(found: dict, severity: str) -> str:
    if severity not in found["accuracy"]:
        return "–"
    low, high = found["interval"][severity]
    return f"{points(found['accuracy'][severity])} [{points(low)}, {points(high)}]"


def tasks(measured: dict[str, dict]) -> Table:
    """Tasks × models, clean and hard accuracy in percent, with the minimal pairs scored as pairs in the last row."""
    models = [name for name in MODELS if name in measured]
    names = sorted({task for found in measured.values() for task in found["task"]})
    rows = []
    for task in names:
        levels = [measured[model]["task"].get(task, {}) for model in models]
        rows.append([task, *(f"{points(level.get(CLEAN))} → {points(level.get(HARD))}" for level in levels)])
    pairs = [measured[model].get("pair", {}) for model in models]
    caption = "Right answers in percent, clean → hard, per kind of question."
    if any(pairs):
        both = [[level.get(severity, {}).get("accuracy") for severity in (CLEAN, HARD)] for level in pairs]
        rows.append(["both halves of a pair", *(f"{points(clean)} → {points(hard)}" for clean, hard in both)])
        counts = [pairs[0].get(severity, {}) for severity in (CLEAN, HARD)]
        whole = " and ".join(str(level.get("pairs", 0)) for level in counts)
        caption += (
            " In the last row two images that differ in one detail count as right only if both are answered correctly "
            f"({whole} whole pairs at clean and hard)."
        )
    return Table(["kind of question", *(NAMES[model] for model in models)], rows, caption)


PIPELINE = (
    "source",
    "degrade",
    "mmd_bench",
    "validate",
    "base",
    "traces",
    "sft",
    "sft_direct",
    "bridge",
    "grpo",
    *(f"evaluate_{model}" for model in MODELS),
)
"""Stages in the order in which they run; others follow by name."""


def times(records: dict[str, dict]) -> Table:
    """Stage times and peak memory from run records, with the total time.

    A record may hold `seconds` and `peak_gib`, or `peak_mb` and `children_peak_mb` (MiB) as clear.data.workspace does.
    """
    order = sorted(records, key=lambda stage: (PIPELINE.index(stage) if stage in PIPELINE else len(PIPELINE), stage))
    peaks = {stage: _peak_gib(records[stage]) for stage in order}
    seconds = {stage: records[stage].get("seconds") for stage in order}
    rows = [[stage, _clock(seconds[stage]), _memory(peaks[stage])] for stage in order]
    known = [value for value in peaks.values() if value is not None]
    total = sum(value for value in seconds.values() if value is not None)
    rows.append(["all stages", _clock(total), _memory(max(known, default=None))])
    return Table(
        ["stage", "time (min:s)", "peak memory (GiB)"],
        rows,
        "Measured on the machine that made this report. The last line is the sum of the times and the largest memory. "
        "A stage that was resumed counts its last part only.",
    )


def _peak_gib(record: dict) -> float | None:
    if record.get("peak_gib") is not None:
        return record["peak_gib"]
    found = [record[name] / 1024 for name in ("peak_mb", "children_peak_mb") if record.get(name) is not None]
    return max(found, default=None)


def _memory(gib: float | None) -> str:
    return "–" if gib is None else f"{gib:.2f}"


def _clock(seconds: float | None) -> str:
    return "–" if seconds is None else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def validation(checks: dict) -> Table:
    """The verdict on every dataset, from `validate.json` ({success, rejected, datasets: {name: {…, failed}}})."""
    rows = []
    for name, found in checks.get("datasets", {}).items():
        failed = [_plain(item["expectation"]) for item in found.get("failed", [])]
        counts = [_plain(found.get(key)) for key in ("images", "questions", "expectations")]
        rows.append([name, *counts, ", ".join(failed) or "none"])
    passed = "Every check passed" if checks.get("success") else "NOT every check passed"
    return Table(
        ["dataset", "images", "questions", "checks", "failed checks"],
        rows,
        f"{passed}; samples rejected: {_plain(checks.get('rejected'))}. A failed check stops the pipeline.",
    )


def blind(baseline: dict[str, dict]) -> Table:
    """How far the question's text alone carries, from `source.json`: {task: {accuracy, chance, count}}."""
    rows = [
        [task, points(found.get("accuracy")), points(found.get("chance")), str(found.get("count", "–"))]
        for task, found in sorted(baseline.items(), key=lambda item: (item[0] == "total", item[0]))
    ]
    return Table(
        ["kind of question", "right without the image (%)", "chance (%)", "questions"],
        rows,
        "The blind baseline answers from the text of the question alone, with what it saw most often in training. It "
        "should be near chance: then a right answer needs the image.",
    )


def flat(value: dict, prefix: str = "") -> list[tuple[str, str]]:
    """Nested metrics as (dotted name, text) pairs, lists joined, floats with four significant digits."""
    result = []
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, dict):
            result += flat(item, f"{name}.")
        elif isinstance(item, list | tuple):
            result.append((name, ", ".join(_plain(part) for part in item) or "none"))
        else:
            result.append((name, _plain(item)))
    return result


def _plain(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def terminal(current: dict[str, dict], committed: dict[str, dict] | None = None) -> str:
    """The result table in plain text; `committed` ({model: metrics}) adds the committed figures below each model.

    A committed row is followed by the difference in points; `*` marks one outside this run's own interval.
    """
    header = ["model", *(LEVELS[severity] for severity in SEVERITIES), "average", "calls at hard", "no answer"]
    rows = []
    for model in MODELS:
        if model in current:
            rows.append(_terminal_row(NAMES[model], current[model]))
        elif committed and model in committed:
            rows.append([f"{NAMES[model]} (not run)", *["–"] * (len(header) - 1)])
        if committed and model in committed:
            rows.append(_terminal_row("  committed", committed[model]))
            if model in current:
                rows.append(_difference_row(current[model], committed[model]))
    missing = [NAMES[model] for model in MODELS if model not in current]
    lines = ["MMD-Bench, right answers in percent", Table(header, rows).text()]
    if missing:
        lines.append(f"Not evaluated: {', '.join(missing)}.")
    if committed:
        lines.append("difference = this run minus committed, in points; * = outside this run's interval.")
    return "\n".join(lines)


def _terminal_row(name: str, found: dict) -> list[str]:
    levels = [points(found["accuracy"].get(severity)) for severity in SEVERITIES]
    calls = points(found["call_rate"].get(HARD))
    return [name, *levels, points(found["average"]), calls, str(found["no_answer"])]


def _difference_row(current: dict, committed: dict) -> list[str]:
    cells = []
    for severity in SEVERITIES:
        now, before = current["accuracy"].get(severity), committed["accuracy"].get(severity)
        if now is None or before is None:
            cells.append("–")
            continue
        low, high = current["interval"][severity]
        cells.append(points(now - before, True) + ("" if low <= before <= high else "*"))
    calls = [found["call_rate"].get(HARD) for found in (current, committed)]
    averages = [found["average"] for found in (current, committed)]
    cells += ["–" if None in pair else points(pair[0] - pair[1], True) for pair in (averages, calls)]
    return ["  difference", *cells, f"{current['no_answer'] - committed['no_answer']:+d}"]


def result_table(frames: dict[str, "pd.DataFrame"]) -> str:
    """The result table of prediction frames ({model: frame}) in plain text."""
    return terminal({model: metrics(frame) for model, frame in frames.items()})

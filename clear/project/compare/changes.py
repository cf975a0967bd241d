"""What else differs between two sides: parameters, data, code behind each stage, package versions, cost.

Plain facts without statistics, each as a table that is empty where nothing differs. Run records (times, latency) are
of this machine and count for a revision only if its dvc.lock has the stage as the workspace has it; otherwise the cell
says `not recorded`.
"""

import re
from collections.abc import Iterator
from typing import Any

from clear.bench.models import MODELS
from clear.bench.scoring import SEVERITIES
from clear.data.records import CLEAN, INCOMING
from clear.project.compare.differences import TITLES
from clear.project.compare.figures import REWARDS
from clear.project.compare.load import BENCH, LOCK, Side, outputs
from clear.report.claims import LEVELS, points
from clear.report.tables import PIPELINE, Table

ABSENT, UNRECORDED = "absent", "not recorded"
DATA_STAGES = ("source", "degrade", "mmd_bench", "validate", "traces")
TRAINING_SPLITS = ("sft", "rl")
PACKAGES = ("torch", "transformers")
PER_CELL = re.compile(r"^images\.(sft|rl|validation)\.|\.(psnr|ssim)\.|^degraded\.cells\.")
"""Figures per corruption and severity: counted in a table of their own, or too many to read."""


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of nested dictionaries; a list is a leaf."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from leaves(item, f"{name}.{key}".lstrip("."))
    else:
        yield name, value


def differing(base: Any, head: Any) -> list[tuple[str, Any, Any]]:
    """(dotted key, base, head) of every leaf in which two nested dictionaries differ; ABSENT where one has none."""
    old, new = dict(leaves(base)), dict(leaves(head))
    keys = [key for key in old | new if key]
    return [(key, old.get(key, ABSENT), new.get(key, ABSENT)) for key in keys if _differ(old, new, key)]


def _differ(old: dict, new: dict, key: str) -> bool:
    return key not in old or key not in new or old[key] != new[key]


def plain(value: Any) -> str:
    """A value as a cell: floats with six digits, lists joined, nothing for an empty one."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _change(old: Any, new: Any) -> str:
    """Head's count with the change in brackets: `84 (+3)`."""
    if isinstance(old, int) and isinstance(new, int):
        return f"{new:,} ({new - old:+,})" if new != old else f"{new:,}"
    return plain(new) if old == new else f"{plain(old)} → {plain(new)}"


def params(base: Side, head: Side) -> Table:
    """Every parameter that differs."""
    rows = [[key, plain(old), plain(new)] for key, old, new in differing(base.params, head.params)]
    return Table(["parameter", "base", "head"], rows, "" if rows else "No parameter differs.")


def images(base: Side, head: Side) -> Table:
    """Samples, verdict of the data checks and leaks between training and benchmark, both sides."""
    rows = []
    counts = [side.metrics.get("source", {}).get("images", {}) for side in (base, head)]
    for split in dict.fromkeys([*counts[0], *counts[1]]):
        rows.append([f"clean images: {split}", *(plain(images.get(split, ABSENT)) for images in counts)])
    checks = [side.metrics.get("validate") for side in (base, head)]
    rows.append(["data checks", *("no record" if c is None else _passed(c) for c in checks)])
    rows.append(["rejected rows", *(plain((c or {}).get("rejected", UNRECORDED)) for c in checks)])
    for key, text in (
        ("images_shared_with_training", "images shared by training and benchmark"),
        ("samples_looking_like_training", "benchmark samples that look like a training sample"),
    ):
        rows.append([text, *(_worst(c, key) for c in checks)])
    traces = [side.metrics.get("traces", {}).get("traces", UNRECORDED) for side in (base, head)]
    rows.append(["demonstrations (traces)", *map(plain, traces)])
    return Table(["data", "base", "head"], rows)


def _passed(checks: dict) -> str:
    failed = sum(len(dataset.get("failed", [])) for dataset in checks.get("datasets", {}).values())
    return "all passed" if checks.get("success") is True else f"{failed} failed"


def _worst(checks: dict | None, key: str) -> str:
    values = [dataset[key] for dataset in (checks or {}).get("datasets", {}).values() if key in dataset]
    return plain(max(values)) if values else UNRECORDED


def samples(base: Side, head: Side) -> Table:
    """Degraded training images (sft and rl together) per corruption and severity at head, with the change."""
    counts = [_training_counts(side) for side in (base, head)]
    names = sorted({name for copies in counts for name, _ in copies})
    levels = {level: title for level, title in LEVELS.items() if level != CLEAN}
    if any(level == INCOMING for copies in counts for _, level in copies):
        levels[INCOMING] = "as it came"
    rows = []
    for name in [*names, ""] if names else []:
        kept = [{key: n for key, n in copies.items() if name in (key[0], "")} for copies in counts]
        cells = [[sum(n for (_, one), n in copies.items() if one == level) for copies in kept] for level in levels]
        rows.append([name.replace("_", " ") or "all", *(_change(*cell) for cell in [*cells, _sums(cells)])])
    caption = (
        "Degraded training images (splits sft and rl), at head; in brackets the change from base."
        if rows
        else "data/metrics/degrade.json is on neither side, so the samples per type are unknown."
    )
    return Table(["corruption", *levels.values(), "all"], rows, caption)


def _sums(cells: list[list[int]]) -> list[int]:
    return [sum(counts) for counts in zip(*cells, strict=True)]


def _training_counts(side: Side) -> dict[tuple[str, str], int]:
    splits, copies = side.metrics.get("degrade", {}).get("images", {}), {}
    for split in TRAINING_SPLITS:
        for name, severities in splits.get(split, {}).items():
            for severity, count in severities.items():
                copies[name, severity] = copies.get((name, severity), 0) + count
    return copies


def data_figures(base: Side, head: Side) -> Table:
    """Every other tracked figure of the data stages that differs; those per corruption are in the JSON alone."""
    rows = []
    for stage in DATA_STAGES:
        for key, old, new in differing(base.metrics.get(stage, {}), head.metrics.get(stage, {})):
            if not PER_CELL.search(key):
                rows.append([f"{stage}: {key}", plain(old), plain(new)])
    return Table(["figure", "base", "head"], rows, "" if rows else "None but those per corruption.")


def rewards(base: Side, head: Side) -> tuple[Table, str]:
    """GRPO's reward beside the true accuracy on held-out images, and a warning if only the reward rose."""
    finals = [side.metrics.get("grpo", {}) for side in (base, head)]
    rows = []
    for key, text in REWARDS.items():
        old, new = (final.get(key) for final in finals)
        gone = old is None or new is None
        change = "–" if gone else f"{new - old:+.4g}" if new != old else "0"
        rows.append([text, *(UNRECORDED if v is None else f"{v:.4g}" for v in (old, new)), change])
    gains = [
        None if any(final.get(key) is None for final in finals) else finals[1][key] - finals[0][key]
        for key in ("last_reward", "holdout_after")
    ]
    warning = ""
    if None not in gains and gains[0] > 0 > gains[1]:
        warning = (
            f"The reward rose by {gains[0]:.3f} while accuracy on held-out images fell by {points(-gains[1])} points: "
            "look for answers that please the reward and not the question."
        )
    return Table(["GRPO", "base", "head", "change"], rows), warning


def upstream(base: Side, head: Side) -> Table:
    """Per stage: which inputs dvc.lock has in another version, which parameters, and whether an output changed."""
    stages = sorted(base.lock.keys() | head.lock.keys(), key=_stage_order)
    made = outputs(base.lock).keys() | outputs(head.lock).keys()
    rows = []
    for stage in stages:
        old, new = base.lock.get(stage), head.lock.get(stage)
        if old == new:
            continue
        if old is None or new is None:
            rows.append([stage, "the stage is new" if old is None else "the stage is gone", "–", "–"])
            continue
        inputs = _changed_entries(old, new, "deps")
        # What another stage made is that stage's change; here only what it was made from counts.
        code = [path for path in inputs if path not in made]
        keys = [key for key, *_ in differing(old.get("params", {}), new.get("params", {}))]
        cause = ", ".join(code) or ("its data" if inputs else "–")
        told = ", ".join(key.replace("params.yaml.", "") for key in keys) or "–"
        rows.append([stage, cause, told, ", ".join(_changed_entries(old, new, "outs")) or "none"])
    caption = (
        f"From {LOCK}, that is what each stage was last run with; listed are stages in which anything differs. “Its "
        f"data” means that only outputs of earlier "
        "stages changed. “None” in the last column: run again with the same result."
        if rows
        else f"{LOCK} has the same version of every stage on both sides."
    )
    if not (base.lock and head.lock):
        caption = f"{LOCK} is missing on {'both sides' if not (base.lock or head.lock) else 'one side'}."
        rows = []
    return Table(["stage", "changed code", "changed parameters", "changed outputs"], rows, caption)


def _stage_order(stage: str) -> tuple[int, str]:
    name = stage.replace("@", "_")
    return (PIPELINE.index(name) if name in PIPELINE else len(PIPELINE), stage)


def _changed_entries(old: dict, new: dict, kind: str) -> list[str]:
    def hashes(stage: dict) -> dict[str, str]:
        return {entry["path"]: str(entry.get("md5")) for entry in stage.get(kind, [])}

    before, after = hashes(old), hashes(new)
    return sorted(path for path in before | after if before.get(path) != after.get(path))


def versions(base: Side, head: Side) -> Table:
    """Locked packages that differ."""
    rows = [[name, old, new] for name, old, new in sorted(differing(base.pins, head.pins))]
    return Table(["package", "base", "head"], rows, "" if rows else "No locked package differs.")


def times(base: Side, head: Side) -> Table:
    """Seconds per stage where a run record belongs to the side."""
    stages = [stage for stage in PIPELINE if stage in base.records or stage in head.records]
    rows = [[stage, *(_seconds(side.records.get(stage)) for side in (base, head))] for stage in stages]
    return Table(["stage", "base (s)", "head (s)"], rows, "" if rows else f"Stage times: {UNRECORDED} on this machine.")


def _seconds(record: dict | None) -> str:
    value = (record or {}).get("seconds")
    return UNRECORDED if value is None else f"{value:.1f}"


def latency(base: Side, head: Side, tokens: dict[str, tuple[float, float]]) -> Table:
    """Milliseconds per answer from run records, and tokens per answer, which depend on no machine."""
    rows = []
    for model in (name for name in MODELS if name in tokens):
        records = [side.records.get(f"evaluate_{model}", {}) for side in (base, head)]
        times = [record.get("milliseconds_per_question") for record in records]
        shown = [UNRECORDED if value is None else f"{value:.2f}" for value in times]
        rows.append([TITLES[model], *shown, *(f"{value:.2f}" for value in tokens[model])])
    return Table(
        ["model", "ms per answer, base", "head", "tokens per answer, base", "head"],
        rows,
        "Milliseconds are wall time per question of a whole batch on this machine; tokens are the mean over the shared "
        "questions.",
    )


def provenance(base: Side, head: Side) -> Table:
    """Where each side comes from, down to hashes."""
    import platform

    import numpy as np

    import clear

    def row(name: str, *values: str) -> list[str]:
        return [name, *(value or "–" for value in values)]

    rows = [
        row("named", base.name, head.name),
        row("read from", base.origin, head.origin),
        row("commit", base.commit, head.commit),
        row("profile", base.profile, head.profile),
        row("seed", *(plain(side.params.get("seed", "")) for side in (base, head))),
        row(f"{LOCK} (SHA-256)", base.lock_sha[:16], head.lock_sha[:16]),
        *(row(f"{path} ({LOCK})", base.hash_of(path), head.hash_of(path)) for path in BENCH),
        *(
            row(f"{name} (locked)", base.pins.get(name, ""), head.pins.get(name, ""))
            for name in ("torch", "transformers")
        ),
    ]
    tools = f"clear {clear.__version__}, Python {platform.python_version()}, numpy {np.__version__}"
    return Table(["", "base", "head"], rows, f"Compared with {tools}.")


def alone(base: Side, head: Side) -> Table:
    """What each side measured on its own benchmark, for sides that cannot be compared: no differences."""
    rows = []
    for model in MODELS:
        for label, side in (("base", base), ("head", head)):
            accuracy = side.metrics.get(f"evaluate_{model}", {}).get("accuracy", {})
            if accuracy:
                rows.append([TITLES[model], label, *(points(accuracy.get(severity)) for severity in SEVERITIES)])
    return Table(
        ["model", "side", *(LEVELS[severity] for severity in SEVERITIES)],
        rows,
        "Right answers in percent, each side on its own questions: a difference between two lines may come from the "
        "questions and says nothing about the models."
        if rows
        else "Neither side has the metrics of an evaluation (data/metrics/evaluate_*.json).",
    )

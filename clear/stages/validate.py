"""Stage `validate`: prove that the degraded data are what they claim to be.

Reads data/degraded/{sft,rl,validation}, data/bench/{clean,degraded,incoming}, data/development/{clean,degraded} and
the counts of data/metrics/degrade.json; writes data/metrics/validate.json, data/rejects/validate.parquet and, outside
DVC, Data Docs and the metrics of every sample (samples/<dataset>.parquet) in the report folder. All of it is written
before a failed expectation stops the stage, so that what failed can be looked up; nothing downstream runs. Naturally
degraded images are checked per set (`incoming_<name>`), over all its slices and as a whole.
"""

import json
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import pandas as pd

from clear.data.io import replacing, write_json
from clear.data.pool import parallel
from clear.data.records import INCOMING, read_samples
from clear.data.rejects import Reject, write_rejects
from clear.degradation.build import count_rows
from clear.degradation.protocol import CELLS, SEVERITIES, TRAINING_WEIGHTS
from clear.degradation.registry import chosen, extras, training_mix
from clear.errors import ClearError
from clear.schema import Config
from clear.validation import accept
from clear.validation import frames as columns
from clear.validation.expectations import Check, Failure, as_json, listed, run_checks
from clear.validation.suites import MONOTONE, clean_checks, degraded_checks, incoming_checks

DATASETS = {
    "degraded_sft": Path("data/degraded/sft"),
    "degraded_rl": Path("data/degraded/rl"),
    "degraded_validation": Path("data/degraded/validation"),
    "bench_clean": Path("data/bench/clean"),
    "bench_degraded": Path("data/bench/degraded"),
    "bench_extra": Path("data/bench/extra"),
    "bench_incoming": Path("data/bench/incoming"),
    "development_clean": Path("data/development/clean"),
    "development_degraded": Path("data/development/degraded"),
}
TRAINING = ("degraded_sft", "degraded_rl")
BENCH = ("bench_clean", "bench_degraded", "bench_extra")
DEVELOPMENT = ("development_clean", "development_degraded")
METRICS, REJECTS = Path("data/metrics/validate.json"), Path("data/rejects/validate.parquet")
COUNTED = Path("data/metrics/degrade.json")


def run(config: Config) -> None:
    """Check all datasets. Raises ClearError naming dataset, expectation and samples if any expectation fails."""
    from clear.data.workspace import report_dir

    frames = measured_frames(config.degrade.workers)
    checks = prepare(frames, config)
    failures = run_checks(frames, checks, report_dir() / "data_docs")
    rejects = list(rejected(frames, checks))
    write_rejects(REJECTS, rejects)
    for name, frame in frames.items():  # a run record, like the Data Docs
        file = report_dir() / "samples" / f"{name}.parquet"
        with replacing(file) as partial:
            frame.drop(columns="answers").to_parquet(partial, index=False)
    summaries = {name: summary(frame, failures[name], checks[name]) for name, frame in frames.items()}
    success = not any(failures.values())
    write_json(METRICS, {"success": success, "rejected": len(rejects), "datasets": summaries})
    if not success:
        raise ClearError(complaint(failures))


def measured_frames(workers: int) -> dict[str, pd.DataFrame]:
    """A frame of metrics per dataset, measured in one pool."""
    sizes = {name: count_rows(folder) for name, folder in DATASETS.items()}
    samples = chain.from_iterable(read_samples(folder) for folder in DATASETS.values())
    rows: Iterator = parallel(accept.measure_sample, samples, workers, sum(sizes.values()), "validate")
    return by_set({name: columns.build_frame(islice(rows, size)) for name, size in sizes.items()})


def by_set(frames: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The frames without naturally degraded images, followed by one frame `incoming_<name>` per set of those."""
    came, kept = [], {}
    for name, frame in frames.items():
        mine = frame["severity"].eq(INCOMING) | (name == "bench_incoming")
        came.append(frame[mine])
        kept[name] = frame[~mine].reset_index(drop=True)
    del kept["bench_incoming"]
    if kept["bench_extra"].empty:
        del kept["bench_extra"]
    for name, rows in pd.concat(came, ignore_index=True).groupby("corruption", sort=True):
        kept[f"incoming_{name}"] = rows.reset_index(drop=True)
    return kept


def incoming_counts() -> dict[str, dict]:
    """What stage degrade counted of every set of naturally degraded images, by name."""
    return json.loads(COUNTED.read_text()).get("incoming", {}).get("sets", {})


def prepare(frames: dict[str, pd.DataFrame], config: Config) -> dict[str, list[Check]]:
    """Add the columns that judge each dataset and return its checks."""
    names = chosen(config.degrade.plugins, config.degrade.presets)
    further, mix = extras(names), training_mix(names, config.degrade.held_out)
    bands, rules = columns.load_bands() | columns.further_bands(further), config.validate
    falling = set(TRAINING_WEIGHTS) - set(columns.NOT_MONOTONE) | {name for name, e in further.items() if e.monotone}
    even_corruptions = dict.fromkeys(TRAINING_WEIGHTS, 1)
    even_severities = dict.fromkeys(SEVERITIES, 1)
    drawn_severities = dict(zip(SEVERITIES, config.degrade.severity_weights, strict=True))
    all_levels = len(SEVERITIES) if config.mmd_bench.protocol == "row" else len(CELLS)
    copies = {
        "degraded_validation": config.degrade.validation_copies,
        "bench_degraded": all_levels,
        "development_degraded": all_levels,
        "bench_extra": len(SEVERITIES),
    }
    checks = {}
    came = {name: frame for name, frame in frames.items() if name.startswith("incoming_")}
    sets = incoming_counts()
    if unused := [name for name in sets if f"incoming_{name}" not in came]:
        raise ClearError(
            f"validate: data/incoming/{unused[0]}: none of its {sets[unused[0]]['rows']} rows can be used; "
            "data/rejects/incoming.parquet says why; correct them, or remove the set."
        )
    taught = [*(frames[split] for split in TRAINING), *(frame[frame["split"] != "bench"] for frame in came.values())]
    asked = [
        *(frames[name] for name in (*BENCH, *DEVELOPMENT) if name in frames),
        *(frame[frame["split"] == "bench"] for frame in came.values()),
    ]
    for name, frame in frames.items():
        limit = None
        if name in came:
            columns.add_shared_pictures(frame, taught, asked)
            checks[name] = incoming_checks(rules.duplicate_limit)
            if counts := sets.get(name.removeprefix("incoming_")):
                checks[name] += accept.set_checks(frame, counts["rows"], counts["rejected"], config.incoming.limits)
            elif name != f"incoming_{config.source.kind}":  # a source's own copies were judged with it, row by row
                raise ClearError(f"validate: {COUNTED} does not count {name}; run stage degrade again.")
            continue
        columns.add_answer_share(frame)
        if name in BENCH or name in DEVELOPMENT:
            limit = rules.duplicate_limit
            columns.add_shared_images(frame, taught if name in BENCH else [*taught, frames["bench_clean"]])
        if name.endswith("_clean"):
            checks[name] = clean_checks(limit)
            continue
        columns.add_protocol(frame, further)
        columns.add_psnr_bands(frame, bands)
        if name in TRAINING:
            columns.add_histograms(frame, mix, drawn_severities)
        elif name == "bench_extra":
            columns.add_histograms(frame, dict.fromkeys(further, 1), even_severities)
        else:
            columns.add_histograms(frame, even_corruptions, even_severities)
        checks[name] = degraded_checks(copies.get(name, 1), rules.alpha, rules.psnr_slack, limit, tuple(further))
        if limit is not None:  # every image at all levels: the means of a type are of the same pictures
            columns.add_monotone(frame, falling)
            checks[name].append(MONOTONE)
    return checks


def rejected(frames: dict[str, pd.DataFrame], checks: dict[str, list[Check]]) -> Iterator[Reject]:
    """Every sample that breaks a rule, and id `*` for a rule about a whole dataset; the reason is the check's name."""
    for name, frame in frames.items():
        for check in checks[name]:
            broken, detail = frame[check.failing(frame)], f"not true that {check.means}"
            if check.whole:
                yield from [Reject("*", name, check.name, detail)] * (len(broken) > 0)
                continue
            for key, problem in zip(broken["key"], broken["problem"], strict=True):
                yield Reject(key, name, check.name, problem or detail)


def summary(frame: pd.DataFrame, failures: list[Failure], checks: list[Check]) -> dict:
    """What validate.json says of one dataset."""
    found = {
        "images": len(frame),
        "questions": int(frame["questions"].sum()),
        "expectations": len(checks),
        "failed": as_json(failures),
        "luminance": _mean(frame["luminance"]),
        "sharpness": _mean(frame["sharpness"]),
        "entropy": _mean(frame["entropy"]),
    }
    if "shared_images" in frame:
        found["images_shared_with_training"] = int(frame["shared_images"].max() if len(frame) else 0)
        found["samples_looking_like_training"] = int(frame["looks_shared"].sum())
    if "severity_p" in frame and len(frame):
        found["p_values"] = {name: float(frame[f"{name}_p"].iloc[0]) for name in ("severity", "corruption")}
        found["psnr"], found["ssim"] = columns.cell_means(frame, "psnr"), columns.cell_means(frame, "ssim")
    return found


def _mean(values: pd.Series) -> float | None:
    return float(values.mean()) if values.notna().any() else None


def complaint(failures: dict[str, list[Failure]]) -> str:
    """One sentence that names every failed dataset and expectation with its first samples."""
    return f"validate: {listed(failures)}. See {REJECTS} and {METRICS}; repair the samples or the stage that made them."

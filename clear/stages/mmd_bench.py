"""Stage `mmd_bench`: the benchmark of clean images and degraded copies (METHOD §6, §7), and its development twin.

Reads data/samples/bench, writes data/bench/{clean,degraded} and data/metrics/mmd_bench.json. Protocol `row`: one
corruption per image at three levels, as the published generator; `full`: all 48 variants, as the paper says.
data/development/{clean,degraded} has the same form over the images of data/samples/development: recipes are chosen
there, so that a figure on the benchmark is not the best of several that were tried on it. The benchmark slice of
naturally degraded images (data/incoming) is kept separately, in data/bench/incoming, and counts for no figure of
MMD-Bench; neither do copies by degradations beyond the sixteen (plugins, presets), in data/bench/extra.

Departure (METHOD §8 item 15): `row` deals the corruptions out evenly instead of drawing them, and every row records
what it got. Two images that share a minimal pair get the same corruption, so that a pair stays minimal.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from clear.data.groups import connected
from clear.data.io import write_json
from clear.data.records import Sample, ShardWriter, read_samples
from clear.degradation.build import degraded_samples
from clear.degradation.corruptions import CORRUPTIONS
from clear.degradation.incoming import planned
from clear.degradation.protocol import PROTOCOL_VERSION, SEVERITIES, order_of
from clear.degradation.registry import chosen, extras
from clear.schema import Config

SAMPLES, BENCH, METRICS = Path("data/samples/bench"), Path("data/bench"), Path("data/metrics/mmd_bench.json")
DEVELOPMENT_SAMPLES, DEVELOPMENT = Path("data/samples/development"), Path("data/development")


def run(config: Config) -> None:
    """Write both benchmarks and their counts. Raises ClearError naming a sample whose image cannot be degraded."""
    report = {"protocol": config.mmd_bench.protocol, "protocol_version": PROTOCOL_VERSION}
    report |= _write(SAMPLES, BENCH, config)
    report["development"] = _write(DEVELOPMENT_SAMPLES, DEVELOPMENT, config)
    if extra := _write_extra(config):
        report["extra"] = extra
    if came := _write_incoming(config):
        report["incoming"] = came
    write_json(METRICS, report)


def _write(samples: Path, folder: Path, config: Config) -> dict[str, dict]:
    """Write the clean and degraded images of the split at `samples` below `folder`; counts of both."""
    settings = config.mmd_bench
    outline = list(read_samples(samples, ["id", "questions"]))
    plan = corruption_plan(outline) if settings.protocol == "row" else {s.id: tuple(CORRUPTIONS) for s in outline}
    clean = ShardWriter(folder / "clean")
    counts = {"images": len(outline), "questions": 0}
    for sample in read_samples(samples):
        kept = _keep(sample, settings.clean_questions)
        counts["questions"] += len(kept.questions)
        clean.add(kept)
    clean.close()
    return {"clean": counts, "degraded": _write_degraded(samples, folder / "degraded", plan, config)}


def _write_extra(config: Config) -> dict[str, int]:
    """Write the copies by further degradations (plugins, presets) apart: one type per image, dealt out as in `row`, at
    all levels; an empty shard without any. Returns images per type."""
    names = chosen(config.degrade.plugins, config.degrade.presets)
    further = list(extras(names))
    plan = corruption_plan(read_samples(SAMPLES, ["id", "questions"]), further) if further else {}

    def variants() -> Iterator[tuple[Sample, str, str]]:
        for sample in read_samples(SAMPLES) if plan else ():
            kept = _keep(sample, config.mmd_bench.degraded_questions)
            yield from ((kept, label, severity) for label in plan[sample.id] for severity in SEVERITIES)

    counts = dict.fromkeys(extras(names), 0)
    settings, total = config.degrade, len(plan) * len(SEVERITIES)
    writer = ShardWriter(BENCH / "extra")
    for sample in degraded_samples(
        variants(), settings.size_scale, settings.workers, total, "extra" * bool(plan), names
    ):
        writer.add(sample)
        counts[sample.corruption] += 1
    writer.close()
    return counts


def _write_incoming(config: Config) -> dict[str, dict[str, int]]:
    """Write the benchmark slice of data/incoming (an empty shard without one); images and questions of every set."""
    came = planned(config)
    counts = {one.name: {"images": 0, "questions": 0} for one in came.sets}
    writer = ShardWriter(BENCH / "incoming")
    for sample in came.samples("bench"):
        writer.add(sample)
        counts[sample.corruption]["images"] += 1
        counts[sample.corruption]["questions"] += len(sample.questions)
    writer.close()
    return counts


def _write_degraded(samples: Path, folder: Path, plan: dict[str, tuple[str, ...]], config: Config) -> dict:
    def variants() -> Iterator[tuple[Sample, str, str]]:
        for sample in read_samples(samples):
            kept = _keep(sample, config.mmd_bench.degraded_questions)
            yield from ((kept, corruption, severity) for corruption in plan[sample.id] for severity in SEVERITIES)

    total = sum(len(corruptions) for corruptions in plan.values()) * len(SEVERITIES)
    cells = {c: {s: {"images": 0, "questions": 0} for s in SEVERITIES} for c in CORRUPTIONS}
    writer = ShardWriter(folder)
    stream = degraded_samples(
        variants(),
        config.degrade.size_scale,
        config.degrade.workers,
        total,
        f"mmd_bench {samples.name}",
        cluster=config.degrade.cluster,
    )
    for sample in stream:
        writer.add(sample)
        cell = cells[sample.corruption][sample.severity]
        cell["images"] += 1
        cell["questions"] += len(sample.questions)
    writer.close()
    questions = sum(cell["questions"] for row in cells.values() for cell in row.values())
    return {"images": writer.count, "questions": questions, "cells": cells}


def _keep(sample: Sample, count: int) -> Sample:
    """The sample with its first questions; halves of minimal pairs come first and are never cut."""
    pairs = [q for q in sample.questions if q.pair]
    others = [q for q in sample.questions if not q.pair]
    return replace(sample, questions=tuple(pairs + others[: max(0, count - len(pairs))]))


def corruption_plan(samples: Iterable[Sample], names: Iterable[str] = tuple(CORRUPTIONS)) -> dict[str, tuple[str, ...]]:
    """One corruption of `names` for every sample id (protocol `row`), from ids and questions alone.

    Images joined by minimal pairs are dealt out together, larger groups first, each to the corruption that has the
    fewest images so far: counts differ by at most one if there are enough single images to fill up, else by less than
    the largest group. The order of the deal is a fixed shuffle of the ids, so the order of the input does not matter.
    """
    groups = sorted(_pair_groups(samples), key=lambda ids: (-len(ids), order_of(ids[0])))
    load = dict.fromkeys(names, 0)
    plan = {}
    for ids in groups:
        corruption = min(load, key=load.__getitem__)
        load[corruption] += len(ids)
        plan |= dict.fromkeys(ids, (corruption,))
    return plan


def _pair_groups(samples: Iterable[Sample]) -> list[list[str]]:
    """Sorted sample ids, grouped by shared `Question.pair` (transitively)."""
    ids, links = [], []
    first: dict[str, int] = {}  # the first sample of each pair
    for number, sample in enumerate(samples):
        ids.append(sample.id)
        links += [(first.setdefault(q.pair, number), number) for q in sample.questions if q.pair]
    groups: dict[int, list[str]] = defaultdict(list)
    for group, name in zip(connected(len(ids), links).tolist(), ids, strict=True):
        groups[group].append(name)
    return [sorted(names) for names in groups.values()]

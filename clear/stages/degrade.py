"""Stage `degrade`: one degraded copy per training image, several per validation image (METHOD §6).

Reads data/samples/{sft,rl,validation}, writes data/degraded/<split>/ and data/metrics/degrade.json. Training images
draw their corruption and severity from the published weights, but for what is held out; validation images go through
all 48 cells in turn. A sample that brings its degraded copy (source.kind = clear_train) keeps it. Naturally degraded
images (data/incoming) are appended to their slice, sft or rl; rows of theirs that cannot be used are listed in
data/rejects/incoming.parquet.
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from clear.data.io import write_json
from clear.data.records import CLEAN, Sample, ShardWriter, read_samples
from clear.data.rejects import write_rejects
from clear.degradation.build import count_rows, degraded_samples
from clear.degradation.incoming import planned
from clear.degradation.protocol import CELLS, PROTOCOL_VERSION, draw
from clear.degradation.registry import chosen, training_mix
from clear.schema import Config

SAMPLES, DEGRADED, METRICS = Path("data/samples"), Path("data/degraded"), Path("data/metrics/degrade.json")
REJECTS = Path("data/rejects/incoming.parquet")
SPLITS = ("sft", "rl", "validation")


def run(config: Config) -> None:
    """Write the degraded splits and their counts. Raises ClearError naming a sample whose image cannot be degraded."""
    came = planned(config)
    write_rejects(REJECTS, came.rejects)
    counts = {split: _degrade_split(split, config, came.samples(split)) for split in SPLITS}
    report = {"protocol_version": PROTOCOL_VERSION, "images": counts}
    if came.sets:
        report["incoming"] = {"sets": came.summary()}
    write_json(METRICS, report)


def _degrade_split(split: str, config: Config, also: Iterator[Sample]) -> dict[str, dict[str, int]]:
    folder, settings = SAMPLES / split, config.degrade
    copies = settings.validation_copies if split == "validation" else 1
    names = chosen(settings.plugins, settings.presets)
    drawn = _drawn(folder, training_mix(names, settings.held_out), settings.severity_weights)
    variants = _cycled(folder, copies) if split == "validation" else drawn
    counts: dict[str, dict[str, int]] = {}
    writer = ShardWriter(DEGRADED / split)
    brought = sum(sample.corruption != CLEAN for sample in read_samples(folder, ["corruption"]))
    total = (count_rows(folder) - brought) * copies
    made = degraded_samples(
        variants, settings.size_scale, settings.workers, total, f"degrade {split}", names, settings.cluster
    )
    kept = (sample for sample in read_samples(folder) if sample.degraded is not None) if brought else ()
    for sample in chain(made, kept):
        writer.add(sample)
        row = counts.setdefault(sample.corruption, {})
        row[sample.severity] = row.get(sample.severity, 0) + 1
    for sample in also:
        writer.add(sample)
    writer.close()
    return counts


def _drawn(folder: Path, weights: dict[str, float], severity_weights: list[float]) -> Iterator[tuple[Sample, str, str]]:
    for sample in read_samples(folder):
        if sample.degraded is None:
            yield sample, *draw(sample.id, weights, severity_weights)


def _cycled(folder: Path, copies: int) -> Iterator[tuple[Sample, str, str]]:
    for index, sample in enumerate(read_samples(folder)):
        for copy in range(copies):
            yield sample, *CELLS[(index * copies + copy) % len(CELLS)]

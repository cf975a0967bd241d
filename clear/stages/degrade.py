"""Stage `degrade`: one degraded copy per training image, several per validation image (METHOD §6).

Reads data/samples/{sft,rl,validation}, writes data/degraded/<split>/ and data/metrics/degrade.json. Training images
draw their corruption and severity from the published weights; validation images go through all 48 cells in turn.
"""

from collections.abc import Iterator
from pathlib import Path

from clear.config import Config
from clear.degradation.build import count_rows, degraded_samples
from clear.degradation.protocol import CELLS, PROTOCOL_VERSION, TRAINING_WEIGHTS, draw
from clear.records import Sample, ShardWriter, read_samples, write_json

SAMPLES, DEGRADED, METRICS = Path("data/samples"), Path("data/degraded"), Path("data/metrics/degrade.json")
SPLITS = ("sft", "rl", "validation")


def run(config: Config) -> None:
    """Write the degraded splits and their counts. Raises ClearError naming a sample whose image cannot be degraded."""
    counts = {split: _degrade_split(split, config) for split in SPLITS}
    write_json(METRICS, {"protocol_version": PROTOCOL_VERSION, "images": counts})


def _degrade_split(split: str, config: Config) -> dict[str, dict[str, int]]:
    folder, settings = SAMPLES / split, config.degrade
    copies = settings.validation_copies if split == "validation" else 1
    variants = _cycled(folder, copies) if split == "validation" else _drawn(folder, settings.severity_weights)
    counts: dict[str, dict[str, int]] = {}
    writer = ShardWriter(DEGRADED / split)
    total = count_rows(folder) * copies
    for sample in degraded_samples(variants, settings.size_scale, settings.workers, total, f"degrade {split}"):
        writer.add(sample)
        row = counts.setdefault(sample.corruption, {})
        row[sample.severity] = row.get(sample.severity, 0) + 1
    writer.close()
    return counts


def _drawn(folder: Path, severity_weights: list[float]) -> Iterator[tuple[Sample, str, str]]:
    for sample in read_samples(folder):
        yield sample, *draw(sample.id, TRAINING_WEIGHTS, severity_weights)


def _cycled(folder: Path, copies: int) -> Iterator[tuple[Sample, str, str]]:
    for index, sample in enumerate(read_samples(folder)):
        for copy in range(copies):
            yield sample, *CELLS[(index * copies + copy) % len(CELLS)]

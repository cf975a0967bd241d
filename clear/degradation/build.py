"""Degrade many samples (METHOD §6), on as many processes or machines as available (clear/data/pool.py).

Degraded images are stored as JPEG of quality 95, as published.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from clear.data.images import decode_image, encode_image
from clear.data.pool import parallel
from clear.data.records import EXTRA, Sample, open_shard, shards
from clear.degradation.protocol import SEVERITIES, degrade, seed_of
from clear.degradation.registry import Chosen, apply, extras

NONE = Chosen()
"""No degradation beyond the sixteen."""


def count_rows(folder: Path | str) -> int:
    """Number of samples in a dataset folder, from the shards' metadata alone. Raises ClearError for a broken shard."""
    return sum(open_shard(file).metadata.num_rows for file in shards(folder))


def degraded_samples(
    variants: Iterable[tuple[Sample, str, str]],
    scale: float,
    workers: int = 0,
    total: int | None = None,
    label: str = "",
    names: Chosen = NONE,
    cluster: str = "",
) -> Iterator[Sample]:
    """Stream the degraded copies of (sample, corruption, severity) triples, in order.

    Each result carries the clean image and its questions, and has degraded, corruption, severity, intensity and seed
    set; `names` are the degradations beyond the sixteen that may occur. Raises ClearError naming the sample if its
    image is broken or too small.
    """
    further = extras(names)
    waiting: deque[tuple[Sample, str, str]] = deque()

    def jobs() -> Iterator[tuple]:
        for variant in variants:
            waiting.append(variant)
            sample, corruption, severity = variant
            yield sample.image, corruption, severity, sample.id, scale, names

    for data in parallel(_degraded_bytes, jobs(), workers, total, label, cluster):
        sample, corruption, severity = waiting.popleft()
        yield replace(
            sample,
            degraded=data,
            corruption=corruption,
            severity=severity,
            intensity=(further[corruption].severities if corruption in further else SEVERITIES)[severity],
            seed=seed_of(sample.id, corruption, severity),
        )


def _degraded_bytes(job: tuple[bytes, str, str, str, float, Chosen]) -> bytes:
    data, corruption, severity, sample_id, scale, names = job
    image = decode_image(data, f"sample {sample_id}")
    if corruption.startswith(EXTRA):
        entry, seed = extras(names)[corruption], seed_of(sample_id, corruption, severity)
        return encode_image(apply(entry, image, severity, seed, scale, sample_id), "jpeg")
    return encode_image(degrade(image, corruption, severity, sample_id, scale), "jpeg")

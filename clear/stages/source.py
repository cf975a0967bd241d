"""Stage `source`: clean samples, split once into six sets that share no image.

Reads `config.source`, writes data/samples/<split>/, data/rejects/source.parquet and data/metrics/source.json. Scenes
are rendered: their bytes depend on the seed, the image size and the counts, not on the number of worker processes. The
other kinds read data below data/raw (docs/DATA.md); what cannot be used goes to the rejects with its reason.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from clear.data.io import write_json
from clear.data.pool import pool
from clear.data.records import Sample, ShardWriter, read_samples, write_samples
from clear.data.rejects import Reject, RejectWriter
from clear.errors import ClearError
from clear.schema import Config, Source
from clear.sources.rows import SPLITS, Examined, assigned, examined
from clear.sources.scenes.questions import blind_baseline
from clear.sources.scenes.render import check_request, couple

SAMPLES = Path("data/samples")
HELD_OUT = ("validation", "bench", "development")
METRICS, REJECTS = Path("data/metrics/source.json"), Path("data/rejects/source.parquet")
RAW = Path("data/raw")
_SHARD = 64 * 2**20  # image bytes of a shard of real data: one per split is filled at a time
_CHUNK = 16  # couples sent to a worker at once


def run(config: Config) -> None:
    """Write every split and the metrics, below the working directory.

    Raises ClearError for counts that scenes cannot have, and for an image that occurs twice.
    """
    source = config.source
    if source.kind != "scenes":
        _read_raw(config)
        return
    counts = {split: getattr(source, split) for split in SPLITS}
    for split, count in counts.items():
        check_request(split, count, source.questions_per_image)
    owners: dict[str, str] = {}
    with worker_map(config.degrade.workers) as over:
        for split, count in counts.items():
            make = partial(
                couple, split, seed=config.seed, size=source.image_size, questions=source.questions_per_image
            )
            made = chain.from_iterable(over(make, count // 2))
            shown = tqdm(made, desc=f"source {split}", total=count, unit="image", mininterval=1)
            write_samples(SAMPLES / split, distinct(shown, owners))
    with RejectWriter(REJECTS):
        pass
    write_json(METRICS, metrics({split: _questions_only(split) for split in SPLITS}))


def _read_raw(config: Config) -> None:
    """Sample the rows below `source.path`, and if it is set all of `source.bench_path` into the split bench."""
    source = config.source
    workers = config.degrade.workers or os.cpu_count() or 1
    writers = {split: ShardWriter(SAMPLES / split, size=_SHARD) for split in SPLITS}
    counts: dict[str, Counter] = {name: Counter() for name in ("images", "questions", "rejected", "not_sampled")}
    held_out: set[bytes] = set()
    shares, bench = list(source.shares), SPLITS.index("bench")

    def keep(items: Iterable[Sample | Reject]) -> None:
        for item in items:
            if isinstance(item, Reject):
                rejects.add(item)
                counts["rejected"][item.reason] += 1
            elif item.split:
                writers[item.split].add(item)
                counts["images"][item.split] += 1
                counts["questions"][item.split] += len(item.questions)
            else:
                counts["not_sampled"]["images"] += 1

    with RejectWriter(REJECTS) as rejects:
        if source.bench_path:
            shares[bench] = 0.0  # and no rule of sampling applies to a benchmark
            whole = replace(source, kind="lmudata", min_side=0, max_aspect=0.0, skip_cjk=False)
            found = _found("lmudata", source.bench_path, whole, workers, "bench_path")
            keep(assigned(_noting(found, held_out), config.seed, [float(split == "bench") for split in SPLITS]))
        found = _found(source.kind, source.path, source, workers, "path")
        keep(assigned(found, config.seed, shares, held_out))
    if not counts["images"]:
        raise ClearError(
            f"source: no row of {source.path} is used: {counts['rejected'].total()} are rejected ({REJECTS} says why), "
            f"{counts['not_sampled'].total()} fall to no split. Check source.shares and the rules."
        )
    given = zip(SPLITS, shares, strict=False)
    if empty := [split for split, share in given if share and not counts["images"][split]]:
        raise ClearError(
            f"source: none of {counts['images'].total() + counts['not_sampled'].total()} usable rows of {source.path} "
            f"falls to {empty[0]}, whose share is {shares[SPLITS.index(empty[0])]:g}; raise it in source.shares."
        )
    for writer in writers.values():
        writer.close()
    images = {split: counts["images"][split] for split in SPLITS}
    summary = {"kind": source.kind, "images": images, "questions": counts["questions"]}
    write_json(METRICS, summary | {"rejects": counts["rejected"], "not_sampled": counts["not_sampled"].total()})


def _found(kind: str, path: str, rules: Source, workers: int, key: str) -> Iterator[Examined | Reject]:
    """Every row at a path, examined, behind a progress bar. Raises ClearError if it is not below data/raw."""
    place = Path(path)
    if not place.absolute().is_relative_to(RAW.absolute()) or ".." in place.parts:
        raise ClearError(
            f"params: source.{key} = {path} is not below {RAW}, where DVC notices when data changes; move it there, or "
            f"link its files with `cp -rs {place.absolute()} $PWD/{RAW}/` and name that folder."
        )
    if not place.exists():
        raise ClearError(f"params: source.{key} = {path}: nothing is there; put the data there or correct the path.")
    for link in _linked_folders(place):
        raise ClearError(
            f"{link} is a link to a folder, into which DVC does not look; remove it and link the files instead: "
            f"`cp -rs {link.resolve()} $PWD/{link}`."
        )
    from clear.bench.vlmeval.names import is_degraded
    from clear.sources import clear_train, folder, llava_onevision, lmudata

    for file in lmudata.files(place) if kind == "lmudata" else ():
        if is_degraded(file.stem):
            raise ClearError(f"{file}: is degraded already, by its name; remove it here and keep the clean benchmark.")
    readers = {"folder": folder, "llava_onevision": llava_onevision, "lmudata": lmudata, "clear_train": clear_train}
    reader = readers[kind]
    items = examined(reader.rows(place), rules, workers)
    return tqdm(items, desc=f"source {place.name}", total=reader.count(place), unit="row", mininterval=1)


def _linked_folders(place: Path) -> Iterator[Path]:
    """Links to folders on the way from data/raw to a place, and below it; data/raw itself may be one."""
    steps = place.absolute().relative_to(RAW.absolute()).parts
    yield from (p for i in range(len(steps)) if (p := RAW.joinpath(*steps[: i + 1])).is_symlink() and p.is_dir())
    for folder, names, _ in os.walk(place, onerror=_refused):
        yield from (Path(folder, name) for name in names if Path(folder, name).is_symlink())


def _refused(error: OSError) -> None:
    raise error  # a folder that cannot be read is not empty


def _noting(found: Iterable[Examined | Reject], pixels: set[bytes]) -> Iterator[Examined | Reject]:
    for item in found:
        if isinstance(item, Examined):
            pixels.add(item.pixels)
        yield item


def distinct(samples: Iterable[Sample], owners: dict[str, str]) -> Iterator[Sample]:
    """Pass samples on, noting in `owners` (image hash to sample id) whose image is whose.

    Raises ClearError at an image that another sample already has: nothing is redrawn, because a sample depends on
    its own seed only.
    """
    for sample in samples:
        other = owners.setdefault(sample.image_sha256, sample.id)
        if other != sample.id:
            raise ClearError(
                f"source: {sample.id} and {other} hold the same image ({sample.image_sha256}); change `seed`."
            )
        yield sample


def metrics(splits: dict[str, list[Sample]]) -> dict:
    """Counts per split and task, answers per task over all splits, and the blind baseline on each held-out split."""
    tasks = {split: Counter(q.task for s in samples for q in s.questions) for split, samples in splits.items()}
    answers: dict[str, Counter] = defaultdict(Counter)
    for question in (q for samples in splits.values() for sample in samples for q in sample.questions):
        answers[question.task][question.answer] += 1
    train = [sample for split in ("pretrain", "sft", "rl") for sample in splits[split]]
    return {
        "images": {split: len(samples) for split, samples in splits.items()},
        "questions": tasks,
        "answers": answers,
        "blind_baseline": {split: blind_baseline(train, splits[split]) for split in HELD_OUT},
    }


def _questions_only(split: str) -> list[Sample]:
    return list(read_samples(SAMPLES / split, ["id", "questions"]))


@contextmanager
def worker_map(workers: int) -> Iterator[Callable[[Callable, int], Iterator]]:
    """A function (make, n) -> make(0), …, make(n - 1) in order, computed by `workers` processes (0 = one per core).

    A single worker is this process itself.
    """
    workers = workers or os.cpu_count() or 1
    if workers == 1:
        yield lambda make, n: map(make, range(n))
        return
    with pool(workers) as apply:
        yield lambda make, n: apply(make, range(n), _CHUNK)

"""Stage `source`: clean samples, split once into five sets that share no image.

Reads `config.source`, writes data/samples/<split>/ and data/metrics/source.json. The bytes depend on the seed, the
image size and the counts, not on the number of worker processes.
"""

import multiprocessing
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from clear.config import Config
from clear.errors import ClearError
from clear.records import Sample, read_samples, write_json, write_samples
from clear.sources.questions import blind_baseline
from clear.sources.scenes import check_request, couple

SPLITS = ("pretrain", "sft", "rl", "validation", "bench")
SAMPLES = Path("data/samples")
METRICS = Path("data/metrics/source.json")
_WINDOW, _CHUNK = 1024, 16  # couples handed to the pool at once, and per task: bounds what waits in memory


def run(config: Config) -> None:
    """Write every split and the metrics, below the working directory.

    Raises ClearError for counts that scenes cannot have, and for an image that occurs twice.
    """
    source = config.source
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
    write_json(METRICS, metrics({split: _questions_only(split) for split in SPLITS}))


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
        "blind_baseline": {split: blind_baseline(train, splits[split]) for split in ("validation", "bench")},
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
    # Not fork: the libraries loaded by now may hold threads and locks.
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_one_thread)

    def over_pool(make: Callable, n: int) -> Iterator:
        for start in range(0, n, _WINDOW):
            yield from executor.map(make, range(start, min(start + _WINDOW, n)), chunksize=_CHUNK)

    try:
        yield over_pool
    finally:
        executor.shutdown(cancel_futures=True)


def _one_thread() -> None:
    import cv2

    cv2.setNumThreads(1)

"""Degrade many samples in a pool of processes (METHOD §6).

Results come back in the order of the jobs and do not depend on the number of workers; only a few chunks are in
flight, so memory stays flat for any dataset. What is stored is a JPEG of quality 95, as published.
"""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from clear.degradation.protocol import SEVERITIES, degrade, seed_of
from clear.degradation.registry import Chosen, apply, extras
from clear.errors import ClearError
from clear.records import EXTRA, Sample, decode_image, encode_image, open_shard, shards

Job = TypeVar("Job")
Result = TypeVar("Result")

NONE = Chosen()
"""No degradation beyond the sixteen."""

CLUSTER_TIMEOUT = 15
"""Seconds to wait for a Dask scheduler, and for its first worker."""

CHUNK = 32
"""Jobs sent to a worker at once."""


def parallel(
    function: Callable[[Job], Result],
    jobs: Iterable[Job],
    workers: int = 0,
    total: int | None = None,
    label: str = "",
    cluster: str = "",
) -> Iterator[Result]:
    """Apply `function` to every job, in order. `workers`: 0 = one per core, 1 = in this process. With `cluster`, the
    address of a Dask scheduler, its workers compute instead; the results are the same.

    `function` must be importable (no lambda). Raises what the function raises, and ClearError if a worker process dies,
    or if the cluster cannot be reached or loses all its workers.
    """
    workers = workers or os.cpu_count() or 1
    if cluster:
        results = _clustered(function, jobs, cluster)
    else:
        results = _inline(function, jobs) if workers == 1 else _pooled(function, jobs, workers)
    return _progress(results, total, label)


def _inline(function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
    for job in jobs:
        with one_thread():
            result = function(job)
        yield result


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """OpenCV on one thread inside the block: a pool has a process per core already."""
    import cv2

    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def _pooled(function: Callable[[Job], Result], jobs: Iterable[Job], workers: int) -> Iterator[Result]:
    iterator, pending = iter(jobs), deque()
    # Spawned workers share no state with this process: no copied locks, threads or generators.
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker) as pool:
        try:
            while True:
                while len(pending) < 2 * workers and (chunk := list(islice(iterator, CHUNK))):
                    pending.append(pool.submit(_run_chunk, function, chunk))
                if not pending:
                    return
                yield from pending.popleft().result()
        except BrokenProcessPool as error:
            raise ClearError(
                "A worker process was killed, mostly for lack of memory; lower degrade.workers."
            ) from error
        finally:
            for future in pending:
                future.cancel()


def _clustered(function: Callable[[Job], Result], jobs: Iterable[Job], address: str) -> Iterator[Result]:
    """As `_pooled`, on a Dask cluster. What a dead worker was doing is done again by another one."""
    try:
        from distributed import Client
        from distributed.scheduler import KilledWorker
    except ImportError as error:
        raise ClearError("degrade.cluster needs Dask: `pip install distributed`, or set it to '' .") from error

    remedy = 'start `dask scheduler` and `dask worker`, or set degrade.cluster to ""'
    try:
        client = Client(address, timeout=CLUSTER_TIMEOUT)
    except (OSError, TimeoutError, ValueError) as error:
        raise ClearError(f"degrade.cluster = {address!r} cannot be reached; {remedy}.") from error
    iterator, pending = iter(jobs), deque()
    with client:
        try:
            client.wait_for_workers(1, timeout=CLUSTER_TIMEOUT)
            while True:
                width = 2 * max(1, sum(client.nthreads().values()))
                while len(pending) < width and (chunk := list(islice(iterator, CHUNK))):
                    pending.append(client.submit(_run_remote, function, chunk, pure=False))
                if not pending:
                    return
                yield from _awaited(client, pending.popleft())
        except KilledWorker as error:
            raise ClearError(f"degrade.cluster = {address!r}: workers died again and again: {error}") from error
        except CancelledError as error:
            raise ClearError(f"degrade.cluster = {address!r}: the scheduler is gone; {remedy}.") from error
        except TimeoutError as error:
            raise ClearError(f"degrade.cluster = {address!r} has no worker; {remedy}.") from error
        finally:
            client.cancel(list(pending))


def _awaited(client, future) -> list:
    """The result of a future; TimeoutError once the cluster has had no worker for a while."""
    while True:
        try:
            return future.result(timeout=CLUSTER_TIMEOUT)
        except TimeoutError:
            client.wait_for_workers(1, timeout=CLUSTER_TIMEOUT)


def _run_remote(function: Callable[[Job], Result], chunk: list[Job]) -> list[Result]:
    with one_thread():
        return _run_chunk(function, chunk)


def _start_worker() -> None:
    import cv2

    cv2.setNumThreads(1)


def _run_chunk(function: Callable[[Job], Result], chunk: list[Job]) -> list[Result]:
    return [function(job) for job in chunk]


def _progress(results: Iterable[Result], total: int | None, label: str) -> Iterator[Result]:
    """A bar on a terminal; elsewhere one line per tenth."""
    import sys

    from tqdm import tqdm

    if not label or sys.stderr.isatty():
        yield from tqdm(results, total=total, desc=label, unit="image", disable=not label)
        return
    step = max(1, -(-(total or 0) // 10))
    for done, result in enumerate(results, start=1):
        if total and (done % step == 0 or done == total):
            print(f"{label}: {done}/{total}", file=sys.stderr, flush=True)
        yield result


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

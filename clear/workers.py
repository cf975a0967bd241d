"""Apply a function to many jobs: in this process, in a pool of processes, or on a Dask cluster.

Results come back in the order of the jobs and do not depend on who computed them; only a few chunks are in flight, so
memory stays flat for any number of jobs. A cluster computes with the code that its workers have loaded. It must be the
caller's, or a worker that was started before an edit, or in another clone, would quietly give other results.
"""

import contextlib
import functools
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from clear.errors import ClearError

Job = TypeVar("Job")
Result = TypeVar("Result")

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
    section: str = "degrade",
    chunk: int = CHUNK,
) -> Iterator[Result]:
    """Apply `function` to every job, in order. `workers`: 0 = one per core, 1 = in this process. With `cluster`, the
    address of a Dask scheduler, its workers compute instead; the results are the same.

    `function` must be importable (no lambda); `chunk` jobs are sent at once. Raises what the function raises, and
    ClearError, naming the section of params, if a worker process dies, or if the cluster cannot be reached, has other
    code or loses all its workers.
    """
    workers = workers or os.cpu_count() or 1
    if cluster:
        results = _clustered(function, jobs, cluster, section, chunk)
    else:
        results = _inline(function, jobs) if workers == 1 else _pooled(function, jobs, workers, section, chunk)
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


def _pooled(
    function: Callable[[Job], Result], jobs: Iterable[Job], workers: int, section: str, chunk: int
) -> Iterator[Result]:
    iterator, pending = iter(jobs), deque()
    # Spawned workers share no state with this process: no copied locks, threads or generators.
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker) as pool:
        try:
            while True:
                while len(pending) < 2 * workers and (some := list(islice(iterator, chunk))):
                    pending.append(pool.submit(_run_chunk, function, some))
                if not pending:
                    return
                yield from pending.popleft().result()
        except BrokenProcessPool as error:
            raise ClearError(
                f"A worker process was killed, mostly for lack of memory; lower {section}.workers."
            ) from error
        finally:
            for future in pending:
                future.cancel()


def _clustered(
    function: Callable[[Job], Result], jobs: Iterable[Job], address: str, section: str, chunk: int
) -> Iterator[Result]:
    """As `_pooled`, on a Dask cluster. What a dead worker was doing is done again by another one."""
    name = f"{section}.cluster"
    try:
        from distributed import Client
        from distributed.scheduler import KilledWorker
    except ImportError as error:
        raise ClearError(f"{name} needs Dask: `pip install distributed`, or set it to '' .") from error

    remedy = f'start `dask scheduler` and `dask worker`, or set {name} to ""'
    try:
        client = Client(address, timeout=CLUSTER_TIMEOUT)
    except (OSError, TimeoutError, ValueError) as error:
        raise ClearError(f"{name} = {address!r} cannot be reached; {remedy}.") from error
    iterator, pending, code = iter(jobs), deque(), code_digest()
    with client:
        try:
            client.wait_for_workers(1, timeout=CLUSTER_TIMEOUT)
            while True:
                width = 2 * max(1, sum(client.nthreads().values()))
                while len(pending) < width and (some := list(islice(iterator, chunk))):
                    pending.append(client.submit(_run_remote, function, some, code, pure=False))
                if not pending:
                    return
                yield from _awaited(client, pending.popleft())
        except KilledWorker as error:
            raise ClearError(f"{name} = {address!r}: workers died again and again: {error}") from error
        except CancelledError as error:
            raise ClearError(f"{name} = {address!r}: the scheduler is gone; {remedy}.") from error
        except TimeoutError as error:
            raise ClearError(f"{name} = {address!r} has no worker; {remedy}.") from error
        finally:
            client.cancel(list(pending))


def _awaited(client, future) -> list:
    """The result of a future; TimeoutError once the cluster has had no worker for a while."""
    while True:
        try:
            return future.result(timeout=CLUSTER_TIMEOUT)
        except TimeoutError:
            client.wait_for_workers(1, timeout=CLUSTER_TIMEOUT)


@functools.cache
def code_digest() -> str:
    """Hex digest of this project's modules as they were when first asked, at the first job of a process.

    A later edit does not change it, nor what this process has loaded.
    """
    root, digest = Path(__file__).parent, hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root).as_posix()}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _run_remote(function: Callable[[Job], Result], chunk: list[Job], code: str) -> list[Result]:
    if code_digest() != code:
        raise ClearError(
            f"a Dask worker on {os.uname().nodename} has other code of this project, in {Path(__file__).parent}; "
            "start the workers again, with the code of this revision first on PYTHONPATH."
        )
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

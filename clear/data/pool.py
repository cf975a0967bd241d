"""Apply a function to many jobs: in this process, in a pool of processes, or on a Dask cluster.

Results come back in the order of the jobs and do not depend on who computed them; only a few chunks are in flight, so
memory stays flat for any number of jobs. A cluster computes with the code that its workers have loaded. That code must
equal the caller's: a worker started before an edit, or in another clone, would silently give different results.
"""

import functools
import hashlib
import itertools
import os
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import connection, get_context, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import TypeVar

from clear.errors import ClearError

Job = TypeVar("Job")
Result = TypeVar("Result")

_ROOT = Path(__file__).parent.parent
"""The package whose code a cluster must share."""

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
    option: str = "",
) -> Iterator[Result]:
    """Apply `function` to every job, in order. `workers`: 0 = one per core, 1 = in this process. With `cluster`, the
    address of a Dask scheduler, its workers compute instead; the results are the same.

    `function` must be importable (no lambda); `chunk` jobs are sent at once. Raises what the function raises, and
    ClearError, naming the section of params, if a worker process dies, or if the cluster cannot be reached, has other
    code or loses all its workers. `option` is that of the command which names the cluster, if no setting does.
    """
    workers = workers or os.cpu_count() or 1
    if cluster:
        results = _clustered(function, jobs, cluster, option or f"{section}.cluster", chunk)
    else:
        results = _inline(function, jobs) if workers == 1 else _pooled(function, jobs, workers, section, chunk)
    return _progress(results, total, label)


def threaded(function: Callable[[Job], Result], jobs: Iterable[Job], threads: int) -> Iterator[Result]:
    """Apply `function` to every job, in order, on threads; four times as many jobs are under way or done at once.

    Raises what the function raises; what has not begun by then, or when the caller takes no more, is never done.
    """
    waiting: deque = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for job in jobs:
            waiting.append(pool.submit(function, job))
            if len(waiting) >= 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _inline(function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
    for job in jobs:
        with one_thread():
            result = function(job)
        yield result


@contextmanager
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
    with pool(workers, section) as apply:
        yield from apply(function, jobs, chunk)


@dataclass
class _Worker:
    """A process, and the numbers of the chunks whose results it owes."""

    process: BaseProcess
    connection: Connection
    owed: deque[int] = field(default_factory=deque)


@contextmanager
def pool(workers: int, section: str = "degrade") -> Iterator[Callable[..., Iterator]]:
    """A function (function, jobs, chunk) -> results in order, computed by up to `workers` processes while the block
    lasts. Raises what the function raises, and ClearError, naming the section of params, if a process dies.

    Each process has a pipe of its own and shares no lock or queue with the others: one that ends at any moment, by
    whatever signal, is seen by the end of its pipe and holds nothing up. So are we by them: without us none lives on.
    Spawned processes share no state with this one either: no copied locks, threads or generators. Ctrl-C is ours alone;
    all are ended with the block, whatever they are at.
    """
    staff: list[_Worker] = []
    numbers = itertools.count()

    def send(work: bytes) -> int:
        """Give work to the process that owes least, a new one where all are busy; the number of its result."""
        worker = min(staff, key=lambda worker: len(worker.owed), default=None)
        if worker is None or (worker.owed and len(staff) < workers):
            with _undisturbed():
                worker = _start()
                staff.append(worker)
        with _alive(worker, section):
            worker.connection.send_bytes(work)
        worker.owed.append(next(numbers))
        return worker.owed[-1]

    def apply(function: Callable, jobs: Iterable, chunk: int = CHUNK) -> Iterator:
        iterator, sent, found = iter(jobs), deque(), {}
        while True:
            while len(sent) < 2 * workers and (some := list(itertools.islice(iterator, chunk))):
                sent.append(send(ForkingPickler.dumps((function, some))))
            if not sent:
                return
            while sent[0] not in found:
                ready = connection.wait([worker.connection for worker in staff])
                for worker in (worker for worker in staff if worker.connection in ready):
                    with _alive(worker, section):
                        result = worker.connection.recv()
                    found[worker.owed.popleft()] = result
            result = found.pop(sent.popleft())
            if isinstance(result, Exception):
                raise result
            yield from result

    try:
        yield apply
    finally:
        with _undisturbed():
            for worker in staff:
                worker.process.kill()
            for worker in staff:
                worker.process.join()
                worker.connection.close()


def _start() -> _Worker:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    resource_tracker.ensure_running()  # would lift the mask
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
    return _Worker(process, ours)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C and SIGTERM take effect when the block ends, so that no process is started or ended by halves."""
    if threading.current_thread() is not threading.main_thread():  # which alone they interrupt
        yield
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in handlers:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)


@contextmanager
def _alive(worker: _Worker, section: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError) as error:
        worker.process.join()
        if worker.process.exitcode == -signal.SIGTERM:  # somebody ends the command as a whole, and began here
            raise KeyboardInterrupt from error
        raise ClearError(f"A worker process was killed, mostly for lack of memory; lower {section}.workers.") from error


def _serve(link: Connection) -> None:
    """The life of a worker process: results for work, in order, while others wait on either side."""
    import cv2

    cv2.setNumThreads(1)
    inbox, outbox = queue.SimpleQueue(), queue.SimpleQueue()
    for move in (lambda: inbox.put(link.recv_bytes()), lambda: link.send_bytes(outbox.get())):
        threading.Thread(target=_repeat, args=(move,), daemon=True).start()
    while True:
        work = inbox.get()
        try:
            function, jobs = ForkingPickler.loads(work)
            result = ForkingPickler.dumps(_run_chunk(function, jobs))
        except Exception as error:
            error.add_note(f"In a worker process:\n{traceback.format_exc()}")
            result = ForkingPickler.dumps(error)
        outbox.put(result)


def _repeat(move: Callable[[], None]) -> None:
    """Do it until the other end of the pipe is closed; that ends the process, whatever it is at."""
    try:
        while True:
            move()
    except (EOFError, OSError):
        os._exit(0)


def _clustered(
    function: Callable[[Job], Result], jobs: Iterable[Job], address: str, name: str, chunk: int
) -> Iterator[Result]:
    """As `_pooled`, on a Dask cluster. What a dead worker was doing is done again by another one.

    `name` is the setting or option with the address.
    """
    option = name.startswith("-")
    given = f"{name} {address!r}" if option else f"{name} = {address!r}"
    without = f"leave out {name}" if option else f'set {name} to ""'
    try:
        from distributed import Client
        from distributed.scheduler import KilledWorker
    except ImportError as error:
        raise ClearError(f"{name} needs Dask: `pip install distributed`, or {without}.") from error

    remedy = f"start `dask scheduler` and `dask worker`, or {without}"
    try:
        client = Client(address, timeout=CLUSTER_TIMEOUT)
    except (OSError, TimeoutError, ValueError) as error:
        raise ClearError(f"{given} cannot be reached; {remedy}.") from error
    iterator, pending, code = iter(jobs), deque(), code_digest()
    with client:
        try:
            client.wait_for_workers(1, timeout=CLUSTER_TIMEOUT)
            while True:
                width = 2 * max(1, sum(client.nthreads().values()))
                while len(pending) < width and (some := list(itertools.islice(iterator, chunk))):
                    pending.append(client.submit(_run_remote, function, some, code, pure=False))
                if not pending:
                    return
                yield from _awaited(client, pending.popleft())
        except KilledWorker as error:
            raise ClearError(f"{given}: workers died repeatedly: {error}") from error
        except CancelledError as error:
            raise ClearError(f"{given}: the scheduler is gone; {remedy}.") from error
        except TimeoutError as error:
            raise ClearError(f"{given} has no worker; {remedy}.") from error
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
    root, digest = _ROOT, hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root).as_posix()}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _run_remote(function: Callable[[Job], Result], chunk: list[Job], code: str) -> list[Result]:
    if code_digest() != code:
        raise ClearError(
            f"a Dask worker on {os.uname().nodename} has other code of this project, in {_ROOT}; "
            "start the workers again, with the code of this revision first on PYTHONPATH."
        )
    with one_thread():
        return _run_chunk(function, chunk)


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

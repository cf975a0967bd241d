"""The thread that owns the model: it loads it, lets waiting rows join the batch, and steps the batch.

Requests hand over rows with `submit` and wait; nothing else touches the model. A step that fails ends the rows that
were in it, with the reason, and the next ones find an empty batch.
"""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from clear.errors import ClearError
from clear.serve.metrics import Metrics

if TYPE_CHECKING:
    from clear.reasoning.answering import Answerer
    from clear.serve.batch import Batch, Row
    from clear.serve.talk import Reader

IDLE = 0.2
"""Seconds after which an idle worker looks whether it is to stop."""

DRAIN = 20.0
"""Seconds that running requests get to end after SIGTERM; then they are told that the server stops."""


class Full(Exception):
    """The queue has no place for the rows. `wait`: seconds after which it probably has."""

    def __init__(self, wait: int) -> None:
        super().__init__(f"the queue is full; try again in {wait} s")
        self.wait = wait


class Worker(threading.Thread):
    """Made with what loads the model, and what reads requests for it; `start` it, then `submit` rows once `ready`."""

    def __init__(
        self,
        load: "Callable[[], Answerer]",
        rows: int,
        queue: int,
        metrics: Metrics,
        read: "Callable[[Answerer], Reader] | None" = None,
    ) -> None:
        super().__init__(name="model", daemon=True)
        self.rows, self.queue, self.metrics = rows, queue, metrics
        self.answerer: Answerer | None = None
        self.reader: Reader | None = None
        self.failure: ClearError | OSError | None = None
        self.loaded: Callable[[], None] = lambda: None
        self.failed: Callable[[], None] = lambda: None
        self._load, self._read = load, read
        self._batch: Batch | None = None
        self._waiting: deque[Row] = deque()
        self._wake = threading.Condition()
        self._stop_at: float | None = None
        self._stopped = False
        self._joined: dict[int, float] = {}  # when each row of the batch has, by its id
        self._seconds = 1.0  # that a row keeps its place, a moving average once rows have left
        self._left = 0

    @property
    def ready(self) -> bool:
        """Whether the model is loaded and rows are taken."""
        return self.answerer is not None and self._stop_at is None

    @property
    def full(self) -> bool:
        """Whether the queue takes no further row."""
        return len(self._waiting) >= self.queue

    @property
    def retry_after(self) -> int:
        """Whole seconds until the rows that wait have probably begun, 1 to 60."""
        return max(1, min(60, round(self._seconds * (len(self._waiting) + 1) / self.rows)))

    def submit(self, rows: "Sequence[Row]") -> None:
        """Let these rows wait for a place in the batch, all or none. Raises Full."""
        with self._wake:
            if len(self._waiting) + len(rows) > self.queue:
                raise Full(self.retry_after)
            self._waiting.extend(rows)
            self._wake.notify()

    def drain(self) -> None:
        """End what runs within DRAIN seconds. Safe in a signal handler: it takes no lock."""
        self._stop_at = self._stop_at or time.monotonic() + DRAIN

    def stop(self) -> None:
        """End the thread after the step it is in."""
        self._stopped = True

    def run(self) -> None:
        """Load the model, then serve rows until `stop`."""
        from clear.serve.batch import Batch

        try:
            answerer = self._load()
            self._batch = Batch(answerer, self.metrics.timed)
            self.reader = self._read(answerer) if self._read else None
        except (ClearError, OSError) as error:
            self.failure = error
        except BaseException as error:
            traceback.print_exc()
            self.failure = ClearError(f"the model cannot be loaded ({type(error).__name__}: {error}).")
        if self.failure is not None:
            self.failed()
            return
        self.answerer = answerer
        self.loaded()
        while not self._stopped:
            self._turn(self._take())

    def _take(self) -> "list[Row]":
        """The rows that may join now; waits where there is nothing to do."""
        with self._wake:
            if not self._waiting and not self._batch.rows:
                self._wake.wait(IDLE)
            if any(row.gone for row in self._waiting):  # their clients have hung up, and others want their places
                self._waiting = deque(row for row in self._waiting if not row.gone)
            room = max(0, self.rows - len(self._batch.rows))
            return [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]

    def _turn(self, joining: "list[Row]") -> None:
        batch = self._batch
        if self._stop_at is not None and time.monotonic() > self._stop_at:
            self._fail([*batch.rows, *joining, *self._cleared()], "the server stops")
            return
        self._joined |= dict.fromkeys(map(id, joining), time.monotonic())
        try:
            batch.admit(joining)
            if self._joined:
                batch.step()
                self._measure()
        except Exception as error:  # whatever it is, these rows get no answer and are told so
            traceback.print_exc()
            unfinished = {id(row): row for row in (*batch.rows, *joining)}.values()
            self._fail([row for row in unfinished if not row.finish], _said(error))
        self.metrics.batch(len(batch.rows), len(self._waiting), batch)

    def _cleared(self) -> "list[Row]":
        with self._wake:
            waiting = list(self._waiting)
            self._waiting.clear()
        return waiting

    def _fail(self, rows: "list[Row]", reason: str) -> None:
        self._batch.clear()
        self._joined.clear()
        for row in rows:
            row.end("error", reason)

    def _measure(self) -> None:
        """Follow how long a row keeps its place: from joining to leaving, whyever it has left."""
        now = time.monotonic()
        for row in self._joined.keys() - set(map(id, self._batch.rows)):
            self._left += 1
            self._seconds += max(0.1, 1 / self._left) * (now - self._joined.pop(row) - self._seconds)


def _said(error: Exception) -> str:
    """The reason in one line; memory is named, because the operator can do something about it."""
    if "out of memory" in str(error).lower():
        return "out of memory; the operator should start the server with fewer --rows"
    return f"internal error ({type(error).__name__})"

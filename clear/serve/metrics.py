"""What the server counts, for Prometheus: GET /metrics."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clear.serve.batch import Batch

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Bounds of the histogram of a request's seconds."""


class Metrics:
    """The collectors of one server, in a registry of their own."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = registry = CollectorRegistry()
        self.requests = Counter("clear_requests", "Requests answered.", ["path", "status"], registry=registry)
        self.latency = Histogram(
            "clear_request_seconds", "Seconds of a chat completion.", buckets=SECONDS, registry=registry
        )
        self.rows = Gauge("clear_batch_rows", "Rows in the running batch.", registry=registry)
        self.queue = Gauge("clear_queue_rows", "Rows that wait for a place in it.", registry=registry)
        self.tokens = Counter("clear_tokens", "Tokens read and written.", ["kind"], registry=registry)
        self.restorations = Counter("clear_restorations", "Pictures restored.", registry=registry)
        self.seconds = Counter("clear_model_seconds", "Seconds of the model, by part.", ["part"], registry=registry)
        for part in ("encode", "prefill", "decode", "restore", "pictures"):
            self.seconds.labels(part)
        for kind in ("prompt", "completion"):
            self.tokens.labels(kind)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the seconds of the block to a part of the model's work."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds.labels(part).inc(time.perf_counter() - start)

    def batch(self, rows: int, queue: int, batch: "Batch") -> None:
        """Take over the state of the batch after a turn, and what it has counted since the last one."""
        self.rows.set(rows)
        self.queue.set(queue)
        self.tokens.labels("prompt").inc(batch.read)
        self.tokens.labels("completion").inc(batch.written)
        self.restorations.inc(batch.restored)
        batch.read = batch.written = batch.restored = 0

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)

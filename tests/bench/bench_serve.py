"""How many requests `clear serve` answers, 32 clients at once against one client at a time, and how long they wait.

A random model of the smoke profile that never ends a reply by itself, so that every answer has the same number of
tokens; the server is a process of its own, as in use, and clients and server share the machine.
"""

import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from clear.errors import ClearError
from tests.serving import Server, asking, make_workspace, picture, serving

CLIENTS, REQUESTS, TOKENS = 32, 320, 64


def _seconds(server: Server, clients: int, requests: int) -> tuple[float, list[float]]:
    """Seconds for so many requests from so many clients at once, and those of each."""
    bodies = [asking(image=picture(n), max_tokens=TOKENS, clear={"restore": "plain"}) for n in range(8)]
    ready = threading.Barrier(clients + 1)

    def client(number: int) -> list[float]:
        found = []
        ready.wait()
        for n in range(number, requests, clients):
            start = time.perf_counter()
            response = server.ask(bodies[n % len(bodies)])
            found.append(time.perf_counter() - start)
            if response.status_code != 200:
                raise ClearError(f"the server answers {response.status_code}: {response.text[:200]}")
        return found

    with ThreadPoolExecutor(clients) as pool:
        waits = [pool.submit(client, number) for number in range(clients)]
        ready.wait()
        start = time.perf_counter()
        each = [seconds for wait in waits for seconds in wait.result()]
    return time.perf_counter() - start, each


def bench_serve() -> dict[str, dict]:
    """Requests per second, and the latencies that 95 and 50 of 100 requests stay below (baseline: one client)."""
    with tempfile.TemporaryDirectory() as name:
        make_workspace(Path(name), f"sampling.max_think_tokens={TOKENS}", endless=True)
        with serving(Path(name), "--rows", str(CLIENTS)) as server:
            _seconds(server, CLIENTS, CLIENTS)  # what is made at first use
            alone, each_alone = _seconds(server, 1, REQUESTS // 8)
            many, each = _seconds(server, CLIENTS, REQUESTS)
    rate, baseline = REQUESTS / many, REQUESTS // 8 / alone
    rows = {"serve": {"value": rate, "unit": "requests/s", "baseline": baseline, "ratio": rate / baseline}}
    for part in (50, 95):
        value, single = (statistics.quantiles(times, n=100)[part - 1] * 1000 for times in (each, each_alone))
        rows[f"serve_p{part}"] = {"value": value, "unit": "ms", "baseline": single, "ratio": value / single}
    return rows

"""`clear serve`: a checkpoint behind an OpenAI-compatible API (docs/SERVE.md).

batch.py has the running batch of the model, worker.py the thread that owns it, app.py the routes; protocol.py says what
is accepted, talk.py and pictures.py turn it into what the model reads, answers.py turns ended rows into answers.
"""

import errno
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from clear.data.ports import is_loopback
from clear.errors import ClearError

if TYPE_CHECKING:
    from clear.schema import Config
    from clear.serve.settings import Settings

GRACE = 25
"""Seconds after SIGTERM when what still runs is cut off; the worker ends its rows before (clear/serve/worker.py)."""


def serve(
    folder: Path, config: "Config", settings: "Settings", host: str, port: int, say: Callable[[str], None]
) -> None:
    """Serve the model in `folder` until SIGINT or SIGTERM; with `port` 0 the system chooses one, which is said.

    It listens at once and is ready when the model is loaded. Raises ClearError for a port in use, a host beyond this
    machine without a key, and a model that cannot be loaded.
    """
    if not settings.key and not is_loopback(host):
        raise ClearError(
            f"--host {host}: others could use this server; put a key into the environment variable "
            "that --key-from names."
        )
    listener = _listen(host, port)
    import uvicorn

    from clear.model.runtime import apply_runtime
    from clear.reasoning.answering import Answerer
    from clear.serve.app import create
    from clear.serve.metrics import Metrics
    from clear.serve.talk import Reader
    from clear.serve.worker import Worker

    def load() -> Answerer:
        apply_runtime(config)
        return Answerer.load(folder, config)

    metrics = Metrics()
    worker = Worker(load, settings.rows, settings.queue, metrics, lambda answerer: Reader(answerer, settings))

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame) -> None:
            worker.drain()
            super().handle_exit(sig, frame)

    options = uvicorn.Config(
        create(settings, worker, metrics),
        http="h11",
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=65,
        timeout_graceful_shutdown=GRACE,
    )
    server = Server(options)
    worker.loaded = lambda: say(f"ready: {settings.name}")
    worker.failed = lambda: setattr(server, "should_exit", True)
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in signals]
    shown = f"[{host}]" if ":" in host else host
    say(f"http://{shown}:{listener.getsockname()[1]}/v1 (Ctrl-C ends it)")
    try:
        for number in signals:  # before uvicorn listens to them, and after: it sends them again
            signal.signal(number, lambda *_: setattr(server, "should_exit", True))
        worker.start()
        server.run(sockets=[listener])
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
    worker.stop()
    if worker.failure is not None:
        raise worker.failure
    worker.join(1.0)
    if worker.is_alive():  # in the middle of a long step, which nobody waits for any more
        sys.stdout.flush()
        os._exit(0)


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens, so that the port is ours before the model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except socket.gaierror as error:
        raise ClearError(f"--host {host}: no such address ({error.strerror}); 127.0.0.1 is this machine.") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ClearError(f"port {port} is taken; name another one with --port.") from error
        raise ClearError(f"--host {host} --port {port}: {error.strerror}; name others.") from error
    return listener

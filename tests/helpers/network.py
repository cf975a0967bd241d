"""A network that fails, on loopback: a proxy before a real server of HTTP that refuses, delays, cuts, mixes up, or
answers in its place, request by request as a test tells it."""

import contextlib
import http.client
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@dataclass(frozen=True)
class Fault:
    """What becomes of a request. `status` with `content` is an answer in place of the server's. Else the server is
    asked, and of its answer `after` bytes arrive (None: all) before the connection is reset, with `reset`, or closed;
    `swapped` exchanges the halves of the answer, `bare` takes the checksums of S3 from it, and it begins after `wait`
    seconds. A `reset` without `after` asks nobody."""

    status: int = 0
    content: bytes = b""
    after: int | None = None
    reset: bool = False
    swapped: bool = False
    bare: bool = False
    wait: float = 0.0


def s3_error(status: int, code: str) -> Fault:
    """S3's own refusal."""
    return Fault(status, f"<Error><Code>{code}</Code><Message>{code} was planted</Message></Error>".encode())


@dataclass
class Proxy:
    """`url` in place of the server's. `coming` has a fault (or None) for each of the next requests for a path that
    contains `only`; `lasting` is that of all behind them. `seen` has every request as "GET /path bytes=…"."""

    url: str = ""
    only: str = ""
    coming: deque[Fault | None] = field(default_factory=deque)
    lasting: Fault | None = None
    seen: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fails(self, *coming: Fault | None, lasting: Fault | None = None, only: str = "") -> None:
        """From now on."""
        with self._lock:
            self.coming, self.lasting, self.only = deque(coming), lasting, only
            self.seen.clear()

    def fault(self, seen: str) -> Fault | None:
        """What becomes of a request."""
        with self._lock:
            self.seen.append(seen)
            if self.only not in seen:
                return None
            return self.coming.popleft() if self.coming else self.lasting


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy
    server_place: str

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.proxy.fault(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
        with contextlib.suppress(ConnectionError):  # the client gave up, or the server is gone
            self._answer(fault or Fault(), body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_PATCH = _handle

    def _answer(self, fault: Fault, body: bytes) -> None:
        time.sleep(fault.wait)
        if fault.reset and fault.after is None:
            self._end(reset=True)
            return
        status, headers, content = (fault.status, {}, fault.content) if fault.status else self._asked(body)
        if fault.swapped:
            content = content[len(content) // 2 :] + content[: len(content) // 2]
        self.send_response(status)
        for name, value in headers.items():
            if not (fault.bare and name.lower().startswith("x-amz-checksum")):
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content if fault.after is None else content[: fault.after])
        if fault.after is not None:
            self.wfile.flush()
            time.sleep(0.05)  # so that what was sent has arrived when the reset does
            self._end(fault.reset)

    def _asked(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        there = http.client.HTTPConnection(self.server_place, timeout=60)
        with contextlib.closing(there):
            there.request(self.command, self.path, body, dict(self.headers))
            answer = there.getresponse()
            content = answer.read()
        kept = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP}
        if self.command == "HEAD" and (length := answer.getheader("Content-Length")):
            kept["Content-Length"] = length
        return answer.status, kept, content

    def _end(self, reset: bool) -> None:
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RD) if reset else self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def before(url: str) -> Iterator[Proxy]:
    """A proxy before the server at `url`, without faults at first."""
    parts = urlsplit(url)
    proxy = Proxy()
    handler = type("Handler", (_Handler,), {"proxy": proxy, "server_place": parts.netloc})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    proxy.url = f"http://127.0.0.1:{server.server_port}{parts.path}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

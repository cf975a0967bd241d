"""What alerts are sent to, on loopback: a web hook and a mail server that keep what they get."""

import contextlib
import json
import socketserver
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Receiver:
    """Where to send, and what has come: `messages` as (title, text), `requests` with the path of each."""

    address: str = ""
    status: int = 200
    messages: list[tuple[str, str]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def titles(self) -> list[str]:
        return [title for title, _ in self.messages]


@contextlib.contextmanager
def web_hook() -> Iterator[Receiver]:
    """A web hook that answers with the status it is told to."""
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            receiver.requests.append(self.path)
            if receiver.status == 200:
                receiver.messages.append((content["title"], content["message"]))
            self.send_response(receiver.status)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with _serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as port:
        receiver.address = f"http://127.0.0.1:{port}/hook/a-long-secret-path?key=another-long-secret"
        yield receiver


@contextlib.contextmanager
def mail_server() -> Iterator[Receiver]:
    """A mail server that takes everything, without encryption or password."""
    receiver = Receiver()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"220 here\r\n")
            for line in self.rfile:
                word = line[:4].upper()
                self.wfile.write(
                    b"354 go on\r\n" if word == b"DATA" else b"221 bye\r\n" if word == b"QUIT" else b"250 ok\r\n"
                )
                if word == b"DATA":
                    receiver.messages.append(_mail(b"".join(iter(self.rfile.readline, b".\r\n"))))
                    self.wfile.write(b"250 taken\r\n")

    with _serving(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)) as port:
        receiver.address = f"mailto://127.0.0.1:{port}/?from=clear@localhost.test&to=us@localhost.test&mode=insecure"
        yield receiver


def _mail(content: bytes) -> tuple[str, str]:
    import email
    from email import policy

    message = email.message_from_bytes(content, policy=policy.default)
    return str(message["Subject"]), message.get_body(("plain", "html")).get_content()


@contextlib.contextmanager
def _serving(server: socketserver.BaseServer) -> Iterator[int]:
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

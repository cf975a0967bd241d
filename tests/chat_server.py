"""A real HTTP server that speaks the chat-completions protocol as a script tells it."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from clear.schema import Endpoint


def completion(text: str | None, prompt: int = 100, answer: int = 10, finish: str = "stop") -> dict:
    """A chat completion as the protocol has it."""
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
    return {"object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": finish}]} | (
        {"usage": usage} if prompt is not None else {}
    )


def user_text(body: dict) -> str:
    """The text parts of the last message."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(p["text"] for p in content if p["type"] == "text")


class ChatServer:
    """`answer(body, number)` gives (status, headers, JSON value or bytes) for the number-th request, from 0."""

    def __init__(self, answer: Callable[[dict, int], tuple[int, dict, object]]) -> None:
        self.answer, self.bodies, self.times, self.keys = answer, [], [], []
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    number = len(outer.bodies)
                    outer.bodies.append(body)
                    outer.times.append(time.monotonic())
                    outer.keys.append(self.headers.get("Authorization", ""))
                if self.path != "/v1/chat/completions":
                    status, headers, value = 404, {}, {"error": f"no {self.path} here"}
                else:
                    status, headers, value = outer.answer(body, number)
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                try:
                    self.send_response(status)
                    for name, text in headers.items():
                        self.send_header(name, text)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client gave up, which is what some tests are about

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def start(self) -> None:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def serving(answer: Callable[[dict, int], tuple[int, dict, object]]) -> Iterator[ChatServer]:
    """A running server."""
    server = ChatServer(answer)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def settings(url: str, **changes: object) -> Endpoint:
    """Parameters of an endpoint at `url`, quick to give up."""
    values = {
        "url": url,
        "model": "teacher-1",
        "key": "",
        "temperature": 0.0,
        "max_tokens": 50,
        "timeout": 5.0,
        "retries": 3,
        "concurrency": 3,
        "budget": 100.0,
        "price_input": 2.0,
        "price_output": 8.0,
    }
    return Endpoint(**values | changes)

"""The HTTP side: routes, limits and errors. Everything about the model is behind the worker.

A request is read, checked and decoded beside the batch (in threads), waits in the queue, and ends in one of four ways:
an answer, an error, its time is over, or its client has hung up. In all of them its rows leave the batch, and its bytes
count no longer.
"""

import asyncio
import hmac
import json
import re
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from clear.data.ports import is_loopback
from clear.serve.answers import Writer, whole
from clear.serve.batch import Row
from clear.serve.errors import ApiError
from clear.serve.metrics import Metrics
from clear.serve.page import render
from clear.serve.protocol import ChatRequest, parse
from clear.serve.settings import Settings
from clear.serve.talk import Picture
from clear.serve.worker import Full, Worker

DECODERS = 4
"""Pictures that are decoded at once: each may take as much memory as its pixels."""

FETCHERS = 16
"""Pictures that are fetched at once, all perhaps from slow servers; as many more may wait as the queue has places."""

HELD = 3 * 2**29
"""Bytes of requests, fetched and decoded pictures that are held at once, whoever sends them; beyond, a request is told
to try again. A picture decoded to BAGEL's sizes takes at most 4 MB, so a full default queue of them 1 GiB."""

LONG = 2**18
"""Bytes of a body that is parsed beside the event loop, so that other requests do not wait for it."""

LONG_TEXT = 2**16
"""Characters of a conversation, 0.1 s of tokenising. Longer ones wait for each other, not in asyncio's few threads."""

PAGE = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
"""What the page may load and run: its own style."""

OPEN = ("/health",)
"""Paths that need no key."""


@dataclass
class Service:
    """The state that the routes share."""

    settings: Settings
    worker: Worker
    metrics: Metrics
    held: int = 0
    fetching: int = 0  # requests whose picture is being fetched, or waits for it
    # Threads of their own, not asyncio's few, which all requests need. One whose request is over is still counted.
    fetchers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(FETCHERS, "fetch"))
    decoders: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(DECODERS, "decode"))
    readers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "read"))

    def require_ready(self) -> None:
        """Raise ApiError (503) while no request can be answered, and (429) where none can wait."""
        if not self.worker.ready:
            said = "the model is being loaded" if self.worker.answerer is None else "the server stops"
            raise ApiError(503, f"{said}; try again later.", headers={"Retry-After": "5"})
        if self.worker.full:
            raise _full(self.worker.retry_after)

    async def read(self, request: Request, claim: "Claim") -> ChatRequest:
        """Receive a request, its bytes counted in its claim. Raises ApiError (400, 413, 429)."""
        most, data = self.settings.body, bytearray()
        said = request.headers.get("content-length", "")
        if said.isdecimal() and int(said) > most:
            raise _too_large(most)
        async for piece in request.stream():
            data += piece
            if len(data) > most:
                raise _too_large(most)
            claim.hold(len(piece))
        return await asyncio.to_thread(parse, bytes(data)) if len(data) > LONG else parse(bytes(data))

    async def submit(self, asked: ChatRequest, claim: "Claim", wake: Callable[[], None]) -> None:
        """Make the rows of a request, which wait in the queue from now on. Raises ApiError (400, 429, 503)."""
        reader, loop = self.worker.reader, asyncio.get_running_loop()
        texts, picture = await asyncio.to_thread(reader.texts, asked)
        pool = self.readers if sum(map(len, texts)) > LONG_TEXT else None  # asyncio's own
        conversation = await loop.run_in_executor(pool, reader.conversation, texts)
        wishes = reader.wishes(asked, picture is not None)
        if len(wishes) > self.settings.queue:
            raise ApiError(400, f"n: {len(wishes)} answers, the queue of this server takes {self.settings.queue}.", "n")
        if picture is not None:
            data = await self._fetched(picture, claim) if picture.remote else None
            await loop.run_in_executor(self.decoders, reader.decode, conversation, picture, data)
        streams = bool(asked.stream)
        rows = [Row(0, conversation=conversation, wish=wish, changed=wake, streams=streams) for wish in wishes]
        claim.keep(rows[0].held)  # the request itself, and its encoded picture, are dropped now
        try:
            self.worker.submit(rows)
        except Full as error:
            raise _full(error.wait) from error
        claim.rows = rows

    async def _fetched(self, picture: Picture, claim: "Claim") -> bytes:
        """The bytes of a remote picture, counted in the claim. Raises ApiError (400, 429, 503)."""
        if self.fetching >= FETCHERS + self.settings.queue:
            raise _full(self.worker.retry_after)
        self.fetching += 1
        try:
            data = await asyncio.get_running_loop().run_in_executor(self.fetchers, self._fetch, picture)
        finally:
            self.fetching -= 1
        claim.hold(len(data))
        return data

    def _fetch(self, picture: Picture) -> bytes:
        self.require_ready()  # its turn may come when the server stops
        return self.worker.reader.fetch(picture)


@dataclass
class Claim:
    """What one request takes until it ends: bytes, counted in the service's `held`, and rows."""

    service: Service
    held: int = 0
    rows: list[Row] = field(default_factory=list)

    def hold(self, size: int) -> None:
        """Take so many bytes more. Raises ApiError (429) where all requests together hold too many."""
        self.held += size
        self.service.held += size
        if self.service.held > HELD:
            raise _full(self.service.worker.retry_after)

    def keep(self, size: int) -> None:
        """Give all bytes back but so many, or take as many. Raises as `hold`."""
        self.hold(size - self.held)

    def end(self) -> None:
        """Give the bytes back, and let the rows leave the batch."""
        self.service.held -= self.held
        self.held = 0
        for row in self.rows:
            row.gone = True


def _full(wait: int) -> ApiError:
    return ApiError(429, f"the queue is full; try again in {wait} s.", code="queue", headers={"Retry-After": str(wait)})


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body has more than {most} bytes.", code="too_large")


def _waker() -> tuple[asyncio.Event, Callable[[], None]]:
    """An event of this loop, and what sets it from another thread."""
    event, loop = asyncio.Event(), asyncio.get_running_loop()

    def wake() -> None:
        with suppress(RuntimeError):  # the loop has ended, and with it who waits
            loop.call_soon_threadsafe(event.set)

    return event, wake


async def _ended(rows: list[Row], event: asyncio.Event) -> None:
    while not all(row.finish for row in rows):
        await event.wait()
        event.clear()


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Stream(StreamingResponse):
    """A streamed answer that ends its request's claim with it, also before its first event was sent."""

    def __init__(self, events: AsyncIterator[str], claim: Claim) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._claim = claim

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._claim.end()


def create(settings: Settings, worker: Worker, metrics: Metrics) -> FastAPI:
    """The application; `worker` may still be loading the model."""
    app = FastAPI(title="CLEAR", version="1", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    service = Service(settings, worker, metrics)
    created = int(time.time())
    described = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    parts = described.pop("$defs")
    accepted = {"required": True, "content": {"application/json": {"schema": described}}}

    @app.post("/v1/chat/completions", openapi_extra={"requestBody": accepted})
    async def chat(request: Request) -> Response:
        """Answer a conversation about at most one picture (docs/SERVE.md)."""
        service.require_ready()
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "send application/json.", "content-type")
        began = time.monotonic()
        deadline = asyncio.get_running_loop().time() + settings.seconds
        claim = Claim(service)
        streamed = False
        try:
            async with asyncio.timeout_at(deadline):
                asked = await service.read(request, claim)
                if asked.model not in (None, "", settings.name):
                    what = f"model: {asked.model[:80]!r} is not served here; this is {settings.name!r}."
                    raise ApiError(404, what, "model", "model_not_found")
                event, wake = _waker()
                await service.submit(asked, claim, wake)
                head = (f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), settings.name)
                stream, options = asked.stream, asked.stream_options
                del asked  # not held while its rows wait
                if stream:
                    usage = options is not None and options.include_usage
                    events = _events(claim.rows, event, head, usage, deadline, service, began)
                    streamed = True
                    return _Stream(events, claim)
                await _answered(claim.rows, event, request)
                _require(claim.rows)
                metrics.latency.observe(time.monotonic() - began)
                return JSONResponse(await asyncio.to_thread(whole, claim.rows, *head))
        except TimeoutError as error:
            raise _late(settings) from error
        except ClientDisconnect as error:
            raise ApiError(499, "the client has hung up.") from error
        finally:
            if not streamed:  # else the stream does
                claim.end()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [_model(settings.name, created)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """The model by its name."""
        if name != settings.name:
            raise ApiError(404, f"model {name[:80]!r} is not served here; this is {settings.name!r}.", "model")
        return _model(name, created)

    @app.get("/health")
    async def health() -> JSONResponse:
        """Status 200 once the model is loaded, else 503."""
        return JSONResponse({"ready": worker.ready}, 200 if worker.ready else 503)

    @app.get("/metrics")
    async def measured() -> Response:
        """What is counted, for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(render(app.openapi(), settings), headers={"Content-Security-Policy": PAGE})

    for kind in (ApiError, HTTPException):
        app.add_exception_handler(kind, _refused)
    app.add_middleware(_Guard, service=service)
    app.openapi().setdefault("components", {}).setdefault("schemas", {}).update(parts)  # made once, here
    return app


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "clear"}


def _late(settings: Settings) -> ApiError:
    return ApiError(504, f"no answer within {settings.seconds:g} s.", code="timeout")


def _require(rows: list[Row]) -> None:
    """Raise ApiError (500, 503) where a row has failed."""
    if failed := next((row for row in rows if row.finish == "error"), None):
        raise ApiError(503 if failed.failure.startswith("the server") else 500, f"{failed.failure}.")


async def _answered(rows: list[Row], event: asyncio.Event, request: Request) -> None:
    """Wait until all rows have ended. Raises ApiError where the client hangs up before."""
    waits = [asyncio.ensure_future(_ended(rows, event)), asyncio.ensure_future(_hung_up(request))]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if not all(row.finish for row in rows):
            raise ApiError(499, "the client has hung up.")
    finally:
        for wait in waits:
            wait.cancel()


async def _events(
    rows: list[Row],
    event: asyncio.Event,
    head: tuple[str, int, str],
    usage: bool,
    deadline: float,
    service: Service,
    began: float,
) -> AsyncIterator[str]:
    """The server-sent events of a streamed answer; an error after the first of them is an event too."""
    writer = Writer(rows, service.worker.reader.spoken, head)
    try:
        for data in writer.opening():
            yield _event(data)
        while True:
            event.clear()
            over = all(row.finish for row in rows)
            async for data in writer.news():
                yield _event(data)
            _require(rows)
            if over:
                break
            await asyncio.wait_for(event.wait(), deadline - asyncio.get_running_loop().time())
        if usage:
            yield _event(writer.usage())
        service.metrics.latency.observe(time.monotonic() - began)
    except TimeoutError:
        yield _event(_late(service.settings).body)
    except ApiError as error:
        yield _event(error.body)
    yield "data: [DONE]\n\n"


def _event(data: dict) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def _refused(request: Request, error: Exception) -> JSONResponse:
    """A refusal as OpenAI's JSON."""
    if isinstance(error, HTTPException):
        said = {404: "there is nothing at this path", 405: "this path has no such method"}
        what = f"{said.get(error.status_code, error.detail)}: {request.url.path[:200]}"
        error = ApiError(error.status_code, what, headers=error.headers)
    return JSONResponse(error.body, error.status, error.headers)


class _Guard:
    """In front of all routes: the key, and the count of requests by path and status."""

    def __init__(self, app: Callable[..., Awaitable[None]], service: Service) -> None:
        self.app, self.service = app, service
        self.key = service.settings.key.encode()
        self.paths = ("/v1/chat/completions", "/v1/models", "/health", "/metrics", "/docs", "/openapi.json")

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self.paths else "other"

        async def counted(message) -> None:
            if message["type"] == "http.response.start":
                self.service.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        if self.key and scope["path"] not in OPEN and not self._knows_key(scope):
            error = ApiError(401, "send the server's key as `Authorization: Bearer …`.", code="invalid_api_key")
            await JSONResponse(error.body, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, counted)
            return
        if not self.key and not self._names_this_machine(scope):
            error = ApiError(403, "a server without a key answers as localhost only; start it with a key.", "host")
            await JSONResponse(error.body, 403)(scope, receive, counted)
            return
        try:
            await self.app(scope, receive, counted)
        except Exception:  # a fault of this program: the log has it, the client does not
            traceback.print_exc()
            error = ApiError(500, "internal error; the server's log says more.")
            with suppress(RuntimeError):  # an answer has begun
                await JSONResponse(error.body, 500)(scope, receive, counted)

    def _names_this_machine(self, scope) -> bool:
        """Whether a request was meant for this machine. A page from elsewhere whose name was made to lead here, so that
        its browser takes this server for the page's own, comes with that name."""
        host = dict(scope["headers"]).get(b"host", b"localhost").decode(errors="replace")
        return is_loopback(re.sub(r":\d*$", "", host))

    def _knows_key(self, scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, key = given.partition(b" ")
        return hmac.compare_digest(key.strip(), self.key) and kind.lower() == b"bearer"

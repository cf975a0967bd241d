"""Chat completions from an OpenAI-compatible server, asked once: for the teacher of the traces and for judges.

Every reply is kept in a SQLite file under the hash of its request (model, messages, sampling settings, draw), so an
interrupted run asks nothing twice and a repeated one asks nothing at all. The URL is not part of the hash: a proxy may
move. Temporary failures (time-out, 429, 5xx, a lost connection, a body that is not a completion) are retried with
growing pauses, or after the time the server names. Spending is capped: before each attempt its maximum cost is
reserved, and an attempt that could exceed the budget is refused.

    client = connect(config.judge, "judge", paths.replies_file("judge"))
    reply = client.ask(Request(messages(prompt)))                        # raises an EndpointError
    replies = client.ask_all(requests)                                   # a Reply or an EndpointError for each

Errors are types, because they mean different things to a caller: `Outage` (the answer is unknown; try later or reject),
`Malformed` (the server works, this reply is unusable), `Refused` (this request is not accepted), `Denied` and
`BudgetSpent` (no request will be accepted).
"""

import base64
import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from clear.errors import ClearError, shown, without_secrets
from clear.llm.ledger import ReplyStore, most_tokens
from clear.schema import Endpoint

LONGEST_WAIT = 600.0
"""Seconds; a server that asks for a longer pause counts as out of service."""

LARGEST_REPLY = 16 * 2**20


class EndpointError(ClearError):
    """No usable reply. `kind` is the word that tables and rejects use."""

    kind = "error"


class Outage(EndpointError):
    """Time-outs, 429, 5xx or no connection, after all attempts: nothing is known about the answer."""

    kind = "outage"


class Malformed(EndpointError):
    """The server answered every attempt with something that is not a chat completion or has no text."""

    kind = "malformed"


class Refused(EndpointError):
    """The server does not accept this request (4xx), such as an image that its filter stops."""

    kind = "refused"


class Denied(EndpointError):
    """No request will be accepted: key, URL or model is wrong, or nothing is left to pay with (401 to 405, 3xx)."""

    kind = "denied"


class BudgetSpent(EndpointError):
    """The next request could cost more than is left of the budget; it was not sent."""

    kind = "budget"


@dataclass(frozen=True)
class Request:
    """One chat completion. `messages` as in the OpenAI protocol (see `messages`); `draw` tells equal requests apart.

    Without `temperature` or `max_tokens` those of the configured endpoint are used. `as_json` asks the server for a
    JSON object.
    """

    messages: Sequence[dict]
    temperature: float | None = None
    max_tokens: int | None = None
    as_json: bool = False
    draw: int = 0


@dataclass(frozen=True)
class Reply:
    """The text of a completion and what it cost. `cut` if it ended at the token limit; `cached` if it was not asked."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    cut: bool = False
    cached: bool = False


def messages(prompt: str, image: bytes | None = None, system: str = "", kind: str = "png") -> list[dict]:
    """A system text, an image (encoded bytes, `kind` png or jpeg) and a prompt as the messages of a request."""
    content: Any = prompt
    if image is not None:
        url = f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]
    head = [{"role": "system", "content": system}] if system else []
    return [*head, {"role": "user", "content": content}]


def setting(value: str, key: str) -> str:
    """A configured value, or the environment variable it names as `$NAME`. Raises ClearError if that is not set."""
    if not value.startswith("$"):
        return value
    found = os.environ.get(value[1:], "")
    if not found:
        raise ClearError(f"params: {key} = {value}, and the environment variable {value[1:]} is not set; export it.")
    return found


def connect(config: Endpoint, name: str, cache: Path | str, pause: float = 1.0) -> "Client":
    """A client for the section `name` of the parameters; replies are kept in the file `cache`.

    Nothing is sent yet. `pause` is the first pause in seconds before a second attempt; each further one doubles it.
    Raises ClearError if URL, model or key are not given, and for a key that no request can carry.
    """
    for key in ("url", "model"):
        if not getattr(config, key):
            raise ClearError(f"params: {name}.{key} is empty; name the endpoint, or a variable as $NAME.")
    url, model = (setting(getattr(config, key), f"{name}.{key}") for key in ("url", "model"))
    if not url.startswith(("http://", "https://")):
        raise ClearError(f"params: {name}.url = {url!r} must begin with http:// or https:// (and usually end in /v1).")
    key = setting(config.key, f"{name}.key") if config.key else ""
    if not all("!" <= character <= "~" for character in key):  # said without the key: it is a secret
        raise ClearError(
            f"params: {name}.key = {config.key}, and that environment variable contains a character that no key has "
            "(a space, a line end, or one outside ASCII, such as the … of an example); export the key itself."
        )
    return Client(config, name, url.rstrip("/"), model, key, ReplyStore(cache), pause)


@dataclass
class Client:
    """Made by `connect`; safe to use from several threads. Close it, or use it in a `with` block."""

    config: Endpoint
    name: str
    url: str
    model: str
    key: str = field(repr=False)
    store: ReplyStore
    pause: float
    asked: int = 0
    more: dict[str, Any] = field(default_factory=dict)  # sent with every request, and so part of its identity
    _open: dict[str, threading.Lock] = field(default_factory=dict, repr=False)
    _guard: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _stop: threading.Event = field(default_factory=threading.Event, repr=False)

    def __post_init__(self) -> None:
        import httpx

        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        limits = httpx.Limits(max_connections=self.config.concurrency)
        timeout = httpx.Timeout(self.config.timeout, connect=min(10.0, self.config.timeout), pool=None)
        self._http = httpx.Client(headers=headers, limits=limits, timeout=timeout)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End pauses that other threads are in, and close the connections and the file."""
        self._stop.set()
        self._http.close()
        self.store.close()

    def body(self, request: Request) -> dict:
        """What is sent for a request."""
        c = self.config
        sent = {
            "model": self.model,
            "messages": list(request.messages),
            "temperature": c.temperature if request.temperature is None else request.temperature,
            "max_tokens": request.max_tokens or c.max_tokens,
        }
        return sent | self.more | ({"response_format": {"type": "json_object"}} if request.as_json else {})

    def hash_of(self, request: Request) -> str:
        """Identity of a request in the cache."""
        text = json.dumps([self.body(request), request.draw], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def cached(self, request: Request) -> Reply | None:
        """The kept reply, if there is one; asks nothing."""
        found = self.store.get(self.hash_of(request))
        return Reply(*found, cached=True) if found else None

    def ask(self, request: Request) -> Reply:
        """The reply to a request, from the cache or from the server. Raises an EndpointError (see the module)."""
        key = self.hash_of(request)
        with self._guard:
            lock = self._open.setdefault(key, threading.Lock())
        try:
            with lock:  # two threads with one request ask it once
                found = self.store.get(key)
                return Reply(*found, cached=True) if found else self._fetch(key, self.body(request))
        finally:
            self._open.pop(key, None)  # later callers find the reply in the store

    def ask_all(
        self, requests: Iterable[Request], progress: Callable[[int], Any] | None = None
    ) -> Iterator[Reply | EndpointError]:
        """For each request, in order, its reply or the error that explains its absence.

        `endpoint.concurrency` requests are under way at once, and few more are held in memory. Raises Denied and
        BudgetSpent, which concern every request; whatever was answered until then is kept.
        """
        window = 4 * self.config.concurrency
        waiting: list = []
        pool = ThreadPoolExecutor(self.config.concurrency)

        def first() -> Reply | EndpointError:
            try:
                return waiting.pop(0).result()
            except (Denied, BudgetSpent):
                raise
            except EndpointError as error:
                return error
            finally:
                if progress is not None:
                    progress(1)

        try:
            for request in requests:
                waiting.append(pool.submit(self.ask, request))
                if len(waiting) >= window:
                    yield first()
            while waiting:
                yield first()
        except BaseException:
            self._stop.set()  # threads that pause give up at once
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            self._stop.clear()

    def report(self) -> dict:
        """What was spent, over all runs that used this cache: requests, tokens, USD; `unconfirmed_usd` is the part
        that was reserved for attempts without a reply (the server may have billed them)."""
        return {"model": self.model, "asked_now": self.asked, **self.store.totals(), "budget_usd": self.config.budget}

    # --- one request ------------------------------------------------------------------------------------------------

    def _fetch(self, key: str, body: dict) -> Reply:
        reason, malformed = "", False
        for attempt in range(self.config.retries + 1):
            wait = 0.0
            with self._attempt(key, body) as outcome:
                reply = self._send(body, outcome)
            if reply is not None:
                return reply
            reason, wait, malformed = outcome.reason, outcome.wait, outcome.malformed
            if wait > LONGEST_WAIT:
                raise Outage(f"{self.name}: {reason}; it asks for a pause of {wait:.0f} s. Try again later.")
            if attempt < self.config.retries:
                # Spread, so that parallel requests do not come back together; no result depends on it.
                spread = self.pause * 2**attempt * random.uniform(0.75, 1.25)
                if self._stop.wait(max(wait, min(spread, 60.0))):
                    break
        tries = f"after {self.config.retries + 1} attempts at {self.url}"
        if malformed:
            raise Malformed(f"{self.name}: {reason} {tries}; the server is not OpenAI-compatible, or overloaded.")
        raise Outage(f"{self.name}: {reason} {tries}; start it or wait, then run the same command again.")

    @contextmanager
    def _attempt(self, key: str, body: dict) -> Iterator["_Outcome"]:
        """Set the attempt's highest cost aside, then settle what it really cost. Raises BudgetSpent."""
        highest = self.forecast(body)
        ticket, spent = self.store.reserve(key, highest, self.config.budget)
        if ticket is None:
            raise BudgetSpent(
                f"{self.name}: {spent:.4f} USD of {self.name}.budget = {self.config.budget} are spent or reserved, "
                f"and the next request may cost {highest:.4f}. Raise {self.name}.budget; what was answered is kept."
            )
        outcome = _Outcome()
        try:
            yield outcome
        finally:
            reply = outcome.reply
            if reply is not None:
                kept = (reply.text, reply.prompt_tokens, reply.completion_tokens, reply.cut)
                self.store.settle(ticket, outcome.cost, key, kept)
            elif outcome.free:
                self.store.settle(ticket, 0.0)

    def _send(self, body: dict, outcome: "_Outcome") -> Reply | None:
        import httpx

        self.asked += 1
        deadline = time.monotonic() + self.config.timeout
        try:
            with self._http.stream("POST", f"{self.url}/chat/completions", json=body) as response:
                data = bytearray()
                for chunk in response.iter_bytes():
                    data += chunk
                    if time.monotonic() > deadline:
                        raise httpx.ReadTimeout("the reply did not end")
                    if len(data) > LARGEST_REPLY:
                        outcome.malformed, outcome.reason = True, f"a reply of more than {LARGEST_REPLY} bytes"
                        return None
        except httpx.TimeoutException:
            outcome.reason = f"no reply within {self.config.timeout:g} s"
            return None
        except httpx.InvalidURL as error:
            raise Denied(f"{self.name}: {self.url} is not a URL ({error}); correct {self.name}.url.") from error
        except httpx.RequestError as error:  # no connection, or a body that is not in the coding it claims
            outcome.free = isinstance(error, httpx.ConnectError)  # it never left
            kind = "connection" if isinstance(error, httpx.TransportError) else "readable reply"
            outcome.reason = f"no {kind} ({error or type(error).__name__})"
            return None
        self._check_status(response, bytes(data), outcome)
        if outcome.reason:
            return None
        return self._parse(bytes(data), body, outcome)

    def _check_status(self, response, data: bytes, outcome: "_Outcome") -> None:
        code = response.status_code
        if code == 200:
            return
        outcome.free = True  # errors are not billed
        said = " ".join(data[:300].decode("utf-8", "replace").split())
        said = without_secrets(said, self.key)  # some servers repeat the key that they refuse
        if code in (401, 402, 403, 404, 405) or code < 400:  # the last with another address in place of a text
            said = said or shown(response.headers.get("location", ""))
            remedy = "its credit is used up" if code == 402 else f"check the URL, the key and model '{self.model}'"
            raise Denied(f"{self.name}: {self.url} answers {code} ({said}); {remedy}.")
        outcome.reason = f"status {code} ({said})"
        if code in (408, 409, 425, 429) or code >= 500:
            outcome.wait = retry_after(response.headers.get("retry-after", ""))
        else:
            raise Refused(f"{self.name}: the server refuses this request with {code}: {said}")

    def _parse(self, data: bytes, body: dict, outcome: "_Outcome") -> Reply | None:
        try:
            said = json.loads(data)
            choice = said["choices"][0]
            text, usage = choice["message"]["content"], said.get("usage") or {}
            tokens = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
            if not isinstance(text, str) or not text.strip():
                raise ValueError("no text in the reply")
            text.encode()  # half a character, from whoever cut the text, can be kept nowhere
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            outcome.malformed, outcome.reason = True, f"no chat completion ({type(error).__name__}: {error})"
            return None
        known = all(isinstance(count, int) and 0 <= count < 2**53 for count in tokens)
        prompt, completion = tokens if known else most_tokens(body)
        outcome.cost = self._price(prompt, completion)
        outcome.reply = Reply(text, prompt, completion, choice.get("finish_reason") == "length")
        return outcome.reply

    def forecast(self, body: dict) -> float:
        """The most that a request can cost, in USD."""
        return self._price(*most_tokens(body))

    def _price(self, prompt: int, completion: int) -> float:
        return (prompt * self.config.price_input + completion * self.config.price_output) / 1e6


@dataclass
class _Outcome:
    """What became of one attempt. `free`: certainly not billed."""

    reply: Reply | None = None
    reason: str = ""
    wait: float = 0.0
    cost: float = 0.0
    free: bool = False
    malformed: bool = False


def retry_after(value: str) -> float:
    """Seconds to wait by a Retry-After header (seconds or a date); 0 where it says nothing usable."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError, OverflowError):
        return 0.0

"""Pictures of a request: data URLs and, where the operator allows it, the network; checked before they are decoded.

A URL is an instruction to this machine to open a connection, so nothing is fetched unless `clear serve` is told to, and
then only from public addresses: every name is resolved here, all of its addresses must be public, and the connection
goes to the address that was checked. A redirect is a new URL and is checked like the first one.
"""

import asyncio
import base64
import ipaddress
import re
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from io import BytesIO
from urllib.parse import urljoin, urlsplit

from clear.data.images import READ
from clear.serve.errors import ApiError

REDIRECTS = 3
SECONDS = 10.0
"""Of a fetch: to resolve the name, to connect, and between two pieces of the answer."""

WHOLE = 30.0
"""Seconds of a whole fetch, also of a server that sends a byte now and then: it holds one of few threads."""

LOOKUPS = 32
"""Names that are resolved at once, with those that nobody waits for any more: nothing ends a lookup but its answer."""

_lookups = threading.BoundedSemaphore(LOOKUPS)

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""Addresses that a gateway translates to the IPv4 address in their last 32 bits."""

_DATA = re.compile(r"data:(?:image/[\w.+-]+|application/octet-stream)?(?:;[\w-]+=[\w.-]+)*;base64,", re.IGNORECASE)


def from_data_url(url: str, param: str) -> bytes:
    """The bytes of a data URL. Raises ApiError (400)."""
    head = _DATA.match(url)
    if head is None:
        raise ApiError(400, f"{param}: expected data:image/png;base64,… (or jpeg, webp, …), got {url[:40]!r}.", param)
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except ValueError as error:  # binascii's own, or a character beyond ASCII
        raise ApiError(400, f"{param}: the base64 after the comma is damaged ({error}).", param) from error


def check_pixels(data: bytes, most: int, param: str) -> None:
    """Refuse a picture whose header states more than `most` pixels; nothing is decoded. Raises ApiError (400)."""
    from PIL import Image

    try:
        with Image.open(BytesIO(data), formats=READ) as picture:
            width, height = picture.size
    except Image.DecompressionBombError as error:
        raise ApiError(400, f"{param}: {error}; at most {most} are accepted, make it smaller.", param) from error
    except Exception as error:  # readers of rare formats raise whatever occurs to them
        raise ApiError(400, f"{param}: {len(data)} bytes are not a picture; send PNG, JPEG or WebP.", param) from error
    if width * height > most:
        what = f"{param}: {width} x {height} pixels, at most {most} are accepted; make it smaller."
        raise ApiError(400, what, param)


def is_public(address: str) -> bool:
    """Whether an address belongs to the public internet: not loopback, private, link-local, reserved or multicast."""
    found = ipaddress.ip_address(address)
    inner = getattr(found, "ipv4_mapped", None) or getattr(found, "sixtofour", None)
    if found.version == 6 and found in _NAT64:
        inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
    return found.is_global and not found.is_multicast and (inner is None or is_public(str(inner)))


def fetch(url: str, most: int, param: str, public: Callable[[str], bool] = is_public) -> bytes:
    """The at most `most` bytes behind an http(s) URL whose every address is `public`, within WHOLE seconds.

    Raises ApiError (400) for a picture that cannot be had, and (503) while LOOKUPS names are being resolved.
    """
    import httpx

    try:
        return asyncio.run(asyncio.wait_for(_fetch(url, most, param, public), WHOLE))
    except TimeoutError as error:
        raise ApiError(400, f"{param}: could not be fetched within {WHOLE:g} s.", param) from error
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        raise ApiError(400, f"{param}: cannot be fetched ({type(error).__name__}).", param) from error


async def _fetch(url: str, most: int, param: str, public: Callable[[str], bool]) -> bytes:
    import httpx

    async with httpx.AsyncClient(timeout=SECONDS, trust_env=False, follow_redirects=False) as client:
        for _ in range(REDIRECTS + 1):
            response = await client.send(await _request(client, url, param, public), stream=True)
            try:
                if response.has_redirect_location:  # any 3xx `is_redirect`, also a 304
                    url = urljoin(url, response.headers["location"])
                    continue
                if response.status_code != 200:
                    raise ApiError(400, f"{param}: its server answers {response.status_code}.", param)
                data = bytearray()
                async for piece in response.aiter_bytes():
                    data += piece
                    if len(data) > most:
                        raise ApiError(400, f"{param}: more than {most} bytes.", param)
                return bytes(data)
            finally:
                await response.aclose()
    raise ApiError(400, f"{param}: more than {REDIRECTS} redirects.", param)


async def _request(client, url: str, param: str, public: Callable[[str], bool]):
    """The request for a URL, addressed to an address that was checked."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ApiError(400, f"{param}: only http and https can be fetched.", param)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    addresses = await _addresses(parts.hostname, port, param)
    if not all(public(address.partition("%")[0]) for address in addresses):
        raise ApiError(400, f"{param}: {parts.hostname} is not a public address; send a data URL.", param)
    chosen = f"[{addresses[0]}]" if ":" in addresses[0] else addresses[0]
    target = parts._replace(netloc=f"{chosen}:{port}", fragment="").geturl()
    host = parts.hostname if parts.port is None else f"{parts.hostname}:{parts.port}"
    return client.build_request(
        "GET", target, headers={"Host": host, "Accept": "image/*"}, extensions={"sni_hostname": parts.hostname}
    )


async def _addresses(host: str, port: int, param: str) -> list[str]:
    """The addresses of a name. Raises ApiError (400) without an answer within SECONDS, and (503) as `fetch`.

    The system's resolver cannot be interrupted: each name has a thread, which is left to end when the answer comes.
    It is a daemon, so that the end of the process does not wait for it either.
    """
    if not _lookups.acquire(blocking=False):
        what = f"{param}: {LOOKUPS} names of pictures are being resolved; try again later."
        raise ApiError(503, what, param, headers={"Retry-After": "10"})
    answer: Future[list] = Future()
    answer.set_running_or_notify_cancel()  # from now on nobody cancels it, and its result can be set

    def look_up() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except Exception as error:
            _lookups.release()
            answer.set_exception(error)
        else:
            _lookups.release()
            answer.set_result(found)

    threading.Thread(target=look_up, name="lookup", daemon=True).start()
    try:
        found = await asyncio.wait_for(asyncio.wrap_future(answer), SECONDS)
    except TimeoutError as error:
        raise ApiError(400, f"{param}: the name {host} was not resolved within {SECONDS:g} s.", param) from error
    return list(dict.fromkeys(entry[4][0] for entry in found))

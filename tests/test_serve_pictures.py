"""Where `clear serve` may fetch a picture from: real servers on two addresses, one of which plays the internet."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from clear.serve import app, pictures
from clear.serve.errors import ApiError
from clear.serve.pictures import check_pixels, fetch, from_data_url, is_public
from tests.serving import Server, asking, data_url, make_workspace, patched, picture, serving, with_url

INTERNET, HERE = "127.0.0.2", "127.0.0.1"


class _Pictures(BaseHTTPRequestHandler):
    """Paths say what to do: /p.png, /large, /status/404, /endless, /slow, /to/<n>/<url>: n redirects to it; /shut waits
    for the server's gate."""

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Host"]))
        _, what, *rest = self.path.split("/", 2)
        if what == "to":
            number, target = rest[0].split("/", 1)
            self.send_response(302)
            again = f"/to/{int(number) - 1}/{target}" if int(number) > 1 else target
            self.send_header("Location", again)
            self.end_headers()
            return
        if what == "slow" and rest == ["head"]:
            self._drip()
        if what == "shut":
            self.server.gate.wait(60)
        self.send_response(int(rest[0]) if what == "status" else 200)
        self.end_headers()
        if what == "slow":
            self._drip()
        if what == "endless":
            for _ in range(10_000):
                self.wfile.write(b"x" * 1000)
        self.wfile.write(picture(size=(700, 700) if what == "large" else (48, 48)))

    def _drip(self) -> None:
        """A byte now and then, always before a pause would be too long."""
        with contextlib.suppress(OSError):
            for _ in range(200):
                self.wfile.write(b"H")
                time.sleep(0.05)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def servers() -> Iterator[dict[str, ThreadingHTTPServer]]:
    made = {}
    for address in (INTERNET, HERE):
        server = ThreadingHTTPServer((address, 0), _Pictures)
        server.asked, server.gate = [], threading.Event()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        made[address] = server
    yield made
    for server in made.values():
        server.shutdown()
        server.server_close()


def _url(server: ThreadingHTTPServer, path: str) -> str:
    return "http://{}:{}{}".format(*server.server_address[:2], path)


def _get(url: str, most: int = 10**6) -> bytes:
    return fetch(url, most, "field", public=lambda address: address == INTERNET)


def test_a_picture_is_fetched_from_a_public_address(servers):
    internet = servers[INTERNET]
    assert _get(_url(internet, "/p.png")) == picture()
    assert _get(_url(internet, "/to/2//p.png")) == picture(), "a redirect that stays there is followed"
    assert internet.asked[0][1] == "{}:{}".format(*internet.server_address[:2])


@pytest.mark.parametrize("part", ["head", "body"])
def test_a_server_that_always_has_a_little_more_is_left(servers, part, monkeypatch):
    """The pauses are short, and the thread that waits is one of few."""
    monkeypatch.setattr(pictures, "WHOLE", 0.5)
    began = time.monotonic()
    with pytest.raises(ApiError, match=r"could not be fetched within 0\.5 s"):
        _get(_url(servers[INTERNET], f"/slow/{part}"))
    assert time.monotonic() - began < 3


@pytest.fixture
def shut(monkeypatch) -> Iterator[threading.Event]:
    """What opens a resolver that answers no question about slow.name until then, or for 5 s."""
    gate, real = threading.Event(), socket.getaddrinfo

    def resolve(host, port, *more, **named):
        if host == "slow.name":
            gate.wait(5)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (INTERNET, port))]
        return real(host, port, *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(pictures, "SECONDS", 0.3)
    yield gate
    gate.set()


def _lookups() -> int:
    return sum(thread.name == "lookup" for thread in threading.enumerate())


@pytest.mark.parametrize(("whole", "said"), [(30, "the name slow.name was not resolved within 0.3 s"), (0.1, "0.1 s")])
def test_a_name_that_takes_long_to_resolve_is_left(shut, monkeypatch, whole, said):
    monkeypatch.setattr(pictures, "WHOLE", whole)
    began = time.monotonic()
    with pytest.raises(ApiError, match=said) as refused:
        _get("http://slow.name/p.png")
    assert time.monotonic() - began < 2 and refused.value.status == 400


def test_only_so_many_names_are_resolved_at_once(servers, shut, monkeypatch):
    monkeypatch.setattr(pictures, "_lookups", threading.BoundedSemaphore(2))
    port = servers[INTERNET].server_address[1]
    statuses = []
    for _ in range(4):
        with pytest.raises(ApiError) as refused:
            _get(f"http://slow.name:{port}/p.png")
        statuses.append(refused.value.status)
    assert statuses == [400, 400, 503, 503] and refused.value.headers["Retry-After"] and _lookups() == 2
    shut.set()
    until = time.monotonic() + 5
    while _lookups():
        assert time.monotonic() < until
        time.sleep(0.01)
    assert _get(f"http://slow.name:{port}/p.png") == picture(), "they have ended, also those nobody waited for"


def test_nothing_private_is_asked_also_after_a_redirect(servers):
    internet, here = servers[INTERNET], servers[HERE]
    for url in (
        _url(here, "/p.png"),
        _url(internet, f"/to/1/{_url(here, '/p.png')}"),
        _url(internet, f"/to/2/{_url(here, '/p.png')}"),
        f"http://localhost:{here.server_address[1]}/p.png",
    ):
        with pytest.raises(ApiError, match="not a public address"):
            _get(url)
    assert here.asked == [], "the address is looked at before a connection is opened"


def test_a_name_with_one_private_address_among_public_ones_is_refused(servers, monkeypatch):
    internet, here = servers[INTERNET], servers[HERE]
    port = internet.server_address[1]
    both = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in (INTERNET, HERE)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    with pytest.raises(ApiError, match="not a public address"):
        _get(f"http://some.name:{port}/p.png")
    assert internet.asked == here.asked == []


def test_the_connection_goes_to_the_address_that_was_checked(servers, monkeypatch):
    """A name that resolves to another address the second time (DNS rebinding) gains nothing."""
    internet, here = servers[INTERNET], servers[HERE]
    port, calls = internet.server_address[1], []
    real = socket.getaddrinfo

    def resolve(host, *more, **named):
        if host != "some.name":
            return real(host, *more, **named)
        calls.append(host)
        address = INTERNET if len(calls) == 1 else HERE
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert _get(f"http://some.name:{port}/p.png") == picture()
    assert len(calls) == 1 and here.asked == [] and internet.asked == [("/p.png", f"some.name:{port}")]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/status/404", "answers 404"),
        ("/status/300", "answers 300"),  # redirects that lead nowhere
        ("/status/302", "answers 302"),
        ("/status/304", "answers 304"),
        ("/endless/", "more than 1000 bytes"),
        ("/to/9//p.png", "more than 3 redirects"),
    ],
)
def test_what_is_no_picture_there_is_an_error(servers, path, said):
    with pytest.raises(ApiError, match=said):
        _get(_url(servers[INTERNET], path), most=1000)


@pytest.mark.parametrize(
    "url", ["ftp://host/p.png", "http:///p.png", "http://127.0.0.2:1/", "http://[::1", "http://127.0.0.2:99999/"]
)
def test_other_urls_are_errors_too(url):
    with pytest.raises(ApiError):
        _get(url)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::7f00:1", False),
    ],
)
def test_public_addresses(address, public):
    assert is_public(address) == public


def test_data_urls():
    data = picture()
    assert from_data_url(data_url(data), "f") == data
    assert from_data_url(data_url(data).replace("image/png", "IMAGE/PNG;charset=utf-8"), "f") == data
    for wrong in ("data:text/html;base64,AAAA", "data:image/png,AAAA", "data:image/png;base64,A", "", "AAAA"):
        with pytest.raises(ApiError) as refused:
            from_data_url(wrong, "f")
        assert refused.value.status == 400 and refused.value.param == "f"


def test_pixels_are_counted_from_the_header():
    check_pixels(picture(size=(10, 20)), 200, "f")
    with pytest.raises(ApiError, match="20 x 10 pixels, at most 199"):
        check_pixels(picture(size=(10, 20)), 199, "f")


# --- through `clear serve` ------------------------------------------------------------------------------------------


OTHER = """
import time
import clear.serve.answers, clear.serve.app, clear.serve.pictures
encode = clear.serve.answers.encode_image
clear.serve.answers.encode_image = lambda picture: time.sleep(2) or encode(picture)
clear.serve.app.HELD = 1_000_000
clear.serve.pictures.fetch.__defaults__ = (lambda address: True,)
"""
"""A server that takes every address for public, holds a million bytes, and encodes slowly."""


@pytest.fixture(scope="module")
def fetching(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    make_workspace(folder)
    with serving(folder, "--fetch-pictures", environment=patched(folder, OTHER)) as server:
        yield server
        assert "Traceback" not in server.log


def test_a_redirect_that_leads_nowhere_is_the_fault_of_the_request(servers, fetching):
    response = fetching.ask(with_url(_url(servers[INTERNET], "/status/304")))
    assert response.status_code == 400 and response.json()["error"]["param"] == "messages.0.content.0.image_url"
    assert response.json()["error"]["message"].endswith("its server answers 304.")


def test_slow_pictures_keep_nobody_waiting_who_sends_none(servers, fetching):
    internet, many = servers[INTERNET], app.FETCHERS + 4
    with ThreadPoolExecutor(many) as pool:
        slow = [pool.submit(fetching.ask, with_url(_url(internet, "/shut")) | {"max_tokens": 2}) for _ in range(many)]
        try:
            until = time.monotonic() + 8
            while len(internet.asked) < app.FETCHERS and time.monotonic() < until:
                time.sleep(0.02)
            for image in (None, picture()):
                body = asking(image=image, max_tokens=2)
                assert fetching.http.post("/v1/chat/completions", json=body, timeout=5).status_code == 200
            assert len(internet.asked) == app.FETCHERS, "the others wait for their turn"
            assert not any(answer.done() for answer in slow)
        finally:
            internet.gate.set()
        assert [answer.result().status_code for answer in slow] == [200] * many


def test_a_fetched_picture_is_held_like_a_sent_one(servers, fetching):
    large, small = (with_url(_url(servers[INTERNET], path)) | {"max_tokens": 2} for path in ("/large", "/p.png"))
    assert fetching.ask(large).status_code == 429
    assert fetching.ask(small).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_restored_pictures_are_encoded_beside_the_other_requests(fetching, stream):
    body = asking(image=picture(), max_tokens=20, stream=stream, clear={"restore": "always", "pictures": True})
    pauses = []
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(fetching.ask, body)
        while not answer.done():
            began = time.monotonic()
            assert fetching.http.get("/health").status_code == 200
            pauses.append(time.monotonic() - began)
            time.sleep(0.02)
    assert "data:image/png;base64," in answer.result().text and max(pauses) < 1.5


FEW = """
import socket, time
import clear.serve.app, clear.serve.pictures
real = socket.getaddrinfo
def resolve(host, *more, **named):
    if host == "slow.name":
        time.sleep(120)
    return real(host, *more, **named)
socket.getaddrinfo = resolve
clear.serve.app.FETCHERS = 2
clear.serve.pictures.SECONDS = 0.5
clear.serve.pictures.fetch.__defaults__ = (lambda address: True,)
"""
"""A server that takes every address for public, fetches two pictures at once, and resolves one name slowly."""


def test_more_pictures_than_the_queue_has_places_wait_for_no_turn(servers, tmp_path):
    make_workspace(tmp_path)
    body = with_url(_url(servers[INTERNET], "/shut")) | {"max_tokens": 2}
    code = FEW.replace("SECONDS = 0.5", "SECONDS = 30")
    options = "--fetch-pictures", "--queue", "3"
    with serving(tmp_path, *options, environment=patched(tmp_path, code)) as server, ThreadPoolExecutor(9) as pool:
        answers = [pool.submit(server.ask, body) for _ in range(9)]
        try:
            until = time.monotonic() + 8
            while sum(answer.done() for answer in answers) < 4 and time.monotonic() < until:
                time.sleep(0.02)
            refused = [answer.result() for answer in answers if answer.done()]
            assert [answer.status_code for answer in refused] == [429] * 4, "two are fetched, three wait"
            assert int(refused[0].headers["Retry-After"]) >= 1
        finally:
            servers[INTERNET].gate.set()
        found = sorted(answer.result().status_code for answer in answers)
        assert found[:3] == [200] * 3 and found[5:] == [429] * 4, "two more may be done before there is a place again"
        assert set(found) == {200, 429}


def test_a_resolver_that_hangs_delays_neither_the_answer_nor_the_end(tmp_path):
    make_workspace(tmp_path)
    with serving(tmp_path, "--fetch-pictures", environment=patched(tmp_path, FEW)) as server:
        began = time.monotonic()
        for _ in range(3):  # more than are fetched at once
            response = server.http.post("/v1/chat/completions", json=with_url("http://slow.name/p.png"), timeout=10)
            assert response.status_code == 400 and "slow.name was not resolved" in response.text
        server.process.terminate()
        assert server.process.wait(20) == 0 and time.monotonic() - began < 20

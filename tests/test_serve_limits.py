"""`clear serve` within limits: a key, a full queue, little time, no private address, and what ends with the server."""

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest

from clear.config import compose, from_dict
from clear.data.images import encode_image
from clear.model.images import ImageBank
from clear.serve.app import HELD
from clear.serve.batch import ID, Conversation
from clear.serve.settings import Settings
from tests.serving import TOKENS, Server, asking, events, make_workspace, patched, picture, serving, with_url


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    make_workspace(folder, f"sampling.max_think_tokens={TOKENS}", endless=True)
    return folder


@pytest.fixture(scope="module")
def strict(folder):
    options = "--rows", "1", "--queue", "2", "--timeout", "60", "--max-tokens", "100000", "--fetch-pictures"
    mounted = {"CLEAR_SERVE_KEY": " a secret\r\n"}  # as a file of secrets has it
    with serving(folder, *options, key="a secret", environment=mounted) as server:
        yield server


def test_a_key_is_required_where_there_is_one(strict):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "a secret"}):
        for path in ("/v1/models", "/metrics", "/docs", "/openapi.json"):
            response = httpx.get(f"{strict.url}{path}", headers=headers, trust_env=False)
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{strict.url}/health", trust_env=False).status_code == 200
    assert strict.http.get("/v1/models").status_code == 200
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{strict.url}/v1", api_key="no", max_retries=0).models.list()


def test_spaces_and_line_ends_around_the_key_are_no_part_of_it(strict):
    assert strict.http.headers["authorization"] == "Bearer a secret"
    assert strict.http.get("/v1/models").status_code == 200


@pytest.mark.parametrize(("key", "said"), [(" \n", "is blank"), ("one\ntwo", "has a line break")])
def test_a_key_that_no_client_can_send_is_one_line(folder, clear, monkeypatch, key, said):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CLEAR_SERVE_KEY", key)
    status, _, error = clear("serve", "nothing", "--port", "0")  # which would be the next error
    assert status == 1 and error.startswith(f"error: --key-from CLEAR_SERVE_KEY: this environment variable {said}")
    assert error.count("\n") == 1 and "two" not in error


def test_a_full_queue_says_when_to_try_again(strict):
    body = asking(image=picture(), max_tokens=150, clear={"restore": "plain"})
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: strict.ask(body), range(8)))
    statuses = [response.status_code for response in found]
    assert statuses.count(200) >= 2 and 429 in statuses and set(statuses) <= {200, 429}
    refused = next(response for response in found if response.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1 and refused.json()["error"]["type"] == "rate_limit_error"
    never = strict.ask(asking(n=3, max_tokens=2))
    assert never.status_code == 400 and never.json()["error"]["param"] == "n", "three choices never fit a queue of two"


FLAT = encode_image(np.zeros((48, 48, 3), np.uint8))
"""A picture of a hundred bytes that decodes to 14 kB in the model's two sizes."""


def _streamed(image: bytes, **more) -> dict:
    """A request that takes long, once it has begun."""
    return asking(image=image, max_tokens=TOKENS, n=8, stream=True, clear={"restore": "plain"}) | more


@contextmanager
def _begun(server: Server, body: dict) -> Iterator[None]:
    """While a streamed answer has begun."""
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        lines = response.iter_lines()  # kept: the end of this generator would hang up
        next(lines)
        yield


def test_a_streamed_request_is_held_until_it_ends(folder, tmp_path):
    streamed = _streamed(FLAT)
    environment = patched(tmp_path, "import clear.serve.app\nclear.serve.app.HELD = 20_000\n")

    def status() -> int:
        return server.ask(image=FLAT, max_tokens=2).status_code

    with serving(folder, "--rows", "1", environment=environment) as server:
        with _begun(server, streamed):
            assert status() == 429, "there is room for the pixels of one of them"
            server.wait_for("clear_batch_rows", 1)  # 0 would be true before the batch has taken the first of them
        server.wait_for("clear_batch_rows", 0)  # the client has hung up
        assert status() == 200
        assert events(server.ask(streamed)) and status() == 200


def test_a_request_that_waits_holds_its_pixels_and_not_the_file(folder, tmp_path):
    noise = picture(size=(150, 150))  # 90 kB to send, 14 kB decoded
    environment = patched(tmp_path, "import clear.serve.app\nclear.serve.app.HELD = 110_000\n")
    with serving(folder, "--rows", "1", environment=environment) as server:
        with _begun(server, _streamed(noise)), _begun(server, _streamed(noise)):
            pass  # and so did the second one
        server.wait_for("clear_queue_rows", 0)
        with _begun(server, _streamed(FLAT, stop="x" * 60_000)):
            assert server.ask(image=noise, max_tokens=2).status_code == 429, "stop texts are held too"
            with _begun(server, _streamed(FLAT)):
                pass


def test_the_queue_of_the_defaults_fits_into_what_is_held():
    """Of pictures as large as the largest profile decodes them."""
    config = from_dict(compose(["profile=bagel_7b_lora"]))
    conversation = Conversation((), (1, 2), ImageBank([picture(size=(1200, 1200))], config.model))
    assert conversation.held == 3 * (1024**2 + 518**2) + 2 * ID
    waiting = Settings("m").queue + config.sampling.batch
    assert waiting * conversation.held < 0.7 * HELD, "the rest is for what is being received and decoded"


@pytest.mark.slow
def test_a_request_has_a_time_limit(folder):
    with serving(folder, "--timeout", "0.5") as server:
        for stream in (False, True):
            body = asking(image=picture(), max_tokens=2 * TOKENS, n=16, stream=stream, clear={"restore": "plain"})
            response = server.ask(body)
            if stream:
                assert events(response)[-1]["error"]["code"] == "timeout"
            else:
                assert response.status_code == 504 and response.json()["error"]["code"] == "timeout"
            server.wait_for("clear_batch_rows", 0)


def test_pictures_are_fetched_from_no_private_address(strict):
    for url in ("http://127.0.0.1:1/p.png", "http://[::1]/p.png", "http://10.0.0.1/", "http://169.254.169.254/latest"):
        response = strict.ask(with_url(url))
        assert response.status_code == 400 and "not a public address" in response.text, response.text


def test_sigterm_ends_what_runs_and_then_the_server(folder):
    with serving(folder) as server:
        body = asking(image=picture(), max_tokens=TOKENS, stream=True, clear={"restore": "plain"})
        with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(line for line in lines if line.startswith("data:"))
            server.process.send_signal(signal.SIGTERM)
            start = time.monotonic()
            rest = "".join(lines)
        assert '"finish_reason": "length"' in rest and rest.endswith("[DONE]")
        assert server.process.wait(30) == 0 and time.monotonic() - start < 30
        assert "Traceback" not in server.log
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health", trust_env=False)


@pytest.mark.slow
def test_what_does_not_end_in_time_is_told_that_the_server_stops(folder, tmp_path):
    soon = patched(tmp_path, "import clear.serve.worker\nclear.serve.worker.DRAIN = 0.2\n")  # instead of the 20 s
    with serving(folder, "--max-tokens", "100000", environment=soon) as server:
        body = asking(image=picture(), max_tokens=2 * TOKENS, n=16, clear={"restore": "plain"})
        answers = []
        thread = threading.Thread(target=lambda: answers.append(server.ask(body)))
        thread.start()
        server.wait_for("clear_batch_rows", 16)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        thread.join(10)
    assert answers[0].status_code == 503 and "the server stops" in answers[0].text

"""`clear serve` from outside: a real process, and the clients that people have."""

import json
import shutil
import subprocess
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import httpx
import openai
import pytest
from PIL import Image

from clear.data.images import decode_image
from clear.data.ports import HOST
from clear.data.records import Question
from clear.llm.endpoint import Refused, Request, connect, messages
from clear.reasoning.answering import Answerer
from clear.reasoning.ask import Asked, reply
from tests.serving import (
    QUESTION,
    TOKENS,
    Server,
    asking,
    data_url,
    events,
    joined,
    make_workspace,
    picture,
    serving,
    with_url,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    make_workspace(folder, f"sampling.max_think_tokens={TOKENS}", endless=True)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder, "--rows", "16", "--queue", "64", "--max-body", "300000") as server:
        yield server
        assert "Traceback" not in server.log


@pytest.fixture(scope="module")
def answerer(folder) -> Answerer:
    from clear.config import load

    return Answerer.load(folder / "model", load(folder / "params.yaml"))


def _asked(answerer: Answerer, image: bytes, restore: str, tokens: int) -> tuple[Asked, int]:
    """What `clear ask` says with so few tokens for each reply, and how many it takes."""
    sampling = replace(answerer.config.sampling, max_think_tokens=tokens)
    short = replace(answerer, config=replace(answerer.config, sampling=sampling))
    question = Question("ask", "ask", QUESTION, "")
    (answer,) = short.answer(short.bank([image], ["p"]), [(0, question)], restore)
    return reply(short, image, "p", question, restore), answer.tokens


@pytest.mark.parametrize("restore", ["auto", "never", "always"])
def test_the_answer_is_that_of_clear_ask(server, answerer, restore):
    image = picture()
    expected, tokens = _asked(answerer, image, restore, 12)
    response = server.ask(image=image, max_tokens=12, clear={"restore": restore, "pictures": True})
    assert response.status_code == 200, response.text
    found = response.json()
    message = found["choices"][0]["message"]
    assert message["clear"]["trace"] == expected.trace
    assert message["clear"]["restored"] == expected.restored == (restore == "always")
    assert found["model"] == "model" and found["object"] == "chat.completion"
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["usage"]["completion_tokens"] == tokens
    shown = [decode_image(httpx_data(url)) for url in message["clear"]["pictures"]]
    assert len(shown) == expected.restored
    if expected.restored:
        assert abs(shown[0].astype(int) - expected.picture).max() <= 1


def httpx_data(url: str) -> bytes:
    import base64

    assert url.startswith("data:image/png;base64,")
    return base64.b64decode(url.partition(",")[2])


def test_a_streamed_answer_is_the_whole_one_in_pieces(server):
    body = asking(image=picture(), max_tokens=15, n=2, temperature=1.0, seed=5, clear={"restore": "always"})
    whole = server.ask(body).json()
    response = server.ask(body | {"stream": True, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    found = events(response)
    assert found[-1]["usage"] == whole["usage"] and found[-1]["choices"] == []
    assert {event["object"] for event in found} == {"chat.completion.chunk"} and len({e["id"] for e in found}) == 1
    for choice in whole["choices"]:
        message, index = choice["message"], choice["index"]
        assert joined(found, "content", index) == message["content"]
        assert joined(found, "reasoning_content", index) == message["reasoning_content"]
        mine = [c for event in found for c in event["choices"] if c["index"] == index]
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [choice["finish_reason"]]
        assert [c["delta"]["clear"] for c in mine if "clear" in c["delta"]] == [message["clear"]]
    assert whole["choices"][0]["message"] != whole["choices"][1]["message"]


def test_thoughts_arrive_while_they_are_written(server):
    body = asking(image=picture(), max_tokens=300, stream=True, clear={"restore": "never"})
    times = []
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        for line in response.iter_lines():
            if "reasoning_content" in line:
                times.append(time.monotonic())
    assert len(times) > 20, "not one piece at the end"


def test_the_openai_package(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["model"]
    assert client.models.retrieve("model").owned_by == "clear"
    asked = asking(image=picture(), max_tokens=8, extra_body={"clear": {"restore": "never"}})
    whole = client.chat.completions.create(**asked)
    message = whole.choices[0].message
    assert message.model_extra["clear"]["trace"].startswith("<think> sufficient :")
    assert message.model_extra["reasoning_content"].startswith("sufficient :")
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    pieces = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    streamed = [choice for piece in pieces for choice in piece.choices]
    assert "".join(c.delta.content or "" for c in streamed) == message.content
    assert pieces[-1].usage == whole.usage
    with pytest.raises(openai.BadRequestError, match="elephant") as refused:
        client.chat.completions.create(**asking("which elephant ?", picture()))
    assert refused.value.param == "messages"
    with pytest.raises(openai.NotFoundError, match="other"):
        client.chat.completions.create(**asking() | {"model": "other"})


def test_curl(server, tmp_path):
    (tmp_path / "body.json").write_text(json.dumps(asking(image=picture(), max_tokens=5)))
    command = ["curl", "-sS", "--noproxy", "*", "--fail-with-body", "-H", "Content-Type: application/json"]
    done = subprocess.run(
        [*command, "-d", f"@{tmp_path / 'body.json'}", f"{server.url}/v1/chat/completions"],
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout)["choices"][0]["message"]["role"] == "assistant"


def test_our_own_endpoint_asks_it(server, answerer, tmp_path):
    settings = replace(answerer.config.judge, url=f"{server.url}/v1", model="model", key="", retries=0)
    with connect(settings, "judge", tmp_path / "replies.sqlite") as client:
        found = client.ask(Request(messages(QUESTION, picture()), max_tokens=10))
        assert found.text and found.cut and found.prompt_tokens > 40 and found.completion_tokens == 10
        assert client.ask(Request(messages(QUESTION, picture()), max_tokens=10)).cached
        blind = client.ask(Request(messages(QUESTION), max_tokens=10))
        assert blind.text and blind.prompt_tokens == len(QUESTION.split()) + 2
        with pytest.raises(Refused, match="response_format"):
            client.ask(Request(messages(QUESTION), as_json=True))


def test_a_conversation_of_several_turns(server):
    turns = asking(image=picture(), max_tokens=3)["messages"]
    alone = server.ask(asking(image=picture(), max_tokens=3)).json()
    more = [*turns, {"role": "assistant", "content": "red"}, {"role": "user", "content": "how many red shapes ?"}]
    found = server.ask(asking(max_tokens=3) | {"messages": more}).json()
    # Each turn is its words between two markers.
    assert found["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"] + (1 + 2) + (5 + 2)
    system = server.ask(asking(max_tokens=3) | {"messages": [{"role": "system", "content": "red"}, *turns]}).json()
    assert system["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"] + (1 + 2)


# --- refusals -------------------------------------------------------------------------------------------------------


def _header(width: int, height: int) -> bytes:
    """A PNG that states a size and holds nothing."""
    head = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    chunk = (13).to_bytes(4, "big") + head + zlib.crc32(head).to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IEND\xaeB`\x82"


def _gif_too_many() -> bytes:
    out = BytesIO()
    Image.new("L", (9000, 6000)).save(out, "GIF")
    return out.getvalue()


TWO = {"type": "image_url", "image_url": {"url": data_url(picture())}}


@pytest.mark.parametrize(
    ("body", "status", "param", "said"),
    [
        (asking() | {"messages": []}, 400, "messages", "at least 1"),
        ({"model": "model"}, 400, "messages", "required"),
        (asking() | {"model": "gpt-4"}, 404, "model", "'gpt-4' is not served"),
        (asking(temperature=3), 400, "temperature", "less than or equal to 2"),
        (asking(n=1000), 400, "n", "less than or equal to"),
        (asking(max_tokens=0), 400, "max_tokens", "greater"),
        (asking(frequency_penalty=0.5), 400, "frequency_penalty", "cannot"),
        (asking(logprobs=True), 400, "logprobs", "cannot"),
        (asking(tools=[{"type": "function"}]), 400, "tools", "cannot"),
        (asking(response_format={"type": "json_object"}), 400, "response_format", "cannot"),
        (asking(tempersture=0.0), 400, "tempersture", "does not know"),
        (asking(clear={"restore": "often"}), 400, "clear.restore", "'auto'"),
        (asking(clear={"restores": "auto"}), 400, "clear.restores", "not permitted"),
        (asking(clear={"restore": "always"}), 400, "clear.restore", "no picture"),
        (asking("which elephant ?"), 400, "messages", "'elephant' is not in this model's vocabulary"),
        (asking("\u2028 \U0001f418\n\t"), 400, "messages", "vocabulary"),
        (asking("red " * 9000), 400, "messages", "at most 8192"),
        (asking() | {"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role", "'user'"),
        (asking() | {"messages": [{"role": "assistant", "content": "red"}]}, 400, "messages", "the last one"),
        (
            asking() | {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            400,
            "messages.0.content.0.type",
            "'image_url'",
        ),
        (
            asking() | {"messages": [{"role": "user", "content": [TWO, TWO]}]},
            400,
            "messages.0.content.1.image_url",
            "one",
        ),
        (with_url(data_url(b"GIF8 nonsense")), 400, "messages.0.content.0.image_url", "not a picture"),
        (with_url(data_url(picture()[:-400])), 400, "messages.0.content.0.image_url", "not a complete image"),
        (with_url(data_url(_header(50_000, 20_000))), 400, "messages.0.content.0.image_url", "pixels"),
        (with_url(data_url(_header(10_000, 10_000))), 400, "messages.0.content.0.image_url", "10000 x 10000 pixels"),
        (with_url(data_url(_gif_too_many())), 400, "messages.0.content.0.image_url", "9000 x 6000 pixels"),
        (with_url("data:image/png;base64,%%%"), 400, "messages.0.content.0.image_url", "base64"),
        (with_url("/etc/passwd"), 400, "messages.0.content.0.image_url", "expected data:"),
        (with_url("file:///etc/passwd"), 400, "messages.0.content.0.image_url", "expected data:"),
        (with_url("http://127.0.0.1:1/p.png"), 400, "messages.0.content.0.image_url", "fetches no pictures"),
        (b"{", 400, None, "JSON"),
        (b"[" * 5000, 400, None, "JSON"),
        (b"[]", 400, None, "object"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, None, "hex escape"),
        (b"\xff\xfe", 400, None, "JSON"),
        (b" " * 300_001, 413, None, "300000"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(server, body, status, param, said):
    content = body if isinstance(body, bytes) else json.dumps(body)
    headers = {"Content-Type": "application/json"}
    response = server.http.post("/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param and said in error["message"], error
    assert error["type"] in ("invalid_request_error", "not_found_error")
    assert len(error["message"]) < 400 and "Traceback" not in response.text


def test_other_paths_methods_and_types_of_content_are_errors_in_the_same_form(server):
    for method, path, status, allowed in (
        ("GET", "/v1/nothing", 404, None),
        ("GET", "/v1/chat/completions", 405, "POST"),
        ("GET", "/v1/models/other", 404, None),
        ("POST", "/health", 405, "GET"),
    ):
        response = server.http.request(method, path)
        assert response.status_code == status and response.json()["error"]["message"]
        assert response.headers.get("allow") == allowed
    plain = server.http.post("/v1/chat/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    assert plain.status_code == 415 and plain.json()["error"]["param"] == "content-type"


def test_a_body_without_a_stated_length_is_bounded_too(server):
    def pieces():
        for _ in range(40):
            yield b" " * 10_000

    headers = {"Content-Type": "application/json"}
    response = server.http.post("/v1/chat/completions", content=pieces(), headers=headers)
    assert response.status_code == 413 and response.json()["error"]["code"] == "too_large"


def test_fields_that_change_nothing_are_accepted(server):
    neutral = {"frequency_penalty": 0.0, "logprobs": False, "tools": [], "user": "me", "logit_bias": None, "top_k": -1}
    assert server.ask(asking(max_tokens=2) | neutral).status_code == 200


# --- the rest of the surface ----------------------------------------------------------------------------------------


def test_health_metrics_and_the_page(server):
    assert httpx.get(f"{server.url}/health", trust_env=False).json() == {"ready": True}
    before = {name: server.metric(name) for name in ("clear_restorations_total", "clear_request_seconds_count")}
    server.ask(image=picture(), max_tokens=3, clear={"restore": "always"})
    server.wait_for("clear_restorations_total", before["clear_restorations_total"] + 1)
    assert server.metric("clear_request_seconds_count") == before["clear_request_seconds_count"] + 1
    text = server.http.get("/metrics").text
    for part in ("encode", "prefill", "decode", "restore"):
        assert float(text.partition(f'clear_model_seconds_total{{part="{part}"}} ')[2].split()[0]) > 0
    assert 'clear_requests_total{path="/v1/chat/completions",status="200"}' in text
    page = server.http.get("/docs").text
    assert "max_completion_tokens" in page and "http://" not in page.replace("http://localhost:8000", "")
    described = server.http.get("/openapi.json").json()
    schema = described["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "messages" in schema["properties"] and "Message" in described["components"]["schemas"]


def test_a_page_whose_name_was_made_to_lead_here_gets_nothing(server):
    """A browser takes http://evil.test:8000 for one place, wherever that name leads; such a request says the name."""
    port = server.url.rpartition(":")[2]
    for host in ("evil.test", f"evil.test:{port}", "127.0.0.1.evil.test", f"10.0.0.1:{port}", ""):
        refused = server.http.get("/v1/models", headers={"Host": host})
        assert refused.status_code == 403 and refused.json()["error"]["param"] == "host", host
    for host in ("localhost", f"LOCALHOST:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
        assert server.http.get("/v1/models", headers={"Host": host}).status_code == 200, host


def test_a_page_from_elsewhere_may_ask_nothing(server):
    """Without a word of the server's a browser sends no JSON across origins, and shows no answer to them."""
    asked = {"Origin": "http://evil.test", "Access-Control-Request-Method": "POST"}
    answers = [server.http.options("/v1/chat/completions", headers=asked)]
    answers.append(server.http.get("/v1/models", headers={"Origin": "http://evil.test"}))
    plain = {"Content-Type": "text/plain", "Origin": "http://evil.test"}
    answers.append(server.http.post("/v1/chat/completions", content=b"{}", headers=plain))
    assert not any(name.startswith("access-control-") for answer in answers for name in answer.headers)
    assert answers[-1].status_code == 415
    policy = server.http.get("/docs").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src" not in policy


def test_a_key_that_is_named_and_not_there_is_no_open_server(folder, clear, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MY_KEY", raising=False)
    status, _, said = clear("serve", "model", "--key-from", "MY_KEY")
    assert status == 1 and said == "error: --key-from MY_KEY: this environment variable is not set; export it.\n"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_row(server, stream):
    server.wait_for("clear_batch_rows", 0)
    body = asking(image=picture(), max_tokens=2 * TOKENS, n=8, stream=stream, clear={"restore": "plain"})
    before = server.metric("clear_tokens_total")
    with pytest.raises(httpx.ReadTimeout):  # noqa: SIM117
        with httpx.Client(trust_env=False, timeout=httpx.Timeout(30, read=0.3)) as client:
            with client.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
                for line in response.iter_lines():
                    if "reasoning_content" in line or '"role"' in line:
                        raise httpx.ReadTimeout("leaves in the middle")
    server.wait_for("clear_batch_rows", 0, seconds=5)
    assert server.metric("clear_tokens_total") - before < 8 * TOKENS, "all eight would have written as many"


def test_requests_share_forwards(server):
    """Sixteen clients at once are answered in far fewer steps than one after another."""
    bodies = [asking(image=picture(n), max_tokens=60, clear={"restore": "plain"}) for n in range(16)]
    alone = [server.ask(body).json()["choices"][0]["message"]["clear"]["trace"] for body in bodies[:4]]
    with ThreadPoolExecutor(16) as pool:
        start = threading.Barrier(16)

        def ask(body: dict) -> str:
            start.wait()
            return server.ask(body).json()["choices"][0]["message"]["clear"]["trace"]

        together = list(pool.map(ask, bodies))
    assert together[:4] == alone


# --- starting -------------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_one_line(server: Server, folder, clear, monkeypatch):
    monkeypatch.chdir(folder)
    port = server.url.rpartition(":")[2]
    status, _, said = clear("serve", "model", "--port", port)
    assert (status, said) == (1, f"error: port {port} is taken; name another one with --port.\n")


def test_a_host_beyond_this_machine_needs_a_key(folder, clear, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.delenv("CLEAR_SERVE_KEY", raising=False)
    status, _, said = clear("serve", "model", "--host", "0.0.0.0", "--port", "0")
    assert status == 1 and "--key-from" in said and said.count("\n") == 1


def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_reason(folder, tmp_path, clear, monkeypatch):
    shutil.copy(folder / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    status, _, said = clear("serve", "nothing", "--port", "0")
    assert status == 1 and said.startswith("error: nothing: no model here")
    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "model/tokenizer.json").unlink()
    status, out, said = clear("serve", "model", "--port", "0")
    assert status == 1 and "tokenizer.json is missing" in said and said.count("\n") == 1
    assert out.startswith(f"http://{HOST}:"), "it listens while it loads"
